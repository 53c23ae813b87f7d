"""Kernels that group rows by expert, gather them, and sum them back: see `lit_interns1_kernels.permute`.

Grouping is one pass of a radix sort with one digit per expert: counts per block of choices, one scan over (expert,
block), and the rank of a choice among equal ids of its block. Ids out of range share one more digit, the last.

Letters as there; B blocks of choices.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lit_interns1_kernels.device.codegen import KernelBuild
from lit_interns1_kernels.device.runtime import tuned

_CHOICES = 256
"""Choices of a block: each is compared with all of its block, and each block has a count per expert."""
_STEP = 16
"""How many of them it is compared with at a time."""

_TILES = [
    triton.Config({"ROWS": 4, "COLUMNS": 256}, num_warps=4),
    triton.Config({"ROWS": 1, "COLUMNS": 1024}, num_warps=4),
    triton.Config({"ROWS": 2, "COLUMNS": 1024}, num_warps=8),
]


@triton.jit
def _digits(ids_ptr, position, num_choices, num_experts):
    ids = tl.load(ids_ptr + position, mask=position < num_choices, other=0).to(tl.int64)
    return tl.where((ids < 0) | (ids >= num_experts), num_experts, ids).to(tl.int32)


@triton.jit
def _count_kernel(ids_ptr, counts_ptr, num_choices, num_experts, num_blocks, CHOICES: tl.constexpr, BINS: tl.constexpr):
    """counts[e, b], e ≤ E: how often digit e occurs in block b."""
    block = tl.program_id(0)
    position = block * CHOICES + tl.arange(0, CHOICES)
    digit = _digits(ids_ptr, position, num_choices, num_experts)
    counts = tl.histogram(digit, BINS, mask=position < num_choices)
    bins = tl.arange(0, BINS)
    tl.store(counts_ptr + bins.to(tl.int64) * num_blocks + block, counts, mask=bins <= num_experts)


@triton.jit
def _place_kernel(
    ids_ptr, ends_ptr, order_ptr, row_index_ptr, num_choices, num_experts, num_blocks,
    CHOICES: tl.constexpr, STEP: tl.constexpr, PER_TOKEN: tl.constexpr,
):  # fmt: skip
    """Stores each choice of a block at (what comes before its digit and block) + (its rank inside the block)."""
    block = tl.program_id(0)
    position = block * CHOICES + tl.arange(0, CHOICES)
    digit = _digits(ids_ptr, position, num_choices, num_experts)
    rank = tl.zeros((CHOICES,), tl.int32)
    for start in range(0, CHOICES, STEP):
        other = block * CHOICES + start + tl.arange(0, STEP)
        same = digit[:, None] == _digits(ids_ptr, other, num_choices, num_experts)[None, :]
        rank += tl.sum((same & (other[None, :] < position[:, None])).to(tl.int32), 1)
    before = digit.to(tl.int64) * num_blocks + block - 1
    inside = position < num_choices
    target = tl.load(ends_ptr + before, mask=inside & (before >= 0), other=0) + rank
    tl.store(order_ptr + target, position.to(tl.int64), mask=inside)
    tl.store(row_index_ptr + target, (position // PER_TOKEN).to(tl.int64), mask=inside)


@tuned(_TILES, key=["num_columns"])
@triton.jit
def _gather_kernel(x_ptr, index_ptr, out_ptr, num_rows, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out[r] = x[index[r]]"""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    index = tl.load(index_ptr + row, mask=row < num_rows, other=0).to(tl.int64)
    mask = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    values = tl.load(x_ptr + index[:, None] * num_columns + column[None, :], mask=mask)
    tl.store(out_ptr + row[:, None] * num_columns + column[None, :], values, mask=mask)


@tuned(_TILES, key=["num_columns"])
@triton.jit
def _combine_kernel(
    y_ptr, inverse_ptr, weights_ptr, end_ptr, out_ptr, num_tokens, num_columns,
    K: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_END: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[t] = Σ_k weights[t, k] · y[inverse[t, k]], without the rows at `end` and behind"""
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here, inside = token < num_tokens, column < num_columns
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in tl.static_range(K):
        source = tl.load(inverse_ptr + token * K + k, mask=here, other=0).to(tl.int64)
        counts = here
        if HAS_END:
            counts = here & (source < tl.load(end_ptr))
        mask = counts[:, None] & inside[None, :]
        rows = tl.load(y_ptr + source[:, None] * num_columns + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            weight = tl.load(weights_ptr + token * K + k, mask=counts, other=0.0).to(tl.float32)
            rows = rows * weight[:, None]
        total += rows
    out = out_ptr + token[:, None] * num_columns + column[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=here[:, None] & inside[None, :])


@tuned(_TILES, key=["num_columns"])
@triton.jit
def _combine_backward_kernel(
    grad_ptr, y_ptr, inverse_ptr, weights_ptr, end_ptr, grad_y_ptr, grad_weights_ptr, num_tokens, num_columns,
    K: tl.constexpr, K_PADDED: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_END: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """grad_y[inverse[t, k]] = weights[t, k] · grad[t];  grad_weights[t, k] = ⟨grad[t], y[inverse[t, k]]⟩"""
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = token < num_tokens
    choice = tl.arange(0, K_PADDED)
    grad_weights = tl.zeros((ROWS, K_PADDED), tl.float32)
    for start in range(0, num_columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < num_columns
        mask = here[:, None] & inside[None, :]
        grad = tl.load(grad_ptr + token[:, None] * num_columns + column[None, :], mask=mask, other=0.0).to(tl.float32)
        for k in tl.static_range(K):
            row = tl.load(inverse_ptr + token * K + k, mask=here, other=0).to(tl.int64)
            place = row[:, None] * num_columns + column[None, :]
            counts = here
            if HAS_END:
                counts = here & (row < tl.load(end_ptr))
            scaled = tl.where(counts[:, None], grad, 0.0)
            if HAS_WEIGHTS:
                weight = tl.load(weights_ptr + token * K + k, mask=counts, other=0.0).to(tl.float32)
                rows = tl.load(y_ptr + place, mask=counts[:, None] & inside[None, :], other=0.0).to(tl.float32)
                product = tl.sum(rows * scaled, 1)
                grad_weights += tl.where((choice == k)[None, :], product[:, None], 0.0)
                scaled = scaled * weight[:, None]
            tl.store(grad_y_ptr + place, scaled.to(grad_y_ptr.dtype.element_ty), mask=mask)
    if HAS_WEIGHTS:
        place = grad_weights_ptr + token[:, None] * K + choice[None, :]
        values = grad_weights.to(grad_weights_ptr.dtype.element_ty)
        tl.store(place, values, mask=here[:, None] & (choice < K)[None, :])


def group_by_expert(ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `lit_interns1_kernels.permute.group_by_expert`."""
    ids_TK = ids_TK.contiguous()
    num_choices = ids_TK.numel()
    blocks = max(triton.cdiv(num_choices, _CHOICES), 1)
    order_R = torch.empty(num_choices, dtype=torch.int64, device=ids_TK.device)
    row_index_R = torch.empty_like(order_R)
    counts_EB = torch.empty((num_experts + 1, blocks), dtype=torch.int32, device=ids_TK.device)
    bins = triton.next_power_of_2(num_experts + 1)
    _count_kernel[(blocks,)](ids_TK, counts_EB, num_choices, num_experts, blocks, CHOICES=_CHOICES, BINS=bins)
    ends_EB = counts_EB.flatten().cumsum(0, dtype=torch.int32).view_as(counts_EB)
    if num_choices:
        _place_kernel[(blocks,)](
            ids_TK, ends_EB, order_R, row_index_R, num_choices, num_experts, blocks,
            CHOICES=_CHOICES, STEP=_STEP, PER_TOKEN=ids_TK.shape[1],
        )  # fmt: skip
    return order_R, row_index_R, ends_EB[:num_experts, -1].contiguous()


def gather_rows(x_TD: Tensor, row_index_R: Tensor) -> Tensor:
    """(R, D): the token of each routed row."""
    rows, columns = row_index_R.shape[0], x_TD.shape[1]
    out_RD = x_TD.new_empty((rows, columns))
    if out_RD.numel():
        _gather_kernel[_grid(rows, columns)](
            x_TD.contiguous(), row_index_R.contiguous(), out_RD, rows, columns
        )  # fmt: skip
    return out_RD


def combine_rows(y_RD: Tensor, inverse_TK: Tensor, weights_TK: Tensor | None, offsets_E: Tensor | None) -> Tensor:
    """(T, D): see `lit_interns1_kernels.permute.unpermute_rows`."""
    (tokens, choices), columns = inverse_TK.shape, y_RD.shape[1]
    out_TD = y_RD.new_empty((tokens, columns))
    if out_TD.numel():
        _combine_kernel[_grid(tokens, columns)](
            y_RD.contiguous(), inverse_TK.contiguous(), _given(weights_TK, y_RD), _last(offsets_E, inverse_TK), out_TD,
            tokens, columns, K=choices, HAS_WEIGHTS=weights_TK is not None, HAS_END=offsets_E is not None,
        )  # fmt: skip
    return out_TD


def combine_rows_backward(
    grad_TD: Tensor, y_RD: Tensor, inverse_TK: Tensor, weights_TK: Tensor | None, offsets_E: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of `combine_rows` in its rows and its weights (nothing without weights)."""
    (tokens, choices), columns = inverse_TK.shape, y_RD.shape[1]
    every_row_has_a_choice = y_RD.shape[0] == inverse_TK.numel()
    grad_y_RD = y_RD.new_empty(y_RD.shape) if every_row_has_a_choice else y_RD.new_zeros(y_RD.shape)
    grad_weights_TK = grad_TD.new_empty(0) if weights_TK is None else weights_TK.new_zeros(weights_TK.shape)
    if inverse_TK.numel() and columns:
        _combine_backward_kernel[lambda meta: (triton.cdiv(tokens, meta["ROWS"]),)](
            grad_TD.contiguous(), y_RD.contiguous(), inverse_TK.contiguous(), _given(weights_TK, y_RD),
            _last(offsets_E, inverse_TK), grad_y_RD, grad_weights_TK, tokens, columns,
            K=choices, K_PADDED=triton.next_power_of_2(choices), HAS_WEIGHTS=weights_TK is not None,
            HAS_END=offsets_E is not None,
        )  # fmt: skip
    return grad_y_RD, grad_weights_TK


def _grid(rows: int, columns: int):
    return lambda meta: (triton.cdiv(rows, meta["ROWS"]), triton.cdiv(columns, meta["COLUMNS"]))


def _given(optional: Tensor | None, other: Tensor) -> Tensor:
    """A pointer is always passed; the kernel does not read it where the argument is missing."""
    return other if optional is None else optional.contiguous()


def _last(offsets_E: Tensor | None, other: Tensor) -> Tensor:
    return other if offsets_E is None else offsets_E[-1:]


def _builds() -> tuple[KernelBuild, ...]:
    pointers, sizes = {"ids_ptr": "*i64"}, {"num_choices": "i32", "num_experts": "i32", "num_blocks": "i32"}
    builds = [
        KernelBuild(
            f"permute_count/{experts}",
            _count_kernel,
            {**pointers, "counts_ptr": "*i32", **sizes},
            {"CHOICES": _CHOICES, "BINS": triton.next_power_of_2(experts + 1)},
            undivided=tuple(sizes),
            extended=experts != 128,
        )
        for experts in (128, 512)
    ]
    builds.append(
        KernelBuild(
            "permute_place",
            _place_kernel,
            {**pointers, "ends_ptr": "*i32", "order_ptr": "*i64", "row_index_ptr": "*i64", **sizes},
            {"CHOICES": _CHOICES, "STEP": _STEP, "PER_TOKEN": 8},
            undivided=tuple(sizes),
        )
    )
    choices = {"K": 8, "HAS_WEIGHTS": True, "HAS_END": True}
    for number, (tile, dtype) in enumerate((tile, dtype) for tile in _TILES for dtype in ("bf16", "fp32")):
        name = f"{dtype}/{tile.kwargs['ROWS']}x{tile.kwargs['COLUMNS']}"
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        rows = {"inverse_ptr": "*i64", "weights_ptr": "*fp32", "end_ptr": "*i32"}
        for kernel, signature, constants in (
            (
                _gather_kernel,
                {"x_ptr": f"*{dtype}", "index_ptr": "*i64", "out_ptr": f"*{dtype}", "num_rows": "i32"},
                {},
            ),
            (
                _combine_kernel,
                {"y_ptr": f"*{dtype}", **rows, "out_ptr": f"*{dtype}", "num_tokens": "i32"},
                choices,
            ),
            (
                _combine_backward_kernel,
                {
                    "grad_ptr": f"*{dtype}",
                    "y_ptr": f"*{dtype}",
                    **rows,
                    "grad_y_ptr": f"*{dtype}",
                    "grad_weights_ptr": "*fp32",
                    "num_tokens": "i32",
                },
                {**choices, "K_PADDED": 8},
            ),
        ):
            builds.append(
                KernelBuild(
                    f"{kernel.fn.__name__.strip('_').removesuffix('_kernel')}_rows/{name}",
                    kernel.fn,
                    {**signature, "num_columns": "i32"},
                    {**constants, **tile.kwargs},
                    undivided=("num_rows", "num_tokens", "end_ptr"),
                    options=options,
                    extended=number > 0,
                )
            )
    return tuple(builds)


BUILDS = _builds()

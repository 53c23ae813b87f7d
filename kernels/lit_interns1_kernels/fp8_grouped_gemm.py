"""Grouped matrix product in FP8 without padded groups (arXiv 2508.16584), and a grouped linear layer made of it.

    out[r, n] = Σ_k  ( Σ_{j in block k} a[r, j] · b[g(r), n, j] ) · a_scale[r, k] · b_scale[g(r), ⌊n/128⌋, k]

Rows are grouped: group g owns rows offsets[g−1] … offsets[g]. The inner sum of a 128-block of K is one tensor-core
product; scales enter in float32, and the result is bfloat16. Operands and scales as in `fp8_quantize`.

The hardware copies boxes of fixed size, which is why groups used to be padded to multiples of 128 rows. Here the last
box of a group is cut at the group's end instead. Four forms:

- `clipped`, `ragged`: on Hopper and newer GPUs, see `device.fp8_grouped_gemm`. The paper instead picks each store from
  a pool of boxes (`plan_stores`); Triton cannot store a part of a tile, so that the descriptor has to clip.
- `padded`: every group padded to a multiple of 128 rows, the form to compare with.
- `reference`: plain torch, group after group. A sum over a block is exact in float64 (products of e4m3 values are
  multiples of 2^-18 below 2^18), then rounded once, and blocks are added in order: a row's result depends on nothing
  but the row, so that padding cannot change a bit of it.

Letters: M rows, G groups, N output size, K input size, P rows with padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_interns1_kernels.fp8_quantize import (
    BLOCK,
    check_1x128,
    check_128x128,
    check_e4m3_device,
    quantize_1x128,
    quantize_128x128,
)

FP8GemmBackend = Literal["auto", "clipped", "ragged", "padded", "reference"]


def plan_stores(rows_left: int) -> list[tuple[int, int]]:
    """How a pool of boxes with 128, 64, …, 1 rows covers the rows of a group (arXiv 2508.16584: descriptor pool).

    Whole boxes of 128 rows, then two boxes with the largest power of two that is not above the rest: one from its
    start, one up to its end. They overlap and write equal values there; if the rest is such a power, one is enough.
    This plans the paper's method; no kernel here uses it (see the module).

    Args:
        rows_left: Rows from the start of the first tile to the end of the group.

    Returns:
        (offset, rows of the box) of every store.

    Raises:
        ValueError: If `rows_left` is negative.
    """
    if rows_left < 0:
        raise ValueError(f"rows_left = {rows_left} must not be negative")
    whole = rows_left - rows_left % BLOCK
    stores = [(offset, BLOCK) for offset in range(0, whole, BLOCK)]
    if rest := rows_left - whole:
        box = 1 << (rest.bit_length() - 1)
        stores += [(offset, box) for offset in sorted({whole, rows_left - box})]
    return stores


def padding_saving(group_sizes: Sequence[int], block: int = BLOCK) -> float:
    """Share of the padded rows that are not needed: 1 − M / Σ_g block · ⌈m_g / block⌉; 0 without rows.

    Args:
        group_sizes: Rows m_g of every group.
        block: Multiple to which groups would be padded.

    Raises:
        ValueError: If a size is negative, or `block` is not positive.
    """
    if block < 1:
        raise ValueError(f"block = {block} must be at least 1")
    if any(size < 0 for size in group_sizes):
        raise ValueError(f"group_sizes {list(group_sizes)} must not be negative")
    padded = sum(-(-size // block) * block for size in group_sizes)
    return 1.0 - sum(group_sizes) / padded if padded else 0.0


class PaddedGroups(NamedTuple):
    """What `pad_groups` gives.

    Attributes:
        a_PK: Operand with zeros behind every group.
        a_scale: Its scales, (P, K/128).
        offsets_G: End of each padded group.
        row_M: Where each row went; 0 for rows behind the last group.
    """

    a_PK: Tensor
    a_scale: Tensor
    offsets_G: Tensor
    row_M: Tensor


def pad_groups(a_MK: Tensor, a_scale: Tensor, offsets_G: Tensor, num_padded_rows: int | None = None) -> PaddedGroups:
    """Copies the rows such that every group fills a multiple of 128 rows.

    Args:
        a_MK: (M, K) float8_e4m3fn.
        a_scale: (M, K/128) float32.
        offsets_G: (G,) int32, end of each group.
        num_padded_rows: Rows to allocate, Σ_g 128 · ⌈m_g / 128⌉ or more. Default: the most that any group sizes could
            need, because the sizes are not read.
    """
    rows, groups = a_MK.shape[0], offsets_G.shape[0]
    if num_padded_rows is None:
        num_padded_rows = (rows + min(groups, rows) * (BLOCK - 1)) // BLOCK * BLOCK
    start_G = F.pad(offsets_G[:-1], (1, 0))
    padded_size_G = (offsets_G - start_G + BLOCK - 1) // BLOCK * BLOCK
    padded_end_G = padded_size_G.cumsum(0)
    shift_G = padded_end_G - padded_size_G - start_G
    row_M, group_M = _groups_of_rows(rows, offsets_G)
    target_M = torch.where(row_M < offsets_G[-1], row_M + shift_G[group_M], 0)
    row_P, group_P = _groups_of_rows(num_padded_rows, padded_end_G)
    source_P = row_P - shift_G[group_P]
    filled_P1 = ((source_P < offsets_G[group_P]) & (row_P < padded_end_G[-1]))[:, None]
    source_P = source_P.clamp(max=rows - 1)
    # bytes: float8 has few operations, and its zero is the byte 0
    a_PK = torch.where(filled_P1, a_MK.view(torch.uint8)[source_P], 0).view(a_MK.dtype)
    a_scale = torch.where(filled_P1, a_scale[source_P], 0.0)
    return PaddedGroups(a_PK, a_scale, padded_end_G.to(offsets_G.dtype), target_M)


def _groups_of_rows(num_rows: int, offsets_G: Tensor) -> tuple[Tensor, Tensor]:
    row = torch.arange(num_rows, device=offsets_G.device)
    return row, torch.searchsorted(offsets_G, row, right=True).clamp(max=offsets_G.shape[0] - 1)


def _without_padding(out_PN: Tensor, row_M: Tensor, offsets_G: Tensor) -> Tensor:
    routed_M1 = (torch.arange(row_M.shape[0], device=row_M.device) < offsets_G[-1])[:, None]
    return torch.where(routed_M1, out_PN[row_M], 0.0)


def fp8_grouped_gemm_reference(
    a_MK: Tensor, a_scale: Tensor, b_GNK: Tensor, b_scale: Tensor, offsets_G: Tensor
) -> Tensor:
    """The reference: a Python loop over groups and blocks of K. Arguments as in `fp8_grouped_gemm`."""
    rows, columns = a_MK.shape[0], b_GNK.shape[1]
    ends = offsets_G.tolist()
    if any(end < start for start, end in zip([0, *ends], ends, strict=False)) or ends[-1] > rows:
        raise ValueError(f"offsets_G {ends} must not decrease, and not go beyond the {rows} rows of a_MK")
    out_MN = torch.zeros((rows, columns), dtype=torch.bfloat16, device=a_MK.device)
    start = 0
    for b_NK, scale, end in zip(b_GNK.unbind(0), b_scale.unbind(0), ends, strict=True):
        if end > start:
            wide_scale_KN = scale.repeat_interleave(BLOCK, 0)[:columns].T
            out_MN[start:end] = _blockwise_product(a_MK[start:end], a_scale[start:end], b_NK, wide_scale_KN)
        start = end
    return out_MN


def _blockwise_product(a_MK: Tensor, a_scale: Tensor, b_NK: Tensor, b_scale_KN: Tensor) -> Tensor:
    total_MN = a_scale.new_zeros(a_MK.shape[0], b_NK.shape[0])
    for block, (a, b) in enumerate(zip(a_MK.split(BLOCK, 1), b_NK.split(BLOCK, 1), strict=True)):
        product_MN = (a.double() @ b.double().T).float()
        total_MN += product_MN * (a_scale[:, block, None] * b_scale_KN[block])
    return total_MN


@torch.library.custom_op("lit_interns1::fp8_grouped_gemm", mutates_args=(), device_types="cpu")
def _gemm(a_MK: Tensor, a_scale: Tensor, b_GNK: Tensor, b_scale: Tensor, offsets_G: Tensor, backend: str) -> Tensor:
    if backend in ("clipped", "ragged"):
        raise ValueError(f"FP8 back-end {backend!r} needs a GPU: a CPU has auto, reference and padded")
    if backend == "padded":
        padded = pad_groups(a_MK, a_scale, offsets_G)
        out_PN = fp8_grouped_gemm_reference(padded.a_PK, padded.a_scale, b_GNK, b_scale, padded.offsets_G)
        return _without_padding(out_PN, padded.row_M, offsets_G)
    return fp8_grouped_gemm_reference(a_MK, a_scale, b_GNK, b_scale, offsets_G)


@_gemm.register_fake
def _(a_MK, a_scale, b_GNK, b_scale, offsets_G, backend):
    return a_MK.new_empty((a_MK.shape[0], b_GNK.shape[1]), dtype=torch.bfloat16)


@_gemm.register_kernel("cuda")
def _gemm_on_gpu(
    a_MK: Tensor, a_scale: Tensor, b_GNK: Tensor, b_scale: Tensor, offsets_G: Tensor, backend: str
) -> Tensor:
    if backend == "reference":
        return fp8_grouped_gemm_reference(a_MK, a_scale, b_GNK, b_scale, offsets_G)
    check_e4m3_device(a_MK.device)
    from lit_interns1_kernels.device import fp8_grouped_gemm as device

    b_GNK, b_scale, row_M = b_GNK.contiguous(), b_scale.contiguous(), None
    ends_G = offsets_G
    if backend == "padded":
        a_MK, a_scale, ends_G, row_M = pad_groups(a_MK, a_scale, offsets_G)
    out = a_MK.new_empty((a_MK.shape[0], b_GNK.shape[1]), dtype=torch.bfloat16)
    launch = device.ragged if backend == "ragged" else device.clipped
    launch(a_MK.contiguous(), a_scale.contiguous(), b_GNK, b_scale, ends_G, out)
    return out if row_M is None else _without_padding(out, row_M, offsets_G)


def _check_offsets(offsets_G: Tensor, groups: int) -> None:
    if offsets_G.dtype != torch.int32 or tuple(offsets_G.shape) != (groups,) or groups == 0:
        raise ValueError(
            f"offsets_G {tuple(offsets_G.shape)} of {offsets_G.dtype} must be (groups,) of torch.int32, with one end "
            f"for each of at least one group; there are {groups}"
        )


def _check_backend(backend: str) -> None:
    if backend not in get_args(FP8GemmBackend):
        raise ValueError(f"FP8 back-end {backend!r} is unknown: choose one of {', '.join(get_args(FP8GemmBackend))}")


def fp8_grouped_gemm(
    a_MK: Tensor,
    a_scale: Tensor,
    b_GNK: Tensor,
    b_scale: Tensor,
    offsets_G: Tensor,
    *,
    backend: FP8GemmBackend = "auto",
) -> Tensor:
    """Product of the rows of each group with the matrix of the group. Not differentiable; see `fp8_grouped_linear`.

    Args:
        a_MK: (M, K) float8_e4m3fn, rows behind one another without padding; from `quantize_1x128`.
        a_scale: (M, K/128) float32.
        b_GNK: (G, N, K) float8_e4m3fn, from `quantize_128x128`; N a multiple of 8 (output rows of 16 bytes).
        b_scale: (G, ⌈N/128⌉, K/128) float32.
        offsets_G: (G,) int32, end of each group's rows; they do not decrease, and the last is at most M.
        backend: `clipped`, `ragged`, `padded`, `reference` (see the module), or `auto`: clipped on a GPU, reference on
            a CPU. On a GPU, `reference` waits for the offsets.

    Returns:
        (M, N) bfloat16. Rows from offsets_G[-1] on belong to no group, are not read, and come out as zeros.

    Raises:
        ValueError: If shapes, dtypes or offsets do not fit together, or the back-end is unknown or cannot run here.
    """
    _check_backend(backend)
    check_1x128("a_MK", a_MK, a_scale)
    check_128x128("b_GNK", b_GNK, b_scale)
    if b_GNK.ndim != 3 or b_GNK.shape[2] != a_MK.shape[1]:
        raise ValueError(f"b_GNK {tuple(b_GNK.shape)} must be (groups, N, {a_MK.shape[1]}): K is that of a_MK")
    if b_GNK.shape[1] % 8:
        raise ValueError(f"b_GNK {tuple(b_GNK.shape)}: N = {b_GNK.shape[1]} must be a multiple of 8")
    _check_offsets(offsets_G, b_GNK.shape[0])
    out_MN: Tensor = _gemm(a_MK, a_scale, b_GNK, b_scale, offsets_G, backend)
    return out_MN


def _linear_forward(
    x_MK: Tensor, weight_GNK: Tensor, offsets_G: Tensor, power_of_two_scales: bool, backend: str
) -> Tensor:
    a_MK, a_scale = quantize_1x128(x_MK, power_of_two_scales)
    b_GNK, b_scale = quantize_128x128(weight_GNK, power_of_two_scales)
    out_MN: Tensor = _gemm(a_MK, a_scale, b_GNK, b_scale, offsets_G, backend)
    return out_MN.to(x_MK.dtype)


def _linear_backward(
    grad_MN: Tensor, x_MK: Tensor, weight_GNK: Tensor, offsets_G: Tensor, power_of_two_scales: bool, backend: str,
    need_x: bool, need_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    grad_x, grad_weight = x_MK.new_empty(0), weight_GNK.new_empty(0)
    if need_x:
        grad_x = _linear_forward(grad_MN, weight_GNK.transpose(1, 2), offsets_G, power_of_two_scales, backend)
    if need_weight:
        grad_weight = _weight_gradient(grad_MN, x_MK, offsets_G).to(weight_GNK.dtype)
    return grad_x.to(x_MK.dtype), grad_weight


def _weight_gradient(grad_MN: Tensor, x_MK: Tensor, offsets_G: Tensor) -> Tensor:
    if grad_MN.device.type != "cpu":
        return _weight_gradient_on_gpu(grad_MN, x_MK, offsets_G)
    grad_GNK = torch.empty((offsets_G.shape[0], grad_MN.shape[1], x_MK.shape[1]))
    start = 0
    for grad_NK, end in zip(grad_GNK.unbind(0), offsets_G.tolist(), strict=True):
        torch.mm(grad_MN[start:end].float().T, x_MK[start:end].float(), out=grad_NK)
        start = end
    return grad_GNK


def _weight_gradient_on_gpu(grad_MN: Tensor, x_MK: Tensor, offsets_G: Tensor) -> Tensor:
    return F.grouped_mm(grad_MN.bfloat16().T, x_MK.bfloat16(), offs=offsets_G)


_DEVICES = ("cpu", "cuda")
_linear = torch.library.custom_op(
    "lit_interns1::fp8_grouped_linear", _linear_forward, mutates_args=(), device_types=_DEVICES
)
_linear_gradients = torch.library.custom_op(
    "lit_interns1::fp8_grouped_linear_backward", _linear_backward, mutates_args=(), device_types=_DEVICES
)


@_linear.register_fake
def _(x_MK, weight_GNK, offsets_G, power_of_two_scales, backend):
    return x_MK.new_empty((x_MK.shape[0], weight_GNK.shape[1]))


@_linear_gradients.register_fake
def _(grad_MN, x_MK, weight_GNK, offsets_G, power_of_two_scales, backend, need_x, need_weight):
    return x_MK.new_empty(x_MK.shape if need_x else 0), weight_GNK.new_empty(weight_GNK.shape if need_weight else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_MK, weight_GNK, offsets_G, ctx.power_of_two_scales, ctx.backend = inputs
    ctx.save_for_backward(x_MK, weight_GNK, offsets_G)


def _differentiate(ctx: Any, grad_MN: Tensor) -> tuple[Tensor | None, ...]:
    need_x, need_weight = ctx.needs_input_grad[:2]
    grad_x, grad_weight = _linear_gradients(
        grad_MN, *ctx.saved_tensors, ctx.power_of_two_scales, ctx.backend, need_x, need_weight
    )
    return grad_x if need_x else None, grad_weight if need_weight else None, None, None, None


_linear.register_autograd(_differentiate, setup_context=_save)


def fp8_grouped_linear(
    x_MK: Tensor,
    weight_GNK: Tensor,
    offsets_G: Tensor,
    *,
    power_of_two_scales: bool = False,
    backend: FP8GemmBackend = "auto",
) -> Tensor:
    """x · W_gᵀ for the rows of each group in FP8, differentiable in x and the weight.

    Forward and the gradient of x quantise both operands (the output's gradient like x, the transposed weights anew) and
    multiply in FP8. The gradient of the weight is computed from what is not quantised: in float32 on a CPU, in
    bfloat16 on a GPU. Nothing in FP8 is kept between forward and backward. Intern-S1-Pro computes only the linear
    layers of its experts in FP8 (arXiv 2603.25040).

    Args:
        x_MK: (M, K) bfloat16, float32 or float16.
        weight_GNK: (G, N, K) bfloat16, float32 or float16; N and K multiples of 128 (each is summed over in one pass).
        offsets_G: (G,) int32, end of each group's rows.
        power_of_two_scales: Round all scales up to powers of two.
        backend: As in `fp8_grouped_gemm`.

    Returns:
        (M, N) in the dtype of x, with the precision of bfloat16. Rows from offsets_G[-1] on are zeros, and so is the
        gradient of x there.

    Raises:
        ValueError: As `fp8_grouped_gemm` and the quantisers.
    """
    _check_backend(backend)
    if x_MK.ndim != 2 or weight_GNK.ndim != 3 or weight_GNK.shape[2] != x_MK.shape[1]:
        raise ValueError(
            f"x_MK {tuple(x_MK.shape)} and weight_GNK {tuple(weight_GNK.shape)} must be (M, K) and (groups, N, K)"
        )
    for letter, size in zip("NK", weight_GNK.shape[1:], strict=True):
        if size % BLOCK or size == 0:
            raise ValueError(
                f"weight_GNK {tuple(weight_GNK.shape)}: {letter} = {size} must be a positive multiple of {BLOCK}"
            )
    _check_offsets(offsets_G, weight_GNK.shape[0])
    out_MN: Tensor = _linear(x_MK, weight_GNK, offsets_G, power_of_two_scales, backend)
    return out_MN

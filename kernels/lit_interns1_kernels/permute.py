"""Rows grouped by expert, and back.

    order = stable argsort of the flat expert ids          row_index_r = ⌊order_r / K⌋          inverse[order_r] = r
    permute:    rows_r = x[row_index_r]                    unpermute:  y_t = Σ_k  w_tk · rows[inverse_tk]

Each is the other's gradient. Nothing depends on the order in which threads run: positions are stable ranks (counts per
block, a scan over the blocks, ranks inside a block), and both sums over k go from k = 0 upwards.

Letters: T tokens, K choices per token, R routed rows (T·K), E experts, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_interns1_kernels.backends import runs_plainly, triton_target

_GATHERED_TOKENS = 32
"""Tokens whose rows are gathered at a time on a CPU; their copies stay in the cache."""


def group_by_expert_reference(ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The form that must be equalled: sort and count. Arguments as in `group_by_expert`."""
    order_R = torch.argsort(ids_TK.flatten(), stable=True)
    offsets_E = (ids_TK.flatten()[:, None] == torch.arange(num_experts, device=ids_TK.device)).sum(0).cumsum(0)
    return order_R, order_R // ids_TK.shape[1], offsets_E.to(torch.int32)


def unpermute_rows_reference(
    y_RD: Tensor, inverse_TK: Tensor, weights_TK: Tensor | None = None, offsets_E: Tensor | None = None
) -> Tensor:
    """The form that must be equalled: gather, weigh, sum. Arguments as in `unpermute_rows`."""
    rows_TKD = y_RD[inverse_TK]
    if offsets_E is not None:
        rows_TKD = torch.where((inverse_TK < offsets_E[-1])[..., None], rows_TKD, 0.0)
    if weights_TK is not None:
        rows_TKD = rows_TKD * weights_TK[..., None]
    return rows_TKD.sum(1).to(y_RD.dtype)


def inverse_order(order_R: Tensor, num_choices: int) -> Tensor:
    """(T, K) int64: the routed row of each choice, from `order_R` of `group_by_expert`."""
    rows_R = torch.arange(order_R.shape[0], device=order_R.device)
    return torch.empty_like(order_R).scatter_(0, order_R, rows_R).view(-1, num_choices)


def _sort_by_expert(ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    flat_R = ids_TK.flatten()
    if flat_R.numel():
        low, high = (int(value) for value in flat_R.aminmax())
        if low < 0 or high >= num_experts:
            raise ValueError(f"ids_TK has values from {low} to {high}: they must lie in [0, {num_experts})")
    offsets_E = torch.bincount(flat_R, minlength=num_experts).cumsum(0).to(torch.int32)
    # a radix sort: the fewer bytes a key has, the fewer passes
    order_R = torch.argsort(flat_R.to(torch.uint8 if num_experts <= 256 else torch.int32), stable=True)
    return order_R, torch.div(order_R, max(ids_TK.shape[1], 1), rounding_mode="floor"), offsets_E


@torch.library.custom_op("lit_interns1::group_by_expert", mutates_args=(), device_types="cpu")
def _group(ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    return _sort_by_expert(ids_TK, num_experts)


@_group.register_fake
def _(ids_TK, num_experts):
    rows = ids_TK.numel()
    order_R = ids_TK.new_empty(rows, dtype=torch.int64)
    return order_R, torch.empty_like(order_R), ids_TK.new_empty(num_experts, dtype=torch.int32)


@_group.register_kernel("cuda")
def _(ids_TK, num_experts):
    if triton_target(ids_TK.device) is None:
        return _sort_by_expert(ids_TK, num_experts)
    from lit_interns1_kernels.device import permute

    return permute.group_by_expert(ids_TK, num_experts)


def group_by_expert(ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Groups the choices of all tokens by expert, in the stable order of the flat choices.

    Args:
        ids_TK: (T, K) integer expert ids. Triton kernels put choices whose id is not in [0, E) behind the last offset,
            in stable order; elsewhere they are refused. What comes after leaves such rows out if it gets `offsets_E`.
        num_experts: E.

    Returns:
        order_R: (R,) int64, the flat choice (t·K + k) of each routed row.
        row_index_R: (R,) int64, its token.
        offsets_E: (E,) int32, end of each expert's rows.

    Raises:
        ValueError: If `ids_TK` is no matrix of integers, or names experts that do not exist (not with Triton), or there
            is no expert.
    """
    if ids_TK.ndim != 2 or ids_TK.is_floating_point():
        raise ValueError(f"ids_TK {tuple(ids_TK.shape)}, {ids_TK.dtype}: must be a matrix of integers")
    if num_experts < 1:
        raise ValueError(f"num_experts = {num_experts} must be at least 1")
    return (_sort_by_expert if runs_plainly(ids_TK) else _group)(ids_TK, num_experts)


@torch.library.custom_op("lit_interns1::permute_rows", mutates_args=(), device_types="cpu")
def _permute(x_TD: Tensor, row_index_R: Tensor, inverse_TK: Tensor | None, offsets_E: Tensor | None) -> Tensor:
    return x_TD.index_select(0, row_index_R)


@_permute.register_fake
def _(x_TD, row_index_R, inverse_TK, offsets_E):
    return x_TD.new_empty((row_index_R.shape[0], x_TD.shape[1]))


@_permute.register_kernel("cuda")
def _(x_TD, row_index_R, inverse_TK, offsets_E):
    if triton_target(x_TD.device) is None:
        return x_TD.index_select(0, row_index_R)
    from lit_interns1_kernels.device import permute

    return permute.gather_rows(x_TD, row_index_R)


def _permute_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_TD, *index = inputs
    ctx.num_tokens = x_TD.shape[0]
    ctx.save_for_backward(*index)


def _permute_differentiate(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
    row_index_R, inverse_TK, offsets_E = ctx.saved_tensors
    if inverse_TK is not None:
        return _unpermute(grad_RD, inverse_TK, None, offsets_E), None, None, None
    if offsets_E is not None:
        counts_R1 = torch.arange(grad_RD.shape[0], device=grad_RD.device)[:, None] < offsets_E[-1]
        grad_RD = torch.where(counts_R1, grad_RD, 0.0)
    return grad_RD.new_zeros(ctx.num_tokens, grad_RD.shape[1]).index_add(0, row_index_R, grad_RD), None, None, None


_permute.register_autograd(_permute_differentiate, setup_context=_permute_save)


def permute_rows(
    x_TD: Tensor, row_index_R: Tensor, inverse_TK: Tensor | None = None, offsets_E: Tensor | None = None
) -> Tensor:
    """The token of each routed row, copied. Differentiable in x.

    Args:
        x_TD: (T, D).
        row_index_R: (R,) integer, token of each routed row.
        inverse_TK: (T, K) integer from `inverse_order`. With it the gradient of a token is the sum of its K rows in
            fixed order; without it rows are added as they come, and on a GPU the last bits can differ between runs.
        offsets_E: (E,) int32, end of each expert's rows. Gradients of rows behind the last one do not count.

    Returns:
        (R, D).

    Raises:
        ValueError: If shapes do not fit together.
    """
    if x_TD.ndim != 2 or row_index_R.ndim != 1:
        raise ValueError(
            f"x_TD {tuple(x_TD.shape)} and row_index_R {tuple(row_index_R.shape)} must be (tokens, hidden size) "
            "and (routed rows,)"
        )
    if inverse_TK is not None and (inverse_TK.ndim != 2 or inverse_TK.shape[0] != x_TD.shape[0]):
        raise ValueError(f"inverse_TK {tuple(inverse_TK.shape)} must have one row for each of {len(x_TD)} tokens")
    return _permute(x_TD, row_index_R, inverse_TK, offsets_E)


@torch.library.custom_op("lit_interns1::unpermute_rows", mutates_args=(), device_types="cpu")
def _unpermute(y_RD: Tensor, inverse_TK: Tensor, weights_TK: Tensor | None, offsets_E: Tensor | None) -> Tensor:
    if inverse_TK.numel() == 0 or _has_tail(inverse_TK, offsets_E):
        return unpermute_rows_reference(y_RD, inverse_TK, weights_TK, offsets_E)
    if weights_TK is None:
        return F.embedding_bag(inverse_TK, y_RD, mode="sum")
    dtype = torch.promote_types(y_RD.dtype, weights_TK.dtype)  # the two must be of the same
    sums_TD = F.embedding_bag(inverse_TK, y_RD.to(dtype), mode="sum", per_sample_weights=weights_TK.to(dtype))
    return sums_TD.to(y_RD.dtype)


def _has_tail(inverse_TK: Tensor, offsets_E: Tensor | None) -> bool:
    return offsets_E is not None and int(offsets_E[-1]) < inverse_TK.numel()


@_unpermute.register_fake
def _(y_RD, inverse_TK, weights_TK, offsets_E):
    return y_RD.new_empty((inverse_TK.shape[0], y_RD.shape[1]))


@_unpermute.register_kernel("cuda")
def _(y_RD, inverse_TK, weights_TK, offsets_E):
    if triton_target(y_RD.device) is None or y_RD.dtype == torch.float64:
        return unpermute_rows_reference(y_RD, inverse_TK, weights_TK, offsets_E)
    from lit_interns1_kernels.device import permute

    return permute.combine_rows(y_RD, inverse_TK, weights_TK, offsets_E)


def _unpermute_backward_reference(
    grad_TD: Tensor, y_RD: Tensor, inverse_TK: Tensor, weights_TK: Tensor | None, offsets_E: Tensor | None
) -> tuple[Tensor, Tensor]:
    num_rows, flat = y_RD.shape[0], inverse_TK.flatten()
    choices = torch.arange(flat.shape[0], device=flat.device)
    row_index_R = flat.new_zeros(num_rows).scatter_(0, flat, choices // max(inverse_TK.shape[1], 1))
    counts_TK = torch.ones_like(inverse_TK, dtype=torch.bool) if offsets_E is None else inverse_TK < offsets_E[-1]
    scale_TK = counts_TK.to(grad_TD.dtype) if weights_TK is None else torch.where(counts_TK, weights_TK, 0.0)
    scale_R = scale_TK.new_zeros(num_rows).scatter_(0, flat, scale_TK.flatten())
    grad_y_RD = grad_TD.index_select(0, row_index_R).mul_(scale_R[:, None])
    if weights_TK is None:
        return grad_y_RD, grad_TD.new_empty(0)
    grad_weights_TK = weights_TK.new_empty(weights_TK.shape)
    for inverse_CK, grad_CD, out_CK in zip(
        *(x.split(_GATHERED_TOKENS) for x in (inverse_TK, grad_TD, grad_weights_TK)), strict=True
    ):
        rows_CKD = y_RD.index_select(0, inverse_CK.flatten()).view(*inverse_CK.shape, -1)
        out_CK.copy_(torch.linalg.vecdot(rows_CKD, grad_CD[:, None]))
    return grad_y_RD, grad_weights_TK.masked_fill_(~counts_TK, 0.0)


@torch.library.custom_op("lit_interns1::unpermute_rows_backward", mutates_args=(), device_types="cpu")
def _unpermute_backward(
    grad_TD: Tensor, y_RD: Tensor, inverse_TK: Tensor, weights_TK: Tensor | None, offsets_E: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _unpermute_backward_reference(grad_TD, y_RD, inverse_TK, weights_TK, offsets_E)


@_unpermute_backward.register_fake
def _(grad_TD, y_RD, inverse_TK, weights_TK, offsets_E):
    weights_shape = 0 if weights_TK is None else weights_TK.shape
    return y_RD.new_empty(y_RD.shape), (grad_TD if weights_TK is None else weights_TK).new_empty(weights_shape)


@_unpermute_backward.register_kernel("cuda")
def _(grad_TD, y_RD, inverse_TK, weights_TK, offsets_E):
    if triton_target(y_RD.device) is None or y_RD.dtype == torch.float64:
        return _unpermute_backward_reference(grad_TD, y_RD, inverse_TK, weights_TK, offsets_E)
    from lit_interns1_kernels.device import permute

    return permute.combine_rows_backward(grad_TD, y_RD, inverse_TK, weights_TK, offsets_E)


def _unpermute_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _unpermute_differentiate(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
    grad_y_RD, grad_weights_TK = _unpermute_backward(grad_TD, *ctx.saved_tensors)
    return grad_y_RD, None, None if ctx.saved_tensors[2] is None else grad_weights_TK, None


_unpermute.register_autograd(_unpermute_differentiate, setup_context=_unpermute_save)


def unpermute_rows(
    y_RD: Tensor, inverse_TK: Tensor, weights_TK: Tensor | None = None, offsets_E: Tensor | None = None
) -> Tensor:
    """The weighted sum of each token's routed rows. Differentiable in y and the weights.

    Args:
        y_RD: (R, D) routed rows.
        inverse_TK: (T, K) integer, the routed row of each choice (`inverse_order`); no row occurs twice.
        weights_TK: (T, K); None: all 1.
        offsets_E: (E,) int32, end of each expert's rows. Rows behind the last one do not count, whatever they hold;
            their gradients and those of their weights are 0.

    Returns:
        (T, D), dtype of y; sums are float32 or wider.

    Raises:
        ValueError: If shapes do not fit together.
    """
    if y_RD.ndim != 2 or inverse_TK.ndim != 2:
        raise ValueError(
            f"y_RD {tuple(y_RD.shape)} and inverse_TK {tuple(inverse_TK.shape)} must be (routed rows, hidden size) "
            "and (tokens, choices)"
        )
    if weights_TK is not None and weights_TK.shape != inverse_TK.shape:
        raise ValueError(f"weights_TK {tuple(weights_TK.shape)} must be of the shape of inverse_TK {inverse_TK.shape}")
    if y_RD.shape[0] < inverse_TK.numel():
        raise ValueError(f"y_RD has {y_RD.shape[0]} rows, inverse_TK names {inverse_TK.numel()}")
    return _unpermute(y_RD, inverse_TK, weights_TK, offsets_E)

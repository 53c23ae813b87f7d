"""The product of rows with the weight of their group, for groups whose sizes only the device knows.

    c_r = W_{e(r)} a_{i(r)}        dL/da_m = Σ_{r: i(r) = m} W_{e(r)}ᵀ g_r        dL/dW_e = Σ_{r of e} g_r a_{i(r)}ᵀ

g = dL/dc; i(r) = r, or the index of a gather that is part of the product: the gathered rows are never stored. Rows are
grouped: group e owns rows offsets[e−1] … offsets[e]. Rows behind the last offset are not computed; c is 0 there, and
their gradients do not count. On a GPU: Triton (`device.grouped_gemm`), without reading an offset on the host. On a CPU:
one product per group; routed SwiGLU experts have a faster form of their own there (`routed_swiglu`).

Letters: M rows of A, R rows of C, E groups, N columns of C, K depth of the product.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_interns1_kernels.backends import triton_target


def _parts(offsets_E: Tensor) -> Iterator[slice]:
    start = 0
    for end in offsets_E.tolist():
        yield slice(start, end)
        start = end


def grouped_gemm_reference(
    a_MK: Tensor, weight_ENK: Tensor, offsets_E: Tensor, row_index_R: Tensor | None = None
) -> Tensor:
    """The form that must be equalled: one product after the other. Arguments as in `grouped_gemm`."""
    num_rows = a_MK.shape[0] if row_index_R is None else row_index_R.shape[0]
    outputs = []
    # unbind once: indexing the stack in the loop would build a full-size zero gradient per group
    for part, weight_NK in zip(_parts(offsets_E), weight_ENK.unbind(0), strict=True):
        rows = a_MK[part] if row_index_R is None else a_MK.index_select(0, row_index_R[part])
        outputs.append(F.linear(rows, weight_NK))
    end = sum(part.shape[0] for part in outputs)
    return torch.cat([*outputs, a_MK.new_zeros(num_rows - end, weight_ENK.shape[1])])


def _weight_gradient_reference(grad_RN: Tensor, a_MK: Tensor, offsets_E: Tensor, row_index_R: Tensor | None) -> Tensor:
    out_ENK = grad_RN.new_empty(offsets_E.shape[0], grad_RN.shape[1], a_MK.shape[1])
    for part, out_NK in zip(_parts(offsets_E), out_ENK, strict=True):
        rows = a_MK[part] if row_index_R is None else a_MK.index_select(0, row_index_R[part])
        torch.mm(grad_RN[part].t(), rows, out=out_NK)
    return out_ENK


def _sum_rows_reference(rows_RD: Tensor, row_index_R: Tensor, offsets_E: Tensor, num_source_rows: int) -> Tensor:
    end = int(offsets_E[-1])
    wide = torch.promote_types(rows_RD.dtype, torch.float32)
    sums_SD = rows_RD.new_zeros((num_source_rows, rows_RD.shape[1]), dtype=wide)
    return sums_SD.index_add_(0, row_index_R[:end], rows_RD[:end].to(wide)).to(rows_RD.dtype)


def _has_kernels(like: Tensor) -> bool:
    return triton_target(like.device) is not None and like.dtype != torch.float64


@torch.library.custom_op("lit_interns1::grouped_gemm", mutates_args=(), device_types="cpu")
def _product(a_MK: Tensor, weight_ENK: Tensor, offsets_E: Tensor, row_index_R: Tensor | None) -> Tensor:
    return grouped_gemm_reference(a_MK, weight_ENK, offsets_E, row_index_R)


@_product.register_fake
def _(a_MK, weight_ENK, offsets_E, row_index_R):
    return a_MK.new_empty(((a_MK if row_index_R is None else row_index_R).shape[0], weight_ENK.shape[1]))


@_product.register_kernel("cuda")
def _(a_MK, weight_ENK, offsets_E, row_index_R):
    if not _has_kernels(a_MK):
        return grouped_gemm_reference(a_MK, weight_ENK, offsets_E, row_index_R)
    from lit_interns1_kernels.device import grouped_gemm as device

    return device.grouped_product(a_MK, weight_ENK, offsets_E, row_index_R)


@torch.library.custom_op("lit_interns1::grouped_gemm_weight_gradient", mutates_args=(), device_types="cpu")
def _weight_gradient(grad_RN: Tensor, a_MK: Tensor, offsets_E: Tensor, row_index_R: Tensor | None) -> Tensor:
    return _weight_gradient_reference(grad_RN, a_MK, offsets_E, row_index_R)


@_weight_gradient.register_fake
def _(grad_RN, a_MK, offsets_E, row_index_R):
    return grad_RN.new_empty((offsets_E.shape[0], grad_RN.shape[1], a_MK.shape[1]))


@_weight_gradient.register_kernel("cuda")
def _(grad_RN, a_MK, offsets_E, row_index_R):
    if not _has_kernels(a_MK):
        return _weight_gradient_reference(grad_RN, a_MK, offsets_E, row_index_R)
    from lit_interns1_kernels.device import grouped_gemm as device

    return device.weight_gradient(grad_RN, a_MK, offsets_E, None, row_index_R)


@torch.library.custom_op("lit_interns1::sum_routed_rows", mutates_args=(), device_types="cpu")
def _sum_rows(rows_RD: Tensor, row_index_R: Tensor, offsets_E: Tensor, num_source_rows: int) -> Tensor:
    return _sum_rows_reference(rows_RD, row_index_R, offsets_E, num_source_rows)


@_sum_rows.register_fake
def _(rows_RD, row_index_R, offsets_E, num_source_rows):
    return rows_RD.new_empty((num_source_rows, rows_RD.shape[1]))


@_sum_rows.register_kernel("cuda")
def _(rows_RD, row_index_R, offsets_E, num_source_rows):
    if not _has_kernels(rows_RD):
        return _sum_rows_reference(rows_RD, row_index_R, offsets_E, num_source_rows)
    from lit_interns1_kernels.device import grouped_gemm as device

    return device.sum_rows(rows_RD, row_index_R, offsets_E, num_source_rows)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a_MK, weight_ENK, offsets_E, row_index_R = inputs
    wants_a, wants_weight = ctx.needs_input_grad[:2]
    ctx.num_rows = a_MK.shape[0]
    ctx.save_for_backward(a_MK if wants_weight else None, weight_ENK if wants_a else None, offsets_E, row_index_R)


def _differentiate(ctx: Any, grad_RN: Tensor) -> tuple[Tensor | None, ...]:
    a_MK, weight_ENK, offsets_E, row_index_R = ctx.saved_tensors
    grad_a_MK = grad_weight_ENK = None
    if weight_ENK is not None:
        grad_a_MK = _product(grad_RN, weight_ENK.transpose(1, 2), offsets_E, None)
        if row_index_R is not None:
            grad_a_MK = _sum_rows(grad_a_MK, row_index_R, offsets_E, ctx.num_rows)
    if a_MK is not None:
        grad_weight_ENK = _weight_gradient(grad_RN, a_MK, offsets_E, row_index_R)
    return grad_a_MK, grad_weight_ENK, None, None


_product.register_autograd(_differentiate, setup_context=_save)


def _check(a_MK: Tensor, weight_ENK: Tensor, offsets_E: Tensor, row_index: Tensor | None) -> None:
    if a_MK.ndim != 2 or weight_ENK.ndim != 3 or a_MK.shape[1] != weight_ENK.shape[2]:
        raise ValueError(
            f"a_MK {tuple(a_MK.shape)} and weight_ENK {tuple(weight_ENK.shape)} must be (rows, depth) and "
            "(groups, columns, depth)"
        )
    if a_MK.dtype != weight_ENK.dtype or not a_MK.is_floating_point():
        raise ValueError(
            f"a_MK has dtype {a_MK.dtype}, weight_ENK has {weight_ENK.dtype}: they must be floating point and equal"
        )
    if offsets_E.dtype != torch.int32 or offsets_E.shape != weight_ENK.shape[:1] or not weight_ENK.shape[0]:
        raise ValueError(
            f"offsets_E {tuple(offsets_E.shape)}, {offsets_E.dtype}: must be int32, the end of the rows of each of "
            f"{weight_ENK.shape[0]} groups, of which there must be at least 1"
        )
    if row_index is not None and (row_index.ndim != 1 or row_index.dtype != torch.int64):
        raise ValueError(f"row_index {tuple(row_index.shape)}, {row_index.dtype}: must be a vector of int64")


def grouped_gemm(a_MK: Tensor, weight_ENK: Tensor, offsets_E: Tensor, *, row_index: Tensor | None = None) -> Tensor:
    """Each row times the weight of its group, transposed. Differentiable in `a_MK` and `weight_ENK`.

    Products are summed in float32 or wider. On a GPU the products of float32 operands follow
    `torch.set_float32_matmul_precision`. The gradient of a row that was gathered several times is the sum in the order
    of the gathered rows; nothing depends on the order in which threads run.

    Args:
        a_MK: (M, K) floating point.
        weight_ENK: (E, N, K), same dtype; a transposed view of a contiguous (E, K, N) is taken as it lies.
        offsets_E: (E,) int32, end of each group's rows, ascending; neither checked nor read on the host of a GPU.
        row_index: (R,) int64, the row of A for each row of C, grouped; None: R = M, row r is row r.

    Returns:
        (R, N), dtype of A; 0 behind the last offset.

    Raises:
        ValueError: If shapes or dtypes do not fit together.
    """
    _check(a_MK, weight_ENK, offsets_E, row_index)
    c_RN: Tensor = _product(a_MK, weight_ENK, offsets_E, row_index)
    return c_RN

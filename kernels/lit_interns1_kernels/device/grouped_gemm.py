"""Triton kernels for matrix products over rows grouped by expert, whose group sizes only the device knows.

- `grouped_product`: C_r = A_{index(r)} W_{e(r)}ᵀ, and with a second form of its end, SwiGLU of the gate and up columns.
- `weight_gradient`: dW_e = Σ_{r of e} G_rᵀ X_r.
- `sum_rows`: Σ of the routed rows of each source row, in a fixed order.

The first two are persistent: one program per multiprocessor walks over tiles, and finds the group of a tile from the
offsets. On Hopper and newer the operands that are not gathered come through tensor descriptors.

Letters: S source rows, R routed rows, E experts, K depth of the product, N columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lit_interns1_kernels.device.codegen import KernelBuild
from lit_interns1_kernels.device.runtime import (
    INTERPRETED,
    ensure_descriptor_memory,
    has_descriptors,
    persistent_programs,
    tuned,
)


@triton.jit
def _multiply_add(left, right, sum, PRECISION: tl.constexpr, UPCAST_DOT: tl.constexpr):
    if UPCAST_DOT:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, sum, input_precision=PRECISION)


@triton.jit
def _weight_tile(
    weight, descriptor, group, column_0, k_0, columns, K,
    TRANSPOSED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(BLOCK_K, BLOCK_N) of the weight of one group, 0 behind the depth K; `columns` of it in all."""
    if descriptor is not None:
        if TRANSPOSED:
            tile = descriptor.load([group, k_0, column_0]).reshape(BLOCK_K, BLOCK_N)
        else:
            tile = descriptor.load([group, column_0, k_0]).reshape(BLOCK_N, BLOCK_K).T
    else:
        n = column_0 + tl.arange(0, BLOCK_N)[None, :]
        k = k_0 + tl.arange(0, BLOCK_K)[:, None]
        base = weight + tl.cast(group, tl.int64) * columns * K
        if TRANSPOSED:
            tile = tl.load(base + k * columns + n, mask=(k < K) & (n < columns), other=0.0)
        else:
            tile = tl.load(base + tl.minimum(n, columns - 1) * K + k, mask=k < K, other=0.0)
    return tile


@triton.jit(do_not_specialize=["num_rows", "num_groups"])
def _product_kernel(
    a, weight, c, gate_up, row_index, scatter_index, row_weight, offsets,
    num_rows, num_groups, N, K,
    SWIGLU: tl.constexpr, TRANSPOSED: tl.constexpr, ZERO_TAIL: tl.constexpr,
    A_DESCRIPTOR: tl.constexpr, WEIGHT_DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST_DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    BAND: tl.constexpr = 8  # row tiles that pass over the columns together, so that both operands are found in L2
    columns = 2 * N if SWIGLU else N
    a_descriptor = None
    if A_DESCRIPTOR:
        # rows of the next group may come along: they meet the wrong weight, and are not stored
        end = tl.load(offsets + num_groups - 1)
        a_descriptor = tl.make_tensor_descriptor(a, [end, K], [tl.cast(K, tl.int64), 1], [BLOCK_M, BLOCK_K])
    weight_descriptor = None
    if WEIGHT_DESCRIPTOR:
        # three dimensions: behind the end of one group's weight there is 0, not the next group
        if TRANSPOSED:
            weight_descriptor = tl.make_tensor_descriptor(
                weight, [num_groups, K, columns], [tl.cast(K, tl.int64) * columns, tl.cast(columns, tl.int64), 1],
                [1, BLOCK_K, BLOCK_N],
            )  # fmt: skip
        else:
            weight_descriptor = tl.make_tensor_descriptor(
                weight,
                [num_groups, columns, K],
                [tl.cast(K, tl.int64) * columns, tl.cast(K, tl.int64), 1],
                [1, BLOCK_N, BLOCK_K],
            )

    column_tiles = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0)
    first_tile = tl.zeros([], tl.int32)
    start = tl.zeros([], tl.int32)
    for group in range(num_groups + ZERO_TAIL):
        # the tail counts as one more group, of depth 0
        end = tl.load(offsets + group, mask=group < num_groups, other=num_rows)
        depth = tl.where(group < num_groups, K, 0)
        row_tiles = tl.cdiv(end - start, BLOCK_M)
        next_tile = first_tile + row_tiles * column_tiles
        while tile < next_tile:
            in_group = tile - first_tile
            in_band = in_group % (BAND * column_tiles)
            band = in_group // (BAND * column_tiles) * BAND
            band_rows = tl.minimum(row_tiles - band, BAND)
            row_0 = start + (band + in_band % band_rows) * BLOCK_M
            column_0 = in_band // band_rows * BLOCK_N

            row = row_0 + tl.arange(0, BLOCK_M)
            row_inside = row < end
            # rows behind the end read a row that exists, which costs no mask, and are not stored
            if row_index is not None:
                source = tl.load(row_index + row, mask=row_inside, other=0)
            else:
                source = tl.minimum(row, end - 1)
            a_row = a + source.to(tl.int64)[:, None] * K
            sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            up_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for k_0 in range(0, depth, BLOCK_K):
                if a_descriptor is not None:
                    a_tile = a_descriptor.load([row_0, k_0])
                else:
                    k = k_0 + tl.arange(0, BLOCK_K)[None, :]
                    a_tile = tl.load(a_row + k, mask=k < K, other=0.0)
                w_tile = _weight_tile(
                    weight, weight_descriptor, group, column_0, k_0, columns, K, TRANSPOSED, BLOCK_N, BLOCK_K
                )
                sum = _multiply_add(a_tile, w_tile, sum, PRECISION, UPCAST_DOT)
                if SWIGLU:
                    w_tile = _weight_tile(
                        weight, weight_descriptor, group, N + column_0, k_0, columns, K, TRANSPOSED, BLOCK_N, BLOCK_K
                    )
                    up_sum = _multiply_add(a_tile, w_tile, up_sum, PRECISION, UPCAST_DOT)

            column = column_0 + tl.arange(0, BLOCK_N)[None, :]
            inside = row_inside[:, None] & (column < N)
            if SWIGLU:
                if gate_up is not None:
                    kept = gate_up + row.to(tl.int64)[:, None] * columns + column
                    tl.store(kept, sum.to(gate_up.dtype.element_ty), mask=inside)
                    tl.store(kept + N, up_sum.to(gate_up.dtype.element_ty), mask=inside)
                sum = sum * tl.sigmoid(sum) * up_sum
            if row_weight is not None:
                weighted_end = tl.where(group < num_groups, end, 0)
                sum *= tl.load(row_weight + row, mask=row < weighted_end, other=0.0).to(tl.float32)[:, None]
            if scatter_index is not None:
                target = tl.load(scatter_index + row, mask=row_inside, other=0)
                tl.atomic_add(c + target.to(tl.int64)[:, None] * N + column, sum, mask=inside, sem="relaxed")
            else:
                tl.store(c + row.to(tl.int64)[:, None] * N + column, sum.to(c.dtype.element_ty), mask=inside)
            tile += tl.num_programs(0)
        first_tile = next_tile
        start = end


@triton.jit(do_not_specialize=["num_groups"])
def _weight_gradient_kernel(
    left, right, out, left_index, right_index, offsets, num_groups, N, K,
    PRECISION: tl.constexpr, UPCAST_DOT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    n_tiles = tl.cdiv(N, BLOCK_N)
    tiles = n_tiles * tl.cdiv(K, BLOCK_K)
    for tile in range(tl.program_id(0), num_groups * tiles, tl.num_programs(0)):
        group = tile // tiles
        start = tl.load(offsets + group - 1, mask=group > 0, other=0)
        end = tl.load(offsets + group)
        n = tile % tiles % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        k = tile % tiles // n_tiles * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
        sum = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for row_0 in range(start, end, BLOCK_R):
            row = row_0 + tl.arange(0, BLOCK_R)
            inside = row < end
            left_row, right_row = row, row
            if left_index is not None:
                left_row = tl.load(left_index + row, mask=inside, other=0)
            if right_index is not None:
                right_row = tl.load(right_index + row, mask=inside, other=0)
            # both are masked: what lies behind the end may be NaN
            left_tile = tl.load(
                left + left_row.to(tl.int64)[:, None] * N + n, mask=inside[:, None] & (n < N), other=0.0
            )
            right_tile = tl.load(
                right + right_row.to(tl.int64)[:, None] * K + k, mask=inside[:, None] & (k < K), other=0.0
            )
            sum = _multiply_add(left_tile.T, right_tile, sum, PRECISION, UPCAST_DOT)
        n_column = n.reshape(BLOCK_N, 1)
        target = out + tl.cast(group, tl.int64) * N * K + n_column * K + k
        tl.store(target, sum.to(out.dtype.element_ty), mask=(n_column < N) & (k < K))


@triton.jit(do_not_specialize=["num_out"])
def _sum_rows_kernel(
    rows, order, ends, out, num_out, D, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    known = s < num_out
    start = tl.load(ends + s - 1, mask=known & (s > 0), other=0)
    count = tl.load(ends + s, mask=known, other=0) - tl.where(known, start, 0)
    sum = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    for position in range(tl.max(count, axis=0)):
        exists = position < count
        row = tl.load(order + start + position, mask=exists, other=0)
        sum += tl.load(
            rows + row.to(tl.int64)[:, None] * D + d, mask=exists[:, None] & (d < D), other=0.0
        ).to(tl.float32)  # fmt: skip
    tl.store(out + s.to(tl.int64)[:, None] * D + d, sum.to(out.dtype.element_ty), mask=known[:, None] & (d < D))


def _configuration(
    sizes: dict[str, int], num_warps: int, num_stages: int, every_register: bool = False
) -> triton.Config:
    """`every_register`: else the assembler spills a few registers so that one more block fits on a multiprocessor."""
    limit = 255 if every_register and torch.version.hip is None else None
    return triton.Config(sizes, num_warps=num_warps, num_stages=num_stages, maxnreg=limit)


def _product_configuration(
    m: int, n: int, k: int, num_warps: int, num_stages: int, every_register: bool = False
) -> triton.Config:
    return _configuration({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps, num_stages, every_register)


def _gradient_configuration(
    n: int, k: int, r: int, num_warps: int, num_stages: int, every_register: bool = False
) -> triton.Config:
    return _configuration({"BLOCK_N": n, "BLOCK_K": k, "BLOCK_R": r}, num_warps, num_stages, every_register)


_PRODUCT_CONFIGURATIONS: dict[str, list[triton.Config]] = {
    "pointer": [_product_configuration(64, 128, 64, 4, 3), _product_configuration(128, 128, 64, 8, 3, True)],
    "descriptor": [
        _product_configuration(64, 128, 64, 4, 3),
        _product_configuration(128, 128, 64, 8, 4, True),
        _product_configuration(128, 256, 64, 8, 3),
    ],
    "float": [_product_configuration(64, 64, 32, 4, 3, True)],
    "swiglu-pointer": [_product_configuration(128, 64, 64, 8, 3), _product_configuration(64, 128, 64, 8, 3)],
    "swiglu-descriptor": [
        _product_configuration(128, 64, 64, 8, 3, True),
        _product_configuration(128, 64, 64, 8, 4, True),
        _product_configuration(64, 128, 64, 8, 3, True),
    ],
    "swiglu-float": [_product_configuration(64, 32, 32, 4, 3, True)],
    "atomic-pointer": [_product_configuration(64, 64, 64, 4, 3, True), _product_configuration(128, 64, 64, 8, 3)],
    "atomic-descriptor": [_product_configuration(64, 64, 64, 4, 3, True), _product_configuration(128, 64, 64, 8, 3)],
    "atomic-float": [_product_configuration(64, 32, 32, 4, 3, True)],
}
_GRADIENT_CONFIGURATIONS: dict[str, list[triton.Config]] = {
    "pointer": [
        _gradient_configuration(64, 128, 64, 4, 3),
        _gradient_configuration(64, 128, 64, 4, 5),
        _gradient_configuration(128, 128, 64, 8, 5),
    ],
    "float": [_gradient_configuration(64, 64, 32, 4, 3, True)],
}
_SUM_ROWS = {"BLOCK_S": 8, "BLOCK_D": 256}

# the numbers of rows change with every batch and are not in the keys; atomic sums must not see those of the last trial
_PRODUCTS = {
    form: tuned(configurations, ("N", "K", "TRANSPOSED"), reset_to_zero=["c"])(_product_kernel)
    for form, configurations in _PRODUCT_CONFIGURATIONS.items()
}
_GRADIENTS = {
    form: tuned(configurations, ("N", "K"))(_weight_gradient_kernel)
    for form, configurations in _GRADIENT_CONFIGURATIONS.items()
}


def _precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: TF32 if the user allows it for torch's products, else in three products of TF32 parts
    (AMD: plainly), which comes close to float32. Means nothing for other types."""
    if dtype != torch.float32 or torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "tf32x3" if torch.version.hip is None else "ieee"


def _check(**operands: Tensor) -> None:
    for name, operand in operands.items():
        if operand.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"{name} has dtype {operand.dtype}: the kernels take bfloat16, float16 and float32")


def _describable(x: Tensor) -> bool:
    """Whether a tensor descriptor may point to it: 16 bytes divide its address and its rows."""
    return x.element_size() == 2 and x.shape[-1] % 8 == 0 and x.data_ptr() % 16 == 0


def _as_stored(weight_ENK: Tensor) -> tuple[Tensor, bool]:
    """The weight, contiguous, and whether it is stored as (E, K, N)."""
    if not weight_ENK.is_contiguous() and weight_ENK.transpose(1, 2).is_contiguous():
        return weight_ENK.transpose(1, 2), True
    return weight_ENK.contiguous(), False


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _launch_product(
    a_SK: Tensor, weight_ENK: Tensor, offsets_E: Tensor, c: Tensor, *, gate_up_RJ: Tensor | None = None,
    row_index_R: Tensor | None = None, scatter_index_R: Tensor | None = None, row_weight_R: Tensor | None = None,
    swiglu: bool = False, descriptors: bool | None = None,
) -> None:  # fmt: skip
    _check(a=a_SK, weight=weight_ENK)
    a_SK, (stored, transposed) = a_SK.contiguous(), _as_stored(weight_ENK)
    num_groups, columns, depth = weight_ENK.shape
    if descriptors is None:
        descriptors = has_descriptors(a_SK.device) and torch.version.hip is None
    weight_descriptor = descriptors and _describable(stored)
    a_descriptor = weight_descriptor and row_index_R is None and _describable(a_SK)
    form = "float" if a_SK.element_size() == 4 else "descriptor" if weight_descriptor else "pointer"
    form = f"swiglu-{form}" if swiglu else form if scatter_index_R is None else f"atomic-{form}"
    if weight_descriptor:
        ensure_descriptor_memory()
    gathered = a_SK if row_index_R is None else row_index_R
    with torch.cuda.device_of(a_SK):
        _PRODUCTS[form][(persistent_programs(a_SK.device),)](
            a_SK, stored, c, gate_up_RJ, _contiguous(row_index_R), _contiguous(scatter_index_R),
            _contiguous(row_weight_R), offsets_E.contiguous(),
            gathered.shape[0], num_groups, columns // 2 if swiglu else columns, depth,
            SWIGLU=swiglu, TRANSPOSED=transposed, ZERO_TAIL=not swiglu and scatter_index_R is None,
            A_DESCRIPTOR=a_descriptor, WEIGHT_DESCRIPTOR=weight_descriptor,
            PRECISION=_precision(a_SK.dtype), UPCAST_DOT=INTERPRETED,
        )  # fmt: skip


def grouped_product(
    a_SK: Tensor, weight_ENK: Tensor, offsets_E: Tensor, row_index_R: Tensor | None = None,
    row_weight_R: Tensor | None = None, descriptors: bool | None = None,
) -> Tensor:  # fmt: skip
    """(R, N): each row of `a_SK`, or the rows that `row_index_R` names, times its group's weight, 0 behind the end.

    Args:
        a_SK: (S, K) bfloat16, float16 or float32.
        weight_ENK: (E, N, K), may be a transposed view of (E, K, N).
        offsets_E: (E,) int32, end of each group's rows.
        row_index_R: (R,) int64; None: R = S, row r is row r.
        row_weight_R: (R,) factors of the rows.
        descriptors: Load through tensor descriptors where alignment allows; None: where they are hardware.
    """
    rows = a_SK.shape[0] if row_index_R is None else row_index_R.shape[0]
    c_RN = a_SK.new_empty(rows, weight_ENK.shape[1])
    _launch_product(
        a_SK, weight_ENK, offsets_E, c_RN, row_index_R=row_index_R, row_weight_R=row_weight_R, descriptors=descriptors
    )
    return c_RN


def grouped_swiglu(
    a_SK: Tensor, weight_EJK: Tensor, offsets_E: Tensor, row_index_R: Tensor | None, row_weight_R: Tensor | None,
    keep: bool, descriptors: bool | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """h_RI = silu(gate) ⊙ up · weight, and the projections gate_up_RJ if `keep` (else empty), from one product.

    Args as in `grouped_product`; the weight (E, 2·I, K) has the gate's rows before the up projection's. Rows behind
    the last offset are left uninitialised.
    """
    rows = a_SK.shape[0] if row_index_R is None else row_index_R.shape[0]
    width = weight_EJK.shape[1]
    h_RI, gate_up_RJ = a_SK.new_empty(rows, width // 2), a_SK.new_empty(rows if keep else 0, width)
    _launch_product(
        a_SK, weight_EJK, offsets_E, h_RI, gate_up_RJ=gate_up_RJ if keep else None, row_index_R=row_index_R,
        row_weight_R=row_weight_R, swiglu=True, descriptors=descriptors,
    )  # fmt: skip
    return h_RI, gate_up_RJ


def grouped_product_summed(
    a_RK: Tensor, weight_ENK: Tensor, offsets_E: Tensor, row_index_R: Tensor, num_source_rows: int,
    row_weight_R: Tensor | None = None, deterministic: bool = True, descriptors: bool | None = None,
) -> Tensor:  # fmt: skip
    """(S, N): routed rows times their groups' weights, summed per source row.

    Args as in `grouped_product`; `row_index_R` is where rows go. Deterministic: rows are written, rounded to the dtype
    of `a_RK`, and then summed in order. Otherwise they are added in float32 as they are made, without that array.
    """
    if deterministic:
        rows_RN = grouped_product(a_RK, weight_ENK, offsets_E, None, row_weight_R, descriptors)
        return sum_rows(rows_RN, row_index_R, offsets_E, num_source_rows)
    sum_SN = a_RK.new_zeros((num_source_rows, weight_ENK.shape[1]), dtype=torch.float32)
    _launch_product(
        a_RK, weight_ENK, offsets_E, sum_SN, scatter_index_R=row_index_R, row_weight_R=row_weight_R,
        descriptors=descriptors,
    )  # fmt: skip
    return sum_SN.to(a_RK.dtype)


def weight_gradient(
    left: Tensor, right: Tensor, offsets_E: Tensor,
    left_index_R: Tensor | None = None, right_index_R: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """(E, N, K): Σ over the rows of each group of left_rᵀ right_r, 0 for an empty group.

    Args:
        left: (R, N), or (S, N) if `left_index_R` names the rows.
        right: (R, K), or (S, K) if `right_index_R` names the rows.
        offsets_E: (E,) int32, end of each group's rows.
        left_index_R: (R,) int64.
        right_index_R: (R,) int64.
    """
    _check(left=left, right=right)
    left, right = left.contiguous(), right.contiguous()
    out_ENK = left.new_empty(offsets_E.shape[0], left.shape[1], right.shape[1])
    kernel = _GRADIENTS["float" if left.element_size() == 4 else "pointer"]
    with torch.cuda.device_of(left):
        kernel[(persistent_programs(left.device),)](
            left, right, out_ENK, _contiguous(left_index_R), _contiguous(right_index_R), offsets_E.contiguous(),
            *out_ENK.shape,
            PRECISION=_precision(left.dtype), UPCAST_DOT=INTERPRETED,
        )  # fmt: skip
    return out_ENK


def sum_rows(rows_RD: Tensor, row_index_R: Tensor, offsets_E: Tensor, num_source_rows: int) -> Tensor:
    """(S, D): the sum of the routed rows of each source row, in float32 and in the order of the rows.

    Args:
        rows_RD: (R, D).
        row_index_R: (R,) int64, source row of each routed row.
        offsets_E: (E,) int32; rows behind the last end are not read.
        num_source_rows: S.
    """
    device = rows_RD.device
    routed_R = torch.arange(row_index_R.shape[0], device=device) < offsets_E[-1]
    source_R, order_R = torch.where(routed_R, row_index_R, num_source_rows).int().sort(stable=True)
    sources_S = torch.arange(num_source_rows, device=device, dtype=torch.int32)
    ends_S = torch.searchsorted(source_R, sources_S, right=True, out_int32=True)
    rows_RD = rows_RD.contiguous()
    out_SD = rows_RD.new_empty(num_source_rows, rows_RD.shape[1])
    grid = (triton.cdiv(num_source_rows, _SUM_ROWS["BLOCK_S"]), triton.cdiv(rows_RD.shape[1], _SUM_ROWS["BLOCK_D"]))
    with torch.cuda.device_of(rows_RD):
        _sum_rows_kernel[grid](rows_RD, order_R, ends_S, out_SD, *out_SD.shape, **_SUM_ROWS)
    return out_SD


_NVIDIA: tuple[str, ...] = ("sm_80", "sm_90", "sm_100")
_DESCRIBED: tuple[str, ...] = ("sm_90", "sm_100")


def _instructions(precision: str, described: bool) -> dict[str, tuple[str, ...]]:
    if precision == "ieee":
        return {}
    loads = ("UTMALDG",) if described else ()
    return {"sm_80": ("HMMA",), "sm_90": ("HGMMA", *loads), "sm_100": ("UTC", *loads)}


def _build(
    name: str, kernel: Any, configuration: triton.Config, pointers: dict[str, str | None], integers: Sequence[str],
    undivided: Sequence[str], constants: dict[str, Any], targets: Sequence[str], described: bool = False,
    extended: bool = True,
) -> KernelBuild:  # fmt: skip
    """A build; a pointer of type None is an argument that is missing."""
    tile, options = configuration.kwargs, configuration.all_kwargs()
    shape = "x".join(str(size) for size in tile.values())
    return KernelBuild(
        name=f"{name}/{shape}/{configuration.num_stages}",
        kernel=kernel,
        signature={**{k: v for k, v in pointers.items() if v is not None}, **dict.fromkeys(integers, "i32")},
        constants={**{k: None for k, v in pointers.items() if v is None}, **constants, **tile, "UPCAST_DOT": False},
        undivided=tuple(undivided),
        options={k: v for k, v in options.items() if k not in tile},
        targets=tuple(targets),
        instructions=_instructions(constants["PRECISION"], described),
        extended=extended,
    )


def _product_build(
    form: str, number: int, targets: Sequence[str], *, dtype: str = "bf16", gather: bool = False,
    transposed: bool = False, keep: bool = True, precision: str = "tf32", extended: bool = True,
) -> KernelBuild:  # fmt: skip
    swiglu, atomic, described = "swiglu" in form, "atomic" in form, "descriptor" in form
    pointers = {
        "a": f"*{dtype}", "weight": f"*{dtype}", "c": "*fp32" if atomic else f"*{dtype}",
        "gate_up": f"*{dtype}" if swiglu and keep else None, "row_index": "*i64" if gather else None,
        "scatter_index": "*i64" if atomic else None, "row_weight": "*fp32" if swiglu else None, "offsets": "*i32",
    }  # fmt: skip
    constants = {
        "SWIGLU": swiglu, "TRANSPOSED": transposed, "ZERO_TAIL": not swiglu and not atomic,
        "A_DESCRIPTOR": described and not gather, "WEIGHT_DESCRIPTOR": described, "PRECISION": precision,
    }  # fmt: skip
    rows = ("num_rows", "num_groups")
    traits = [form, precision if dtype == "fp32" else "", "gather" if gather else "", "KN" if transposed else "NK"]
    traits += ["" if keep or not swiglu else "inference"]
    return _build(
        "/".join(("grouped_product", dtype, *filter(None, traits))), _product_kernel,
        _PRODUCT_CONFIGURATIONS[form][number], pointers, (*rows, "N", "K"), rows, constants, targets,
        described, extended,
    )  # fmt: skip


def _gradient_build(
    form: str, number: int, targets: Sequence[str], gather: str, *, dtype: str = "bf16", precision: str = "tf32",
    extended: bool = True,
) -> KernelBuild:  # fmt: skip
    pointers = {
        "left": f"*{dtype}", "right": f"*{dtype}", "out": f"*{dtype}", "offsets": "*i32",
        "left_index": "*i64" if gather == "left" else None, "right_index": "*i64" if gather == "right" else None,
    }  # fmt: skip
    name = f"weight_gradient/{dtype}/{precision if dtype == 'fp32' else form}/gather-{gather}"
    return _build(
        name, _weight_gradient_kernel, _GRADIENT_CONFIGURATIONS[form][number], pointers, ("num_groups", "N", "K"),
        ("num_groups",), {"PRECISION": precision}, targets, extended=extended,
    )  # fmt: skip


def _builds() -> tuple[KernelBuild, ...]:
    every = (*_NVIDIA, "gfx942")
    builds = [
        _product_build("pointer", 0, every, gather=True, extended=False),
        _product_build("descriptor", 0, _DESCRIBED, extended=False),
        _product_build("float", 0, _NVIDIA, dtype="fp32", precision="tf32x3", extended=False),
        _product_build("swiglu-pointer", 0, every, gather=True, extended=False),
        _product_build("swiglu-descriptor", 0, _DESCRIBED, gather=True, extended=False),
        _gradient_build("pointer", 0, every, "right", extended=False),
        *(
            KernelBuild(
                name=f"sum_rows/{dtype}",
                kernel=_sum_rows_kernel,
                signature={
                    "rows": f"*{dtype}", "order": "*i64", "ends": "*i32", "out": f"*{dtype}", "num_out": "i32",
                    "D": "i32",
                },
                constants=_SUM_ROWS,
                undivided=("num_out",),
                options={"num_warps": 4, "num_stages": 3},
                extended=dtype != "bf16",
            )
            for dtype in ("bf16", "fp32")
        ),
    ]  # fmt: skip
    # every configuration with every way to read its operands that a forward or backward pass uses
    for dtype in ("bf16", "fp16"):
        for number in range(2):
            for gather, transposed in ((False, False), (False, True), (True, False), (True, True)):
                builds.append(
                    _product_build("pointer", number, every, dtype=dtype, gather=gather, transposed=transposed)
                )
            for keep in (True, False):
                targets = every if number == 0 else _NVIDIA
                builds.append(_product_build("swiglu-pointer", number, targets, dtype=dtype, gather=True, keep=keep))
            for transposed in (False, True):
                builds.append(_product_build("atomic-pointer", number, every, dtype=dtype, transposed=transposed))
                builds.append(
                    _product_build("atomic-descriptor", number, _DESCRIBED, dtype=dtype, transposed=transposed)
                )
        for number in range(3):
            for gather, transposed in ((False, False), (False, True), (True, False), (True, True)):
                builds.append(
                    _product_build("descriptor", number, _DESCRIBED, dtype=dtype, gather=gather, transposed=transposed)
                )
            for keep in (True, False):
                builds.append(
                    _product_build("swiglu-descriptor", number, _DESCRIBED, dtype=dtype, gather=True, keep=keep)
                )
            for side in ("left", "right", "neither"):
                targets = every if number == 0 else _NVIDIA
                builds.append(_gradient_build("pointer", number, targets, side, dtype=dtype))
    chips: dict[str, tuple[str, ...]] = {"tf32x3": _NVIDIA, "tf32": every, "ieee": ("gfx942",)}
    for precision, targets in chips.items():
        for transposed in (False, True):
            for form in ("float", "atomic-float"):
                builds.append(
                    _product_build(form, 0, targets, dtype="fp32", transposed=transposed, precision=precision)
                )
        builds.append(_product_build("swiglu-float", 0, targets, dtype="fp32", gather=True, precision=precision))
        for side in ("left", "right", "neither"):
            builds.append(_gradient_build("float", 0, targets, side, dtype="fp32", precision=precision))
    shown = {build.name for build in builds if not build.extended}
    return tuple(build for build in builds if not (build.extended and build.name in shown))


BUILDS: tuple[KernelBuild, ...] = _builds()

"""The quantisers of `lit_interns1_kernels.fp8_quantize` on a GPU: one block of the input, one pass.

1×128: a program takes BLOCK_M rows of one 128-column block. 128×128: a program takes one whole block.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lit_interns1_kernels.device.codegen import KernelBuild
from lit_interns1_kernels.device.runtime import INTERPRETED, tuned
from lit_interns1_kernels.fp8_quantize import AMAX_FLOOR, BLOCK, E4M3_MAX, count_blocks

_FLOOR = tl.constexpr(AMAX_FLOOR)
_MAX = tl.constexpr(E4M3_MAX)


@triton.jit
def _scale_and_inverse(amax, POWER_OF_TWO: tl.constexpr):
    """As `_scale_and_inverse` of the plain form, to the bit: divisions are rounded correctly."""
    limit = tl.full(amax.shape, _MAX, tl.float32)
    scale = tl.div_rn(amax, limit)
    if POWER_OF_TWO:
        bits = scale.to(tl.int32, bitcast=True)
        scale = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
        inverse = tl.div_rn(tl.full(amax.shape, 1.0, tl.float32), scale)
    else:
        inverse = tl.div_rn(limit, amax)
    return scale, inverse


@triton.jit
def _to_e4m3(x, ROUND_FIRST: tl.constexpr):
    """Rounds to the nearest e4m3 value, ties to even.

    The interpreter's conversion loses the carry out of the mantissa and cuts subnormal values off: with `ROUND_FIRST`
    the value is rounded in float32 (adding 1.5 · 2^23 steps leaves no bit below a step), so that the rest is exact.
    """
    if ROUND_FIRST:
        power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        shift = tl.maximum(power * 0.125, 0.001953125) * 12582912.0
        x = (x + shift) - shift
    return x.to(tl.float8e4nv)


@triton.jit
def _rows(
    x_ptr, q_ptr, scale_ptr, num_rows, num_columns, stride_row, stride_column,
    POWER_OF_TWO: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, ROUND_FIRST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    block = tl.program_id(1)
    column = (block * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
    inside = row < num_rows
    x_ptrs = x_ptr + row[:, None] * stride_row + column[None, :] * stride_column
    x = tl.load(x_ptrs, mask=inside[:, None], other=0.0).to(tl.float32)
    amax = tl.maximum(tl.max(tl.abs(x), 1), _FLOOR)
    scale, inverse = _scale_and_inverse(amax, POWER_OF_TWO)
    q = _to_e4m3(x * inverse[:, None], ROUND_FIRST)
    tl.store(q_ptr + row[:, None] * num_columns + column[None, :], q, mask=inside[:, None])
    tl.store(scale_ptr + row * (num_columns // BLOCK_K) + block, scale, mask=inside)


@triton.jit
def _squares(
    w_ptr, q_ptr, scale_ptr, num_rows, num_columns, stride_group, stride_row, stride_column,
    POWER_OF_TWO: tl.constexpr, BLOCK_K: tl.constexpr, ROUND_FIRST: tl.constexpr,
):  # fmt: skip
    row_block, block, group = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = (row_block * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
    column = (block * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
    inside = (row < num_rows)[:, None]
    w_ptrs = w_ptr + group * stride_group + row[:, None] * stride_row + column[None, :] * stride_column
    w = tl.load(w_ptrs, mask=inside, other=0.0).to(tl.float32)
    amax = tl.maximum(tl.max(tl.max(tl.abs(w), 1), 0), _FLOOR)
    scale, inverse = _scale_and_inverse(tl.full((1,), 1.0, tl.float32) * amax, POWER_OF_TWO)
    q = _to_e4m3(w * inverse[:, None], ROUND_FIRST)
    tl.store(q_ptr + (group * num_rows + row[:, None]) * num_columns + column[None, :], q, mask=inside)
    scale_index = (group * tl.num_programs(0) + row_block) * tl.num_programs(1) + block
    tl.store(scale_ptr + scale_index + tl.arange(0, 1), scale)


_ROWS_CONFIGURATIONS = [triton.Config({"BLOCK_M": 32}, num_warps=4), triton.Config({"BLOCK_M": 8}, num_warps=4)]
_tuned_rows = tuned(_ROWS_CONFIGURATIONS, key=("num_columns", "POWER_OF_TWO"))(_rows)


def quantize_1x128(x_MK: Tensor, power_of_two: bool, q_MK: Tensor, scale: Tensor) -> None:
    """Writes what `fp8_quantize.quantize_1x128` returns into the contiguous `q_MK` and `scale`."""
    rows, columns = x_MK.shape
    if rows == 0:
        return

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        return triton.cdiv(rows, meta["BLOCK_M"]), columns // BLOCK

    _tuned_rows[grid](
        x_MK, q_MK, scale, rows, columns, *x_MK.stride(),
        POWER_OF_TWO=power_of_two, BLOCK_K=BLOCK, ROUND_FIRST=INTERPRETED,
    )  # fmt: skip


def quantize_128x128(w_GNK: Tensor, power_of_two: bool, q_GNK: Tensor, scale: Tensor) -> None:
    """Writes what `fp8_quantize.quantize_128x128` returns into the contiguous `q_GNK` and `scale`."""
    groups, rows, columns = w_GNK.shape
    if groups == 0 or rows == 0:
        return
    _squares[(count_blocks(rows), columns // BLOCK, groups)](
        w_GNK, q_GNK, scale, rows, columns, *w_GNK.stride(),
        POWER_OF_TWO=power_of_two, BLOCK_K=BLOCK, ROUND_FIRST=INTERPRETED, num_warps=8,
    )  # fmt: skip


def _builds() -> tuple[KernelBuild, ...]:
    builds = []
    fixed = {"BLOCK_K": BLOCK, "ROUND_FIRST": False}
    for name in ("bf16", "fp32", "fp16"):
        dtype, roundings = f"*{name}", (False, True) if name == "bf16" else (False,)
        outputs = {"q_ptr": "*fp8e4nv", "scale_ptr": "*fp32", "num_rows": "i32", "num_columns": "i32"}
        for index, configuration in enumerate(_ROWS_CONFIGURATIONS):
            block_m = configuration.kwargs["BLOCK_M"]
            for power_of_two in roundings:
                builds.append(
                    KernelBuild(
                        name=f"quantize_1x128/{name}/{block_m}{'/power_of_two' * power_of_two}",
                        kernel=_rows,
                        signature={"x_ptr": dtype, **outputs, "stride_row": "i32"},
                        constants={"stride_column": 1, "POWER_OF_TWO": power_of_two, "BLOCK_M": block_m, **fixed},
                        undivided=("num_rows",),
                        options={"num_warps": configuration.num_warps},
                        targets=("sm_90", "sm_100"),
                        extended=(name, index, power_of_two) != ("bf16", 0, False),
                    )
                )
        for unit in ("stride_column", "stride_row"):
            strides = {"stride_group", "stride_row", "stride_column"} - {unit}
            for power_of_two in roundings:
                transposed = "/transposed" * (unit == "stride_row")
                builds.append(
                    KernelBuild(
                        name=f"quantize_128x128/{name}{transposed}{'/power_of_two' * power_of_two}",
                        kernel=_squares,
                        signature={"w_ptr": dtype, **outputs, **dict.fromkeys(strides, "i32")},
                        constants={unit: 1, "POWER_OF_TWO": power_of_two, **fixed},
                        undivided=("num_rows",),
                        options={"num_warps": 8},
                        targets=("sm_90", "sm_100"),
                        extended=(name, unit, power_of_two) != ("bf16", "stride_column", False),
                    )
                )
    return tuple(builds)


BUILDS: tuple[KernelBuild, ...] = _builds()

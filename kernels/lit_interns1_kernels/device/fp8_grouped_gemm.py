"""The FP8 grouped product of `lit_interns1_kernels.fp8_grouped_gemm` on Hopper and newer, without padded groups.

Programs are persistent: each takes tiles of BLOCK_M rows of one group × BLOCK_N columns. Copies between global and
shared memory go through tensor descriptors, and the descriptor stops them at the end of the group: rows behind it load
as zeros and are not stored. Two ways to that end:

- clipped: every tile builds descriptors of A and of the output whose number of rows is the end of its group. They start
  at the tensor, so that a group may begin anywhere and addresses stay aligned.
- ragged: one descriptor of four coordinates for all groups, built on the host. With row stride s and coordinates
  (2^30, end, 2^30 − end + row, column), strides 2^34 − s, s, s and 1, the address wraps around modulo 2^64 to
  row · s + column, while the bound 2^30 on the third coordinate stops at row = end.

Rows behind the last group become zeros. Products of e4m3 tiles are right in the interpreter as they are; no operand is
widened.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.ragged_tma import create_ragged_descriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from lit_interns1_kernels.device.codegen import KernelBuild
from lit_interns1_kernels.device.runtime import ensure_descriptor_memory, persistent_programs, tuned
from lit_interns1_kernels.fp8_quantize import BLOCK

_SCALE_BLOCK = tl.constexpr(BLOCK)


@triton.jit
def _tiles_of_groups(offsets_ptr, num_groups, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr):
    """How many tiles of rows each group has, and the tiles before its end."""
    group = tl.arange(0, GROUPS)
    inside = group < num_groups
    end = tl.load(offsets_ptr + group, mask=inside, other=0)
    start = tl.load(offsets_ptr + group - 1, mask=inside & (group > 0), other=0)
    tiles = tl.where(inside, tl.cdiv(end - start, BLOCK_M), 0)
    return tiles, tl.cumsum(tiles, 0)


@triton.jit
def _place(tile_m, tiles, tiles_until, offsets_ptr, BLOCK_M: tl.constexpr):
    """Group of a tile of rows, its first row, and the end of the group."""
    group = tl.sum((tiles_until <= tile_m).to(tl.int32), 0)
    tile_in_group = tile_m - tl.sum(tl.where(tiles_until <= tile_m, tiles, 0), 0)
    start = tl.load(offsets_ptr + group - 1, mask=group > 0, other=0)
    return group, start + tile_in_group * BLOCK_M, tl.load(offsets_ptr + group)


@triton.jit
def _product(
    a_desc, a_scale_ptr, b_desc, b_scale_ptr, group, row, end, column, num_columns, depth,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """One tile: the product of each block of K in the tensor cores, then scaled and added in float32."""
    blocks_k = depth // BLOCK_K
    rows = row + tl.arange(0, BLOCK_M)
    a_scale_ptrs = a_scale_ptr + rows.to(tl.int64) * blocks_k
    b_scale_ptr += (group * tl.cdiv(num_columns, _SCALE_BLOCK) + column // _SCALE_BLOCK) * blocks_k
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in range(0, blocks_k):
        if RAGGED:
            a = a_desc.load([1073741824, end, 1073741824 - end + row, block * BLOCK_K])
            a = a.reshape(BLOCK_M, BLOCK_K)
        else:
            a = a_desc.load([row, block * BLOCK_K])
        # columns behind the last of this group are those of the next one, or zeros; they are not stored
        b = b_desc.load([group * num_columns + column, block * BLOCK_K])
        scale = tl.load(a_scale_ptrs + block, mask=rows < end, other=0.0) * tl.load(b_scale_ptr + block)
        total += tl.dot(a, b.T) * scale[:, None]
    return total


@triton.jit
def _zero_tail(
    out_ptr, offsets_ptr, num_groups, num_rows, num_columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Zeros behind the last group."""
    start = tl.load(offsets_ptr + num_groups - 1)
    tiles_n = tl.cdiv(num_columns, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tl.cdiv(num_rows - start, BLOCK_M) * tiles_n, tl.num_programs(0)):
        rows = start + (tile // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = (tile % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
        out_ptrs = out_ptr + rows[:, None].to(tl.int64) * num_columns + columns[None, :]
        inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
        tl.store(out_ptrs, tl.zeros((BLOCK_M, BLOCK_N), tl.bfloat16), mask=inside)


@triton.jit
def _clipped(
    a_ptr, a_scale_ptr, b_ptr, b_scale_ptr, offsets_ptr, out_ptr, num_rows, num_columns, depth, num_groups,
    GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    b_desc = tl.make_tensor_descriptor(
        b_ptr, shape=[num_groups * num_columns, depth], strides=[depth, 1], block_shape=[BLOCK_N, BLOCK_K]
    )
    tiles, tiles_until = _tiles_of_groups(offsets_ptr, num_groups, GROUPS, BLOCK_M)
    tiles_n = tl.cdiv(num_columns, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tl.sum(tiles, 0) * tiles_n, tl.num_programs(0)):
        group, row, end = _place(tile // tiles_n, tiles, tiles_until, offsets_ptr, BLOCK_M)
        column = (tile % tiles_n) * BLOCK_N
        a_desc = tl.make_tensor_descriptor(
            a_ptr, shape=[end, depth], strides=[depth, 1], block_shape=[BLOCK_M, BLOCK_K]
        )
        out_desc = tl.make_tensor_descriptor(
            out_ptr, shape=[end, num_columns], strides=[num_columns, 1], block_shape=[BLOCK_M, BLOCK_N]
        )
        total = _product(
            a_desc, a_scale_ptr, b_desc, b_scale_ptr, group, row, end, column, num_columns, depth,
            BLOCK_M, BLOCK_N, BLOCK_K, False,
        )  # fmt: skip
        out_desc.store([row, column], total.to(tl.bfloat16))
    _zero_tail(out_ptr, offsets_ptr, num_groups, num_rows, num_columns, BLOCK_M, BLOCK_N)


@triton.jit
def _ragged(
    a_desc, a_scale_ptr, b_desc, b_scale_ptr, offsets_ptr, out_desc, out_ptr, num_rows, num_columns, depth, num_groups,
    GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles, tiles_until = _tiles_of_groups(offsets_ptr, num_groups, GROUPS, BLOCK_M)
    tiles_n = tl.cdiv(num_columns, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tl.sum(tiles, 0) * tiles_n, tl.num_programs(0)):
        group, row, end = _place(tile // tiles_n, tiles, tiles_until, offsets_ptr, BLOCK_M)
        column = (tile % tiles_n) * BLOCK_N
        total = _product(
            a_desc, a_scale_ptr, b_desc, b_scale_ptr, group, row, end, column, num_columns, depth,
            BLOCK_M, BLOCK_N, BLOCK_K, True,
        )  # fmt: skip
        tile_4d = total.to(tl.bfloat16).reshape(1, 1, BLOCK_M, BLOCK_N)
        out_desc.store([1073741824, end, 1073741824 - end + row, column], tile_4d)
    _zero_tail(out_ptr, offsets_ptr, num_groups, num_rows, num_columns, BLOCK_M, BLOCK_N)


_CLIPPED_CONFIGURATIONS = [
    triton.Config({"BLOCK_M": 128, "BLOCK_N": 128}, num_warps=8, num_stages=3),
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 128}, num_warps=4, num_stages=4),
    triton.Config({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=4, num_stages=4),
]
_RAGGED_BLOCKS = {"BLOCK_M": 128, "BLOCK_N": 128}
"""The same for all configurations: the host builds the descriptors, and they have the size of a tile."""
_RAGGED_CONFIGURATIONS = [triton.Config({}, num_warps=8, num_stages=3), triton.Config({}, num_warps=8, num_stages=4)]

_tuned_clipped = tuned(_CLIPPED_CONFIGURATIONS, key=("num_columns", "depth", "num_groups"))(_clipped)
_tuned_ragged = tuned(_RAGGED_CONFIGURATIONS, key=("num_columns", "depth", "num_groups"))(_ragged)


def clipped(a_MK: Tensor, a_scale: Tensor, b_GNK: Tensor, b_scale: Tensor, offsets_G: Tensor, out_MN: Tensor) -> None:
    """Writes the product into `out_MN`. Everything is contiguous and starts at a multiple of 16 bytes."""
    groups, columns, depth = b_GNK.shape
    if a_MK.shape[0] == 0:
        return
    ensure_descriptor_memory()
    _tuned_clipped[(persistent_programs(a_MK.device),)](
        a_MK, a_scale, b_GNK, b_scale, offsets_G, out_MN, a_MK.shape[0], columns, depth, groups,
        GROUPS=triton.next_power_of_2(groups), BLOCK_K=BLOCK,
    )  # fmt: skip


def ragged(a_MK: Tensor, a_scale: Tensor, b_GNK: Tensor, b_scale: Tensor, offsets_G: Tensor, out_MN: Tensor) -> None:
    """As `clipped`."""
    groups, columns, depth = b_GNK.shape
    if a_MK.shape[0] == 0:
        return
    block_m, block_n = _RAGGED_BLOCKS["BLOCK_M"], _RAGGED_BLOCKS["BLOCK_N"]
    _tuned_ragged[(persistent_programs(a_MK.device),)](
        create_ragged_descriptor(a_MK, [block_m, BLOCK]), a_scale,
        TensorDescriptor.from_tensor(b_GNK.flatten(0, 1), [block_n, BLOCK]), b_scale, offsets_G,
        create_ragged_descriptor(out_MN, [block_m, block_n]), out_MN, a_MK.shape[0], columns, depth, groups,
        GROUPS=triton.next_power_of_2(groups), BLOCK_K=BLOCK, **_RAGGED_BLOCKS,
    )  # fmt: skip


_INSTRUCTIONS = {"sm_90": ("QGMMA", "UTMALDG", "UTMASTG"), "sm_100": ("UTCQMMA", "UTMALDG", "UTMASTG")}


def _builds() -> tuple[KernelBuild, ...]:
    pointers = {"a_scale_ptr": "*fp32", "b_scale_ptr": "*fp32", "offsets_ptr": "*i32", "out_ptr": "*bf16"}
    sizes = dict.fromkeys(("num_rows", "num_columns", "depth", "num_groups"), "i32")
    kernels: tuple[tuple[str, Any, list[triton.Config], dict[str, str], dict[str, int]], ...] = (
        ("clipped", _clipped, _CLIPPED_CONFIGURATIONS, {"a_ptr": "*fp8e4nv", "b_ptr": "*fp8e4nv"}, {}),
        (
            "ragged",
            _ragged,
            _RAGGED_CONFIGURATIONS,
            {
                "a_desc": f"tensordesc<fp8e4nv[1,1,{_RAGGED_BLOCKS['BLOCK_M']},{BLOCK}]>",
                "b_desc": f"tensordesc<fp8e4nv[{_RAGGED_BLOCKS['BLOCK_N']},{BLOCK}]>",
                "out_desc": f"tensordesc<bf16[1,1,{_RAGGED_BLOCKS['BLOCK_M']},{_RAGGED_BLOCKS['BLOCK_N']}]>",
            },
            _RAGGED_BLOCKS,
        ),
    )
    builds = []
    for name, kernel, configurations, operands, blocks in kernels:
        for index, configuration in enumerate(configurations):
            tile = {**blocks, **configuration.kwargs}
            options = {"num_warps": configuration.num_warps, "num_stages": configuration.num_stages}
            builds.append(
                KernelBuild(
                    name=f"fp8_grouped_gemm/{name}/{tile['BLOCK_M']}x{tile['BLOCK_N']}x{BLOCK}/{options['num_stages']}",
                    kernel=kernel,
                    signature={**operands, **pointers, **sizes},
                    constants={"GROUPS": 128, "BLOCK_K": BLOCK, **tile},
                    undivided=("num_rows", "num_groups"),
                    options=options,
                    targets=("sm_90", "sm_100"),
                    instructions=_INSTRUCTIONS,
                    extended=index > 0,
                )
            )
    return tuple(builds)


BUILDS: tuple[KernelBuild, ...] = _builds()

"""Routed SwiGLU experts on a CPU: block by block, so that everything between two matrix products stays in the cache.

Rows are cut into one part per worker, at any row (a skewed router changes nothing), and a part into blocks of some
hundred rows: a piece of one expert, or several small experts, whose products are then the only work done one by one. A
block gathers its rows into a workspace, and adds its outputs to its worker's sum; no array of routed rows exists but
the gate and up projections, kept for backward. There, with g = dL/dy of a row's source, w its weight,
a = gate, b = up:

    h' = W_downᵀ g      dL/dw = ⟨silu(a) ⊙ b, h'⟩      dL/db = w h' ⊙ silu(a)      dL/da = w h' ⊙ b ⊙ silu'(a)

so neither the experts' outputs nor h = silu(a) ⊙ b are kept.

The functions that walk over blocks are compiled by TorchScript where it exists: it runs them without Python's lock,
which would otherwise be fought for between the workers' many short operations.

Low precision: where the processor has units for bfloat16 the products use them; elsewhere blocks and weights are
widened to float32 in the workspace, which is an order of magnitude faster. Sums over rows and workers are float32.

Letters: S source rows, R routed rows, E experts, D hidden size, I intermediate size of an expert, B rows of a block.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from lit_interns1_kernels.cpu_workers import run_parts, worker_count

_log = logging.getLogger(__name__)

_BLOCK_ROWS = 512
_MERGED_ROWS = 128  # small experts share a block up to here
_EXPERT_COST_ROWS = 8  # what starting an expert costs, in rows
_SNAP_ROWS = 32  # a part that would cut so little off an expert ends at the nearer edge

# A piece: rows of one expert in a block; whether it is the expert's first (1) or last (2) in its part.
_FIRST, _LAST = 1, 2
# Lists of integers, because TorchScript takes them: a block is (start, stop, first piece, end of pieces), a piece is
# (expert, start, stop, place).


def _forward_part(
    x_SD: Tensor, gate_up_EID: list[Tensor], down_EDI: list[Tensor], index_R: Tensor, weight_R1: Tensor,
    gate_up_RI: Tensor, y_SD: Tensor, work_BD: Tensor, work_BJ: Tensor, work_BI: Tensor,
    gate_up_ID: Tensor, down_DI: Tensor, sum_BD: Tensor, blocks: list[int], pieces: list[int], widen: bool, keep: bool,
):  # fmt: skip
    size_I = work_BI.size(1)
    y_SD.zero_()
    for block in range(len(blocks) // 4):
        start, stop = blocks[4 * block], blocks[4 * block + 1]
        its_pieces = range(4 * blocks[4 * block + 2], 4 * blocks[4 * block + 3], 4)
        rows = stop - start
        index_B = index_R[start:stop]
        x_BD, h_BI = work_BD[:rows], work_BI[:rows]
        if widen:
            x_BD.copy_(x_SD.index_select(0, index_B))
        else:
            torch.index_select(x_SD, 0, index_B, out=x_BD)
        kept_BJ = gate_up_RI[start:stop] if keep else work_BJ[:rows]
        a_BJ = work_BJ[:rows] if widen else kept_BJ
        for piece in its_pieces:
            expert, first, end = pieces[piece], pieces[piece + 1] - start, pieces[piece + 2] - start
            w_gate_up_ID = gate_up_EID[expert]
            if widen:
                if pieces[piece + 3] % 2 == 1:
                    gate_up_ID.copy_(w_gate_up_ID)
                w_gate_up_ID = gate_up_ID
            torch.mm(x_BD[first:end], w_gate_up_ID.t(), out=a_BJ[first:end])
        if widen and keep:
            kept_BJ.copy_(a_BJ)
        torch.ops.aten.silu(a_BJ[:, :size_I], out=h_BI)
        h_BI.mul_(a_BJ[:, size_I:]).mul_(weight_R1[start:stop])
        for piece in its_pieces:
            expert, first, end = pieces[piece], pieces[piece + 1] - start, pieces[piece + 2] - start
            w_down_DI = down_EDI[expert]
            if widen:
                if pieces[piece + 3] % 2 == 1:
                    down_DI.copy_(w_down_DI)
                w_down_DI = down_DI
            torch.mm(h_BI[first:end], w_down_DI.t(), out=x_BD[first:end])
        if x_BD.dtype == y_SD.dtype:
            y_SD.index_add_(0, index_B, x_BD)
        else:
            y_SD.index_add_(0, index_B, sum_BD[:rows].copy_(x_BD))


def _backward_part(
    x_SD: Tensor, grad_y_SD: Tensor, gate_up_EID: list[Tensor], down_EDI: list[Tensor], index_R: Tensor,
    weight_R1: Tensor, gate_up_RI: Tensor, grad_x_SD: Tensor, grad_gate_up_EID: list[Tensor],
    grad_down_EDI: list[Tensor], grad_weight_R: Tensor, work_BD: Tensor, work_BJ: Tensor, work_3BI: Tensor,
    gate_up_ID: Tensor, down_DI: Tensor, sum_ID: Tensor, sum_DI: Tensor, sum_BD: Tensor, kept_BJ: Tensor,
    blocks: list[int], pieces: list[int], widen: bool,
):  # fmt: skip
    size_I = work_3BI.size(2)
    grad_x_SD.zero_()
    for block in range(len(blocks) // 4):
        start, stop = blocks[4 * block], blocks[4 * block + 1]
        its_pieces = range(4 * blocks[4 * block + 2], 4 * blocks[4 * block + 3], 4)
        rows = stop - start
        index_B, w_B1 = index_R[start:stop], weight_R1[start:stop]
        rows_BD, da_BJ = work_BD[:rows], work_BJ[:rows]
        dh_BI, h_BI, silu_BI = work_3BI[0, :rows], work_3BI[1, :rows], work_3BI[2, :rows]
        a_BJ = gate_up_RI[start:stop]
        if widen:
            a_BJ = kept_BJ[:rows].copy_(a_BJ)
            rows_BD.copy_(grad_y_SD.index_select(0, index_B))
        else:
            torch.index_select(grad_y_SD, 0, index_B, out=rows_BD)
        gate_BI, up_BI = a_BJ[:, :size_I], a_BJ[:, size_I:]
        d_gate_BI, d_up_BI = da_BJ[:, :size_I], da_BJ[:, size_I:]

        for piece in its_pieces:
            expert, first, end = pieces[piece], pieces[piece + 1] - start, pieces[piece + 2] - start
            w_down_DI = down_EDI[expert]
            if widen:
                if pieces[piece + 3] % 2 == 1:
                    down_DI.copy_(w_down_DI)
                w_down_DI = down_DI
            torch.mm(rows_BD[first:end], w_down_DI, out=dh_BI[first:end])
        torch.ops.aten.silu(gate_BI, out=silu_BI)
        torch.mul(silu_BI, up_BI, out=h_BI)
        torch.mul(h_BI, dh_BI, out=d_gate_BI)  # a place to put it
        torch.sum(d_gate_BI, [1], out=grad_weight_R[start:stop])
        h_BI.mul_(w_B1)
        dh_BI.mul_(w_B1)
        torch.mul(dh_BI, silu_BI, out=d_up_BI)
        dh_BI.mul_(up_BI)
        torch.ops.aten.silu_backward(dh_BI, gate_BI, grad_input=d_gate_BI)

        for piece in its_pieces:
            expert, first, end = pieces[piece], pieces[piece + 1] - start, pieces[piece + 2] - start
            dw_down_DI = sum_DI if widen else grad_down_EDI[expert]
            if pieces[piece + 3] % 2 == 1:
                torch.mm(rows_BD[first:end].t(), h_BI[first:end], out=dw_down_DI)
            else:
                dw_down_DI.addmm_(rows_BD[first:end].t(), h_BI[first:end])
            if widen and pieces[piece + 3] >= 2:
                grad_down_EDI[expert].copy_(sum_DI)
        if widen:
            rows_BD.copy_(x_SD.index_select(0, index_B))
        else:
            torch.index_select(x_SD, 0, index_B, out=rows_BD)
        for piece in its_pieces:
            expert, first, end = pieces[piece], pieces[piece + 1] - start, pieces[piece + 2] - start
            w_gate_up_ID = gate_up_EID[expert]
            dw_gate_up_ID = sum_ID if widen else grad_gate_up_EID[expert]
            if widen:
                if pieces[piece + 3] % 2 == 1:
                    gate_up_ID.copy_(w_gate_up_ID)
                w_gate_up_ID = gate_up_ID
            if pieces[piece + 3] % 2 == 1:
                torch.mm(da_BJ[first:end].t(), rows_BD[first:end], out=dw_gate_up_ID)
            else:
                dw_gate_up_ID.addmm_(da_BJ[first:end].t(), rows_BD[first:end])
            if widen and pieces[piece + 3] >= 2:
                grad_gate_up_EID[expert].copy_(sum_ID)
            torch.mm(da_BJ[first:end], w_gate_up_ID, out=rows_BD[first:end])
        if rows_BD.dtype == grad_x_SD.dtype:
            grad_x_SD.index_add_(0, index_B, rows_BD)
        else:
            grad_x_SD.index_add_(0, index_B, sum_BD[:rows].copy_(rows_BD))


@cache
def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated, but the only one that runs without Python's lock
            return torch.jit.script(function)
    except Exception as error:
        _log.debug("%s runs in Python: %s", function.__name__, error)
        return function


@cache
def _has_units_for(dtype: torch.dtype) -> bool:
    """Whether products in this dtype are not slower than in float32."""
    if dtype != torch.bfloat16:
        return dtype != torch.float16
    fast = torch.ops.mkldnn._is_mkldnn_bf16_supported() and any(
        torch.cpu.get_capabilities().get(unit, False) for unit in ("amx_bf16", "avx512_bf16", "bf16")
    )
    if not fast:
        _log.info("experts: this CPU has no bfloat16 units; products are computed in float32, block by block")
    return fast


class _Part(NamedTuple):
    """What one worker walks over."""

    blocks: list[int]
    pieces: list[int]

    def add(self, expert: int, start: int, stop: int, place: int) -> None:
        """Appends a piece, to the last block if it fits."""
        number = len(self.pieces) // 4
        self.pieces.extend((expert, start, stop, place))
        if self.blocks and stop - self.blocks[-4] <= _MERGED_ROWS:
            self.blocks[-3], self.blocks[-1] = stop, number + 1
        else:
            self.blocks.extend((start, stop, number, number + 1))


class _Plan(NamedTuple):
    parts: list[_Part]
    shared: list[tuple[int, int]]
    """(part, expert) whose gradient must be added to that of an earlier part."""


def _plan(ends_E: list[int], parts: int, block_rows: int) -> _Plan:
    """Parts of equal cost, in blocks of at most `block_rows` rows."""
    total = (ends_E[-1] if ends_E else 0) + _EXPERT_COST_ROWS * len(ends_E)
    plan = _Plan([_Part([], []) for _ in range(parts)], [])
    part, start = 0, 0
    for expert, end in enumerate(ends_E):
        while start < end:
            spent = start + _EXPERT_COST_ROWS * expert
            limit = math.ceil(total * (part + 1) / parts)
            stop = end if part == parts - 1 else min(end, start + max(limit - spent, 0))
            if min(end - stop, stop - start) <= _SNAP_ROWS:
                stop = end if 2 * (stop - start) >= end - start else start
            if stop > start:
                count = math.ceil((stop - start) / block_rows)
                edges = [start + (stop - start) * piece // count for piece in range(count + 1)]
                for piece in range(count):
                    place = (_FIRST if piece == 0 else 0) + (_LAST if piece == count - 1 else 0)
                    plan.parts[part].add(expert, edges[piece], edges[piece + 1], place)
                if start > (ends_E[expert - 1] if expert else 0):
                    plan.shared.append((part, expert))
            start = stop
            if start < end:
                part += 1
    return plan


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


class _Sizes:
    """What both directions derive from their arguments."""

    def __init__(self, x_SD: Tensor, gate_up_EID: Tensor, ends_E: list[int]) -> None:
        self.widen = not _has_units_for(x_SD.dtype)
        self.like = x_SD
        self.compute = torch.float32 if self.widen else x_SD.dtype
        self.wide = _wide(x_SD.dtype)
        self.size_D, self.size_J = x_SD.shape[1], gate_up_EID.shape[1]
        self.size_I = self.size_J // 2
        # in low precision an expert's gradient is not rounded between its blocks
        limit = _BLOCK_ROWS if self.widen or self.compute == self.wide else max(_BLOCK_ROWS, *ends_E, 1)
        rows = ends_E[-1] if ends_E else 0
        self.plan = _plan(ends_E, max(min(worker_count(), math.ceil(rows / (2 * _SNAP_ROWS))), 1), limit)
        self.parts = len(self.plan.parts)
        blocks = [part.blocks for part in self.plan.parts]
        self.rows = max((b[i + 1] - b[i] for b in blocks for i in range(0, len(b), 4)), default=0)

    def work(self, *shape: int) -> Tensor:
        """A workspace for every part."""
        return self.like.new_empty((self.parts, *shape), dtype=self.compute)

    def if_needed(self, needed: bool, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A workspace for every part, or an empty one."""
        return self.like.new_empty((self.parts, *(shape if needed else (0,))), dtype=dtype or self.compute)

    def sums(self, rows: int) -> list[Tensor]:
        """(rows, D) for every part, what it adds up."""
        return [self.like.new_empty((rows, self.size_D), dtype=self.wide) for _ in range(self.parts)]

    def total(self, sums: list[Tensor]) -> Tensor:
        """The parts' sums together, in the dtype of the rows."""
        first, *others = sums
        for other in others:
            first.add_(other)
        return first.to(self.like.dtype)


def forward(
    x_SD: Tensor, gate_up_EID: Tensor, down_EDI: Tensor, row_index_R: Tensor, offsets_E: Tensor,
    row_weight_R: Tensor, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y_SD, and the gate and up projections gate_up_RI (empty unless `keep`)."""
    sizes = _Sizes(x_SD, gate_up_EID, offsets_E.tolist())
    gate_up_RI = x_SD.new_empty((row_index_R.numel() if keep else 0, sizes.size_J))
    sums = sizes.sums(x_SD.shape[0])
    narrow = sizes.compute != sizes.wide
    work_BD, work_BI = sizes.work(sizes.rows, sizes.size_D), sizes.work(sizes.rows, sizes.size_I)
    work_BJ = sizes.if_needed(sizes.widen or not keep, sizes.rows, sizes.size_J)
    wide_gate_up = sizes.if_needed(sizes.widen, sizes.size_J, sizes.size_D)
    wide_down = sizes.if_needed(sizes.widen, sizes.size_D, sizes.size_I)
    sum_BD = sizes.if_needed(narrow, sizes.rows, sizes.size_D, dtype=sizes.wide)
    gate_ups, downs = list(gate_up_EID.unbind(0)), list(down_EDI.unbind(0))
    weight_R1 = row_weight_R.to(sizes.compute)[:, None]
    walk = _compiled(_forward_part)

    def work(part: int) -> None:
        walk(
            x_SD, gate_ups, downs, row_index_R, weight_R1, gate_up_RI, sums[part], work_BD[part], work_BJ[part],
            work_BI[part], wide_gate_up[part], wide_down[part], sum_BD[part], *sizes.plan.parts[part],
            sizes.widen, keep,
        )  # fmt: skip

    run_parts(work, sizes.parts)
    return sizes.total(sums), gate_up_RI


def backward(
    grad_y_SD: Tensor, x_SD: Tensor, gate_up_EID: Tensor, down_EDI: Tensor, row_index_R: Tensor, offsets_E: Tensor,
    row_weight_R: Tensor, gate_up_RI: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x_SD, gate_up_EID, down_EDI and row_weight_R."""
    ends_E = offsets_E.tolist()
    sizes = _Sizes(x_SD, gate_up_EID, ends_E)
    grad_gate_up_EID, grad_down_EDI = torch.empty_like(gate_up_EID), torch.empty_like(down_EDI)
    grad_weight_R = torch.empty_like(row_weight_R, dtype=sizes.compute)
    grad_weight_R[ends_E[-1] if ends_E else 0 :] = 0.0
    for expert, (start, end) in enumerate(zip([0, *ends_E], ends_E)):
        if start == end:
            grad_gate_up_EID[expert].zero_()
            grad_down_EDI[expert].zero_()

    sums = sizes.sums(x_SD.shape[0])
    narrow = sizes.compute != sizes.wide
    work_BD, work_BJ = sizes.work(sizes.rows, sizes.size_D), sizes.work(sizes.rows, sizes.size_J)
    work_3BI = sizes.work(3, sizes.rows, sizes.size_I)
    wide_gate_up = sizes.if_needed(sizes.widen, sizes.size_J, sizes.size_D)
    wide_down = sizes.if_needed(sizes.widen, sizes.size_D, sizes.size_I)
    sum_gate_up, sum_down = torch.empty_like(wide_gate_up), torch.empty_like(wide_down)
    sum_BD = sizes.if_needed(narrow, sizes.rows, sizes.size_D, dtype=sizes.wide)
    kept_BJ = sizes.if_needed(sizes.widen, sizes.rows, sizes.size_J)
    gate_ups, downs = list(gate_up_EID.unbind(0)), list(down_EDI.unbind(0))
    targets = [(list(grad_gate_up_EID.unbind(0)), list(grad_down_EDI.unbind(0))) for _ in range(sizes.parts)]
    for part, expert in sizes.plan.shared:
        grad_gate_ups, grad_downs = targets[part]
        grad_gate_ups[expert] = torch.empty_like(grad_gate_ups[expert])
        grad_downs[expert] = torch.empty_like(grad_downs[expert])
    weight_R1 = row_weight_R.to(sizes.compute)[:, None]
    grad_y_SD = grad_y_SD.contiguous()
    walk = _compiled(_backward_part)

    def work(part: int) -> None:
        walk(
            x_SD, grad_y_SD, gate_ups, downs, row_index_R, weight_R1, gate_up_RI, sums[part], *targets[part],
            grad_weight_R, work_BD[part], work_BJ[part], work_3BI[part], wide_gate_up[part], wide_down[part],
            sum_gate_up[part], sum_down[part], sum_BD[part], kept_BJ[part], *sizes.plan.parts[part], sizes.widen,
        )  # fmt: skip

    run_parts(work, sizes.parts)
    for part, expert in sizes.plan.shared:
        grad_gate_up_EID[expert].add_(targets[part][0][expert])
        grad_down_EDI[expert].add_(targets[part][1][expert])
    return sizes.total(sums), grad_gate_up_EID, grad_down_EDI, grad_weight_R.to(row_weight_R.dtype)

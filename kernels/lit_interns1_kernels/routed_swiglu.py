"""Routed SwiGLU experts over rows grouped by expert.

    y_s = Σ_{r: row_index_r = s}  w_r · W_down[e(r)] ( silu(W_gate[e(r)] x_s) ⊙ W_up[e(r)] x_s )

Rows are grouped by expert: expert e owns rows offsets[e−1] … offsets[e]. Two forms that must agree: `loop`, one expert
after the other, the reference; `grouped_mm`, one grouped matrix product per projection.

Letters: S source rows, R routed rows, E experts, D hidden size, I intermediate size of an expert.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

ExpertBackend = Literal["grouped_mm", "loop"]


def check_grouped_mm_sizes(hidden_size: int, intermediate_size: int, element_size: int = 2) -> str | None:
    """Why `torch.nn.functional.grouped_mm` cannot take these sizes (rows must be multiples of 16 bytes), or None.

    The default element size is that of bfloat16: sizes that pass work in float32, too.
    """
    step = 16 // element_size
    for name, size in (("hidden_size", hidden_size), ("the experts' intermediate_size", intermediate_size)):
        if size % step:
            return f"{name} = {size} must be a multiple of {step} (rows of 16 bytes)"
    return None


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _combine(y_RD: Tensor, row_index_R: Tensor, num_source_rows: int) -> Tensor:
    return y_RD.new_zeros(num_source_rows, y_RD.shape[1]).index_add(0, row_index_R, y_RD)


def routed_swiglu_loop(
    x_SD: Tensor, gate_up_EID: Tensor, down_EDI: Tensor, row_index_R: Tensor, offsets_E: Tensor, row_weight_R: Tensor
) -> Tensor:
    """The reference: a Python loop over experts. Arguments as in `routed_swiglu`."""
    outputs, start = [], 0
    # unbind once: indexing the stack inside the loop would build a full-size zero gradient per expert
    for gate_up_ID, down_DI, stop in zip(gate_up_EID.unbind(0), down_EDI.unbind(0), offsets_E.tolist(), strict=True):
        rows = x_SD.index_select(0, row_index_R[start:stop])
        outputs.append(F.linear(_swiglu(F.linear(rows, gate_up_ID)), down_DI))
        start = stop
    y_RD = torch.cat(outputs) * row_weight_R[:start, None].to(x_SD.dtype)
    return _combine(y_RD, row_index_R[:start], x_SD.shape[0])


def routed_swiglu_grouped_mm(
    x_SD: Tensor,
    gate_up_EID: Tensor,
    down_EDI: Tensor,
    row_index_R: Tensor,
    offsets_E: Tensor,
    row_weight_R: Tensor,
    has_tail: bool = False,
) -> Tensor:
    """Two grouped matrix products. Arguments as in `routed_swiglu`."""
    rows_RD = x_SD.index_select(0, row_index_R)
    if has_tail:
        # grouped_mm leaves rows behind the last offset uninitialised, in its output and in the gradient of its input:
        # what leaves the rows (here in backward, below in forward) is masked, or 0 · NaN would poison the sums
        routed_R1 = (torch.arange(row_index_R.numel(), device=x_SD.device) < offsets_E[-1])[:, None]
        rows_RD = torch.where(routed_R1, rows_RD, 0.0)
        row_weight_R = torch.where(routed_R1[:, 0], row_weight_R, 0.0)
    hidden_RI = _swiglu(F.grouped_mm(rows_RD, gate_up_EID.transpose(1, 2), offs=offsets_E))
    hidden_RI = hidden_RI * row_weight_R[:, None].to(x_SD.dtype)
    y_RD = F.grouped_mm(hidden_RI, down_EDI.transpose(1, 2), offs=offsets_E)
    if has_tail:
        y_RD = torch.where(routed_R1, y_RD, 0.0)
    return _combine(y_RD, row_index_R, x_SD.shape[0])


def routed_swiglu(
    x_SD: Tensor,
    gate_up_EID: Tensor,
    down_EDI: Tensor,
    row_index_R: Tensor,
    offsets_E: Tensor,
    row_weight_R: Tensor,
    *,
    has_tail: bool = False,
    backend: ExpertBackend = "grouped_mm",
) -> Tensor:
    """Expert outputs, weighted and summed per source row. Differentiable in x, both weights and the row weights.

    Args:
        x_SD: (S, D) source rows.
        gate_up_EID: (E, 2·I, D) gate and up projections behind one another.
        down_EDI: (E, D, I) down projections.
        row_index_R: (R,) int64, source row of each routed row; routed rows are grouped by expert.
        offsets_E: (E,) int32, end of each expert's rows.
        row_weight_R: (R,) weight of each routed row.
        has_tail: Rows behind the last offset exist and must not count.
        backend: `grouped_mm` or `loop`.

    Returns:
        (S, D).
    """
    if backend == "loop":
        return routed_swiglu_loop(x_SD, gate_up_EID, down_EDI, row_index_R, offsets_E, row_weight_R)
    return routed_swiglu_grouped_mm(x_SD, gate_up_EID, down_EDI, row_index_R, offsets_E, row_weight_R, has_tail)

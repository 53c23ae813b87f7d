"""Routed SwiGLU experts over rows grouped by expert.

    y_s = Σ_{r: row_index_r = s}  w_r · W_down[e(r)] ( silu(W_gate[e(r)] x_s) ⊙ W_up[e(r)] x_s )

Rows are grouped by expert: expert e owns rows offsets[e−1] … offsets[e]. Three forms that must agree:

- `fused`: one operation, `lit_interns1::routed_swiglu`, with the gate and up projections as all that is kept for
  backward. On a CPU it goes block by block (`routed_swiglu_cpu`), on a GPU through Triton (`device.routed_swiglu`).
- `grouped_mm`: one grouped matrix product of torch per projection, with plain operations between them.
- `loop`: one expert after the other, the reference.

Letters: S source rows, R routed rows, E experts, D hidden size, I intermediate size of an expert.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_interns1_kernels import routed_swiglu_cpu
from lit_interns1_kernels.backends import fused_experts_problem, report_experts
from lit_interns1_kernels.cpu_workers import waiting_threads_sleep

ExpertBackend = Literal["auto", "fused", "grouped_mm", "loop"]

_SHORT_WORK = 2e10
"""Floating point operations of forward below which cores that still spin for other threads' work cost more than they
give (about 20 ms on two cores)."""

_DECODING_WORK = 1e8
"""Floating point operations below which, without gradients, walking over blocks costs more than it saves."""


def check_grouped_mm_sizes(hidden_size: int, intermediate_size: int, element_size: int = 2) -> str | None:
    """Why `torch.nn.functional.grouped_mm` cannot take these sizes (rows must be multiples of 16 bytes), or None.

    The default element size is that of bfloat16: sizes that pass work in float32, too.
    """
    step = 16 // element_size
    for name, size in (("hidden_size", hidden_size), ("the experts' intermediate_size", intermediate_size)):
        if size % step:
            return f"{name} = {size} must be a multiple of {step} (rows of 16 bytes)"
    return None


def swiglu(gate_up: Tensor) -> Tensor:
    """(..., 2·I) gate and up projections behind one another → (..., I)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def sum_per_source(y_RD: Tensor, row_index_R: Tensor, num_source_rows: int) -> Tensor:
    """(R, D) routed rows → (S, D), added up by the source row that they come from."""
    return y_RD.new_zeros(num_source_rows, y_RD.shape[1]).index_add(0, row_index_R, y_RD)


def routed_swiglu_loop(
    x_SD: Tensor, gate_up_EID: Tensor, down_EDI: Tensor, row_index_R: Tensor, offsets_E: Tensor, row_weight_R: Tensor
) -> Tensor:
    """The reference: a Python loop over experts. Arguments as in `routed_swiglu`."""
    outputs, start = [], 0
    # unbind once: indexing the stack inside the loop would build a full-size zero gradient per expert
    for gate_up_ID, down_DI, stop in zip(gate_up_EID.unbind(0), down_EDI.unbind(0), offsets_E.tolist(), strict=True):
        rows = x_SD.index_select(0, row_index_R[start:stop])
        outputs.append(F.linear(swiglu(F.linear(rows, gate_up_ID)), down_DI))
        start = stop
    y_RD = torch.cat(outputs) * row_weight_R[:start, None].to(x_SD.dtype)
    return sum_per_source(y_RD, row_index_R[:start], x_SD.shape[0])


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
    hidden_RI = swiglu(F.grouped_mm(rows_RD, gate_up_EID.transpose(1, 2), offs=offsets_E))
    hidden_RI = hidden_RI * row_weight_R[:, None].to(x_SD.dtype)
    y_RD = F.grouped_mm(hidden_RI, down_EDI.transpose(1, 2), offs=offsets_E)
    if has_tail:
        y_RD = torch.where(routed_R1, y_RD, 0.0)
    return sum_per_source(y_RD, row_index_R, x_SD.shape[0])


@torch.library.custom_op("lit_interns1::routed_swiglu", mutates_args=(), device_types="cpu")
def _fused(
    x_SD: Tensor, gate_up_EID: Tensor, down_EDI: Tensor, row_index_R: Tensor, offsets_E: Tensor,
    row_weight_R: Tensor, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return routed_swiglu_cpu.forward(x_SD, gate_up_EID, down_EDI, row_index_R, offsets_E, row_weight_R, keep)


@_fused.register_fake
def _(x_SD, gate_up_EID, down_EDI, row_index_R, offsets_E, row_weight_R, keep):
    rows = row_index_R.shape[0] if keep else 0
    return torch.empty_like(x_SD), x_SD.new_empty((rows, gate_up_EID.shape[1]))


@_fused.register_kernel("cuda")
def _(x_SD, gate_up_EID, down_EDI, row_index_R, offsets_E, row_weight_R, keep):
    from lit_interns1_kernels.device import routed_swiglu as device

    return device.forward(x_SD, gate_up_EID, down_EDI, row_index_R, offsets_E, row_weight_R, keep)


@torch.library.custom_op("lit_interns1::routed_swiglu_backward", mutates_args=(), device_types="cpu")
def _fused_backward(
    grad_y_SD: Tensor, x_SD: Tensor, gate_up_EID: Tensor, down_EDI: Tensor, row_index_R: Tensor, offsets_E: Tensor,
    row_weight_R: Tensor, gate_up_RI: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return routed_swiglu_cpu.backward(
        grad_y_SD, x_SD, gate_up_EID, down_EDI, row_index_R, offsets_E, row_weight_R, gate_up_RI
    )


@_fused_backward.register_fake
def _(grad_y_SD, x_SD, gate_up_EID, down_EDI, row_index_R, offsets_E, row_weight_R, gate_up_RI):
    return tuple(torch.empty_like(x) for x in (x_SD, gate_up_EID, down_EDI, row_weight_R))


@_fused_backward.register_kernel("cuda")
def _(grad_y_SD, x_SD, gate_up_EID, down_EDI, row_index_R, offsets_E, row_weight_R, gate_up_RI):
    from lit_interns1_kernels.device import routed_swiglu as device

    return device.backward(grad_y_SD, x_SD, gate_up_EID, down_EDI, row_index_R, offsets_E, row_weight_R, gate_up_RI)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:6], output[1])


def _differentiate(ctx: Any, grad_y_SD: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_y_SD is None:
        return (None,) * 7
    x, gate_up, down, weight = _fused_backward(grad_y_SD, *ctx.saved_tensors)
    return x, gate_up, down, None, None, weight, None


_fused.register_autograd(_differentiate, setup_context=_save)


def choose_expert_backend(
    backend: ExpertBackend, x_SD: Tensor, gate_up_EID: Tensor, num_rows: int
) -> Literal["fused", "grouped_mm", "loop"]:
    """What `auto` means for these arguments, and whether what was asked for is possible.

    Raises:
        ValueError: If `backend` is unknown, or cannot run here.
    """
    if backend not in get_args(ExpertBackend):
        raise ValueError(f"expert backend {backend!r} is unknown: choose one of {', '.join(get_args(ExpertBackend))}")
    if backend == "fused" and (problem := fused_experts_problem(x_SD.device, x_SD.dtype)):
        raise ValueError(f"expert backend 'fused': {problem}")
    if backend != "auto":
        return backend
    _, inner, hidden = gate_up_EID.shape
    groupable = check_grouped_mm_sizes(hidden, inner // 2, x_SD.element_size()) is None
    if fused_experts_problem(x_SD.device, x_SD.dtype):
        return "grouped_mm" if groupable else "loop"
    if torch.compiler.is_compiling() or x_SD.device.type != "cpu" or x_SD.dtype != torch.float32 or not groupable:
        return "fused"
    work = 3.0 * num_rows * inner * hidden
    if not torch.is_grad_enabled() and work < _DECODING_WORK:
        return "grouped_mm"
    short = work < _SHORT_WORK
    return "grouped_mm" if short and torch.get_num_threads() > 1 and not waiting_threads_sleep() else "fused"


def routed_swiglu(
    x_SD: Tensor,
    gate_up_EID: Tensor,
    down_EDI: Tensor,
    row_index_R: Tensor,
    offsets_E: Tensor,
    row_weight_R: Tensor,
    *,
    has_tail: bool = False,
    backend: ExpertBackend = "auto",
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
        backend: `fused`, `grouped_mm`, `loop` (see the module), or `auto`: the fastest that runs here.

    Returns:
        (S, D).

    Raises:
        ValueError: If the back-end is unknown or cannot run here.
    """
    chosen = choose_expert_backend(backend, x_SD, gate_up_EID, row_index_R.shape[0])
    report_experts(x_SD.device, chosen)
    if chosen == "loop":
        return routed_swiglu_loop(x_SD, gate_up_EID, down_EDI, row_index_R, offsets_E, row_weight_R)
    if chosen == "grouped_mm":
        return routed_swiglu_grouped_mm(x_SD, gate_up_EID, down_EDI, row_index_R, offsets_E, row_weight_R, has_tail)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x_SD, gate_up_EID, down_EDI, row_weight_R))
    y_SD: Tensor = _fused(x_SD, gate_up_EID, down_EDI, row_index_R, offsets_E, row_weight_R, keep)[0]
    return y_SD

"""Routed SwiGLU experts whose linear layers multiply in FP8.

    y_s = Σ_{r: row_index_r = s}  w_r · W_down[e(r)] ⊛ ( silu(W_gate[e(r)] ⊛ x_s) ⊙ (W_up[e(r)] ⊛ x_s) )
    W ⊛ x = Σ_k ( Σ_{j in block k} q(W)_j · q(x)_j ) · s_W · s_x      rounded to bfloat16

q, s: E4M3 numbers and scales of `fp8_quantize`, x in blocks of 1 × 128, each of the three matrices in blocks of
128 × 128; sizes that are no multiples of 128 end with a smaller block. silu, ⊙, w and the sum are not FP8. Gradients
pass quantisation as if it were not there (straight through): that of an input is an FP8 product of the output's
gradient, quantised like x, with W; that of W uses what is not quantised. See `fp8_grouped_linear`.

Letters as in `routed_swiglu`; J = 2 · I.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_interns1_kernels.backends import report_experts
from lit_interns1_kernels.fp8_grouped_gemm import FP8GemmBackend, fp8_grouped_linear
from lit_interns1_kernels.fp8_quantize import BLOCK
from lit_interns1_kernels.routed_swiglu import sum_per_source, swiglu


def _in_whole_blocks(x: Tensor, *dimensions: int) -> Tensor:
    """Zeros behind the given dimensions up to multiples of 128: no scale and no product changes by them."""
    missing = [-x.shape[d] % BLOCK if d - x.ndim in dimensions else 0 for d in range(x.ndim)]
    return F.pad(x, [edge for size in reversed(missing) for edge in (0, size)]) if any(missing) else x


def fp8_routed_swiglu(
    x_SD: Tensor,
    gate_up_EJD: Tensor,
    down_EDI: Tensor,
    row_index_R: Tensor,
    offsets_E: Tensor,
    row_weight_R: Tensor,
    *,
    has_tail: bool = False,
    power_of_two_scales: bool = False,
    backend: FP8GemmBackend = "auto",
) -> Tensor:
    """Expert outputs, weighted and summed per source row. Differentiable in x, both weights and the row weights.

    Args:
        x_SD: (S, D) source rows, float32, bfloat16 or float16. Values must be finite.
        gate_up_EJD: (E, 2·I, D) gate and up projections behind one another, of the dtype of x.
        down_EDI: (E, D, I) down projections.
        row_index_R: (R,) int64, source row of each routed row; routed rows are grouped by expert.
        offsets_E: (E,) int32, end of each expert's rows.
        row_weight_R: (R,) weight of each routed row.
        has_tail: Rows behind the last offset exist and must not count.
        power_of_two_scales: Round all scales up to powers of two.
        backend: Form of the products; see `fp8_grouped_gemm`.

    Returns:
        (S, D) in the dtype of x; each product has the precision of bfloat16.

    Raises:
        ValueError: If a dtype has no FP8 form, or the back-end is unknown or cannot run here.
    """
    report_experts(x_SD.device, "fp8")
    hidden_size = x_SD.shape[1]
    # gate and up are matrices of their own, so no block holds parts of both
    gate_up_EJD = _in_whole_blocks(gate_up_EJD.unflatten(1, (2, -1)), -2, -1).flatten(1, 2)
    down_EDI = _in_whole_blocks(down_EDI, -2, -1)
    x_RD = _in_whole_blocks(x_SD, -1).index_select(0, row_index_R)

    def product(rows: Tensor, weight: Tensor) -> Tensor:
        return fp8_grouped_linear(rows, weight, offsets_E, power_of_two_scales=power_of_two_scales, backend=backend)

    y_RD = product(swiglu(product(x_RD, gate_up_EJD)), down_EDI)[:, :hidden_size]
    if has_tail:  # the products give zeros there, but 0 · NaN would poison the sums
        routed_R = torch.arange(row_index_R.numel(), device=x_SD.device) < offsets_E[-1]
        row_weight_R = torch.where(routed_R, row_weight_R, 0.0)
    return sum_per_source(y_RD * row_weight_R[:, None].to(y_RD.dtype), row_index_R, x_SD.shape[0])

"""The routed SwiGLU experts on a GPU: grouped products with SwiGLU in the end of the first, and one elementwise kernel.

    forward    a, b = X[index] W_gate_upᵀ,  h = w silu(a) ⊙ b  (one kernel)      y = Σ over routed rows of h W_downᵀ
    backward   h' = g[index] W_down      dL/dw = ⟨silu(a) ⊙ b, h'⟩      dL/db = w h' ⊙ silu(a)
               dL/da = w h' ⊙ b ⊙ silu'(a)      dX = Σ over routed rows of [dL/da, dL/db] W_gate_up
               dW_gate_up = [dL/da, dL/db]ᵀ X[index]      dW_down = g[index]ᵀ (w silu(a) ⊙ b)

g = dL/dy. Gathered copies of X and g do not exist; only the gate and up projections a, b are kept between the passes.

Letters: S source rows, R routed rows, E experts, D hidden size, I intermediate size of an expert, J = 2·I.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lit_interns1_kernels.device.codegen import KernelBuild
from lit_interns1_kernels.device.grouped_gemm import (
    grouped_product,
    grouped_product_summed,
    grouped_swiglu,
    weight_gradient,
)


@triton.jit(do_not_specialize=["num_rows", "num_groups"])
def _swiglu_backward_kernel(
    gate_up, grad_h, row_weight, offsets, grad_gate_up, weighted_h, grad_weight, num_rows, num_groups, width,
    BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < tl.load(offsets + num_groups - 1)
    weight = tl.load(row_weight + row, mask=inside, other=0.0).to(tl.float32)[:, None]
    narrow = row.to(tl.int64)[:, None] * width
    wide = 2 * narrow
    product = tl.zeros([BLOCK_R], tl.float32)
    for i_0 in range(0, width, BLOCK_I):
        i = i_0 + tl.arange(0, BLOCK_I)[None, :]
        mask = inside[:, None] & (i < width)
        gate = tl.load(gate_up + wide + i, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gate_up + wide + width + i, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_h + narrow + i, mask=mask, other=0.0).to(tl.float32)
        gate_sigmoid = tl.sigmoid(gate)
        silu = gate * gate_sigmoid
        hidden = silu * up
        product += tl.sum(hidden * grad, axis=1)
        grad *= weight
        grad_gate = grad * up * gate_sigmoid * (1.0 + gate * (1.0 - gate_sigmoid))
        dtype = grad_gate_up.dtype.element_ty
        tl.store(grad_gate_up + wide + i, grad_gate.to(dtype), mask=mask)
        tl.store(grad_gate_up + wide + width + i, (grad * silu).to(dtype), mask=mask)
        tl.store(weighted_h + narrow + i, (hidden * weight).to(dtype), mask=mask)
    tl.store(grad_weight + row, product.to(grad_weight.dtype.element_ty), mask=row < num_rows)


_SWIGLU_BACKWARD = {"BLOCK_R": 4, "BLOCK_I": 256}


def swiglu_backward(
    gate_up_RJ: Tensor, grad_h_RI: Tensor, row_weight_R: Tensor, offsets_E: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the projections (R, J), the weighted hidden w·h (R, I), and the gradient of the row weights (R,).

    Args:
        gate_up_RJ: Gate and up projections behind one another.
        grad_h_RI: Gradient of w·h, before the weight is applied to it.
        row_weight_R: w.
        offsets_E: (E,) int32. Rows behind the last end are not read; the gradient of their weights is 0, and the rest
            of them is left uninitialised.
    """
    rows, width = grad_h_RI.shape
    grad_gate_up_RJ, weighted_RI = torch.empty_like(gate_up_RJ), torch.empty_like(grad_h_RI)
    grad_weight_R = torch.empty_like(row_weight_R, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(gate_up_RJ):
        _swiglu_backward_kernel[(triton.cdiv(rows, _SWIGLU_BACKWARD["BLOCK_R"]),)](
            gate_up_RJ, grad_h_RI, row_weight_R.contiguous(), offsets_E.contiguous(), grad_gate_up_RJ, weighted_RI,
            grad_weight_R, rows, offsets_E.shape[0], width, **_SWIGLU_BACKWARD,
        )  # fmt: skip
    return grad_gate_up_RJ, weighted_RI, grad_weight_R


def forward(
    x_SD: Tensor, gate_up_EJD: Tensor, down_EDI: Tensor, row_index_R: Tensor, offsets_E: Tensor,
    row_weight_R: Tensor, keep: bool, deterministic: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y_SD, and the gate and up projections gate_up_RJ (empty unless `keep`).

    `deterministic`: sum a source row's outputs in a fixed order, else by float32 atomics.
    """
    hidden_RI, gate_up_RJ = grouped_swiglu(x_SD, gate_up_EJD, offsets_E, row_index_R, row_weight_R, keep)
    y_SD = grouped_product_summed(
        hidden_RI, down_EDI, offsets_E, row_index_R, x_SD.shape[0], deterministic=deterministic
    )
    return y_SD, gate_up_RJ


def backward(
    grad_y_SD: Tensor, x_SD: Tensor, gate_up_EJD: Tensor, down_EDI: Tensor, row_index_R: Tensor, offsets_E: Tensor,
    row_weight_R: Tensor, gate_up_RJ: Tensor, deterministic: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x_SD, gate_up_EJD, down_EDI and row_weight_R."""
    grad_h_RI = grouped_product(grad_y_SD, down_EDI.transpose(1, 2), offsets_E, row_index_R)
    grad_gate_up_RJ, weighted_RI, grad_weight_R = swiglu_backward(gate_up_RJ, grad_h_RI, row_weight_R, offsets_E)
    grad_x_SD = grouped_product_summed(
        grad_gate_up_RJ, gate_up_EJD.transpose(1, 2), offsets_E, row_index_R, x_SD.shape[0],
        deterministic=deterministic,
    )  # fmt: skip
    grad_gate_up_EJD = weight_gradient(grad_gate_up_RJ, x_SD, offsets_E, None, row_index_R)
    grad_down_EDI = weight_gradient(grad_y_SD, weighted_RI, offsets_E, row_index_R, None)
    return grad_x_SD, grad_gate_up_EJD, grad_down_EDI, grad_weight_R


BUILDS: tuple[KernelBuild, ...] = tuple(
    KernelBuild(
        name=f"swiglu_backward/{dtype}/4x256",
        kernel=_swiglu_backward_kernel,
        signature={
            "gate_up": f"*{dtype}", "grad_h": f"*{dtype}", "row_weight": "*fp32", "offsets": "*i32",
            "grad_gate_up": f"*{dtype}", "weighted_h": f"*{dtype}", "grad_weight": "*fp32",
            "num_rows": "i32", "num_groups": "i32", "width": "i32",
        },
        constants=_SWIGLU_BACKWARD,
        undivided=("num_rows", "num_groups"),
        options={"num_warps": 4, "num_stages": 3},
        extended=dtype != "bf16",
    )
    for dtype in ("bf16", "fp32")
)  # fmt: skip

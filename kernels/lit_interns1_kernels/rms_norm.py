"""RMSNorm over the last dimension (arXiv 1910.07467 §4) as one operation.

    ρ = rsqrt(mean(x₃₂²) + ε);   y = w · cast(x₃₂ ρ, dtype of x)

The statistics are float32 (float64 for float64), and the cast comes before the product with w, which matters in low
precision. Kept for backward are x and ρ, one number a row. With h = xρ and g = dL/dy ⊙ w:

    dL/dx = ρ (g − h mean(g ⊙ h));   dL/dw = Σ_rows dL/dy ⊙ h, summed in float32

Backward in torch's operations takes the kernel of LayerNorm at mean 0: it computes the same but for ρ mean(g), which
it subtracts for the derivative of the mean, and which is put back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_interns1_kernels.backends import runs_plainly, triton_target


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """The formula in plain operations. Arguments as in `rms_norm`."""
    wide = _wide(x)
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if x.dtype not in (torch.float32, torch.float64):
        wide = x.float()
        rstd = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        return wide.mul_(rstd).to(x.dtype) * weight, rstd
    # two passes: half the traffic of a square and its mean
    rstd = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    y = x.new_empty(x.shape)
    torch.mul(x, rstd, out=y)
    return (y.mul_(weight) if torch.result_type(y, weight) == y.dtype else y * weight), rstd


def _backward(grad_y: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    width = x.shape[-1]
    grad_RN, x_RN, rstd_R1 = (t.reshape(-1, t.shape[-1]).to(rstd.dtype) for t in (grad_y, x, rstd))
    w_N = weight.to(rstd.dtype)
    dx_RN, dw_N, _ = torch.ops.aten.native_layer_norm_backward(
        grad_RN, x_RN, [width], torch.zeros_like(rstd_R1), rstd_R1, w_N, None, [True, True, False]
    )
    dx_RN.add_(torch.mv(grad_RN, w_N)[:, None].mul_(rstd_R1).div_(width))
    return dx_RN.view(x.shape).to(x.dtype), dw_N.to(weight.dtype)


@torch.library.custom_op("lit_interns1::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _forward(x, weight, eps)


@_rms_norm.register_fake
def _(x, weight, eps):
    rstd_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))
    return y, x.new_empty((*x.shape[:-1], 1), dtype=rstd_dtype)


@_rms_norm.register_kernel("cuda")
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if not _has_kernel(x, weight):
        return _forward(x, weight, eps)
    from lit_interns1_kernels.device.rms_norm import forward

    with torch.cuda.device_of(x):
        return forward(x, weight, eps)


@torch.library.custom_op("lit_interns1::rms_norm_backward", mutates_args=())
def _rms_norm_backward(grad_y: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return _backward(grad_y, x, weight, rstd)


@_rms_norm_backward.register_fake
def _(grad_y, x, weight, rstd):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


@_rms_norm_backward.register_kernel("cuda")
def _(grad_y: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    if not _has_kernel(x, weight):
        return _backward(grad_y, x, weight, rstd)
    from lit_interns1_kernels.device.rms_norm import backward

    with torch.cuda.device_of(x):
        return backward(grad_y, x, weight, rstd)


def _has_kernel(x: Tensor, weight: Tensor) -> bool:
    """Whether the Triton kernels take these arguments; torch's operations do in any case."""
    if triton_target(x.device) is None or torch.float64 in (x.dtype, weight.dtype):
        return False
    from lit_interns1_kernels.device.rms_norm import MAX_WIDTH

    return x.shape[-1] <= MAX_WIDTH


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], inputs[1], output[1])


def _differentiate(ctx: Any, grad_y: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return None, None, None
    return *_rms_norm_backward(grad_y, *ctx.saved_tensors), None


_rms_norm.register_autograd(_differentiate, setup_context=_save)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """RMSNorm over the last dimension. Differentiable once, in x and the weight.

    Args:
        x: (..., n), float32, float64, bfloat16 or float16.
        weight: (n,), of any such dtype.
        eps: ε, added to the mean square.

    Returns:
        (..., n), in the dtype to which those of `x` and `weight` promote.

    Raises:
        ValueError: If the shapes do not fit together, or `x` is not of floating point.
    """
    if weight.ndim != 1 or x.ndim < 1 or x.shape[-1] != weight.shape[0]:
        raise ValueError(f"weight {tuple(weight.shape)} must be (n,), with n the last dimension of x {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}: it must be of floating point")
    y: Tensor = (_forward if runs_plainly(x, weight) else _rms_norm)(x, weight, eps)[0]
    return y

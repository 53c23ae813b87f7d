"""Rotary positions applied to queries or keys (arXiv 2104.09864 §3.4.2, half-split layout) as one operation.

    y₁ = x₁ c₁ − x₂ s₁;   y₂ = x₂ c₂ + x₁ s₂        (x₁, x₂: the two halves of a head; c, s: tables)

The tables need not be a rotation: those of FoPE (arXiv 2412.17739) mix tones, so that c² + s² ≠ 1. Backward is
therefore the adjoint, not the rotation by the opposite angle. With g = dL/dy:

    dL/dx₁ = g₁ c₁ + g₂ s₂        dL/dc = Σ_h g ⊙ x
    dL/dx₂ = g₂ c₂ − g₁ s₁        dL/ds = Σ_h (−g₁ x₂, g₂ x₁)      (h: the heads that share the table)

Only the tables are kept for backward, and x where they require gradients. In low precision both products and their sum
are rounded to the dtype of x, as plain operations do.

Letters: T tokens, H heads, G tables per token (1, or the key/value heads), d width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_interns1_kernels.backends import runs_plainly, triton_target


def rotary_reference(x_THd: Tensor, cos_TGd: Tensor, sin_TGd: Tensor) -> Tensor:
    """The formula in plain operations. Arguments as in `rotary`."""
    group = x_THd.shape[1] // cos_TGd.shape[1]
    cos_THd, sin_THd = (t.to(x_THd.dtype).repeat_interleave(group, 1) for t in (cos_TGd, sin_TGd))
    first, second = x_THd.chunk(2, dim=-1)
    return x_THd * cos_THd + torch.cat((-second, first), dim=-1) * sin_THd


def _by_table(x_THd: Tensor, tables: int) -> Tensor:
    """(T, H, d) → (T, G, heads of a table, d)."""
    return x_THd.unflatten(1, (tables, x_THd.shape[1] // tables))


def _rotate(x_THd: Tensor, cos_TGd: Tensor, sin_TGd: Tensor, transposed: bool) -> Tensor:
    cos, sin = cos_TGd.to(x_THd.dtype), sin_TGd.to(x_THd.dtype)
    y_THd, tables = x_THd.new_empty(x_THd.shape), cos_TGd.shape[1]
    if tables == 1:
        _rotate_into(y_THd, x_THd, cos, sin, transposed)
        return y_THd
    # one head of every table at a time: faster than to repeat the tables along an inner dimension
    heads = (_by_table(t, tables).unbind(2) for t in (y_THd, x_THd))
    for y_TGd, x_TGd in zip(*heads, strict=True):
        _rotate_into(y_TGd, x_TGd, cos, sin, transposed)
    return y_THd


def _rotate_into(y: Tensor, x: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> None:
    torch.mul(x, cos, out=y)
    (x_1, x_2), (y_1, y_2), (sin_1, sin_2) = (t.chunk(2, dim=-1) for t in (x, y, sin))
    if transposed:
        x_1, x_2, y_1, y_2 = x_2, x_1, y_2, y_1
    if x.dtype in (torch.float32, torch.float64):
        y_1.addcmul_(x_2, sin_1, value=-1.0)
        y_2.addcmul_(x_1, sin_2)
    else:
        y_1.sub_(x_2 * sin_1)
        y_2.add_(x_1 * sin_2)


def _table_gradients(grad_THd: Tensor, x_THd: Tensor, cos_TGd: Tensor) -> tuple[Tensor, Tensor]:
    dtype, tables = torch.promote_types(x_THd.dtype, torch.float32), cos_TGd.shape[1]
    grad, x = _by_table(grad_THd.to(dtype), tables), _by_table(x_THd.to(dtype), tables)
    x_1, x_2 = x.chunk(2, dim=-1)
    d_cos, d_sin = (grad * x).sum(2), (grad * torch.cat((-x_2, x_1), dim=-1)).sum(2)
    return d_cos.to(cos_TGd.dtype), d_sin.to(cos_TGd.dtype)


@torch.library.custom_op("lit_interns1::rotary", mutates_args=())
def _rotary(x_THd: Tensor, cos_TGd: Tensor, sin_TGd: Tensor, transposed: bool) -> Tensor:
    return _rotate(x_THd, cos_TGd, sin_TGd, transposed)


@_rotary.register_fake
def _(x_THd, cos_TGd, sin_TGd, transposed):
    return x_THd.new_empty(x_THd.shape)


@_rotary.register_kernel("cuda")
def _(x_THd: Tensor, cos_TGd: Tensor, sin_TGd: Tensor, transposed: bool) -> Tensor:
    if not _has_kernel(x_THd, cos_TGd):
        return _rotate(x_THd, cos_TGd, sin_TGd, transposed)
    from lit_interns1_kernels.device.rotary import rotate

    with torch.cuda.device_of(x_THd):
        return rotate(x_THd, cos_TGd, sin_TGd, transposed)


@torch.library.custom_op("lit_interns1::rotary_table_gradients", mutates_args=())
def _rotary_table_gradients(grad_THd: Tensor, x_THd: Tensor, cos_TGd: Tensor) -> tuple[Tensor, Tensor]:
    return _table_gradients(grad_THd, x_THd, cos_TGd)


@_rotary_table_gradients.register_fake
def _(grad_THd, x_THd, cos_TGd):
    return cos_TGd.new_empty(cos_TGd.shape), cos_TGd.new_empty(cos_TGd.shape)


@_rotary_table_gradients.register_kernel("cuda")
def _(grad_THd: Tensor, x_THd: Tensor, cos_TGd: Tensor) -> tuple[Tensor, Tensor]:
    if not _has_kernel(x_THd, cos_TGd):
        return _table_gradients(grad_THd, x_THd, cos_TGd)
    from lit_interns1_kernels.device.rotary import table_gradients

    with torch.cuda.device_of(x_THd):
        return table_gradients(grad_THd, x_THd, cos_TGd)


def _has_kernel(x_THd: Tensor, cos_TGd: Tensor) -> bool:
    """Whether the Triton kernels take these arguments; torch's operations do in any case."""
    return triton_target(x_THd.device) is not None and torch.float64 not in (x_THd.dtype, cos_TGd.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_THd, cos_TGd, sin_TGd, ctx.transposed = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x_THd if any(ctx.needs_input_grad[1:3]) else None, cos_TGd, sin_TGd)


def _differentiate(ctx: Any, grad_THd: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_THd is None:
        return None, None, None, None
    x_THd, cos_TGd, sin_TGd = ctx.saved_tensors
    d_x = _rotary(grad_THd, cos_TGd, sin_TGd, not ctx.transposed) if ctx.needs_input_grad[0] else None
    d_cos = d_sin = None
    if x_THd is not None:
        d_cos, d_sin = _rotary_table_gradients(grad_THd, x_THd, cos_TGd)
    return d_x, d_cos, d_sin, None


_rotary.register_autograd(_differentiate, setup_context=_save)


def rotary(x_THd: Tensor, cos_TGd: Tensor, sin_TGd: Tensor) -> Tensor:
    """Rotates the heads of queries or keys. Differentiable once, in x and the tables.

    Args:
        x_THd: (T, H, d) of floating point, d even.
        cos_TGd: (T, G, d); table g serves the heads g·H/G … (g+1)·H/G − 1. Cast to the dtype of x before use.
        sin_TGd: As `cos_TGd`.

    Returns:
        (T, H, d), in the dtype of x.

    Raises:
        ValueError: If shapes or dtypes do not fit together.
    """
    if x_THd.ndim != 3 or x_THd.shape[2] % 2 or not x_THd.is_floating_point():
        raise ValueError(
            f"x_THd {tuple(x_THd.shape)}, {x_THd.dtype} must be (tokens, heads, even width) and of floating point"
        )
    tokens, heads, width = x_THd.shape
    shape = cos_TGd.shape
    if len(shape) != 3 or shape[0] != tokens or shape[2] != width or not shape[1] or heads % shape[1]:
        raise ValueError(
            f"cos_TGd {tuple(shape)} must be (tokens, tables, width) with the tokens and the width of "
            f"x_THd {tuple(x_THd.shape)}, and its heads a multiple of the tables"
        )
    if sin_TGd.shape != shape or sin_TGd.dtype != cos_TGd.dtype:
        raise ValueError(
            f"sin_TGd {tuple(sin_TGd.shape)}, {sin_TGd.dtype} must have the shape and the dtype of "
            f"cos_TGd {tuple(shape)}, {cos_TGd.dtype}"
        )
    y_THd: Tensor = (_rotate if runs_plainly(x_THd, cos_TGd, sin_TGd) else _rotary)(x_THd, cos_TGd, sin_TGd, False)
    return y_THd

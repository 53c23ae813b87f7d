"""Clipping of gradients that live on different meshes, where torch's own functions stop.

g ← g · min(1, max_norm / ‖g‖_p)
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from lit_interns1.strategies.parallelize import local
from lit_interns1.training import LossWindow, total_norm


def clip_by_norm(gradients: Iterable[Tensor], max_norm: float, norm_type: float = 2.0) -> Tensor:
    """Scales all gradients in place so that their norm is at most `max_norm`; returns the norm before."""
    gradients = list(gradients)
    norm = total_norm(gradients, norm_type)
    scale(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def clip_by_value(gradients: Iterable[Tensor], value: float) -> None:
    """Limits every entry to ±value in place."""
    for gradient in gradients:
        local(gradient).clamp_(-value, value)


def scale(gradients: Iterable[Tensor], factor: Tensor) -> None:
    """Multiplies all gradients in place by a scalar."""
    LossWindow.scale([local(gradient) for gradient in gradients], factor)

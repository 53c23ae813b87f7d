"""Norms and clipping of gradients that live on different meshes, where torch's own functions stop.

‖g‖_p = ( Σ_groups ‖g_group‖_p^p )^{1/p}         a group: gradients with the same mesh and placements
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lit_interns1.strategies.parallelize import local
from lit_interns1.training import LossWindow


def total_norm(gradients: Iterable[Tensor], norm_type: float = 2.0) -> Tensor:
    """The norm over all ranks as a scalar that is equal on all of them.

    Args:
        gradients: Plain tensors (equal on all ranks) and DTensors of any mesh.
        norm_type: p, `float("inf")` for the largest absolute value.
    """
    groups: dict[object, list[Tensor]] = {}
    for gradient in gradients:
        key = (gradient.device_mesh, gradient.placements) if isinstance(gradient, DTensor) else None
        groups.setdefault(key, []).append(gradient)
    norms = []
    for members in groups.values():
        norm = torch.nn.utils.get_total_norm(members, norm_type)
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    return torch.linalg.vector_norm(torch.stack(norms), norm_type) if norms else torch.zeros(())


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

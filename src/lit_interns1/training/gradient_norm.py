"""The norm of gradients that live on different meshes, where torch's own function stops.

‖g‖_p = ( Σ_groups ‖g_group‖_p^p )^{1/p}         a group: gradients with the same mesh and placements
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


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

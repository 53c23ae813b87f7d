"""Means over an optimizer step: over its micro-batches and over all ranks, exact by (sum, weight)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor


def all_reduce_sum(value: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Σ over ranks in place; does nothing in a single process."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1:
        dist.all_reduce(value, group=group)
    return value


class WindowMeans:
    """Adds up weighted means by name and gives their means at the end of the step, with one all-reduce."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor], weight: Tensor | float) -> None:
        """Adds one micro-batch: mean values and their common weight. The same names in every micro-batch and rank."""
        for name, value in values.items():
            weight_tensor = torch.as_tensor(weight, dtype=torch.float64, device=value.device)
            pair = torch.stack([value.detach().to(torch.float64) * weight_tensor, weight_tensor])
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def reduce(self) -> dict[str, Tensor]:
        """Means over everything added since the last call, on every rank; empties the window."""
        if not self._sums:
            return {}
        names = list(self._sums)
        stacked = all_reduce_sum(torch.stack([self._sums[name] for name in names]))
        self._sums = {}
        means = stacked[:, 0] / stacked[:, 1].clamp(min=1e-30)
        return dict(zip(names, means.to(torch.float32), strict=True))

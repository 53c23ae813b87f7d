"""Recorded expert choices: one mechanism for safe recomputation and for router replay.

Ids are replayed, scores stay live: weights and their gradients come from the present logits at the recorded ids. A
recomputation that chose again could pick other experts at a near-tie, and rows would no longer match the forward pass;
a policy update that chose again would train other experts than those that produced the rollout (arXiv 2603.25040 §4.1).
"""

from __future__ import annotations

import torch
from torch import Tensor

CHOOSE_LIVE = -1
"""Id of a token that is not replayed."""


class RoutingRecord:
    """Expert ids per token and MoE layer.

    Args:
        ids_TLK: (T, L, K) integer ids, -1 = choose live; None starts an empty record that layers fill.

    Raises:
        ValueError: If the ids are not a 3-d integer tensor.
    """

    def __init__(self, ids_TLK: Tensor | None = None) -> None:
        self._layers: dict[int, Tensor] = {}
        if ids_TLK is not None:
            if ids_TLK.ndim != 3 or ids_TLK.is_floating_point():
                raise ValueError(
                    f"routed experts must be integers of shape (tokens, MoE layers, experts per token), "
                    f"got {ids_TLK.dtype} of shape {tuple(ids_TLK.shape)}"
                )
            self._layers = dict(enumerate(ids_TLK.unbind(1)))

    def get(self, layer: int) -> Tensor | None:
        """(T, K) recorded ids of the MoE layer with this index among the MoE layers, or None."""
        return self._layers.get(layer)

    def put(self, layer: int, ids_TK: Tensor) -> None:
        """Stores the ids used by a layer as int16."""
        self._layers[layer] = ids_TK.detach().to(torch.int16)

    @property
    def num_layers(self) -> int:
        """Layers recorded."""
        return len(self._layers)

    def stacked(self) -> Tensor:
        """(T, L, K) int16; layers in order."""
        if sorted(self._layers) != list(range(len(self._layers))):
            raise RuntimeError(f"the record has gaps: layers {sorted(self._layers)}")
        return torch.stack([self._layers[i].to(torch.int16) for i in range(len(self._layers))], dim=1)

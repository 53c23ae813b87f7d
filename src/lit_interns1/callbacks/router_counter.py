"""Counts of routed tokens per layer and expert, added up over the micro-batches of an optimizer step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_interns1.callbacks.router_listener import RouterListener
from lit_interns1.nn.moe.router_load import RouterEvent
from lit_interns1.training import all_reduce_sum


class RouterCounter:
    """Counts what the routers below a module do while it trains."""

    def __init__(self) -> None:
        self._counts: dict[int, Tensor] = {}
        self._listener: RouterListener | None = None

    def listen(self, module: nn.Module) -> None:
        """Starts to listen."""
        self._listener = RouterListener(module, self._add)

    def stop(self) -> None:
        """Stops listening."""
        if self._listener is not None:
            self._listener.stop()

    def _add(self, events: list[RouterEvent]) -> None:
        for event in events:
            if event.training:
                known = self._counts.get(event.layer)
                counts_E = event.stats.counts_E
                self._counts[event.layer] = counts_E if known is None else known + counts_E

    def take(self) -> Tensor | None:
        """(layers, experts) counts since the last call, summed over ranks; None if nothing was routed."""
        counts, self._counts = self._counts, {}
        if not counts:
            return None
        return all_reduce_sum(torch.stack([counts[layer] for layer in sorted(counts)]))

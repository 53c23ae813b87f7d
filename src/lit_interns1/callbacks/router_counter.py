"""Counts of routed tokens per layer and expert, added up over micro-batches, for the callbacks that need them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lit_interns1.models import LanguageModel, LanguageModelOutput
from lit_interns1.training import all_reduce_sum


class RouterCounter:
    """Listens to the router statistics that every `LanguageModel` inside a module returns while it trains.

    They are outputs of the forward pass, so recomputation in backward does not count again.
    """

    def __init__(self) -> None:
        self._counts_LE: Tensor | None = None
        self._hooks: list[Any] = []

    def listen(self, module: nn.Module) -> None:
        """Starts to listen."""
        for part in module.modules():
            if isinstance(part, LanguageModel):
                self._hooks.append(part.register_forward_hook(self._add))

    def stop(self) -> None:
        """Stops listening."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _add(self, module: nn.Module, arguments: Any, output: LanguageModelOutput) -> None:
        if module.training and output.router_stats:
            counts_LE = torch.stack([stats.counts_E for stats in output.router_stats])
            self._counts_LE = counts_LE if self._counts_LE is None else self._counts_LE + counts_LE

    def take(self) -> Tensor | None:
        """(layers, experts) counts since the last call, summed over ranks; None if nothing was routed."""
        counts_LE, self._counts_LE = self._counts_LE, None
        return None if counts_LE is None else all_reduce_sum(counts_LE)

"""One batch that stays the same during a run, and forward passes on it that leave no trace."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.distributed.fsdp import FSDPModule

ProbeSource = Literal["train", "validation"] | Callable[[], Any]
"""The first training batch, the first validation batch, or a function that makes a batch."""


def run_module(module: LightningModule, batch: Any) -> Any:
    """A forward pass: the module's `token_scores` if it has that (no logits are kept), else its `forward`."""
    token_scores = getattr(module, "token_scores", None)
    return token_scores(batch) if callable(token_scores) else module(batch)


class ProbeBatch:
    """Keeps a batch of each rank and runs the module on it.

    Args:
        owner: Name of the callback, for messages.
        source: Where the batch comes from.
        forward: Runs the module on a batch; default: `run_module`.

    Raises:
        ValueError: If the source is unknown.
    """

    def __init__(
        self, owner: str, source: ProbeSource, forward: Callable[[LightningModule, Any], Any] | None = None
    ) -> None:
        if not callable(source) and source not in ("train", "validation"):
            raise ValueError(f'{owner}.probe = {source!r} must be "train", "validation" or a function')
        self.owner, self.source, self.forward = owner, source, forward or run_module
        self.batch: Any = None

    def offer(self, batch: Any, source: Literal["train", "validation"]) -> None:
        """Takes a batch that Lightning hands to a hook, on its device, if it is the first of the wanted kind."""
        if self.batch is None and self.source == source:
            self.batch = copy.deepcopy(batch)

    def make(self, trainer: Trainer) -> None:
        """Calls the user's function."""
        if self.batch is None and callable(self.source):
            self.batch = trainer.strategy.batch_to_device(self.source())

    @torch.no_grad()
    def run(self, trainer: Trainer, module: LightningModule) -> Any:
        """A forward pass in eval mode, without gradient, with the random state untouched. All ranks of a sharded module
        must call it together, between optimizer steps.

        Raises:
            RuntimeError: If the module cannot be run on the batch; the message says what to pass.
        """
        devices = [module.device] if module.device.type == "cuda" else []
        modes = {part: part.training for part in module.modules()}
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices))
            stack.enter_context(trainer.precision_plugin.forward_context())
            module.eval()
            try:
                return self.forward(module, self.batch)
            except (TypeError, NotImplementedError) as error:
                raise RuntimeError(
                    f"{self.owner} cannot run {type(module).__name__} on its probe batch ({error}): pass "
                    f"{self.owner}(probe_forward=...), a function of the module and the batch"
                ) from error
            finally:
                for part, mode in modes.items():
                    part.training = mode
                for part in module.modules():
                    if isinstance(part, FSDPModule):
                        part.reshard()  # gathered weights would not follow the next optimizer step

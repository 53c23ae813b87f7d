"""The learning rate as a function of consumed tokens, for any optimizer of any module."""

from __future__ import annotations

import math

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lit_interns1.callbacks.token_clock import TokenClock, logs_now
from lit_interns1.optim import TokenSchedule, fused_optimizers, set_rate


class TokenLearningRate(Callback):
    """Sets every parameter group's rate to its initial rate × schedule(tokens) before each optimizer step.

    Other callbacks may have a factor of their own, `learning_rate_factor`, which is multiplied in; `BatchSizeScheduler`
    does.

    The tokens of the step itself are included: the first step of a warm-up from zero already moves, and the step that
    reaches the end of the schedule takes the floor. Nothing has to be saved: the rate follows from the clock.

    Args:
        schedule: Factor on the peak rate as a function of consumed tokens, e.g. `WarmupStableDecay`.

    Logs `optim/lr` (the rate of the first group).
    """

    def __init__(self, schedule: TokenSchedule) -> None:
        self.schedule = schedule

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Sets the rate of optimizers that update in backward."""
        for optimizer in fused_optimizers(trainer.optimizers):
            self._set_rate(trainer, optimizer)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Sets the rate."""
        self._set_rate(trainer, optimizer)
        if logs_now(trainer):
            pl_module.log("optim/lr", optimizer.param_groups[0]["lr"])

    def _set_rate(self, trainer: Trainer, optimizer: torch.optim.Optimizer) -> None:
        factor = self.schedule(TokenClock.of(trainer).commit(trainer).tokens)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        factor *= math.prod(getattr(callback, "learning_rate_factor", 1.0) for callback in callbacks)
        for group in optimizer.param_groups:
            set_rate(group, group.setdefault("initial_lr", float(group["lr"])) * factor)

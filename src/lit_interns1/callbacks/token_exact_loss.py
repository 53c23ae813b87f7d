"""Losses as sums, exact under accumulation and over ranks, with any strategy.

A `training_step` that returns a `SummedLoss` gets gradients of (Σ sums) / (Σ counts) over the whole optimizer step. The
callback takes the `SummedLoss` before Lightning sees it, undoes Lightning's division by the number of micro-batches and
the strategy's average over ranks, and multiplies the gradients once, before clipping:

    g ← g · W / Σ_ranks Σ_micro-batches count
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lit_interns1.callbacks.token_clock import data_parallel_size
from lit_interns1.optim import fused_optimizers
from lit_interns1.training import LossWindow, all_reduce_sum


class TokenExactLoss(Callback):
    """Lets `training_step` return a `SummedLoss` (or a dict whose "loss" is one).

    A step that returns a plain scalar keeps Lightning's meaning: a mean over micro-batches and ranks. Strategies that
    handle `SummedLoss` themselves (attribute `handles_summed_loss`) are left alone.
    """

    def __init__(self) -> None:
        self._window = LossWindow()
        self._unwrapped: Callable[..., Any] | None = None
        self.uses_sums = False
        """Whether the last training step returned a `SummedLoss`."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Puts itself between the strategy and Lightning's loop."""
        strategy: Any = trainer.strategy
        if stage != "fit" or self._unwrapped is not None or getattr(strategy, "handles_summed_loss", False):
            return
        if not pl_module.automatic_optimization:
            return
        self._unwrapped = strategy.training_step

        def training_step(*args: Any, **kwargs: Any) -> Any:
            assert self._unwrapped is not None
            output = self._unwrapped(*args, **kwargs)
            self.uses_sums, output = self._window.take(output, trainer.accumulate_grad_batches)
            return output

        optimizer_step = strategy.optimizer_step

        def step(optimizer: torch.optim.Optimizer, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
            def scaled() -> Any:
                result = closure()
                self._scale(trainer, pl_module, optimizer)
                return result

            return optimizer_step(optimizer, scaled, *args, **kwargs)

        strategy.training_step, strategy.optimizer_step = training_step, step

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Tells optimizers that update in backward by what they have to scale gradients."""
        fused = fused_optimizers(trainer.optimizers)
        if fused and self.uses_sums:
            factor = self._factor(trainer, pl_module)
            for optimizer in fused:
                optimizer.gradient_factor = factor

    def _scale(self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """Scales the gradients of the step, after backward and before anybody looks at them."""
        if self.uses_sums and not fused_optimizers([optimizer]):
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            LossWindow.scale(gradients, self._factor(trainer, pl_module))

    def _factor(self, trainer: Trainer, pl_module: LightningModule) -> Tensor:
        ranks = data_parallel_size(trainer)
        count = self._window.local_count(pl_module.device)
        if ranks > 1:
            count = all_reduce_sum(count)
        return LossWindow.gradient_factor(count, averaged_over=ranks)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Steps aside."""
        if self._unwrapped is not None:
            for name in ("training_step", "optimizer_step"):
                trainer.strategy.__dict__.pop(name, None)
            self._unwrapped = None

"""Leaves out optimizer steps whose gradients would do harm.

    step t is bad if ‖g_t‖ is not finite, ‖g_t‖ > threshold, or ‖g_t‖ > μ + k σ
    μ, σ over the norms of the last n good steps

Without gradients an optimizer leaves a parameter and its state alone, so a bad step moves no weight, decays none, and
leaves no mark in Adam's moments. All else goes on: the data, the clock, the learning rate.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from lit_interns1.callbacks.token_clock import logs_now
from lit_interns1.training import all_reduce_sum, total_norm


def refuse_flat_parameters(owner: str, trainer: Trainer) -> None:
    """Some strategies cut parameters into pieces that know neither their name nor their place.

    Raises:
        ValueError: If the trainer has such a strategy.
    """
    if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy)):
        raise ValueError(
            f"{owner} cannot read the gradients of {type(trainer.strategy).__name__}: use MoEParallelStrategy, "
            "ModelParallelStrategy or DDP"
        )


class SkipBadSteps(Callback):
    """Skips optimizer steps with gradients that are not finite, or spike, on all ranks alike.

    The norm is that over all parameters and ranks, before clipping; reading it makes the host wait for the device once
    per step.

    Args:
        threshold: Largest norm; None = no such limit.
        sigma: k; None = no such limit.
        window: n, good steps that μ and σ are taken over.
        min_history: Good steps before `sigma` counts.
        max_skips_in_a_row: Skipped steps in a row that are borne; one more is an error.

    Logs `optim/grad_norm` (before clipping) and `stability/skipped_steps` (since the start of the run).

    Raises:
        ValueError: If an option is out of range, or the strategy hides gradients.
        RuntimeError: After too many skipped steps in a row, with their norms.
    """

    reads_gradients = True

    def __init__(
        self,
        threshold: float | None = None,
        sigma: float | None = None,
        window: int = 1000,
        min_history: int = 100,
        max_skips_in_a_row: int = 10,
    ) -> None:
        for name, value in (("threshold", threshold), ("sigma", sigma)):
            if value is not None and value <= 0:
                raise ValueError(f"SkipBadSteps.{name} must be positive or None, got {value}")
        if not 2 <= min_history <= window:
            raise ValueError(f"SkipBadSteps.min_history = {min_history} must lie between 2 and window = {window}")
        if max_skips_in_a_row < 0:
            raise ValueError(f"SkipBadSteps.max_skips_in_a_row must not be negative, got {max_skips_in_a_row}")
        self.threshold, self.sigma, self.window = threshold, sigma, window
        self.min_history, self.max_skips_in_a_row = min_history, max_skips_in_a_row
        self.skipped_steps = 0
        """Since the start of the run."""
        self._good: list[list[float]] = []  # norms per optimizer, oldest first
        self._bad_in_a_row: list[list[float]] = []
        self._decided: tuple[int, int] | None = None
        self._skips = False
        self._norm = 0.0

    @staticmethod
    def skips(trainer: Trainer, optimizer: Optimizer) -> bool:
        """Whether the step that `optimizer` is about to take is left out; False without such a callback. For callbacks
        that change the model in `on_before_optimizer_step`."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SkipBadSteps):
                return callback._decide(trainer, optimizer)
        return False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Looks at the strategy."""
        refuse_flat_parameters("SkipBadSteps", trainer)

    def limit(self, number: int = 0) -> float:
        """The largest norm that is let through at present, for one of the trainer's optimizers."""
        limits = [math.inf if self.threshold is None else self.threshold]
        good = self._good[number] if number < len(self._good) else []
        if self.sigma is not None and len(good) >= self.min_history:
            limits.append(statistics.fmean(good) + self.sigma * statistics.pstdev(good))
        return min(limits)

    def _decide(self, trainer: Trainer, optimizer: Optimizer) -> bool:
        number = [_bare(known) for known in trainer.optimizers].index(_bare(optimizer))
        step = (trainer.global_step, number)
        if step == self._decided:
            return self._skips
        self._decided = step
        while len(self._good) <= number:
            self._good.append([])
            self._bad_in_a_row.append([])
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = total_norm([p.grad for p in parameters]).to(trainer.strategy.root_device, torch.float64)
        self._norm = float(all_reduce_sum(norm)) / trainer.world_size  # the same number on every rank, to the last bit
        self._skips = not math.isfinite(self._norm) or self._norm > self.limit(number)
        if self._skips:
            for parameter in parameters:
                parameter.grad = None
            self._count_skip(trainer.global_step, number)
        else:
            self._good[number] = [*self._good[number], self._norm][-self.window :]
            self._bad_in_a_row[number].clear()
        return self._skips

    def _count_skip(self, step: int, number: int) -> None:
        bad, limit = self._bad_in_a_row[number], self.limit(number)
        bad.append(self._norm)
        self.skipped_steps += 1
        if len(bad) > self.max_skips_in_a_row:
            raise RuntimeError(
                f"{len(bad)} optimizer steps in a row were bad, max_skips_in_a_row is {self.max_skips_in_a_row}: "
                f"gradient norms {', '.join(f'{norm:.4g}' for norm in bad)} with limit {limit:.4g} at step {step}"
            )
        rank_zero_warn(f"optimizer step {step} is skipped: gradient norm {self._norm:.4g}, limit {limit:.4g}")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Decides, and takes the gradients away from a bad step."""
        self._decide(trainer, optimizer)
        if logs_now(trainer):
            pl_module.log("optim/grad_norm", self._norm)
            pl_module.log("stability/skipped_steps", float(self.skipped_steps))

    def state_dict(self) -> dict[str, Any]:
        """The norms that limits follow from, and the number of skipped steps."""
        return {"skipped_steps": self.skipped_steps, "good": self._good, "bad_in_a_row": self._bad_in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores them."""
        self.skipped_steps = int(state_dict["skipped_steps"])
        self._good = [list(norms)[-self.window :] for norms in state_dict["good"]]
        self._bad_in_a_row = [list(norms) for norms in state_dict["bad_in_a_row"]]


def _bare(optimizer: Any) -> Any:
    """An optimizer without Lightning's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)

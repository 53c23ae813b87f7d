"""The gradient noise scale, from gradients over two batch sizes of the same step (arXiv 1812.06162, App. A.1).

    B_simple = tr Σ / |G|²        from |g_b|² of the step's first micro-batch and |g_B|² of the whole step

b: tokens of that micro-batch on this rank, the squared norms averaged over ranks; where gradients are sharded (FSDP2),
of all ranks, for which this one micro-batch is reduced at once. B: tokens of the step. Numerator and denominator are
averaged over steps on their own. arXiv 2505.23971 found it orders of magnitude below the critical batch: do not let it
alone drive the batch size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from lit_interns1.callbacks.token_clock import TokenClock, data_parallel_size, logs_now
from lit_interns1.laws import NoiseScaleAverage, noise_scale
from lit_interns1.training import all_reduce_sum, count_tokens, total_norm


class GradientNoiseScale(Callback):
    """Logs B_simple in tokens while gradients are accumulated; steps of a single micro-batch tell nothing.

    It comes behind `TokenExactLoss` in the list of callbacks, as it looks at the gradients of the step.

    Args:
        every_n_steps: Optimizer steps between two estimates.
        decay: Weight that is left of an estimate one estimate later.

    Logs `batch/noise_scale` (tokens; left out while the estimate of |G|² is not positive).

    Raises:
        ValueError: For an option out of range.
        RuntimeError: Without a `TokenClock`.
    """

    reads_gradients = True

    def __init__(self, every_n_steps: int = 10, decay: float = 0.95) -> None:
        if every_n_steps < 1:
            raise ValueError(f"GradientNoiseScale.every_n_steps must be at least 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.average = NoiseScaleAverage(decay)
        self._window = 0
        self._tokens = 0
        self._small: tuple[Tensor, int] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Looks for the clock."""
        if stage == "fit":
            TokenClock.of(trainer)

    def _measures(self, trainer: Trainer) -> bool:
        """Whether the micro-batch in progress is the first of several in a step that is measured."""
        several = trainer.accumulate_grad_batches > 1 and trainer.fit_loop.epoch_loop._should_accumulate()
        return several and self._window == 1 and trainer.global_step % self.every_n_steps == 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Counts micro-batches and tokens of the step."""
        self._window += 1
        if self._window == 1:
            self._tokens = 0
        self._batch_tokens = count_tokens(batch, TokenClock.of(trainer).counter).loss_tokens
        self._tokens += self._batch_tokens

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Has the first micro-batch reduced by itself where gradients are sharded."""
        if self._measures(trainer):
            _reduce_next(pl_module, True)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the norm of the first micro-batch's gradient."""
        if not self._measures(trainer):
            return
        sharded = _reduce_next(pl_module, False)
        ranks = data_parallel_size(trainer)
        tokens = torch.tensor(self._batch_tokens, dtype=torch.float64, device=trainer.strategy.root_device)
        sums = any(getattr(part, "uses_sums", False) for part in (trainer.strategy, *trainer.callbacks))  # type: ignore[attr-defined]
        if sharded:
            tokens = all_reduce_sum(tokens) if ranks > 1 else tokens
            mean_factor = 1.0 / tokens if sums else tokens.new_tensor(trainer.accumulate_grad_batches / ranks)
        else:
            mean_factor = 1.0 / tokens if sums else tokens.new_tensor(trainer.accumulate_grad_batches)
        squared = (total_norm(_gradients(pl_module.parameters())).double() * mean_factor) ** 2
        if ranks > 1 and not sharded:
            squared, tokens = (value / ranks for value in all_reduce_sum(torch.stack([squared, tokens])))
        self._small = squared, int(tokens)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Compares with the gradient of the whole step."""
        small, self._small, self._window = self._small, None, 0
        if small is None:
            return
        ranks = data_parallel_size(trainer)
        tokens = torch.tensor(self._tokens, dtype=torch.float64, device=trainer.strategy.root_device)
        big_tokens = int(all_reduce_sum(tokens) if ranks > 1 else tokens)
        big = total_norm(_gradients(pl_module.parameters())).double() ** 2
        value = self.average.update(noise_scale(float(small[0]), float(big), small[1], big_tokens))
        if logs_now(trainer) and value.squared_gradient > 0:
            pl_module.log("batch/noise_scale", value.simple)

    def state_dict(self) -> dict[str, Any]:
        """The averages."""
        return asdict(self.average)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores them; a step in progress is forgotten."""
        self.average = NoiseScaleAverage(**state_dict)
        self._window, self._small = 0, None


def _gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _reduce_next(module: LightningModule, is_on: bool) -> bool:
    """Switches the reduction of FSDP2's gradients; whether there is any."""
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.set_requires_gradient_sync(is_on, recurse=False)
    return bool(parts)

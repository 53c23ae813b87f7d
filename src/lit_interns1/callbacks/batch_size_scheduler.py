"""The batch size as a function of consumed tokens (arXiv 2601.05034), by the number of accumulated micro-batches.

    B* = schedule(D),   A = max(1, round(B* / (W·m))),   B = A·W·m        D tokens, W ranks, m rows of a micro-batch

Lightning steps after micro-batch j of an epoch when A divides j, and clears gradients before micro-batch j + 1 when A
divides j. So A becomes A' only where both divide j, that is after a step whose rows in the epoch are a multiple of B',
or where an epoch begins: then every window is whole. The rule depends on rows alone, not on how many ranks read them.

Only valid in the constant phase of the learning rate: when it decays the batch size stays (a reconstruction).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_info

from lit_interns1.callbacks.token_clock import TokenClock, data_parallel_size, logs_now
from lit_interns1.callbacks.token_learning_rate import TokenLearningRate
from lit_interns1.optim import BatchSchedule
from lit_interns1.training import GlobalBatch, all_reduce_sum

_EXPONENTS = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}


@dataclass
class BatchSizeState:
    """What is saved with a checkpoint.

    Attributes:
        rows_per_step: B; 0: training has not begun.
        initial_rows: B at the start, to which the learning rate refers.
        rows_per_micro_step: W·m of the run that saved the state.
        target: B* in the schedule's unit; None: it said nothing yet.
        next_evaluation: Consumed tokens from which on the schedule is asked again.
        loss_sum: Σ of decayed weights · losses.
        loss_weight: Σ of decayed weights.
        loss_tokens: Consumed tokens at the last loss.
        switches: (consumed tokens, B) of every switch.
    """

    rows_per_step: int = 0
    initial_rows: int = 0
    rows_per_micro_step: int = 0
    target: float | None = None
    next_evaluation: float = 0.0
    loss_sum: float = 0.0
    loss_weight: float = 0.0
    loss_tokens: int = 0
    switches: list[tuple[int, int]] = field(default_factory=list)

    @property
    def smoothed_loss(self) -> float | None:
        """The mean of recent training losses; None before the first."""
        return self.loss_sum / self.loss_weight if self.loss_weight else None

    def add_loss(self, loss: float, tokens: int, half_life: float) -> None:
        """Takes the loss of a step that ended at `tokens`."""
        kept = 0.5 ** ((tokens - self.loss_tokens) / half_life)
        self.loss_sum, self.loss_weight = kept * self.loss_sum + loss, kept * self.loss_weight + 1.0
        self.loss_tokens = tokens


class BatchSizeScheduler(Callback):
    """Changes the number of accumulated micro-batches during training.

    The run starts with what the schedule says for 0 tokens; where it says nothing, with the `global_batch_size` of the
    DataModule or the Trainer's `accumulate_grad_batches`. Batch sizes are rounded to multiples of micro-batch × ranks.
    A step at the end of an epoch may find fewer rows than B: its gradient is their mean all the same.

    Args:
        schedule: B*, e.g. `TabulatedBatch`.
        unit: What the schedule and `max_batch` count per optimizer step, over all ranks: tokens or rows.
        tokens_per_row: Converts tokens into rows; default: `row_length` of the DataModule.
        micro_batch_rows: m; default: `micro_batch_size` of the DataModule, or the DataLoader's `batch_size`.
        max_batch: B* is never more than this, in the schedule's unit.
        every_n_tokens: Ask the schedule after so many consumed tokens; 0: after every optimizer step.
        allow_decrease: Whether B may become smaller.
        learning_rate: What a switch does to the rate: `none` (the paper), `sqrt`: × √(B/B_0), `linear`: × B/B_0, with
            B_0 the batch size at the start. `TokenLearningRate` multiplies it into its schedule; without one the rates
            of the optimizer are changed at the switch.
        freeze_after_tokens: No switch from so many consumed tokens on; default: the `decay_start` of
            `TokenLearningRate`'s schedule, if it has one.
        loss_metric: What schedules by loss read, as logged in the step; averaged over ranks.

    Logs `batch/rows_per_step`, `batch/tokens_per_step`, `batch/accumulation` (of the step), `batch/target` (tokens or
    rows, see `unit`), and `batch/switch` (rows, where it changes).

    Raises:
        ValueError: For an option out of range; before training, with manual optimisation, a strategy that accumulates
            by itself, Lightning's `GradientAccumulationScheduler` beside it, a Lightning learning-rate scheduler that
            would undo `learning_rate`, where rows per micro-batch or tokens per row are not known, and if the batch
            of a checkpoint does not divide by micro-batch × ranks.
        RuntimeError: Without a `TokenClock`.
    """

    reads_gradients = True

    def __init__(
        self,
        schedule: BatchSchedule,
        unit: Literal["tokens", "rows"] = "tokens",
        tokens_per_row: float | None = None,
        micro_batch_rows: int | None = None,
        max_batch: float | None = None,
        every_n_tokens: float = 0,
        allow_decrease: bool = False,
        learning_rate: Literal["none", "sqrt", "linear"] = "none",
        freeze_after_tokens: float | None = None,
        loss_metric: str = "train/loss",
    ) -> None:
        if unit not in ("tokens", "rows"):
            raise ValueError(f"BatchSizeScheduler.unit must be tokens or rows, got {unit!r}")
        if learning_rate not in _EXPONENTS:
            raise ValueError(f"BatchSizeScheduler.learning_rate must be none, sqrt or linear, got {learning_rate!r}")
        for name, value in (
            ("tokens_per_row", tokens_per_row), ("micro_batch_rows", micro_batch_rows), ("max_batch", max_batch),
        ):  # fmt: skip
            if value is not None and not value > 0:
                raise ValueError(f"BatchSizeScheduler.{name} must be positive, got {value}")
        if every_n_tokens < 0:
            raise ValueError(f"BatchSizeScheduler.every_n_tokens must not be negative, got {every_n_tokens}")
        self.schedule, self.unit, self.max_batch = schedule, unit, max_batch
        self.tokens_per_row, self.micro_batch_rows = tokens_per_row, micro_batch_rows
        self.every_n_tokens, self.allow_decrease, self.learning_rate = every_n_tokens, allow_decrease, learning_rate
        self.freeze_after_tokens, self.loss_metric = freeze_after_tokens, loss_metric
        self.state = BatchSizeState()
        self._window = 0
        self._tokens_before = 0
        self._restored_batches: int | None = None
        self._given_accumulation: int | None = None

    @property
    def learning_rate_factor(self) -> float:
        """What the learning rate is multiplied with."""
        if not self.state.initial_rows:
            return 1.0
        return float((self.state.rows_per_step / self.state.initial_rows) ** _EXPONENTS[self.learning_rate])

    # -- before training -----------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses what cannot work."""
        if stage != "fit":
            return
        TokenClock.of(trainer)
        if not pl_module.automatic_optimization:
            raise ValueError("BatchSizeScheduler works by accumulation, which manual optimisation does by itself")
        if trainer.strategy.handles_gradient_accumulation:
            raise ValueError(
                f"BatchSizeScheduler: {type(trainer.strategy).__name__} accumulates by itself and cannot change it"
            )
        if any(isinstance(c, GradientAccumulationScheduler) for c in trainer.callbacks):  # type: ignore[attr-defined]
            raise ValueError("BatchSizeScheduler and GradientAccumulationScheduler both set the accumulation: keep one")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sets the batch size of the start, or that of the checkpoint."""
        has_schedulers = bool(trainer.lr_scheduler_configs)
        if self.learning_rate != "none" and has_schedulers and not _has_token_rate(trainer):
            raise ValueError(
                f"BatchSizeScheduler.learning_rate={self.learning_rate!r}: the learning-rate scheduler of the module "
                "would set the rate back; use TokenLearningRate instead of it"
            )
        micro, ranks = self._rows_of_micro_batch(trainer), data_parallel_size(trainer)
        state, rows_per_pass = self.state, micro * ranks
        self._given_accumulation = trainer.accumulate_grad_batches
        self._window, self._tokens_before = 0, TokenClock.of(trainer).tokens
        if state.rows_per_step:
            self._align_progress(trainer, rows_per_pass)
        state.rows_per_micro_step = rows_per_pass
        if not state.rows_per_step:
            at_start = self._wanted(0) if self._tokens_before == 0 else None
            given = trainer.accumulate_grad_batches * rows_per_pass
            state.rows_per_step = state.initial_rows = given if at_start is None else self._quantised(trainer, at_start)
        trainer.accumulate_grad_batches = GlobalBatch(state.rows_per_step, micro, ranks).accumulation
        if self.unit == "tokens":
            self._tokens_of_row(trainer)  # not known: say it now
        self._follow_schedule(trainer)

    def _align_progress(self, trainer: Trainer, rows_per_pass: int) -> None:
        """After a resume with another W·m: Lightning counts micro-batches, and those have another size now."""
        current: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        saved = self.state.rows_per_micro_step
        if rows_per_pass == saved or current.processed != self._restored_batches:
            return  # nothing to do, or the loader has done it
        shift = math.ceil(current.processed * saved / rows_per_pass) - current.processed
        for name in ("ready", "started", "processed", "completed"):
            setattr(current, name, getattr(current, name) + shift)

    # -- training ------------------------------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An epoch may begin with any batch size."""
        self._follow_schedule(trainer, at_epoch_start=True)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Counts the micro-batches of the step."""
        self._window += 1

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Makes the gradient of a step with fewer micro-batches their mean, and logs."""
        accumulation = trainer.accumulate_grad_batches
        if self._window != accumulation and not _sums_losses(trainer):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.mul_(accumulation / self._window)
        tokens = TokenClock.of(trainer).commit(trainer).tokens
        if logs_now(trainer):
            values: dict[str, float] = {
                "batch/rows_per_step": self._window * self.state.rows_per_micro_step,
                "batch/tokens_per_step": tokens - self._tokens_before,
                "batch/accumulation": self._window,
            }
            if self.state.target is not None:
                values["batch/target"] = self.state.target
            for name, value in values.items():
                pl_module.log(name, float(value))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimizer step: asks the schedule, and switches where it is possible."""
        loop = trainer.fit_loop.epoch_loop
        if loop._should_accumulate():
            return
        self._window, self._tokens_before = 0, TokenClock.of(trainer).tokens
        if self.schedule.loss_half_life_tokens is not None:
            self.state.add_loss(self._loss(trainer), self._tokens_before, self.schedule.loss_half_life_tokens)
        if not loop._num_ready_batches_reached():
            self._follow_schedule(trainer)

    def _follow_schedule(self, trainer: Trainer, at_epoch_start: bool = False) -> None:
        tokens, state = TokenClock.of(trainer).tokens, self.state
        if tokens >= self._frozen_from(trainer):
            return
        if tokens >= state.next_evaluation:
            state.target = self._wanted(tokens)
            every = self.every_n_tokens
            state.next_evaluation = (tokens // every + 1) * every if every else 0.0
        if state.target is None:
            return
        rows = self._quantised(trainer, state.target)
        if rows == state.rows_per_step or (rows < state.rows_per_step and not self.allow_decrease):
            return
        accumulation = rows // state.rows_per_micro_step
        current: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        if at_epoch_start or current.processed >= trainer.num_training_batches or not current.processed % accumulation:
            self._switch(trainer, rows, tokens)

    def _switch(self, trainer: Trainer, rows: int, tokens: int) -> None:
        state, before = self.state, self.learning_rate_factor
        was, state.rows_per_step = state.rows_per_step, rows
        state.switches.append((tokens, rows))
        trainer.accumulate_grad_batches = rows // state.rows_per_micro_step
        if not _has_token_rate(trainer):
            for optimizer in trainer.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] *= self.learning_rate_factor / before
        rank_zero_info(
            f"batch size: {was} → {rows} rows per optimizer step ({trainer.accumulate_grad_batches} micro-batches) "
            f"after {tokens:,} tokens, {trainer.global_step:,} steps"
        )
        for logger in trainer.loggers:
            step = trainer.fit_loop.epoch_loop._batches_that_stepped
            logger.log_metrics({"batch/switch": float(rows), "train/tokens": float(tokens)}, step=step)

    def _wanted(self, tokens: int) -> float | None:
        """B*, in the schedule's unit."""
        batch = self.schedule(tokens, self.state.smoothed_loss)
        return None if batch is None else min(batch, self.max_batch or math.inf)

    def _quantised(self, trainer: Trainer, batch: float) -> int:
        """Rows: the nearest multiple of micro-batch × ranks."""
        rows = batch / self._tokens_of_row(trainer) if self.unit == "tokens" else batch
        return max(1, round(rows / self.state.rows_per_micro_step)) * self.state.rows_per_micro_step

    # -- what the trainer knows ----------------------------------------------------------------------------------------

    def _frozen_from(self, trainer: Trainer) -> float:
        if self.freeze_after_tokens is not None:
            return self.freeze_after_tokens
        schedules = [c.schedule for c in trainer.callbacks if isinstance(c, TokenLearningRate)]  # type: ignore[attr-defined]
        return min((float(getattr(schedule, "decay_start", math.inf)) for schedule in schedules), default=math.inf)

    def _rows_of_micro_batch(self, trainer: Trainer) -> int:
        if self.micro_batch_rows is not None:
            return self.micro_batch_rows
        rows = getattr(getattr(trainer, "datamodule", None), "micro_batch_size", None)
        rows = rows or getattr(trainer.train_dataloader, "batch_size", None)
        if not isinstance(rows, int):
            raise ValueError(
                "BatchSizeScheduler does not know the rows of a micro-batch: the data have neither micro_batch_size "
                "nor batch_size; set micro_batch_rows"
            )
        return rows

    def _tokens_of_row(self, trainer: Trainer) -> float:
        tokens = self.tokens_per_row or getattr(getattr(trainer, "datamodule", None), "row_length", None)
        if tokens is None:
            raise ValueError(
                "BatchSizeScheduler.unit='tokens' needs the tokens of a row, and the data have no row_length; set "
                "tokens_per_row, or unit='rows'"
            )
        return float(tokens)

    def _loss(self, trainer: Trainer) -> float:
        """The loss of the step, equal on all ranks: they must decide alike."""
        value = trainer.callback_metrics.get(self.loss_metric)
        if value is None:
            raise ValueError(
                f"BatchSizeScheduler.loss_metric={self.loss_metric!r} was not logged in the step; it logged "
                f"{', '.join(sorted(trainer.callback_metrics)) or 'nothing'}"
            )
        value, ranks = value.detach().double().to(trainer.strategy.root_device), data_parallel_size(trainer)
        return float(all_reduce_sum(value) / ranks if ranks > 1 else value)

    # -- checkpoints and the end ---------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Up to the last finished optimizer step."""
        return asdict(self.state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores it."""
        self.state = BatchSizeState(**state_dict)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remembers the micro-batches that the checkpoint counts, to see whether the loader adapts them."""
        loops = checkpoint.get("loops", {}).get("fit_loop")
        self._restored_batches = loops["epoch_loop.batch_progress"]["current"]["processed"] if loops else None

    def _give_back(self, trainer: Trainer) -> None:
        if self._given_accumulation is not None:
            trainer.accumulate_grad_batches, self._given_accumulation = self._given_accumulation, None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leaves the Trainer as it was."""
        self._give_back(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves the Trainer as it was."""
        self._give_back(trainer)


def _has_token_rate(trainer: Trainer) -> bool:
    return any(isinstance(callback, TokenLearningRate) for callback in trainer.callbacks)  # type: ignore[attr-defined]


def _sums_losses(trainer: Trainer) -> bool:
    """Whether gradients are divided by the count of a `SummedLoss`, whatever the number of micro-batches."""
    parts = (trainer.strategy, *trainer.callbacks)  # type: ignore[attr-defined]
    return any(getattr(part, "uses_sums", False) for part in parts)

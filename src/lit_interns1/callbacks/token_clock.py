"""The run's clock in tokens, kept by a callback: any LightningModule, any data, any strategy.

Counts are committed once per optimizer step, with one all-reduce, before anything else happens in that step; the
learning rate, the batch size and the pictures read them. The clock is saved with the checkpoint.

A checkpoint may be written inside an accumulation window (a signal, a time limit), and gradients are never saved. The
clock therefore rewinds Lightning's batch counters and the loader's position in the file to the start of the window, so
that the resumed run repeats the whole window.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger

from lit_interns1.training import TokenClockState, TokenCounts, all_reduce_sum, count_tokens


def data_parallel_size(trainer: Trainer) -> int:
    """Ranks that read different data: what the strategy tells samplers, else 1."""
    return int(getattr(trainer.strategy, "distributed_sampler_kwargs", {}).get("num_replicas", 1))


def logs_now(trainer: Trainer) -> bool:
    """Whether what is logged in this optimizer step will be written; a call of `log` that is not costs 0.3 ms."""
    return trainer._logger_connector.should_update_logs


def log_now(trainer: Trainer, values: Mapping[str, float]) -> None:
    """Writes values whatever the logging interval, with the consumed tokens; callbacks can monitor them. A tenth of
    the cost of `log` per value."""
    tensors = {name: torch.tensor(value) for name, value in values.items()}
    tokens = torch.tensor(float(TokenClock.of(trainer).tokens))
    trainer._logger_connector.log_metrics({**tensors, "train/tokens": tokens})
    trainer._logger_connector._callback_metrics.update(tensors)


class TokenClock(Callback):
    """Counts consumed tokens.

    Args:
        max_tokens: End the run with the optimizer step that reaches this number of consumed tokens.
        counter: Gives the tokens of a batch, for batches that have neither `num_tokens`, `attention_mask` nor
            `input_ids`.

    Logs `train/tokens`, and makes it the x-axis in W&B.

    Raises:
        ValueError: If `max_tokens` is not positive.
    """

    def __init__(
        self, max_tokens: int | None = None, counter: Callable[[Any], int | TokenCounts] | None = None
    ) -> None:
        if max_tokens is not None and max_tokens <= 0:
            raise ValueError(f"TokenClock.max_tokens must be positive, got {max_tokens}")
        self.max_tokens, self.counter = max_tokens, counter
        self.state = TokenClockState()
        self._committed_batches = -1
        self._open_batches = 0

    @staticmethod
    def of(trainer: Trainer) -> TokenClock:
        """The clock among the trainer's callbacks.

        Raises:
            RuntimeError: If there is none.
        """
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, TokenClock):
                return callback
        raise RuntimeError(
            "this needs the run's clock: add lit_interns1.callbacks.TokenClock to the Trainer's callbacks"
        )

    @property
    def tokens(self) -> int:
        """Tokens consumed up to now, by all ranks, the optimizer step in progress included once it is committed."""
        return self.state.tokens

    def commit(self, trainer: Trainer) -> TokenClockState:
        """Ends the counting of the present optimizer step. Callable by whoever needs the count first; later calls in
        the same step do nothing."""
        batches = trainer.fit_loop.epoch_loop.total_batch_idx
        if batches != self._committed_batches:
            self._committed_batches, self._open_batches = batches, 0
            counts = torch.tensor(self.state.pending, dtype=torch.int64, device=trainer.strategy.root_device)
            if data_parallel_size(trainer) > 1:
                all_reduce_sum(counts)
            self.state.commit(TokenCounts(*counts.tolist()))
        return self.state

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes consumed tokens the x-axis of W&B charts."""
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger) and trainer.is_global_zero:
                logger.experiment.define_metric("train/tokens")
                logger.experiment.define_metric("*", step_metric="train/tokens")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Counts the batch."""
        self._open_batches += 1
        self.state.add(count_tokens(batch, self.counter))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Commits the counts of the step."""
        state = self.commit(trainer)
        if logs_now(trainer):
            pl_module.log("train/tokens", float(state.tokens))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ends the run when the budget is consumed."""
        if self.max_tokens is not None and self.state.tokens >= self.max_tokens:
            trainer.should_stop = True

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Counts up to the last finished optimizer step."""
        return self.state.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the counts."""
        self.state.load_state_dict(state_dict)
        self._open_batches = 0

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Rewinds a checkpoint that was written inside an accumulation window to the start of the window."""
        loops, surplus = checkpoint.get("loops", {}).get("fit_loop"), self._open_batches
        if loops is None or surplus == 0 or not pl_module.automatic_optimization:
            return
        _shift_batches(loops, -surplus)
        data = checkpoint.get(type(getattr(trainer, "datamodule", None)).__qualname__)
        for state in [*loops["state_dict"].get("combined_loader", []), data]:
            if isinstance(state, dict) and {"rows", "rows_per_micro_step"} <= state.keys():
                state["rows"] -= surplus * state["rows_per_micro_step"]


def _shift_batches(loops: dict[str, Any], by: int) -> None:
    """Moves Lightning's counters of micro-batches to a window's start, where everything before is completed."""
    progress = loops["epoch_loop.batch_progress"]
    # a checkpoint written after a batch's hooks has `completed` one behind: Lightning expects that as soon as any batch
    # is done, at the start of a later epoch too, and adds one
    behind = 1 if progress["total"]["ready"] + by > 0 else 0
    for part in ("current", "total"):
        done = progress[part]["ready"] + by
        progress[part] = {**dict.fromkeys(progress[part], done), "completed": done - behind}
    progress["is_last_batch"] = False

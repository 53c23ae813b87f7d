"""One branch of a run at k times its batch size, for the critical batch size by branching (arXiv 2505.23971).

from the checkpoint on:   B → k·B,   η → k^e · η        e = ½ (Adam), 1 (SGD) or 0
"""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer

from lit_interns1.callbacks.batch_size_scheduler import BatchSizeScheduler
from lit_interns1.optim import TabulatedBatch


class BranchBatchSize(BatchSizeScheduler):
    """Multiplies the batch size of a resumed run, at the first step where accumulation may change.

    Args:
        factor: k, at least 1.
        end_tokens: Consumed tokens at which the branch ends.
        learning_rate: See `BatchSizeScheduler`.
        replaced: The scheduler that the run had, with the state of the checkpoint: the branch starts from its batch
            size and learning rate. None: it had none.

    Raises:
        ValueError: As `BatchSizeScheduler`, if k < 1, and before training, if the rate decays before `end_tokens`.
    """

    def __init__(
        self,
        factor: int,
        end_tokens: int,
        learning_rate: Literal["none", "sqrt", "linear"] = "sqrt",
        replaced: BatchSizeScheduler | None = None,
    ) -> None:
        if factor < 1:
            raise ValueError(f"the factors of the batch size must be at least 1, got {factor}")
        micro_batch_rows = replaced.micro_batch_rows if replaced is not None else None
        # no number of rows is known yet: see _wanted
        super().__init__(
            TabulatedBatch([(0, factor)]), "rows", micro_batch_rows=micro_batch_rows, learning_rate=learning_rate
        )
        self.factor, self.end_tokens = factor, end_tokens
        self._factor_before = 1.0
        if replaced is not None and replaced.state.rows_per_step:
            self._factor_before = replaced.learning_rate_factor
            self.state.rows_per_step = self.state.initial_rows = replaced.state.rows_per_step
            self.state.rows_per_micro_step = replaced.state.rows_per_micro_step

    @property
    def learning_rate_factor(self) -> float:
        """That of the replaced scheduler × k^e."""
        return self._factor_before * super().learning_rate_factor

    def _wanted(self, tokens: int) -> float | None:
        return self.factor * self.state.initial_rows or None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses a branch that would run into the decay of the learning rate."""
        decays_from = self._frozen_from(trainer)
        if self.end_tokens > decays_from:
            raise ValueError(
                f"the learning rate decays from {decays_from:,.0f} tokens on, and the branches would end at "
                f"{self.end_tokens:,}: branch from an earlier checkpoint, train for fewer tokens, or give the schedule "
                "more of them, e.g. --model.schedule.total_tokens"
            )
        super().on_train_start(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: a branch is not continued."""
        return {}

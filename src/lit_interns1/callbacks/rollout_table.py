"""What the policy writes: samples of rollout batches with their rewards, for people to read.

Numbers alone do not show a policy that has learned to please its judge. The samples go to a file in the run directory,
and to W&B as a table.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger

from lit_interns1.rollout.samples import ScoredSample

COLUMNS = (
    "rollout", "source", "prompt", "response", "reward", "correct", "judges", "length", "finish_reason",
)  # fmt: skip


class RolloutTable(Callback):
    """Writes samples of every n-th rollout batch.

    Args:
        every_n_rollouts: n.
        samples: How many of a batch: whole groups from the front.
        file: JSONL in the run directory that lines are added to, with `COLUMNS` as fields; None = no file.

    Logs the table `rollout/samples` to W&B.

    Raises:
        ValueError: If a number is below 1; and when training starts, if the data are not rollouts.
    """

    def __init__(self, every_n_rollouts: int = 10, samples: int = 16, file: str | None = "rollouts.jsonl") -> None:
        for name, value in (("every_n_rollouts", every_n_rollouts), ("samples", samples)):
            if value < 1:
                raise ValueError(f"RolloutTable.{name} must be at least 1, got {value}")
        self.every_n_rollouts, self.samples, self.file = every_n_rollouts, samples, file
        self._written = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Looks at the data."""
        data: Any = getattr(trainer, "datamodule", None)
        if stage == "fit" and not hasattr(data, "collected"):
            raise ValueError(f"RolloutTable needs a RolloutDataModule, got {type(data).__name__}")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Writes the samples of a new rollout batch."""
        collected = trainer.datamodule.collected  # type: ignore[attr-defined]
        if collected is None or collected.number == self._written or not trainer.is_global_zero:
            return
        self._written = collected.number
        if collected.number % self.every_n_rollouts:
            return
        rows = [_row(collected.number, scored) for scored in collected.samples[: self.samples]]
        if self.file is not None:
            path = Path(trainer.default_root_dir) / self.file
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as stream:
                stream.writelines(
                    json.dumps(dict(zip(COLUMNS, row, strict=True)), ensure_ascii=False) + "\n" for row in rows
                )
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                data = [[json.dumps(cell) if isinstance(cell, dict) else cell for cell in row] for row in rows]
                logger.log_table("rollout/samples", columns=list(COLUMNS), data=data)


def _row(number: int, scored: ScoredSample) -> list[Any]:
    reward = scored.reward if scored.counts else None
    return [
        number, scored.prompt.source, scored.prompt.text, scored.text, reward, scored.correct, scored.parts,
        len(scored.sample.response_ids), scored.sample.finish_reason,
    ]  # fmt: skip

"""The checkpoint that a run continues from: always there, always whole, and at the end of training up to date.

Lightning's ModelCheckpoint waits for the monitored metric before it saves anything, forgets the steps behind the last
regular save when training ends, and writes through the system's temporary directory, from where a file is copied, not
renamed, if that is another file system.
"""

from __future__ import annotations

import os
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class RunCheckpoint(ModelCheckpoint):
    """Keeps `last.ckpt`: every n optimizer steps and at the end of training, replaced in one step.

    Args:
        dirpath: Directory; default: `checkpoints/` in the run directory.
        every_n_train_steps: Optimizer steps between two saves.
    """

    def __init__(self, dirpath: str | None = None, every_n_train_steps: int = 200) -> None:
        if every_n_train_steps < 1:
            raise ValueError(f"checkpoint.every_n_train_steps must be at least 1, got {every_n_train_steps}")
        super().__init__(
            dirpath, save_top_k=0, save_last=True, every_n_train_steps=every_n_train_steps, enable_version_counter=False
        )

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        final = Path(filepath)
        if final.is_dir():  # a sharded checkpoint replaces itself
            super()._save_checkpoint(trainer, filepath)
            return
        partial = final.with_name(f".{final.name}.partial")
        super()._save_checkpoint(trainer, str(partial))
        if trainer.is_global_zero and partial.exists():
            os.replace(partial, final)
        trainer.strategy.barrier("RunCheckpoint")
        self._last_checkpoint_saved = filepath

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the steps since the last save."""
        if self._last_global_step_saved != trainer.global_step and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

"""The checkpoint that a run continues from: always there, always whole, and at the end of training up to date.

Lightning's ModelCheckpoint waits for the monitored metric before it saves anything, forgets the steps behind the last
regular save when training ends, and writes through the system's temporary directory, from where a file is copied, not
renamed, if that is another file system.
"""

from __future__ import annotations

import os
import shutil
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
        partial = final.with_name(f".{final.name}.partial")
        if trainer.is_global_zero and partial.is_dir():
            shutil.rmtree(partial)  # of a run that was stopped while it wrote
        trainer.strategy.barrier("RunCheckpoint")
        super()._save_checkpoint(trainer, str(partial))
        trainer.strategy.barrier("RunCheckpoint")
        if trainer.is_global_zero and partial.exists():
            (_replace_folder if partial.is_dir() else os.replace)(partial, final)
        trainer.strategy.barrier("RunCheckpoint")
        self._last_checkpoint_saved = filepath

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the steps since the last save."""
        if self._last_global_step_saved != trainer.global_step and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))


def _replace_folder(source: Path, target: Path) -> None:
    """Puts a folder where another may be.

    Folders cannot be swapped in one step, but links to them can: `target` becomes a link to one of two folders beside
    it, and the other one is removed. A folder of another origin is moved aside.
    """
    old = target.resolve() if target.is_symlink() else None
    first, second = (target.with_name(f".{target.name}.{letter}") for letter in "ab")
    new = second if old == first.resolve() else first
    if new.exists():
        shutil.rmtree(new)
    os.rename(source, new)
    link = target.with_name(f".{target.name}.link")
    link.unlink(missing_ok=True)
    link.symlink_to(new.name, target_is_directory=True)
    if target.is_dir() and not target.is_symlink():
        os.rename(target, target.with_name(f"{target.name}.before"))
    os.replace(link, target)
    if old is not None and old != new.resolve() and old.is_dir():
        shutil.rmtree(old)

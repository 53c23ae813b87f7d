"""The checkpoint that a run continues from: always there, always whole, and at the end of training up to date.

Lightning's ModelCheckpoint waits for the monitored metric before it saves anything, forgets the steps behind the last
regular save when training ends, and writes through the system's temporary directory, from where a file is copied, not
renamed, if that is another file system. Its handling of SIGTERM communicates inside the signal handler, where other
ranks may be in the middle of something else.
"""

from __future__ import annotations

import shutil
import signal
import threading
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from lit_interns1.checkpoints import partial_path, publish


class RunCheckpoint(ModelCheckpoint):
    """Keeps `last.ckpt`: every n optimizer steps and at the end of training, replaced in one step.

    When any rank's process receives SIGTERM (preemption), all ranks save after the optimizer step in progress, and the
    run ends as if its budget were used up, without another validation. A validation in progress is finished first.

    Args:
        dirpath: Directory; default: `checkpoints/` in the run directory.
        every_n_train_steps: Optimizer steps between two saves.
        save_on_sigterm: Handle SIGTERM; False leaves it to Lightning.
    """

    def __init__(
        self, dirpath: str | None = None, every_n_train_steps: int = 200, save_on_sigterm: bool = True
    ) -> None:
        if every_n_train_steps < 1:
            raise ValueError(f"checkpoint.every_n_train_steps must be at least 1, got {every_n_train_steps}")
        super().__init__(
            dirpath, save_top_k=0, save_last=True, every_n_train_steps=every_n_train_steps, enable_version_counter=False
        )
        self.save_on_sigterm = save_on_sigterm
        self._asked_to_stop = False
        self._previous_handler: Any = None
        self._last_step = 0

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        if getattr(trainer.strategy, "publishes_checkpoints", False):
            super()._save_checkpoint(trainer, filepath)
            return
        final = Path(filepath)
        partial = partial_path(final)
        if trainer.is_global_zero and partial.is_dir():
            shutil.rmtree(partial)  # of a run that was stopped while it wrote
        trainer.strategy.barrier("RunCheckpoint")
        super()._save_checkpoint(trainer, str(partial))
        trainer.strategy.barrier("RunCheckpoint")
        if trainer.is_global_zero and partial.exists():
            publish(partial, final)
        trainer.strategy.barrier("RunCheckpoint")
        self._last_checkpoint_saved = filepath

    def _save_now(self, trainer: Trainer) -> None:
        if self._last_global_step_saved != trainer.global_step:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    # -- SIGTERM -------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes over the signal."""
        super().on_train_start(trainer, pl_module)
        self._asked_to_stop, self._last_step = False, trainer.global_step
        if self.save_on_sigterm and threading.current_thread() is threading.main_thread():
            self._previous_handler = signal.signal(signal.SIGTERM, self._ask_to_stop)

    def _ask_to_stop(self, signal_number: int, frame: Any) -> None:
        self._asked_to_stop = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves every n steps, and when any rank was asked to stop."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if not self.save_on_sigterm or trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        if trainer.strategy.reduce_boolean_decision(self._asked_to_stop, all=False):
            self._save_now(trainer)
            rank_zero_info(
                f"SIGTERM: step {trainer.global_step} is saved in {self._last_checkpoint_saved}; the run ends"
            )
            trainer.fit_loop.min_epochs, trainer.fit_loop.epoch_loop.min_steps = 0, None
            trainer.limit_val_batches = 0
            trainer.should_stop = True

    def _give_signal_back(self) -> None:
        if self._previous_handler is not None:
            signal.signal(signal.SIGTERM, self._previous_handler)
            self._previous_handler = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Gives the signal back."""
        self._give_signal_back()
        super().on_exception(trainer, pl_module, exception)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the steps since the last save."""
        self._give_signal_back()
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._save_now(trainer)

"""The share of routed tokens that every expert gets, over the run: what the expert-load picture is drawn from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_interns1.callbacks.router_counter import RouterCounter
from lit_interns1.callbacks.token_clock import TokenClock


class ExpertLoadRecorder(Callback):
    """Writes `metrics/expert_load.npz` in the run directory: `tokens` (N,), `load` (N, layers, experts).

    The counts of all micro-batches and ranks between two points are added up; each row of `load` sums to 1. Reads the
    router statistics that `LanguageModel` returns, which recomputation cannot count twice.

    Args:
        every_n_steps: Optimizer steps per point.
        path: The file, relative to the trainer's `default_root_dir`.

    Logs `router/max_violation`: (max load − mean load) / mean load, averaged over layers (MaxVio of arXiv 2408.15664).
    """

    def __init__(self, every_n_steps: int = 10, path: str = "metrics/expert_load.npz") -> None:
        if every_n_steps < 1:
            raise ValueError(f"ExpertLoadRecorder.every_n_steps must be at least 1, got {every_n_steps}")
        self.every_n_steps, self.path = every_n_steps, path
        self._tokens: list[int] = []
        self._loads: list[np.ndarray] = []
        self._counter = RouterCounter()

    def _file(self, trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / self.path

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts listening; continues the file of a resumed run up to the restored clock."""
        self._counter.listen(pl_module)
        restored = TokenClock.of(trainer).tokens
        if restored and self._file(trainer).exists():
            with np.load(self._file(trainer)) as saved:
                keep = saved["tokens"] <= restored
                self._tokens = saved["tokens"][keep].tolist()
                self._loads = list(saved["load"][keep])

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Takes a point every n steps."""
        clock = TokenClock.of(trainer).commit(trainer)
        if clock.steps % self.every_n_steps:
            return
        counts_LE = self._counter.take()
        if counts_LE is None:
            return
        load_LE = counts_LE / counts_LE.sum(-1, keepdim=True)
        pl_module.log("router/max_violation", (load_LE.amax(-1) * load_LE.shape[1] - 1).mean())
        self._tokens.append(clock.tokens)
        self._loads.append(load_LE.cpu().numpy())

    def _write(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero or not self._loads:
            return
        target = self._file(trainer)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_suffix(".partial.npz")
        np.savez_compressed(temporary, tokens=np.array(self._tokens), load=np.stack(self._loads))
        os.replace(temporary, target)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Writes what there is, so that a killed run keeps its points."""
        self._write(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the file and stops listening."""
        self._write(trainer)
        self._counter.stop()

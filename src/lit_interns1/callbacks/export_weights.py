"""Writes the model as a Hugging Face folder, when training ends and in between.

every n optimizer steps: {folder}-step-{step}        at the end: {folder}
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_interns1.checkpoints import ExportedWeights, ModelSource, export_pretrained
from lit_interns1.models import LanguageModel
from lit_interns1.models.trained_parts import parts_of_type


class ExportWeights(Callback):
    """Exports the `LanguageModel` of a module. Every rank writes what it holds, on a file system that all see.

    Nothing is overwritten: that a folder exists already is an error before training starts, or, if it appears later,
    when it would be written.

    Args:
        folder: What is written at the end; default: `huggingface` in the run directory.
        layout: `model_type` of config.json; default: that of `like`, else the plainest that can say what the model is.
        dtype: "native", "float32", "bfloat16", "float16" or "fp8".
        like: A Hugging Face folder to resemble: types, encoders, fields of config.json, tokenizer.
        every_n_steps: Also export every so many optimizer steps; None = only at the end.
        at_end: Export when training ends, also where it ends early, but not where it fails.
        max_shard_bytes: Bytes of numbers in one file.

    Raises:
        ValueError: If `every_n_steps` is below 1, or nothing would ever be exported.
    """

    def __init__(
        self,
        folder: str | None = None,
        layout: str | None = None,
        dtype: str = "native",
        like: str | None = None,
        every_n_steps: int | None = None,
        at_end: bool = True,
        max_shard_bytes: int = 5_000_000_000,
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"ExportWeights.every_n_steps must be at least 1, got {every_n_steps}")
        if every_n_steps is None and not at_end:
            raise ValueError("ExportWeights with every_n_steps = None and at_end = False would export nothing")
        self.folder, self.every_n_steps, self.at_end = folder, every_n_steps, at_end
        self.options = {"layout": layout, "dtype": dtype, "like": like, "max_shard_bytes": max_shard_bytes}
        self._last_step = 0
        self.exported: list[ExportedWeights] = []
        """What this run has written so far."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds out before the first step whether the model can be written."""
        self._last_step = trainer.global_step
        self._export(
            trainer, pl_module, self._folder(trainer, None if self.at_end else self._next_step()), dry_run=True
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Exports every n steps."""
        step = trainer.global_step
        if self.every_n_steps is None or step == self._last_step:
            return
        self._last_step = step
        if step % self.every_n_steps == 0:
            self._export(trainer, pl_module, self._folder(trainer, step))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exports at the end."""
        if self.at_end:
            self._export(trainer, pl_module, self._folder(trainer))

    def _next_step(self) -> int:
        assert self.every_n_steps is not None
        return (self._last_step // self.every_n_steps + 1) * self.every_n_steps

    def _folder(self, trainer: Trainer, step: int | None = None) -> Path:
        folder = Path(self.folder) if self.folder is not None else Path(trainer.default_root_dir) / "huggingface"
        return folder if step is None else folder.with_name(f"{folder.name}-step-{step}")

    def _export(self, trainer: Trainer, pl_module: LightningModule, folder: Path, dry_run: bool = False) -> None:
        model = next(iter(parts_of_type(pl_module, LanguageModel)), None)
        if model is None:
            raise ValueError(f"ExportWeights: {type(pl_module).__name__} holds no LanguageModel")
        tokenizer = Path(trainer.default_root_dir) / "tokenizer.json"
        found = str(tokenizer) if self.options["like"] is None and tokenizer.is_file() else None
        result = export_pretrained(
            ModelSource(model), model.config, folder, dry_run=dry_run, progress=False, tokenizer=found, **self.options  # type: ignore[arg-type]
        )  # fmt: skip
        if not dry_run:
            self.exported.append(result)

"""Progress of a run in consumed tokens: one line that renews itself in a terminal, now and then a line in a log."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar

from lit_interns1.callbacks.token_clock import TokenClock
from lit_interns1.models import Decoder, count_parameters
from lit_interns1.models.trained_parts import trained_parts
from lit_interns1.training.units import as_duration, with_unit


class ConsoleProgress(ProgressBar):
    """Shows steps, tokens, loss, learning rate, speed and the time that is left.

    Takes the place of Lightning's bar, whose unit (batches of an epoch) says little about a run that is planned in
    tokens. What modules log with `prog_bar=True` is shown too.

    Args:
        seconds: Time between two lines where the output is not a terminal.
    """

    def __init__(self, seconds: float = 10.0) -> None:
        super().__init__()
        if seconds <= 0:
            raise ValueError(f"ConsoleProgress.seconds must be positive, got {seconds}")
        self.seconds = seconds
        self._enabled = True
        self._width = 0
        self._shown_at = self._started_at = 0.0
        self._started_tokens = 0

    def disable(self) -> None:
        """Called by Lightning on ranks that keep silent."""
        self._enabled = False

    def enable(self) -> None:
        """Called by Lightning on the rank that speaks."""
        self._enabled = True

    def _write(self, text: str, final: bool = False) -> None:
        if not self._enabled:
            return
        if sys.stdout.isatty():
            sys.stdout.write("\r" + text.ljust(self._width) + ("\n" if final else ""))
            self._width = 0 if final else len(text)
        else:
            sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says what is trained."""
        self._started_at = self._shown_at = time.monotonic()
        clock = TokenClock.of(trainer)
        self._started_tokens = clock.tokens
        for _, model in trained_parts(pl_module):
            if isinstance(model, Decoder):
                counts = count_parameters(model)
                self._write(
                    f"{with_unit(counts.total)} parameters, {with_unit(counts.active)} active per token; "
                    f"run directory {trainer.default_root_dir}",
                    final=True,
                )
        if clock.tokens:
            self._write(f"continuing after step {clock.state.steps}, {with_unit(clock.tokens)} tokens", final=True)

    def _line(self, trainer: Trainer, pl_module: LightningModule) -> str:
        clock = TokenClock.of(trainer)
        parts = [f"step {clock.state.steps}"]
        done, budget = clock.tokens, clock.max_tokens
        parts.append(f"{with_unit(done)}{'/' + with_unit(budget) if budget else ''} tokens")
        for name, value in self.get_metrics(trainer, pl_module).items():
            if name == "v_num" or not isinstance(value, (int, float)):
                continue
            label = {"train/loss": "loss", "throughput/tokens_per_second": "tokens/s"}.get(name, name)
            parts.append(f"{label} {value:.4g}" if label != "tokens/s" else f"{with_unit(value)} {label}")
        elapsed, gained = time.monotonic() - self._started_at, done - self._started_tokens
        if budget and gained:
            parts.append(f"{as_duration(elapsed * max(0, budget - done) / gained)} left")
        return " | ".join(parts)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Renews the line."""
        now = time.monotonic()
        if now - self._shown_at >= (0.5 if sys.stdout.isatty() else self.seconds):
            self._shown_at = now
            self._write(self._line(trainer, pl_module))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows the line with the new validation loss."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._write(self._line(trainer, pl_module), final=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows the last line and the time it took."""
        took = as_duration(time.monotonic() - self._started_at)
        self._write(f"{self._line(trainer, pl_module)} | took {took}", final=True)

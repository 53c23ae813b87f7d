"""CPU time that RouterLoadMonitor adds to an optimizer step, against a step of 100 ms.

    python benchmarks/monitor_overhead.py [--layers 16] [--experts 64] [--every 10]

The time inside the monitor's hooks, in what it hears from forward passes, and in the statistics of the logits that it
asks routers for, over a run of a small model. It depends on layers, experts and the window, and not on the width; the
statistics of the logits grow with tokens x experts.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lit_interns1.callbacks import RouterAlerts, RouterLoadMonitor
from lit_interns1.data import PackedBatch
from lit_interns1.models import LanguageModelConfig, MoEConfig
from lit_interns1.modules import LanguageModelModule
from lit_interns1.nn.moe.statistics import LogitStats

STEP_MS = 100.0


class Stopwatch:
    """Adds up the CPU time of this thread in functions that it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            started = time.thread_time()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds += time.thread_time() - started

        return timed


class Reset(L.Callback):
    """Forgets what the first window cost."""

    def __init__(self, stopwatches: list[Stopwatch], after: int) -> None:
        self.stopwatches, self.after = stopwatches, after

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.after:
            for stopwatch in self.stopwatches:
                stopwatch.seconds = 0.0


def run(options: argparse.Namespace) -> tuple[float, float]:
    """CPU milliseconds per step: the monitor's own, and those of the statistics of the logits."""
    config = LanguageModelConfig(
        vocab_size=64, hidden_size=32, num_layers=options.layers, num_heads=1, num_kv_heads=1, head_dim=32,
        moe=MoEConfig(num_experts=options.experts, experts_per_token=4, intermediate_size=16),
    )  # fmt: skip
    ids = torch.randint(0, 64, (options.tokens,), generator=torch.Generator().manual_seed(0))
    batch = PackedBatch.from_documents([{"input_ids": ids, "labels": ids}])
    own, logits = Stopwatch(), Stopwatch()
    monitor = RouterLoadMonitor(every_n_steps=options.every, alerts=RouterAlerts(max_violation=None))
    for name in ("on_train_batch_start", "on_train_batch_end", "_receive"):
        setattr(monitor, name, own.wrap(getattr(monitor, name)))
    measure = LogitStats.measure
    LogitStats.measure = staticmethod(logits.wrap(measure))  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder:
            trainer = L.Trainer(
                accelerator="cpu", devices=1, max_epochs=1, enable_checkpointing=False, enable_progress_bar=False,
                enable_model_summary=False, default_root_dir=folder, log_every_n_steps=options.every,
                callbacks=[monitor, Reset([own, logits], options.every)], logger=CSVLogger(folder),
            )  # fmt: skip
            data: Any = [batch] * (options.every + options.steps)
            trainer.fit(LanguageModelModule(config), DataLoader(data, batch_size=None))
    finally:
        LogitStats.measure = staticmethod(measure)  # type: ignore[method-assign]
    return own.seconds / options.steps * 1e3, logits.seconds / options.steps * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("layers", 16), ("experts", 64), ("every", 10), ("tokens", 64), ("steps", 40), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    own, logits = zip(*(run(options) for _ in range(options.repeats)), strict=True)
    added = statistics.median(a + b for a, b in zip(own, logits, strict=True))
    print(f"{options.layers} layers x {options.experts} experts, a window every {options.every} steps, 1 thread")
    print(f"monitor {statistics.median(own):.3f} ms/step, statistics of logits {statistics.median(logits):.3f} ms/step")
    print(f"ratio to a step of {STEP_MS:g} ms: {added / STEP_MS:.2%}")


if __name__ == "__main__":
    main()

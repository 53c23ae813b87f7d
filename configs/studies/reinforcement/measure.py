"""Right answers of policies on 1,000 held-out prompts, 4 samples each at temperature 1, and what each gained over the
first one: differences are taken prompt by prompt, with the same seeds, so their standard errors are over prompts.

python configs/studies/reinforcement/measure.py NAME=CHECKPOINT ...
"""

import os
import statistics
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from lit_interns1.commands.trainer import run

CONFIG = Path(__file__).parents[2] / "rl" / "chain-sum.yaml"


class Collect(Callback):
    """Keeps the share of right samples of every prompt."""

    def __init__(self) -> None:
        self.right: list[float] = []

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *place: int) -> None:
        """Reads the judged samples."""
        self.right += [statistics.mean(float(scored.correct) for scored in group) for group in batch.groups]


def measure(checkpoint: str) -> list[float]:
    """The share of right samples by prompt; the same prompts and seeds for all policies."""
    collect = Collect()
    options = ["--trainer.enable_progress_bar=false", "--trainer.callbacks=null", "--verbose=false"]
    run(["validate", f"--config={CONFIG}", f"--model.init_weights={checkpoint}", *options], [collect])
    return collect.right


def with_error(values: list[float]) -> str:
    """Mean and standard error."""
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values) / len(values) ** 0.5:.4f}"


if __name__ == "__main__":
    os.environ.setdefault("WANDB_MODE", "disabled")
    print("| policy | right | gain |\n|---|---|---|", flush=True)
    first: list[float] = []
    for argument in sys.argv[1:]:
        name, _, checkpoint = argument.partition("=")
        found = measure(checkpoint)
        gain = with_error([b - a for a, b in zip(first, found, strict=True)]) if first else ""
        first = first or found
        print(f"| {name} | {with_error(found)} | {gain} |", flush=True)

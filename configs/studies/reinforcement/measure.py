"""Rewards of a policy on 1,000 held-out prompts with 4 samples each at temperature 1, with their standard error.

python configs/studies/reinforcement/measure.py NAME=CHECKPOINT ...
"""

import os
import sys
from pathlib import Path

from lit_interns1.commands.trainer import run

CONFIG = Path(__file__).parents[2] / "rl" / "chain-sum.yaml"


def measure(checkpoint: str) -> dict[str, float]:
    """The validation metrics of a checkpoint; the same prompts and seeds for all."""
    cli = run(
        ["validate", f"--config={CONFIG}", f"--model.init_weights={checkpoint}", "--trainer.enable_progress_bar=false"]
    )
    return {name: float(value) for name, value in cli.trainer.callback_metrics.items()}


if __name__ == "__main__":
    os.environ.setdefault("WANDB_MODE", "disabled")
    print("| policy | right | standard error | reward | tokens |\n|---|---|---|---|---|")
    for argument in sys.argv[1:]:
        name, _, checkpoint = argument.partition("=")
        found = measure(checkpoint)
        print(
            f"| {name} | {found['val/correct']:.4f} | {found['val/correct_standard_error']:.4f} | "
            f"{found['val/reward']:.3f} | {found['val/response_length']:.2f} |",
            flush=True,
        )

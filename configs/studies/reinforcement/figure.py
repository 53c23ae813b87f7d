"""Rewards of the three objectives, and what noise in the engine does with and without replay and correction.

python configs/studies/reinforcement/figure.py [folder of the runs] [picture]
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from lit_interns1.reports import RunDirectory

OBJECTIVES = {"rloo": "RLOO", "oreal": "OREAL", "pro": "Intern-S1-Pro"}
NOISE = {"none": "neither", "correction": "correction", "replay": "replay", "both": "replay and correction"}
COLOURS = ("#333333", "#0072B2", "#D55E00", "#009E73")
SHOWN_NOISE = "0.5"
WINDOW = 15


def smooth(values: np.ndarray) -> np.ndarray:
    """Running means."""
    return np.convolve(values, np.ones(WINDOW) / WINDOW, mode="valid")


def main(runs: Path, picture: Path) -> None:
    """Prints means of the last quarter of each run, and draws the picture."""
    figure = Figure((11, 3.6), layout="constrained")
    learning, noisy, mismatch = figure.subplots(1, 3)
    for (name, label), colour in zip(OBJECTIVES.items(), COLOURS, strict=False):
        found = [RunDirectory(run).metrics()["rollout/correct"].values for run in sorted(runs.glob(f"{name}-?"))]
        for values in found:
            learning.plot(smooth(values), color=colour, linewidth=0.6, alpha=0.5)
        if found:
            learning.plot(smooth(np.mean(found, 0)), color=colour, label=label, linewidth=2)
    print("| engine's noise met by | right in training | F(2) | k3, nats |\n|---|---|---|---|")
    for (name, label), colour in zip(NOISE.items(), COLOURS, strict=True):
        run = runs / f"noise-{SHOWN_NOISE}-{name}-1"
        if not run.is_dir():
            continue
        metrics = RunDirectory(run).metrics()
        right, extreme, k3 = (metrics[key].values for key in ("rollout/correct", "mismatch/extreme", "mismatch/k3"))
        last = slice(-len(right) // 4, None)
        print(f"| {label} | {right[last].mean():.3f} | {extreme[last].mean():.4f} | {k3[last].mean():.2e} |")
        noisy.plot(smooth(right), color=colour, label=label)
        mismatch.plot(smooth(extreme), color=colour, label=label)
    learning.set(title="No noise, three seeds", xlabel="Optimizer step", ylabel="Right answers in training")
    noisy.set(title="Noise in the engine's routers", xlabel="Optimizer step", ylabel="Right answers in training")
    mismatch.set(title="Engine against trainer", xlabel="Optimizer step", ylabel="F(2)")
    for axes in (learning, noisy):
        axes.legend(fontsize=8)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(
        Path(arguments[0] if arguments else "runs/reinforcement"),
        Path(arguments[1] if len(arguments) > 1 else "runs/reinforcement/reinforcement.png"),
    )

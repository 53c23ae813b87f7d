"""Validation loss of the arms over tokens: a table, and a picture of the mean over seeds with the range between them.

python configs/studies/expansion/figure.py [folder of the runs] [picture]
"""

import re
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from lit_interns1.reports import RunDirectory

ARMS = {
    "same": "16 experts, as before",
    "grouped": "64, grouped",
    "ranked": "64, ranked",
    "scratch": "64, from scratch",
}
COLOURS = ("#333333", "#0072B2", "#D55E00", "#999999")


def curve(run: Path) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and validation loss, the value before the first step included."""
    validation = RunDirectory(run).metrics()["val/loss"]
    assert validation.tokens is not None
    before = re.search(r"val/loss\s+│\s+([\d.]+)", run.with_name(f"{run.name}-before.txt").read_text())
    assert before is not None
    return np.append(0.0, validation.tokens), np.append(float(before[1]), validation.values)


def main(runs: Path, picture: Path) -> None:
    """Prints the table and draws the picture."""
    figure = Figure((8, 4.5), layout="constrained")
    axes = figure.subplots()
    print("| arm | seed | at 0 |" + " | ".join(f" {t}" for t in ("41 k", "123 k", "205 k", "410 k")) + " |")
    for (arm, label), colour in zip(ARMS.items(), COLOURS, strict=True):
        found = sorted(path for path in runs.glob(f"{arm}-*") if (path / "finished").is_file())
        losses = []
        for run in found:
            tokens, loss = curve(run)
            losses.append(loss)
            shown = [f"{loss[i]:.3f}" for i in (0, 1, 3, 5, -1)]
            print(f"| {label} | {run.name.rsplit('-', 1)[1]} | " + " | ".join(shown) + " |")
        if losses:
            mean = np.mean(losses, 0)
            axes.plot(tokens / 1e3, mean, color=colour, label=label, linewidth=1.6)
            axes.fill_between(tokens / 1e3, np.min(losses, 0), np.max(losses, 0), color=colour, alpha=0.15, linewidth=0)
    axes.set(xlabel="Thousand tokens after the expansion", ylabel="Validation loss (nats per token)", ylim=(None, 6.2))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=150)


if __name__ == "__main__":
    runs, picture = (sys.argv[1:] + ["runs/expansion", "expansion.png"][len(sys.argv) - 1 :])[:2]
    main(Path(runs), Path(picture))

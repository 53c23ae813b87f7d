"""Validation loss of the arms: a table, and a picture of what expanded models lose or gain, by seed and in the mean.

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


def before_file(run: Path) -> Path:
    """What `validate` printed before the first step."""
    return run.with_name(f"{run.name}-before.txt")


def curve(run: Path) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and validation loss, the value before the first step included."""
    validation = RunDirectory(run).metrics()["val/loss"]
    assert validation.tokens is not None
    before = re.search(r"val/loss\s+│\s+([\d.]+)", before_file(run).read_text(encoding="utf-8"))
    assert before is not None
    return np.append(0.0, validation.tokens), np.append(float(before[1]), validation.values)


def main(runs: Path, picture: Path) -> None:
    """Prints the table and draws the picture."""
    figure = Figure((8, 4.5), layout="constrained")
    axes = figure.subplots()
    print("| arm | seed | at 0 | 41 k | 123 k | 205 k | 410 k |\n" + "|---" * 7 + "|")
    for (arm, label), colour in zip(ARMS.items(), COLOURS, strict=True):
        done = (path for path in runs.glob(f"{arm}-*") if (path / "finished").is_file())
        found = sorted(path for path in done if before_file(path).is_file())
        differences = []
        for run in found:
            tokens, loss = curve(run)
            shown = [f"{loss[i]:.3f}" for i in (0, 1, 3, 5, -1)]
            seed = run.name.rsplit("-", 1)[1]
            print(f"| {label} | {seed} | " + " | ".join(shown) + " |")
            same = run.with_name(f"same-{seed}")
            if arm in ("grouped", "ranked") and (same / "finished").is_file():
                differences.append(loss - curve(same)[1])
                axes.plot(tokens / 1e3, differences[-1], color=colour, linewidth=0.7, alpha=0.6)
        if differences:
            axes.plot(tokens / 1e3, np.mean(differences, 0), color=colour, label=label, linewidth=2)
    axes.axhline(0.0, color=COLOURS[0], linewidth=1)
    axes.set(
        xlabel="Thousand tokens after the expansion", ylabel="Validation loss − that of 16 experts (nats per token)"
    )
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=150)


if __name__ == "__main__":
    runs, picture = (sys.argv[1:] + ["runs/expansion", "expansion.png"][len(sys.argv) - 1 :])[:2]
    main(Path(runs), Path(picture))

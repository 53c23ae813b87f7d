"""Validation losses of the optimizers: tables, and a picture of their differences from AdamW's.

python configs/studies/optimizers/figure.py [folder of the runs] [picture]

Runs of one seed see the same rows and start from the same weights, so differences are taken seed by seed. A loss is
passed where the validation curve, joined by straight lines, goes below it for good.
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from lit_interns1.reports import RunDirectory
from lit_interns1.reports.learning_rate_search import RateSearchResult

ARMS = {"adamw": "AdamW", "muon": "Muon", "mousse": "Mousse, both sides", "mousse-one-sided": "Mousse, smaller side"}
COLOURS = ("#333333", "#0072B2", "#D55E00", "#009E73")
SIZES = ("small", "large")
DECAY = 0.8  # share of a run after which the rate falls


def curve(run: Path) -> tuple[np.ndarray, np.ndarray]:
    """Steps that were made and validation loss after them."""
    validation = RunDirectory(run).metrics()["val/loss"]
    return validation.steps + 1, validation.values


def passed(steps: np.ndarray, loss: np.ndarray, level: float) -> float:
    """The step from which on the loss is below the level; NaN if it ends above."""
    above = np.flatnonzero(loss > level)
    if len(above) == 0:
        return float(steps[0])
    last = above[-1]
    if last + 1 == len(loss):
        return float("nan")
    share = (loss[last] - level) / (loss[last] - loss[last + 1])
    return float(steps[last] + share * (steps[last + 1] - steps[last]))


def smoothed(loss: np.ndarray) -> np.ndarray:
    """Means over three neighbours, those at the ends over two."""
    weights = np.ones(3)
    return np.convolve(loss, weights, "same") / np.convolve(np.ones_like(loss), weights, "same")


def in_words(values: list[float], digits: int) -> str:
    """Mean ± standard error, or what there is."""
    finite = [value for value in values if np.isfinite(value)]
    if not finite:
        return "—"
    mean = f"{np.mean(finite):.{digits}f}"
    if len(finite) < len(values):
        return f"{mean} ({len(finite)} of {len(values)} seeds)"
    return mean if len(finite) < 2 else f"{mean} ± {np.std(finite, ddof=1) / len(finite) ** 0.5:.{digits}f}"


def curves(runs: Path, size: str) -> dict[str, dict[int, tuple[np.ndarray, np.ndarray]]]:
    """Finished runs by arm and seed."""
    found: dict[str, dict[int, tuple[np.ndarray, np.ndarray]]] = {}
    for arm in ARMS:
        for run in sorted(runs.glob(f"{size}-{arm}-[0-9]*")):
            if (run / "finished").is_file():
                found.setdefault(arm, {})[int(run.name.rsplit("-", 1)[1])] = curve(run)
    return found


def rates(runs: Path, size: str) -> None:
    """Prints what the searches found."""
    for arm, label in ARMS.items():
        if (runs / f"search-{size}-{arm}" / "lr_search.json").is_file():
            found = RateSearchResult.load(runs / f"search-{size}-{arm}" / "lr_search.json")
            losses = ", ".join(f"{r:.3g}: {x[-1]:.3f}" for r, x in zip(found.rates, found.losses, strict=True))
            print(f"{size}, {label}: {found.verdict(-1)} ({losses})")


def table(found: dict[str, dict[int, tuple[np.ndarray, np.ndarray]]], size: str) -> None:
    """Prints one row per arm."""
    for arm, by_seed in found.items():
        finals = [loss[-1] for _, loss in by_seed.values()]
        row = [size, ARMS[arm], " ".join(f"{loss:.3f}" for loss in finals)]
        for other in ("adamw", "muon"):
            shared = [seed for seed in by_seed if seed in found.get(other, {})]
            goals = [found[other][seed][1][-1] for seed in shared]
            steps = [passed(*by_seed[seed], goal) for seed, goal in zip(shared, goals, strict=True)]
            differences = [by_seed[seed][1][-1] - goal for seed, goal in zip(shared, goals, strict=True)]
            row += ["", ""] if arm == other else [in_words(differences, 3), in_words(steps, 0)]
        before = []
        for seed, (steps, loss) in by_seed.items():
            if seed in found.get("adamw", {}):
                stable = steps <= DECAY * steps[-1]
                goal = smoothed(found["adamw"][seed][1][stable])[-1]
                before.append(passed(steps[stable], smoothed(loss[stable]), goal))
        print("| " + " | ".join([*row, "" if arm == "adamw" else in_words(before, 0)]) + " |")


def draw(found: dict[str, dict[int, tuple[np.ndarray, np.ndarray]]], axes: object, title: str) -> None:
    """Differences from AdamW, by seed and in the mean."""
    for (arm, label), colour in zip(ARMS.items(), COLOURS, strict=True):
        shared = [seed for seed in found.get(arm, {}) if seed in found.get("adamw", {})]
        if arm == "adamw" or not shared:
            continue
        steps = found[arm][shared[0]][0]
        differences = [found[arm][seed][1] - found["adamw"][seed][1] for seed in shared]
        for difference in differences:
            axes.plot(steps, difference, color=colour, linewidth=0.7, alpha=0.5)
        axes.plot(steps, np.mean(differences, 0), color=colour, label=label, linewidth=2)
        axes.axvline(DECAY * steps[-1], color="#999999", linewidth=1, linestyle=":")
    axes.axhline(0.0, color=COLOURS[0], linewidth=1)
    axes.set(xlabel="Steps", title=title)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def main(runs: Path, picture: Path) -> None:
    """Prints the tables and draws the picture."""
    figure = Figure((9, 4), layout="constrained")
    both = figure.subplots(1, 2, sharey=True)
    for size in SIZES:
        rates(runs, size)
    columns = [
        "model",
        "optimizer",
        "final loss by seed",
        "− AdamW's",
        "steps to AdamW's",
        "− Muon's",
        "steps to Muon's",
    ]
    print("\n| " + " | ".join([*columns, "steps to AdamW's before the decay"]) + " |\n" + "|---" * 8 + "|")
    for size, axes, title in zip(SIZES, both, ("0.44 M parameters", "1.68 M parameters"), strict=True):
        found = curves(runs, size)
        table(found, size)
        draw(found, axes, title)
    both[0].set_ylabel("Validation loss − AdamW's (nats per token)")
    both[0].legend(frameon=False, loc="lower right")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=150)


if __name__ == "__main__":
    runs, picture = (sys.argv[1:] + ["runs/optimizers", "optimizers.png"][len(sys.argv) - 1 :])[:2]
    main(Path(runs), Path(picture))

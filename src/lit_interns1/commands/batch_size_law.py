"""`lit-interns1 batch-size-law`: from runs at several constant batch sizes to a schedule (arXiv 2601.05034).

    loss over tokens per run → E(S) at target losses → B_min, B_opt with bootstrap intervals → ln B = p + q ln D

Only points of the constant learning rate count: where a run logs `optim/lr`, those at its peak. The written file
is what the schedules `FittedBatch` and `BatchForLoss` read.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lit_interns1.commands.arguments import without_nan

if TYPE_CHECKING:
    from lit_interns1.laws import BatchSizeTable
    from lit_interns1.laws.transforms import Floats


class ConstantBatchRun(NamedTuple):
    """The constant phase of one run, N points.

    Attributes:
        name: Name of the run directory.
        batch: B, tokens per optimizer step.
        rate: The learning rate; None if it was not logged.
        tokens_N: Consumed tokens.
        loss_N: Training loss, nats per token.
    """

    name: str
    batch: float
    rate: float | None
    tokens_N: Floats
    loss_N: Floats


def read_run(path: str | Path, metric: str = "train/loss", tolerance: float = 0.05) -> ConstantBatchRun:
    """Reads a run.

    Args:
        path: Run directory.
        metric: Name of the loss.
        tolerance: How far the tokens per step may stray from their mean, as a share.

    Raises:
        RunDirectoryError: If it has no such metric.
        ValueError: If the run logged no `train/tokens`, its batch size changed, or it has no constant phase.
    """
    import numpy as np

    from lit_interns1.reports import RunDirectory

    run = RunDirectory(path)
    loss = run.metric(metric)
    if loss.tokens is None:
        raise ValueError(f"the run {path} logged no train/tokens: add a TokenClock")
    clock = run.metric("train/tokens")
    if len(clock.steps) < 2:
        raise ValueError(f"the run {path} logged train/tokens at {len(clock.steps)} steps, and it takes two to know B")
    each_N = np.diff(clock.values) / np.diff(clock.steps)
    batch = float((clock.values[-1] - clock.values[0]) / (clock.steps[-1] - clock.steps[0]))
    if np.abs(each_N / batch - 1).max() > tolerance:
        raise ValueError(
            f"the batch size of the run {path} is not constant: {each_N.min():,.0f} to {each_N.max():,.0f} tokens per "
            "step; the law needs runs of one batch size each"
        )
    kept = np.ones(len(loss.steps), dtype=bool)
    rate: float | None = None
    rates = run.metrics().get("optim/lr")
    if rates is not None:
        rate = float(rates.values.max())
        kept = np.interp(loss.steps, rates.steps, rates.values) >= rate * (1 - 1e-6)
    if kept.sum() < 8:
        raise ValueError(
            f"the run {path} has {kept.sum()} points with the learning rate at its peak, and the fit needs 8: train "
            "longer, or set trainer.log_every_n_steps lower"
        )
    return ConstantBatchRun(Path(path).name, batch, rate, loss.tokens[kept], loss.values[kept])


def check_rates(runs: Sequence[ConstantBatchRun]) -> None:
    """Raises ValueError if the runs have different learning rates: the law holds at a fixed one."""
    rates = {run.name: run.rate for run in runs if run.rate is not None}
    if rates and max(rates.values()) > min(rates.values()) * (1 + 1e-6):
        listing = ", ".join(f"{name}: {rate:g}" for name, rate in rates.items())
        raise ValueError(f"the law holds at one learning rate, and the runs have several ({listing}); --any_rate fits")


_MAY_DIFFER = ("global_batch_size", "micro_batch_size", "num_workers", "pin_memory", "cache_dir", "lr")


def check_settings(paths: Sequence[str | Path]) -> None:
    """Raises ValueError if runs that have a `config.yaml` differ in their model or data: their curves then say nothing
    about batch sizes."""
    from lit_interns1.reports import RunDirectory

    first: tuple[str, dict[str, Any]] | None = None
    for path in paths:
        run = RunDirectory(path)
        if not run.config_file.is_file():
            continue
        settings = run.settings()
        name, expected = first = first or (Path(path).name, settings)
        for key in sorted(settings.keys() | expected.keys()):
            if key.split(".")[-1] not in _MAY_DIFFER and settings.get(key) != expected.get(key):
                raise ValueError(
                    f"the runs differ in more than their batch size: {key} is {expected.get(key)!r} in {name} and "
                    f"{settings.get(key)!r} in {Path(path).name}"
                )


def artefact_of(table: BatchSizeTable, runs: Sequence[ConstantBatchRun], metric: str) -> dict[str, Any]:
    """What is written: the table, the law in tokens (None where fewer than two losses have a B_opt), and the runs."""
    from lit_interns1.optim.batch_schedules import ARTEFACT_FORMAT

    law = None
    if sum(row.b_opt_bound == "none" for row in table.rows) >= 2:
        schedule = table.schedule_law()
        law = {"p": schedule.p, "q": schedule.q, "residual_std": schedule.residual_std}
    return {
        "format": ARTEFACT_FORMAT,
        "unit": "tokens per optimizer step",
        "metric": metric,
        "law": law,
        "table": table.to_dict(),
        "runs": [{"name": run.name, "batch": run.batch, "rate": run.rate} for run in runs],
    }


def table_lines(table: BatchSizeTable) -> list[str]:
    """The table as Markdown."""
    lines = [
        "| loss | B_min | B_opt | E_min | S_opt | residual | runs | fit |", "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    marks = {"none": "", "upper": "≤ ", "lower": "≥ "}
    for row in table.rows:
        b_min = f"{marks[row.b_min_bound]}{row.b_min:,.0f}{_interval(row.b_min_interval)}"
        b_opt = f"{marks[row.b_opt_bound]}{row.b_opt:,.0f}{_interval(row.b_opt_interval)}"
        lines.append(
            f"| {row.loss:.4f} | {b_min} | {b_opt} | {row.e_min:,.0f} | {row.s_opt:,.0f} | {row.residual:.4f} | "
            f"{row.num_runs} | {row.method} |"
        )
    return lines


def _interval(ends: tuple[float, float]) -> str:
    return f" [{ends[0]:,.0f}, {ends[1]:,.0f}]" if all(map(math.isfinite, ends)) else ""


def fit_law(
    runs: Sequence[str | Path],
    out: str | Path = "batch-size-law",
    metric: str = "train/loss",
    any_rate: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Fits the law and writes `law.json`, `law.md` and three pictures into `out`.

    Args:
        runs: Run directories, each at its own constant batch size.
        out: Directory to write to.
        metric: Name of the loss in the runs' metrics.
        any_rate: Also fit runs of different learning rates.
        options: Of `fit_batch_size_table`.

    Returns:
        What stands in `law.json`, with NaN where the file has null.

    Raises:
        ValueError: For runs that are unsuitable; the message names them.
    """
    from lit_interns1.laws import fit_batch_size_table
    from lit_interns1.reports import save_figure
    from lit_interns1.reports.batch_size_figures import batch_size_figure, crossing_figure, token_step_figure

    found = [read_run(path, metric) for path in runs]
    check_settings(runs)
    if not any_rate:
        check_rates(found)
    table = fit_batch_size_table(
        [round(run.batch) for run in found], [run.tokens_N for run in found], [run.loss_N for run in found], **options
    )
    artefact = artefact_of(table, found, metric)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(without_nan(artefact), indent=2, allow_nan=False)
    (folder / "law.json").write_text(text + "\n", encoding="utf-8")
    lines = table_lines(table)
    law = artefact["law"]
    lines += [
        "",
        f"ln B = {law['p']:.3f} + {law['q']:.3f} ln D" if law else "no law: B_opt is bracketed at too few losses",
    ]
    (folder / "law.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    save_figure(crossing_figure(table), folder / "loss.png")
    save_figure(token_step_figure(table), folder / "tokens_over_steps.png")
    save_figure(batch_size_figure(table), folder / "batch_size.png")
    return artefact


def run(arguments: Sequence[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser("lit-interns1 batch-size-law", description="B_opt and B_min over the loss")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories, each at its own constant batch size")
    parser.add_argument("--out", default="batch-size-law", help="directory to write to (default: %(default)s)")
    parser.add_argument("--metric", default="train/loss", help="name of the loss (default: %(default)s)")
    parser.add_argument("--targets", type=float, nargs="+", help="target losses; default: spread over the runs")
    parser.add_argument("--num_targets", type=int, default=12, help="how many, if --targets is not given")
    parser.add_argument("--skip_tokens", type=float, default=0.0, help="leave out so many tokens at the start")
    parser.add_argument(
        "--continuity", choices=("c1", "c0", "none"), default="c1", help="how the branches of E(S) join"
    )
    parser.add_argument("--bootstrap", type=int, default=200, help="samples for the intervals (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples")
    parser.add_argument("--any_rate", action="store_true", help="also fit runs of different learning rates")
    options = vars(parser.parse_args(list(arguments)))
    try:
        fit_law(**options)
    except (OSError, ValueError) as error:
        print(f"lit-interns1 batch-size-law: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print((Path(options["out"]) / "law.md").read_text(encoding="utf-8"), end="")
    print(f"\nwritten to {options['out']}: law.json, law.md, loss.png, tokens_over_steps.png, batch_size.png")

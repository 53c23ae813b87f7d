"""Runs on different mixtures: read from run directories or from one file, and grouped into those that one law may fit.

    {"runs": [{"name": "a", "tokens": 6e5, "proportions": {"english": 0.4, "code": 0.6}, "losses": {"english": 4.1}}]}
    name,tokens,proportion/english,proportion/code,loss/english                                       the same as CSV

A run directory says its proportions by the weights of the sources in `config.yaml`, and its losses by the last
`val/loss/{source}`.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_interns1.data.sources import TextSource
from lit_interns1.reports import RunDirectory
from lit_interns1.reports.layout import key_regex
from lit_interns1.training.units import with_unit

LOSS = "val/loss/{source}"
SAME_TOKENS = 0.01
"""Tokens of runs in one group differ by this share at most."""
_MAY_DIFFER = ("micro_batch_size", "num_workers", "pin_memory", "cache_dir")


@dataclass(frozen=True)
class MixtureRun:
    """One run.

    Attributes:
        name: Name of the run.
        proportions: Share of each domain; sums to 1.
        losses: Validation loss by validation set, nats per token.
        tokens: Consumed tokens at that validation; None if nobody says.
        settings: Model and data by dotted name, without mixture and seed; empty for runs of a file.
        steps_after: Optimizer steps between the validation and the last thing that was logged.
    """

    name: str
    proportions: dict[str, float]
    losses: dict[str, float]
    tokens: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    steps_after: int = 0


@dataclass(frozen=True)
class RunGroup:
    """Runs of one network, one budget and one validation set, which differ in their mixture.

    Attributes:
        runs: To fit.
        held_out: To predict.
        label: What tells the group from the others; empty if it is the only one.
    """

    runs: list[MixtureRun]
    held_out: list[MixtureRun]
    label: str


def read_runs(paths: Sequence[str | Path]) -> list[MixtureRun]:
    """Reads run directories, and JSON and CSV files of runs.

    Raises:
        RunDirectoryError: If a run directory lacks its configuration or its metrics.
        ValueError: If proportions or losses are missing or malformed; the message names the run.
        OSError: If a file cannot be read.
    """
    found: list[MixtureRun] = []
    for path in map(Path, paths):
        if path.is_file() and path.suffix in (".json", ".csv"):
            found += _of_json(path) if path.suffix == ".json" else _of_csv(path)
        elif path.is_file():
            raise ValueError(f"{path} is neither a run directory nor a .json or .csv file of runs")
        else:
            found.append(_of_directory(path))
    return found


def group_runs(runs: Sequence[MixtureRun], held_out: Sequence[MixtureRun] = ()) -> list[RunGroup]:
    """Puts runs together that differ in their mixture and in nothing else that a loss depends on, but for the seed.

    Args:
        runs: To fit.
        held_out: To predict; each joins the group of its kind.

    Raises:
        ValueError: If runs of a group have other domains or validation sets, or a held-out run has no group.
    """
    groups: list[tuple[list[MixtureRun], list[MixtureRun]]] = []
    for run in runs:
        place = next((group for group in groups if _alike(group[0][0], run)), None)
        if place is None:
            groups.append(([run], []))
        else:
            place[0].append(run)
    for run in held_out:
        place = next((group for group in groups if _alike(group[0][0], run)), None)
        if place is None:
            nearest = min((group[0][0] for group in groups), key=lambda other: len(_differences([other, run])))
            raise ValueError(
                f"the held-out run {run.name} is like none of the runs that are fitted; "
                f"{nearest.name} has another {', '.join(_differences([nearest, run]))}"
            )
        place[1].append(run)
    for members, others in groups:
        _check_names([*members, *others])
    keys = _differences([group[0][0] for group in groups])
    return [RunGroup(members, others, _label(members[0], keys)) for members, others in groups]


# -- reading -----------------------------------------------------------------------------------------------------------


def _of_directory(path: Path) -> MixtureRun:
    run = RunDirectory(path)
    settings = run.settings()
    key = next((name for name in settings if name.split(".")[-1] == "sources" and name.startswith("data.")), None)
    sources = settings.get(key) if key else None
    if not isinstance(sources, list):
        raise ValueError(f"{run.config_file} has no list data.init_args.sources: give its mixture in a file of runs")
    entries = [source if isinstance(source, dict) else {"path": source} for source in sources]
    weights: dict[str, float] = {}
    for entry in entries:
        name = str(entry.get("name") or TextSource(str(entry.get("path"))).display_name)
        weight = entry.get("weight")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not weight > 0:
            raise ValueError(
                f"the run {path} gives the source {name!r} the weight {weight!r}: without weights the mixture follows "
                "from the sizes of the sources, which its config.yaml does not hold; give it in a file of runs"
            )
        weights[name] = weights.get(name, 0.0) + float(weight)
    losses, tokens, after = _last_losses(run)
    plain = {name: value for name, value in settings.items() if not _free(name, settings)}
    without_weight = [{name: value for name, value in entry.items() if name != "weight"} for entry in entries]
    plain[str(key)] = sorted(without_weight, key=repr)
    total = sum(weights.values())
    proportions = {name: weight / total for name, weight in weights.items()}
    losses = {name: losses[name] for name in [*(name for name in weights if name in losses), *losses]}
    return MixtureRun(path.name, proportions, losses, tokens, plain, after)


def _free(name: str, settings: Mapping[str, Any]) -> bool:
    """Whether runs of a group may differ in a setting. The seed of the data chooses what is held back."""
    last = name.split(".")[-1]
    if last == "seed":
        return name.startswith("model.") or bool(settings.get("data.init_args.validation_sources"))
    return last in _MAY_DIFFER


def _last_losses(run: RunDirectory) -> tuple[dict[str, float], float | None, int]:
    """Losses of the last validation, consumed tokens by then, and optimizer steps since."""
    metrics = run.metrics()
    series = {match[1]: metrics[name] for name in metrics if (match := re.match(key_regex(LOSS), name))}
    if not series:
        raise ValueError(
            f"the run {run.path} logged no {LOSS}: it takes several validation sources, by validation_fraction or "
            f"validation_sources, and a validation at the end; it logged {', '.join(sorted(metrics))}"
        )
    last = {name: int(values.steps[-1]) for name, values in series.items()}
    if len(set(last.values())) > 1:
        raise ValueError(f"the last losses of the run {run.path} are of different steps: {last}")
    tokens = next(iter(series.values())).tokens
    losses = {name: float(values.values[-1]) for name, values in series.items()}
    after = max(int(values.steps[-1]) for values in metrics.values()) - min(last.values())
    return losses, None if tokens is None else float(tokens[-1]), after


def _of_json(path: Path) -> list[MixtureRun]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    rows = rows.get("runs") if isinstance(rows, dict) else rows
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} must hold a list of runs, or one under 'runs'")
    return [_of_row(row, f"{path}, run {number}") for number, row in enumerate(rows, start=1)]


def _of_csv(path: Path) -> list[MixtureRun]:
    with path.open(encoding="utf-8", newline="") as stream:
        lines = list(csv.DictReader(stream))
    runs = []
    for number, line in enumerate(lines, start=2):
        row: dict[str, Any] = {"proportions": {}, "losses": {}}
        for column, cell in line.items():
            kind, _, name = str(column).partition("/")
            if kind in ("proportion", "loss") and name:
                row["proportions" if kind == "proportion" else "losses"][name] = cell
            elif column in ("name", "tokens"):
                row[column] = cell or None
            else:
                raise ValueError(f"{path}: unknown column {column!r}; there are name, tokens, proportion/…, loss/…")
        runs.append(_of_row(row, f"{path}, line {number}"))
    return runs


def _of_row(row: Mapping[str, Any], where: str) -> MixtureRun:
    values = {}
    for part in ("proportions", "losses"):
        entries = row.get(part)
        if not isinstance(entries, dict) or not entries:
            raise ValueError(f"{where}: {part} must give a number to every name, got {entries!r}")
        values[part] = {str(name): _number(value, f"{where}: {part} of {name!r}") for name, value in entries.items()}
    proportions = values["proportions"]
    if min(proportions.values()) < 0 or abs(sum(proportions.values()) - 1) > 1e-3:
        raise ValueError(f"{where}: proportions must not be negative and sum to 1, got {proportions}")
    tokens = None if row.get("tokens") is None else _number(row["tokens"], f"{where}: tokens")
    name = str(row.get("name") or where)
    return MixtureRun(name, proportions, values["losses"], tokens)


def _number(value: Any, what: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{what} must be a finite number, got {value!r}")
    return number


# -- grouping ----------------------------------------------------------------------------------------------------------


def _alike(first: MixtureRun, second: MixtureRun) -> bool:
    return not _differences([first, second])


def _differences(runs: Sequence[MixtureRun]) -> list[str]:
    """Names of the settings in which runs differ."""
    keys = sorted({key for run in runs for key in run.settings})
    differing = [key for key in keys if any(run.settings.get(key) != runs[0].settings.get(key) for run in runs)]
    tokens = [run.tokens for run in runs]
    known = [value for value in tokens if value is not None]
    if known and (len(known) < len(tokens) or max(known) > min(known) * (1 + SAME_TOKENS)):
        differing.append("tokens")
    return differing


def _label(run: MixtureRun, keys: Sequence[str]) -> str:
    values = {key: run.settings.get(key) for key in keys if key != "tokens"}
    parts = [f"{key.removeprefix('model.').removeprefix('data.')} {value}" for key, value in values.items()]
    if "tokens" in keys:
        parts.append("unknown tokens" if run.tokens is None else f"{with_unit(run.tokens)} tokens")
    return ", ".join(parts)


def _check_names(runs: Sequence[MixtureRun]) -> None:
    """Raises ValueError if runs have other domains or validation sets than the first."""
    first = runs[0]
    for run in runs:
        for what, names, expected in (
            ("domains", run.proportions.keys(), first.proportions.keys()),
            ("validation sets", run.losses.keys(), first.losses.keys()),
        ):
            if names != expected:
                raise ValueError(
                    f"{run.name} has the {what} {', '.join(names)}, and {first.name} has {', '.join(expected)}; "
                    "a domain that a run does not use has the proportion 0"
                )

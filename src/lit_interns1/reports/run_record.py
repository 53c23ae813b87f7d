"""Everything that a page about one run shows, read once from its directory: numbers, events, texts, environment.

Only the metrics are required. What else a run left (expert loads, summary, config, files of W&B) is read if it is
there, and a file that is there but malformed is an error that names it.
"""

from __future__ import annotations

import csv
import difflib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lit_interns1.reports.figures import max_violation
from lit_interns1.reports.run_directory import ExpertLoad, MetricSeries, RunDirectory, RunDirectoryError

_PACKAGES = ("torch", "lightning", "triton", "numpy", "wandb", "tokenizers", "safetensors")
_MACHINE = ("os", "python", "cpu_count", "gpu", "gpu_count", "startedAt")
"""Entries of W&B's metadata that are shown; names of hosts, users and paths are not."""


@dataclass(frozen=True)
class Event:
    """Something that happened in a run.

    Attributes:
        place: Where on the horizontal axis.
        kind: `resumed`, `batch size`, `skipped step` or `not finite`.
        text: In a few words.
    """

    place: float
    kind: str
    text: str


class RunRecord:
    """One run.

    Args:
        path: The run directory.

    Raises:
        RunDirectoryError: If it has no metrics, or one of its files is malformed.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.directory = RunDirectory(path)
        self.name = self.directory.path.resolve().name
        self.metrics = self.directory.metrics()
        self.counts_tokens = all(series.tokens is not None for series in self.metrics.values())
        self.load: ExpertLoad | None = (
            self.directory.expert_load() if self.directory.expert_load_file.exists() else None
        )
        self.summary = _json(self.directory.path / "summary.json")

    def places(self, series: MetricSeries) -> np.ndarray:
        """(N,) where the points of a metric stand: consumed tokens, or steps if the run did not count tokens."""
        return series.tokens if self.counts_tokens and series.tokens is not None else series.steps.astype(np.float64)

    @property
    def references(self) -> dict[str, float]:
        """Losses to compare with, in nats per token, by name; from `summary.json`."""
        losses = self.summary.get("losses") or {}
        return {name: float(value) for name, value in losses.items() if name != "model"}

    def headline(self) -> dict[str, str]:
        """The figures that one looks at first, by name."""
        found: dict[str, str] = {}
        if tokens := self.metrics.get("train/tokens"):
            found["consumed tokens"] = f"{int(tokens.values.max()):,}"
        found["optimizer steps"] = f"{1 + max(int(series.steps[-1]) for series in self.metrics.values()):,}"
        if (train := _finite(self.metrics.get("train/loss"))) is not None:
            found["training loss, smoothed"] = f"{_last_smooth(train[1]):.4f}"
        if (validation := _finite(self.metrics.get("val/loss"))) is not None:
            found["last validation loss"] = f"{validation[1][-1]:.4f}"
            found["best validation loss"] = f"{validation[1].min():.4f}"
        if (rate := _finite(self.metrics.get("throughput/tokens_per_second"))) is not None:
            found["tokens per second, median"] = f"{np.median(rate[1]):,.0f}"
        if (mfu := _finite(self.metrics.get("throughput/mfu"))) is not None:
            found["MFU, median"] = f"{np.median(mfu[1]):.1%}"
        if self.load is not None:
            found["MaxVio, last"] = f"{max_violation(self.load.load[-1]).mean():.3f}"
        if (skipped := _finite(self.metrics.get("stability/skipped_steps"))) is not None:
            found["skipped steps"] = f"{int(skipped[1].max()):,}"
        if molecules := self.summary.get("molecules"):
            found["valid molecules"] = f"{sum(bool(m['valid']) for m in molecules)} of {len(molecules)}"
        return found

    def events(self) -> list[Event]:
        """What happened, in the order of the horizontal axis: continuations, switches, skipped steps, NaN."""
        events: list[Event] = []
        clock = self.metrics.get("train/tokens")
        for number, file in enumerate(self.directory.metrics_files[1:], start=1):
            if (step := _first_step(file)) is not None:
                place = float(np.interp(step, clock.steps, clock.values)) if self.counts_tokens and clock else step
                events.append(Event(place, "resumed", f"continuation {number} begins at step {step:,}"))
        if (series := self.metrics.get("batch/switch")) is not None:
            for place, rows in zip(self.places(series), series.values):
                events.append(Event(float(place), "batch size", f"{rows:,.0f} rows per optimizer step from here"))
        if (series := self.metrics.get("stability/skipped_steps")) is not None:
            places = self.places(series)
            for at in np.flatnonzero(np.diff(series.values, prepend=0) > 0):
                events.append(Event(float(places[at]), "skipped step", f"{series.values[at]:,.0f} skipped so far"))
        for name, series in self.metrics.items():
            bad = np.flatnonzero(~np.isfinite(series.values))
            if bad.size:
                text = f"{name} is not finite at {bad.size} of {len(series.values)} points, first at step "
                place = float(self.places(series)[bad[0]])
                events.append(Event(place, "not finite", f"{text}{series.steps[bad[0]]:,}"))
        return sorted(events, key=lambda event: event.place)

    def config_texts(self) -> dict[str, str]:
        """`config.yaml` as it is written; of each continuation, what differs from it."""
        file = self.directory.config_file
        if not file.is_file():
            return {}
        first = _text(file)
        texts = {file.name: first}
        resumed = file.parent.glob("config-resumed-*.yaml")
        for later in sorted(resumed, key=lambda path: (len(path.name), path.name)):
            changes = difflib.unified_diff(first.splitlines(), _text(later).splitlines(), file.name, later.name, n=1)
            texts[later.name] = "\n".join(line.rstrip("\n") for line in changes) or "no difference"
        return texts

    def environment(self) -> dict[str, str]:
        """Versions and hardware as W&B noted them in the run directory; empty if it did not."""
        found: dict[str, str] = {}
        wandb = self.directory.path / "wandb"
        for file in sorted(wandb.glob("*run-*/files/wandb-metadata.json"))[:1]:
            metadata = _json(file)
            found |= {name: str(metadata[name]) for name in _MACHINE if metadata.get(name)}
        for file in sorted(wandb.glob("*run-*/files/requirements.txt"))[:1]:
            versions = dict(re.findall(r"^([\w.-]+)==(\S+)$", _text(file), re.MULTILINE))
            found |= {name: versions[name] for name in _PACKAGES if name in versions}
        return found


def _finite(series: MetricSeries | None) -> tuple[np.ndarray, np.ndarray] | None:
    if series is None or not (finite := np.isfinite(series.values)).any():
        return None
    return series.steps[finite], series.values[finite]


def _last_smooth(values: np.ndarray) -> float:
    """The mean of the last twentieth of the points."""
    return float(values[-max(1, len(values) // 20) :].mean())


def _first_step(file: Path) -> int | None:
    with file.open(encoding="utf-8", newline="") as lines:
        row = next(csv.DictReader(lines), None)
    return int(row["step"]) if row else None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunDirectoryError(f"{file} cannot be read: {error}") from error


def _json(file: Path) -> dict[str, Any]:
    """A mapping; empty if the file is not there."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(_text(file))
    except json.JSONDecodeError as error:
        raise RunDirectoryError(f"{file} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise RunDirectoryError(f"{file} holds no mapping")
    return content

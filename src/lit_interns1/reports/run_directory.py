"""The directory of one run, read back: `config.yaml`, `checkpoints/`, `metrics/`, `pictures/`.

Numbers come from the CSV files that Lightning's CSVLogger writes (one row per logged step, empty cells where a metric
was not logged) and from `metrics/expert_load.npz`. Reading needs neither Lightning nor torch.
"""

from __future__ import annotations

import csv
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

TOKENS = "train/tokens"
"""The metric that counts consumed tokens; it gives every other one its place on the token axis."""


class RunDirectoryError(ValueError):
    """Something in a run directory is missing, empty or malformed; the message names the file."""


class MetricSeries(NamedTuple):
    """One metric over a run, N points.

    Attributes:
        steps: (N,) int64, strictly ascending.
        tokens: (N,) float64, consumed tokens at these steps, interpolated between the steps that logged
            `train/tokens`; None if no step did.
        values: (N,) float64.
    """

    steps: NDArray[np.int64]
    tokens: NDArray[np.float64] | None
    values: NDArray[np.float64]


class ExpertLoad(NamedTuple):
    """Shares of the routed slots, N points in time.

    Attributes:
        tokens: (N,) float64, consumed tokens.
        load: (N, layers, experts) float64, the share of each expert; 1 / experts is perfect balance.
    """

    tokens: NDArray[np.float64]
    load: NDArray[np.float64]


class RunDirectory:
    """Knows where a run keeps what, and reads its metrics.

    Args:
        path: The run directory; it must exist.

    Raises:
        RunDirectoryError: If it does not.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        if not self.path.is_dir():
            raise RunDirectoryError(f"there is no run directory {self.path}")

    @property
    def config_file(self) -> Path:
        """The configuration of the run, `config.yaml`."""
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        """The directory of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def pictures(self) -> Path:
        """The directory of the pictures; it need not exist yet."""
        return self.path / "pictures"

    @property
    def metrics_files(self) -> list[Path]:
        """Every `metrics*.csv` below `metrics/`, oldest first.

        The file of the first attempt lies in `metrics/` itself; those of resumed attempts are numbered, beside it
        (`metrics_2.csv`) or in directories (`resumed-2/metrics.csv`), and are sorted by these numbers.
        """
        folder = self.path / "metrics"
        return sorted(folder.rglob("metrics*.csv"), key=lambda file: _natural_order(file.relative_to(folder)))

    @property
    def expert_load_file(self) -> Path:
        """The expert loads, `metrics/expert_load.npz`; a dense model has none."""
        return self.path / "metrics" / "expert_load.npz"

    def config(self) -> dict[str, Any]:
        """The configuration as it is written, interpolations unresolved.

        Raises:
            RunDirectoryError: If the file is missing or no mapping.
        """
        from omegaconf import OmegaConf

        if not self.config_file.is_file():
            raise RunDirectoryError(f"there is no {self.config_file}")
        try:
            config = OmegaConf.to_container(OmegaConf.load(self.config_file), resolve=False)
        except Exception as error:  # whatever the YAML reader raises
            raise RunDirectoryError(f"{self.config_file} cannot be read: {error}") from error
        if not isinstance(config, dict):
            raise RunDirectoryError(f"{self.config_file} holds no mapping")
        return {str(key): value for key, value in config.items()}

    def settings(self) -> dict[str, Any]:
        """Model and data of the configuration by dotted name: what runs must share to be compared; lists as they are.

        Raises:
            RunDirectoryError: As `config`.
        """
        config = self.config()
        return dict(_leaves({key: config.get(key) for key in ("model", "data")}))

    def metrics(self) -> dict[str, MetricSeries]:
        """Every metric of the run by its key.

        If a step was logged more than once, by a resumed run for instance, its last value counts. A last line that was
        cut off while it was written is left out.

        Raises:
            RunDirectoryError: If there is no CSV file, none holds a value, or one is malformed (file and line named).
        """
        files = self.metrics_files
        if not files:
            raise RunDirectoryError(f"there is no metrics.csv below {self.path / 'metrics'}")
        points: dict[str, dict[int, float]] = {}
        for file in files:
            _read_csv(file, points)
        if not points:
            raise RunDirectoryError(f"no metric has a value in {', '.join(map(str, files))}")
        columns = {name: _columns(by_step) for name, by_step in points.items()}
        clock = columns.get(TOKENS)
        return {
            name: MetricSeries(steps, None if clock is None else np.interp(steps, *clock), values)
            for name, (steps, values) in columns.items()
        }

    def metric(self, name: str) -> MetricSeries:
        """One metric.

        Raises:
            RunDirectoryError: As `metrics`; or if the run logged no such metric, with the names that it did log.
        """
        metrics = self.metrics()
        if name not in metrics:
            raise RunDirectoryError(f"the run {self.path} logged no {name!r}; it logged {', '.join(sorted(metrics))}")
        return metrics[name]

    def expert_load(self) -> ExpertLoad:
        """The expert loads of a mixture-of-experts run.

        Raises:
            RunDirectoryError: If the file is missing, an array is missing or has a wrong shape, there are no points,
                the tokens decrease, or shares are negative, not finite or do not sum to one over the experts.
        """
        file = self.expert_load_file
        if not file.is_file():
            raise RunDirectoryError(f"there is no {file}")
        try:
            with np.load(file, allow_pickle=False) as arrays:
                found = {name: np.asarray(arrays[name], dtype=np.float64) for name in arrays.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise RunDirectoryError(f"{file} cannot be read: {error}") from error
        for name in ("tokens", "load"):
            if name not in found:
                raise RunDirectoryError(f"{file} has no array {name!r}; it has {', '.join(sorted(found)) or 'none'}")
        tokens, load = found["tokens"], found["load"]
        if tokens.ndim != 1 or load.ndim != 3 or len(tokens) != len(load):
            raise RunDirectoryError(
                f"{file}: tokens {tokens.shape} and load {load.shape} are not (N,) and (N, layers, experts)"
            )
        if not load.size:
            raise RunDirectoryError(f"{file}: load {load.shape} is empty")
        if (np.diff(tokens) < 0).any():
            raise RunDirectoryError(f"{file}: tokens decrease")
        if not (np.isfinite(load).all() and load.min() >= 0 and np.allclose(load.sum(-1), 1, atol=1e-3)):
            raise RunDirectoryError(f"{file}: the loads of a layer are not shares that sum to 1")
        return ExpertLoad(tokens, load)


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _leaves(entry, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _natural_order(relative: Path) -> tuple[Any, ...]:
    """Shallow before deep; then text with its numbers compared as numbers, `metrics.csv` before `metrics_2.csv`."""
    pieces = re.split(r"(\d+)", relative.with_suffix("").as_posix())
    return len(relative.parts), [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in pieces]


def _columns(by_step: dict[int, float]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    steps = np.array(sorted(by_step), dtype=np.int64)
    return steps, np.array([by_step[int(step)] for step in steps])


def _read_csv(file: Path, points: dict[str, dict[int, float]]) -> None:
    """Adds the values of one file to `points` (metric -> step -> value); later ones replace earlier ones."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunDirectoryError(f"{file} cannot be read: {error}") from error
    if not text.strip():
        return  # an attempt that ended before its first row
    complete = text.endswith("\n")
    rows = list(csv.reader(text.splitlines()))
    header = rows[0]
    if "step" not in header:
        raise RunDirectoryError(f"{file} has no column 'step'; its columns are {', '.join(header)}")
    if len(set(header)) != len(header):
        raise RunDirectoryError(f"{file} names a column twice: {', '.join(header)}")
    step_column = header.index("step")
    for line, row in enumerate(rows[1:], start=2):
        if not row:
            continue
        if line == len(rows) and not complete:
            continue  # cut off: even a cell that reads as a number may lack digits
        if len(row) != len(header):
            raise RunDirectoryError(f"{file}, line {line}: {len(row)} cells under {len(header)} columns")
        try:
            step = int(row[step_column])
        except ValueError:
            raise RunDirectoryError(f"{file}, line {line}: step {row[step_column]!r} is no whole number") from None
        for name, cell in zip(header, row):
            if cell == "" or name == "step":
                continue
            try:
                points.setdefault(name, {})[step] = float(cell)
            except ValueError:
                raise RunDirectoryError(f"{file}, line {line}: {name} {cell!r} is no number") from None

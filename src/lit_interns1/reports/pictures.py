"""The pictures of a run directory: each one that its metrics allow, as a PNG in `pictures/`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lit_interns1.reports.figures import (
    expert_load_figure,
    learning_rate_figure,
    loss_figure,
    save_figure,
    throughput_figure,
)
from lit_interns1.reports.run_directory import MetricSeries, RunDirectory, RunDirectoryError
from lit_interns1.reports.salience_figures import capability_figure


def draw_pictures(run: RunDirectory, references: Mapping[str, float] | None = None) -> dict[str, Path]:
    """Draws `loss`, `learning_rate`, `throughput`, `expert_load`, `capabilities`, as far as the run recorded them.

    Args:
        run: The run directory.
        references: Losses to compare with, in nats per token, by name (see `loss_figure`).

    Returns:
        The files that were written, by picture.

    Raises:
        RunDirectoryError: If the metrics are missing or malformed, do not count tokens, or hold nothing to draw.
    """
    metrics = run.metrics()
    figures = {}
    train, validation = metrics.get("train/loss"), metrics.get("val/loss")
    if train is not None or validation is not None:
        train_x, train_y = _curve(run, train) if train else ((), ())
        validation_x, validation_y = _curve(run, validation) if validation else ((), ())
        figures["loss"] = loss_figure(train_x, train_y, validation_x, validation_y, references)
    if learning_rate := metrics.get("optim/lr"):
        figures["learning_rate"] = learning_rate_figure(*_curve(run, learning_rate))
    if throughput := metrics.get("throughput/tokens_per_second"):
        figures["throughput"] = throughput_figure(*_curve(run, throughput))
    if run.expert_load_file.exists():
        figures["expert_load"] = expert_load_figure(*run.expert_load())
    scores = {}
    for key, score in metrics.items():
        if key.startswith("salience/") and key.endswith("/predicted_score"):
            tokens, values = _curve(run, score)
            std = metrics.get(key.replace("/predicted_score", "/predicted_std"))
            scores[key.split("/")[1]] = (tokens, values, None if std is None else std.values)
    if scores:
        figures["capabilities"] = capability_figure(scores)
    if not figures:
        raise RunDirectoryError(f"the run {run.path} holds nothing to draw; it logged {', '.join(sorted(metrics))}")
    return {name: save_figure(figure, run.pictures / f"{name}.png") for name, figure in figures.items()}


def _curve(run: RunDirectory, series: MetricSeries) -> tuple[np.ndarray, np.ndarray]:
    if series.tokens is None:
        raise RunDirectoryError(f"the run {run.path} did not log 'train/tokens', so there is no token axis")
    return series.tokens, series.values

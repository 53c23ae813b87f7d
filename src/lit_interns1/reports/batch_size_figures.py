"""Pictures of batch sizes: where loss curves cross, tokens over steps to a loss, batch size over loss, branches."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

from lit_interns1.laws import BatchSizeTable, crossings
from lit_interns1.reports.figures import (
    _INK,
    _REFERENCE_COLOURS,
    _TEXT_SIZE,
    BLUE,
    VERMILLION,
    _cycle,
    _figure,
    _legend,
    _load_matplotlib,
)

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

_COLOURS = (BLUE, VERMILLION, *_REFERENCE_COLOURS)


def crossing_figure(table: BatchSizeTable, title: str = "Loss of constant batch sizes") -> Figure:
    """The smoothed loss of every run over consumed tokens, with dots where curves of neighbouring batch sizes cross."""
    figure, axes = _figure(title, "Training loss (nats per token)")
    for colour, batch, curve in zip(_cycle(_COLOURS, len(table.curves)), table.batches, table.curves, strict=True):
        axes.plot(np.exp(curve.log_tokens_G), curve.loss_G, color=colour, linewidth=1.6, label=_batch(batch))
    for first, second in itertools.pairwise(table.curves):
        for tokens, loss in crossings(first, second):
            axes.plot(tokens, loss, "o", color=_INK, markersize=5, markeredgecolor="white", zorder=5)
    axes.set_xscale("log")
    axes.set_xlabel("Consumed tokens", fontsize=_TEXT_SIZE, color=_INK)
    _engineering(axes.xaxis)
    _legend(axes)
    return figure


def token_step_figure(table: BatchSizeTable, title: str = "Tokens over steps to reach a loss") -> Figure:
    """E(S) at the target losses: a point per run, the fitted curve where there is one, a cross at (S_opt, E_min)."""
    figure, axes = _figure(title, "Tokens E")
    chosen = np.unique(np.linspace(0, len(table.rows) - 1, min(len(table.rows), len(_COLOURS))).round().astype(int))
    batch_B = np.array(table.batches)
    for colour, index in zip(_cycle(_COLOURS, len(chosen)), chosen, strict=True):
        row, fit = table.rows[index], table.fits[index]
        tokens_B = np.array([curve.tokens_to_reach(row.loss) for curve in table.curves])
        steps_B = tokens_B / batch_B
        axes.plot(steps_B, tokens_B, "o", color=colour, markersize=5, label=f"loss {row.loss:.3f}")
        if fit.curve is not None:
            reached = np.isfinite(steps_B)
            steps = np.geomspace(steps_B[reached].min(), steps_B[reached].max(), 200)
            axes.plot(steps, fit.curve.tokens(steps), color=colour, linewidth=1.2)
        if row.b_opt_bound == "none":
            axes.plot(row.s_opt, row.e_min, "x", color=colour, markersize=9, markeredgewidth=2)
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel("Optimizer steps S", fontsize=_TEXT_SIZE, color=_INK)
    _engineering(axes.xaxis)
    _engineering(axes.yaxis)
    _legend(axes)
    return figure


def batch_size_figure(table: BatchSizeTable, title: str = "Batch size over loss") -> Figure:
    """B_opt and B_min over the loss with bootstrap intervals; hollow where only a bound is known."""
    figure, axes = _figure(title, "Tokens per step")
    for name, bound, colour in (("b_opt", "b_opt_bound", VERMILLION), ("b_min", "b_min_bound", BLUE)):
        label = "B_" + name.removeprefix("b_")
        for row in table.rows:
            value, (low, high) = getattr(row, name), getattr(row, f"{name}_interval")
            if np.isfinite(low) and np.isfinite(high):
                axes.plot([row.loss, row.loss], [low, high], color=colour, alpha=0.4, linewidth=2)
            fill = colour if getattr(row, bound) == "none" else "white"
            axes.plot(row.loss, value, "o", color=colour, markerfacecolor=fill, markersize=6)
        axes.plot([], [], "o", color=colour, label=label)
    axes.set_yscale("log")
    axes.invert_xaxis()
    axes.set_xlabel("Training loss (nats per token)", fontsize=_TEXT_SIZE, color=_INK)
    _engineering(axes.yaxis)
    axes.legend(loc="upper left", fontsize=_TEXT_SIZE - 1, labelcolor=_INK, frameon=False)
    return figure


def branch_figure(result: dict[str, Any], title: str = "Branches of one checkpoint") -> Figure:
    """The loss of every branch over its batch size, the band within the tolerance, and the critical batch size.

    Args:
        result: What `lit-interns1 batch-size-branch` writes.
    """
    figure, axes = _figure(title, "Smoothed training loss (nats per token)")
    known = [one for one in result["branches"] if one["loss"] is not None]
    batches, losses = [one["batch"] for one in known], [one["loss"] for one in known]
    best = np.minimum.accumulate(losses)
    axes.fill_between(batches, best, best + result["tolerance"], color=BLUE, alpha=0.15, linewidth=0)
    axes.plot(batches, losses, "o-", color=BLUE, linewidth=1.6, markersize=5)
    mark = "≥ " if result["is_bound"] else ""
    label = f"critical: {mark}{_batch(result['critical_batch'])}"
    axes.axvline(result["critical_batch"], color=VERMILLION, linewidth=1.2, linestyle="--", label=label)
    axes.set_xscale("log")
    axes.set_xticks(batches)
    axes.set_xlabel("Tokens per step", fontsize=_TEXT_SIZE, color=_INK)
    _engineering(axes.xaxis)
    axes.legend(loc="upper left", fontsize=_TEXT_SIZE - 1, labelcolor=_INK, frameon=False)
    return figure


def _engineering(axis: Axis) -> None:
    _load_matplotlib()
    from matplotlib.ticker import EngFormatter, NullFormatter

    axis.set_major_formatter(EngFormatter(sep=""))
    axis.set_minor_formatter(NullFormatter())


def _batch(tokens: float) -> str:
    return f"{tokens:,.0f} tokens per step"

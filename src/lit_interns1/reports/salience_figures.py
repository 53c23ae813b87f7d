"""Pictures of predicted capabilities: scores over a run, and how well a fit predicts recipes it has not seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from lit_interns1.reports.figures import (
    _INK,
    _REFERENCE_COLOURS,
    _TEXT_SIZE,
    _TITLE_SIZE,
    BLUE,
    VERMILLION,
    _cycle,
    _dot,
    _empty_figure,
    _figure,
    _legend,
    _load_matplotlib,
    _plain,
    _points,
    _token_axis,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = (BLUE, VERMILLION, *_REFERENCE_COLOURS)
_MARKERS = "osD^vP"


def capability_figure(
    scores: Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike | None]], title: str = "Predicted capabilities"
) -> Figure:
    """Predicted scores over consumed tokens, with a band of one standard error.

    Args:
        scores: By capability: (N,) consumed tokens, (N,) scores, and (N,) standard errors or None.
        title: What stands above.

    Raises:
        ValueError: If the lengths differ, or there is nothing to draw.
    """
    if not scores:
        raise ValueError("capability_figure has no capability to draw")
    figure, axes = _figure(title, "Predicted score")
    every = []
    for colour, (name, (tokens, score, std)) in zip(_cycle(_COLOURS, len(scores)), scores.items(), strict=True):
        x, y = _points(name, tokens, score, required=True)
        axes.plot(x, y, color=colour, linewidth=2.0, label=name, marker=_dot(x) or "o", markersize=4)
        if std is not None:
            spread = np.nan_to_num(np.asarray(std, dtype=np.float64))
            if spread.shape == x.shape:
                axes.fill_between(x, y - spread, y + spread, color=colour, alpha=0.15, linewidth=0)
        every.append(x)
    _token_axis(axes, np.concatenate(every))
    _legend(axes)
    axes.get_legend().set_loc("best")  # type: ignore[union-attr]
    return figure


def prediction_figure(
    actual: ArrayLike, predictions: Mapping[str, ArrayLike], recipes: ArrayLike, title: str = "Held-out prediction"
) -> Figure:
    """Predicted over actual scores, one panel a predictor, one colour a recipe; on the line they agree.

    Args:
        actual: (M,) scores.
        predictions: (M,) predictions of held-out recipes by name of the predictor.
        recipes: (M,) labels.
        title: What stands above.

    Raises:
        ValueError: If the lengths differ or there is nothing to draw.
    """
    actual_M, recipe_M = np.asarray(actual, dtype=np.float64), np.asarray(recipes).astype(str)
    panels = {name: np.asarray(values, dtype=np.float64) for name, values in predictions.items()}
    if not panels or not actual_M.size or any(v.shape != actual_M.shape for v in [recipe_M, *panels.values()]):
        raise ValueError(
            f"prediction_figure: {actual_M.shape} scores, {recipe_M.shape} recipes and "
            f"{ {name: values.shape for name, values in panels.items()} } predictions do not belong together"
        )
    _load_matplotlib()
    figure = _empty_figure(4.6 * len(panels), 4.8)
    figure.suptitle(title, fontsize=_TITLE_SIZE, color=_INK, fontweight="bold", x=0.02, ha="left")
    shown = np.concatenate([actual_M, *panels.values()])
    margin = 0.06 * (shown.max() - shown.min()) or 0.05
    low, high = shown.min() - margin, shown.max() + margin
    names = list(dict.fromkeys(recipe_M.tolist()))
    for number, (predictor, predicted_M) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), number + 1)
        _plain(axes)
        axes.plot([low, high], [low, high], color=_INK, linewidth=1.0, linestyle=(0, (6, 3)), label="_agree")
        for place, (colour, recipe) in enumerate(zip(_cycle(_COLOURS, len(names)), names, strict=True)):
            of = recipe_M == recipe
            marker = _MARKERS[place % len(_MARKERS)]
            axes.scatter(actual_M[of], predicted_M[of], s=26, color=colour, marker=marker, label=recipe, alpha=0.85)
        axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
        axes.set_title(predictor, fontsize=_TEXT_SIZE, color=_INK, loc="left")
        axes.set_xlabel("Score", fontsize=_TEXT_SIZE, color=_INK)
        if number == 0:
            axes.set_ylabel("Predicted without its recipe", fontsize=_TEXT_SIZE, color=_INK)
            _legend(axes)
            axes.get_legend().set_loc("lower right")  # type: ignore[union-attr]
    return figure

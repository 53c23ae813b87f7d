"""Pictures of mixing laws: predicted over measured losses, and the weighted loss over mixtures.

Three domains are drawn as a triangle: a point at (x, y) = Σ_j r_j · corner_j. Other numbers of domains are drawn one at
a time: r_j = s, and the others share 1 − s as they do in the best mixture. Shapes: M mixtures, K domains, V validation
sets, R bootstrap samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from lit_interns1.laws import MixingLaw, OptimalMixture, percentile_interval
from lit_interns1.laws.transforms import Floats
from lit_interns1.reports.figures import (
    _INK,
    _TEXT_SIZE,
    _TITLE_SIZE,
    BLUE,
    VERMILLION,
    _empty_figure,
    _legend,
    _load_matplotlib,
    _plain,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CORNERS_K2 = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(0.75)]])
_REFERENCE_STYLE: dict[str, Any] = {
    "marker": "D",
    "color": "white",
    "markeredgecolor": _INK,
    "markersize": 9,
    "linestyle": "",
}
_BEST_STYLE: dict[str, Any] = {
    "marker": "*",
    "color": VERMILLION,
    "markeredgecolor": "white",
    "markersize": 18,
    "linestyle": "",
}


def weight_vector(law: MixingLaw, weights: Mapping[str, float] | None = None) -> Floats:
    """(V,) weights that sum to 1; sets that are not named weigh nothing, None = all equal."""
    given = dict.fromkeys(law.targets, 1.0) if weights is None else weights
    weight_V = np.array([given.get(target, 0.0) for target in law.targets], dtype=np.float64)
    normalised_V: Floats = weight_V / weight_V.sum()
    return normalised_V


def weighted_loss(
    law: MixingLaw, proportions: ArrayLike, weights: Mapping[str, float] | None = None
) -> tuple[Floats, Floats]:
    """The weighted mean of the predicted losses.

    Args:
        law: The law.
        proportions: (M, K) or (K,).
        weights: Weight of each validation set, divided by their sum; None = all equal.

    Returns:
        (M,) by the law, and (R, M) by its bootstrap samples.
    """
    weight_V = weight_vector(law, weights)
    place_MK = np.atleast_2d(np.asarray(proportions, dtype=np.float64))
    samples_RMV = np.exp(np.einsum("mk,rvk->rmv", place_MK, law.slope_samples_RVK)) + law.floor_samples_RV[:, None]
    return law.predict(place_MK) @ weight_V, samples_RMV @ weight_V


def predicted_figure(
    law: MixingLaw,
    proportions_MK: Floats,
    losses_MV: Floats,
    held_out: tuple[Floats, Floats] | None = None,
    title: str = "Losses by the mixing law",
) -> Figure:
    """Predicted over measured losses, one panel a validation set; on the line they agree.

    Args:
        law: The law.
        proportions_MK: Mixtures that were fitted.
        losses_MV: Their losses.
        held_out: Proportions and losses of mixtures that were not.
        title: What stands above.
    """
    columns = min(len(law.targets), 4)
    rows = math.ceil(len(law.targets) / columns)
    figure = _empty_figure(max(5.0, 3.8 * columns), 4.0 * rows + 0.4)
    figure.suptitle(title, fontsize=_TITLE_SIZE, color=_INK, fontweight="bold", x=0.02, ha="left")
    sets = [("fitted", BLUE, "o", proportions_MK, losses_MV)]
    if held_out is not None:
        sets.append(("held out", VERMILLION, "D", *held_out))
    for v, target in enumerate(law.targets):
        axes = figure.add_subplot(rows, columns, v + 1)
        _plain(axes)
        shown = [np.concatenate([losses[:, v], law.predict(place)[:, v]]) for *_, place, losses in sets]
        low, high = min(values.min() for values in shown), max(values.max() for values in shown)
        margin = 0.06 * (high - low) or 0.05
        ends = [low - margin, high + margin]
        axes.plot(ends, ends, color=_INK, linewidth=1.0, linestyle=(0, (6, 3)), label="_agree")
        for label, colour, marker, place_MK, loss_MV in sets:
            predicted_MV, (low_MV, high_MV) = law.predict(place_MK), law.interval(place_MK)
            reach_2M = np.stack([predicted_MV[:, v] - low_MV[:, v], high_MV[:, v] - predicted_MV[:, v]])
            axes.errorbar(
                loss_MV[:, v], predicted_MV[:, v], np.nan_to_num(reach_2M).clip(min=0), color=colour, marker=marker,
                markersize=5, markeredgecolor="white", markeredgewidth=0.6, linestyle="", elinewidth=1.0, label=label,
            )  # fmt: skip
        axes.set(xlim=ends, ylim=ends, aspect="equal")
        axes.set_title(f"{target}, R² {law.r_squared_V[v]:.3f}", fontsize=_TEXT_SIZE, color=_INK, loc="left")
        axes.set_xlabel("Measured (nats per token)", fontsize=_TEXT_SIZE, color=_INK)
        if v % columns == 0:
            axes.set_ylabel("Predicted", fontsize=_TEXT_SIZE, color=_INK)
    _legend(figure.axes[0])
    figure.axes[0].get_legend().set_loc("lower right")  # type: ignore[union-attr]
    return figure


def mixture_figure(
    law: MixingLaw,
    best: OptimalMixture,
    proportions_MK: Floats,
    weights: Mapping[str, float] | None = None,
    reference_K: ArrayLike | None = None,
    title: str = "Weighted loss over mixtures",
) -> Figure:
    """The weighted loss that a law predicts: a triangle for three domains, else a panel for each domain.

    Args:
        law: The law.
        best: Its best mixture, a star.
        proportions_MK: Mixtures that were fitted: dots, or the range that is drawn with a full line.
        weights: As `weighted_loss` takes them.
        reference_K: A mixture to compare with, a diamond.
        title: What stands above.
    """
    draw = _triangle if len(law.domains) == 3 else _slices
    return draw(law, best, proportions_MK, weights, reference_K, title)


def _triangle(
    law: MixingLaw,
    best: OptimalMixture,
    proportions_MK: Floats,
    weights: Mapping[str, float] | None,
    reference_K: ArrayLike | None,
    title: str,
) -> Figure:
    _load_matplotlib()
    from matplotlib.ticker import MaxNLocator

    steps = 90
    whole_NK = np.array([(i, j, steps - i - j) for i in range(steps + 1) for j in range(steps + 1 - i)]) / steps
    x_N, y_N = (whole_NK @ _CORNERS_K2).T
    total_N, _ = weighted_loss(law, whole_NK, weights)
    of_runs_M, _ = weighted_loss(law, proportions_MK, weights)
    levels = MaxNLocator(16).tick_values(min(best.total, of_runs_M.min()), of_runs_M.max())
    figure = _empty_figure(7.4, 6.2)
    axes = figure.add_subplot()
    _plain(axes, grid=False)
    filled = axes.tricontourf(x_N, y_N, total_N, levels=levels, cmap="cividis_r", extend="both")
    axes.tricontour(x_N, y_N, total_N, levels=levels[::2], colors="white", linewidths=0.5)
    axes.plot(*(proportions_MK @ _CORNERS_K2).T, "o", color=_INK, markeredgecolor="white", markersize=5, label="runs")
    if reference_K is not None:
        axes.plot(*(np.asarray(reference_K) @ _CORNERS_K2)[:, None], **_REFERENCE_STYLE, label="reference")
    axes.plot(*(np.array(list(best.proportions.values())) @ _CORNERS_K2)[:, None], **_BEST_STYLE, label="best mixture")
    for domain, corner, above in zip(law.domains, _CORNERS_K2, (False, False, True), strict=True):
        axes.annotate(
            f"all {domain}", corner, (0, 6 if above else -6), textcoords="offset points", ha="center",
            va="bottom" if above else "top", fontsize=_TEXT_SIZE, color=_INK,
        )  # fmt: skip
    axes.set(xticks=[], yticks=[], aspect="equal", xlim=(-0.12, 1.12), ylim=(-0.09, 0.95))
    axes.set_title(title, fontsize=_TITLE_SIZE, color=_INK, fontweight="bold", loc="left", pad=10)
    bar = figure.colorbar(filled, ax=axes, shrink=0.75)
    bar.set_label("Predicted loss (nats per token)", fontsize=_TEXT_SIZE, color=_INK)
    bar.ax.tick_params(labelsize=_TEXT_SIZE - 1, colors=_INK, length=0)
    _legend(axes)
    return figure


def _slices(
    law: MixingLaw,
    best: OptimalMixture,
    proportions_MK: Floats,
    weights: Mapping[str, float] | None,
    reference_K: ArrayLike | None,
    title: str,
) -> Figure:
    columns = min(len(law.domains), 4)
    rows = math.ceil(len(law.domains) / columns)
    figure = _empty_figure(max(5.0, 3.4 * columns), 3.4 * rows + 0.4)
    figure.suptitle(title, fontsize=_TITLE_SIZE, color=_INK, fontweight="bold", x=0.02, ha="left")
    best_K = np.array([best.proportions[domain] for domain in law.domains])
    first: Axes | None = None
    for j, domain in enumerate(law.domains):
        axes = figure.add_subplot(rows, columns, j + 1, sharey=first)
        first = first or axes
        _plain(axes)
        low, high = proportions_MK[:, j].min(), proportions_MK[:, j].max()
        shares = np.linspace(low, high, 80)
        total_N, samples_RN = weighted_loss(law, _along(best_K, j, shares), weights)
        if len(samples_RN):
            axes.fill_between(shares, *percentile_interval(samples_RN), color=BLUE, alpha=0.18, linewidth=0)
        axes.plot(shares, total_N, color=BLUE, linewidth=2.0)
        axes.plot([best_K[j]], [best.total], **_BEST_STYLE, label="best mixture")
        if reference_K is not None:
            place_K = np.asarray(reference_K, dtype=np.float64)
            axes.plot([place_K[j]], weighted_loss(law, place_K, weights)[0], **_REFERENCE_STYLE, label="reference")
        axes.set_xlabel(f"Share of {domain}", fontsize=_TEXT_SIZE, color=_INK)
        if j % columns == 0:
            axes.set_ylabel("Predicted loss (nats per token)", fontsize=_TEXT_SIZE, color=_INK)
    _legend(figure.axes[0], "best")
    return figure


def _along(best_K: Floats, j: int, shares: Floats) -> Floats:
    """(N, K): domain j has the shares, and the others what is left, as in the best mixture (evenly if it has none)."""
    others_K = best_K.copy()
    others_K[j] = 0.0
    if others_K.sum() < 1e-9:
        others_K = np.where(np.arange(len(best_K)) == j, 0.0, 1.0)
    place_NK = (1 - shares)[:, None] * others_K / others_K.sum()
    place_NK[:, j] = shares
    return place_NK

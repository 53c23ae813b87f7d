"""What a learning-rate search found: as a file, a table and a picture.

    L(η) = L_min + C (ln η − ln η*)²        η* · exp(±σ),  C (ln 2)² = the cost of a factor of two

Laws over several searches come from `joint_law` (arXiv 2601.05049, Eqs. 2, 4 and 6).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lit_interns1.laws import (
    RateExtrapolation,
    RateLaw,
    RateParabola,
    extrapolate_best_rate,
    fit_rate_law,
    fit_rate_parabola,
)
from lit_interns1.laws.learning_rate import Extension
from lit_interns1.reports.figures import _REFERENCE_COLOURS, _TEXT_SIZE, BLUE, VERMILLION, _figure, _legend
from lit_interns1.training.units import with_unit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SizeCount = Literal["total", "active"]


@dataclass(frozen=True)
class RateSearchResult:
    """The trials of a search.

    Attributes:
        parameters: N, all parameters.
        active_parameters: Those that act on a token.
        first_tokens: Tokens that the run had consumed when the search began.
        tokens: (P,) D, consumed tokens at each probe, those before the search included.
        rates: (R,) learning rates, ascending.
        losses: (R, P) nats per token; NaN where a trial was cut off before.
        stopped: (R,) why a trial was cut off, or None.
        stopped_tokens: (R,) tokens of the trial when it was, or None.
        measure: What the losses are.
        num_points: Rates around the lowest loss that the parabola is fitted to; None: all.
    """

    parameters: int
    active_parameters: int
    first_tokens: int
    tokens: tuple[int, ...]
    rates: tuple[float, ...]
    losses: tuple[tuple[float, ...], ...]
    stopped: tuple[str | None, ...]
    stopped_tokens: tuple[int | None, ...]
    measure: str
    num_points: int | None = 5

    def losses_at(self, probe: int) -> tuple[float, ...]:
        """(R,) losses at a probe."""
        return tuple(row[probe] for row in self.losses)

    def parabola(self, probe: int = -1) -> RateParabola | None:
        """The parabola at a probe, the longest by default; None with fewer than three finite losses."""
        losses = self.losses_at(probe)
        if sum(map(math.isfinite, losses)) < 3:
            return None
        return fit_rate_parabola(self.rates, losses, self.num_points)

    def best_rate(self, probe: int = -1) -> float:
        """η* of the parabola if the rates bracket it, else the rate with the lowest loss; NaN if all diverged."""
        parabola = self.parabola(probe)
        if parabola is not None and self.is_bracketed(probe):
            return parabola.best_rate
        losses = np.array(self.losses_at(probe))
        return self.rates[int(np.nanargmin(losses))] if np.isfinite(losses).any() else math.nan

    def is_bracketed(self, probe: int = -1) -> bool:
        """Whether the best rate is the minimum of a parabola, between the rates that were tried."""
        return self.open_side(probe) == "none"

    def open_side(self, probe: int = -1) -> Extension | None:
        """Where rates are missing to bracket the minimum; None with fewer than three finite losses.

        A minimum above the highest rate with a loss, where the next rate up has diverged, is on the right, too.
        """
        parabola = self.parabola(probe)
        if parabola is None:
            return None
        finite = [rate for rate, loss in zip(self.rates, self.losses_at(probe), strict=True) if math.isfinite(loss)]
        if parabola.extension == "none" and max(finite) < min(parabola.best_rate, self.rates[-1]):
            return "right"
        return parabola.extension

    def extrapolate(self, target_tokens: float) -> RateExtrapolation:
        """The best rate of a longer run, by L(D) per rate (three probes or more).

        Raises:
            ValueError: If there are fewer probes, or fewer than three rates that reached them all.
        """
        if len(self.tokens) < 3:
            raise ValueError(
                f"an extrapolation to {target_tokens:g} tokens needs three horizons or more, got {len(self.tokens)}"
            )
        return extrapolate_best_rate(self.tokens, self.rates, self.losses, target_tokens)

    # -- file ----------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Writes JSON: the trials, and for readers the best rate at each probe."""
        values = asdict(self)
        values["best"] = [self._summary(probe) for probe in range(len(self.tokens))]
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(_without_nan(values), indent=1) + "\n", encoding="utf-8")

    def _summary(self, probe: int) -> dict[str, Any]:
        parabola = self.parabola(probe)
        return {
            "tokens": self.tokens[probe],
            "rate": self.best_rate(probe),
            "bracketed": self.is_bracketed(probe),
            "log_rate_std": math.nan if parabola is None else parabola.log_rate_std,
            "loss": math.nan if parabola is None else parabola.best_loss,
            "factor_two_cost": math.nan if parabola is None else parabola.penalty(2.0),
        }

    @classmethod
    def load(cls, path: str | Path) -> RateSearchResult:
        """Reads what `save` wrote.

        Raises:
            ValueError: If the file is missing or holds something else.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            del values["best"]
            values["losses"] = tuple(tuple(math.nan if x is None else x for x in row) for row in values["losses"])
            for name in ("tokens", "rates", "stopped", "stopped_tokens"):
                values[name] = tuple(values[name])
            return cls(**values)
        except (OSError, TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is no result of a learning-rate search: {error}") from error

    # -- for readers ---------------------------------------------------------------------------------------------------

    def table(self) -> tuple[list[str], list[list[Any]]]:
        """Column names and one row per rate."""
        columns = ["rate", *(f"loss at {with_unit(tokens)}" for tokens in self.tokens), "diverged", "reason"]
        rows = zip(self.rates, self.losses, self.stopped, strict=True)
        return columns, [[rate, *losses, reason is not None, reason or ""] for rate, losses, reason in rows]

    def text(self) -> str:
        """The table and the recommended rate with its interval."""
        lines = [f"{'rate':>10}" + "".join(f"{'D = ' + with_unit(tokens):>14}" for tokens in self.tokens)]
        for rate, losses, reason in zip(self.rates, self.losses, self.stopped, strict=True):
            cells = "".join(f"{loss:14.4f}" if math.isfinite(loss) else f"{'—':>14}" for loss in losses)
            lines.append(f"{rate:10.3g}{cells}" + (f"  cut off: {reason}" if reason else ""))
        lines += [self.verdict(probe) for probe in range(len(self.tokens))]
        return "\n".join(lines)

    def verdict(self, probe: int) -> str:
        """One line about a probe: the best rate, its interval, the cost of a factor of two."""
        parabola, where = self.parabola(probe), f"D = {with_unit(self.tokens[probe])}"
        rate, side = self.best_rate(probe), self.open_side(probe)
        if parabola is None or side != "none":
            hint = "" if side is None else f"; the minimum lies to the {side}"
            return f"{where}: best of the rates tried {rate:.3g} (not bracketed{hint})"
        std = parabola.log_rate_std
        band = f", one sigma {rate * math.exp(-std):.3g} … {rate * math.exp(std):.3g}" if math.isfinite(std) else ""
        cost = f"a factor of 2 off costs {parabola.penalty():.4f} nats per token"
        return f"{where}: best rate {rate:.3g}{band}; {cost}"


def next_rate(result: RateSearchResult, step: float) -> float | None:
    """The rate to try next so that the minimum at the longest probe is bracketed; None if it is.

    Args:
        result: The trials so far.
        step: Ratio of neighbouring rates.

    One step beyond the end that the parabola points to. Where the next rate up has diverged, the geometric mean of it
    and the highest rate that has not, down to a ratio of 1.1. With fewer than three finite losses: one step down.
    """
    losses = np.array(result.losses_at(-1))
    rates = np.array(result.rates)
    finite = np.isfinite(losses)
    parabola = result.parabola()
    if parabola is None:
        return float(rates.min() / step)
    side = result.open_side()
    if side == "left":
        return float(rates.min() / step) if parabola.rates_R[0] <= rates.min() else None
    highest = float(rates[finite].max())
    if side == "none" or parabola.rates_R[-1] < highest:
        return None
    diverged = rates[~finite & (rates > highest)]
    if not diverged.size:
        return highest * step
    return math.sqrt(highest * diverged.min()) if diverged.min() / highest > 1.1 else None


def joint_law(results: Sequence[RateSearchResult], count: SizeCount = "total") -> RateLaw:
    """ln η* = ln K + a ln N + b ln D over every bracketed optimum of several searches.

    Args:
        results: Searches of different sizes.
        count: What N counts.

    Raises:
        ValueError: If they hold fewer than three optima, two sizes or two token counts.
    """
    points = [
        (size_of(result, count), result.tokens[probe], result.best_rate(probe))
        for result in results
        for probe in range(len(result.tokens))
        if result.is_bracketed(probe)
    ]
    columns = np.array(points, dtype=np.float64).reshape(-1, 3)
    return fit_rate_law(columns[:, 0], columns[:, 1], columns[:, 2])


def nearest_optimum(
    results: Sequence[RateSearchResult], target: tuple[float, float], count: SizeCount = "total"
) -> tuple[RateSearchResult, int]:
    """The search and the probe whose (N, D) is nearest to a target, in logarithms; bracketed ones go first.

    Args:
        results: Searches, at least one.
        target: N and D.
        count: What N counts.
    """
    places = [(result, probe) for result in results for probe in range(len(result.tokens))]
    bracketed = [(result, probe) for result, probe in places if result.is_bracketed(probe)]
    return min(
        bracketed or places,
        key=lambda place: math.hypot(
            math.log(size_of(place[0], count) / target[0]), math.log(place[0].tokens[place[1]] / target[1])
        ),
    )


def size_of(result: RateSearchResult, count: SizeCount) -> int:
    """N of a search."""
    return result.active_parameters if count == "active" else result.parameters


def rate_search_figure(result: RateSearchResult, title: str = "Learning-rate search") -> Figure:
    """Loss over learning rate: the trials at every probe, their parabolas, and what diverged.

    Args:
        result: The search.
        title: What stands above.
    """
    figure, axes = _figure(title, "Loss (nats per token)")
    rates = np.array(result.rates)
    colours = [BLUE, *_REFERENCE_COLOURS]
    values: list[float] = []
    for probe in reversed(range(len(result.tokens))):
        losses, parabola = np.array(result.losses_at(probe)), result.parabola(probe)
        colour = colours[(len(result.tokens) - 1 - probe) % len(colours)]
        axes.plot(rates, losses, "o", color=colour, markersize=6, label=f"{with_unit(result.tokens[probe])} tokens")
        values += losses[np.isfinite(losses)].tolist()
        if parabola is None or not parabola.curvature > 0:
            continue
        ends = [*parabola.rates_R, parabola.best_rate] if result.is_bracketed(probe) else parabola.rates_R
        fine = np.geomspace(min(ends), max(ends), 100)
        axes.plot(fine, parabola(fine), color=colour, linewidth=1.6)
        if result.is_bracketed(probe):
            axes.plot(parabola.best_rate, parabola.best_loss, "|", color=colour, markersize=18, markeredgewidth=2)
    bottom, top = (min(values), max(values)) if values else (0.0, 1.0)
    margin = 0.08 * (top - bottom) or 0.1
    axes.set_ylim(bottom - margin, top + 2 * margin)
    diverged = [rate for rate, reason in zip(result.rates, result.stopped, strict=True) if reason]
    if diverged:
        axes.plot(diverged, [top + margin] * len(diverged), "x", color=VERMILLION, markersize=8, label="cut off")
    axes.set_xscale("log")
    axes.set_xticks(rates, [f"{rate:.2g}" for rate in rates])
    axes.minorticks_off()
    axes.set_xlabel("Learning rate", fontsize=_TEXT_SIZE)
    _legend(axes, loc="best")
    return figure


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""From runs at several constant batch sizes to B_opt over loss and over tokens (arXiv 2601.05034).

    for each target loss ℓ:   E_b = first D with smoothed L_b(D) ≤ ℓ,   S_b = E_b / b,   then E(S) → B_min, B_opt
    schedule:                 ln B = p + q ln D (+ a ln N)   through the pairs (D, B) = (E_min(ℓ), B_opt(ℓ))

Intervals: the whole chain is repeated on bootstrap samples of the loss curves. A sample is smoothed once more than the
run itself, so where there is little noise all samples may lie on one side of the estimate; the interval is then widened
to hold it. The paper says that its schedule is a fitted function of N and D, not which one: smoothing, the choice of
targets and the form of the schedule are reconstructions. It holds in the constant phase of the learning rate only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from lit_interns1.laws.batch_size import HUBER, BatchSizeFit, Continuity, fit_batch_size_curve, sample_batch_sizes
from lit_interns1.laws.fitter import percentile_interval
from lit_interns1.laws.linear import linear_fit
from lit_interns1.laws.loss_curves import WIDTH, LossCurve, smooth_loss
from lit_interns1.laws.transforms import Floats

Interval = tuple[float, float]


@dataclass(frozen=True)
class BatchSizeRow:
    """One target loss.

    Attributes:
        loss: ℓ, nats per token.
        b_min: B_min, tokens per step.
        b_opt: B_opt, tokens per step.
        e_min: E_min, tokens.
        s_opt: S_opt, steps.
        residual: Root mean square residual of ln E.
        method: See `BatchSizeFit`.
        b_min_bound: See `BatchSizeFit`.
        b_opt_bound: See `BatchSizeFit`.
        num_runs: Runs that reached ℓ.
        b_min_interval: Bootstrap interval, widened to hold `b_min`; NaN if there were no samples.
        b_opt_interval: Likewise.
        e_min_interval: Likewise.
    """

    loss: float
    b_min: float
    b_opt: float
    e_min: float
    s_opt: float
    residual: float
    method: str
    b_min_bound: str
    b_opt_bound: str
    num_runs: int
    b_min_interval: Interval
    b_opt_interval: Interval
    e_min_interval: Interval


@dataclass(frozen=True)
class BatchSizeTable:
    """Rows by falling loss, and how they came about.

    Attributes:
        rows: One per target loss.
        batches: Batch sizes of the runs, tokens per step.
        curves: Smoothed loss of each run; not part of `to_dict`.
        fits: The fit behind each row; not part of `to_dict`.
    """

    rows: tuple[BatchSizeRow, ...]
    batches: tuple[float, ...]
    curves: tuple[LossCurve, ...] = field(default=(), repr=False, compare=False)
    fits: tuple[BatchSizeFit, ...] = field(default=(), repr=False, compare=False)

    def column(self, name: str) -> Floats:
        """A number of every row, by the name of its attribute."""
        return np.array([getattr(row, name) for row in self.rows], dtype=np.float64)

    def batch_for_loss(self, loss: float) -> float:
        """B_opt at a loss: ln B linear in the loss between rows, constant beyond the first and last.

        Rows in which B_opt is only a bound are left out.

        Raises:
            ValueError: If no row has a B_opt.
        """
        found = self._bracketed()
        losses, log_batches = np.array([row.loss for row in found]), np.log([row.b_opt for row in found])
        return float(np.exp(np.interp(-loss, -losses, log_batches)))

    def schedule_law(self) -> BatchSizeSchedule:
        """ln B = p + q ln D through (E_min, B_opt) of the rows; those in which B_opt is only a bound are left out.

        Raises:
            ValueError: If fewer than two rows have a B_opt.
        """
        found = self._bracketed()
        return fit_batch_size_schedule([row.e_min for row in found], [row.b_opt for row in found])

    def _bracketed(self) -> list[BatchSizeRow]:
        found = [row for row in self.rows if row.b_opt_bound == "none"]
        if not found:
            raise ValueError(
                f"in none of the {len(self.rows)} target losses do the batches {list(self.batches)} bracket B_opt: "
                "train smaller or larger ones"
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Rows and batches as plain values, for JSON."""
        return {"rows": [asdict(row) for row in self.rows], "batches": list(self.batches)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BatchSizeTable:
        """The inverse of `to_dict`.

        Raises:
            ValueError: If a key is missing or unknown.
        """
        try:
            rows = []
            for row in values["rows"]:
                intervals = {name: (row[name][0], row[name][1]) for name in row if name.endswith("_interval")}
                rows.append(BatchSizeRow(**{**row, **intervals}))
            return cls(tuple(rows), tuple(values["batches"]))
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"no table of batch sizes: {error}") from None


def fit_batch_size_table(
    batches: ArrayLike,
    tokens: Sequence[ArrayLike],
    losses: Sequence[ArrayLike],
    targets: ArrayLike | None = None,
    num_targets: int = 12,
    continuity: Continuity = "c1",
    width: float = WIDTH,
    skip_tokens: float = 0.0,
    bootstrap: int = 200,
    level: float = 0.95,
    seed: int = 0,
    huber: float | None = HUBER,
) -> BatchSizeTable:
    """Fits E(S) at a grid of target losses.

    Args:
        batches: (B,) tokens per step of each run, all different, B ≥ 3.
        tokens: Consumed tokens of each run's logged points.
        losses: Losses at these points, nats per token.
        targets: Target losses; by default `num_targets` between what all runs went through above and at least three
            runs reached below, evenly spaced over the last tenfold of tokens (in ln D) of the third of these.
        num_targets: See `targets`.
        continuity: See `fit_batch_size_curve`.
        width: See `smooth_loss`.
        skip_tokens: Tokens at the start of every run that are left out (warm-up).
        bootstrap: Samples for the intervals; 0 leaves them out.
        level: Share of the samples inside an interval.
        seed: Seed of the samples.
        huber: See `fit_batch_size_curve`.

    Raises:
        ValueError: If there are fewer than three runs, batches repeat, or a target is outside of what the runs show.
    """
    batches_B = np.asarray(batches, dtype=np.float64)
    if batches_B.ndim != 1 or not len(batches_B) == len(tokens) == len(losses):
        raise ValueError(
            f"{batches_B.shape} batches, {len(tokens)} tokens and {len(losses)} losses must be one per run"
        )
    if np.unique(batches_B).size < max(3, batches_B.size):
        raise ValueError(
            f"need three runs or more, each at its own batch size, got {batches_B.tolist()} tokens per step"
        )
    order = np.argsort(batches_B)
    batches_B = batches_B[order]
    curves = [smooth_loss(tokens[run], losses[run], width, skip_tokens, bootstrap, seed + int(run)) for run in order]
    highest = min(curve.range[0] for curve in curves)
    lowest = sorted(curve.range[1] for curve in curves)[2]
    if targets is None:
        if not lowest < highest:
            raise ValueError(
                f"no loss is common to three runs: all start below {highest:.4g} or end above {lowest:.4g}"
            )
        target_losses = _targets(sorted(curves, key=lambda curve: curve.range[1])[2], highest, num_targets)
    else:
        target_losses = np.sort(np.atleast_1d(np.asarray(targets, dtype=np.float64)))[::-1]
        outside = target_losses[(target_losses > highest) | (target_losses < lowest)]
        if outside.size:
            raise ValueError(
                f"target losses {outside.tolist()} are outside of {lowest:.4g} … {highest:.4g}, between which all runs "
                "start above and three runs or more end below"
            )
    rows, fits = [], []
    for loss in target_losses:
        tokens_B = np.array([curve.tokens_to_reach(loss) for curve in curves])
        reached_B = np.isfinite(tokens_B)
        fit = fit_batch_size_curve(
            tokens_B[reached_B] / batches_B[reached_B], tokens_B[reached_B], continuity, batches_B[~reached_B], huber
        )
        intervals = np.full((3, 2), np.nan)
        if bootstrap:
            tokens_RB = np.stack([curve.sampled_tokens_to_reach(loss) for curve in curves], axis=1)
            samples_R3 = sample_batch_sizes(fit, batches_B, tokens_RB, continuity, huber)
            low_3, high_3 = percentile_interval(samples_R3, level)
            found_3 = [fit.b_min, fit.b_opt, fit.e_min]
            intervals = np.stack([np.minimum(low_3, found_3), np.maximum(high_3, found_3)], axis=1)
        b_min_interval, b_opt_interval, e_min_interval = ((float(low), float(high)) for low, high in intervals)
        fits.append(fit)
        rows.append(
            BatchSizeRow(
                loss=float(loss),
                b_min=fit.b_min,
                b_opt=fit.b_opt,
                e_min=fit.e_min,
                s_opt=fit.s_opt,
                residual=fit.residual,
                method=fit.method,
                b_min_bound=fit.b_min_bound,
                b_opt_bound=fit.b_opt_bound,
                num_runs=int(reached_B.sum()),
                b_min_interval=b_min_interval,
                b_opt_interval=b_opt_interval,
                e_min_interval=e_min_interval,
            )
        )
    return BatchSizeTable(tuple(rows), tuple(map(float, batches_B)), tuple(curves), tuple(fits))


def _targets(curve: LossCurve, highest: float, num_targets: int) -> Floats:
    falling_G = np.minimum.accumulate(curve.loss_G)
    first = curve.log_tokens_G[int((falling_G < highest).argmax())]
    last = curve.log_tokens_G[-1]
    at = np.linspace(max(first, last - np.log(10)), last, num_targets + 2)[1:-1]
    return np.unique(np.interp(at, curve.log_tokens_G, falling_G))[::-1]


@dataclass(frozen=True)
class BatchSizeSchedule:
    """ln B = p + q ln D + a ln N: tokens per step after D consumed tokens.

    Attributes:
        p: Constant.
        q: Exponent of D.
        a: Exponent of N; zero if the law is of one model size.
        residual_std: Of ln B; NaN if the points only just fix the law.
        standard_errors: Of (p, q) or (p, q, a); NaN likewise.
        r_squared: Of the fit in ln B.
    """

    p: float
    q: float
    a: float = 0.0
    residual_std: float = float("nan")
    standard_errors: tuple[float, ...] = ()
    r_squared: float = float("nan")

    def __call__(self, tokens: ArrayLike, parameters: float | None = None) -> Floats:
        """B after `tokens` consumed tokens; a law over model sizes needs `parameters`.

        Raises:
            ValueError: If the law depends on the model's size and `parameters` is not given.
        """
        if self.a and parameters is None:
            raise ValueError("this schedule was fitted over model sizes: give parameters")
        log_size = self.a * np.log(parameters) if self.a and parameters is not None else 0.0
        return np.exp(self.p + self.q * np.log(np.asarray(tokens, dtype=np.float64)) + log_size)


def fit_batch_size_schedule(
    tokens: ArrayLike, batches: ArrayLike, parameters: ArrayLike | None = None, weights: ArrayLike | None = None
) -> BatchSizeSchedule:
    """Fits the schedule by least squares in logarithms.

    Args:
        tokens: (M,) D.
        batches: (M,) B, tokens per step.
        parameters: (M,) N, if the points are of several model sizes.
        weights: (M,) such as 1/σ² of ln B.

    Raises:
        ValueError: If a value is not positive, or the points do not fix the law.
    """
    columns = [
        np.asarray(c, dtype=np.float64) for c in (tokens, batches, *([] if parameters is None else [parameters]))
    ]
    if not all(c.shape == columns[0].shape and (c > 0).all() for c in columns):
        raise ValueError("tokens, batches and parameters must be positive and of one length")
    logs = [np.log(c) for c in columns]
    fit = linear_fit(np.stack([np.ones_like(logs[0]), logs[0], *logs[2:]], axis=1), logs[1], weights)
    p, q, *a = map(float, fit.beta_P)
    errors = tuple(map(float, fit.standard_errors_P))
    return BatchSizeSchedule(p, q, a[0] if a else 0.0, fit.residual_std, errors, fit.r_squared)

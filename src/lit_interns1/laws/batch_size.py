"""Tokens over steps at one target loss, and the batch sizes that follow (arXiv 2601.05034).

    E(S) = B_{−1}/(S − S_min) + B_0      S_min < S ≤ S_1         E: tokens, S: optimizer steps, E/S = B: tokens per step
           C (S − S_opt)² + E_min        S_1 < S ≤ S_2           in the constant-rate phase of warmup-stable-decay
           A_1 S + A_0                   S > S_2
    B_min = A_1: below it the loss is never reached.    B_opt = E_min/S_opt: reaches it with the fewest tokens.

Reconstruction: how the branches join and how they are fitted is not known. `c1` joins values and slopes, which leaves
S_min, S_1, S_opt, E_min, C and A_1 free; `c0` joins values; `none` joins nothing. The fit is to ln E with Huber's loss.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from lit_interns1.laws.fitter import CurveFit, CurveFitter
from lit_interns1.laws.transforms import Floats, Transform, logit, sigmoid

Continuity = Literal["c1", "c0", "none"]
NUM_POINTS: dict[str, int] = {"c1": 6, "c0": 8, "none": 10}
"""Points that the piecewise curve needs; with fewer a parabola is fitted."""
HUBER = 1e-2
"""δ in ln E."""


@dataclass(frozen=True)
class BatchSizeCurve:
    """The ten symbols of E(S).

    Attributes:
        s_min: S_min, steps that no batch size can go below.
        s_1: S_1, end of the first branch.
        s_2: S_2, end of the second branch.
        s_opt: S_opt, steps at the fewest tokens.
        e_min: E_min, the fewest tokens.
        c: C, tokens per step².
        a_1: A_1 = B_min, tokens per step.
        a_0: A_0, tokens.
        b_m1: B_{−1}, tokens · steps.
        b_0: B_0, tokens.
    """

    s_min: float
    s_1: float
    s_2: float
    s_opt: float
    e_min: float
    c: float
    a_1: float
    a_0: float
    b_m1: float
    b_0: float

    @classmethod
    def smooth(cls, s_min: float, s_1: float, s_opt: float, e_min: float, c: float, a_1: float) -> BatchSizeCurve:
        """The curve whose values and slopes join at S_1 and S_2.

        Raises:
            ValueError: Unless 0 < S_min < S_1 < S_opt, C > 0, A_1 > 0 and A_0 > 0 (that is B_opt > B_min).
        """
        if not (0 < s_min < s_1 < s_opt and c > 0 and a_1 > 0):
            raise ValueError(
                f"need 0 < s_min={s_min:g} < s_1={s_1:g} < s_opt={s_opt:g}, c={c:g} > 0 and a_1={a_1:g} > 0"
            )
        theta = np.array([s_min, s_1, s_opt, e_min, c, a_1])
        curve = cls(*map(float, _columns(theta, "c1")))
        if curve.a_0 <= 0:
            raise ValueError(f"a_0 = e_min − a_1·s_opt − a_1²/(4c) = {curve.a_0:g} must be positive: B_opt > B_min")
        return curve

    @property
    def b_min(self) -> float:
        """B_min, tokens per step."""
        return self.a_1

    @property
    def b_opt(self) -> float:
        """B_opt, tokens per step."""
        return self.e_min / self.s_opt

    def tokens(self, steps: ArrayLike) -> Floats:
        """E(S); infinite at S ≤ S_min."""
        with np.errstate(all="ignore"):
            return _piecewise(astuple(self), np.asarray(steps, dtype=np.float64))

    def batch(self, steps: ArrayLike) -> Floats:
        """E(S)/S, tokens per step."""
        return self.tokens(steps) / np.asarray(steps, dtype=np.float64)


@dataclass(frozen=True)
class BatchSizeFit:
    """What the runs of several batch sizes say at one target loss.

    Attributes:
        b_min: B_min, tokens per step.
        b_opt: B_opt, tokens per step.
        e_min: E_min, tokens.
        s_opt: S_opt, steps.
        residual: Root mean square residual of ln E.
        method: `piecewise`; `parabola` with too few points for that; `edge` where the fewest tokens belong to the
            smallest or the largest batch that reached the loss, so that there is no minimum to fit.
        b_min_bound: `upper` if no run failed to reach the loss and too few points show the last branch.
        b_opt_bound: `upper` or `lower` at an edge: the optimum may lie below the smallest or above the largest batch.
        curve: E(S); None unless piecewise.
        fit: The fit behind it, in ln E and `units`; None unless piecewise.
        units: Steps and tokens that `fit` counts in.
    """

    b_min: float
    b_opt: float
    e_min: float
    s_opt: float
    residual: float
    method: Literal["piecewise", "parabola", "edge"]
    b_min_bound: Literal["none", "upper"] = "none"
    b_opt_bound: Literal["none", "upper", "lower"] = "none"
    curve: BatchSizeCurve | None = None
    fit: CurveFit | None = None
    units: tuple[float, float] = (1.0, 1.0)


def fit_batch_size_curve(
    steps: ArrayLike,
    tokens: ArrayLike,
    continuity: Continuity = "c1",
    failed_batches: ArrayLike = (),
    huber: float | None = HUBER,
) -> BatchSizeFit:
    """Fits E(S) at one target loss.

    With fewer points than `NUM_POINTS[continuity]` it fits a parabola through the points around the fewest tokens. A
    run that did not reach the loss within its tokens counts as evidence that its batch is below B_min.

    Args:
        steps: (N,) S of each run that reached the loss, N ≥ 3.
        tokens: (N,) E of each.
        continuity: How the branches join.
        failed_batches: Batch sizes, tokens per step, of runs that did not reach the loss.
        huber: δ in ln E; None is least squares.

    Raises:
        ValueError: If there are fewer than three points, two with the same steps, or a value is not positive.
    """
    if continuity not in NUM_POINTS:
        raise ValueError(f"continuity={continuity!r} must be one of {', '.join(NUM_POINTS)}")
    steps_N, tokens_N = np.asarray(steps, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
    if steps_N.shape != tokens_N.shape or steps_N.ndim != 1 or np.unique(steps_N).size < max(3, steps_N.size):
        raise ValueError(f"steps {steps_N.shape} and tokens {tokens_N.shape} must be three different runs or more")
    if not (np.isfinite(steps_N) & (steps_N > 0) & np.isfinite(tokens_N) & (tokens_N > 0)).all():
        raise ValueError("steps and tokens must be positive and finite")
    order = np.argsort(steps_N)
    steps_N, tokens_N = steps_N[order], tokens_N[order]
    few = _fit_few(steps_N, tokens_N, failed_batches)
    if few.method == "edge" or steps_N.size < NUM_POINTS[continuity]:
        return few
    unit_s, unit_e = (float(np.exp(np.log(values).mean())) for values in (steps_N, tokens_N))
    fitter = _fitter(continuity, huber)
    x_N, y_N = steps_N / unit_s, tokens_N / unit_e
    starts = np.array(list(_starts(x_N, y_N, continuity)))
    fit = fitter.fit(x_N, np.log(y_N), starts)
    curve = BatchSizeCurve(*map(float, _columns(fit.theta_P, continuity) * _units(unit_s, unit_e)))
    residual = float(np.sqrt(np.mean(fit.residuals_N**2)))
    return BatchSizeFit(
        curve.b_min,
        curve.b_opt,
        curve.e_min,
        curve.s_opt,
        residual,
        "piecewise",
        curve=curve,
        fit=fit,
        units=(unit_s, unit_e),
    )


def sample_batch_sizes(
    fit: BatchSizeFit, batches: ArrayLike, tokens: ArrayLike, continuity: Continuity, huber: float | None = HUBER
) -> Floats:
    """B_min, B_opt and E_min of bootstrap samples of the points behind a fit.

    Args:
        fit: The fit of the points themselves; piecewise samples start from it.
        batches: (B,) tokens per step of all runs.
        tokens: (R, B) tokens to the target loss in each sample; NaN where a run does not reach it.
        continuity: That of `fit`.
        huber: That of `fit`.

    Returns:
        (R, 3); NaN where a sample has fewer than three runs that reach the loss.
    """
    batches_B, tokens_RB = np.asarray(batches, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
    reached_RB = np.isfinite(tokens_RB)
    samples_R3 = np.full((len(tokens_RB), 3), np.nan)
    whole_R = reached_RB.sum(axis=1) >= NUM_POINTS[continuity]
    if fit.fit is not None and whole_R.any():
        points_RB = np.where(reached_RB, tokens_RB, fit.e_min)[whole_R]
        unit_s, unit_e = fit.units
        theta_RP, _ = _fitter(continuity, huber).refit(
            points_RB / batches_B / unit_s, np.log(points_RB / unit_e), fit.fit.theta_P, reached_RB[whole_R]
        )
        columns = _columns(theta_RP.T, continuity) * _units(unit_s, unit_e)[:, None]
        samples_R3[whole_R] = np.stack([columns[6], columns[4] / columns[3], columns[4]], axis=1)
    for row in np.flatnonzero(~whole_R if fit.fit is not None else np.ones_like(whole_R)):
        reached_B = reached_RB[row]
        if reached_B.sum() >= 3:
            points = tokens_RB[row, reached_B]
            few = _fit_few(points / batches_B[reached_B], points, batches_B[~reached_B])
            samples_R3[row] = few.b_min, few.b_opt, few.e_min
    return samples_R3


# --- the curve ---------------------------------------------------------------------------------------------------


def _columns(theta: Floats, continuity: Continuity) -> Floats:
    """The ten symbols, in the order of `BatchSizeCurve`, from the free ones of `_Constraints`."""
    if continuity == "none":
        s_min, s_1, s_opt, s_2, e_min, c, a_1, b_m1, a_0, b_0 = theta
    elif continuity == "c0":
        s_min, s_1, s_opt, s_2, e_min, c, a_1, b_m1 = theta
        a_0 = c * (s_2 - s_opt) ** 2 + e_min - a_1 * s_2
        b_0 = c * (s_1 - s_opt) ** 2 + e_min - b_m1 / (s_1 - s_min)
    else:
        s_min, s_1, s_opt, e_min, c, a_1 = theta
        s_2 = s_opt + a_1 / (2 * c)
        a_0 = e_min - a_1 * s_opt - a_1**2 / (4 * c)
        b_m1 = 2 * c * (s_opt - s_1) * (s_1 - s_min) ** 2
        b_0 = c * (s_1 - s_opt) ** 2 + e_min - 2 * c * (s_opt - s_1) * (s_1 - s_min)
    return np.stack([s_min, s_1, s_2, s_opt, e_min, c, a_1, a_0, b_m1, b_0])


def _units(unit_s: float, unit_e: float) -> Floats:
    """What the ten symbols are measured in when steps and tokens are."""
    slope = unit_e / unit_s
    return np.array([unit_s] * 4 + [unit_e, slope / unit_s, slope, unit_e, unit_e * unit_s, unit_e])


def _piecewise(columns: tuple[float, ...] | Floats, steps: Floats) -> Floats:
    s_min, s_1, s_2, s_opt, e_min, c, a_1, a_0, b_m1, b_0 = columns
    early = np.where(steps > s_min, b_m1 / (steps - s_min) + b_0, np.inf)
    middle = c * (steps - s_opt) ** 2 + e_min
    return np.where(steps <= s_1, early, np.where(steps <= s_2, middle, a_1 * steps + a_0))


def _fitter(continuity: Continuity, huber: float | None) -> CurveFitter:
    def log_tokens(theta: Floats, steps_RN: Floats) -> Floats:
        return np.log(_piecewise(_columns(theta, continuity), steps_RN))

    return CurveFitter(log_tokens, _Constraints(continuity), huber, max_iterations=150)


class _Constraints(Transform):
    """0 < S_min < S_1 < S_opt (< S_2); E_min, C, B_{−1}, A_0 > 0; 0 < A_1 < B_opt; A_0 > 0 limits C (c1), A_1 (c0)."""

    def __init__(self, continuity: Continuity) -> None:
        self.continuity = continuity
        names = {
            "c1": ("s_min", "s_1", "s_opt", "e_min", "c", "a_1"),
            "c0": ("s_min", "s_1", "s_opt", "s_2", "e_min", "c", "a_1", "b_m1"),
            "none": ("s_min", "s_1", "s_opt", "s_2", "e_min", "c", "a_1", "b_m1", "a_0", "b_0"),
        }[continuity]
        super().__init__(*names)
        self._steps = 3 if continuity == "c1" else 4

    def _slope_limit(self, theta_RP: Floats) -> Floats:
        """What A_1 must stay below, from the parameters in front of it."""
        s_opt, e_min = theta_RP[..., 2], theta_RP[..., self._steps]
        if self.continuity != "c0":
            return e_min / s_opt
        s_2, c = theta_RP[..., 3], theta_RP[..., 5]
        return np.minimum(e_min / s_opt, (c * (s_2 - s_opt) ** 2 + e_min) / s_2)

    def _curvature_floor(self, theta_RP: Floats) -> Floats:
        """C of c1 has to exceed this for A_0 > 0."""
        s_opt, e_min, a_1 = theta_RP[..., 2], theta_RP[..., 3], theta_RP[..., 5]
        return a_1**2 / (4 * (e_min - a_1 * s_opt))

    def constrained(self, u_RP: Floats) -> Floats:
        """θ of u."""
        theta_RP, cut = np.exp(u_RP), self._steps
        theta_RP[..., :cut] = np.cumsum(theta_RP[..., :cut], axis=-1)
        slope = cut + 2
        theta_RP[..., slope] = sigmoid(u_RP[..., slope]) * self._slope_limit(theta_RP)
        if self.continuity == "c1":
            theta_RP[..., 4] = (1 + theta_RP[..., 4]) * self._curvature_floor(theta_RP)
        if self.continuity == "none":
            theta_RP[..., -1] = u_RP[..., -1]
        return theta_RP

    def free(self, theta_RP: Floats) -> Floats:
        """u of θ."""
        inside_RP, cut = theta_RP.copy(), self._steps
        inside_RP[..., :cut] = np.diff(theta_RP[..., :cut], axis=-1, prepend=0.0)
        if self.continuity == "c1":
            inside_RP[..., 4] = theta_RP[..., 4] / self._curvature_floor(theta_RP) - 1
        slope = cut + 2
        u_RP = np.log(inside_RP)
        u_RP[..., slope] = logit(theta_RP[..., slope] / self._slope_limit(theta_RP))
        if self.continuity == "none":
            u_RP[..., -1] = theta_RP[..., -1]
        return u_RP


# --- starting points and few points ------------------------------------------------------------------------------


def _starts(x_N: Floats, y_N: Floats, continuity: Continuity) -> Iterator[tuple[float, ...]]:
    """Starting points: smooth curves, and with other joins also branches fitted to every division of the points."""
    for smooth in _smooth_starts(x_N, y_N):
        if continuity == "c1":
            yield smooth
        else:
            s_min, s_1, s_2, s_opt, e_min, c, a_1, a_0, b_m1, b_0 = map(float, _columns(np.array(smooth), "c1"))
            yield (s_min, s_1, s_opt, s_2, e_min, c, a_1, b_m1, *((a_0, b_0) if continuity == "none" else ()))
    if continuity == "c1":
        return
    for early, late in itertools.product(range(2, x_N.size - 4), range(5, x_N.size - 1)):
        if late - early < 3:
            continue
        curvature, linear, constant = np.polyfit(x_N[early:late], y_N[early:late], 2)
        if curvature <= 0:
            continue
        s_1, s_2 = (math.sqrt(x_N[i - 1] * x_N[i]) for i in (early, late))
        s_opt = float(np.clip(-linear / (2 * curvature), 1.01 * s_1, 0.99 * s_2))
        e_min = max(float(np.polyval([curvature, linear, constant], s_opt)), 0.5 * y_N.min())
        a_1, a_0 = np.polyfit(x_N[late:], y_N[late:], 1)
        limit = min(e_min / s_opt, (curvature * (s_2 - s_opt) ** 2 + e_min) / s_2)
        a_1, a_0 = np.clip(a_1, 0.05 * limit, 0.95 * limit), max(a_0, 0.05 * e_min)
        for share in (0.5, 0.8, 0.95):
            s_min = share * x_N[0]
            b_m1, b_0 = np.polyfit(1 / (x_N[:early] - s_min), y_N[:early], 1)
            theta = (s_min, s_1, s_opt, s_2, e_min, curvature, a_1, max(b_m1, 1e-3 * y_N[0] * (x_N[0] - s_min)))
            yield theta if continuity == "c0" else (*theta, a_0, b_0)


def _smooth_starts(x_N: Floats, y_N: Floats) -> Iterator[tuple[float, ...]]:
    """From the lowest point and the outer slope: (S_min, S_1, S_opt, E_min, C, A_1)."""
    best = int(y_N.argmin())
    s_opt, e_min = x_N[best], y_N[best]
    b_opt = e_min / s_opt
    a_1 = float(np.clip((y_N[-1] - y_N[-2]) / (x_N[-1] - x_N[-2]), 0.05 * b_opt, 0.95 * b_opt))
    floor = a_1**2 / (4 * (e_min - a_1 * s_opt))
    for share, join, late in itertools.product((0.5, 0.8, 0.95), (0.15, 0.4, 0.75), (1.1, 1.4, 2.5)):
        s_min = share * x_N[0]
        c = max(a_1 / (2 * s_opt * (late - 1)), 1.01 * floor)
        yield s_min, s_min + join * (s_opt - s_min), s_opt, e_min, c, a_1


def _fit_few(steps_N: Floats, tokens_N: Floats, failed_batches: ArrayLike) -> BatchSizeFit:
    """The parabola, or the edge where there is no minimum between the runs."""
    order = np.argsort(steps_N)
    steps_N, tokens_N = steps_N[order], tokens_N[order]
    b_min, b_min_bound = _b_min_of_few(steps_N, tokens_N, failed_batches)
    best = int(tokens_N.argmin())
    if 0 < best < steps_N.size - 1:
        s_opt, e_min, residual = _parabola(steps_N, tokens_N)
        return BatchSizeFit(b_min, e_min / s_opt, e_min, s_opt, residual, "parabola", b_min_bound)
    s_opt, e_min = float(steps_N[best]), float(tokens_N[best])
    bound: Literal["lower", "upper"] = "lower" if best == 0 else "upper"
    return BatchSizeFit(b_min, e_min / s_opt, e_min, s_opt, 0.0, "edge", b_min_bound, bound)


def _parabola(steps_N: Floats, tokens_N: Floats) -> tuple[float, float, float]:
    """S_opt, E_min and the residual of C (S − S_opt)² + E_min through 5, 4 or 3 points around the fewest tokens.

    Only points within one and a half times the fewest tokens count beyond the three: the branch is no wider.
    """
    best = int(tokens_N.argmin())
    for size in (5, 4, 3):
        near = np.argsort(np.abs(np.arange(steps_N.size) - best), kind="stable")[:size]
        near = np.sort(near) if size > 3 else np.array([best - 1, best, best + 1])
        if size > 3 and (near.size < size or (tokens_N[near] > 1.5 * tokens_N[best]).any()):
            continue
        unit_s, unit_e = steps_N[best], tokens_N[best]
        x, y = steps_N[near] / unit_s, tokens_N[near] / unit_e
        curvature, linear, constant = np.polyfit(x, y, 2, w=1 / y)
        s_opt, e_min = -linear / (2 * curvature), constant - linear**2 / (4 * curvature)
        if curvature > 0 and e_min > 0 and steps_N[best - 1] < s_opt * unit_s < steps_N[best + 1]:
            break
    if e_min <= 0:  # points far apart bend below zero: the lowest stands for the minimum
        return float(unit_s), float(unit_e), 0.0
    fitted = np.polyval([curvature, linear, constant], x)
    return float(s_opt * unit_s), float(e_min * unit_e), float(np.sqrt(np.mean(np.log(y / fitted) ** 2)))


def _b_min_of_few(
    steps_N: Floats, tokens_N: Floats, failed_batches: ArrayLike
) -> tuple[float, Literal["none", "upper"]]:
    """B_min without the last branch: every batch that reached the loss is above it, those that failed are below.

    E(S) is convex, so the slope between the two largest S is at most A_1 too.
    """
    smallest = float((tokens_N / steps_N).min())
    failed = np.asarray(failed_batches, dtype=np.float64)
    below = failed[failed < smallest]
    if not below.size:
        return smallest, "upper"
    slope = float((tokens_N[-1] - tokens_N[-2]) / (steps_N[-1] - steps_N[-2]))
    return min(max(slope, float(below.max())), smallest), "none"

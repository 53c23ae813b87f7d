"""How a learning-rate schedule sets the final loss, and the schedule that the law calls best (arXiv 2408.11029).

    L(t) = L_0 + A · S_1(t)^−α − C · S_2(t)
    S_1(t) = Σ_{i ≤ t} η_i                          how far training went
    S_2(t) = Σ_{i ≤ t} m_i,  m_i = λ m_{i−1} + (η_{i−1} − η_i)         how far the rate was annealed, with momentum λ

η_i is the rate of step i. The paper's form; fitted here to ln L with Huber's loss, λ by a search over ln(1 − λ).
Choosing a schedule by such a law is Eq. 2 of Intern-S1 (arXiv 2508.15763 §4.2) as it can be reconstructed: the report
describes it in words. Reconstructed too: rises of the rate before its first maximum (warm-up) count in S_1 only, so
that S_2 starts at zero; and with m_t, S_2(t) = (Σ_{i ≤ t} (η_{i−1} − η_i) − λ m_t) / (1 − λ) needs no double sum.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from lit_interns1.laws.fitter import CurveFit, CurveFitter, percentile_interval
from lit_interns1.laws.power_law import HUBER
from lit_interns1.laws.transforms import Floats, Positive

NAMES = ("irreducible", "amplitude", "exponent", "annealing")


def annealing_sums(rates_T: ArrayLike, momentum: float) -> tuple[Floats, Floats]:
    """S_1 and S_2 after each step, (T,) each, in O(T log(1/(1 − λ))).

    Args:
        rates_T: Learning rate of each step, not negative.
        momentum: λ in [0, 1).

    Raises:
        ValueError: If a rate is negative or not finite, or λ is outside.
    """
    rates_T = np.asarray(rates_T, dtype=np.float64)
    if rates_T.ndim != 1 or not rates_T.size or not (np.isfinite(rates_T) & (rates_T >= 0)).all():
        raise ValueError(f"rates {rates_T.shape} must be a vector of numbers that are finite and not negative")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum={momentum} must lie in [0, 1)")
    fall_T = -np.diff(rates_T, prepend=rates_T[0])
    fall_T[: warmup_steps(rates_T)] = 0.0
    momentum_T, shift, factor = fall_T.copy(), 1, momentum
    while shift < fall_T.size and factor > 1e-18:  # after n rounds m_i holds its 2ⁿ latest falls
        momentum_T[shift:] = momentum_T[shift:] + factor * momentum_T[:-shift]
        shift, factor = 2 * shift, factor**2
    return np.cumsum(rates_T), (np.cumsum(fall_T) - momentum * momentum_T) / (1 - momentum)


def warmup_steps(rates_T: Floats) -> int:
    """Steps until the rate first stops rising."""
    falls = np.flatnonzero(np.diff(rates_T) <= 0)
    return int(falls[0]) + 1 if falls.size else rates_T.size


@dataclass(frozen=True)
class AnnealingCurve:
    """Losses of one run with the rates that it was trained with.

    Attributes:
        rates_T: Learning rate of each optimizer step.
        steps_N: After how many steps the losses were measured, 1 … T.
        losses_N: Nats per token: of a validation set, or of training, smoothed.
    """

    rates_T: Floats
    steps_N: Floats
    losses_N: Floats

    def __post_init__(self) -> None:
        for name in ("rates_T", "steps_N", "losses_N"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.float64))
        if self.steps_N.ndim != 1 or self.steps_N.shape != self.losses_N.shape:
            raise ValueError(f"steps {self.steps_N.shape} and losses {self.losses_N.shape} must be vectors of a length")
        if self.steps_N.size and not (self.steps_N.min() >= 1 and self.steps_N.max() <= self.rates_T.size):
            raise ValueError(
                f"steps {self.steps_N.min():g} … {self.steps_N.max():g} must lie in 1 … {self.rates_T.size}, "
                "the steps that rates are given of"
            )
        if not (np.isfinite(self.losses_N) & (self.losses_N > 0)).all():
            raise ValueError("losses must be positive and finite: leave out what diverged")

    @classmethod
    def of_schedule(
        cls,
        factor: Callable[[float], float],
        peak: float,
        tokens_per_step: float,
        tokens: ArrayLike,
        losses: ArrayLike,
    ) -> AnnealingCurve:
        """A curve over tokens, trained with a schedule over tokens.

        Args:
            factor: Schedule: factor on the peak after so many tokens. A step uses that of the tokens before it.
            peak: Peak learning rate.
            tokens_per_step: Tokens of an optimizer step.
            tokens: (N,) consumed tokens at which losses were measured.
            losses: (N,) nats per token.
        """
        steps_N = np.maximum(np.rint(np.asarray(tokens, dtype=np.float64) / tokens_per_step), 1)
        rates_T = [peak * factor(i * tokens_per_step) for i in range(int(steps_N.max(initial=1)))]
        return cls(np.array(rates_T), steps_N, np.asarray(losses, dtype=np.float64))


@dataclass(frozen=True)
class AnnealingLaw:
    """L = L_0 + A S_1^−α − C S_2.

    Attributes:
        irreducible: L_0, nats per token.
        amplitude: A.
        exponent: α.
        annealing: C, nats per token and unit of S_2.
        momentum: λ per optimizer step.
        samples_R4: (L_0, A, α, C) of the bootstrap samples, λ as it is.
        residual_std: Of ln L around the law.
        largest_sum: Largest S_1 that was fitted.
        peak_range: Smallest and largest peak rate among the curves.
        warnings: What to doubt.
    """

    irreducible: float
    amplitude: float
    exponent: float
    annealing: float
    momentum: float
    samples_R4: Floats
    residual_std: float
    largest_sum: float
    peak_range: tuple[float, float]
    warnings: tuple[str, ...]

    def loss(self, s_1: ArrayLike, s_2: ArrayLike) -> Floats:
        """L at given sums."""
        theta_4 = np.array([self.irreducible, self.amplitude, self.exponent, self.annealing])
        return _loss(theta_4, np.asarray(s_1, dtype=np.float64), np.asarray(s_2, dtype=np.float64))

    def predict(self, rates_T: ArrayLike) -> Floats:
        """(T,) loss after each step of a schedule."""
        return self.loss(*annealing_sums(rates_T, self.momentum))

    def interval(self, s_1: float, s_2: float, level: float = 0.95) -> tuple[float, float]:
        """Where `level` of the bootstrap samples have L at given sums; of the curve, not of one more run."""
        low, high = percentile_interval(_loss(self.samples_R4.T, np.array(s_1), np.array(s_2)), level)
        return float(low), float(high)

    def to_json(self) -> str:
        """The law as JSON text; `from_json` reads it."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return json.dumps({**values, "samples_R4": self.samples_R4.tolist()}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> AnnealingLaw:
        """The law that `to_json` wrote.

        Raises:
            ValueError: If the text is no such law.
        """
        try:
            values = json.loads(text)
            low, high = map(float, values["peak_range"])
            return cls(
                **{name: float(values[name]) for name in (*NAMES, "momentum", "residual_std", "largest_sum")},
                samples_R4=np.asarray(values["samples_R4"], dtype=np.float64).reshape(-1, 4),
                peak_range=(low, high),
                warnings=tuple(map(str, values["warnings"])),
            )
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"this is no annealing law: {error!r}") from error


def fit_annealing_law(
    curves: Sequence[AnnealingCurve],
    momentum: float | None = None,
    huber: float | None = HUBER,
    bootstrap: int = 200,
    seed: int = 0,
) -> AnnealingLaw:
    """Fits L_0, A, α, C and λ to the curves of one model and one batch size.

    Losses within the warm-up are left out: the law does not describe them.

    Args:
        curves: At least one with a decay, and better some with and some without.
        momentum: λ; None searches it between 0.9 and 1 − 10⁻⁴.
        huber: δ in ln L; None is least squares.
        bootstrap: Samples behind the intervals. They resample residuals one by one: those of neighbouring steps are
            alike, so intervals of densely logged curves are too narrow.
        seed: Of the samples.

    Raises:
        ValueError: If there are fewer than six losses after the warm-ups, or no rate ever falls.
    """
    kept = [curve.steps_N > warmup_steps(curve.rates_T) for curve in curves]
    log_loss_N = np.log(np.concatenate([np.empty(0), *(c.losses_N[keep] for c, keep in zip(curves, kept))]))
    if log_loss_N.size < 6:
        raise ValueError(f"{log_loss_N.size} losses after the warm-up are too few for the law's five numbers")
    if not any((np.diff(curve.rates_T[warmup_steps(curve.rates_T) - 1 :]) < 0).any() for curve in curves):
        raise ValueError("no curve has a falling rate: without one the effect of annealing, C, is not determined")

    def fitted(ratio: float) -> tuple[CurveFit, Floats]:
        sums_N2 = np.concatenate(
            [
                np.stack(annealing_sums(curve.rates_T, ratio), axis=1)[curve.steps_N[keep].astype(int) - 1]
                for curve, keep in zip(curves, kept)
            ]
        )
        unit_2 = np.array([np.exp(np.log(sums_N2[:, 0]).mean()), max(np.abs(sums_N2[:, 1]).max(), 1e-300)])
        fitter = CurveFitter(_log_loss, Positive(*NAMES), huber, point_shape=(2,))
        return fitter.fit(sums_N2 / unit_2, log_loss_N, _starts(sums_N2 / unit_2, log_loss_N)), unit_2

    warnings = []
    if momentum is None:
        momentum, at_edge = _best_momentum(lambda ratio: fitted(ratio)[0].cost)
        if at_edge:
            warnings.append(f"the best λ is {momentum:.5g}, an end of the search: the curves do not determine it")
    fit, unit_2 = fitted(momentum)
    scale_4 = np.array([1.0, 1.0, 1.0, 1 / unit_2[1]])
    samples_R4 = fit.bootstrap(bootstrap, seed) if bootstrap else np.empty((0, 4))
    samples_R4, theta_4 = samples_R4 * scale_4, fit.theta_P * scale_4
    samples_R4[:, 1] *= unit_2[0] ** samples_R4[:, 2]
    theta_4[1] *= unit_2[0] ** theta_4[2]
    irreducible, amplitude, exponent, annealing = map(float, theta_4)
    peaks = [float(curve.rates_T.max()) for curve in curves]
    return AnnealingLaw(
        irreducible=irreducible,
        amplitude=amplitude,
        exponent=exponent,
        annealing=annealing,
        momentum=float(momentum),
        samples_R4=samples_R4,
        residual_std=fit.residual_std,
        largest_sum=float((fit.x_N[:, 0] * unit_2[0]).max()),
        peak_range=(min(peaks), max(peaks)),
        warnings=tuple(warnings),
    )


def _loss(theta: Floats, s_1: Floats, s_2: Floats) -> Floats:
    irreducible, amplitude, exponent, annealing = theta
    with np.errstate(divide="ignore"):
        return irreducible + amplitude * s_1**-exponent - annealing * s_2


def _log_loss(theta: Floats, x_RN2: Floats) -> Floats:
    return np.log(_loss(theta, x_RN2[..., 0], x_RN2[..., 1]))


def _starts(sums_N2: Floats, log_loss_N: Floats) -> Floats:
    """For several L_0 and α, the A and C that fit L best."""
    loss_N, starts = np.exp(log_loss_N), []
    for share, exponent in itertools.product((0.5, 0.8, 0.95), (0.3, 0.6, 1.2)):
        design = np.stack([sums_N2[:, 0] ** -exponent, -sums_N2[:, 1]], axis=1)
        amplitude, annealing = np.linalg.lstsq(design, loss_N - share * loss_N.min(), rcond=None)[0]
        low = 1e-3 * loss_N.min()
        starts.append((share * loss_N.min(), max(amplitude, low), exponent, max(annealing, low)))
    return np.array(starts)


def _best_momentum(cost: Callable[[float], float]) -> tuple[float, bool]:
    """λ of the lowest cost by a grid over ln(1 − λ) and golden sections around its best; and whether it is an end."""
    grid = np.linspace(np.log(1e-1), np.log(1e-4), 13)
    costs = [cost(-np.expm1(x)) for x in grid]
    best = int(np.argmin(costs))
    if best in (0, len(grid) - 1):
        return float(-np.expm1(grid[best])), True
    low, high, golden = grid[best + 1], grid[best - 1], (np.sqrt(5) - 1) / 2
    inner = [high - golden * (high - low), low + golden * (high - low)]
    values = [cost(-np.expm1(x)) for x in inner]
    for _ in range(14):
        if values[0] <= values[1]:
            high, inner[1], values[1] = inner[1], inner[0], values[0]
            inner[0] = high - golden * (high - low)
            values[0] = cost(-np.expm1(inner[0]))
        else:
            low, inner[0], values[0] = inner[0], inner[1], values[1]
            inner[1] = low + golden * (high - low)
            values[1] = cost(-np.expm1(inner[1]))
    return float(-np.expm1(inner[int(np.argmin(values))])), False

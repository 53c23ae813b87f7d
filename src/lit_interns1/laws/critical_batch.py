"""Older accounts of the batch size, to compare with: the hyperbola, its critical batch, and the gradient noise scale.

(E/E_min − 1)(S/S_min − 1) = 1,   B_crit = E_min/S_min                          arXiv 1812.06162, Eq. 2.11
B_crit(L) = B* / L^(1/α),   B* = 2·10⁸ tokens, α = 0.21                          arXiv 2001.08361, Eq. 1.4
|G|² = (B |g_B|² − b |g_b|²)/(B − b),   tr Σ = (|g_b|² − |g_B|²)/(1/b − 1/B)     arXiv 1812.06162, App. A.1
B_simple = tr Σ / |G|²                                                          |G|² and tr Σ averaged on their own
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from lit_interns1.laws.fitter import CurveFit, CurveFitter
from lit_interns1.laws.transforms import Bounded, Floats, Joint, Positive


@dataclass(frozen=True)
class Hyperbola:
    """E = E_min S/(S − S_min).

    Attributes:
        s_min: S_min, steps.
        e_min: E_min, tokens.
        fit: The fit behind it, in ln E.
    """

    s_min: float
    e_min: float
    fit: CurveFit

    @property
    def critical_batch(self) -> float:
        """E_min/S_min, tokens per step."""
        return self.e_min / self.s_min

    def tokens(self, steps: ArrayLike) -> Floats:
        """E(S) for S > S_min."""
        steps = np.asarray(steps, dtype=np.float64)
        return self.e_min * steps / (steps - self.s_min)


def fit_hyperbola(steps: ArrayLike, tokens: ArrayLike, huber: float | None = None) -> Hyperbola:
    """Fits the hyperbola to ln E.

    Args:
        steps: (N,) S at the target loss, N ≥ 2.
        tokens: (N,) E.
        huber: δ in ln E; None is least squares.

    Raises:
        ValueError: If there are fewer than two points.
    """
    steps_N, tokens_N = np.asarray(steps, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
    unit_s, unit_e = steps_N.min(), tokens_N.min()

    def log_tokens(theta: Floats, steps_RN: Floats) -> Floats:
        s_min, e_min = theta
        return np.log(e_min) - np.log1p(-s_min / steps_RN)

    fitter = CurveFitter(log_tokens, Joint(Bounded("s_min", low=0.0, high=1.0), Positive("e_min")), huber)
    fit = fitter.fit(steps_N / unit_s, np.log(tokens_N / unit_e), [(share, 1 - share) for share in (0.2, 0.6, 0.9)])
    s_min, e_min = fit.theta_P
    return Hyperbola(float(s_min * unit_s), float(e_min * unit_e), fit)


def kaplan_critical_batch(loss: ArrayLike, scale: float = 2e8, exponent: float = 0.21) -> Floats:
    """B*/L^(1/α): tokens per step at a loss in nats per token."""
    return scale / np.asarray(loss, dtype=np.float64) ** (1 / exponent)


@dataclass(frozen=True)
class NoiseScale:
    """Squared gradient and noise of one sample, or averages of them.

    Attributes:
        squared_gradient: |G|², an unbiased estimate that may be negative.
        noise: tr Σ, of one unit of the batch (a token, if batches are counted in tokens).
    """

    squared_gradient: float
    noise: float

    @property
    def simple(self) -> float:
        """B_simple = tr Σ/|G|², in the unit of the batches; NaN while the estimate of |G|² is not positive."""
        return self.noise / self.squared_gradient if self.squared_gradient > 0 else float("nan")


def noise_scale(squared_norm_small: float, squared_norm_big: float, small_batch: float, big_batch: float) -> NoiseScale:
    """The noise scale from gradients over two batch sizes.

    Args:
        squared_norm_small: |g_b|², averaged over the small batches of the step.
        squared_norm_big: |g_B|².
        small_batch: b, tokens (or whatever unit B_simple is to have).
        big_batch: B, same unit.

    Raises:
        ValueError: Unless 0 < b < B.
    """
    if not 0 < small_batch < big_batch:
        raise ValueError(f"need 0 < small_batch={small_batch} < big_batch={big_batch}")
    squared = (big_batch * squared_norm_big - small_batch * squared_norm_small) / (big_batch - small_batch)
    noise = (squared_norm_small - squared_norm_big) / (1 / small_batch - 1 / big_batch)
    return NoiseScale(squared, noise)


@dataclass
class NoiseScaleAverage:
    """Exponential moving averages of |G|² and tr Σ, each on its own, without the bias of the start.

    Attributes:
        decay: Weight that is left of a value one update later, in [0, 1).
        squared_gradient_sum: Weighted sum of |G|².
        noise_sum: Weighted sum of tr Σ.
        weight: Sum of the weights.
    """

    decay: float = 0.99
    squared_gradient_sum: float = 0.0
    noise_sum: float = 0.0
    weight: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay={self.decay} must lie in [0, 1)")

    def update(self, value: NoiseScale) -> NoiseScale:
        """Takes in one estimate and returns the averages."""
        self.squared_gradient_sum = self.decay * self.squared_gradient_sum + (1 - self.decay) * value.squared_gradient
        self.noise_sum = self.decay * self.noise_sum + (1 - self.decay) * value.noise
        self.weight = self.decay * self.weight + (1 - self.decay)
        return self.value

    @property
    def value(self) -> NoiseScale:
        """The averages; NaN before the first update."""
        if self.weight == 0:
            return NoiseScale(float("nan"), float("nan"))
        return NoiseScale(self.squared_gradient_sum / self.weight, self.noise_sum / self.weight)

"""Other accounts of the batch size: the hyperbola, its critical batch, the gradient noise scale, and branches of a run.

(E/E_min − 1)(S/S_min − 1) = 1,   B_crit = E_min/S_min                          arXiv 1812.06162, Eq. 2.11
B_crit(L) = B* / L^(1/α),   B* = 2·10⁸ tokens, α = 0.21                          arXiv 2001.08361, Eq. 1.4
|G|² = (B |g_B|² − b |g_b|²)/(B − b),   tr Σ = (|g_b|² − |g_B|²)/(1/b − 1/B)     arXiv 1812.06162, App. A.1
B_simple = tr Σ / |G|²                                                          |G|² and tr Σ averaged on their own
B_crit = max {k·B : L_k ≤ L_j + ε for all j < k},   L_k of a branch with batch k·B                arXiv 2505.23971
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


# --- by branching ----------------------------------------------------------------------------------------------------


def smoothed_final_loss(
    tokens: ArrayLike, losses: ArrayLike, start: float, end: float, window: float, weight: float = 0.5
) -> float:
    """The loss at the end of a branch: means over equal windows of tokens, exponentially averaged.

    Losses of single steps would be noisier for small batches than for large ones. Windows of equal tokens hold the same
    rows in every branch, so that their noise is common.

    Args:
        tokens: (N,) consumed tokens at the end of each step, ascending.
        losses: (N,) mean loss of each step.
        start: Consumed tokens where the branch begins.
        end: Consumed tokens up to which the loss counts; all branches must reach it.
        window: Tokens of a window.
        weight: α of m ← α · mean + (1 − α) · m, in (0, 1].

    Returns:
        m after the last whole window; NaN if a loss is.

    Raises:
        ValueError: If there is no whole window, or the losses do not reach from `start` to `end`.
    """
    tokens_N, losses_N = np.asarray(tokens, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if not 0 < weight <= 1:
        raise ValueError(f"weight={weight} must lie in (0, 1]")
    if not 0 < window <= end - start:
        raise ValueError(f"from {start:,.0f} to {end:,.0f} tokens there is no window of {window:,.0f}")
    if not (len(tokens_N) and start < tokens_N[0] and end <= tokens_N[-1]):
        raise ValueError(f"the branch's losses do not reach from {start:,.0f} to {end:,.0f} tokens")
    sums = np.concatenate([[0.0], np.cumsum(losses_N * np.diff(tokens_N, prepend=start))])
    edges = start + window * np.arange(int((end - start) // window) + 1)
    means = np.diff(np.interp(edges, np.concatenate([[start], tokens_N]), sums)) / window
    average = means[0]
    for mean in means[1:]:
        average = weight * mean + (1 - weight) * average
    return float(average)


@dataclass(frozen=True)
class BranchedBatch:
    """The critical batch size of a checkpoint.

    Attributes:
        batch: The largest batch size that loses nothing, tokens per step.
        is_bound: Whether it was the largest that was tried, and the critical one may be larger.
    """

    batch: float
    is_bound: bool


def branched_critical_batch(batches: ArrayLike, losses: ArrayLike, tolerance: float = 0.01) -> BranchedBatch:
    """The largest batch whose loss is within `tolerance` of the loss of every smaller one (arXiv 2505.23971).

    Args:
        batches: (K,) tokens per step, all different; K ≥ 2.
        losses: (K,) smoothed loss at the end of each branch; one that is not finite has diverged.
        tolerance: ε, nats per token.

    Raises:
        ValueError: For fewer than two batches, equal ones, a negative tolerance, or if the smallest batch diverged.
    """
    batches_K, losses_K = np.asarray(batches, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if batches_K.shape != losses_K.shape or np.unique(batches_K).size < max(2, batches_K.size):
        raise ValueError(f"need two batch sizes or more, all different, each with a loss; got {batches_K.tolist()}")
    if tolerance < 0:
        raise ValueError(f"tolerance={tolerance} must not be negative")
    order = np.argsort(batches_K)
    batches_K, losses_K = batches_K[order], np.where(np.isfinite(losses_K), losses_K, np.inf)[order]
    if np.isinf(losses_K[0]):
        raise ValueError(f"the branch of the smallest batch, {batches_K[0]:,.0f} tokens per step, has no finite loss")
    best_before_K = np.minimum.accumulate(losses_K)
    last = int(np.flatnonzero(losses_K <= best_before_K + tolerance)[-1])
    return BranchedBatch(float(batches_K[last]), last == len(batches_K) - 1)

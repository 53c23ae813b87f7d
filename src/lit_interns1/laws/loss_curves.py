"""A smooth loss over consumed tokens, the tokens that reach a loss, and where two curves cross.

    smooth(D) = value at ln D of the line fitted to (ln D_i, L_i) with weights exp(−½ ((ln D_i − ln D)/w)²)

A local line, unlike a running mean, neither lags behind nor bends at the ends of a falling loss. The width w is in
ln D, so that runs of any batch size are smoothed over the same share of their tokens. Nothing is said beyond the ends.
Shapes: N logged points, G points of the grid (w/8 apart in ln D), R bootstrap samples.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from lit_interns1.laws.transforms import Floats

WIDTH = 0.1
"""w: a tenth of the tokens consumed so far."""


@dataclass(frozen=True)
class LossCurve:
    """The smoothed loss of one run.

    Attributes:
        log_tokens_G: ln D of the grid, ascending.
        loss_G: Smoothed loss, nats per token.
        samples_RG: Smoothed losses of bootstrap samples; R is zero unless they were asked for.
    """

    log_tokens_G: Floats
    loss_G: Floats
    samples_RG: Floats

    @property
    def range(self) -> tuple[float, float]:
        """Highest and lowest loss that the run went through."""
        return float(self.loss_G[0]), float(self.loss_G.min())

    def __call__(self, tokens: ArrayLike) -> Floats:
        """The smoothed loss, linear in ln D between grid points; NaN outside the run."""
        x = np.log(np.asarray(tokens, dtype=np.float64))
        return np.interp(x, self.log_tokens_G, self.loss_G, left=np.nan, right=np.nan)

    def tokens_to_reach(self, loss: float) -> float:
        """The first D with a smoothed loss of `loss` or less; NaN if the run starts below or never gets there."""
        return float(_first_reach(self.log_tokens_G, self.loss_G[None], loss)[0])

    def sampled_tokens_to_reach(self, loss: float) -> Floats:
        """`tokens_to_reach` of every bootstrap sample, (R,)."""
        return _first_reach(self.log_tokens_G, self.samples_RG, loss)


def smooth_loss(
    tokens: ArrayLike,
    losses: ArrayLike,
    width: float = WIDTH,
    skip_tokens: float = 0.0,
    bootstrap: int = 0,
    seed: int = 0,
) -> LossCurve:
    """Smooths the logged losses of a run.

    Bootstrap samples are smoothed loss + residuals whose signs flip at random block by block (Wu, Ann. Statist. 14
    (1986) 1261), which keeps the local size of the noise and its correlation within a block of ∛N points.

    Args:
        tokens: (N,) consumed tokens, ascending.
        losses: (N,) nats per token.
        width: w in ln D.
        skip_tokens: Leaves out the points up to here, such as the warm-up of the learning rate.
        bootstrap: R, samples to draw.
        seed: Seed of the samples.

    Raises:
        ValueError: If tokens do not ascend, fewer than eight points are left, or the width is not positive.
    """
    tokens_N, losses_N = np.asarray(tokens, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if tokens_N.shape != losses_N.shape or tokens_N.ndim != 1:
        raise ValueError(f"tokens {tokens_N.shape} and losses {losses_N.shape} must be vectors of one length")
    if not width > 0:
        raise ValueError(f"width={width} (in ln tokens) must be positive")
    if (np.diff(tokens_N) <= 0).any() or (tokens_N <= 0).any():
        raise ValueError("tokens must be positive and ascend: merge repeated points first")
    kept = (tokens_N > skip_tokens) & np.isfinite(losses_N)
    tokens_N, losses_N = tokens_N[kept], losses_N[kept]
    if tokens_N.size < 8:
        raise ValueError(f"{tokens_N.size} points behind skip_tokens={skip_tokens:g} are too few to smooth, need 8")
    x_N = np.log(tokens_N)
    grid_G = np.linspace(x_N[0], x_N[-1], max(9, int(np.ceil((x_N[-1] - x_N[0]) / (width / 8))) + 1))
    bin_N = np.rint((x_N - x_N[0]) / (grid_G[1] - grid_G[0])).astype(np.int64)
    _, bin_N = np.unique(bin_N, return_inverse=True)
    count_B = np.bincount(bin_N).astype(np.float64)
    centre_B = np.bincount(bin_N, x_N) / count_B
    smoother_GB = _local_lines(grid_G, centre_B, count_B, width)
    loss_G = smoother_GB @ (np.bincount(bin_N, losses_N) / count_B)
    samples_RG = np.zeros((bootstrap, grid_G.size))
    if bootstrap:
        rng = np.random.default_rng(seed)
        smooth_N = np.interp(x_N, grid_G, loss_G)
        block_N = np.arange(x_N.size) // max(1, round(x_N.size ** (1 / 3)))
        for row in range(bootstrap):
            sign_N = rng.choice([-1.0, 1.0], size=block_N[-1] + 1)[block_N]
            sample_N = smooth_N + sign_N * (losses_N - smooth_N)
            samples_RG[row] = smoother_GB @ (np.bincount(bin_N, sample_N) / count_B)
    return LossCurve(grid_G, loss_G, samples_RG)


def crossings(first: LossCurve, second: LossCurve) -> list[tuple[float, float]]:
    """Where two loss curves cross within the tokens of both: (tokens, loss) of every change of order."""
    low = max(first.log_tokens_G[0], second.log_tokens_G[0])
    high = min(first.log_tokens_G[-1], second.log_tokens_G[-1])
    x = np.union1d(first.log_tokens_G, second.log_tokens_G)
    x = x[(x >= low) & (x <= high)]
    one = np.interp(x, first.log_tokens_G, first.loss_G)
    ahead = one - np.interp(x, second.log_tokens_G, second.loss_G)
    found = []
    apart = np.flatnonzero(ahead)  # points where the curves touch have no order
    for left, right in itertools.pairwise(apart):
        if ahead[left] * ahead[right] < 0:
            share = ahead[left] / (ahead[left] - ahead[right])
            at = x[left] + share * (x[right] - x[left])
            found.append((float(np.exp(at)), float(np.interp(at, x, one))))
    return found


def _local_lines(grid_G: Floats, x_B: Floats, count_B: Floats, width: float) -> Floats:
    """(G, B) weights with which bin means give the local line at each grid point."""
    distance_GB = x_B - grid_G[:, None]
    # the nearest bin sets the scale: a sparse start stays a mean of its neighbours
    nearest_G = np.abs(distance_GB).min(axis=1, keepdims=True)
    kernel_GB = count_B * np.exp(-0.5 * (distance_GB**2 - nearest_G**2) / width**2)
    s0, s1, s2 = (np.sum(kernel_GB * distance_GB**power, axis=1, keepdims=True) for power in (0, 1, 2))
    # a touch of ridge on the slope: with a single bin in reach the line is that bin's mean
    s2 = s2 + 1e-6 * width**2 * s0
    return kernel_GB * (s2 - s1 * distance_GB) / (s0 * s2 - s1**2)


def _first_reach(x_G: Floats, loss_RG: Floats, loss: float) -> Floats:
    reached_RG = loss_RG <= loss
    first_R = reached_RG.argmax(axis=1)
    known_R = reached_RG.any(axis=1) & (first_R > 0)
    rows, right = np.flatnonzero(known_R), first_R[known_R]
    above, below = loss_RG[rows, right - 1], loss_RG[rows, right]
    at = x_G[right - 1] + (above - loss) / (above - below) * (x_G[right] - x_G[right - 1])
    tokens_R = np.full(len(loss_RG), np.nan)
    tokens_R[rows] = np.exp(at)
    return tokens_R

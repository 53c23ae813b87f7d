"""Scores, their logits, how well they are predicted, and the baseline: a sigmoid of the plain mean loss.

t = −logit((y − y_lo)/(y_hi − y_lo)),    y = y_lo + (y_hi − y_lo) sigmoid(−t)
R² = 1 − Σ(ŷ − y)²/Σ(y − ȳ)²,   MSE,   MAE,   Spearman: correlation of the ranks
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from lit_interns1.laws.fitter import CurveFitter
from lit_interns1.laws.linear import linear_fit
from lit_interns1.laws.transforms import Floats, Unbounded, logit, sigmoid

_CLIP = 1e-3


@dataclass(frozen=True)
class ScoreScale:
    """Scores between chance and the highest one.

    Attributes:
        y_lo: Score of chance.
        y_hi: Highest score.
    """

    y_lo: float
    y_hi: float

    def __post_init__(self) -> None:
        if not self.y_lo < self.y_hi:
            raise ValueError(f"y_lo={self.y_lo} (chance) must be below y_hi={self.y_hi}")

    def logit(self, scores: ArrayLike) -> Floats:
        """t, which grows with the loss; shares of the scale are clipped to 0.001 … 0.999."""
        share = (np.asarray(scores, dtype=np.float64) - self.y_lo) / (self.y_hi - self.y_lo)
        return -logit(np.clip(share, _CLIP, 1 - _CLIP))

    def score(self, logits: ArrayLike) -> Floats:
        """y of t."""
        return self.y_lo + (self.y_hi - self.y_lo) * sigmoid(-np.asarray(logits, dtype=np.float64))


@dataclass(frozen=True)
class ScoreMetrics:
    """How well scores are predicted.

    Attributes:
        r_squared: R²; below zero the mean score predicts better. NaN if the scores do not differ.
        mse: Mean squared error.
        mae: Mean absolute error.
        spearman: Rank correlation; NaN if either side does not differ.
    """

    r_squared: float
    mse: float
    mae: float
    spearman: float


def score_metrics(predicted: ArrayLike, actual: ArrayLike) -> ScoreMetrics:
    """Metrics of predictions (M,) of scores (M,)."""
    guess, truth = np.asarray(predicted, dtype=np.float64), np.asarray(actual, dtype=np.float64)
    if guess.shape != truth.shape or guess.ndim != 1 or not guess.size:
        raise ValueError(f"predicted {guess.shape} and actual {truth.shape} scores must be vectors of one length")
    mse, variance = float(((guess - truth) ** 2).mean()), float(truth.var())
    r_squared = 1 - mse / variance if variance > 0 else float("nan")
    ranks = _ranks(guess), _ranks(truth)
    differ = min(rank.std() for rank in ranks) > 0
    spearman = float(np.corrcoef(*ranks)[0, 1]) if differ else float("nan")
    return ScoreMetrics(r_squared, mse, float(np.abs(guess - truth).mean()), spearman)


def _ranks(values: Floats) -> Floats:
    """Ranks, ties at their mean."""
    _, inverse, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[inverse]


def mean_loss_baseline(mean_losses: ArrayLike, scores: ArrayLike, scale: ScoreScale, groups: ArrayLike) -> Floats:
    """Held-out predictions of y_lo + (y_hi − y_lo) sigmoid(−(s·c + o)) over the mean loss c, (M,).

    Args:
        mean_losses: (M,) mean validation loss, nats.
        scores: (M,) scores.
        scale: Chance and highest score.
        groups: (M,) labels; each is predicted from the others.
    """

    def curve(theta: Floats, loss_RN: Floats) -> Floats:
        slope, offset = theta
        return scale.score(slope * loss_RN + offset)

    loss_M, score_M = np.asarray(mean_losses, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    group_M = np.asarray(groups)
    fitter = CurveFitter(curve, Unbounded("slope", "offset"))
    predicted_M = np.full(score_M.size, np.nan)
    for name in np.unique(group_M):
        rest = group_M != name
        centre = loss_M[rest].mean()
        # with equal losses no slope can be told: the start is a flat line
        line = np.stack([np.ones(rest.sum()), loss_M[rest] - centre], axis=1)
        logits = scale.logit(score_M[rest])
        known = np.ptp(loss_M[rest]) > 0
        offset, slope = linear_fit(line, logits).beta_P if known else (logits.mean(), 0.0)
        starts = [(slope * factor, offset) for factor in (1.0, 0.3, 3.0)]
        fit = fitter.fit(loss_M[rest] - centre, score_M[rest], starts)
        predicted_M[~rest] = fitter.evaluate(fit.u_P[None], loss_M[~rest] - centre)[0]
    return predicted_M

"""Capability salience: token weights that make the validation loss predict a benchmark (arXiv 2506.13216).

    c = Σ_t w_t ℓ_t,   ŷ = y_lo + (y_hi − y_lo) sigmoid(−k (c − c_0)),   w and the sigmoid fitted over checkpoints

Reconstruction: the paper fits both by Levenberg–Marquardt; how it keeps 10⁵ … 10⁷ weights in check with some tens of
checkpoints is not known. Here the weights are a ridge regression of the scores' logits,
    minimise |t − b − L W|² + ρ |W|²,   t = −logit((y − y_lo)/(y_hi − y_lo)),   W = Zᵀ (Z Zᵀ + ρ)⁻¹ (t − t̄) = k w,
ρ is chosen with whole data recipes held out, and Levenberg–Marquardt may polish the result on the scores themselves.
Shapes: M checkpoints, T tokens, G weights that are fitted, R checkpoints of one fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lit_interns1.laws.fitter import CurveFitter
from lit_interns1.laws.salience_scores import ScoreMetrics, ScoreScale, mean_loss_baseline, score_metrics
from lit_interns1.laws.token_losses import TokenLosses
from lit_interns1.laws.transforms import Bounded, Floats, Joint, Unbounded, sigmoid

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class CapabilitySalience:
    """The weights of one capability, and how its loss becomes a score.

    Attributes:
        weights_T: w; Σ|w| = 1 (`abs1`) or Σw = 1 (`sum1`).
        k: Slope of the sigmoid, per nat.
        c_0: Capability loss in the middle of the sigmoid, nats.
        y_lo: Score of chance.
        y_hi: Highest score.
        rho: ρ of the fit.
        logit_covariance_22: Covariance of (offset, slope) of the logits over c.
        logit_std: Root mean square error of the logits of recipes that were held out.
        fit_metrics: On the checkpoints of the fit.
        held_out_metrics: On recipes that were held out.
    """

    weights_T: Floats
    k: float
    c_0: float
    y_lo: float
    y_hi: float
    rho: float
    logit_covariance_22: Floats
    logit_std: float
    fit_metrics: ScoreMetrics
    held_out_metrics: ScoreMetrics

    def capability_loss(self, losses: ArrayLike) -> Floats:
        """c of losses (..., T), nats."""
        return np.asarray(losses, dtype=np.float64) @ self.weights_T

    def predict(self, capability_loss: ArrayLike) -> tuple[Floats, Floats]:
        """Predicted score and its standard error (delta method: coefficients of the sigmoid, held-out scatter)."""
        c = np.asarray(capability_loss, dtype=np.float64)
        share = sigmoid(-self.k * (c - self.c_0))
        row = np.stack([np.ones_like(c), c], axis=-1)
        variance = np.einsum("...i,ij,...j->...", row, self.logit_covariance_22, row) + self.logit_std**2
        span = self.y_hi - self.y_lo
        return self.y_lo + span * share, span * share * (1 - share) * np.sqrt(variance)


@dataclass(frozen=True)
class SalienceFit:
    """A fit with its evaluation.

    Attributes:
        salience: Weights and sigmoid, from all checkpoints.
        rhos: ρ that were tried.
        rho_errors: Mean squared error of held-out recipes at each.
        held_out_M: Score of each checkpoint as predicted without its recipe. With three recipes or more ρ was chosen
            without it too; with two it was chosen on these same predictions.
        recipe_metrics: Held-out metrics by recipe.
        baseline_M: Held-out prediction of a sigmoid of the mean loss.
        baseline_metrics: Its metrics.
        polished: Whether Levenberg–Marquardt on the scores did better on held-out recipes, and was kept.
    """

    salience: CapabilitySalience
    rhos: Floats
    rho_errors: Floats
    held_out_M: Floats
    recipe_metrics: dict[str, ScoreMetrics]
    baseline_M: Floats
    baseline_metrics: ScoreMetrics
    polished: bool


def fit_salience(
    losses: Any,
    scores: ArrayLike,
    recipes: ArrayLike,
    y_lo: float = 0.0,
    y_hi: float = 1.0,
    rhos: ArrayLike | None = None,
    prior: Literal["zero", "uniform"] = "zero",
    nonneg: bool = False,
    normalise: Literal["abs1", "sum1"] = "abs1",
    pool: ArrayLike | None = None,
    polish: bool = False,
) -> SalienceFit:
    """Fits the weights of one capability and evaluates them on recipes that were held out.

    Args:
        losses: (M, T) loss of each checkpoint at each validation token, nats; read in blocks, see `TokenLosses`.
        scores: (M,) benchmark score of each checkpoint.
        recipes: (M,) label of the data recipe of each checkpoint, two different ones or more.
        y_lo: Score of chance.
        y_hi: Highest score.
        rhos: Candidates for ρ; by default 1e-5 … 10 times the mean eigenvalue of Z Zᵀ, half a decade apart.
        prior: What a large ρ pulls the weights to: `zero`, or `uniform` weights with a fitted slope (the mean loss).
        nonneg: Keeps weights at zero or above (prior `zero` only).
        normalise: Σ|w| = 1, or Σw = 1.
        pool: (T,) groups of tokens that share one weight: sample numbers, vocabulary ids, classes.
        polish: Try Levenberg–Marquardt on the scores, with y_hi free below the given one (prior `zero`, not `nonneg`).

    Raises:
        ValueError: If shapes do not fit, values are not finite, there are fewer than two recipes or four checkpoints,
            options exclude each other, or Σw ≤ 0 under `sum1`.
    """
    if prior not in ("zero", "uniform") or normalise not in ("abs1", "sum1"):
        raise ValueError(f"prior={prior!r} must be zero or uniform, normalise={normalise!r} abs1 or sum1")
    if prior == "uniform" and (nonneg or polish):
        raise ValueError(f"prior='uniform' goes without nonneg={nonneg} and polish={polish}")
    if nonneg and polish:
        raise ValueError("nonneg=True goes without polish=True: the polish does not keep weights at zero or above")
    data = TokenLosses(losses, pool)
    scale, score_M = ScoreScale(y_lo, y_hi), np.asarray(scores, dtype=np.float64)
    recipe_M = np.asarray(recipes).astype(str)
    if score_M.shape != (data.num_checkpoints,) or recipe_M.shape != score_M.shape or not np.isfinite(score_M).all():
        raise ValueError(
            f"scores {score_M.shape} and recipes {recipe_M.shape} must be one per checkpoint ({data.num_checkpoints}), "
            "scores finite"
        )
    names = np.unique(recipe_M)
    if names.size < 2 or score_M.size < 4:
        raise ValueError(
            f"{score_M.size} checkpoints of {names.size} data recipes: need four of two recipes or more, since "
            "weights are judged on recipes that were held out"
        )
    everyone = np.arange(score_M.size)
    if rhos is None:
        rho_P = np.trace(data.gram_MM) / score_M.size * 10.0 ** np.arange(-5, 1.01, 0.5)
    else:
        rho_P = np.atleast_1d(np.asarray(rhos, dtype=np.float64))
    if not (rho_P > 0).all():
        raise ValueError(f"rhos={rho_P.tolist()} must be positive (losses that never differ leave nothing to fit)")
    ridge = _Ridge(data, scale, score_M, prior, nonneg)

    held_PM = _held_out(ridge, everyone, recipe_M, rho_P)
    rho_errors = ((held_PM - score_M) ** 2).mean(axis=1)
    rho = float(rho_P[rho_errors.argmin()])
    held_M = held_PM[rho_errors.argmin()]
    if names.size > 2 and rho_P.size > 1:  # choose ρ without the recipe that it is judged on
        held_M = held_M.copy()
        for name in names:
            inner = np.flatnonzero(recipe_M != name)
            inner_PM = _held_out(ridge, inner, recipe_M, rho_P)
            chosen = ((inner_PM[:, inner] - score_M[inner]) ** 2).mean(axis=1).argmin()
            held_M[recipe_M == name] = held_PM[chosen, recipe_M == name]

    solution, polished = ridge.solve(everyone, rho), False
    if polish:
        tried_M = np.empty_like(score_M)
        for name in names:
            rows = np.flatnonzero(recipe_M != name)
            tried_M[recipe_M == name] = ridge.polish(rows, rho).scores_M[recipe_M == name]
        polished = bool(((tried_M - score_M) ** 2).mean() < ((held_M - score_M) ** 2).mean())
        if polished:
            solution, held_M = ridge.polish(everyone, rho), tried_M

    weight_T = data.token_weights(solution.weights_G())
    total = float(weight_T.sum() if normalise == "sum1" else np.abs(weight_T).sum())
    if not total > 0:
        raise ValueError(f"the weights add up to {total:.3g}: normalise='sum1' needs a positive sum")
    # logits are linear in c = L w: slope k, and zero at c_0
    c_M = data.project(solution.weights_G()) / total
    c_0 = float((c_M - solution.logits_M / total).mean())
    final_scale = ScoreScale(y_lo, solution.y_hi)
    residual_M = final_scale.logit(held_M) - final_scale.logit(score_M)
    logit_std = float(np.sqrt((residual_M**2).mean()))
    design_M2 = np.stack([np.ones_like(c_M), c_M - c_M.mean()], axis=1)
    shift_22 = np.array([[1.0, -c_M.mean()], [0.0, 1.0]])
    covariance_22 = logit_std**2 * shift_22 @ np.linalg.pinv(design_M2.T @ design_M2) @ shift_22.T
    salience = CapabilitySalience(
        weight_T / total,
        total,
        c_0,
        y_lo,
        solution.y_hi,
        rho,
        covariance_22,
        logit_std,
        score_metrics(solution.scores_M, score_M),
        score_metrics(held_M, score_M),
    )
    by_recipe = {str(name): score_metrics(held_M[recipe_M == name], score_M[recipe_M == name]) for name in names}
    baseline_M = mean_loss_baseline(data.mean_M, score_M, scale, recipe_M)
    return SalienceFit(
        salience, rho_P, rho_errors, held_M, by_recipe, baseline_M, score_metrics(baseline_M, score_M), polished
    )


# --- the regression ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Solution:
    """Logits t̂ = b + L W of all checkpoints, and what W is made of."""

    data: TokenLosses
    rows_R: Rows
    a_R: Floats
    logits_M: Floats
    y_lo: float
    y_hi: float
    slope: float = 0.0  # of the mean loss
    nonnegative_G: Floats | None = None

    @property
    def scores_M(self) -> Floats:
        return ScoreScale(self.y_lo, self.y_hi).score(self.logits_M)

    def weights_G(self) -> Floats:
        if self.nonnegative_G is not None:
            return self.nonnegative_G
        return self.slope * self.data.uniform_G + self.data.combine(self.rows_R, self.a_R)


@dataclass(frozen=True)
class _Ridge:
    data: TokenLosses
    scale: ScoreScale
    score_M: Floats
    prior: str
    nonneg: bool

    def solve(self, rows_R: Rows, rho: float) -> _Solution:
        """The ridge regression on some checkpoints."""
        target_R = self.scale.logit(self.score_M[rows_R])
        mean = target_R.mean()
        bounds = (self.scale.y_lo, self.scale.y_hi)
        if self.nonneg:
            weight_G = self.data.nonnegative_ridge(rows_R, target_R, rho)
            c_M = self.data.project(weight_G)
            logits_M = mean + c_M - c_M[rows_R].mean()
            return _Solution(self.data, rows_R, np.zeros(0), logits_M, *bounds, nonnegative_G=weight_G)
        inner_RR, cross_MR = self.data.kernel(rows_R)
        damped_RR = inner_RR + rho * np.eye(rows_R.size)
        slope, loss_M = 0.0, self.data.mean_M - self.data.mean_M[rows_R].mean()
        if self.prior == "uniform":  # the slope of the mean loss is not penalised: generalised least squares
            weighted_R = np.linalg.solve(damped_RR, loss_M[rows_R])
            slope = float(weighted_R @ (target_R - mean) / (weighted_R @ loss_M[rows_R]))
        a_R = np.linalg.solve(damped_RR, target_R - mean - slope * loss_M[rows_R])
        return _Solution(self.data, rows_R, a_R, mean + slope * loss_M + cross_MR @ a_R, *bounds, slope=slope)

    def polish(self, rows_R: Rows, rho: float, steps: int = 20) -> _Solution:
        """A few Levenberg–Marquardt steps on the scores from the ridge solution, in (v, b, y_hi): |W|² = |v|²."""
        start = self.solve(rows_R, rho)
        inner_RR, cross_MR = self.data.kernel(rows_R)
        eigenvalue, vector = np.linalg.eigh(inner_RR)
        kept = eigenvalue > 1e-12 * eigenvalue[-1]
        root, vector = np.sqrt(eigenvalue[kept]), vector[:, kept]
        y_lo, y_hi = self.scale.y_lo, self.scale.y_hi
        share_R = (start.scores_M[rows_R] - y_lo) / (y_hi - y_lo)
        # ρ weighs errors of logits: in scores they are smaller by the slope of the sigmoid
        penalty = np.sqrt(rho * np.mean(((y_hi - y_lo) * share_R * (1 - share_R)) ** 2))
        known = self.score_M[rows_R]

        def residuals(theta: Floats, _: Floats) -> Floats:
            v_QK, b_Q1, high_Q1 = theta[:-2, :, 0].T, theta[-2], theta[-1]
            logits_QR = b_Q1 + v_QK @ (root[:, None] * vector.T)
            return np.concatenate([y_lo + (high_Q1 - y_lo) * sigmoid(-logits_QR), penalty * v_QK], axis=1)

        lowest = min(max(y_lo, float(known.max())), y_lo + 0.999 * (y_hi - y_lo))
        span = y_hi + 1e-6 * (y_hi - y_lo) - lowest
        parameters = Joint(
            Unbounded(*(f"v_{i}" for i in range(root.size)), "b"), Bounded("y_hi", low=lowest, high=lowest + span)
        )
        target = np.concatenate([known, np.zeros(root.size)])
        begin = np.concatenate([root * (vector.T @ start.a_R), [start.logits_M[rows_R].mean(), lowest + 0.98 * span]])
        fit = CurveFitter(residuals, parameters, max_iterations=steps).fit(np.zeros(target.size), target, begin)
        *v, b, high = fit.theta_P
        a_R = vector @ (np.array(v) / root)
        return _Solution(self.data, rows_R, a_R, b + cross_MR @ a_R, y_lo, min(float(high), y_hi))


def _held_out(ridge: _Ridge, rows: Rows, recipe_M: NDArray[np.str_], rho_P: Floats) -> Floats:
    """(P, M) scores at each ρ of the checkpoints `rows`, each recipe predicted from the others among them."""
    held_PM = np.full((rho_P.size, recipe_M.size), np.nan)
    for name in np.unique(recipe_M[rows]):
        rest = rows[recipe_M[rows] != name]
        left_out = rows[recipe_M[rows] == name]
        for row, rho in enumerate(rho_P):
            held_PM[row, left_out] = ridge.solve(rest, float(rho)).scores_M[left_out]
    return held_PM

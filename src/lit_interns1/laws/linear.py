"""Linear least squares with what a report needs: standard errors, R², predictions with bands, held-out groups.

    β = argmin Σ_n w_n (y_n − x_n·β)²,   cov β = s² (Xᵀ W X)⁻¹,   s² = Σ w r² / (N − P)

Shapes: N points, P coefficients.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from lit_interns1.laws.transforms import Floats


@dataclass(frozen=True)
class LinearFit:
    """Coefficients of a linear fit, with its points.

    Attributes:
        design_NP: The rows x_n.
        y_N: Values.
        weight_N: Weights.
        beta_P: Coefficients.
        covariance_PP: Their covariance; NaN where the points only just fix them.
        residual_std: s; NaN likewise.
        r_squared: 1 − Σ w r² / Σ w (y − ȳ)².
    """

    design_NP: Floats
    y_N: Floats
    weight_N: Floats
    beta_P: Floats
    covariance_PP: Floats
    residual_std: float
    r_squared: float

    @property
    def standard_errors_P(self) -> Floats:
        """(P,) standard errors of the coefficients."""
        return np.sqrt(np.diag(self.covariance_PP))

    def predict(self, design: ArrayLike) -> tuple[Floats, Floats]:
        """Values at rows (M, P) and the standard error of the fitted mean there, (M,) each."""
        design_MP = np.atleast_2d(np.asarray(design, dtype=np.float64))
        variance_M = np.einsum("mp,pq,mq->m", design_MP, self.covariance_PP, design_MP)
        return design_MP @ self.beta_P, np.sqrt(variance_M)

    def leave_one_group_out(self, groups: ArrayLike) -> Floats:
        """What the fit without the group of a point says of it, (N,); NaN where the rest does not fix the fit."""
        labels = np.asarray(groups)
        predicted_N = np.full(self.y_N.size, np.nan)
        for label in np.unique(labels):
            held = labels == label
            rest = self.design_NP[~held]
            if np.linalg.matrix_rank(rest) == self.beta_P.size:
                fit = linear_fit(rest, self.y_N[~held], self.weight_N[~held])
                predicted_N[held] = self.design_NP[held] @ fit.beta_P
        return predicted_N


def linear_fit(design: ArrayLike, y: ArrayLike, weights: ArrayLike | None = None) -> LinearFit:
    """Weighted least squares.

    Args:
        design: (N, P) rows; a column of ones gives an intercept.
        y: (N,) values.
        weights: (N,) such as 1/σ²; all one by default.

    Raises:
        ValueError: If shapes do not fit, values are not finite, or the rows do not fix the coefficients.
    """
    design_NP, y_N = np.asarray(design, dtype=np.float64), np.asarray(y, dtype=np.float64)
    weight_N = np.ones_like(y_N) if weights is None else np.asarray(weights, dtype=np.float64)
    if design_NP.ndim != 2 or y_N.shape != design_NP.shape[:1] or weight_N.shape != y_N.shape:
        raise ValueError(f"design {design_NP.shape}, y {y_N.shape} and weights {weight_N.shape} do not belong together")
    if not (np.isfinite(design_NP).all() and np.isfinite(y_N).all() and (weight_N >= 0).all()):
        raise ValueError("design and y must be finite, weights not negative")
    size = design_NP.shape[1]
    root_N = np.sqrt(weight_N)
    scale_P = np.maximum(np.abs(design_NP).max(axis=0, initial=0.0), 1e-300)
    scaled_NP = root_N[:, None] * design_NP / scale_P
    beta_P, _, rank, _ = np.linalg.lstsq(scaled_NP, root_N * y_N, rcond=1e-12)
    if rank < size:
        raise ValueError(f"{(weight_N > 0).sum()} points fix only {rank} of {size} coefficients")
    residual_N = y_N - design_NP @ (beta_P / scale_P)
    degrees = int((weight_N > 0).sum()) - size
    variance = (weight_N * residual_N**2).sum() / degrees if degrees > 0 else float("nan")
    covariance_PP = variance * np.linalg.inv(scaled_NP.T @ scaled_NP) / np.outer(scale_P, scale_P)
    spread = (weight_N * (y_N - np.average(y_N, weights=weight_N)) ** 2).sum()
    r_squared = 1 - (weight_N * residual_N**2).sum() / spread if spread > 0 else float("nan")
    return LinearFit(
        design_NP, y_N, weight_N, beta_P / scale_P, covariance_PP, float(np.sqrt(variance)), float(r_squared)
    )

"""Robust nonlinear least squares in float64: the one fitter behind every law.

    minimise  Σ_n w_n h_δ(y_n − f(x_n; θ)),   h_δ(r) = ½r² for |r| ≤ δ, else δ(|r| − ½δ)        (Huber 1964)

by Levenberg–Marquardt (Marquardt 1963) with iteratively reweighted residuals, in free parameters u (`transforms`).
Many problems are solved at once. Starting points, bootstrap samples and held-out groups all are such problems: they
differ in start, data or weights only. Shapes: R problems, N points, P parameters; a point x may be a vector, and all
shapes of x below then go on with its own shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lit_interns1.laws.transforms import Floats, Transform

Function = Callable[[Floats, Floats], Floats]
"""f(θ (P, R, 1), x (1 or R, N)) → (R, N): `low, high = theta` gives columns that broadcast over the points.

Of a curve over vectors, x is (1 or R, N, *point_shape).
"""


def percentile_interval(samples: ArrayLike, level: float = 0.95) -> Floats:
    """The central interval of samples along their first axis; samples that are not finite are left out.

    Args:
        samples: (R, ...) values of bootstrap samples.
        level: Share of the samples inside.

    Returns:
        (2, ...) lower and upper end; NaN where no sample is finite.
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level} must lie between 0 and 1")
    values = np.asarray(samples, dtype=np.float64)
    values = np.where(np.isfinite(values), values, np.nan)
    ends = np.full((2, *values.shape[1:]), np.nan)
    known = np.isfinite(values).any(axis=0)
    ends[:, known] = np.nanpercentile(values[:, known], [50 * (1 - level), 50 * (1 + level)], axis=0)
    return ends


class CurveFitter:
    """Fits a curve f(x; θ) to points.

    Args:
        function: f, see `Function`.
        parameters: How θ is kept within its constraints.
        huber: δ in units of y; None is least squares.
        max_iterations: Levenberg–Marquardt steps per problem.
        point_shape: Shape of one x: () for numbers, (K,) for vectors of K.
    """

    def __init__(
        self,
        function: Function,
        parameters: Transform,
        huber: float | None = None,
        max_iterations: int = 300,
        point_shape: tuple[int, ...] = (),
    ) -> None:
        if huber is not None and huber <= 0:
            raise ValueError(f"huber={huber} must be positive, or None for least squares")
        self.function, self.parameters, self.huber, self.max_iterations = function, parameters, huber, max_iterations
        self.point_shape = point_shape

    def fit(self, x: ArrayLike, y: ArrayLike, starts: ArrayLike, weights: ArrayLike | None = None) -> CurveFit:
        """The best fit from several starting points.

        Args:
            x: (N,) where the points are.
            y: (N,) values.
            starts: (S, P) or (P,) starting points; those that break a constraint are left out.
            weights: (N,) not negative, such as 1/σ²; zero leaves a point out.

        Raises:
            ValueError: If shapes do not fit, values are not finite, there are fewer points than parameters, or no
                starting point is feasible.
        """
        x_N, y_N = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
        weight_N = np.ones_like(y_N) if weights is None else np.asarray(weights, dtype=np.float64)
        if y_N.ndim != 1 or weight_N.shape != y_N.shape or not np.isfinite(x_N).all() or not np.isfinite(y_N).all():
            raise ValueError(f"y {y_N.shape} and weights {weight_N.shape} must be finite vectors of one length")
        if x_N.shape != (*y_N.shape, *self.point_shape):
            raise ValueError(f"x {x_N.shape} must be {(*y_N.shape, *self.point_shape)}, one x for each of y")
        if (weight_N < 0).any() or (weight_N > 0).sum() < len(self.parameters.names):
            names = self.parameters.names
            raise ValueError(f"{(weight_N > 0).sum()} weighted points do not fix the {len(names)} parameters {names}")
        u_SP, cost_S, converged_S = self._minimise(self._free(starts), x_N, y_N[None], weight_N[None])
        if not np.isfinite(cost_S).any():
            raise ValueError(f"the curve is not finite at any of the {len(u_SP)} starting points")
        best = int(np.argmin(cost_S))
        return CurveFit(self, x_N, y_N, weight_N, u_SP[best], float(cost_S[best]), bool(converged_S[best]))

    def refit(
        self, x: ArrayLike, y: ArrayLike, starts: ArrayLike, weights: ArrayLike | None = None
    ) -> tuple[Floats, Floats]:
        """R fits at once, each the best from the common starting points.

        Args:
            x: (R, N) or (N,).
            y: (R, N) or (N,).
            starts: (S, P) or (P,).
            weights: (R, N) or (N,).

        Returns:
            θ (R, P) and cost (R,); NaN and infinite where no start was feasible.
        """
        x_RN = self._problems(x)
        given = (y, 1.0 if weights is None else weights)
        y_RN, weight_RN = (np.atleast_2d(np.asarray(array, dtype=np.float64)) for array in given)
        y_RN, weight_RN, _ = np.broadcast_arrays(y_RN, weight_RN, np.empty(x_RN.shape[:2]))
        x_RN = np.broadcast_to(x_RN, (*y_RN.shape, *self.point_shape))
        free_SP = self._free(starts)
        num_problems, num_starts = len(y_RN), len(free_SP)
        u_QP, cost_Q, _ = self._minimise(
            np.tile(free_SP, (num_problems, 1)), *(np.repeat(a, num_starts, axis=0) for a in (x_RN, y_RN, weight_RN))
        )
        cost_RS = cost_Q.reshape(num_problems, num_starts)
        best_R = cost_RS.argmin(axis=1)
        rows_R = np.arange(num_problems)
        theta_RP = self.parameters.constrained(u_QP.reshape(num_problems, num_starts, -1)[rows_R, best_R])
        cost_R = cost_RS[rows_R, best_R]
        theta_RP[~np.isfinite(cost_R)] = np.nan
        return theta_RP, cost_R

    # --- the method ----------------------------------------------------------------------------------------------

    def evaluate(self, u_RP: Floats, x_RN: Floats) -> Floats:
        """f in free parameters, (R, N); x may also be (N,)."""
        with np.errstate(all="ignore"):
            return self.function(self.parameters.constrained(u_RP).T[:, :, None], self._problems(x_RN))

    def jacobian(self, u_RP: Floats, x_RN: Floats) -> Floats:
        """∂f/∂u by central differences, (R, N, P)."""
        num_problems, size = u_RP.shape
        step_RP = np.cbrt(np.finfo(np.float64).eps) * np.maximum(1.0, np.abs(u_RP))
        shift_RPP = step_RP[:, :, None] * np.eye(size)
        both = np.stack([u_RP[:, None] + shift_RPP, u_RP[:, None] - shift_RPP]).reshape(-1, size)
        x_QN = self._problems(x_RN)
        if len(x_QN) > 1:
            x_QN = np.concatenate([np.repeat(x_QN, size, axis=0)] * 2)
        value = self.evaluate(both, x_QN).reshape(2, num_problems, size, -1)
        return np.swapaxes((value[0] - value[1]) / (2 * step_RP[:, :, None]), 1, 2)

    def _problems(self, x: ArrayLike) -> Floats:
        """x with an axis of problems, which points common to all problems come without."""
        array = np.asarray(x, dtype=np.float64)
        return array[None] if array.ndim == 1 + len(self.point_shape) else array

    def _free(self, starts: ArrayLike) -> Floats:
        with np.errstate(all="ignore"):
            free_SP = self.parameters.free(np.atleast_2d(np.asarray(starts, dtype=np.float64)))
        feasible = np.isfinite(free_SP).all(axis=1)
        if not feasible.any():
            raise ValueError(f"no starting point keeps the constraints of {self.parameters.names}")
        return free_SP[feasible]

    def _cost(self, residual_RN: Floats, weight_RN: Floats) -> Floats:
        size_RN = np.abs(residual_RN)
        loss_RN = 0.5 * size_RN**2
        if self.huber is not None:
            loss_RN = np.where(size_RN <= self.huber, loss_RN, self.huber * (size_RN - 0.5 * self.huber))
        cost_R = np.where(weight_RN > 0, weight_RN * loss_RN, 0.0).sum(axis=1)
        return np.where(np.isfinite(cost_R), cost_R, np.inf)

    def robust_weight(self, residual: Floats) -> Floats:
        """h'(r)/r: one inside δ, δ/|r| outside."""
        if self.huber is None:
            return np.ones_like(residual)
        return self.huber / np.maximum(np.abs(residual), self.huber)

    def _minimise(
        self, u_RP: Floats, x_RN: Floats, y_RN: Floats, weight_RN: Floats
    ) -> tuple[Floats, Floats, NDArray[np.bool_]]:
        u_RP = u_RP.copy()
        num_problems, size = u_RP.shape
        y_RN, weight_RN = (np.broadcast_to(a, (num_problems, y_RN.shape[-1])) for a in (y_RN, weight_RN))
        x_RN = np.broadcast_to(self._problems(x_RN), (*y_RN.shape, *self.point_shape))
        residual_RN = y_RN - self.evaluate(u_RP, x_RN)
        cost_R = self._cost(residual_RN, weight_RN)
        slope_RP, curvature_RPP = np.zeros((num_problems, size)), np.zeros((num_problems, size, size))
        damping_R = np.full(num_problems, 1e-3)
        moved_R = np.isfinite(cost_R)  # their derivatives are out of date
        active_R, converged_R = moved_R.copy(), np.zeros(num_problems, dtype=bool)
        for _ in range(self.max_iterations):
            rows = np.flatnonzero(active_R & moved_R)
            if rows.size:
                jacobian = self.jacobian(u_RP[rows], x_RN[rows])
                weight = weight_RN[rows] * self.robust_weight(residual_RN[rows])
                used = (weight > 0)[:, :, None]
                scaled = np.where(used, jacobian * weight[:, :, None], 0.0)
                slope_RP[rows] = np.einsum("rnp,rn->rp", scaled, np.where(used[..., 0], residual_RN[rows], 0.0))
                curvature_RPP[rows] = np.einsum("rnp,rnq->rpq", scaled, np.where(used, jacobian, 0.0))
                broken = ~np.isfinite(curvature_RPP[rows]).all(axis=(1, 2))
                active_R[rows[broken]] = False
            rows = np.flatnonzero(active_R)
            if not rows.size:
                break
            diagonal = np.einsum("rpp->rp", curvature_RPP[rows])
            floor = np.maximum(1e-12 * diagonal.max(axis=1, keepdims=True), 1e-200)
            damped = curvature_RPP[rows].copy()
            np.einsum("rpp->rp", damped)[...] += damping_R[rows, None] * np.maximum(diagonal, floor)
            step = np.clip(np.linalg.solve(damped, slope_RP[rows][..., None])[..., 0], -5.0, 5.0)
            trial = u_RP[rows] + step
            residual = y_RN[rows] - self.evaluate(trial, x_RN[rows])
            cost = self._cost(residual, weight_RN[rows])
            better = cost < cost_R[rows]
            small = (np.abs(step) <= 1e-10 * (1 + np.abs(trial))).all(axis=1)
            gain = cost_R[rows] - cost
            accepted = rows[better]
            u_RP[accepted], residual_RN[accepted], cost_R[accepted] = trial[better], residual[better], cost[better]
            moved_R[rows] = better
            damping_R[rows] *= np.where(better, 0.2, 6.0)
            damping_R[rows] = np.maximum(damping_R[rows], 1e-12)
            done = small | (damping_R[rows] > 1e12) | (better & (gain <= 1e-15 * cost))
            converged_R[rows[done]] = True
            active_R[rows[done]] = False
        return u_RP, cost_R, converged_R


@dataclass(frozen=True)
class CurveFit:
    """A fitted curve with its points.

    Attributes:
        fitter: Curve and parameters.
        x_N: Where the points are.
        y_N: Their values.
        weight_N: Their weights.
        u_P: Free parameters of the fit.
        cost: Σ_n w_n h_δ(r_n).
        converged: Whether the iteration settled; a fit that did not may lie in a flat valley.
    """

    fitter: CurveFitter
    x_N: Floats
    y_N: Floats
    weight_N: Floats
    u_P: Floats
    cost: float
    converged: bool

    @property
    def theta_P(self) -> Floats:
        """(P,) fitted parameters."""
        return self.fitter.parameters.constrained(self.u_P[None])[0]

    @property
    def values(self) -> dict[str, float]:
        """Fitted parameters by name."""
        return dict(zip(self.fitter.parameters.names, map(float, self.theta_P)))

    @property
    def residuals_N(self) -> Floats:
        """(N,) y − f."""
        return self.y_N - self.fitter.evaluate(self.u_P[None], self.x_N)[0]

    @property
    def degrees_of_freedom(self) -> int:
        """Weighted points less parameters."""
        return int((self.weight_N > 0).sum()) - self.u_P.size

    @property
    def residual_std(self) -> float:
        """√(Σ w r² / (N − P)), NaN where the points only just fix the parameters."""
        if self.degrees_of_freedom < 1:
            return float("nan")
        return float(np.sqrt((self.weight_N * self.residuals_N**2).sum() / self.degrees_of_freedom))

    def free_covariance(self) -> Floats:
        """(P, P) covariance of u: s² (Jᵀ W J)⁻¹; with Huber's loss s² = [Σ w ψ²/(N − P)] / mean(ψ')² (Huber 1981).

        NaN without degrees of freedom.
        """
        if self.degrees_of_freedom < 1:
            return np.full((self.u_P.size, self.u_P.size), np.nan)
        used = self.weight_N > 0
        residual, weight = self.residuals_N[used], self.weight_N[used]
        jacobian = self.fitter.jacobian(self.u_P[None], self.x_N)[0][used]
        psi = residual * self.fitter.robust_weight(residual)
        inside = (
            1.0 if self.fitter.huber is None else max(np.mean(np.abs(residual) <= self.fitter.huber), 1 / used.sum())
        )
        variance = (weight * psi**2).sum() / self.degrees_of_freedom / inside**2
        return variance * np.linalg.pinv((jacobian * weight[:, None]).T @ jacobian, rcond=1e-14, hermitian=True)

    def covariance(self) -> Floats:
        """(P, P) covariance of θ, by the delta method."""
        step = 1e-6 * np.maximum(1.0, np.abs(self.u_P))
        constrained = self.fitter.parameters.constrained
        gradient = (
            (constrained(self.u_P + np.diag(step)) - constrained(self.u_P - np.diag(step))) / (2 * step[:, None])
        ).T
        return gradient @ self.free_covariance() @ gradient.T

    def standard_errors(self) -> dict[str, float]:
        """Standard errors of θ by name."""
        return dict(zip(self.fitter.parameters.names, map(float, np.sqrt(np.diag(self.covariance())))))

    def predict(self, x: ArrayLike) -> tuple[Floats, Floats]:
        """f at `x` and the standard error of f there (delta method), (N,) each."""
        x_N = np.asarray(x, dtype=np.float64)
        gradient_NP = self.fitter.jacobian(self.u_P[None], x_N)[0]
        variance_N = np.einsum("np,pq,nq->n", gradient_NP, self.free_covariance(), gradient_NP)
        return self.fitter.evaluate(self.u_P[None], x_N)[0], np.sqrt(np.maximum(variance_N, 0.0))

    def bootstrap(self, repeats: int = 200, seed: int = 0) -> Floats:
        """Parameters refitted to f + resampled residuals, (repeats, P); residuals are widened by √(N/(N − P)).

        Args:
            repeats: Samples.
            seed: Seed of the resampling.

        Raises:
            ValueError: If no degrees of freedom are left: there are no residuals to resample.
        """
        if self.degrees_of_freedom < 1:
            raise ValueError(f"{self.y_N.size} points leave no residual to resample for {self.u_P.size} parameters")
        used = np.flatnonzero(self.weight_N > 0)
        scaled = self.residuals_N[used] * np.sqrt(self.weight_N[used] * used.size / self.degrees_of_freedom)
        scaled -= scaled.mean()
        drawn_RN = np.random.default_rng(seed).choice(scaled, size=(repeats, used.size))
        y_RN = np.tile(self.y_N, (repeats, 1))
        y_RN[:, used] += drawn_RN / np.sqrt(self.weight_N[used]) - self.residuals_N[used]
        return self.fitter.refit(self.x_N, y_RN, self.theta_P, self.weight_N)[0]

    def leave_one_group_out(self, groups: ArrayLike) -> Floats:
        """What the curve, refitted without the group of a point, says of that point, (N,).

        Args:
            groups: (N,) labels; points of one label are held out together.

        Raises:
            ValueError: If fewer points than parameters are left without some group.
        """
        labels, group_N = np.unique(np.asarray(groups), return_inverse=True)
        weight_GN = np.where(group_N == np.arange(labels.size)[:, None], 0.0, self.weight_N)
        left = (weight_GN > 0).sum(axis=1)
        if left.min() < self.u_P.size:
            short = labels[left.argmin()]
            raise ValueError(f"without group {short!r} {left.min()} points are left for {self.u_P.size} parameters")
        theta_GP, _ = self.fitter.refit(self.x_N, self.y_N, self.theta_P, weight_GN)
        value_GN = self.fitter.evaluate(self.fitter.parameters.free(theta_GP), self.x_N)
        return value_GN[group_N, np.arange(group_N.size)]

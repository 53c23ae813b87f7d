"""How validation losses depend on the proportions of the training domains (arXiv 2403.16952).

    L_v(r) = c_v + k_v exp(Σ_j t_vj r_j) = c_v + exp(t_v · r),      Σ_j r_j = 1,  c_v > 0

after a fixed number of tokens at a fixed size. With Σ r = 1, ln k_v adds to every t_vj, so one vector t_v holds both.
Negative differences t_vj − t_vi say that domain j helps v more than domain i. The law needs losses that have settled,
and it breaks where a proportion goes to zero. Bootstrap samples, leave-one-out errors and the search for a mixture are
reconstructions: the paper gives the law. Shapes: M mixtures, K domains, V validation sets, R bootstrap samples.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from lit_interns1.laws.fitter import CurveFit, CurveFitter, percentile_interval
from lit_interns1.laws.mixing_search import GRID_STEP, SearchResult, bounds, convex_search, grid_search
from lit_interns1.laws.transforms import Floats, Joint, Positive, Unbounded

SPARE_MIXTURES = 3
SUM_TOLERANCE = 1e-3
LOW_R_SQUARED = 0.9


@dataclass(frozen=True)
class OptimalMixture:
    """The mixture that a law says is best.

    Attributes:
        proportions: By domain.
        losses: Predicted, by validation set.
        total: Their weighted mean, nats per token.
        interval: Of `total` at this mixture, 95 %; NaN without bootstrap samples.
        warnings: What to doubt.
        at_bound: Domains whose proportion is its floor or its cap.
        proportion_intervals: By domain, where 95 % of the bootstrap samples have their own best proportion: a wide
            interval says that the loss hardly depends on that domain, or that the runs do not fix it.
        gap: How far `total` may at most lie above the law's minimum over the bounds.
    """

    proportions: dict[str, float]
    losses: dict[str, float]
    total: float
    interval: tuple[float, float]
    warnings: tuple[str, ...]
    at_bound: tuple[str, ...]
    proportion_intervals: dict[str, tuple[float, float]]
    gap: float


@dataclass(frozen=True)
class MixingLaw:
    """L_v(r) = c_v + exp(t_v · r), fitted.

    Attributes:
        domains: Names of the K training domains.
        targets: Names of the V validation sets.
        floor_V: c, nats per token.
        slope_VK: t, with ln k in it.
        r_squared_V: 1 − Σ residual² / Σ (L − mean L)².
        max_error_V: Largest |residual|.
        leave_one_out_V: Mean |L − L̂| where L̂ comes from the fit without that mixture.
        floor_samples_RV: c of the bootstrap samples.
        slope_samples_RVK: t of the bootstrap samples.
        lowest_K: Smallest proportions among the runs.
        highest_K: Largest proportions.
        num_runs: Runs behind the law.
        warnings: What to doubt.
    """

    domains: tuple[str, ...]
    targets: tuple[str, ...]
    floor_V: Floats
    slope_VK: Floats
    r_squared_V: Floats
    max_error_V: Floats
    leave_one_out_V: Floats
    floor_samples_RV: Floats
    slope_samples_RVK: Floats
    lowest_K: Floats
    highest_K: Floats
    num_runs: int
    warnings: tuple[str, ...]

    def predict(self, proportions_MK: ArrayLike) -> Floats:
        """Losses (M, V) at proportions (M, K) or (K,)."""
        return self.floor_V + np.exp(check_proportions(proportions_MK, self.domains) @ self.slope_VK.T)

    def interval(self, proportions_MK: ArrayLike, level: float = 0.95) -> Floats:
        """(2, M, V): where `level` of the bootstrap samples lie; of the curve, not of one more run."""
        exponent_RMV = np.einsum("mk,rvk->rmv", check_proportions(proportions_MK, self.domains), self.slope_samples_RVK)
        return percentile_interval(self.floor_samples_RV[:, None] + np.exp(exponent_RMV), level)

    def optimise(
        self,
        weights: Mapping[str, float] | None = None,
        floors: Mapping[str, float] | None = None,
        caps: Mapping[str, float] | None = None,
        search: Literal["convex", "grid"] = "convex",
    ) -> OptimalMixture:
        """The mixture of the lowest weighted mean loss.

        Args:
            weights: Weight of each validation set, not negative; divided by their sum. Sets that are not named weigh
                nothing. All equal by default.
            floors: Lowest proportions.
            caps: Highest proportions, such as `caps_of_tokens` gives.
            search: `convex` finds the global minimum; `grid` is the coarse grid of the paper's code.

        Raises:
            ValueError: If a name is unknown, a weight is negative, or no mixture keeps the bounds.
        """
        weight_V = self._weights(weights)
        low_K, high_K = bounds(self.domains, floors, caps)
        if search == "grid":
            found = grid_search(self.floor_V, self.slope_VK, weight_V, low_K, high_K)
        elif search == "convex":
            found = convex_search(self.floor_V[None], self.slope_VK[None], weight_V, low_K, high_K)
        else:
            raise ValueError(f"search={search!r} must be 'convex' or 'grid'")
        samples = convex_search(self.floor_samples_RV, self.slope_samples_RVK, weight_V, low_K, high_K)
        return self._mixture(found, samples, weight_V, low_K, high_K)

    def _weights(self, weights: Mapping[str, float] | None) -> Floats:
        given = dict.fromkeys(self.targets, 1.0) if weights is None else weights
        for target, weight in given.items():
            if target not in self.targets:
                raise ValueError(f"weights names {target!r}, but the law predicts {', '.join(self.targets)}")
            if not (weight >= 0 and np.isfinite(weight)):
                raise ValueError(f"weights[{target!r}]={weight} must be finite and not negative")
        weight_V = np.array([given.get(target, 0.0) for target in self.targets], dtype=np.float64)
        if not weight_V.any():
            raise ValueError("weights are all zero: name at least one validation set")
        return weight_V / weight_V.sum()

    def _mixture(
        self, found: SearchResult, samples: SearchResult, weight_V: Floats, low_K: Floats, high_K: Floats
    ) -> OptimalMixture:
        best_K = found.proportions_RK[0]
        total_R = (self.floor_samples_RV + np.exp(self.slope_samples_RVK @ best_K)) @ weight_V
        low, high = percentile_interval(total_R)
        spread_2K = percentile_interval(samples.proportions_RK)
        at_bound = (np.abs(best_K - low_K) < 1e-6) | (np.abs(best_K - high_K) < 1e-6)
        warnings = list(self.warnings)
        for j, domain in enumerate(self.domains):
            if best_K[j] < GRID_STEP and best_K[j] < self.lowest_K[j] - 1e-9:
                warnings.append(
                    f"the optimum has {best_K[j]:.3g} of {domain!r}, the runs had at least {self.lowest_K[j]:.3g}: "
                    "near zero the law is too optimistic; set a floor"
                )
            elif not self.lowest_K[j] - 1e-9 <= best_K[j] <= self.highest_K[j] + 1e-9:
                warnings.append(
                    f"the optimum has {best_K[j]:.3g} of {domain!r}, outside the runs' "
                    f"{self.lowest_K[j]:.3g} … {self.highest_K[j]:.3g}"
                )
        return OptimalMixture(
            proportions=dict(zip(self.domains, map(float, best_K))),
            losses=dict(zip(self.targets, map(float, self.predict(best_K)[0]))),
            total=float(found.total_R[0]),
            interval=(float(low), float(high)),
            warnings=tuple(warnings),
            at_bound=tuple(domain for domain, bound in zip(self.domains, at_bound) if bound),
            proportion_intervals={d: (float(a), float(b)) for d, a, b in zip(self.domains, *spread_2K)},
            gap=float(found.gap_R[0]),
        )

    def to_json(self) -> str:
        """The law as JSON text; `from_json` reads it."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return json.dumps({k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in values.items()}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> MixingLaw:
        """The law that `to_json` wrote.

        Raises:
            ValueError: If the text is no such law.
        """
        try:
            values = json.loads(text)
            domains, targets, warnings = (tuple(map(str, values[name])) for name in ("domains", "targets", "warnings"))
            shape_VK = (len(targets), len(domains))

            def array(name: str, *shape: int) -> Floats:
                return np.asarray(values[name], dtype=np.float64).reshape(shape)

            return cls(
                domains=domains,
                targets=targets,
                floor_V=array("floor_V", len(targets)),
                slope_VK=array("slope_VK", *shape_VK),
                r_squared_V=array("r_squared_V", len(targets)),
                max_error_V=array("max_error_V", len(targets)),
                leave_one_out_V=array("leave_one_out_V", len(targets)),
                floor_samples_RV=array("floor_samples_RV", -1, len(targets)),
                slope_samples_RVK=array("slope_samples_RVK", -1, *shape_VK),
                lowest_K=array("lowest_K", len(domains)),
                highest_K=array("highest_K", len(domains)),
                num_runs=int(values["num_runs"]),
                warnings=warnings,
            )
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"this is no mixing law: {error!r}") from error


def check_proportions(proportions: ArrayLike, domains: Sequence[str]) -> Floats:
    """Proportions as (M, K), each row divided by its sum.

    Raises:
        ValueError: If they are not M rows of K, or a row is no mixture.
    """
    rows_MK = np.atleast_2d(np.asarray(proportions, dtype=np.float64))
    if rows_MK.ndim != 2 or rows_MK.shape[1] != len(domains):
        raise ValueError(f"proportions {rows_MK.shape} must have {len(domains)} columns: {', '.join(domains)}")
    sum_M = rows_MK.sum(axis=1)
    wrong = ~(np.isfinite(rows_MK).all(axis=1) & (rows_MK >= 0).all(axis=1) & (np.abs(sum_M - 1) <= SUM_TOLERANCE))
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(f"proportions of row {row} must not be negative and sum to 1, got {rows_MK[row].tolist()}")
    return rows_MK / sum_M[:, None]


def fit_mixing_law(
    proportions_MK: ArrayLike,
    losses_MV: ArrayLike,
    domains: Sequence[str],
    targets: Sequence[str],
    huber: float | None = None,
    bootstrap: int = 200,
    seed: int = 0,
) -> MixingLaw:
    """Fits the law to runs of equal size and equal tokens that differ in their mixture.

    Args:
        proportions_MK: Rows that sum to one; at least K + 3 different ones.
        losses_MV: Validation losses, nats per token.
        domains: K names.
        targets: V names.
        huber: δ of Huber's loss, nats per token; None is least squares.
        bootstrap: Samples behind the intervals; 0 for none.
        seed: Of the samples.

    Raises:
        ValueError: If shapes do not fit, a row is no mixture, losses are not positive and finite, or the mixtures are
            too few or too alike to fix the law.
    """
    domains, targets = tuple(domains), tuple(targets)
    for option, names in (("domains", domains), ("targets", targets)):
        if not names or len(set(names)) < len(names):
            raise ValueError(f"{option} must be different names, got {names}")
    rows_MK = check_proportions(proportions_MK, domains)
    losses_MV = np.asarray(losses_MV, dtype=np.float64)
    if losses_MV.shape != (len(rows_MK), len(targets)):
        raise ValueError(f"losses {losses_MV.shape} must be {(len(rows_MK), len(targets))}: runs × {targets}")
    if not (np.isfinite(losses_MV) & (losses_MV > 0)).all():
        raise ValueError("losses must be positive and finite: leave out runs that diverged")
    different, group_M = np.unique(rows_MK.round(9), axis=0, return_inverse=True)
    needed = len(domains) + SPARE_MIXTURES
    if len(different) < needed:
        raise ValueError(
            f"{len(different)} different mixtures of {len(domains)} domains are too few: the law has "
            f"{len(domains) + 1} numbers per validation set, give {needed} mixtures or more"
        )
    if np.linalg.matrix_rank(different, tol=1e-6) < len(domains):
        raise ValueError(f"the mixtures do not vary every one of {', '.join(domains)}: some proportions move together")
    fitter = mixing_fitter(len(domains), huber)
    fits = [fitter.fit(rows_MK, loss_M, _starts(rows_MK, loss_M)) for loss_M in losses_MV.T]
    residual_MV = np.stack([fit.residuals_N for fit in fits], axis=1)
    held_out_MV = np.stack([fit.leave_one_group_out(group_M.reshape(-1)) for fit in fits], axis=1)
    samples_RVP = np.stack([_samples(fit, bootstrap, seed) for fit in fits], axis=1)
    spread_V = ((losses_MV - losses_MV.mean(axis=0)) ** 2).sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        r_squared_V = 1 - (residual_MV**2).sum(axis=0) / spread_V
    theta_VP = np.stack([fit.theta_P for fit in fits])
    return MixingLaw(
        domains=domains,
        targets=targets,
        floor_V=theta_VP[:, 0],
        slope_VK=theta_VP[:, 1:],
        r_squared_V=r_squared_V,
        max_error_V=np.abs(residual_MV).max(axis=0),
        leave_one_out_V=np.abs(losses_MV - held_out_MV).mean(axis=0),
        floor_samples_RV=samples_RVP[..., 0],
        slope_samples_RVK=samples_RVP[..., 1:],
        lowest_K=rows_MK.min(axis=0),
        highest_K=rows_MK.max(axis=0),
        num_runs=len(rows_MK),
        warnings=(
            *_corner_warnings(rows_MK, domains),
            *_target_warnings(theta_VP[:, 0], r_squared_V, losses_MV, targets),
        ),
    )


def mixing_fitter(num_domains: int, huber: float | None) -> CurveFitter:
    """The fitter of (c, t_1 … t_K) to mixtures (N, K)."""
    parameters = Joint(Positive("floor"), Unbounded(*(f"slope_{j}" for j in range(num_domains))))
    return CurveFitter(_loss, parameters, huber, point_shape=(num_domains,))


def _loss(theta: Floats, x_RNK: Floats) -> Floats:
    slope_RK1 = np.moveaxis(theta[1:], 0, 1)
    return theta[0] + np.exp((x_RNK @ slope_RK1)[..., 0])


def _starts(rows_MK: Floats, loss_M: Floats) -> Floats:
    """For several floors c, the slopes that fit ln(L − c) best."""
    starts = []
    for share in (0.3, 0.6, 0.8, 0.9, 0.95, 0.98, 0.995):
        floor = share * loss_M.min()
        starts.append([floor, *np.linalg.lstsq(rows_MK, np.log(loss_M - floor), rcond=None)[0]])
    return np.array(starts)


def _samples(fit: CurveFit, bootstrap: int, seed: int) -> Floats:
    return fit.bootstrap(bootstrap, seed) if bootstrap else np.empty((0, fit.u_P.size))


def _corner_warnings(rows_MK: Floats, domains: tuple[str, ...]) -> list[str]:
    found = []
    for j, domain in enumerate(domains):
        zero, small = int((rows_MK[:, j] == 0).sum()), int((rows_MK[:, j] < GRID_STEP - 1e-9).sum())
        if small:
            what = f"{zero} without any" if zero else f"the smallest {rows_MK[:, j].min():.3g}"
            found.append(
                f"{small} of {len(rows_MK)} runs have less than 1/16 of {domain!r} ({what}): the law breaks near zero, "
                "fit it to runs with 1/16 or more of every domain"
            )
    return found


def _target_warnings(floor_V: Floats, r_squared_V: Floats, losses_MV: Floats, targets: tuple[str, ...]) -> list[str]:
    found = []
    for target, floor, r_squared, lowest in zip(targets, floor_V, r_squared_V, losses_MV.min(axis=0)):
        if floor < 0.05 * lowest:
            found.append(f"the floor of {target!r} goes to zero: over these mixtures its losses do not flatten")
        if not r_squared >= LOW_R_SQUARED:
            found.append(f"the law of {target!r} has R² {r_squared:.2f}: its losses follow the mixture only in part")
    return found

"""The best mixture under a mixing law: a convex program over proportions, and the grid of arXiv 2403.16952's code.

    minimise  f(r) = Σ_v w_v [c_v + exp(t_v · r)]     subject to  Σ_j r_j = 1,  low_j ≤ r_j ≤ high_j,      w_v ≥ 0

f is a sum of exponentials of linear functions, hence convex, and the feasible set is a polytope: every local minimum is
global. At any feasible r, f(r) − min f ≤ ∇f(r)·r − min_s ∇f(r)·s over feasible s, a linear program that a sort solves.
That gap is reported, so the claim need not be believed. The method is a logarithmic barrier with Newton's steps on
Σ r = 1. Shapes: R problems solved at once, V validation sets, K domains.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lit_interns1.laws.transforms import Floats

GRID_STEP = 1 / 16
"""Smallest proportion but zero on the grid of `grid_search`, and what the law's own data kept to."""
MAX_GRID = 2_000_000
SNAP = 1e-9


@dataclass(frozen=True)
class SearchResult:
    """Best proportions of R problems.

    Attributes:
        proportions_RK: r.
        total_R: f(r).
        gap_R: How far f(r) may at most lie above the minimum over the bounds.
    """

    proportions_RK: Floats
    total_R: Floats
    gap_R: Floats


def caps_of_tokens(available: Mapping[str, float], total_tokens: float, epochs: float = 1) -> dict[str, float]:
    """The largest proportions that available tokens allow.

    Args:
        available: Tokens that each domain has.
        total_tokens: Tokens to train on.
        epochs: How often a token may be seen.

    Returns:
        min(1, epochs · available / total_tokens) by domain.

    Raises:
        ValueError: If a number is not positive, or all domains together have too few tokens.
    """
    if not (total_tokens > 0 and epochs > 0):
        raise ValueError(f"total_tokens={total_tokens} and epochs={epochs} must be positive")
    for domain, tokens in available.items():
        if not tokens >= 0:
            raise ValueError(f"available tokens of {domain!r} must not be negative, got {tokens}")
    if epochs * sum(available.values()) < total_tokens:
        raise ValueError(
            f"{epochs:g} epochs of the available {sum(available.values()):.4g} tokens are fewer than "
            f"total_tokens={total_tokens:.4g}"
        )
    return {domain: min(1.0, epochs * tokens / total_tokens) for domain, tokens in available.items()}


def bounds(
    domains: Sequence[str], floors: Mapping[str, float] | None, caps: Mapping[str, float] | None
) -> tuple[Floats, Floats]:
    """Lowest and highest proportions (K,), checked.

    Raises:
        ValueError: If a name is unknown, a bound is no proportion, a floor exceeds its cap, or no mixture keeps them.
    """
    for option, given in (("floors", floors), ("caps", caps)):
        for domain, value in (given or {}).items():
            if domain not in domains:
                raise ValueError(f"{option} names {domain!r}, but the law has the domains {', '.join(domains)}")
            if not 0 <= value <= 1:
                raise ValueError(f"{option}[{domain!r}]={value} must lie between 0 and 1")
    low_K = np.array([(floors or {}).get(domain, 0.0) for domain in domains], dtype=np.float64)
    high_K = np.array([(caps or {}).get(domain, 1.0) for domain in domains], dtype=np.float64)
    for domain, low, high in zip(domains, low_K, high_K):
        if low > high:
            raise ValueError(f"the floor {low} of {domain!r} is above its cap {high}")
    if low_K.sum() > 1 + SNAP:
        raise ValueError(f"floors sum to {low_K.sum():.6g}, a mixture to 1: lower them")
    if high_K.sum() < 1 - SNAP:
        raise ValueError(f"caps sum to {high_K.sum():.6g}, a mixture to 1: raise them or allow more epochs")
    return low_K, high_K


def convex_search(floor_RV: Floats, slope_RVK: Floats, weight_V: Floats, low_K: Floats, high_K: Floats) -> SearchResult:
    """The global minimum of f for each of R laws.

    Args:
        floor_RV: c.
        slope_RVK: t.
        weight_V: w, not negative.
        low_K: Lowest proportions, from `bounds`.
        high_K: Highest proportions.
    """
    constant_R = floor_RV @ weight_V
    free_K = high_K - low_K > SNAP
    share = (1 - low_K.sum()) / max((high_K - low_K).sum(), SNAP)
    proportions_RK = np.tile(low_K + np.clip(share, 0, 1) * (high_K - low_K), (len(slope_RVK), 1))
    if SNAP < share < 1 - SNAP and free_K.sum() > 1:
        proportions_RK[:, free_K] = _barrier(
            proportions_RK[:, free_K],
            slope_RVK[:, :, free_K],
            weight_V * np.exp(slope_RVK[:, :, ~free_K] @ low_K[~free_K]),
            low_K[free_K],
            high_K[free_K],
        )
        proportions_RK = _snap(proportions_RK, low_K, high_K)
    scale_RV = weight_V * np.exp(np.einsum("rvk,rk->rv", slope_RVK, proportions_RK))
    gradient_RK = np.einsum("rv,rvk->rk", scale_RV, slope_RVK)
    best_RK = _linear_minimum(gradient_RK, low_K, high_K)
    gap_R = np.maximum((gradient_RK * (proportions_RK - best_RK)).sum(axis=1), 0.0)
    return SearchResult(proportions_RK, constant_R + scale_RV.sum(axis=1), gap_R)


def _barrier(r_RK: Floats, slope_RVK: Floats, weight_RV: Floats, low_K: Floats, high_K: Floats) -> Floats:
    """Newton's method on f − μ Σ [ln(r − low) + ln(high − r)] along Σ r = const, μ falling tenfold."""

    def value(r_RK: Floats, mu_R: Floats) -> Floats:
        inside = np.log(r_RK - low_K) + np.log(high_K - r_RK)
        terms_RV = weight_RV * np.exp(np.einsum("rvk,rk->rv", slope_RVK, r_RK))
        total: Floats = terms_RV.sum(axis=1) - mu_R * inside.sum(axis=1)
        return total

    scale_R = (weight_RV * np.exp(np.einsum("rvk,rk->rv", slope_RVK, r_RK))).sum(axis=1)
    for exponent in range(1, 14):
        mu_R = scale_R * 10.0**-exponent
        for _ in range(40):
            terms_RV = weight_RV * np.exp(np.einsum("rvk,rk->rv", slope_RVK, r_RK))
            below_RK, above_RK = 1 / (r_RK - low_K), 1 / (high_K - r_RK)
            gradient_RK = np.einsum("rv,rvk->rk", terms_RV, slope_RVK) + mu_R[:, None] * (above_RK - below_RK)
            hessian_RKK = np.einsum("rv,rvk,rvl->rkl", terms_RV, slope_RVK, slope_RVK)
            np.einsum("rkk->rk", hessian_RKK)[...] += mu_R[:, None] * (above_RK**2 + below_RK**2)
            both = np.stack([gradient_RK, np.ones_like(gradient_RK)], axis=-1)
            solved = np.linalg.solve(hessian_RKK, both)
            multiplier_R = solved[..., 0].sum(axis=1) / solved[..., 1].sum(axis=1)
            step_RK = multiplier_R[:, None] * solved[..., 1] - solved[..., 0]
            decrement_R = -(gradient_RK * step_RK).sum(axis=1)
            if (decrement_R <= 1e-6 * mu_R).all():
                break
            room_RK = np.where(step_RK > 0, 1 / above_RK, 1 / below_RK)
            length_R = np.minimum(1.0, 0.99 * (room_RK / np.maximum(np.abs(step_RK), 1e-300)).min(axis=1))
            before_R = value(r_RK, mu_R)
            for _ in range(30):
                trial_RK = r_RK + length_R[:, None] * step_RK
                worse_R = value(trial_RK, mu_R) > before_R - 0.1 * length_R * decrement_R
                if not worse_R.any():
                    break
                length_R = np.where(worse_R, 0.5 * length_R, length_R)
            r_RK = np.where(worse_R[:, None], r_RK, trial_RK)
            if worse_R.all():
                break  # rounding: no step shows a gain any more
    return r_RK


def _snap(r_RK: Floats, low_K: Floats, high_K: Floats) -> Floats:
    """Proportions that the barrier left a hair inside a bound, on it; the others take up the difference."""
    hair = 1e-7
    at_low_RK, at_high_RK = r_RK - low_K < hair, high_K - r_RK < hair
    snapped_RK = np.where(at_low_RK, low_K, np.where(at_high_RK, high_K, r_RK))
    inner_RK = ~(at_low_RK | at_high_RK)
    rest_R, count_R = 1 - snapped_RK.sum(axis=1), inner_RK.sum(axis=1)
    snapped_RK += np.where(inner_RK, (rest_R / np.maximum(count_R, 1))[:, None], 0.0)
    kept = (count_R > 0) | (np.abs(rest_R) < SNAP)
    return np.where(kept[:, None], snapped_RK, r_RK)


def _linear_minimum(gradient_RK: Floats, low_K: Floats, high_K: Floats) -> Floats:
    """argmin over feasible s of gradient · s: fill the domains of lowest gradient first."""
    order_RK = np.argsort(gradient_RK, axis=1)
    room_RK = (high_K - low_K)[order_RK]
    before_RK = np.cumsum(room_RK, axis=1) - room_RK
    filled_RK = np.clip(1 - low_K.sum() - before_RK, 0.0, room_RK)
    best_RK = np.empty_like(gradient_RK)
    np.put_along_axis(best_RK, order_RK, low_K[order_RK] + filled_RK, axis=1)
    return best_RK


def grid_search(
    floor_V: Floats, slope_VK: Floats, weight_V: Floats, low_K: Floats, high_K: Floats, step: float = GRID_STEP
) -> SearchResult:
    """The best mixture on the grid of arXiv 2403.16952's code.

    Each domain but the last takes its cap (rounded down to a multiple of `step`), half of it, a quarter, … down to
    `step`, or nothing (its floor, if it has one); the last takes what is left. The gap is that of the point found, so
    it says what the grid costs at most.

    Raises:
        ValueError: If the grid has too many or no feasible points.
    """
    if not 0 < step <= 1:
        raise ValueError(f"step={step} must lie between 0 and 1")
    levels = [_levels(low, high, step) for low, high in zip(low_K[:-1], high_K[:-1])]
    size = math.prod(map(len, levels))
    if size > MAX_GRID:
        raise ValueError(f"the grid has {size} points, more than {MAX_GRID}: use the convex search or a larger step")
    head = np.array(list(itertools.product(*levels)), dtype=np.float64).reshape(size, -1)
    last = 1 - head.sum(axis=1)
    feasible = (last >= low_K[-1] - SNAP) & (last <= high_K[-1] + SNAP)
    if not feasible.any():
        raise ValueError(f"none of the {size} grid points keeps the bounds of the last domain: use the convex search")
    grid_GK = np.column_stack([head[feasible], np.clip(last[feasible], low_K[-1], high_K[-1])])
    total_G = np.zeros(len(grid_GK))
    for floor, slope_K, weight in zip(floor_V, slope_VK, weight_V):
        total_G += weight * (floor + np.exp(grid_GK @ slope_K))
    best = int(total_G.argmin())
    gradient_K = (weight_V * np.exp(slope_VK @ grid_GK[best])) @ slope_VK
    gap = gradient_K @ (grid_GK[best] - _linear_minimum(gradient_K[None], low_K, high_K)[0])
    return SearchResult(grid_GK[best][None], total_G[best][None], np.array([max(gap, 0.0)]))


def _levels(low: float, high: float, step: float) -> list[float]:
    top = step * math.floor(high / step + SNAP)
    halved = [top * 0.5**s for s in range(64) if top * 0.5**s >= max(step, low)]
    return sorted({low, *halved}) if low <= high else []

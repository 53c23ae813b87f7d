"""How the loss falls with consumed tokens at one learning rate (arXiv 2601.05049, Eq. 4).

    L(D) = L_0 + A · D^−γ,   L_0, A, γ > 0

Fitted to ln L with Huber's loss (δ = 1e-3, as in arXiv 2203.15556 §3.3) from several starting points; the paper does
not say how it fits. In the constant phase of one run every D is a probe, so a few losses of it give the law.
Curves too short to fix their own exponent may share one (`fit_shared_power_laws`, as in arXiv 2403.16952's code).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from lit_interns1.laws.fitter import CurveFit, CurveFitter
from lit_interns1.laws.transforms import Floats, Positive

HUBER = 1e-3
"""δ in ln L."""


@dataclass(frozen=True)
class PowerLaw:
    """L(D) = L_0 + A · D^−γ.

    Attributes:
        irreducible: L_0, nats per token.
        amplitude: A.
        exponent: γ.
        unit_tokens: Tokens that one unit of `fit.x_N` stands for.
        fit: The fit behind it, in ln L.
    """

    irreducible: float
    amplitude: float
    exponent: float
    unit_tokens: float
    fit: CurveFit

    def __call__(self, tokens: ArrayLike) -> Floats:
        """L at `tokens` consumed tokens, nats per token."""
        return self.irreducible + self.amplitude * np.asarray(tokens, dtype=np.float64) ** -self.exponent

    def predict(self, tokens: ArrayLike) -> tuple[Floats, Floats]:
        """L and its standard error (of the curve, by the delta method); NaN error if only three points were fitted."""
        scaled = np.atleast_1d(np.asarray(tokens, dtype=np.float64)) / self.unit_tokens
        log_loss, error = self.fit.predict(scaled)
        return np.exp(log_loss), np.exp(log_loss) * error


def fit_power_law(tokens: ArrayLike, losses: ArrayLike, huber: float | None = HUBER) -> PowerLaw:
    """Fits L_0, A and γ.

    Args:
        tokens: (N,) consumed tokens, N ≥ 3.
        losses: (N,) nats per token.
        huber: δ in ln L; None is least squares.

    Raises:
        ValueError: If there are fewer than three different token counts, or a value is not positive and finite.
    """
    tokens_N, losses_N = np.asarray(tokens, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if tokens_N.shape != losses_N.shape or tokens_N.ndim != 1 or np.unique(tokens_N).size < 3:
        raise ValueError(
            f"a power law needs losses at three token counts or more, got tokens {tokens_N.shape} "
            f"({np.unique(tokens_N).size} different) and losses {losses_N.shape}"
        )
    if not (np.isfinite(tokens_N) & (tokens_N > 0) & np.isfinite(losses_N) & (losses_N > 0)).all():
        raise ValueError("tokens and losses of a power law must be positive and finite")
    unit = float(np.exp(np.log(tokens_N).mean()))
    lowest, first = losses_N.min(), losses_N[tokens_N.argmin()]
    starts = [
        (share * lowest, max(first - share * lowest, 1e-3 * lowest) * (tokens_N.min() / unit) ** exponent, exponent)
        for share, exponent in itertools.product((0.5, 0.8, 0.95, 0.99), (0.2, 0.3, 0.5, 1.0))
    ]
    fitter = CurveFitter(_log_loss, Positive("irreducible", "amplitude", "exponent"), huber)
    fit = fitter.fit(tokens_N / unit, np.log(losses_N), starts)
    irreducible, amplitude, exponent = map(float, fit.theta_P)
    return PowerLaw(irreducible, amplitude * unit**exponent, exponent, unit, fit)


def _log_loss(theta: Floats, x_N: Floats) -> Floats:
    irreducible, amplitude, exponent = theta
    return np.log(irreducible + amplitude * x_N**-exponent)


@dataclass(frozen=True)
class SharedPowerLaws:
    """L_i(x) = c_i + A_i x^−γ of C curves with one exponent.

    Attributes:
        irreducible_C: c, nats per token.
        amplitude_C: A.
        exponent: γ.
        residual_std: Of all losses around their curves, nats per token; NaN if they only just fix the laws.
    """

    irreducible_C: Floats
    amplitude_C: Floats
    exponent: float
    residual_std: float

    def __call__(self, x: float) -> Floats:
        """(C,) the losses at `x`."""
        return self.irreducible_C + self.amplitude_C * x**-self.exponent


def fit_shared_power_laws(
    xs: Sequence[ArrayLike], losses: Sequence[ArrayLike], exponents: tuple[float, float] = (0.02, 3.0)
) -> SharedPowerLaws:
    """Least squares in the losses; c, A ≥ 0 solve a linear problem at each γ, so only γ is searched.

    Args:
        xs: Per curve, tokens or sizes, at least two different ones.
        losses: Per curve, nats per token.
        exponents: Where γ is searched.

    Raises:
        ValueError: If a curve has fewer than two x, a value is not positive and finite, or all curves together have
            fewer than 2C + 1 losses.
    """
    curves = [(np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)) for x, y in zip(xs, losses)]
    for x_N, y_N in curves:
        if x_N.shape != y_N.shape or x_N.ndim != 1 or np.unique(x_N).size < 2:
            raise ValueError(f"each curve needs losses at two x or more, one has x {x_N.tolist()}, losses {y_N.shape}")
        if not (np.isfinite(x_N) & (x_N > 0) & np.isfinite(y_N) & (y_N > 0)).all():
            raise ValueError("x and losses of a power law must be positive and finite")
    if not 0 < exponents[0] < exponents[1]:
        raise ValueError(f"exponents={exponents} must be two positive numbers, the smaller first")
    degrees = sum(y_N.size for _, y_N in curves) - 2 * len(curves) - 1
    if degrees < 0 or not curves:
        raise ValueError(f"{degrees + 2 * len(curves) + 1} losses do not fix {len(curves)} curves with one exponent")
    longest = max(y_N.size for _, y_N in curves)
    x_CN = np.ones((len(curves), longest))
    y_CN, used_CN = np.zeros_like(x_CN), np.zeros_like(x_CN)
    for i, (x_N, y_N) in enumerate(curves):
        x_CN[i, : x_N.size], y_CN[i, : x_N.size], used_CN[i, : x_N.size] = x_N, y_N, 1.0
    unit = float(np.exp((np.log(x_CN) * used_CN).sum() / used_CN.sum()))

    def solved(exponent: float) -> tuple[Floats, Floats, float]:
        return _floors_and_slopes((x_CN / unit) ** -exponent, y_CN, used_CN)

    low, high = np.log(exponents)
    for _ in range(6):  # each round looks around the best of 25, twelve times as close
        grid = np.linspace(low, high, 25)
        best = int(np.argmin([solved(float(np.exp(g)))[2] for g in grid]))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, 24)]
    exponent = float(np.exp(grid[best]))
    floor_C, slope_C, cost = solved(exponent)
    std = float(np.sqrt(cost / degrees)) if degrees else float("nan")
    return SharedPowerLaws(floor_C, slope_C * unit**exponent, exponent, std)


def _floors_and_slopes(power_CN: Floats, y_CN: Floats, used_CN: Floats) -> tuple[Floats, Floats, float]:
    """c ≥ 0 and A ≥ 0 of y = c + A · power for every curve, and the squared error of all."""
    count_C = used_CN.sum(axis=1)
    power_C, y_C = (power_CN * used_CN).sum(axis=1) / count_C, (y_CN * used_CN).sum(axis=1) / count_C
    centred_CN = (power_CN - power_C[:, None]) * used_CN
    slope_C = np.maximum((centred_CN * y_CN).sum(axis=1) / (centred_CN**2).sum(axis=1), 0.0)
    floor_C = y_C - slope_C * power_C
    alone_C = (power_CN * y_CN * used_CN).sum(axis=1) / (power_CN**2 * used_CN).sum(axis=1)
    slope_C, floor_C = np.where(floor_C < 0, alone_C, slope_C), np.maximum(floor_C, 0.0)
    residual_CN = (y_CN - floor_C[:, None] - slope_C[:, None] * power_CN) * used_CN
    return floor_C, slope_C, float((residual_CN**2).sum())

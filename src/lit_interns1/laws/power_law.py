"""How the loss falls with consumed tokens at one learning rate (arXiv 2601.05049, Eq. 4).

    L(D) = L_0 + A · D^−γ,   L_0, A, γ > 0

Fitted to ln L with Huber's loss (δ = 1e-3, as in arXiv 2203.15556 §3.3) from several starting points; the paper does
not say how it fits. In the constant phase of one run every D is a probe, so a few losses of it give the law.
"""

from __future__ import annotations

import itertools
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

"""The best learning rate and how it moves with model size and data (arXiv 2601.05049).

    L(η | N, D) = L_min + C · (ln η − ln η*)²                         Eq. 2, N and D fixed
    ln η*(N, D) = ln K + a ln N + b ln D                              Eq. 6; published: a −0.2219, b −0.3509, K 38.4588
    η* = η_ref · (N/N_ref)^a · (D/D_ref)^b                            ratio form, needs no K

Being off by Δ in ln η costs C Δ². How the paper weighs its points, extends a search and draws error bands is not known:
ordinary least squares, the rule of `fit_rate_parabola` and first-order error propagation are reconstructions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from lit_interns1.laws.linear import linear_fit
from lit_interns1.laws.power_law import HUBER, PowerLaw, fit_power_law
from lit_interns1.laws.transforms import Floats

PUBLISHED_CONSTANT, PUBLISHED_SIZE_EXPONENT, PUBLISHED_DATA_EXPONENT = 38.4588, -0.2219, -0.3509

Extension = Literal["none", "left", "right"]


@dataclass(frozen=True)
class RateParabola:
    """L = L_min + C (ln η − ln η*)², fitted to the losses of a few rates.

    Attributes:
        best_rate: η*; NaN unless C > 0.
        best_loss: L_min, nats per token; NaN likewise.
        curvature: C, nats per token and unit of (ln η)².
        extension: Where the grid of rates has to go on before η* can be trusted: towards lower (`left`) or higher
            rates (`right`), or nowhere (`none`).
        log_rate_std: Standard error of ln η* (delta method); NaN with three rates, which leave no residual.
        rates_R: The rates that were fitted.
        losses_R: Their losses.
        residual_std: Of the losses around the parabola; NaN with three rates.
    """

    best_rate: float
    best_loss: float
    curvature: float
    extension: Extension
    log_rate_std: float
    rates_R: Floats
    losses_R: Floats
    residual_std: float

    def __call__(self, rates: ArrayLike) -> Floats:
        """The parabola's loss at `rates`."""
        return self.best_loss + self.curvature * np.log(np.asarray(rates, dtype=np.float64) / self.best_rate) ** 2

    def penalty(self, factor: float = 2.0) -> float:
        """C (ln factor)²: the loss lost, in nats per token, by a rate that is `factor` times too high or too low."""
        if factor <= 0:
            raise ValueError(f"factor={factor} must be positive")
        return self.curvature * math.log(factor) ** 2


def fit_rate_parabola(rates: ArrayLike, losses: ArrayLike, num_points: int | None = None) -> RateParabola:
    """Fits the parabola and says whether the rates bracket its minimum.

    The minimum counts as bracketed while it lies inside the fitted rates or at most one step (of the grid, in ln η)
    outside. A rate without a finite loss diverged: it is left out.

    Args:
        rates: (R,) learning rates, in any order.
        losses: (R,) nats per token; not finite where training diverged.
        num_points: Fit only so many neighbouring rates around the lowest loss (≥ 3); far from it losses do not follow
            a parabola. None takes all.

    Raises:
        ValueError: If fewer than three different rates have a finite loss; the message says where to search.
    """
    rates_R, losses_R = np.asarray(rates, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if rates_R.shape != losses_R.shape or rates_R.ndim != 1 or not (rates_R > 0).all():
        raise ValueError(f"rates {rates_R.shape} and losses {losses_R.shape} must be vectors, rates positive")
    if num_points is not None and num_points < 3:
        raise ValueError(f"num_points={num_points} must be at least 3: a parabola has three coefficients")
    order = np.argsort(rates_R)
    finite = order[np.isfinite(losses_R[order])]
    rates_R, losses_R = rates_R[finite], losses_R[finite]
    if np.unique(rates_R).size < 3:
        raise ValueError(
            f"{np.unique(rates_R).size} of {order.size} learning rates have a finite loss, a parabola needs three: "
            + ("add lower rates" if finite.size < order.size else "add rates")
        )
    if num_points is not None and num_points < rates_R.size:
        first = int(np.clip(losses_R.argmin() - num_points // 2, 0, rates_R.size - num_points))
        rates_R, losses_R = rates_R[first : first + num_points], losses_R[first : first + num_points]
    x_R = np.log(rates_R)
    centre = x_R.mean()
    fit = linear_fit(np.stack([np.ones_like(x_R), x_R - centre, (x_R - centre) ** 2], axis=1), losses_R)
    c0, c1, c2 = map(float, fit.beta_P)
    step = (x_R[-1] - x_R[0]) / (np.unique(x_R).size - 1)
    if c2 <= 0:
        lower_is_left = losses_R[0] <= losses_R[-1]
        extension: Extension = "left" if lower_is_left else "right"
        return RateParabola(math.nan, math.nan, c2, extension, math.nan, rates_R, losses_R, fit.residual_std)
    offset = -c1 / (2 * c2)
    gradient_P = np.array([0.0, -1 / (2 * c2), c1 / (2 * c2**2)])
    log_rate_std = float(np.sqrt(gradient_P @ fit.covariance_PP @ gradient_P))
    best = centre + offset
    extension = "left" if best < x_R[0] - step else "right" if best > x_R[-1] + step else "none"
    best_loss = c0 - c1**2 / (4 * c2)
    return RateParabola(math.exp(best), best_loss, c2, extension, log_rate_std, rates_R, losses_R, fit.residual_std)


@dataclass(frozen=True)
class RateExtrapolation:
    """The best rate at a token count that was not trained.

    Attributes:
        parabola: Through the extrapolated losses.
        power_laws: One per rate, in the order of the rates that were fitted.
        loss_R: Extrapolated losses.
        loss_std_R: Their standard errors, NaN with three probes per rate.
    """

    parabola: RateParabola
    power_laws: tuple[PowerLaw, ...]
    loss_R: Floats
    loss_std_R: Floats


def extrapolate_best_rate(
    tokens: ArrayLike, rates: ArrayLike, losses: ArrayLike, target_tokens: float, huber: float | None = HUBER
) -> RateExtrapolation:
    """L(D) per rate, taken to `target_tokens`, then the parabola over rates (arXiv 2601.05049, Eqs. 2 and 4).

    Args:
        tokens: (P,) consumed tokens of the probes, P ≥ 3.
        rates: (R,) learning rates.
        losses: (R, P) losses at the probes, nats per token; a rate with one that is not finite is left out.
        target_tokens: Tokens to extrapolate to.
        huber: See `fit_power_law`.

    Raises:
        ValueError: If shapes do not fit, or fewer than three rates are left.
    """
    tokens_P, rates_R = np.asarray(tokens, dtype=np.float64), np.asarray(rates, dtype=np.float64)
    losses_RP = np.asarray(losses, dtype=np.float64)
    if losses_RP.shape != (rates_R.size, tokens_P.size):
        raise ValueError(f"losses {losses_RP.shape} must be (rates, probes) = ({rates_R.size}, {tokens_P.size})")
    if not target_tokens > 0:
        raise ValueError(f"target_tokens={target_tokens} must be positive")
    kept = np.isfinite(losses_RP).all(axis=1)
    laws = tuple(fit_power_law(tokens_P, losses_P, huber) for losses_P in losses_RP[kept])
    predicted = np.array([law.predict(target_tokens) for law in laws]).reshape(-1, 2)
    every_R = np.full(rates_R.size, np.nan)
    every_R[kept] = predicted[:, 0]
    return RateExtrapolation(fit_rate_parabola(rates_R, every_R), laws, predicted[:, 0], predicted[:, 1])


@dataclass(frozen=True)
class RatePrediction:
    """A learning rate with its band of one standard error, `low` … `high`."""

    rate: float
    low: float
    high: float


@dataclass(frozen=True)
class RateLaw:
    """ln η* = ln K + a ln N + b ln D.

    N and D count what they counted when the law was fitted. For the published law that is not known (N: total, active
    or non-embedding parameters), which the ratio form largely cancels.

    Attributes:
        size_exponent: a.
        data_exponent: b.
        log_constant: ln K; None if only ratios are to be used.
        covariance_33: Covariance of (ln K, a, b); zero if unknown.
        residual_std: Of ln η* around the law; zero if unknown.
        r_squared: Of the fit in ln η*.
        held_out_error: Root mean square error of ln η* at sizes left out of the fit; None if that was not computed.
    """

    size_exponent: float
    data_exponent: float
    log_constant: float | None
    covariance_33: Floats
    residual_std: float
    r_squared: float
    held_out_error: float | None = None

    @property
    def constant(self) -> float | None:
        """K."""
        return None if self.log_constant is None else math.exp(self.log_constant)

    @property
    def standard_errors(self) -> tuple[float, float, float]:
        """Standard errors of ln K, a and b."""
        ln_constant, size, data = map(float, np.sqrt(np.diag(self.covariance_33)))
        return ln_constant, size, data

    def predict(self, parameters: float, tokens: float) -> RatePrediction:
        """K N^a D^b, with the band of one new optimum: errors of the coefficients and the scatter around the law.

        Args:
            parameters: N.
            tokens: D.

        Raises:
            ValueError: If the law has no K, or a count is not positive.
        """
        if self.log_constant is None:
            raise ValueError("this law has no constant K: use predict_ratio with a rate found on a smaller run")
        _check_counts(parameters=parameters, tokens=tokens)
        row_3 = np.array([1.0, math.log(parameters), math.log(tokens)])
        log_rate = float(row_3 @ [self.log_constant, self.size_exponent, self.data_exponent])
        return _band(log_rate, float(row_3 @ self.covariance_33 @ row_3) + self.residual_std**2)

    def predict_ratio(
        self,
        reference_rate: float,
        reference_parameters: float,
        reference_tokens: float,
        parameters: float,
        tokens: float,
        reference_log_std: float = 0.0,
    ) -> RatePrediction:
        """η_ref (N/N_ref)^a (D/D_ref)^b, with the band from the exponents and from η_ref.

        Args:
            reference_rate: η_ref, the best rate found at (N_ref, D_ref).
            reference_parameters: N_ref.
            reference_tokens: D_ref.
            parameters: N.
            tokens: D.
            reference_log_std: Standard error of ln η_ref, such as `RateParabola.log_rate_std`.
        """
        _check_counts(
            reference_rate=reference_rate,
            reference_parameters=reference_parameters,
            reference_tokens=reference_tokens,
            parameters=parameters,
            tokens=tokens,
        )
        row_2 = np.array([math.log(parameters / reference_parameters), math.log(tokens / reference_tokens)])
        log_rate = math.log(reference_rate) + float(row_2 @ [self.size_exponent, self.data_exponent])
        return _band(log_rate, float(row_2 @ self.covariance_33[1:, 1:] @ row_2) + reference_log_std**2)


def published_rate_law(absolute: bool = False) -> RateLaw:
    """The law of arXiv 2601.05049, Eq. 6 (R² 0.9622; standard errors were not published, so its band has none).

    Args:
        absolute: Keep K = 38.4588 too. Its units could not be verified and it gives low rates for AdamW; without it the
            law predicts ratios only.
    """
    constant = math.log(PUBLISHED_CONSTANT) if absolute else None
    return RateLaw(PUBLISHED_SIZE_EXPONENT, PUBLISHED_DATA_EXPONENT, constant, np.zeros((3, 3)), 0.0, 0.9622)


def fit_rate_law(parameters: ArrayLike, tokens: ArrayLike, best_rates: ArrayLike) -> RateLaw:
    """Fits ln η* = ln K + a ln N + b ln D by ordinary least squares.

    Args:
        parameters: (M,) N of each optimum.
        tokens: (M,) D.
        best_rates: (M,) η*.

    Raises:
        ValueError: If a value is not positive, or there are fewer than two different N or D, or three points.
    """
    columns = [np.asarray(column, dtype=np.float64) for column in (parameters, tokens, best_rates)]
    if len({column.shape for column in columns}) > 1 or columns[0].ndim != 1:
        raise ValueError(f"parameters, tokens and best_rates must be vectors of one length, got {columns}")
    if not all((np.isfinite(column) & (column > 0)).all() for column in columns):
        raise ValueError("parameters, tokens and best_rates must be positive and finite")
    x_M, z_M, y_M = map(np.log, columns)
    if np.unique(x_M).size < 2 or np.unique(z_M).size < 2 or x_M.size < 3:
        raise ValueError(
            f"the law needs three optima, two model sizes and two token counts or more; got {x_M.size} optima, "
            f"{np.unique(x_M).size} sizes, {np.unique(z_M).size} token counts"
        )
    centre_2 = np.array([x_M.mean(), z_M.mean()])
    fit = linear_fit(np.stack([np.ones_like(x_M), x_M - centre_2[0], z_M - centre_2[1]], axis=1), y_M)
    shift_33 = np.eye(3)
    shift_33[0, 1:] = -centre_2
    ln_constant, a, b = map(float, shift_33 @ fit.beta_P)
    error_M = fit.leave_one_group_out(x_M) - y_M
    known = np.isfinite(error_M)
    held_out = float(np.sqrt((error_M[known] ** 2).mean())) if known.all() else None
    return RateLaw(
        a, b, ln_constant, shift_33 @ fit.covariance_PP @ shift_33.T, fit.residual_std, fit.r_squared, held_out
    )


def _check_counts(**counts: float) -> None:
    for name, value in counts.items():
        if not value > 0 or not math.isfinite(value):
            raise ValueError(f"{name}={value} must be positive and finite")


def _band(log_rate: float, variance: float) -> RatePrediction:
    spread = math.sqrt(variance)
    return RatePrediction(math.exp(log_rate), math.exp(log_rate - spread), math.exp(log_rate + spread))

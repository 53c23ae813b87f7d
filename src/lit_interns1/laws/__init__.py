"""Curve fits over small arrays, in float64 and without Lightning: plain arrays in, laws with their errors out.

One fitter (`fitter`, `linear`) serves all: the power law of the loss (`power_law`) and the learning rate
(`learning_rate`).
"""

from lit_interns1.laws.fitter import CurveFit, CurveFitter, percentile_interval
from lit_interns1.laws.learning_rate import (
    RateExtrapolation,
    RateLaw,
    RateParabola,
    RatePrediction,
    extrapolate_best_rate,
    fit_rate_law,
    fit_rate_parabola,
    published_rate_law,
)
from lit_interns1.laws.linear import LinearFit, linear_fit
from lit_interns1.laws.power_law import PowerLaw, fit_power_law

__all__ = [
    "CurveFit", "CurveFitter", "LinearFit", "PowerLaw", "RateExtrapolation", "RateLaw", "RateParabola",
    "RatePrediction", "extrapolate_best_rate", "fit_power_law", "fit_rate_law", "fit_rate_parabola", "linear_fit",
    "percentile_interval", "published_rate_law",
]  # fmt: skip

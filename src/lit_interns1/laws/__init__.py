"""Curve fits over small arrays, in float64 and without Lightning: plain arrays in, laws with their errors out.

One fitter (`fitter`, `linear`) serves all: the power law of the loss (`power_law`), the learning rate
(`learning_rate`), the batch size (`batch_size`, `batch_size_table`, `loss_curves`; older accounts in `critical_batch`).
"""

from lit_interns1.laws.batch_size import BatchSizeCurve, BatchSizeFit, fit_batch_size_curve
from lit_interns1.laws.batch_size_table import (
    BatchSizeRow,
    BatchSizeSchedule,
    BatchSizeTable,
    fit_batch_size_schedule,
    fit_batch_size_table,
)
from lit_interns1.laws.critical_batch import (
    Hyperbola,
    NoiseScale,
    NoiseScaleAverage,
    fit_hyperbola,
    kaplan_critical_batch,
    noise_scale,
)
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
from lit_interns1.laws.loss_curves import LossCurve, crossings, smooth_loss
from lit_interns1.laws.power_law import PowerLaw, fit_power_law

__all__ = [
    "BatchSizeCurve", "BatchSizeFit", "BatchSizeRow", "BatchSizeSchedule", "BatchSizeTable", "CurveFit", "CurveFitter",
    "Hyperbola", "LinearFit", "LossCurve", "NoiseScale", "NoiseScaleAverage", "PowerLaw", "RateExtrapolation",
    "RateLaw", "RateParabola", "RatePrediction", "crossings", "extrapolate_best_rate", "fit_batch_size_curve",
    "fit_batch_size_schedule", "fit_batch_size_table", "fit_hyperbola", "fit_power_law", "fit_rate_law",
    "fit_rate_parabola", "kaplan_critical_batch", "linear_fit", "noise_scale", "percentile_interval",
    "published_rate_law", "smooth_loss",
]  # fmt: skip

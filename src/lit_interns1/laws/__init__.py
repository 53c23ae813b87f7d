"""Curve fits over small arrays, in float64 and without Lightning: plain arrays in, laws with their errors out.

One fitter (`fitter`, `linear`) serves all: the power law of the loss (`power_law`), the learning rate
(`learning_rate`), the batch size (`batch_size`, `batch_size_table`, `loss_curves`; other accounts in `critical_batch`),
the schedule (`annealing`, `annealing_plan`), proportions of the training domains (`mixing`, `mixing_search`) and token
weights that predict benchmarks (`salience`, `token_losses`, `salience_file`).
"""

from lit_interns1.laws.annealing import AnnealingCurve, AnnealingLaw, annealing_sums, fit_annealing_law
from lit_interns1.laws.annealing_plan import ScheduleFamily, WSDPlan, plan_wsd
from lit_interns1.laws.batch_size import BatchSizeCurve, BatchSizeFit, fit_batch_size_curve
from lit_interns1.laws.batch_size_table import (
    BatchSizeRow,
    BatchSizeSchedule,
    BatchSizeTable,
    fit_batch_size_schedule,
    fit_batch_size_table,
)
from lit_interns1.laws.critical_batch import (
    BranchedBatch,
    Hyperbola,
    NoiseScale,
    NoiseScaleAverage,
    branched_critical_batch,
    fit_hyperbola,
    kaplan_critical_batch,
    noise_scale,
    smoothed_final_loss,
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
from lit_interns1.laws.mixing import MixingLaw, OptimalMixture, fit_mixing_law
from lit_interns1.laws.mixing_search import caps_of_tokens
from lit_interns1.laws.power_law import PowerLaw, fit_power_law
from lit_interns1.laws.salience import CapabilitySalience, SalienceFit, fit_salience
from lit_interns1.laws.salience_file import SalienceFile, SalienceFileError, load_salience
from lit_interns1.laws.salience_scores import ScoreMetrics, ScoreScale, mean_loss_baseline, score_metrics
from lit_interns1.laws.token_losses import TokenLosses

__all__ = [
    "AnnealingCurve", "AnnealingLaw", "BatchSizeCurve", "BatchSizeFit", "BatchSizeRow", "BatchSizeSchedule",
    "BatchSizeTable", "BranchedBatch", "CapabilitySalience", "CurveFit", "CurveFitter", "Hyperbola", "LinearFit",
    "LossCurve", "MixingLaw", "NoiseScale", "NoiseScaleAverage", "OptimalMixture", "PowerLaw", "RateExtrapolation",
    "RateLaw", "RateParabola", "RatePrediction", "SalienceFile", "SalienceFileError", "SalienceFit", "ScheduleFamily",
    "ScoreMetrics", "ScoreScale", "TokenLosses", "WSDPlan", "annealing_sums", "branched_critical_batch",
    "caps_of_tokens", "crossings", "extrapolate_best_rate", "fit_annealing_law", "fit_batch_size_curve",
    "fit_batch_size_schedule", "fit_batch_size_table", "fit_hyperbola", "fit_mixing_law", "fit_power_law",
    "fit_rate_law", "fit_rate_parabola", "fit_salience", "kaplan_critical_batch", "linear_fit", "load_salience",
    "mean_loss_baseline", "noise_scale", "percentile_interval", "plan_wsd", "published_rate_law", "score_metrics",
    "smooth_loss", "smoothed_final_loss",
]  # fmt: skip

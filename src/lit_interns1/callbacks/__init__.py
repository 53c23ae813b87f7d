"""Callbacks: one file each; they work with any LightningModule unless their page says otherwise."""

from lit_interns1.callbacks.batch_size_scheduler import BatchSizeScheduler
from lit_interns1.callbacks.capability_salience import CapabilitySalienceValidation
from lit_interns1.callbacks.console_progress import ConsoleProgress
from lit_interns1.callbacks.expert_bias import ExpertBiasUpdate
from lit_interns1.callbacks.export_weights import ExportWeights
from lit_interns1.callbacks.gradient_noise_scale import GradientNoiseScale
from lit_interns1.callbacks.learning_rate_search import LearningRateSearch
from lit_interns1.callbacks.optimizer_checks import OptimizerChecks
from lit_interns1.callbacks.rollout_table import RolloutTable
from lit_interns1.callbacks.router_alerts import RouterAlerts
from lit_interns1.callbacks.router_load_monitor import RouterLoadMonitor
from lit_interns1.callbacks.run_checkpoint import RunCheckpoint
from lit_interns1.callbacks.skip_bad_steps import SkipBadSteps
from lit_interns1.callbacks.stability import StabilityDiagnostics
from lit_interns1.callbacks.throughput import ThroughputMonitor
from lit_interns1.callbacks.token_clock import TokenClock
from lit_interns1.callbacks.token_exact_loss import TokenExactLoss
from lit_interns1.callbacks.token_learning_rate import TokenLearningRate

__all__ = [
    "BatchSizeScheduler",
    "CapabilitySalienceValidation",
    "ConsoleProgress",
    "ExpertBiasUpdate",
    "ExportWeights",
    "GradientNoiseScale",
    "LearningRateSearch",
    "OptimizerChecks",
    "RolloutTable",
    "RouterAlerts",
    "RouterLoadMonitor",
    "RunCheckpoint",
    "SkipBadSteps",
    "StabilityDiagnostics",
    "ThroughputMonitor",
    "TokenClock",
    "TokenExactLoss",
    "TokenLearningRate",
]

"""Optimizers, parameter groups, and schedules as pure functions of consumed tokens."""

from lit_interns1.optim.batch_schedules import (
    BatchForLoss,
    BatchSchedule,
    DoublingBatch,
    FittedBatch,
    LinearBatch,
    TabulatedBatch,
)
from lit_interns1.optim.building import build_optimizer
from lit_interns1.optim.fused_backward import FusedBackwardOptimizer, fused_optimizers
from lit_interns1.optim.lomo import LOMO, AdaLomo
from lit_interns1.optim.matrix_groups import matrix_groups
from lit_interns1.optim.matrix_optimizer import MatrixOptimizer
from lit_interns1.optim.mousse import Mousse
from lit_interns1.optim.muon import Muon
from lit_interns1.optim.orthogonalization import newton_schulz, polar_factor
from lit_interns1.optim.parameter_groups import set_rate, weight_decay_groups
from lit_interns1.optim.schedules import TokenSchedule, WarmupStableDecay

__all__ = [
    "AdaLomo", "BatchForLoss", "BatchSchedule", "DoublingBatch", "FittedBatch", "FusedBackwardOptimizer", "LOMO",
    "LinearBatch", "MatrixOptimizer", "Mousse", "Muon", "TabulatedBatch", "TokenSchedule", "WarmupStableDecay",
    "build_optimizer", "fused_optimizers", "matrix_groups", "newton_schulz", "polar_factor", "set_rate",
    "weight_decay_groups",
]  # fmt: skip

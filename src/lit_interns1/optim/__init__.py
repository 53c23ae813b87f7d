"""Optimizers, parameter groups, and schedules as pure functions of consumed tokens."""

from lit_interns1.optim.batch_schedules import (
    BatchForLoss,
    BatchSchedule,
    DoublingBatch,
    FittedBatch,
    LinearBatch,
    TabulatedBatch,
)
from lit_interns1.optim.parameter_groups import weight_decay_groups
from lit_interns1.optim.schedules import TokenSchedule, WarmupStableDecay

__all__ = [
    "BatchForLoss", "BatchSchedule", "DoublingBatch", "FittedBatch", "LinearBatch", "TabulatedBatch", "TokenSchedule",
    "WarmupStableDecay", "weight_decay_groups",
]  # fmt: skip

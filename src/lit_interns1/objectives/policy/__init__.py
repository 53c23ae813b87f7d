"""Policy objectives: advantage × token weight × surrogate × aggregation, with denominators over all ranks."""

from lit_interns1.objectives.policy.advantages import (
    AdvantageEstimator,
    GroupAdvantages,
    GroupNormalized,
    LeaveOneOut,
    LengthWeightedBaseline,
    PassAtK,
    soft_overlong_penalty,
)
from lit_interns1.objectives.policy.clipped import (
    CISPO,
    DAPO,
    GRPO,
    GSPO,
    PPO,
    RLOO,
    DrGRPO,
    RatioObjective,
    ReinforcePlusPlus,
)
from lit_interns1.objectives.policy.corrections import RolloutCorrection, mismatch_metrics, off_policy_sequence_mask
from lit_interns1.objectives.policy.entropy_control import ClipCov, KLCov
from lit_interns1.objectives.policy.inputs import PolicyInputs
from lit_interns1.objectives.policy.intern_s1 import InternS1, InternS1Pro
from lit_interns1.objectives.policy.kl import kl_estimate
from lit_interns1.objectives.policy.objective import PolicyObjective, WeightedTokenLoss
from lit_interns1.objectives.policy.oreal import OREAL, TokenRewardLoss, credit_weights, one_pair_per_group
from lit_interns1.objectives.policy.preparation import RolloutSettings, prepare_updates
from lit_interns1.objectives.policy.token_advantages import (
    Advantages,
    DiscountedReturns,
    GeneralizedAdvantages,
    rewards_with_kl,
    sequence_kl,
    whiten,
)
from lit_interns1.objectives.policy.value import ValueLoss

__all__ = [
    "AdvantageEstimator", "Advantages", "CISPO", "ClipCov", "DAPO", "DiscountedReturns", "DrGRPO", "GRPO", "GSPO",
    "GeneralizedAdvantages", "GroupAdvantages", "GroupNormalized", "InternS1", "InternS1Pro", "KLCov", "LeaveOneOut",
    "LengthWeightedBaseline", "OREAL", "PPO", "PassAtK", "PolicyInputs", "PolicyObjective", "RLOO", "RatioObjective",
    "ReinforcePlusPlus", "RolloutCorrection", "RolloutSettings", "TokenRewardLoss", "ValueLoss", "WeightedTokenLoss",
    "credit_weights", "kl_estimate", "mismatch_metrics", "off_policy_sequence_mask", "one_pair_per_group",
    "prepare_updates", "rewards_with_kl", "sequence_kl", "soft_overlong_penalty", "whiten",
]  # fmt: skip

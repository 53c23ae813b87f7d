"""Preference objectives: log-probabilities of chosen and rejected responses against those of a reference."""

from lit_interns1.objectives.preference.dpo import DPO, IPO, divergence_score
from lit_interns1.objectives.preference.implicit_reward import ImplicitRewardSFT, implicit_reward_utility
from lit_interns1.objectives.preference.inputs import PreferenceInputs
from lit_interns1.objectives.preference.kto import KTO
from lit_interns1.objectives.preference.objective import PairObjective, PreferenceObjective

__all__ = [
    "DPO", "IPO", "ImplicitRewardSFT", "KTO", "PairObjective", "PreferenceInputs", "PreferenceObjective",
    "divergence_score", "implicit_reward_utility",
]  # fmt: skip

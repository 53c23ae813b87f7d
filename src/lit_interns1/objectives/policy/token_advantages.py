"""Advantages that differ along a response.

    r_t = −β · kl_t + 1[t = last] · R          kl_t = an estimate of KL(π_old‖π_ref)
    returns              G_t = r_t + γ G_{t+1}                                  REINFORCE++ (arXiv 2501.03262)
    GAE                  A_t = δ_t + γλ A_{t+1},  δ_t = r_t + γ V_{t+1} − V_t     PPO (arXiv 1506.02438)
    whitening            (A − mean) / std over all response tokens of the global batch

Time is the response tokens of a sample in order: tokens between them (tool output) are skipped, as in verl.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lit_interns1.objectives.options import check_number
from lit_interns1.objectives.policy.advantages import AdvantageEstimator
from lit_interns1.objectives.policy.inputs import PolicyInputs
from lit_interns1.objectives.policy.kl import KLType, check_kl_type, kl_estimate
from lit_interns1.objectives.policy.objective import global_sums


def rewards_with_kl(inputs: PolicyInputs, beta: float = 0.0, kl_type: KLType = "k1") -> Tensor:
    """r_t of the response tokens.

    Args:
        inputs: With `rewards`, and, if β > 0, `old_logprobs` and `ref_logprobs`.
        beta: β of the KL in the reward.
        kl_type: Its estimator.

    Returns:
        (T,) float32.

    Raises:
        ValueError: If a vector is missing.
    """
    inputs.require(["rewards", *(["old_logprobs", "ref_logprobs"] if beta else [])], "rewards_with_kl")
    reward_SL, is_token_SL = inputs.to_rows(inputs.value("rewards").float())
    is_last_SL = is_token_SL & (is_token_SL.cumsum(1) == is_token_SL.sum(1, keepdim=True))
    reward_T = inputs.from_rows(torch.where(is_last_SL, reward_SL, 0.0))
    if beta:
        penalty_T = kl_estimate(inputs.value("old_logprobs"), inputs.value("ref_logprobs"), kl_type)
        reward_T = reward_T - beta * torch.where(inputs.response_mask, penalty_T, 0.0)
    return reward_T


def sequence_kl(inputs: PolicyInputs) -> Tensor:
    """(T,) Σ_t log(π_old/π_ref) of each token's response: RLOO subtracts β times this from R before the baseline."""
    inputs.require(["old_logprobs", "ref_logprobs"], "sequence_kl")
    difference_T = inputs.value("old_logprobs") - inputs.value("ref_logprobs")
    return torch.where(inputs.response_mask, inputs.to_tokens(inputs.sample_sums(difference_T)), 0.0)


def whiten(
    value_T: Tensor, mask_T: Tensor, process_group: dist.ProcessGroup | None = None, epsilon: float = 1e-8
) -> Tensor:
    """Mean 0 and variance 1 over the masked tokens of all ranks (the variance divides by n − 1, as in verl).

    Args:
        value_T: Any values.
        mask_T: bool, tokens that count.
        process_group: Ranks; default: all.
        epsilon: Added to the variance.

    Returns:
        (T,) float32, 0 outside the mask; 0 everywhere if there is one token or all are equal.
    """
    wide_T = torch.where(mask_T, value_T.detach().double(), 0.0)
    sums = global_sums({"count": mask_T.sum(), "sum": wide_T.sum()}, process_group)
    centred_T = torch.where(mask_T, wide_T - sums["sum"] / sums["count"].clamp(min=1.0), 0.0)
    squares = global_sums({"squares": centred_T.square().sum()}, process_group)["squares"]
    variance = squares / (sums["count"] - 1.0).clamp(min=1.0)
    return (centred_T * (variance + epsilon).rsqrt()).float()


@dataclass(frozen=True)
class DiscountedReturns:
    """REINFORCE++: returns with the KL in the reward, whitened over the global batch.

    Its variant `reinforce_plus_plus_baseline` is `GroupNormalized("none")` per sample, then `whiten` over tokens.

    Args:
        gamma: γ in [0, 1].
        beta: β ≥ 0 of the KL in the reward.
        kl_type: Its estimator.

    Raises:
        ValueError: If an option is out of range.
    """

    gamma: float = 1.0
    beta: float = 0.0
    kl_type: KLType = "k1"

    def __post_init__(self) -> None:
        check_number("gamma", self.gamma, 0.0, 1.0)
        check_number("beta", self.beta, 0.0)
        check_kl_type("kl_type", self.kl_type)

    @property
    def requires(self) -> frozenset[str]:
        """Vectors that must be there."""
        return frozenset({"rewards"} | ({"old_logprobs", "ref_logprobs"} if self.beta else set()))

    def __call__(self, inputs: PolicyInputs, process_group: dist.ProcessGroup | None = None) -> PolicyInputs:
        """A copy with `advantages` and `returns`; `inputs` is the whole rollout batch of this rank."""
        reward_SL, _ = inputs.to_rows(rewards_with_kl(inputs, self.beta, self.kl_type))
        returns_T = inputs.from_rows(_discounted(reward_SL, self.gamma))
        advantages_T = whiten(returns_T, inputs.response_mask, process_group)
        return inputs.changed(returns=returns_T, advantages=advantages_T)


@dataclass(frozen=True)
class GeneralizedAdvantages:
    """GAE. Without a critic (no `values`) V is 0: then λ = 1 gives discounted returns.

    Args:
        gamma: γ in [0, 1].
        lam: λ in [0, 1].
        beta: β ≥ 0 of the KL in the reward.
        kl_type: Its estimator.
        whiten: Whether to whiten the advantages over the global batch (returns are not).

    Raises:
        ValueError: If an option is out of range.
    """

    gamma: float = 1.0
    lam: float = 1.0
    beta: float = 0.0
    kl_type: KLType = "k1"
    whiten: bool = True

    def __post_init__(self) -> None:
        check_number("gamma", self.gamma, 0.0, 1.0)
        check_number("lam", self.lam, 0.0, 1.0)
        check_number("beta", self.beta, 0.0)
        check_kl_type("kl_type", self.kl_type)

    @property
    def requires(self) -> frozenset[str]:
        """Vectors that must be there; `values` are used if they are."""
        return frozenset({"rewards"} | ({"old_logprobs", "ref_logprobs"} if self.beta else set()))

    def __call__(self, inputs: PolicyInputs, process_group: dist.ProcessGroup | None = None) -> PolicyInputs:
        """A copy with `advantages` and `returns` = A + V; `inputs` is the whole rollout batch of this rank."""
        reward_T = rewards_with_kl(inputs, self.beta, self.kl_type)
        value_T = torch.zeros_like(reward_T) if inputs.values is None else inputs.values.float()
        reward_SL, _ = inputs.to_rows(reward_T)
        value_SL, _ = inputs.to_rows(value_T)
        next_SL = torch.cat([value_SL[:, 1:], torch.zeros_like(value_SL[:, :1])], dim=1)
        delta_SL = reward_SL + self.gamma * next_SL - value_SL
        advantages_T = inputs.from_rows(_discounted(delta_SL, self.gamma * self.lam))
        returns_T = advantages_T + torch.where(inputs.response_mask, value_T, 0.0)
        if self.whiten:
            advantages_T = whiten(advantages_T, inputs.response_mask, process_group)
        return inputs.changed(returns=returns_T, advantages=advantages_T)


Advantages = AdvantageEstimator | DiscountedReturns | GeneralizedAdvantages
"""Estimators of advantages per sample, or per token."""


def _discounted(value_SL: Tensor, factor: float) -> Tensor:
    """x_t + f · (x_{t+1} + f · …) along each row, which is 0 behind its end."""
    running_S, steps = value_SL.new_zeros(len(value_SL)), []
    for value_S in reversed(value_SL.unbind(1)):
        running_S = value_S + factor * running_S
        steps.append(running_S)
    return torch.stack(steps[::-1], dim=1) if steps else value_SL

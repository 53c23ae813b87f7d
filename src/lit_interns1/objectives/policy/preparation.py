"""From rewards to prepared inputs, once per rollout batch.

    over the whole batch   R − β Σ_t log(π_old/π_ref)  →  Â of groups or of tokens  →  choice of samples  →  π_old/μ
    per optimizer step     the weights of every term of the loss, with denominators over all ranks

Nothing of this depends on the current scores, so several optimizer steps on one rollout batch share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lit_interns1.objectives.metrics import Metrics, masked_metric
from lit_interns1.objectives.policy.advantages import AdvantageEstimator, GroupNormalized
from lit_interns1.objectives.policy.corrections import RolloutCorrection, mismatch_metrics
from lit_interns1.objectives.policy.inputs import PolicyInputs
from lit_interns1.objectives.policy.objective import WeightedTokenLoss
from lit_interns1.objectives.policy.oreal import one_pair_per_group
from lit_interns1.objectives.policy.token_advantages import (
    Advantages,
    DiscountedReturns,
    GeneralizedAdvantages,
    sequence_kl,
)


@dataclass(frozen=True)
class RolloutSettings:
    """What happens to a rollout batch before its first optimizer step.

    Attributes:
        advantages: The estimator.
        reward_kl: β of the KL to the reference in the reward of a sample (RLOO). Estimators per token have their own.
        correction: Weights and rejection by the mismatch of the engines.
        one_pair_per_group: Learn from one right and one wrong sample of each group, at random (OREAL).
    """

    advantages: Advantages
    reward_kl: float = 0.0
    correction: RolloutCorrection | None = None
    one_pair_per_group: bool = False

    @property
    def requires(self) -> frozenset[str]:
        """Vectors that must be there."""
        names: set[str] = {"rewards", *getattr(self.advantages, "requires", ())}
        if self.reward_kl:
            names |= {"old_logprobs", "ref_logprobs"}
        return frozenset(names | (self.correction.requires if self.correction is not None else set()))


def prepare_updates(
    updates: Sequence[PolicyInputs],
    group_ids: Sequence[Tensor],
    losses: Sequence[WeightedTokenLoss],
    settings: RolloutSettings,
    seed: int = 0,
    process_group: dist.ProcessGroup | None = None,
) -> tuple[list[PolicyInputs], Metrics]:
    """Prepares all optimizer steps of a rollout batch. Every rank calls it with as many steps.

    Args:
        updates: Inputs of each step on this rank; `rewards` on all tokens of a sample, sample ids distinct within the
            batch, negative for padding. A sample without response tokens counts as failed.
        group_ids: (T,) per step: the group of each token's sample, 0 … G−1 over all ranks.
        losses: What will be computed: the policy objective, a critic's loss, that of a token reward model.
        settings: What to do.
        seed: Of random choices.
        process_group: Ranks that share the batch; default: all.

    Returns:
        The steps with advantages and weights, and metrics over samples (`reward`, `zero_variance`, `failed`) and tokens
        (`mismatch/…`, `rollout_is/…`).

    Raises:
        ValueError: If a vector is missing or not finite.
    """
    whole = PolicyInputs.joined(updates)
    whole.require(settings.requires, "the rollout batch")
    whole, metrics = _with_advantages(whole, torch.cat(list(group_ids)), settings, seed, process_group)
    if settings.correction is not None:
        whole, more = settings.correction(whole)
        metrics |= more
    elif whole.old_logprobs is not None and whole.rollout_logprobs is not None:
        metrics |= mismatch_metrics(whole)
    steps = whole.split([len(inputs.sample_ids) for inputs in updates])
    for loss in losses:
        steps = [loss.prepare(inputs, process_group) for inputs in steps]
    return steps, metrics


def _with_advantages(
    inputs: PolicyInputs, group_T: Tensor, settings: RolloutSettings, seed: int, process_group: dist.ProcessGroup | None
) -> tuple[PolicyInputs, Metrics]:
    """Advantages, and the samples that are chosen."""
    reward_T, estimator = inputs.value("rewards"), settings.advantages
    if settings.reward_kl:
        reward_T = reward_T - settings.reward_kl * sequence_kl(inputs)
    real_S = inputs.sample_numbers >= 0  # padding has a number, too
    reward_SL, is_token_SL = inputs.to_rows(reward_T)
    answered_S = is_token_SL.any(1)[real_S]
    reward_S = torch.where(answered_S, reward_SL[real_S, :1].sum(1), torch.nan)
    group_S = inputs.sample_values(group_T)[real_S]
    of_groups: AdvantageEstimator = GroupNormalized("none")  # of estimators per token only its metrics are wanted
    if not isinstance(estimator, DiscountedReturns | GeneralizedAdvantages):
        of_groups = estimator
    result = of_groups(
        reward_S, group_S, lengths=inputs.sample_lengths[real_S], valid=answered_S,
        across_ranks=dist.is_available() and dist.is_initialized(), process_group=process_group,
    )  # fmt: skip

    def spread(value_S: Tensor) -> Tensor:
        whole_S = value_S.new_zeros(len(real_S))
        whole_S[real_S] = value_S
        return inputs.to_tokens(whole_S)

    # the rewards themselves stay: which responses are right must not depend on the KL
    if isinstance(estimator, DiscountedReturns | GeneralizedAdvantages):
        estimated = estimator(inputs.changed(rewards=reward_T), process_group)
        inputs = inputs.changed(advantages=estimated.value("advantages"), returns=estimated.value("returns"))
    else:
        inputs = inputs.changed(advantages=spread(result.advantages))
    metrics = dict(result.metrics)
    if settings.one_pair_per_group:
        chosen_S = one_pair_per_group(reward_S, group_S, result.valid, torch.Generator().manual_seed(seed))
        metrics["chosen"] = masked_metric(chosen_S, result.valid)
        inputs = inputs.changed(response_mask=inputs.response_mask & (spread(chosen_S.float()) > 0))
    return inputs, metrics

"""Objectives made of the ratio r = π_θ/π_old: PPO and what came from it.

    clip       −min(r A, clip(r, 1−ε_low, 1+ε_high) A); with dual clip, where A < 0, at most −c A
    cispo      −sg(clip(r, 1−ε_low, 1+ε_high)) A log π_θ
    reinforce  −A log π_θ
    r          of the token, of the sequence as a geometric mean (GSPO) or as a product (RLOO)

    L = aggregate(W · surrogate + β · KL(π_θ‖π_ref)) − c_H · mean entropy

W are the weights of a rollout correction, if there are any. Each preset names the advantages it is meant for:
`advantages` is an estimator to call, but any vector per token is taken. Each is tested against TRL 1.16.0, verl 0.9.1
or a closed form.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lit_interns1.nn.head import TokenScores
from lit_interns1.objectives.metrics import Metrics, masked_metric
from lit_interns1.objectives.options import check_choice, check_number
from lit_interns1.objectives.policy.advantages import GroupNormalized, LeaveOneOut
from lit_interns1.objectives.policy.corrections import RatioLevel, log_ratio_at_level, off_policy_sequence_mask
from lit_interns1.objectives.policy.inputs import PolicyInputs
from lit_interns1.objectives.policy.kl import KLType, check_kl_type, kl_estimate
from lit_interns1.objectives.policy.objective import LossAggregation, PolicyObjective, aggregation_weights
from lit_interns1.objectives.policy.token_advantages import Advantages, DiscountedReturns, GeneralizedAdvantages

Surrogate = Literal["clip", "cispo", "reinforce"]


def clip_ratio(ratio_T: Tensor, epsilon_low: float | None, epsilon_high: float | None) -> Tensor:
    """r held in [1 − ε_low, 1 + ε_high]; None = no bound on that side."""
    if epsilon_low is None and epsilon_high is None:
        return ratio_T
    low = None if epsilon_low is None else 1.0 - epsilon_low
    return ratio_T.clamp(low, None if epsilon_high is None else 1.0 + epsilon_high)


class RatioObjective(PolicyObjective):
    """A surrogate of the ratio, with its aggregation, a KL to the reference and an entropy bonus.

    Args:
        epsilon_low: ε_low ≥ 0 of the clip; None = no lower bound.
        epsilon_high: ε_high ≥ 0 of the clip, an offset from 1 for every surrogate (as in verl; TRL's `epsilon_high` of
            CISPO is the bound itself); None = no upper bound.
        clip_ratio_c: c > 1 of dual clip (arXiv 1912.09729), on tokens with A < 0; None = off.
        delta: Bound of r itself before the minimum is taken, whatever the sign of A (`delta` of TRL); None = off.
        surrogate: "clip", "cispo" or "reinforce".
        importance_sampling_level: What r is: "token"; "geometric" ("sequence" in TRL), the mean of the log over the
            sequence; "sequence", the product over the sequence.
        loss_agg_mode: verl's name of the mean.
        loss_scale_factor: The constant of "seq-mean-token-sum-norm", usually the maximum length of a response.
        beta: Coefficient of the KL to the reference.
        kl_type: Its estimator.
        use_bias_correction_kl: Whether to multiply the KL by r, which makes the gradient of k3 right in the mean.
        entropy_coef: c_H of the mean entropy over all response tokens.
        off_policy_mask_threshold: δ of OPSM in nats; None = off.
        on_policy: One update per rollout batch: r is 1 in value, and no `old_logprobs` are needed.
        advantages: The estimator a module should use; None = the one of the paper.

    Raises:
        ValueError: If an option is out of range, or options exclude one another.
    """

    default_advantages: Advantages = GroupNormalized()

    def __init__(
        self,
        epsilon_low: float | None = 0.2,
        epsilon_high: float | None = 0.2,
        clip_ratio_c: float | None = None,
        delta: float | None = None,
        surrogate: Surrogate = "clip",
        importance_sampling_level: RatioLevel = "token",
        loss_agg_mode: LossAggregation = "token-mean",
        loss_scale_factor: float | None = None,
        beta: float = 0.0,
        kl_type: KLType = "k3",
        use_bias_correction_kl: bool = False,
        entropy_coef: float = 0.0,
        off_policy_mask_threshold: float | None = None,
        on_policy: bool = False,
        advantages: Advantages | None = None,
    ) -> None:
        check_number("epsilon_low", epsilon_low, 0.0, 1.0)
        check_number("epsilon_high", epsilon_high, 0.0)
        check_number("clip_ratio_c", clip_ratio_c, 1.0, strict=True)
        check_number("delta", delta, 0.0, strict=True)
        check_number("beta", beta, 0.0)
        check_number("loss_scale_factor", loss_scale_factor, 0.0, strict=True)
        check_number("entropy_coef", entropy_coef, -1e9)
        check_choice("surrogate", surrogate, Surrogate)
        check_choice("importance_sampling_level", importance_sampling_level, RatioLevel)
        check_choice("loss_agg_mode", loss_agg_mode, LossAggregation)
        check_kl_type("kl_type", kl_type)
        if (loss_agg_mode == "seq-mean-token-sum-norm") != (loss_scale_factor is not None):
            raise ValueError(
                f"loss_scale_factor = {loss_scale_factor} goes with loss_agg_mode = 'seq-mean-token-sum-norm' and only "
                f"with it, got {loss_agg_mode!r}"
            )
        self.epsilon_low, self.epsilon_high, self.clip_ratio_c, self.delta = (
            epsilon_low,
            epsilon_high,
            clip_ratio_c,
            delta,
        )
        self.surrogate, self.level = surrogate, importance_sampling_level
        self.loss_agg_mode, self.loss_scale_factor = loss_agg_mode, loss_scale_factor
        self.beta, self.kl_type, self.use_bias_correction_kl = beta, kl_type, use_bias_correction_kl
        self.entropy_coef, self.off_policy_mask_threshold = entropy_coef, off_policy_mask_threshold
        self.on_policy, self.advantages = on_policy, advantages or self.default_advantages
        self.needs_entropy = entropy_coef != 0.0
        self.requires = frozenset(
            {"advantages"} | (set() if on_policy else {"old_logprobs"}) | ({"ref_logprobs"} if beta else set())
        )

    def term_weights(
        self, inputs: PolicyInputs, totals: Mapping[str, Tensor], process_group: dist.ProcessGroup | None
    ) -> dict[str, Tensor]:
        """Aggregation, and the weights of the rollout correction on the surrogate."""
        mean_T = aggregation_weights(inputs, self.loss_agg_mode, totals, self.loss_scale_factor)
        weights = {"policy": mean_T if inputs.rollout_is_weights is None else mean_T * inputs.rollout_is_weights}
        if self.beta:
            weights["kl"] = mean_T * self.beta
        if self.entropy_coef:
            weights["entropy_bonus"] = inputs.response_mask.float() * -self.entropy_coef
        return weights

    def ratio(self, logp_T: Tensor, inputs: PolicyInputs) -> Tensor:
        """(T,) r with gradient, at the level of this objective."""
        old_T = logp_T.detach() if self.on_policy else inputs.value("old_logprobs")
        if self.level != "token":
            inputs.check_whole_samples(f"importance_sampling_level = {self.level!r}")
        return log_ratio_at_level(logp_T - old_T, inputs, self.level).exp()

    def term_values(
        self, logp_T: Tensor, scores: TokenScores, inputs: PolicyInputs
    ) -> tuple[dict[str, Tensor], Metrics]:
        """The surrogate, the KL and the entropy."""
        advantage_T, mask_T = inputs.value("advantages"), inputs.response_mask
        ratio_T = self.ratio(logp_T, inputs)
        capped_T = ratio_T if self.delta is None else ratio_T.clamp(max=self.delta)
        clipped_T = clip_ratio(ratio_T, self.epsilon_low, self.epsilon_high)
        if self.surrogate == "reinforce":
            value_T = -advantage_T * logp_T
        elif self.surrogate == "cispo":
            value_T = -clipped_T.detach() * advantage_T * logp_T
        else:
            value_T = -torch.minimum(capped_T * advantage_T, clipped_T * advantage_T)
        metrics = self._clip_metrics(value_T, ratio_T, clipped_T, inputs)
        if self.clip_ratio_c is not None:
            bound_T = -self.clip_ratio_c * advantage_T
            value_T = torch.where(advantage_T < 0, torch.minimum(value_T, bound_T), value_T)
        if self.off_policy_mask_threshold is not None:
            inputs.check_whole_samples("off_policy_mask_threshold")
            keep_T = off_policy_sequence_mask(logp_T, inputs, self.off_policy_mask_threshold)
            metrics["off_policy_masked"] = masked_metric(~keep_T, mask_T)
            value_T = torch.where(keep_T, value_T, 0.0)
        values = {"policy": value_T}
        if self.beta:
            kl_T = kl_estimate(logp_T, inputs.value("ref_logprobs"), self.kl_type)
            values["kl"] = kl_T * ratio_T if self.use_bias_correction_kl else kl_T
            metrics["kl"] = masked_metric(kl_T, mask_T)
        if self.entropy_coef and scores.entropy_T is not None:
            values["entropy_bonus"] = scores.entropy_T
        return values, metrics

    def _clip_metrics(self, value_T: Tensor, ratio_T: Tensor, clipped_T: Tensor, inputs: PolicyInputs) -> Metrics:
        mask_T, advantage_T = inputs.response_mask, inputs.value("advantages")
        metrics = {"ratio": masked_metric(ratio_T, mask_T)}
        if self.surrogate == "reinforce":
            return metrics
        low_T, high_T = ratio_T < clipped_T, ratio_T > clipped_T
        if self.surrogate == "clip":  # the clip acts only where it makes the objective smaller
            low_T, high_T = low_T & (advantage_T < 0), high_T & (advantage_T > 0)
        metrics["clip_fraction/low"] = masked_metric(low_T, mask_T)
        metrics["clip_fraction/high"] = masked_metric(high_T, mask_T)
        if self.clip_ratio_c is not None:
            dual_T = (advantage_T < 0) & (value_T > -self.clip_ratio_c * advantage_T)
            metrics["clip_fraction/dual"] = masked_metric(dual_T, mask_T)
        return metrics


class GRPO(RatioObjective):
    """GRPO (arXiv 2402.03300, §4.1): z-scores of groups, PPO's clip, mean per sequence, then over sequences.

    The paper has β = 0.04; TRL's default, and the one here, is 0.

    Args:
        epsilon_low: As in `RatioObjective`.
        epsilon_high: As in `RatioObjective`.
        beta: As in `RatioObjective`.
        loss_agg_mode: As in `RatioObjective`.
        options: Further options of `RatioObjective`.
    """

    def __init__(
        self, epsilon_low: float | None = 0.2, epsilon_high: float | None = 0.2, beta: float = 0.0,
        loss_agg_mode: LossAggregation = "seq-mean-token-mean", **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(epsilon_low, epsilon_high, beta=beta, loss_agg_mode=loss_agg_mode, **options)


class DrGRPO(RatioObjective):
    """Dr. GRPO (arXiv 2503.20783, §3.2): no std in the advantage, no length in the mean: Σ over tokens / (S · L).

    Args:
        max_completion_length: L, tokens: a constant, so that long wrong answers are not favoured.
        epsilon_low: As in `RatioObjective`.
        epsilon_high: As in `RatioObjective`.
        options: Further options of `RatioObjective`.
    """

    default_advantages = GroupNormalized("none")

    def __init__(
        self, max_completion_length: int, epsilon_low: float | None = 0.2, epsilon_high: float | None = 0.2,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(
            epsilon_low, epsilon_high, loss_agg_mode="seq-mean-token-sum-norm", loss_scale_factor=max_completion_length,
            **options,
        )  # fmt: skip


class DAPO(RatioObjective):
    """DAPO (arXiv 2503.14476, §3): a higher upper bound, mean over all tokens, no KL.

    Its other parts: `zero_variance` of the advantages (draw these groups again) and `soft_overlong_penalty`.

    Args:
        epsilon_low: As in `RatioObjective`.
        epsilon_high: As in `RatioObjective`.
        options: Further options of `RatioObjective`.
    """

    def __init__(self, epsilon_low: float | None = 0.2, epsilon_high: float | None = 0.28, **options: Any) -> None:
        super().__init__(epsilon_low, epsilon_high, **options)


class RLOO(RatioObjective):
    """REINFORCE with a leave-one-out baseline (arXiv 2402.14740, §3.3).

    The KL belongs into the reward: R − β·`sequence_kl`, before the baseline (TRL: β = 0.05). TRL clips the ratio of the
    whole sequence; so does the default here. `surrogate: reinforce` with `seq-mean-token-sum` is the form of the paper.

    Args:
        epsilon_low: As in `RatioObjective`.
        epsilon_high: As in `RatioObjective`.
        options: Further options of `RatioObjective`.
    """

    default_advantages = LeaveOneOut()

    def __init__(
        self, epsilon_low: float | None = 0.2, epsilon_high: float | None = 0.2, surrogate: Surrogate = "clip",
        importance_sampling_level: RatioLevel = "sequence", loss_agg_mode: LossAggregation = "seq-mean-token-mean",
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(
            epsilon_low, epsilon_high, surrogate=surrogate, importance_sampling_level=importance_sampling_level,
            loss_agg_mode=loss_agg_mode, **options,
        )  # fmt: skip


class ReinforcePlusPlus(RatioObjective):
    """REINFORCE++ (arXiv 2501.03262): whitened returns with the KL in the reward, PPO's clip, mean over tokens."""

    default_advantages = DiscountedReturns()


class PPO(RatioObjective):
    """PPO (arXiv 1707.06347) with dual clip; the critic has its own loss, `ValueLoss`.

    Args:
        epsilon_low: As in `RatioObjective`.
        epsilon_high: As in `RatioObjective`.
        clip_ratio_c: As in `RatioObjective`.
        options: Further options of `RatioObjective`.
    """

    default_advantages = GeneralizedAdvantages()

    def __init__(
        self, epsilon_low: float | None = 0.2, epsilon_high: float | None = 0.2, clip_ratio_c: float | None = 3.0,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(epsilon_low, epsilon_high, clip_ratio_c, **options)


class GSPO(RatioObjective):
    """GSPO (arXiv 2507.18071, §4.1): the ratio of a sequence is the geometric mean of those of its tokens.

    Args:
        epsilon_low: As in `RatioObjective`.
        epsilon_high: As in `RatioObjective`.
        options: Further options of `RatioObjective`.
    """

    def __init__(self, epsilon_low: float | None = 3e-4, epsilon_high: float | None = 4e-4, **options: Any) -> None:
        super().__init__(
            epsilon_low, epsilon_high, importance_sampling_level="geometric", loss_agg_mode="seq-mean-token-mean",
            **options,
        )  # fmt: skip


class CISPO(RatioObjective):
    """CISPO (MiniMax-M1, arXiv 2506.13585, §3.1): the ratio is clipped and held, the gradient is that of log π.

    `epsilon_high` is an offset from 1, as in verl. TRL's option of this name is the bound itself: its 5.0 is 4.0 here.
    The published runs bound only above; verl bounds both sides.

    Args:
        epsilon_low: As in `RatioObjective`.
        epsilon_high: As in `RatioObjective`.
        options: Further options of `RatioObjective`.
    """

    def __init__(self, epsilon_low: float | None = None, epsilon_high: float | None = 4.0, **options: Any) -> None:
        super().__init__(epsilon_low, epsilon_high, surrogate="cispo", **options)

"""OREAL (arXiv 2502.06781, §2): behaviour cloning on right responses, policy gradient on wrong ones.

    L = f₊/N₊ Σ_{R>0} Σ_t A ω⁺_t (−log π_θ)  −  f₋/N₋ Σ_{R≤0} Σ_t A ω⁻_t π_θ/sg(π_θ)  +  κ/N Σ_t KL(π_θ‖π_ref)

N₊, N₋, N: tokens of right, wrong, all responses of the optimizer step. A is the leave-one-out advantage of rewards ±1,
so A < 0 on the wrong ones. ω comes from a token reward model with scores w (see `credit_weights`).

The released code is followed (InternLM/OREAL). It differs from the paper in three points: ω uses the running mean of w
(Eq. 10 has w_t), right responses are multiplied by A, and the KL is to the frozen initial model (the paper says π_old).
There is one optimizer step per rollout, so nothing is clipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from lit_interns1.nn.head import TokenScores
from lit_interns1.objectives.metrics import Metrics, masked_metric, mean_metric, weighted_sum
from lit_interns1.objectives.options import check_choice, check_number
from lit_interns1.objectives.policy.advantages import AdvantageEstimator, LeaveOneOut
from lit_interns1.objectives.policy.inputs import PolicyInputs
from lit_interns1.objectives.policy.kl import KLType, check_kl_type, kl_estimate
from lit_interns1.objectives.policy.objective import PolicyObjective, WeightedTokenLoss, aggregation_weights, safe_ratio
from lit_interns1.training.summed_loss import SummedLoss

Credit = Literal["token_rm", "none"]
Rescale = Literal["threshold", "topk"]


def credit_weights(
    inputs: PolicyInputs, rescale: Rescale = "threshold", threshold: float = 0.5, topk_ratio: float = 0.25,
    running_mean: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """ω⁺ and ω⁻ of the response tokens.

        c_t = σ(mean(w_1 … w_t))
        threshold   ω⁺ = clamp((c − h)/(1 − h), 0, 1), ω⁻ the same of 1 − c; with h = ½: max(2c − 1, 0), max(1 − 2c, 0)
        topk        the ⌊q·|y|⌋ largest of c (of 1 − c), at least one, scaled to [0, 1] by their minimum and maximum

    Args:
        inputs: With `token_rewards`.
        rescale: Which form.
        threshold: h in [0, 1).
        topk_ratio: q in (0, 1].
        running_mean: False takes w_t itself, as Eq. 10 of the paper is printed.

    Returns:
        Two (T,) float32, 0 outside responses.
    """
    score_SL, is_token_SL = inputs.to_rows(inputs.value("token_rewards").float())
    if running_mean:
        score_SL = score_SL.cumsum(1) / torch.arange(1, score_SL.shape[1] + 1, device=score_SL.device)
    right_SL = torch.sigmoid(score_SL)
    parts = []
    for probability_SL in (right_SL, 1.0 - right_SL):
        if rescale == "threshold":
            weight_SL = ((probability_SL - threshold) / (1.0 - threshold)).clamp(0.0, 1.0)
        else:
            weight_SL = _topk_rescaled(probability_SL, is_token_SL, topk_ratio)
        parts.append(inputs.from_rows(weight_SL))
    return parts[0], parts[1]


def _topk_rescaled(probability_SL: Tensor, is_token_SL: Tensor, ratio: float) -> Tensor:
    if not probability_SL.shape[1]:
        return probability_SL
    kept_S = (is_token_SL.sum(1) * ratio).int().clamp(min=1)
    order_SL = torch.where(is_token_SL, probability_SL, -torch.inf).argsort(dim=1, descending=True, stable=True)
    place_SL = torch.arange(probability_SL.shape[1], device=probability_SL.device).expand_as(order_SL)
    rank_SL = torch.empty_like(order_SL).scatter_(1, order_SL, place_SL)
    top_SL = is_token_SL & (rank_SL < kept_S[:, None])
    high_S1 = torch.where(top_SL, probability_SL, -torch.inf).amax(1, keepdim=True)
    low_S1 = torch.where(top_SL, probability_SL, torch.inf).amin(1, keepdim=True)
    scaled_SL = torch.where(high_S1 > low_S1, (probability_SL - low_S1) / (high_S1 - low_S1), 1.0)
    return torch.where(top_SL, scaled_SL, 0.0)


def one_pair_per_group(
    rewards: Tensor, group_ids: Tensor, valid: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """The samples the released code trains on: of each group with right and wrong responses one of each, at random.

    Advantages are computed over the whole group before. Groups must be whole on this rank.

    Args:
        rewards: (S,) right if above 0.
        group_ids: (S,).
        valid: (S,) bool, samples that may be chosen; default: all whose reward is not NaN.
        generator: Of the choice.

    Returns:
        (S,) bool.
    """
    names, index = torch.unique(group_ids, return_inverse=True)
    usable = ~rewards.isnan() if valid is None else valid & ~rewards.isnan()
    draw = torch.rand(len(rewards), generator=generator).to(rewards.device)
    chosen, present = torch.zeros_like(usable), []
    for mask in (usable & (rewards > 0), usable & ~(rewards > 0)):
        highest = draw.new_full((len(names),), -1.0).scatter_reduce(0, index, torch.where(mask, draw, -1.0), "amax")
        place = torch.arange(len(rewards), device=rewards.device)
        first = place.new_full((len(names),), len(rewards)).scatter_reduce(
            0, index, torch.where(mask & (draw == highest[index]), place, len(rewards)), "amin"
        )
        chosen |= mask & (place == first[index])
        present.append(highest >= 0)
    return chosen & (present[0] & present[1])[index]


class OREAL(PolicyObjective):
    """The loss of OREAL, with or without a token reward model.

    At the start the token reward model says 0, so every ω is 0 and only the KL acts: the released recipe trains that
    model alone for 10 steps first.

    Args:
        credit: "token_rm" weighs tokens by ω, "none" by 1.
        rescale: Form of ω: "threshold" or "topk".
        credit_threshold: h of "threshold" (`correct_threshold` and `incorrect_threshold` of the released code).
        topk_ratio: q of "topk".
        running_mean: Whether ω uses the running mean of the scores (released code) or each score (paper).
        positive_loss_factor: f₊.
        negative_loss_factor: f₋ (η in the paper).
        pos_mult_adv: Whether right responses are multiplied by A (released code) or not (paper).
        kl_coef: κ; 0 = no reference model needed.
        kl_type: Estimator of the KL: "k3" ("unbias" in the released code) or another. The "kl" of that code has the
            opposite sign of k1, which would reward distance; it is not offered.
        advantages: The estimator a module should use; `GroupNormalized(std_epsilon=1e-8)` is the released alternative.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        credit: Credit = "token_rm",
        rescale: Rescale = "threshold",
        credit_threshold: float = 0.5,
        topk_ratio: float = 0.25,
        running_mean: bool = True,
        positive_loss_factor: float = 1.0,
        negative_loss_factor: float = 0.5,
        pos_mult_adv: bool = True,
        kl_coef: float = 0.01,
        kl_type: KLType = "k3",
        advantages: AdvantageEstimator | None = None,
    ) -> None:
        check_choice("credit", credit, Credit)
        check_choice("rescale", rescale, Rescale)
        check_number("credit_threshold", credit_threshold, 0.0, 0.999)
        check_number("topk_ratio", topk_ratio, 0.0, 1.0, strict=True)
        check_number("positive_loss_factor", positive_loss_factor, 0.0)
        check_number("negative_loss_factor", negative_loss_factor, 0.0)
        check_number("kl_coef", kl_coef, 0.0)
        check_kl_type("kl_type", kl_type)
        self.credit, self.rescale, self.credit_threshold, self.topk_ratio = (
            credit,
            rescale,
            credit_threshold,
            topk_ratio,
        )
        self.running_mean, self.pos_mult_adv = running_mean, pos_mult_adv
        self.positive_loss_factor, self.negative_loss_factor = positive_loss_factor, negative_loss_factor
        self.kl_coef, self.kl_type, self.advantages = kl_coef, kl_type, advantages or LeaveOneOut()
        self.requires = frozenset(
            {"advantages", "rewards"}
            | ({"token_rewards"} if credit == "token_rm" else set())
            | ({"ref_logprobs"} if kl_coef else set())
        )

    def extra_counts(self, inputs: PolicyInputs) -> dict[str, Tensor]:
        """N₊; N₋ is the rest."""
        return {"positives": (inputs.response_mask & (inputs.value("rewards") > 0)).sum()}

    def term_weights(
        self, inputs: PolicyInputs, totals: Mapping[str, Tensor], process_group: dist.ProcessGroup | None
    ) -> dict[str, Tensor]:
        """f₊ A ω⁺ N/N₊ on right responses, f₋ A ω⁻ N/N₋ on wrong ones, κ on all."""
        mask_T, advantage_T = inputs.response_mask, inputs.value("advantages")
        positive_T = mask_T & (inputs.value("rewards") > 0)
        right_T = wrong_T = mask_T.float()
        if self.credit == "token_rm":
            right_T, wrong_T = credit_weights(
                inputs, self.rescale, self.credit_threshold, self.topk_ratio, self.running_mean
            )
        scale_positive = self.positive_loss_factor * safe_ratio(totals["tokens"], totals["positives"]).float()
        negatives = totals["tokens"] - totals["positives"]
        scale_negative = self.negative_loss_factor * safe_ratio(totals["tokens"], negatives).float()
        factor_T = advantage_T if self.pos_mult_adv else torch.ones_like(advantage_T)
        weights = {
            "behaviour_cloning": torch.where(positive_T, right_T * factor_T * scale_positive, 0.0),
            "policy_gradient": torch.where(mask_T & ~positive_T, wrong_T * advantage_T * scale_negative, 0.0),
        }
        return weights | ({"kl": mask_T * self.kl_coef} if self.kl_coef else {})

    def term_values(
        self, logp_T: Tensor, scores: TokenScores, inputs: PolicyInputs
    ) -> tuple[dict[str, Tensor], Metrics]:
        """−log π_θ, −π_θ/sg(π_θ), and the KL."""
        mask_T, positive_T = inputs.response_mask, inputs.value("rewards") > 0
        values = {"behaviour_cloning": -logp_T, "policy_gradient": -(logp_T - logp_T.detach()).exp()}
        metrics = {
            "positive_tokens": masked_metric(positive_T, mask_T),
            "positive_nll": masked_metric(-logp_T, mask_T & positive_T),
            "negative_nll": masked_metric(-logp_T, mask_T & ~positive_T),
        }
        if self.kl_coef:
            values["kl"] = kl_estimate(logp_T, inputs.value("ref_logprobs"), self.kl_type)
            metrics["kl"] = masked_metric(values["kl"], mask_T)
        return values, metrics


class TokenRewardLoss(WeightedTokenLoss):
    """What trains the token reward model: cross-entropy of the mean score of a response (Eq. 12 of the paper).

    L = mean over responses of BCE(σ(mean_t w_t), 1[R > 0])
    """

    requires = frozenset({"rewards"})

    def term_weights(
        self, inputs: PolicyInputs, totals: Mapping[str, Tensor], process_group: dist.ProcessGroup | None
    ) -> dict[str, Tensor]:
        """The mean over responses, spread over their tokens."""
        return {"token_reward": aggregation_weights(inputs, "seq-mean-token-mean", totals, None)}

    def __call__(self, token_rewards_T: Tensor, inputs: PolicyInputs) -> tuple[SummedLoss, Metrics]:
        """The loss of one micro-batch.

        Args:
            token_rewards_T: (T,) scores w with gradient, at the positions of the labels.
            inputs: The part of the prepared inputs that belongs to it; whole samples.

        Returns:
            The loss, and metrics: `loss/token_reward`, `token_reward_accuracy` (a response counts by its tokens).

        Raises:
            ValueError: If shapes do not fit, a vector is missing or a sample is cut.
        """
        inputs.check_whole_samples("TokenRewardLoss")
        mean_S, loss_S, right_S = self._responses(token_rewards_T, inputs)
        right_T = inputs.to_tokens((mean_S > 0) == right_S)
        metrics = {"token_reward_accuracy": masked_metric(right_T, inputs.response_mask)}
        return self.weighted_sum({"token_reward": inputs.to_tokens(loss_S)}, inputs, metrics), metrics

    def over_responses(self, token_rewards_T: Tensor, inputs: PolicyInputs) -> tuple[SummedLoss, Metrics]:
        """The same loss without `prepare`, for micro-batches that come one by one: Σ over responses with their number.

        Args:
            token_rewards_T: (T,) scores w with gradient, at the positions of the labels.
            inputs: Whole samples.

        Returns:
            The loss, and metrics by response: `accuracy`, `score` (the mean w) and `loss`.

        Raises:
            ValueError: If shapes do not fit or a vector is missing.
        """
        mean_S, loss_S, right_S = self._responses(token_rewards_T, inputs)
        there_S = inputs.sample_lengths > 0
        metrics = {
            "accuracy": mean_metric(((mean_S > 0) == right_S)[there_S]),
            "score": mean_metric(mean_S[there_S]),
        }
        return weighted_sum(loss_S[there_S], None, metrics), metrics

    def _responses(self, token_rewards_T: Tensor, inputs: PolicyInputs) -> tuple[Tensor, Tensor, Tensor]:
        """(S',) mean score, cross-entropy, and whether the reward is above 0, of each sample id that occurs."""
        if token_rewards_T.shape != inputs.sample_ids.shape:
            raise ValueError(
                f"token rewards {tuple(token_rewards_T.shape)} for inputs of {tuple(inputs.sample_ids.shape)} tokens"
            )
        inputs.require(self.requires, "TokenRewardLoss")
        mean_S = inputs.sample_means(token_rewards_T)
        right_S = inputs.sample_means(inputs.value("rewards").to(mean_S.dtype)) > 0
        loss_S = F.binary_cross_entropy_with_logits(mean_S, right_S.to(mean_S.dtype), reduction="none")
        return mean_S, loss_S, right_S

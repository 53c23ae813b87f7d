"""Supervised fine-tuning as learning an implicit reward (arXiv 2507.00018): L = −φ(β h)/β, h = log π_θ/π_ref.

    tv          φ = u                plain fine-tuning: the reference drops out
    pearson     φ = u − u²/4
    hellinger   φ = u/(1+u)          u > −1
    js          φ = log(2 − e^{−u})  u > −log 2
    reverse_kl  φ = 1 − e^{−u}
    forward_kl  φ = log(1+u)         u > −1

The gradient is that of fine-tuning times φ'(β h): tokens that π_θ already finds likelier than π_ref does weigh less.

This is a reconstruction: the equations of the paper were not available. φ is the concave function that belongs to a
divergence in inverse reinforcement learning (arXiv 2106.12142); the shared offset of the reward, V(x), is chosen such
that φ'(0) = 1: every divergence starts at the reference with the gradient of fine-tuning, whatever β. (Written without
the offset: −e^{−(u+1)} and 1 + log u for the two KLs.)
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from lit_interns1.objectives.metrics import Metrics, mean_metric, weighted_sum
from lit_interns1.objectives.options import check_choice, check_number
from lit_interns1.objectives.preference.inputs import PreferenceInputs
from lit_interns1.objectives.preference.objective import PreferenceObjective
from lit_interns1.training.summed_loss import SummedLoss

RewardDivergence = Literal["tv", "pearson", "hellinger", "js", "reverse_kl", "forward_kl"]
Level = Literal["token", "sequence"]


def implicit_reward_utility(u: Tensor, divergence: RewardDivergence, clip: float) -> Tensor:
    """φ(u), continued by its tangents where |φ'| would exceed `clip`; so any u is in its domain.

    Args:
        u: β h.
        divergence: Which.
        clip: c > 1.
    """
    if divergence == "tv":
        return u
    low, high = {
        "pearson": (2.0 * (1.0 - clip), 2.0 * (1.0 + clip)),
        "hellinger": (clip**-0.5 - 1.0, math.inf),
        "js": (math.log((1.0 + 1.0 / clip) / 2.0), math.inf),
        "reverse_kl": (-math.log(clip), math.inf),
        "forward_kl": (1.0 / clip - 1.0, math.inf),
    }[divergence]
    inside = u.clamp(low, high)
    outside = torch.where(u < low, clip * (u - low), torch.where(u > high, -clip * (u - high), 0.0))
    if divergence == "pearson":
        return inside - inside.square() / 4.0 + outside
    if divergence == "hellinger":
        return inside / (1.0 + inside) + outside
    if divergence == "js":
        return torch.log1p(-torch.expm1(-inside)) + outside
    if divergence == "reverse_kl":
        return -torch.expm1(-inside) + outside
    return torch.log1p(inside) + outside


class ImplicitRewardSFT(PreferenceObjective):
    """Fine-tuning on chosen (or all) responses, held to a reference by a divergence. A reconstruction, see above.

    The authors' advice is a smaller learning rate than usual when DPO follows.

    Args:
        divergence: Which; "tv" is plain fine-tuning and needs no reference.
        beta: β > 0: how much the weight of a token falls with its log-ratio; towards 0 all are plain fine-tuning.
        level: "token" takes h per token, and the loss is the mean over tokens; "sequence" takes the sum over a response
            as h, and the mean over responses.
        clip: Largest weight |φ'| > 1 of a token (or response) relative to plain fine-tuning.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self, divergence: RewardDivergence = "pearson", beta: float = 1.0, level: Level = "token", clip: float = 10.0
    ) -> None:
        check_choice("divergence", divergence, RewardDivergence)
        check_choice("level", level, Level)
        check_number("beta", beta, 0.0, strict=True)
        check_number("clip", clip, 1.0, strict=True)
        self.divergence, self.beta, self.level, self.clip = divergence, beta, level, clip
        self.requires = frozenset() if divergence == "tv" else frozenset({"ref_logprobs"})

    def loss(self, logp_T: Tensor, inputs: PreferenceInputs, metrics: Metrics) -> SummedLoss:
        """The loss, whose count is the number of tokens (or responses) that learn.

        Adds `chosen_logprobs` and, if there is a reference, the implicit rewards `chosen_rewards` β h.
        """
        responses = inputs.responses
        learning_S = responses.chosen_S & ~responses.mismatched_S
        index_S = responses.index_S[learning_S]
        ratio_T = logp_T if self.divergence == "tv" else logp_T - inputs.value("ref_logprobs")
        metrics["chosen_logprobs"] = mean_metric(inputs.sample_sums(logp_T)[index_S])
        if inputs.ref_logprobs is not None:
            reward_T = self.beta * (logp_T - inputs.ref_logprobs)
            metrics["chosen_rewards"] = mean_metric(inputs.sample_sums(reward_T)[index_S])
        if self.level == "sequence":
            weight_N: Tensor | None = responses.weight_S[learning_S]
            ratio_N = inputs.sample_sums(ratio_T)[index_S]
        else:
            token_T = inputs.response_mask & inputs.is_chosen.bool()
            if inputs.mismatched is not None:
                token_T &= ~inputs.mismatched.bool()
            ratio_N, weight_N = ratio_T[token_T], None if inputs.weights is None else inputs.weights[token_T]
        loss_N = -implicit_reward_utility(self.beta * ratio_N, self.divergence, self.clip) / self.beta
        return weighted_sum(loss_N, weight_N, metrics)

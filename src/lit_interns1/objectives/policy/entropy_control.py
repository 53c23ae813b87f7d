"""Policy losses that hold entropy up by treating the tokens of highest covariance apart (arXiv 2505.22617, §4).

    KL-Cov    −A r + κ · kl_t on the selected tokens          Clip-Cov    PPO's clip, nothing on the selected tokens

How tokens are selected, and from which batch: `covariance`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lit_interns1.nn.head import TokenScores
from lit_interns1.objectives.metrics import Metrics, masked_metric
from lit_interns1.objectives.options import check_number
from lit_interns1.objectives.policy.clipped import RatioObjective
from lit_interns1.objectives.policy.covariance import clip_cov_mask, kl_cov_mask
from lit_interns1.objectives.policy.inputs import PolicyInputs
from lit_interns1.objectives.policy.kl import KLType, check_kl_type, kl_estimate


class KLCov(RatioObjective):
    """KL-Cov: no clip, and a penalty on a small share of the tokens.

    Args:
        kl_cov_ratio: Share of the response tokens of an optimizer step, in (0, 1].
        ppo_kl_coef: κ (1 in the paper; 0.1 in verl's configuration).
        kl_cov_type: Estimator of KL(π_old‖π_θ) on the selected tokens; the released code has "abs".
        options: Further options of `RatioObjective`.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self, kl_cov_ratio: float = 2e-4, ppo_kl_coef: float = 1.0, kl_cov_type: KLType = "abs", **options: Any
    ) -> None:
        super().__init__(epsilon_low=None, epsilon_high=None, **options)
        check_number("kl_cov_ratio", kl_cov_ratio, 0.0, 1.0, strict=True)
        check_number("ppo_kl_coef", ppo_kl_coef, 0.0)
        check_kl_type("kl_cov_type", kl_cov_type)
        self.kl_cov_ratio, self.ppo_kl_coef, self.kl_cov_type = kl_cov_ratio, ppo_kl_coef, kl_cov_type
        self.requires |= {"old_logprobs"}

    def term_weights(
        self, inputs: PolicyInputs, totals: Mapping[str, Tensor], process_group: dist.ProcessGroup | None
    ) -> dict[str, Tensor]:
        """κ on the selected tokens, weighted as the policy term is."""
        weights = super().term_weights(inputs, totals, process_group)
        selected_T = kl_cov_mask(inputs, self.kl_cov_ratio, process_group)
        return weights | {"kl_cov": weights["policy"] * selected_T * self.ppo_kl_coef}

    def term_values(
        self, logp_T: Tensor, scores: TokenScores, inputs: PolicyInputs
    ) -> tuple[dict[str, Tensor], Metrics]:
        """The policy term, and the penalty."""
        values, metrics = super().term_values(logp_T, scores, inputs)
        values["kl_cov"] = kl_estimate(inputs.value("old_logprobs"), logp_T, self.kl_cov_type)
        metrics["kl_cov_selected"] = masked_metric(inputs.weights["kl_cov"] != 0, inputs.response_mask)
        return values, metrics


class ClipCov(RatioObjective):
    """Clip-Cov: a random share of the tokens with a covariance between two bounds has no loss.

    The released code leaves out tokens that PPO clips already; here the selection is made before the first update, when
    none is clipped.

    Args:
        clip_cov_ratio: Share of the response tokens of an optimizer step, in (0, 1].
        clip_cov_low: Lower bound of the covariance, exclusive (`clip_cov_lb` in verl).
        clip_cov_high: Upper bound of the covariance, exclusive (`clip_cov_ub` in verl).
        seed: Of the choice.
        options: Further options of `RatioObjective`.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self, clip_cov_ratio: float = 2e-4, clip_cov_low: float = 1.0, clip_cov_high: float = 5.0, seed: int = 0,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(**options)
        check_number("clip_cov_ratio", clip_cov_ratio, 0.0, 1.0, strict=True)
        if not clip_cov_low < clip_cov_high:
            raise ValueError(f"clip_cov_low = {clip_cov_low} must be below clip_cov_high = {clip_cov_high}")
        self.clip_cov_ratio, self.clip_cov_low, self.clip_cov_high = clip_cov_ratio, clip_cov_low, clip_cov_high
        self.seed = seed
        self.requires |= {"old_logprobs"}

    def term_weights(
        self, inputs: PolicyInputs, totals: Mapping[str, Tensor], process_group: dist.ProcessGroup | None
    ) -> dict[str, Tensor]:
        """The policy term has the weight 0 on the selected tokens."""
        weights = super().term_weights(inputs, totals, process_group)
        selected_T = clip_cov_mask(
            inputs, self.clip_cov_ratio, self.clip_cov_low, self.clip_cov_high, self.seed, process_group
        )
        return weights | {"policy": torch.where(selected_T, 0.0, weights["policy"])}

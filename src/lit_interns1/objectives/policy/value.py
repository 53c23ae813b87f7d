"""The critic's loss of PPO, clipped around the values of the rollout.

L = ½ mean_t max((V − G)², (clip(V, V_old − ε, V_old + ε) − G)²)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from lit_interns1.objectives.metrics import Metrics, masked_metric
from lit_interns1.objectives.options import check_choice, check_number
from lit_interns1.objectives.policy.inputs import PolicyInputs
from lit_interns1.objectives.policy.objective import LossAggregation, WeightedTokenLoss, aggregation_weights
from lit_interns1.training.summed_loss import SummedLoss


class ValueLoss(WeightedTokenLoss):
    """Squared error of the values, per token.

    Args:
        cliprange_value: ε > 0 (0.5 in verl, 0.2 in TRL's PPO); None = no clip.
        loss_agg_mode: verl's name of the mean, without a constant.
        vf_coef: Factor of the loss.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self, cliprange_value: float | None = 0.5, loss_agg_mode: LossAggregation = "token-mean", vf_coef: float = 1.0
    ) -> None:
        check_number("cliprange_value", cliprange_value, 0.0, strict=True)
        check_number("vf_coef", vf_coef, 0.0)
        check_choice("loss_agg_mode", loss_agg_mode, LossAggregation)
        if loss_agg_mode == "seq-mean-token-sum-norm":
            raise ValueError(
                "loss_agg_mode = 'seq-mean-token-sum-norm' has no meaning for values: there is no constant"
            )
        self.cliprange_value, self.loss_agg_mode, self.vf_coef = cliprange_value, loss_agg_mode, vf_coef
        self.requires = frozenset({"returns"} | ({"values"} if cliprange_value is not None else set()))

    def term_weights(
        self, inputs: PolicyInputs, totals: Mapping[str, Tensor], process_group: dist.ProcessGroup | None
    ) -> dict[str, Tensor]:
        """½ of the aggregation."""
        return {"value": aggregation_weights(inputs, self.loss_agg_mode, totals, None) * (0.5 * self.vf_coef)}

    def __call__(self, values_T: Tensor, inputs: PolicyInputs) -> tuple[SummedLoss, Metrics]:
        """The loss of one micro-batch.

        Args:
            values_T: (T,) V now, with gradient, at the positions of the labels.
            inputs: The part of the prepared inputs that belongs to it.

        Returns:
            The loss, and metrics: `loss/value`, `value_clip_fraction`, `value_error` (mean of (V − G)²).

        Raises:
            ValueError: If shapes do not fit or a vector is missing.
        """
        if values_T.shape != inputs.sample_ids.shape:
            raise ValueError(f"values {tuple(values_T.shape)} for inputs of {tuple(inputs.sample_ids.shape)} tokens")
        inputs.require(self.requires, "ValueLoss")
        return_T, mask_T = inputs.value("returns"), inputs.response_mask
        error_T = (values_T - return_T).square()
        metrics = {"value_error": masked_metric(error_T, mask_T)}
        if self.cliprange_value is not None:
            old_T = inputs.value("values")
            clipped_T = values_T.clamp(old_T - self.cliprange_value, old_T + self.cliprange_value)
            clipped_error_T = (clipped_T - return_T).square()
            metrics["value_clip_fraction"] = masked_metric(clipped_error_T > error_T, mask_T)
            error_T = torch.maximum(error_T, clipped_error_T)
        return self.weighted_sum({"value": error_T}, inputs, metrics), metrics

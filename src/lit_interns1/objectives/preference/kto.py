"""Kahneman–Tversky optimization (arXiv 2402.01306, Eq. 7): responses are desirable or not, none is paired.

    desirable    λ_D (1 − σ(β(h − z0)))          z0 = max(0, mean of h over mismatched responses), no gradient
    undesirable  λ_U (1 − σ(β(z0 − h)))

h = log π_θ/π_ref of the response. z0 estimates KL(π_θ‖π_ref) from responses that belong to other prompts, which the
data put beside the ones that learn (`mismatched`). The loss is not linear in z0: what z0 is taken over matters.

    as it comes       the micro-batch, over all ranks (TRL: the same, with ranks weighted equally)
    after `prepare`   the whole optimizer step, over all ranks: the same for any split into micro-batches
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lit_interns1.nn.head import TokenScores
from lit_interns1.objectives.metrics import Metrics, masked_metric, mean_metric, weighted_sum
from lit_interns1.objectives.options import check_choice, check_number
from lit_interns1.objectives.preference.inputs import PreferenceInputs
from lit_interns1.objectives.preference.objective import PreferenceObjective
from lit_interns1.training.summed_loss import SummedLoss
from lit_interns1.training.window_means import all_reduce_sum

Baseline = Literal["mismatched", "none"]


class KTO(PreferenceObjective):
    """A loss per response; needs no pairs.

    Without `prepare` there is one small all-reduce in each call, so all ranks must call it equally often.

    Args:
        beta: β > 0: how strongly the policy is held to the reference.
        desirable_weight: λ_D ≥ 0.
        undesirable_weight: λ_U ≥ 0. The paper holds λ_D n_D/(λ_U n_U) between 1 and 4/3 (Eq. 8), n: responses of the
            data.
        baseline: "none" takes z0 = 0 and needs no mismatched responses (APO-zero, arXiv 2408.06266).

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0,
        baseline: Baseline = "mismatched",
    ) -> None:  # fmt: skip
        check_number("beta", beta, 0.0, strict=True)
        check_number("desirable_weight", desirable_weight, 0.0)
        check_number("undesirable_weight", undesirable_weight, 0.0)
        check_choice("baseline", baseline, Baseline)
        self.beta, self.baseline = beta, baseline
        self.desirable_weight, self.undesirable_weight = desirable_weight, undesirable_weight

    def prepare(
        self, scores: TokenScores, inputs: PreferenceInputs, process_group: dist.ProcessGroup | None = None
    ) -> PreferenceInputs:
        """Fills `kl_baseline` with z0 of the whole optimizer step.

        Args:
            scores: Of all micro-batches of this rank in the step, at the weights before it; without gradient is enough.
            inputs: Of the same tokens.
            process_group: Ranks that share the step; default: all.

        Raises:
            ValueError: As a call; all ranks alike if there are no mismatched responses.
        """
        logp_T = self.response_logprobs(scores, inputs)
        baseline = self._baseline(self._ratios(logp_T, inputs), inputs, process_group)
        return replace(inputs, kl_baseline=baseline.expand(inputs.sample_ids.shape))

    def _ratios(self, logp_T: Tensor, inputs: PreferenceInputs) -> Tensor:
        """(S,) h of each response."""
        return inputs.sample_sums(logp_T - inputs.value("ref_logprobs"))[inputs.responses.index_S]

    def _baseline(
        self, ratio_S: Tensor, inputs: PreferenceInputs, process_group: dist.ProcessGroup | None = None
    ) -> Tensor:  # fmt: skip
        """z0 over these responses and those of the other ranks, a scalar."""
        if self.baseline == "none":
            return ratio_S.new_zeros(())
        mismatched_S = inputs.responses.mismatched_S
        sums = [torch.where(mismatched_S, ratio_S.detach(), 0).sum(), mismatched_S.sum(), (~mismatched_S).sum()]
        total, count, learning = all_reduce_sum(torch.stack([value.double() for value in sums]), process_group).unbind()
        if bool((count == 0) & (learning > 0)):
            raise ValueError(
                f"KTO: none of {int(learning)} responses is marked in `mismatched`, so z0 cannot be estimated: add "
                "responses of other prompts to the data, or set baseline = 'none'"
            )
        return (total / count.clamp(min=1.0)).clamp(min=0.0).to(ratio_S.dtype)

    def loss(self, logp_T: Tensor, inputs: PreferenceInputs, metrics: Metrics) -> SummedLoss:
        """The loss, whose count is the number of responses that are not mismatched.

        Adds `kl` (z0), `accuracy` (responses on the right side of z0, a tie counts one half), and the implicit rewards
        β h and log-probabilities of desirable ("chosen") and undesirable ("rejected") responses.
        """
        responses = inputs.responses
        ratio_S = self._ratios(logp_T, inputs)
        if inputs.kl_baseline is None:
            baseline_S = self._baseline(ratio_S, inputs).expand_as(ratio_S)
        else:
            baseline_S = inputs.first_values(inputs.kl_baseline)[responses.index_S].to(ratio_S.dtype)
        learning_S = ~responses.mismatched_S
        chosen_S = responses.chosen_S[learning_S]
        ratio_S, baseline_S = ratio_S[learning_S], baseline_S[learning_S]
        side_S = torch.where(chosen_S, 1.0, -1.0)
        right_S = side_S * (ratio_S - baseline_S)
        factor_S = torch.where(chosen_S, self.desirable_weight, self.undesirable_weight).to(ratio_S.dtype)
        loss_S = factor_S * (-self.beta * right_S).sigmoid()
        logp_S = inputs.sample_sums(logp_T.detach())[responses.index_S][learning_S]
        for name, mask_S in (("chosen", chosen_S), ("rejected", ~chosen_S)):
            metrics[f"{name}_rewards"] = masked_metric(self.beta * ratio_S, mask_S)
            metrics[f"{name}_logprobs"] = masked_metric(logp_S, mask_S)
        metrics |= {"accuracy": mean_metric((1.0 + right_S.sign()) / 2.0), "kl": mean_metric(baseline_S)}
        return weighted_sum(loss_S, responses.weight_S[learning_S], metrics)

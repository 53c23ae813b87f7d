"""The common form of policy objectives: a few terms, each a weighted sum over tokens.

    L = Σ_k Σ_t w_kt · v_kt(logp_t) / N          N = response tokens of the optimizer step, over all ranks

Only the values v depend on the current scores. The weights w (advantage, aggregation, masks, factors) do not, so
`prepare` makes them once for all micro-batches of an optimizer step, with one small all-reduce. A term with another
denominator D has the factor N/D in its weights; then every term has the count N, and `SummedLoss` divides once: exact
for any split into micro-batches and ranks. A term with D = 0 (no positives) is left out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lit_interns1.nn.head import TokenScores
from lit_interns1.objectives.metrics import Metrics, masked_metric
from lit_interns1.objectives.policy.inputs import PolicyInputs
from lit_interns1.training.summed_loss import SummedLoss
from lit_interns1.training.window_means import all_reduce_sum

LossAggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
"""verl's names. A sequence is a sample with at least one response token."""


def safe_ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, and 0 where the denominator is 0."""
    return torch.where(denominator > 0, numerator / denominator.clamp(min=1e-30), 0.0)


def global_sums(values: Mapping[str, Tensor], process_group: dist.ProcessGroup | None = None) -> dict[str, Tensor]:
    """Scalars by name, summed over ranks in float64 by one all-reduce."""
    stacked = torch.stack([value.detach().double() for value in values.values()])
    return dict(zip(values, all_reduce_sum(stacked, process_group).unbind(), strict=True))


def aggregation_weights(
    inputs: PolicyInputs, mode: LossAggregation, totals: Mapping[str, Tensor], loss_scale_factor: float | None
) -> Tensor:
    """The weight of each token in the mean over an optimizer step, times the tokens of the step.

    Args:
        inputs: With T tokens.
        mode: Which mean.
        totals: `tokens` N and `samples` S of the optimizer step.
        loss_scale_factor: L, the constant of "seq-mean-token-sum-norm".

    Returns:
        (T,) float32: 1, N/(S·|y|), N/S or N/(S·L); 0 outside responses.
    """
    weight_T = inputs.response_mask.float()
    if mode == "token-mean":
        return weight_T
    tokens_per_sample = safe_ratio(totals["tokens"], totals["samples"]).float()
    if mode == "seq-mean-token-mean":
        return weight_T * tokens_per_sample / inputs.to_tokens(inputs.sample_lengths).clamp(min=1.0)
    return weight_T * tokens_per_sample / (1.0 if mode == "seq-mean-token-sum" else loss_scale_factor or 1.0)


class WeightedTokenLoss(ABC):
    """A loss of weighted terms: `prepare` once per optimizer step, then sums per micro-batch.

    Attributes:
        requires: Names of the vectors that a module must prepare, among `PolicyInputs.token_values`.
    """

    requires: frozenset[str] = frozenset()

    def prepare(self, inputs: PolicyInputs, process_group: dist.ProcessGroup | None = None) -> PolicyInputs:
        """Makes the weights of all terms.

        Args:
            inputs: All micro-batches of this rank in one optimizer step, with distinct sample ids.
            process_group: Ranks that share the step; default: all.

        Returns:
            A copy with `response_lengths` and, beside those that are there, `weights`; split it as the batch is split.

        Raises:
            ValueError: If a required vector is missing, or not finite on a response token of any rank (the log μ of a
                token may be NaN).
        """
        inputs.require(self.requires, type(self).__name__)
        length_S = inputs.sample_lengths
        counts = {"tokens": length_S.sum(), "samples": (length_S > 0).sum(), **self.extra_counts(inputs)}
        wrong = {name: inputs.value(name) for name in sorted(self.requires)}
        wrong = {n: x.isinf() if n == "rollout_logprobs" else ~x.isfinite() for n, x in wrong.items()}
        totals = global_sums(counts | {f"wrong {name}": x.sum() for name, x in wrong.items()}, process_group)
        bad = [f"{name} on {int(n)}" for name in wrong if (n := totals[f"wrong {name}"].item())]
        if bad:
            raise ValueError(
                f"{type(self).__name__}: of {int(totals['tokens'])} response tokens of this step, not finite are "
                f"{', '.join(bad)}: leave failed samples out of response_mask"
            )
        weights = self.term_weights(inputs, totals, process_group)
        return replace(inputs, weights={**inputs.weights, **weights}, response_lengths=inputs.to_tokens(length_S))

    def extra_counts(self, inputs: PolicyInputs) -> dict[str, Tensor]:
        """Further scalars to be summed over the ranks for `term_weights`."""
        return {}

    @abstractmethod
    def term_weights(
        self, inputs: PolicyInputs, totals: Mapping[str, Tensor], process_group: dist.ProcessGroup | None
    ) -> dict[str, Tensor]:
        """(T,) weights by term; `totals` holds the counts of the optimizer step over all ranks."""

    def weighted_sum(self, values: Mapping[str, Tensor], inputs: PolicyInputs, metrics: Metrics) -> SummedLoss:
        """Σ_k Σ_t w_kt v_kt of a micro-batch with its count; adds each term to the metrics as `loss/<term>`.

        Args:
            values: (T,) v by term, at least one.
            inputs: The part of the prepared inputs that belongs to the micro-batch.
            metrics: Are added to.

        Raises:
            ValueError: If `prepare` was not called.
        """
        missing = sorted(set(values) - set(inputs.weights))
        if missing:
            raise ValueError(
                f"{type(self).__name__} finds no weights for {missing}: call prepare() on the whole step first"
            )
        count, terms = inputs.response_mask.sum().float(), []
        for name, value_T in values.items():
            weight_T = inputs.weights[name].to(value_T.dtype)
            terms.append((weight_T * torch.where(weight_T != 0, value_T, 0)).sum())
            metrics[f"loss/{name}"] = SummedLoss(terms[-1].detach(), count)
        return SummedLoss(torch.stack(terms).sum(), count)


class PolicyObjective(WeightedTokenLoss):
    """A policy loss of the scores.

    Attributes:
        needs_entropy: Whether the scores must have entropies.
    """

    needs_entropy: bool = False

    @abstractmethod
    def term_values(
        self, logp_T: Tensor, scores: TokenScores, inputs: PolicyInputs
    ) -> tuple[dict[str, Tensor], Metrics]:
        """(T,) values by term, and metrics of this micro-batch.

        Args:
            logp_T: log π_θ with gradient, 0 outside responses.
            scores: All scores.
            inputs: Prepared.
        """

    def __call__(self, scores: TokenScores, inputs: PolicyInputs) -> tuple[SummedLoss, Metrics]:
        """The loss of one micro-batch.

        Args:
            scores: Of the head for the labels of the micro-batch.
            inputs: The part of the prepared inputs that belongs to it.

        Returns:
            The loss, whose count is the number of response tokens, and metrics; each term of the loss, without the
            others, is `loss/<term>`.

        Raises:
            ValueError: If `prepare` was not called, or shapes or entropies do not fit.
        """
        if scores.logp_T.shape != inputs.sample_ids.shape:
            raise ValueError(
                f"scores of {tuple(scores.logp_T.shape)} tokens for inputs of {tuple(inputs.sample_ids.shape)}"
            )
        if self.needs_entropy and scores.entropy_T is None:
            raise ValueError(f"{type(self).__name__} needs entropies: score the labels with entropy=True")
        inputs.require(self.requires, type(self).__name__)
        logp_T = torch.where(inputs.response_mask, scores.logp_T, 0)
        values, metrics = self.term_values(logp_T, scores, inputs)
        if scores.entropy_T is not None:
            metrics["entropy"] = masked_metric(scores.entropy_T, inputs.response_mask)
        return self.weighted_sum(values, inputs, metrics), metrics

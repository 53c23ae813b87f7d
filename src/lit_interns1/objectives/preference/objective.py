"""The common form of preference objectives: a loss per pair or per response, of the log-ratios h to a reference.

    L = Σ_i w_i · l(h) / N          N = pairs (or responses) of the optimizer step, over all ranks

The weights w_i (default 1) do not enter N: weights with a mean of 1 leave the size of the loss as it is. Every
micro-batch returns the sum with its N as a `SummedLoss`, so loss and gradient do not depend on the split into
micro-batches and ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.distributed as dist
from torch import Tensor

from lit_interns1.nn.head import TokenScores
from lit_interns1.objectives.metrics import Metrics, mean_metric, weighted_sum
from lit_interns1.objectives.options import check_number
from lit_interns1.objectives.preference.inputs import PreferenceInputs
from lit_interns1.training.summed_loss import SummedLoss


class PreferenceObjective(ABC):
    """A loss of the scores of responses, some of which are preferred.

    Attributes:
        requires: Names of the vectors that a module must prepare: `ref_logprobs` or none.
    """

    requires: frozenset[str] = frozenset({"ref_logprobs"})

    def prepare(
        self, scores: TokenScores, inputs: PreferenceInputs, process_group: dist.ProcessGroup | None = None
    ) -> PreferenceInputs:
        """Takes what an objective needs of the whole optimizer step; only KTO needs anything.

        Args:
            scores: Of all micro-batches of this rank in the step, as they are before it; no gradient is needed.
            inputs: Of the same tokens.
            process_group: Ranks that share the step; default: all.

        Returns:
            Inputs to be split as the batch is split.
        """
        return inputs

    @abstractmethod
    def loss(self, logp_T: Tensor, inputs: PreferenceInputs, metrics: Metrics) -> SummedLoss:
        """The loss of one micro-batch.

        Args:
            logp_T: log π_θ with gradient, 0 outside responses.
            inputs: With what is required.
            metrics: Are added to.
        """

    def __call__(self, scores: TokenScores, inputs: PreferenceInputs) -> tuple[SummedLoss, Metrics]:
        """The loss of one micro-batch.

        Args:
            scores: Of the head for the labels of the micro-batch.
            inputs: Of the same tokens.

        Returns:
            The loss, whose count is the number of pairs (or responses), and metrics.

        Raises:
            ValueError: If shapes do not fit, a vector is missing or not finite, or a pair is not whole.
        """
        logp_T = self.response_logprobs(scores, inputs)
        metrics: Metrics = {}
        return self.loss(logp_T, inputs, metrics), metrics

    def response_logprobs(self, scores: TokenScores, inputs: PreferenceInputs) -> Tensor:
        """(T,) log π_θ with gradient, 0 outside responses.

        Raises:
            ValueError: If shapes do not fit or a vector is missing or not finite.
        """
        name = type(self).__name__
        if scores.logp_T.shape != inputs.sample_ids.shape:
            raise ValueError(
                f"scores of {tuple(scores.logp_T.shape)} tokens for inputs of {tuple(inputs.sample_ids.shape)}"
            )
        inputs.require(self.requires, name)
        for required in sorted(self.requires):
            wrong_T = ~inputs.value(required).isfinite()
            if bool(wrong_T.any()):
                raise ValueError(
                    f"{name}: {required} is not finite on {int(wrong_T.sum())} response tokens, the first of sample "
                    f"{int(inputs.sample_ids[wrong_T][0])}"
                )
        return torch.where(inputs.response_mask, scores.logp_T, 0)


class PairObjective(PreferenceObjective):
    """A loss per pair, of the log-ratios of its two responses.

    Args:
        beta: β > 0: how strongly the policy is held to the reference.

    Raises:
        ValueError: If β is not a positive number.
    """

    def __init__(self, beta: float) -> None:
        check_number("beta", beta, 0.0, strict=True)
        self.beta = beta

    @abstractmethod
    def pair_loss(self, chosen_P: Tensor, rejected_P: Tensor, lengths_2P: Tensor) -> Tensor:
        """(P,) losses.

        Args:
            chosen_P: h of the chosen responses.
            rejected_P: h of the rejected ones.
            lengths_2P: Response tokens of both.
        """

    def loss(self, logp_T: Tensor, inputs: PreferenceInputs, metrics: Metrics) -> SummedLoss:
        """The loss, whose count is the number of pairs. Adds `accuracy` (a tie counts one half), `margin` and the
        implicit rewards β h and log-probabilities of both sides."""
        pairs = inputs.pairs
        side_2P = torch.stack([pairs.chosen_P, pairs.rejected_P])
        ratio_2P = inputs.sample_sums(logp_T - inputs.value("ref_logprobs"))[side_2P]
        loss_P = self.pair_loss(ratio_2P[0], ratio_2P[1], inputs.sample_lengths[side_2P])
        reward_2P = self.beta * ratio_2P.detach()
        logp_2P = inputs.sample_sums(logp_T.detach())[side_2P]
        margin_P = reward_2P[0] - reward_2P[1]
        metrics |= {
            "accuracy": mean_metric((1.0 + margin_P.sign()) / 2.0), "margin": mean_metric(margin_P),
            "chosen_rewards": mean_metric(reward_2P[0]), "rejected_rewards": mean_metric(reward_2P[1]),
            "chosen_logprobs": mean_metric(logp_2P[0]), "rejected_logprobs": mean_metric(logp_2P[1]),
        }  # fmt: skip
        return weighted_sum(loss_P, pairs.weight_P, metrics)

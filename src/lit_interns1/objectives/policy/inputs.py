"""What policy objectives read beside the scores: flat vectors over the tokens of a packed batch, by their usual names.

    rollout_logprobs μ     of the engine that sampled the token
    old_logprobs     π_old of the trained model at the weights of the rollout
    ref_logprobs     π_ref of the frozen reference
    logp             π_θ   of the trained model now: `TokenScores`, not here

Shapes: T tokens, S samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from lit_interns1.objectives.sample_tokens import SampleTokens

WEIGHT_PREFIX = "loss_weight_"
"""In token fields, the weight of the loss term `name` is called `loss_weight_name`."""


@dataclass(frozen=True)
class PolicyInputs(SampleTokens):
    """Vectors (T,) for a policy objective. Values where `response_mask` is False are replaced by 0.

    Attributes:
        response_mask: bool, tokens of responses that learn: no prompt, no tool output, no padding, no failed sample.
        sample_ids: int64, the response a token belongs to; negative = none.
        advantages: Â, the same on all tokens of a sample unless the estimator works on tokens.
        rewards: The reward of the sample, on each of its tokens.
        old_logprobs: log π_old, nats.
        rollout_logprobs: log μ of the sampling distribution, nats; NaN where the engine gave none.
        ref_logprobs: log π_ref, nats.
        values: Values of the critic at the rollout.
        returns: What the critic should predict.
        token_rewards: Scores w of a token reward model (OREAL).
        rollout_is_weights: Weights of a rollout correction, without gradient.
        response_lengths: Tokens of the sample in `response_mask`; filled by `prepare`.
        weights: Weight of each token in each term of the loss, by term; filled by `prepare`.

    Raises:
        ValueError: If the lengths differ.
    """

    token_values: ClassVar[tuple[str, ...]] = (
        "advantages", "rewards", "old_logprobs", "rollout_logprobs", "ref_logprobs", "values", "returns",
        "token_rewards", "rollout_is_weights",
    )  # fmt: skip
    not_token_fields: ClassVar[frozenset[str]] = frozenset({"sample_ids", "weights"})

    advantages: Tensor | None = None
    rewards: Tensor | None = None
    old_logprobs: Tensor | None = None
    rollout_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    values: Tensor | None = None
    returns: Tensor | None = None
    token_rewards: Tensor | None = None
    rollout_is_weights: Tensor | None = None
    response_lengths: Tensor | None = None
    weights: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def from_fields(
        cls, token_fields: Mapping[str, Tensor], sample_ids: Tensor, labels: Tensor | None = None
    ) -> PolicyInputs:
        """As `SampleTokens.from_fields`, with the weights of the terms of the loss."""
        weights = {
            name.removeprefix(WEIGHT_PREFIX): value
            for name, value in token_fields.items()
            if name.startswith(WEIGHT_PREFIX)
        }
        return replace(super().from_fields(token_fields, sample_ids, labels), weights=weights)

    def fields(self) -> dict[str, Tensor]:
        """All vectors by the name of their token field, to be put into a packed batch; without `sample_ids`."""
        return super().fields() | {WEIGHT_PREFIX + name: weight for name, weight in self.weights.items()}

    def check_whole_samples(self, what: str) -> None:
        """Raises a ValueError if a sample of the prepared batch has been cut by the split into micro-batches."""
        if self.response_lengths is None:
            return
        missing_T = self.response_mask & (self.to_tokens(self.sample_lengths) != self.response_lengths)
        if bool(missing_T.any()):
            sample = int(self.sample_ids[missing_T][0])
            raise ValueError(
                f"{what} needs every sample whole in its micro-batch, but sample {sample} has "
                f"{int((self.response_mask & (self.sample_ids == sample)).sum())} of its "
                f"{int(self.response_lengths[missing_T][0])} response tokens here: pack whole samples"
            )

    # rows of response tokens, for recursions along the response

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ids, index_T = self._samples
        token_N = self.response_mask.nonzero().squeeze(-1)
        sample_N, order_N = torch.sort(index_T[token_N], stable=True)
        length_S = torch.bincount(sample_N, minlength=len(ids))
        start_S = length_S.cumsum(0) - length_S
        step_N = torch.arange(len(token_N), device=token_N.device) - start_S[sample_N]
        return token_N[order_N], sample_N, step_N, length_S

    def to_rows(self, value_T: Tensor) -> tuple[Tensor, Tensor]:
        """The response tokens of each sample as a row, in order, without what lies between them.

        Returns:
            (S', L) values, 0 behind the end of a row, and (S', L) bool, where there is a token.
        """
        token_N, sample_N, step_N, length_S = self._places
        width = int(length_S.max()) if len(length_S) else 0
        value_SL = value_T.new_zeros(len(length_S), width)
        value_SL[sample_N, step_N] = value_T[token_N]
        return value_SL, torch.arange(width, device=value_T.device) < length_S[:, None]

    def from_rows(self, value_SL: Tensor) -> Tensor:
        """(T,) values of `to_rows` back at their tokens, 0 elsewhere."""
        token_N, sample_N, step_N, _ = self._places
        value_T = value_SL.new_zeros(len(self.sample_ids))
        value_T[token_N] = value_SL[sample_N, step_N]
        return value_T

    def changed(self, **values: Tensor) -> PolicyInputs:
        """A copy with other vectors."""
        return replace(self, **values)  # type: ignore[arg-type]

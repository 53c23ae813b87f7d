"""What policy objectives read beside the scores: flat vectors over the tokens of a packed batch, by their usual names.

    rollout_logprobs μ     of the engine that sampled the token
    old_logprobs     π_old of the trained model at the weights of the rollout
    ref_logprobs     π_ref of the frozen reference
    logp             π_θ   of the trained model now: `TokenScores`, not here

Like labels, an entry stands at the position that predicts the token it speaks of. A sample is one response; all its
tokens must be in one micro-batch (pack whole samples). Shapes: T tokens, S samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property

import torch
from torch import Tensor

TOKEN_VALUES = (
    "advantages", "rewards", "old_logprobs", "rollout_logprobs", "ref_logprobs", "values", "returns", "token_rewards",
    "rollout_is_weights",
)  # fmt: skip
"""Names of the vectors that an objective can require."""

WEIGHT_PREFIX = "loss_weight_"
"""In token fields, the weight of the loss term `name` is called `loss_weight_name`."""


@dataclass(frozen=True)
class PolicyInputs:
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

    response_mask: Tensor
    sample_ids: Tensor
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

    def __post_init__(self) -> None:
        shape = self.sample_ids.shape
        for name, value in self.fields().items():
            if value.shape != shape or value.ndim != 1:
                raise ValueError(f"{name} {tuple(value.shape)} must be a vector like sample_ids {tuple(shape)}")
        mask_T = self.response_mask.bool() & (self.sample_ids >= 0)
        object.__setattr__(self, "response_mask", mask_T)
        for name in TOKEN_VALUES:
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, torch.where(mask_T, value.detach(), 0))

    @classmethod
    def from_fields(
        cls, token_fields: Mapping[str, Tensor], sample_ids: Tensor, labels: Tensor | None = None
    ) -> PolicyInputs:
        """Takes the known names out of the token fields of a packed batch.

        Args:
            token_fields: By name; unknown names are left alone.
            sample_ids: (T,) `sample_id_T` of the batch.
            labels: (T,) labels; without a field `response_mask`, tokens with a label ≥ 0 are responses.

        Raises:
            ValueError: If neither `response_mask` nor labels are given.
        """
        known = {entry.name for entry in fields(cls)} - {"sample_ids", "weights"}
        values = {name: value for name, value in token_fields.items() if name in known}
        if "response_mask" not in values:
            if labels is None:
                raise ValueError("token_fields has no 'response_mask': give it, or labels to derive it from")
            values["response_mask"] = labels >= 0
        weights = {
            name.removeprefix(WEIGHT_PREFIX): value
            for name, value in token_fields.items()
            if name.startswith(WEIGHT_PREFIX)
        }
        return cls(sample_ids=sample_ids, weights=weights, **values)

    def fields(self) -> dict[str, Tensor]:
        """All vectors by the name of their token field, to be put into a packed batch; without `sample_ids`."""
        names = [entry.name for entry in fields(self) if entry.name not in ("sample_ids", "weights")]
        given = {name: getattr(self, name) for name in names}
        present = {name: value for name, value in given.items() if value is not None}
        return present | {WEIGHT_PREFIX + name: weight for name, weight in self.weights.items()}

    def split(self, sizes: Sequence[int]) -> list[PolicyInputs]:
        """Consecutive parts of so many tokens.

        Raises:
            ValueError: If the sizes do not add up to T.
        """
        if sum(sizes) != len(self.sample_ids):
            raise ValueError(f"sizes {list(sizes)} add up to {sum(sizes)}, not to the {len(self.sample_ids)} tokens")
        columns = {name: value.split(list(sizes)) for name, value in self.fields().items()}
        ids = self.sample_ids.split(list(sizes))
        return [
            PolicyInputs.from_fields({name: parts[i] for name, parts in columns.items()}, ids[i])
            for i in range(len(sizes))
        ]

    def require(self, names: Iterable[str], what: str) -> None:
        """Raises a ValueError that lists which of the named vectors are missing for `what`."""
        missing = sorted(name for name in names if getattr(self, name) is None)
        if missing:
            raise ValueError(f"{what} requires {missing}: give a vector per token under these names")

    def value(self, name: str) -> Tensor:
        """The vector of that name.

        Raises:
            ValueError: If it is missing.
        """
        self.require([name], "this step")
        result: Tensor = getattr(self, name)
        return result

    # samples: sums over the response tokens of each, and back

    @cached_property
    def _samples(self) -> tuple[Tensor, int]:
        ids, index_T = torch.unique(self.sample_ids, return_inverse=True)
        return index_T, len(ids)

    def sample_sums(self, value_T: Tensor) -> Tensor:
        """(S',) sums over the response tokens of each sample id that occurs (padding has one, too)."""
        index_T, count = self._samples
        return value_T.new_zeros(count).index_add(0, index_T, torch.where(self.response_mask, value_T, 0))

    def to_tokens(self, value_S: Tensor) -> Tensor:
        """(T,) the value of each token's sample; inverse of the layout of `sample_sums`."""
        return value_S[self._samples[0]]

    @cached_property
    def sample_lengths(self) -> Tensor:
        """(S',) float32 response tokens of each sample id."""
        return self.sample_sums(torch.ones_like(self.sample_ids, dtype=torch.float32))

    def sample_means(self, value_T: Tensor) -> Tensor:
        """(S',) means over the response tokens of each sample; 0 for a sample without any."""
        return self.sample_sums(value_T) / self.sample_lengths.clamp(min=1.0)

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
        index_T, count = self._samples
        token_N = self.response_mask.nonzero().squeeze(-1)
        sample_N, order_N = torch.sort(index_T[token_N], stable=True)
        length_S = torch.bincount(sample_N, minlength=count)
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

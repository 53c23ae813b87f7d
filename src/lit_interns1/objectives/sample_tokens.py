"""Flat vectors over the tokens of a packed batch, and sums over the response tokens of each sample.

Like labels, an entry stands at the position that predicts the token it speaks of. A sample is one response; all its
tokens must be in one micro-batch (pack whole samples). Shapes: T tokens, S' sample ids that occur, padding included.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from typing import ClassVar, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class SampleTokens:
    """Vectors (T,) that speak of responses. Values where `response_mask` is False are replaced by 0.

    Attributes:
        response_mask: bool, tokens of responses that learn.
        sample_ids: int64, the response a token belongs to; negative = none.

    Raises:
        ValueError: If the lengths differ.
    """

    token_values: ClassVar[tuple[str, ...]] = ()
    """Names of the vectors that hold values of response tokens: detached, and 0 elsewhere."""
    not_token_fields: ClassVar[frozenset[str]] = frozenset({"sample_ids"})
    """Attributes that are not taken out of the token fields of a batch by their name."""

    response_mask: Tensor
    sample_ids: Tensor

    def __post_init__(self) -> None:
        shape = self.sample_ids.shape
        for name, value in self.fields().items():
            if value.shape != shape or value.ndim != 1:
                raise ValueError(f"{name} {tuple(value.shape)} must be a vector like sample_ids {tuple(shape)}")
        mask_T = self.response_mask.bool() & (self.sample_ids >= 0)
        object.__setattr__(self, "response_mask", mask_T)
        for name in self.token_values:
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, torch.where(mask_T, value.detach(), 0))

    @classmethod
    def from_fields(
        cls, token_fields: Mapping[str, Tensor], sample_ids: Tensor, labels: Tensor | None = None
    ) -> Self:  # fmt: skip
        """Takes the known names out of the token fields of a packed batch.

        Args:
            token_fields: By name; unknown names are left alone.
            sample_ids: (T,) `sample_id_T` of the batch.
            labels: (T,) labels; without a field `response_mask`, tokens with a label ≥ 0 are responses.

        Raises:
            ValueError: If neither `response_mask` nor labels are given, or another vector that must be there is not.
        """
        known = {entry.name for entry in fields(cls)} - cls.not_token_fields
        values = {name: value for name, value in token_fields.items() if name in known}
        if "response_mask" not in values:
            if labels is None:
                raise ValueError("token_fields has no 'response_mask': give it, or labels to derive it from")
            values["response_mask"] = labels >= 0
        missing = [entry.name for entry in fields(cls) if entry.default is entry.default_factory is MISSING]
        missing = [name for name in missing if name not in {"sample_ids", *values}]
        if missing:
            raise ValueError(f"token_fields has no {missing}: give a vector per token under these names")
        return cls(sample_ids=sample_ids, **values)

    def fields(self) -> dict[str, Tensor]:
        """All vectors by the name of their token field, to be put into a packed batch; without `sample_ids`."""
        given = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {
            name: value
            for name, value in given.items()
            if name not in self.not_token_fields and value is not None
        }  # fmt: skip

    def split(self, sizes: Sequence[int]) -> list[Self]:
        """Consecutive parts of so many tokens.

        Raises:
            ValueError: If the sizes do not add up to T.
        """
        if sum(sizes) != len(self.sample_ids):
            raise ValueError(f"sizes {list(sizes)} add up to {sum(sizes)}, not to the {len(self.sample_ids)} tokens")
        columns = {name: value.split(list(sizes)) for name, value in self.fields().items()}
        ids = self.sample_ids.split(list(sizes))
        return [
            type(self).from_fields({name: parts[i] for name, parts in columns.items()}, ids[i])
            for i in range(len(sizes))
        ]

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Parts one behind another, with sample ids that must be distinct; the inverse of `split`."""
        columns = [part.fields() for part in parts]
        fields = {name: torch.cat([column[name] for column in columns]) for name in columns[0]}
        return cls.from_fields(fields, torch.cat([part.sample_ids for part in parts]))

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

    # sums over the response tokens of each sample, and back

    @cached_property
    def _samples(self) -> tuple[Tensor, Tensor]:
        ids, index_T = torch.unique(self.sample_ids, return_inverse=True)
        return ids, index_T

    @property
    def sample_numbers(self) -> Tensor:
        """(S',) the sample ids that occur, ascending; padding first."""
        return self._samples[0]

    def sample_values(self, value_T: Tensor) -> Tensor:
        """(S',) a value that is the same on all tokens of a sample, those of its prompt included."""
        ids, index_T = self._samples
        return value_T.new_zeros(len(ids)).index_copy(0, index_T, value_T)

    def sample_sums(self, value_T: Tensor) -> Tensor:
        """(S',) sums over the response tokens of each sample id that occurs (padding has one, too)."""
        ids, index_T = self._samples
        return value_T.new_zeros(len(ids)).index_add(0, index_T, torch.where(self.response_mask, value_T, 0))

    def to_tokens(self, value_S: Tensor) -> Tensor:
        """(T,) the value of each token's sample; inverse of the layout of `sample_sums`."""
        return value_S[self._samples[1]]

    @cached_property
    def sample_lengths(self) -> Tensor:
        """(S',) float32 response tokens of each sample id."""
        return self.sample_sums(torch.ones_like(self.sample_ids, dtype=torch.float32))

    def sample_means(self, value_T: Tensor) -> Tensor:
        """(S',) means over the response tokens of each sample; 0 for a sample without any."""
        return self.sample_sums(value_T) / self.sample_lengths.clamp(min=1.0)

"""What preference objectives read beside the scores: flat vectors over the tokens of a packed batch.

    h = Σ_t log π_θ(y_t)/π_ref(y_t)          over the response tokens of a sample

A pair is a chosen and a rejected response with the same pair id; both lie whole in one micro-batch. Shapes: T tokens,
S' sample ids that occur, S responses (samples with response tokens), P pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from lit_interns1.objectives.sample_tokens import SampleTokens


class Responses(NamedTuple):
    """What is said once per response.

    Attributes:
        index_S: (S,) int64, place of the response among the sample ids that occur (`sample_sums`).
        pair_S: (S,) int64 pair id, −1 = none.
        chosen_S: (S,) bool.
        mismatched_S: (S,) bool.
        weight_S: (S,) float32.
    """

    index_S: Tensor
    pair_S: Tensor
    chosen_S: Tensor
    mismatched_S: Tensor
    weight_S: Tensor


class Pairs(NamedTuple):
    """The pairs of a micro-batch, by pair id.

    Attributes:
        chosen_P: (P,) int64, place of the chosen response among the sample ids that occur (`sample_sums`).
        rejected_P: (P,) the same of the rejected one.
        weight_P: (P,) float32.
    """

    chosen_P: Tensor
    rejected_P: Tensor
    weight_P: Tensor


@dataclass(frozen=True)
class PreferenceInputs(SampleTokens):
    """Vectors (T,) for a preference objective. Only values on response tokens are read.

    Attributes:
        response_mask: bool, tokens of responses that learn: no prompt, no padding.
        sample_ids: int64, the response a token belongs to; negative = none.
        pair_ids: int64, the pair that the token's response belongs to, unique in the micro-batch; −1 = none.
        is_chosen: bool, the response is the chosen (or a desirable) one.
        ref_logprobs: log π_ref, nats.
        weights: Weight ≥ 0 of the response, on each of its tokens; the same on both responses of a pair. None = 1.
        mismatched: bool, the response is one of another prompt, put there to estimate a KL (KTO). None = nowhere.
        kl_baseline: z0 of KTO over the whole optimizer step; filled by `KTO.prepare`.

    Raises:
        ValueError: If the lengths differ.
    """

    token_values: ClassVar[tuple[str, ...]] = ("ref_logprobs", "weights", "kl_baseline")

    pair_ids: Tensor
    is_chosen: Tensor
    ref_logprobs: Tensor | None = None
    weights: Tensor | None = None
    mismatched: Tensor | None = None
    kl_baseline: Tensor | None = None

    @classmethod
    def from_fields(
        cls, token_fields: Mapping[str, Tensor], sample_ids: Tensor, labels: Tensor | None = None
    ) -> Self:  # fmt: skip
        """As `SampleTokens.from_fields`.

        Without `pair_ids` and `is_chosen`, as in plain fine-tuning data, every response is chosen and in no pair.
        """
        token_fields = dict(token_fields)
        if "pair_ids" not in token_fields and "is_chosen" not in token_fields:
            token_fields["pair_ids"] = torch.full_like(sample_ids, -1)
            token_fields["is_chosen"] = torch.ones_like(sample_ids, dtype=torch.bool)
        return super().from_fields(token_fields, sample_ids, labels)

    @cached_property
    def responses(self) -> Responses:
        """Pair id, side and weight of each sample with response tokens.

        Raises:
            ValueError: If they differ between the tokens of a response, or a weight is negative or not finite.
        """
        index_S = (self.sample_lengths > 0).nonzero().squeeze(-1)
        ones_T = torch.ones_like(self.sample_ids, dtype=torch.float32)
        nowhere_T = torch.zeros_like(self.response_mask)
        vectors = {
            "pair_ids": self.pair_ids,
            "is_chosen": self.is_chosen.bool(),
            "mismatched": nowhere_T if self.mismatched is None else self.mismatched.bool(),
            "weights": ones_T if self.weights is None else self.weights.float(),
        }
        values, wrong = {}, []
        for name, value_T in vectors.items():
            values[name] = self.first_values(value_T)
            wrong.append(self.response_mask & (self.to_tokens(values[name]) != value_T))
        weight_T = vectors["weights"]
        wrong.append(self.response_mask & ~((weight_T >= 0) & weight_T.isfinite()))
        if bool(torch.stack(wrong).any()):
            self._complain(dict(zip([*vectors, "weight"], wrong, strict=True)))
        return Responses(index_S, *(values[name][index_S] for name in vectors))

    def first_values(self, value_T: Tensor) -> Tensor:
        """(S',) the value on the first response token of each sample id; that of token 0 where there is none."""
        size = len(self.sample_ids)
        if not size:
            return value_T
        ids, index_T = self._samples
        place_T = torch.where(self.response_mask, torch.arange(size, device=value_T.device), size)
        first_S = place_T.new_full((len(ids),), size).scatter_reduce(0, index_T, place_T, "amin")
        return value_T[torch.where(first_S < size, first_S, 0)]

    def _complain(self, wrong: dict[str, Tensor]) -> None:
        name, mask_T = next((name, mask_T) for name, mask_T in wrong.items() if bool(mask_T.any()))
        sample = int(self.sample_ids[mask_T][0])
        if name == "weight" and self.weights is not None:
            value = float(self.weights[mask_T][0])
            raise ValueError(f"weights of sample {sample} = {value} must be finite and at least 0")
        raise ValueError(f"{name} must be the same on all response tokens of a sample, but differ in sample {sample}")

    @cached_property
    def pairs(self) -> Pairs:
        """The pairs, each with one chosen and one rejected response.

        Raises:
            ValueError: If a pair does not have exactly one of each here, a response belongs to no pair, or the weights
                of a pair differ.
        """
        responses = self.responses
        names_P, pair_S = torch.unique(responses.pair_S, return_inverse=True)
        count = len(names_P)
        chosen_S = responses.chosen_S
        sides_2P = torch.stack(
            [torch.bincount(pair_S[side_S], minlength=count) for side_S in (chosen_S, ~chosen_S)]
        )  # fmt: skip
        if bool(((names_P < 0) | (sides_2P != 1).any(0)).any()):
            self._complain_of_pairs(names_P, sides_2P)
        order_S = torch.argsort(pair_S)
        chosen_P, rejected_P = order_S[chosen_S[order_S]], order_S[~chosen_S[order_S]]
        weight_P = responses.weight_S[chosen_P]
        differ_P = weight_P != responses.weight_S[rejected_P]
        if bool(differ_P.any()):
            place = int(differ_P.nonzero()[0])
            raise ValueError(
                f"weights of pair {int(names_P[place])} must be the same on both responses, got "
                f"{float(weight_P[place])} and {float(responses.weight_S[rejected_P[place]])}"
            )
        return Pairs(responses.index_S[chosen_P], responses.index_S[rejected_P], weight_P)

    def _complain_of_pairs(self, names_P: Tensor, sides_2P: Tensor) -> None:
        if int(names_P[0]) < 0:
            responses = self.responses
            place = responses.index_S[(responses.pair_S < 0).nonzero()[0, 0]]
            raise ValueError(
                f"sample {int(self._samples[0][place])} has response tokens but no pair id ≥ 0: this objective needs "
                "every response in a pair"
            )
        place = (sides_2P != 1).any(0).nonzero()[0, 0]
        chosen, rejected = sides_2P[:, place].tolist()
        reason = (
            "pair ids must be unique in a micro-batch"
            if max(chosen, rejected) > 1
            else "pack both responses of a pair whole into one micro-batch, each with at least one response token"
        )
        raise ValueError(
            f"pair {int(names_P[place])} has {chosen} chosen and {rejected} rejected responses in this micro-batch, "
            f"not one of each: {reason}"
        )

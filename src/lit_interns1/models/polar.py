"""The judge of POLAR (arXiv 2507.05197, §4): a reward model that compares a candidate with a reference.

r(prompt, reference, candidate) = the value at the last token of the text that `data.polar_template` makes of them
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from lit_interns1.models.reward_model import RewardModel, at_ends


class PolarForm(Protocol):
    """What makes token ids of prompt, reference and candidate."""

    @property
    def vocab_size(self) -> int:
        """Largest token id plus one."""
        ...

    def judged(self, prompt: Any, reference: Any, candidate: Any) -> list[int]:
        """The ids whose last one has the reward as its value."""
        ...


class PolarScorer:
    """A judge: how much a candidate looks like what the reference's policy would write. Any real number, larger is
    better; differences between candidates for one prompt and reference mean something, the scale does not.

    Args:
        model: The reward model, on any device; it is used in eval mode.
        encoder: A `data.polar_template.PolarEncoder` of the model's tokenizer and the template that it was trained on.
        batch_tokens: Candidates are put together up to this many tokens; one that is longer goes alone.

    Raises:
        ValueError: If the tokenizer has more tokens than the model, or `batch_tokens` is below 1.
    """

    def __init__(
        self,
        model: RewardModel,
        encoder: PolarForm,
        batch_tokens: int = 16384,
    ) -> None:
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens = {batch_tokens} must be at least 1")
        if encoder.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {encoder.vocab_size} tokens, the reward model's vocabulary "
                f"{model.config.vocab_size}: they do not belong together"
            )
        self.model, self.encoder, self.batch_tokens = model, encoder, batch_tokens

    def score(self, prompts: Sequence[Any], references: Sequence[Any], candidates: Sequence[Any]) -> list[float]:
        """A reward for each candidate, in the order given; the thinking part of a candidate does not count.

        Args:
            prompts: What was asked: texts, or lists of messages with a `content` each.
            references: A good answer to each.
            candidates: The answers to be judged.

        Raises:
            ValueError: If the three differ in length, or messages have no text.
        """
        if not len(prompts) == len(references) == len(candidates):
            raise ValueError(
                f"each candidate needs a prompt and a reference, got {len(prompts)} prompts, {len(references)} "
                f"references and {len(candidates)} candidates"
            )
        documents = [
            self.encoder.judged(prompt, reference, candidate)
            for prompt, reference, candidate in zip(prompts, references, candidates, strict=True)
        ]
        return self.score_ids(documents)

    @torch.no_grad()
    def score_ids(self, documents: Sequence[Sequence[int]]) -> list[float]:
        """The value at the last token of each document."""
        device, was_training = self.model.embed_tokens.weight.device, self.model.training
        scores = [0.0] * len(documents)
        self.model.eval()
        try:
            for batch in self._batches(documents):
                lengths = torch.tensor([0, *(len(documents[i]) for i in batch)], device=device)
                cu_seqlens = lengths.cumsum(0).to(torch.int32)
                ids = torch.tensor([token for i in batch for token in documents[i]], device=device)
                values = at_ends(self.model(ids, cu_seqlens=cu_seqlens).values_T, cu_seqlens)
                for i, value in zip(batch, values.tolist(), strict=True):
                    scores[i] = value
        finally:
            self.model.train(was_training)
        return scores

    def _batches(self, documents: Sequence[Sequence[int]]) -> list[list[int]]:
        """Places of documents that are computed together."""
        batches: list[list[int]] = []
        used = self.batch_tokens
        for place, document in enumerate(documents):
            used += len(document)
            if used > self.batch_tokens:
                batches.append([])
                used = len(document)
            batches[-1].append(place)
        return batches

"""What goes into a rollout engine and what comes out: token ids, never text.

    request   prompt ids, one seed per wanted sample
    sample    response ids y_1 … y_n, log μ(y_t) of the distribution they were drawn from, and the experts that the
              P + n − 1 tokens visited that went through the model: the last one that was drawn never does

A sample says at which weights each token was drawn, so that staleness can be seen after weights have changed under it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lit_interns1.models.sampling import check_sampling

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are drawn.

    Attributes:
        max_new_tokens: Limit per sample, at least 1.
        temperature: τ ≥ 0; 0 = greedy.
        top_p: Nucleus mass in (0, 1]. Below 1, log μ is that of the truncated distribution, which the trained model's
            own log-probabilities are not.
        top_k: Draw among the k most probable tokens; 0 = all.
        stop_ids: Tokens that end a sample; they belong to it.

    Raises:
        ValueError: If an option is out of range.
    """

    max_new_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_sampling(self.max_new_tokens, self.temperature, self.top_p, self.top_k)


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt to be continued several times.

    Attributes:
        prompt_ids: At least one token id.
        seeds: One per wanted sample: a sample's tokens depend on weights, prompt, options and its seed alone, not on
            what else is generated beside it.

    Raises:
        ValueError: If there is no token or no seed.
    """

    prompt_ids: tuple[int, ...]
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise ValueError("GenerationRequest: every prompt needs at least one token")
        if not self.seeds:
            raise ValueError("GenerationRequest: at least one seed is needed, one per wanted sample")


@dataclass
class Sample:
    """One response.

    Attributes:
        prompt_ids: As in the request.
        response_ids: New tokens, the stop token included. Empty if generation was aborted before the first.
        logprobs: (n,) float32 log μ; NaN where the engine gave none.
        finish_reason: "stop", "length", or "abort" (not finished, must not be learned from).
        seed: As in the request.
        weight_versions: (n,) int64, the version of the weights that drew each token.
        routed_experts: (P + n − 1, MoE layers, K) int16 expert ids, −1 = not recorded; None if the model has no MoE
            layers or the ids were not asked for.
    """

    prompt_ids: tuple[int, ...]
    response_ids: list[int]
    logprobs: Tensor
    finish_reason: FinishReason
    seed: int
    weight_versions: Tensor
    routed_experts: Tensor | None = None

    def __post_init__(self) -> None:
        count = len(self.response_ids)
        for name, value in (("logprobs", self.logprobs), ("weight_versions", self.weight_versions)):
            if tuple(value.shape) != (count,):
                raise ValueError(f"Sample: {name} {tuple(value.shape)} for {count} response tokens")
        if self.routed_experts is not None:
            rows = max(len(self.prompt_ids) + count - 1, 0)
            if self.routed_experts.ndim != 3 or len(self.routed_experts) != rows:
                raise ValueError(
                    f"Sample: routed_experts {tuple(self.routed_experts.shape)} for {rows} tokens that went through "
                    "the model; wanted (prompt + response − 1, MoE layers, experts per token)"
                )

    def document(self, pad_routing: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """The sample as a document of a packed batch: the tokens that go into the model, and beside each what belongs
        to the token it predicts.

        Args:
            pad_routing: (MoE layers, K): where routing is missing, ids of −1 in its place; None = leave it out.

        Returns:
            `input_ids`, `labels` (−100 in the prompt), `response_mask`, `rollout_logprobs` (NaN outside responses),
            `weight_versions` (−1 outside), and `routed_experts` if there are some: (P + n − 1, …) each.
        """
        tokens = torch.tensor([*self.prompt_ids, *self.response_ids], dtype=torch.int64)
        length, first = len(tokens) - 1, len(self.prompt_ids) - 1
        labels = torch.full((length,), -100)
        labels[first:] = tokens[first + 1 :]
        logprobs = torch.full((length,), torch.nan)
        logprobs[first:] = self.logprobs.float()
        versions = torch.full((length,), -1)
        versions[first:] = self.weight_versions
        document = {
            "input_ids": tokens[:-1], "labels": labels, "response_mask": labels >= 0, "rollout_logprobs": logprobs,
            "weight_versions": versions,
        }  # fmt: skip
        if self.routed_experts is not None:
            document["routed_experts"] = self.routed_experts
        elif pad_routing is not None:
            document["routed_experts"] = torch.full((length, *pad_routing), -1, dtype=torch.int16)
        return document


@dataclass(frozen=True)
class Prompt:
    """A task for the policy.

    Attributes:
        ids: Token ids.
        text: The task as people read it.
        source: Which judges and weights it belongs to.
        data: What judges need: the reference answer and more.
        index: Its number in the source of prompts.
    """

    ids: tuple[int, ...]
    text: str
    source: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    index: int = 0


@dataclass
class ScoredSample:
    """A response with its reward.

    Attributes:
        prompt: The task.
        sample: The response.
        text: The response as text.
        reward: R; NaN = no judgement (failed or aborted): the sample is masked, and in no statistic.
        correct: Whether a judge with two outcomes found it right; None = none did.
        parts: Rewards by judge, before weighting.
    """

    prompt: Prompt
    sample: Sample
    text: str
    reward: float
    correct: bool | None = None
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def counts(self) -> bool:
        """Whether it may be learned from."""
        return self.reward == self.reward and self.sample.finish_reason != "abort" and bool(self.sample.response_ids)


def sample_seeds(seed: int, rollout: int, place: int, count: int) -> tuple[int, ...]:
    """Seeds of the samples of one prompt, distinct within a run.

    Args:
        seed: Of the run.
        rollout: Number of the rollout batch.
        place: Of the prompt in the rollout batch, over all ranks.
        count: Samples of the prompt.
    """
    mixed = ((seed * 1_000_003 + rollout) * 1_000_003 + place) * 65_537
    return tuple((mixed + i) % 2**63 for i in range(count))

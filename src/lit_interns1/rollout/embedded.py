"""The engine that generates with the trained network itself: nothing to copy, no second set of weights.

    requests  →  the decode loop of `models`: continuous batching, the prompt of a group computed once  →  samples

What the network is divided over (FSDP2 units, expert parallelism) it finds out by itself; see `divided_policy`. Two
passes over a token, here with a cache and there in a packed row, differ by rounding only: log μ is what the trained
module gives at the same temperature, and the recorded experts are those that it chooses.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_interns1.models import LanguageModel, MultimodalModel
from lit_interns1.models.decode_loop import Continuation, DecodeLoop, WaitingPrompt, evaluating
from lit_interns1.nn.precision import PrecisionRecipe, computing_in
from lit_interns1.rollout.divided_policy import DividedPolicy
from lit_interns1.rollout.engine import EngineCapabilities, EngineError, RolloutEngine
from lit_interns1.rollout.router_noise import RouterNoise
from lit_interns1.rollout.samples import FinishReason, GenerationRequest, Sample, SamplingOptions

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GenerationProgress:
    """How far a call of `generate` is, on this rank.

    Attributes:
        finished: Samples that came to their end.
        samples: Samples that were asked for.
        new_tokens: Tokens drawn.
    """

    finished: int
    samples: int
    new_tokens: int


class EmbeddedEngine(RolloutEngine):
    """Generates with the policy that it is connected to; implements `RolloutEngine`.

    Args:
        max_batch_size: Samples that are generated side by side, on every rank.
        max_cache_tokens: Limit of the cache on every rank, in tokens: samples side by side × the longest that one may
            become. A prompt and its response that would not fit alone are cut. None: no limit.
        router_noise: Standard deviation of noise on router logits while it generates, for studies.
        noise_seed: Seed of the noise.
        keep_unsharded: Gather divided parameters once per call, not once per token: the whole network must fit beside
            the cache.
        record_routing: Give the experts of every token. "auto": if the module that trains needs them.
        precision: Formats in which it computes, where they are not those of the trainer: a difference makes a mismatch
            of the two, for studies. None: as the network computes anyway.
        group_prefill: Compute the prompt of a request once for all of its samples.
        progress: Called after every token with how far it is.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self, max_batch_size: int = 32, max_cache_tokens: int | None = None, router_noise: float = 0.0,
        noise_seed: int = 0, keep_unsharded: bool = False, record_routing: bool | Literal["auto"] = "auto",
        precision: PrecisionRecipe | None = None, group_prefill: bool = True,
        progress: Callable[[GenerationProgress], None] | None = None,
    ) -> None:  # fmt: skip
        for name, value in (("max_batch_size", max_batch_size), ("max_cache_tokens", max_cache_tokens)):
            if value is not None and value < 1:
                raise ValueError(f"EmbeddedEngine: {name} must be at least 1, got {value}")
        if not router_noise >= 0:
            raise ValueError(f"EmbeddedEngine: router_noise must not be negative, got {router_noise}")
        if record_routing not in (True, False, "auto"):
            raise ValueError(f"EmbeddedEngine: record_routing must be true, false or 'auto', got {record_routing!r}")
        self.max_batch_size, self.max_cache_tokens = max_batch_size, max_cache_tokens
        self.router_noise, self.noise_seed, self.keep_unsharded = router_noise, noise_seed, keep_unsharded
        self.record_routing, self.group_prefill, self.progress = record_routing, group_prefill, progress
        self.precision = precision
        self.capabilities = EngineCapabilities("sampling", routed_experts=record_routing is not False)
        self.weight_version = 0
        self._policy: nn.Module | None = None

    def connect(self, policy: nn.Module | Any, needs_routing: bool) -> None:
        """Takes the network to generate with.

        Raises:
            EngineError: If it is no language model, or routing is needed and not recorded.
        """
        self._language_model = _language_model(policy)
        self._records = needs_routing if self.record_routing == "auto" else self.record_routing
        if needs_routing and not self._records:
            raise EngineError("EmbeddedEngine: the module needs routing: set record_routing to true or 'auto'")
        self._policy = policy

    def sync_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Takes the version: the network itself has the new weights already, and the iterator is not touched.

        Raises:
            EngineError: If the version does not grow.
        """
        if version < self.weight_version:
            raise EngineError(
                f"EmbeddedEngine: weights of version {version} cannot follow version {self.weight_version}"
            )
        self.weight_version = version

    def close(self) -> None:
        """Lets go of the network."""
        self._policy = None

    @torch.no_grad()
    def generate(
        self, requests: Sequence[GenerationRequest], options: SamplingOptions, enough: int | None = None
    ) -> list[list[Sample]]:
        """The samples of each request, in order. Collective, if the network is divided: `requests` may be empty.

        A prompt that leaves no room for a token (of `max_position_embeddings`, or `max_cache_tokens`) gives samples
        without tokens that end as "abort".

        Args:
            requests: What to continue.
            options: How tokens are drawn.
            enough: Stop when so many requests are finished on this rank. Samples that are then unfinished keep the
                tokens that they have and end as "abort".

        Raises:
            EngineError: If the engine is not connected, or the network is divided in a way that it cannot follow.
        """
        if self._policy is None:
            raise EngineError("EmbeddedEngine: connect(policy, ...) must come before generate")
        policy, divided = self._policy, DividedPolicy(self._policy)
        if divided.gathers and not isinstance(policy, LanguageModel):
            raise EngineError(
                f"EmbeddedEngine: a {type(policy).__name__} whose parameters are divided cannot generate; a divided "
                "LanguageModel can"
            )
        tally = _Tally(requests, self.weight_version)
        with ExitStack() as stack:
            stack.enter_context(evaluating(policy))
            stack.enter_context(divided.gathered(self.keep_unsharded))
            stack.enter_context(computing_in(self._language_model, self.precision))
            noise = None
            if self.router_noise > 0:
                routers = [layer.router for layer in self._language_model.moe_layers]
                noise = stack.enter_context(RouterNoise(routers, self.router_noise, self.noise_seed))
            on_tokens = None if noise is None else noise.on_tokens
            loop = self._loop(tally, options, inference_mode=not divided.gathers, on_tokens=on_tokens)
            while divided.anyone(going := loop.going and (enough is None or tally.whole < enough)):
                if not going:
                    loop.idle()
                    continue
                tally.take(loop.step())
                if self.progress is not None:
                    self.progress(GenerationProgress(tally.finished, tally.wanted, loop.new_tokens))
            tally.take(loop.abort())
        return tally.samples()

    def _loop(self, tally: _Tally, options: SamplingOptions, **others: Any) -> DecodeLoop:
        """The decode loop with all requests in its line."""
        config, requests = self._language_model.config, tally.requests
        limits = [self._room(len(request.prompt_ids), options.max_new_tokens) for request in requests]
        fitting = [(request, limit) for request, limit in zip(requests, limits, strict=True) if limit > 0]
        max_length = max((len(request.prompt_ids) + limit - 1 for request, limit in fitting), default=1)
        slots = min(self.max_batch_size, sum(len(request.seeds) for request, _ in fitting))
        if self.max_cache_tokens is not None:
            slots = min(slots, self.max_cache_tokens // max_length)
        loop = DecodeLoop(
            self._language_model, config, _device(self._language_model), num_slots=slots, max_length=max_length,
            max_new_tokens=max((limit for _, limit in fitting), default=1), temperature=options.temperature,
            top_p=options.top_p, top_k=options.top_k, stop_ids=options.stop_ids, record_routing=self._records,
            **others,
        )  # fmt: skip
        for number, (request, limit) in enumerate(zip(requests, limits, strict=True)):
            if limit <= 0:
                _log.warning(
                    "EmbeddedEngine: a prompt of %d tokens leaves no room for a response "
                    "(max_position_embeddings = %d, max_cache_tokens = %s): its samples are aborted",
                    len(request.prompt_ids), config.positions.max_position_embeddings, self.max_cache_tokens,
                )  # fmt: skip
                continue
            ids = torch.tensor(request.prompt_ids)
            together = [request.seeds] if self.group_prefill else [(seed,) for seed in request.seeds]
            first = 0
            for seeds in together:
                loop.add(WaitingPrompt(tally.place(number, first), ids, seeds, limit))
                first += len(seeds)
        return loop

    def _room(self, prompt: int, wanted: int) -> int:
        """New tokens that a prompt of so many tokens has room for."""
        room = self._language_model.config.positions.max_position_embeddings - prompt
        if self.max_cache_tokens is not None:
            room = min(room, self.max_cache_tokens - prompt + 1)  # the last token is not stored
        return min(wanted, room)


class _Tally:
    """Continuations as samples, and how many requests are whole."""

    def __init__(self, requests: Sequence[GenerationRequest], version: int) -> None:
        self.requests, self._version = requests, version
        self._samples: dict[tuple[int, int], Sample] = {}
        self._places: list[tuple[int, int]] = []
        self._unfinished = [len(request.seeds) for request in requests]
        self.wanted = sum(self._unfinished)
        self.finished = self.whole = 0

    def place(self, request: int, sample: int) -> int:
        """A number that stands for a request from one of its samples on."""
        self._places.append((request, sample))
        return len(self._places) - 1

    def take(self, ended: Iterable[Continuation]) -> None:
        """Counts and keeps what has left the loop."""
        for found in ended:
            number, first = self._places[found.number]
            reason: FinishReason = "stop" if found.stopped else "length" if found.finished else "abort"
            self._keep(number, first + found.sample, reason, found.token_ids, found.log_probs, found.routed_experts)
            if found.finished:
                self.finished += 1
                self._unfinished[number] -= 1
                self.whole += self._unfinished[number] == 0

    def _keep(
        self, number: int, sample: int, reason: FinishReason, tokens: list[int], logprobs: Tensor,
        routing: Tensor | None,
    ) -> None:  # fmt: skip
        request = self.requests[number]
        self._samples[number, sample] = Sample(
            request.prompt_ids, tokens, logprobs, reason, request.seeds[sample],
            torch.full((len(tokens),), self._version), routing,
        )  # fmt: skip

    def samples(self) -> list[list[Sample]]:
        """All samples; those that never began are aborted."""
        for number, request in enumerate(self.requests):
            for sample in range(len(request.seeds)):
                if (number, sample) not in self._samples:
                    self._keep(number, sample, "abort", [], torch.zeros(0), None)
        return [[self._samples[n, s] for s in range(len(r.seeds))] for n, r in enumerate(self.requests)]


def _language_model(policy: Any) -> LanguageModel:
    """The decoder of a policy.

    Raises:
        EngineError: If it has none.
    """
    if isinstance(policy, LanguageModel):
        return policy
    if isinstance(policy, MultimodalModel):
        return policy.language_model
    raise EngineError(
        f"EmbeddedEngine generates with a LanguageModel or a MultimodalModel, got {type(policy).__name__}: "
        "connect it to the network that is trained"
    )


def _device(model: LanguageModel) -> torch.device:
    """Where a network computes, also while it is divided."""
    return model.embed_tokens.weight.device

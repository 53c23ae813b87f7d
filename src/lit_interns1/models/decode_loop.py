"""The one decode loop of the house: continuous batching over the slots of a cache.

    step:  seat waiting sequences in free slots  →  one forward pass: a token of every sequence that decodes, and whole
           new prompts  →  draw a token for each  →  those that are finished leave, and the last ones fill their slots

The samples of a prompt share its prefill: it runs once, and its keys, values and routing are copied. Samples of the
prompt that find no slot yet wait for one; until they are seated, the prompt is kept in a spare slot.

Tokens, lengths and limits live on the host; of every step it reads the chosen tokens, in one transfer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lit_interns1.models.config import LanguageModelConfig
from lit_interns1.models.sampling import as_int64, next_tokens, random_bits, uniform
from lit_interns1.nn.document_attention import DocumentAttention
from lit_interns1.nn.kv_cache import CachedAttention, KeyValueCache
from lit_interns1.nn.moe import Router

PREFILL_TOKENS = 8192
"""Prompt tokens of one step, at most, if it is not a single prompt: the memory of a forward pass is bounded by it."""


@dataclass(frozen=True)
class WaitingPrompt:
    """A prompt and its samples.

    Attributes:
        number: What its continuations are marked with.
        ids_T: (P,) token ids on the host.
        seeds: One per sample.
        limit: New tokens per sample, at most.
        embeddings_TD: (P, hidden) in place of the ids.
    """

    number: int
    ids_T: Tensor
    seeds: tuple[int, ...]
    limit: int
    embeddings_TD: Tensor | None = None


@dataclass
class Continuation:
    """A sequence that has left the loop.

    Attributes:
        number: Of its prompt.
        sample: Its place among the samples of the prompt.
        token_ids: New tokens.
        log_probs: (n,) float32 on the CPU, in the distribution that was drawn from.
        stopped: Whether a stop token ended it.
        finished: Whether it came to its end, by a stop token or by its limit.
        routed_experts: (P + n − 1, MoE layers, K) int16 on the CPU, if recorded and it was begun.
    """

    number: int
    sample: int
    token_ids: list[int]
    log_probs: Tensor
    stopped: bool = False
    finished: bool = False
    routed_experts: Tensor | None = None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, without statistics of routers; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    measuring = [module for module, _ in modes if isinstance(module, Router) and module.measures]
    model.eval()
    for router in measuring:
        router.measures = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for router in measuring:
            router.measures = True


def _copied(continuation: Continuation) -> Continuation:
    routing = continuation.routed_experts
    return replace(
        continuation, log_probs=continuation.log_probs.cpu().clone(),
        routed_experts=None if routing is None else routing.cpu().clone(),
    )  # fmt: skip


class _Seat(NamedTuple):
    """Who sits in a slot: a sample of a prompt."""

    prompt: WaitingPrompt
    sample: int


class _Seated(NamedTuple):
    """A prompt that runs in this step, and the slots of its samples."""

    prompt: WaitingPrompt
    slots: list[int]


@dataclass
class _Spare:
    """A prompt whose samples are not all seated, with the logits of its last token."""

    prompt: WaitingPrompt
    next_sample: int
    logits_1V: Tensor


class DecodeLoop:
    """Generates for prompts that are added to it, until none is left.

    Args:
        forward: The model, called as `LanguageModel.forward` is.
        config: Its shape.
        device: Where it computes.
        num_slots: Sequences that run together.
        max_length: Tokens of a sequence that go through the model, at most: prompt + new − 1.
        max_new_tokens: The largest limit of a prompt.
        temperature: τ; 0 = greedy.
        top_p: Nucleus mass in (0, 1].
        top_k: Tokens to draw among; 0 = all.
        stop_ids: Tokens that end a sequence.
        record_routing: Also give the expert ids.
        embed: Embeds the tokens of sequences that decode, for prompts that come as embeddings.
        inference_mode: Run in torch's inference mode, which takes less of the host's time. A network whose parameters
            are gathered (FSDP2) cannot: what is gathered there could not be trained with.
        on_tokens: Called before every forward pass with a (T,) int64 key of each token, which depends on prompt, seed
            and position, not on what else is in the batch.

    Attributes:
        new_tokens: Tokens drawn so far.
    """

    def __init__(
        self, forward: Callable[..., Any], config: LanguageModelConfig, device: torch.device, *,
        num_slots: int, max_length: int, max_new_tokens: int, temperature: float, top_p: float, top_k: int,
        stop_ids: Sequence[int],
        record_routing: bool = False, embed: Callable[[Tensor], Tensor] | None = None,
        inference_mode: bool = True, on_tokens: Callable[[Tensor], None] | None = None,
    ) -> None:  # fmt: skip
        self._forward, self._config, self._device = forward, config, device
        self._embed, self._on_tokens, self._inference = embed, on_tokens, inference_mode
        self._sampling = temperature, top_p, top_k
        self._stops = np.array(sorted(set(stop_ids)), dtype=np.int64)
        self._waiting: deque[WaitingPrompt] = deque()
        self._seats: list[_Seat] = []
        self._spare: _Spare | None = None
        self._num_slots = num_slots  # the cache has one more: the spare
        self._cache = KeyValueCache(config.num_layers, num_slots + 1, max_length)
        self._routing: Tensor | None = None
        if record_routing and config.moe is not None and config.num_moe_layers:
            shape = (num_slots + 1, max_length, config.num_moe_layers, config.moe.experts_per_token)
            self._routing = torch.zeros(shape, dtype=torch.int16, device=device)
        self._log_probs = torch.zeros(num_slots, max_new_tokens, device=device)
        self._tokens = np.zeros((num_slots, max_new_tokens), dtype=np.int64)
        self._last_B = torch.zeros(0, dtype=torch.int64, device=device)
        # by slot: tokens in the cache, new tokens, the most there may be of them, seed
        self._lengths, self._counts, self._limits, self._seeds = np.zeros((4, num_slots), dtype=np.int64)
        self.new_tokens = 0

    def add(self, prompt: WaitingPrompt) -> None:
        """Puts a prompt at the end of the line."""
        self._waiting.append(prompt)

    @property
    def records_routing(self) -> bool:
        """Whether continuations hold expert ids."""
        return self._routing is not None

    @property
    def going(self) -> bool:
        """Whether a sequence runs or waits."""
        return bool(self._seats or self._waiting or self._spare)

    def step(self) -> list[Continuation]:
        """One forward pass, and one token for every sequence; gives those that are finished by it.

        Where there is no token to run, the pass is that of `idle`: ranks that share a model stay in step.
        """
        with self._without_gradients():
            finished = self._step()
        # tensors of inference mode could not be trained with: copies, made outside
        return [_copied(continuation) for continuation in finished]

    def _without_gradients(self) -> AbstractContextManager[Any]:
        return torch.inference_mode() if self._inference else torch.no_grad()

    def _step(self) -> list[Continuation]:
        decoding = len(self._seats)
        spare, late = self._spare, self._seat_late()
        seated = self._seat_waiting()
        logits = self._run(decoding, seated)
        self._lengths[:decoding] += 1
        rows = list(range(decoding))
        if spare is not None and late:
            rows += [len(logits)] * late
            logits = torch.cat([logits, spare.logits_1V])
        for row, (prompt, slots) in enumerate(seated, start=decoding):
            rows += [row] * len(slots)
            targets = slots[1:]
            if len(slots) < len(prompt.seeds):
                self._spare = _Spare(prompt, len(slots), logits[row : row + 1])
                targets = [*targets, self._num_slots]
            self._copy(slots[0], targets, len(prompt.ids_T))
        if rows != list(range(len(logits))):
            logits = logits.index_select(0, torch.tensor(rows, device=self._device))
        return self._draw(logits)

    def idle(self) -> None:
        """A forward pass of one token, of which nothing is kept."""
        token = torch.zeros(1, dtype=torch.int64, device=self._device)
        attend = DocumentAttention(torch.tensor([0, 1], device=self._device), self._config.attention_backend)
        if self._on_tokens is not None:
            self._on_tokens(token)
        with self._without_gradients():
            self._forward(token, position_ids=token, attend=attend, logits_index=token)

    def abort(self) -> list[Continuation]:
        """Ends everything; gives what there is of all sequences, also of those that were never begun."""
        left = [_copied(self._leave(slot, stopped=False, finished=False)) for slot in range(len(self._seats))]
        unseated = [(prompt, 0) for prompt in self._waiting]
        if self._spare is not None:
            unseated.insert(0, (self._spare.prompt, self._spare.next_sample))
        for prompt, first in unseated:
            left += [Continuation(prompt.number, s, [], torch.zeros(0)) for s in range(first, len(prompt.seeds))]
        self._seats, self._spare = [], None
        self._waiting.clear()
        return left

    # -- seats ---------------------------------------------------------------------------------------------------------

    def _sit(self, prompt: WaitingPrompt, sample: int) -> int:
        """Gives a sample the next slot."""
        slot = len(self._seats)
        self._seats.append(_Seat(prompt, sample))
        self._lengths[slot], self._counts[slot], self._limits[slot] = len(prompt.ids_T), 0, prompt.limit
        self._seeds[slot] = as_int64(prompt.seeds[sample])
        return slot

    def _seat_late(self) -> int:
        """Seats samples of the prompt in the spare slot; gives how many."""
        spare = self._spare
        if spare is None:
            return 0
        last = min(spare.next_sample + self._num_slots - len(self._seats), len(spare.prompt.seeds))
        slots = [self._sit(spare.prompt, sample) for sample in range(spare.next_sample, last)]
        self._copy(self._num_slots, slots, len(spare.prompt.ids_T))
        spare.next_sample = last
        if last == len(spare.prompt.seeds):
            self._spare = None
        return len(slots)

    def _seat_waiting(self) -> list[_Seated]:
        """Seats the samples of waiting prompts, the last one's perhaps not all."""
        seated: list[_Seated] = []
        tokens = 0
        while self._waiting and len(self._seats) < self._num_slots:
            prompt = self._waiting[0]
            tokens += len(prompt.ids_T)
            if seated and tokens > PREFILL_TOKENS:
                break
            self._waiting.popleft()
            count = min(len(prompt.seeds), self._num_slots - len(self._seats))
            seated.append(_Seated(prompt, [self._sit(prompt, sample) for sample in range(count)]))
        return seated

    def _copy(self, source: int, targets: Sequence[int], length: int) -> None:
        """Keys, values and routing of the first tokens of a slot into others."""
        self._cache.copy(source, targets, length)
        if self._routing is not None and targets:
            self._routing[list(targets), :length] = self._routing[source, :length].clone()

    # -- forward pass --------------------------------------------------------------------------------------------------

    def _run(self, decoding: int, seated: Sequence[_Seated]) -> Tensor:
        """Logits of the sequences that decode, then of every prompt's last token."""
        if not decoding and not seated:
            self.idle()
            return torch.zeros(0, self._config.vocab_size, device=self._device)
        past = self._lengths[:decoding]
        attend = CachedAttention(
            self._cache, self._to_device(past), int(past.max(initial=0)),
            [(slots[0], len(prompt.ids_T)) for prompt, slots in seated], self._config.attention_backend,
        )  # fmt: skip
        ends = np.cumsum([decoding, *(len(prompt.ids_T) for prompt, _ in seated)])
        last_N = np.concatenate([np.arange(decoding), ends[1:] - 1])
        if self._on_tokens is not None:
            self._on_tokens(self._token_keys(decoding, seated))
        output = self._forward(
            **self._inputs(seated), position_ids=attend.position_ids_T, attend=attend,
            logits_index=self._to_device(last_N), record_routing=self._routing is not None,
        )  # fmt: skip
        if self._routing is not None:
            self._routing[attend.slot_T, attend.position_ids_T] = output.routing.stacked()
        logits: Tensor = output.logits
        return logits

    def _to_device(self, numbers: np.ndarray) -> Tensor:
        return torch.tensor(numbers, device=self._device)

    def _inputs(self, seated: Sequence[_Seated]) -> dict[str, Tensor]:
        embeddings = [prompt.embeddings_TD for prompt, _ in seated if prompt.embeddings_TD is not None]
        if not embeddings:
            ids = [prompt.ids_T.to(self._device) for prompt, _ in seated]
            return {"input_ids": torch.cat([self._last_B, *ids]) if ids else self._last_B}
        if len(self._last_B):
            assert self._embed is not None
            embeddings.insert(0, self._embed(self._last_B))
        return {"inputs_embeds_TD": torch.cat(embeddings)}

    def _token_keys(self, decoding: int, seated: Sequence[_Seated]) -> Tensor:
        keys = [random_bits(torch.tensor(self._seeds[:decoding]), torch.tensor(self._lengths[:decoding]))]
        for prompt, _ in seated:
            place = torch.arange(len(prompt.ids_T))
            keys.append(random_bits(random_bits(prompt.ids_T, place).sum(), place))
        return torch.cat(keys).to(self._device)

    # -- drawing and leaving -------------------------------------------------------------------------------------------

    def _draw(self, logits_BV: Tensor) -> list[Continuation]:
        count = len(self._seats)
        slot_B, counts = np.arange(count), self._counts[:count]
        uniform_B = uniform(random_bits(torch.tensor(self._seeds[:count]), torch.tensor(counts)))
        self._last_B, log_prob_B = next_tokens(logits_BV, uniform_B.to(self._device), *self._sampling)
        self._log_probs[self._to_device(slot_B), self._to_device(counts)] = log_prob_B
        chosen = self._last_B.cpu().numpy()
        self._tokens[slot_B, counts] = chosen
        counts += 1
        self.new_tokens += count
        stopped = np.isin(chosen, self._stops)
        done = stopped | (counts >= self._limits[:count])
        finished = [self._leave(slot, bool(stopped[slot]), finished=True) for slot in np.flatnonzero(done).tolist()]
        if finished:
            self._fill_gaps(done)
        return finished

    def _leave(self, slot: int, stopped: bool, finished: bool) -> Continuation:
        (prompt, sample), count = self._seats[slot], int(self._counts[slot])
        routing = None
        if self._routing is not None:
            routing = self._routing[slot, : len(prompt.ids_T) + count - 1].clone()  # the slot is used again
        log_probs = self._log_probs[slot, :count].clone()
        tokens: list[int] = self._tokens[slot, :count].tolist()
        return Continuation(prompt.number, sample, tokens, log_probs, stopped, finished, routing)

    def _fill_gaps(self, done: np.ndarray) -> None:
        """Moves the last sequences into the slots of those that are done."""
        staying = int((~done).sum())
        order = np.arange(staying)
        gaps = np.flatnonzero(done[:staying]).tolist()
        movers = (staying + np.flatnonzero(~done[staying:])).tolist()
        for gap, mover in zip(gaps, movers, strict=True):
            order[gap] = mover
            self._copy(mover, [gap], int(self._lengths[mover]))
            self._log_probs[gap] = self._log_probs[mover]
            self._seats[gap] = self._seats[mover]
            for state in (self._tokens, self._lengths, self._counts, self._limits, self._seeds):
                state[gap] = state[mover]
        del self._seats[staying:]
        self._last_B = self._last_B[self._to_device(order)]

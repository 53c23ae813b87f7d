"""Continues prompts: one call of the decode loop.

    x_t ~ softmax(z_t / τ) restricted to the k best tokens, and of them to the smallest set with probability ≥ top_p

Prompts of different lengths run together, flat and without padding; finished sequences leave the batch, and a prompt
that occurs several times runs once. Every sequence draws the random numbers of (seed, index), so its text does not
depend on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from lit_interns1.models.decode_loop import Continuation, DecodeLoop, WaitingPrompt, evaluating
from lit_interns1.models.language_model import LanguageModel
from lit_interns1.models.sampling import check_sampling


@dataclass
class Generation:
    """What came out, one entry per sequence, in the order of the prompts.

    Attributes:
        token_ids: New tokens, the stop token included.
        log_probs: (n,) float32 log-probabilities of the new tokens under the distribution they were drawn from (for
            greedy decoding, under the model's own distribution).
        finished: Whether a stop token ended the sequence.
        routed_experts: (prompt + n − 1, MoE layers, K) int16 expert ids of all tokens that went through the model, if
            asked for: the last new token never does.
    """

    token_ids: list[list[int]]
    log_probs: list[Tensor]
    finished: list[bool]
    routed_experts: list[Tensor] | None


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]] | Tensor | None = None,
    *,
    prompt_embeds: Sequence[Tensor] | None = None,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop_ids: Sequence[int] = (),
    seed: int = 0,
    record_routing: bool = False,
) -> Generation:
    """Continues prompts.

    Args:
        model: The language model; set to eval mode while it runs.
        prompts: Token ids, one list per sequence, or a (B, S) tensor.
        prompt_embeds: (n, hidden) embeddings per sequence in place of ids.
        max_new_tokens: Limit per sequence.
        temperature: τ; 0 = greedy.
        top_p: Nucleus mass in (0, 1].
        top_k: Draw among the k most probable tokens; 0 = all.
        stop_ids: Tokens that end a sequence.
        seed: Seed of the random streams.
        record_routing: Also give the expert ids.

    Raises:
        ValueError: If a prompt is empty or an option is out of range.
    """
    if (prompts is None) == (prompt_embeds is None):
        raise ValueError("give either prompts or prompt_embeds")
    check_sampling(max_new_tokens, temperature, top_p, top_k)
    device = model.embed_tokens.weight.device
    groups: dict[Any, list[int]] = {}
    if prompt_embeds is None:
        assert prompts is not None
        ids = [torch.as_tensor(prompt, dtype=torch.long, device="cpu").flatten() for prompt in prompts]
        for index, tokens in enumerate(ids):
            groups.setdefault(tuple(tokens.tolist()), []).append(index)
    else:
        ids = [torch.zeros(len(prompt), dtype=torch.long) for prompt in prompt_embeds]
        for index, embedding in enumerate(prompt_embeds):
            groups.setdefault(id(embedding), []).append(index)
    longest, count = max(map(len, ids), default=0), len(ids)
    if min(map(len, ids), default=0) == 0:
        raise ValueError("every prompt needs at least one token")

    loop = DecodeLoop(
        model, model.config, device, num_slots=count, max_length=longest + max_new_tokens - 1,
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, stop_ids=stop_ids,
        record_routing=record_routing, embed=model.embed_tokens, inference_mode=not isinstance(model, FSDPModule),
    )  # fmt: skip
    for first, *others in groups.values():
        seeds = tuple(seed * 1_000_003 + index for index in (first, *others))
        embeddings = None if prompt_embeds is None else prompt_embeds[first].to(device)
        loop.add(WaitingPrompt(first, ids[first], seeds, max_new_tokens, embeddings))
    members = {first: [first, *others] for first, *others in groups.values()}
    found: dict[int, Continuation] = {}
    with evaluating(model):
        while loop.going:
            for continuation in loop.step():
                found[members[continuation.number][continuation.sample]] = continuation
    ordered = [found[index] for index in range(count)]
    return Generation(
        [c.token_ids for c in ordered], [c.log_probs for c in ordered], [c.stopped for c in ordered],
        [c.routed_experts for c in ordered if c.routed_experts is not None] if loop.records_routing else None,
    )  # fmt: skip

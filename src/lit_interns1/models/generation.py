"""The one decode loop of the house.

    x_t ~ softmax(z_t / τ) restricted to the smallest set of tokens with probability ≥ top_p

Prompts of different lengths run together, flat and without padding; finished sequences leave the batch. Every sequence
draws from its own random stream, seeded with (seed, index), so its text does not depend on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_interns1.models.language_model import LanguageModel
from lit_interns1.nn.kv_cache import CachedAttention, KeyValueCache


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


def sampling_log_probs(logits_BV: Tensor, temperature: float, top_p: float) -> Tensor:
    """(B, V) log-probabilities of the sampling distribution; −inf outside the nucleus.

    Args:
        logits_BV: (B, V).
        temperature: τ > 0.
        top_p: Probability mass to keep; the token that crosses it is kept.
    """
    log_probs = torch.log_softmax(logits_BV.float() / temperature, dim=-1)
    if top_p >= 1.0:
        return log_probs
    ordered, order = log_probs.sort(dim=-1, descending=True)
    mass_before = ordered.exp().cumsum(-1) - ordered.exp()
    outside = torch.zeros_like(log_probs, dtype=torch.bool).scatter(-1, order, mass_before >= top_p)
    return torch.log_softmax(log_probs.masked_fill(outside, -torch.inf), dim=-1)


def _draw(log_probs_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Inverse-CDF sampling: the first token whose cumulative probability exceeds u. (B, V), (B,) → (B,)."""
    cumulative = log_probs_BV.double().exp().cumsum(-1)
    target = uniform_B.to(cumulative)[:, None] * cumulative[:, -1:]
    choice = torch.searchsorted(cumulative, target, right=True)[:, 0]
    last = (log_probs_BV > -torch.inf).double().cumsum(-1).argmax(-1)
    return torch.minimum(choice, last)


def _check(config_tokens: int, max_new_tokens: int, temperature: float, top_p: float) -> None:
    if config_tokens == 0:
        raise ValueError("every prompt needs at least one token")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if temperature < 0:
        raise ValueError(f"temperature must not be negative (0 = greedy), got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]] | Tensor | None = None,
    *,
    prompt_embeds: Sequence[Tensor] | None = None,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_p: float = 1.0,
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
        stop_ids: Tokens that end a sequence.
        seed: Seed of the random streams.
        record_routing: Also give the expert ids.

    Raises:
        ValueError: If a prompt is empty or an option is out of range.
    """
    if (prompts is None) == (prompt_embeds is None):
        raise ValueError("give either prompts or prompt_embeds")
    device = model.embed_tokens.weight.device
    if prompt_embeds is None:
        assert prompts is not None
        ids = [torch.as_tensor(prompt, dtype=torch.long, device=device).flatten() for prompt in prompts]
        lengths = [len(prompt) for prompt in ids]
        inputs = {"input_ids": torch.cat(ids)} if ids else {}
    else:
        lengths = [len(prompt) for prompt in prompt_embeds]
        inputs = {"inputs_embeds_TD": torch.cat(list(prompt_embeds)).to(device)}
    _check(min(lengths, default=0), max_new_tokens, temperature, top_p)

    count, config = len(lengths), model.config
    cache = KeyValueCache(
        config.num_layers, count, max(lengths) + max_new_tokens, config.num_kv_heads, config.head_dim,
        dtype=model.embed_tokens.weight.dtype, device=device,
    )  # fmt: skip
    streams = [torch.Generator().manual_seed((seed * 1_000_003 + i) % 2**63) for i in range(count)]
    uniforms_BN = torch.stack([torch.rand(max_new_tokens, generator=g, dtype=torch.float64) for g in streams])
    stops = torch.tensor(sorted(set(stop_ids)), dtype=torch.long, device=device)
    result = Generation([[] for _ in range(count)], [], [False] * count, None)
    log_probs: list[list[Tensor]] = [[] for _ in range(count)]
    routing: list[list[Tensor]] = [[] for _ in range(count)]

    was_training = model.training
    model.eval()
    try:
        active = list(range(count))
        new_lengths = torch.tensor(lengths, device=device)
        for step in range(max_new_tokens):
            attend = CachedAttention(cache, new_lengths, config.attention_backend)
            last = torch.cumsum(new_lengths, 0) - 1
            output = model(
                **inputs, position_ids=attend.position_ids_T, attend=attend, logits_index=last,
                record_routing=record_routing,
            )  # fmt: skip
            assert output.logits is not None
            if record_routing and output.routing is not None and output.routing.num_layers:
                pieces = output.routing.stacked().split(new_lengths.tolist())
                for sequence, piece in zip(active, pieces, strict=True):
                    routing[sequence].append(piece)
            if temperature == 0:
                step_log_probs = torch.log_softmax(output.logits.float(), dim=-1)
                chosen = output.logits.argmax(-1)
            else:
                step_log_probs = sampling_log_probs(output.logits, temperature, top_p)
                chosen = _draw(step_log_probs, uniforms_BN[active, step].to(device))
            chosen_log_probs = step_log_probs.gather(-1, chosen[:, None])[:, 0]
            stopped = torch.isin(chosen, stops).tolist()
            for row, (sequence, token) in enumerate(zip(active, chosen.tolist(), strict=True)):
                result.token_ids[sequence].append(token)
                log_probs[sequence].append(chosen_log_probs[row])
                result.finished[sequence] = stopped[row]
            going = [row for row, done in enumerate(stopped) if not done]
            if not going:
                break
            if len(going) < len(active):
                rows = torch.tensor(going, device=device)
                cache, chosen = cache.select(rows), chosen[rows]
                active = [active[row] for row in going]
            new_lengths = torch.ones(len(active), dtype=torch.long, device=device)
            inputs = {"input_ids": chosen}
    finally:
        model.train(was_training)
    result.log_probs = [torch.stack(values) for values in log_probs]
    if record_routing and config.num_moe_layers:
        result.routed_experts = [torch.cat(pieces) for pieces in routing]
    return result

"""How the next token is drawn.

    μ(v) ∝ exp(z_v / τ) where v is kept: the k best, and of them the smallest set with probability ≥ top_p
    x = first token with Σ_{v ≤ x} μ(v) > u,      u = the number that belongs to (seed, step)

Random numbers are a function of seed and step (the mixing function of SplitMix64, doi 10.1145/2660193.2660195), with no
state: a sequence draws the same ones whatever is generated beside it, in which order, and on which device.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN, _FIRST, _SECOND = (
    value - 2**64 for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)  # as signed integers
_FEW = 64
"""Candidates for a nucleus that are looked at first."""


def as_int64(seed: int) -> int:
    """Any integer as one that a tensor can hold: its lower 64 bits."""
    seed %= 2**64
    return seed - 2**64 if seed >= 2**63 else seed


def _shifted(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _mixed(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def random_bits(key: Tensor, number: Tensor) -> Tensor:
    """64 random bits for every pair of int64, broadcast against one another."""
    return _mixed(_mixed(key + _GOLDEN) + (number + 1) * _GOLDEN)


def uniform(bits: Tensor) -> Tensor:
    """Random bits → float64 in [0, 1)."""
    return _shifted(bits, 11).double() * 2.0**-53


def _nucleus_edge(log_probs_BV: Tensor, top_p: float) -> Tensor:
    """(B, 1) log-probability of the least probable token of the nucleus."""
    vocabulary = log_probs_BV.shape[-1]
    size = min(_FEW, vocabulary)
    while True:
        ordered = log_probs_BV.topk(size, dim=-1).values
        mass = ordered.exp().cumsum(-1)
        if size == vocabulary or bool((mass[:, -1] >= top_p).all()):
            break
        size = min(16 * size, vocabulary)
    last = (mass - ordered.exp() < top_p).sum(-1, keepdim=True) - 1
    return ordered.gather(-1, last)


def sampling_log_probs(logits_BV: Tensor, temperature: float, top_p: float = 1.0, top_k: int = 0) -> Tensor:
    """(B, V) log-probabilities of the sampling distribution; −inf for what is not kept.

    Args:
        logits_BV: (B, V).
        temperature: τ > 0.
        top_p: Probability mass to keep, of what `top_k` leaves; the token that crosses it is kept.
        top_k: Tokens to keep; 0 = all. Tokens as probable as the last one that is kept are kept, too.
    """
    scaled = logits_BV.float() / temperature
    if 0 < top_k < scaled.shape[-1]:
        least = scaled.topk(top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    log_probs = torch.log_softmax(scaled, dim=-1)
    if top_p >= 1.0:
        return log_probs
    outside = log_probs < _nucleus_edge(log_probs, top_p)
    return torch.log_softmax(log_probs.masked_fill_(outside, -torch.inf), dim=-1)


def draw(log_probs_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Inverse-CDF sampling: the first token whose cumulative probability exceeds u. (B, V), (B,) float64 → (B,)."""
    cumulative = log_probs_BV.exp().cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1]
    # strictly below the total, or rounding could choose a token behind the last one that is kept
    target = torch.minimum(uniform_B * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]


def next_tokens(
    logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float = 1.0, top_k: int = 0
) -> tuple[Tensor, Tensor]:
    """Draws a token for every row.

    Args:
        logits_BV: (B, V).
        uniform_B: (B,) float64 in [0, 1).
        temperature: τ; 0 = the most probable token.
        top_p: See `sampling_log_probs`.
        top_k: See `sampling_log_probs`.

    Returns:
        Tokens (B,) and their float32 log-probabilities (B,) in the distribution that was drawn from; where τ = 0, in
        the model's own.
    """
    if temperature == 0:
        log_probs = torch.log_softmax(logits_BV.float(), dim=-1)
        chosen = logits_BV.argmax(-1)
    else:
        log_probs = sampling_log_probs(logits_BV, temperature, top_p, top_k)
        chosen = draw(log_probs, uniform_B)
    return chosen, log_probs.gather(-1, chosen[:, None])[:, 0]


def check_sampling(max_new_tokens: int, temperature: float, top_p: float, top_k: int) -> None:
    """Raises ValueError if an option is out of range."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not temperature >= 0:
        raise ValueError(f"temperature must not be negative (0 = greedy), got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
    if top_k < 0:
        raise ValueError(f"top_k must not be negative (0 = all tokens), got {top_k}")

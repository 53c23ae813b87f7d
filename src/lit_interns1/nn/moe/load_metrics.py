"""How even the load of experts is: pure functions of counts.

With c_e tokens sent to expert e, E experts, μ = mean_e c_e and p_e = c_e / Σc:
  max violation  (max c − μ) / μ  (arXiv 2408.15664, Eq. 4)     min violation  (μ − min c) / μ
  cv             σ / μ, population σ                            load deviation mean |c − μ| / μ
  gini           Σ_e (2e − E − 1) c_(e) / (E Σc), c_(e) sorted  entropy        −Σ p ln p / ln E,  effective = e^H
  dead           # c_e = 0                                      starved        # c_e < 0.1 μ
  balance loss   E Σ_e p_e P_e with mean probabilities P        drop rate      Σ max(0, c_e − cap) / Σc
All act on the last dimension; a layer without a token is balanced. Groups and ranks are sums over consecutive experts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _mean(counts: Tensor) -> Tensor:
    return counts.mean(-1).clamp(min=torch.finfo(torch.float32).tiny)


def max_violation(counts: Tensor) -> Tensor:
    """(..., E) → (...): by how much of the mean the fullest expert lies above it; 0 = balanced, at most E − 1."""
    return (counts.amax(-1) - counts.mean(-1)) / _mean(counts)


def min_violation(counts: Tensor) -> Tensor:
    """(..., E) → (...): by how much of the mean the emptiest expert lies below it; 0 to 1."""
    return (counts.mean(-1) - counts.amin(-1)) / _mean(counts)


def coefficient_of_variation(counts: Tensor) -> Tensor:
    """(..., E) → (...): population standard deviation over mean."""
    return counts.std(-1, correction=0) / _mean(counts)


def load_deviation(counts: Tensor) -> Tensor:
    """(..., E) → (...): mean absolute deviation from the mean, over the mean. No token is dropped by it."""
    mean = _mean(counts)
    return (counts - counts.mean(-1, keepdim=True)).abs().mean(-1) / mean


def gini(counts: Tensor) -> Tensor:
    """(..., E) → (...): Gini coefficient; 0 = balanced, 1 − 1/E = one expert gets all."""
    size = counts.shape[-1]
    rank = 2 * torch.arange(1, size + 1, device=counts.device, dtype=counts.dtype) - size - 1
    return (counts.sort(-1).values * rank).sum(-1) / (size * size * _mean(counts))


def load_entropy(counts: Tensor) -> Tensor:
    """(..., E) → (...): entropy of the load in nats, between 0 and ln E; ln E without a token."""
    shares = counts / counts.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(counts.sum(-1) > 0, torch.special.entr(shares).sum(-1), math.log(counts.shape[-1]))


def normalized_entropy(counts: Tensor) -> Tensor:
    """(..., E) → (...): entropy of the load over ln E; 1 = balanced."""
    return load_entropy(counts) / max(math.log(counts.shape[-1]), torch.finfo(torch.float32).tiny)


def effective_experts(counts: Tensor) -> Tensor:
    """(..., E) → (...): e^entropy, as many evenly used experts would have the same entropy."""
    return load_entropy(counts).exp()


def dead_experts(counts: Tensor) -> Tensor:
    """(..., E) → (...): experts that got nothing."""
    return (counts == 0).sum(-1)


def starved_experts(counts: Tensor, share: float = 0.1) -> Tensor:
    """(..., E) → (...): experts that got less than `share` of the mean, the dead ones included."""
    return (counts < share * _mean(counts)[..., None]).sum(-1)


def drop_rate(counts: Tensor, capacity_factor: float) -> Tensor:
    """(..., E) → (...): share of routed slots above a capacity of ⌈factor · mean⌉ tokens per expert.

    Nothing is dropped in this package; this is what such a capacity would drop if all counted tokens were one batch.
    """
    capacity = (capacity_factor * _mean(counts)).ceil()[..., None]
    return (counts - capacity).clamp(min=0).sum(-1) / (_mean(counts) * counts.shape[-1])


def balance(counts: Tensor, mean_probability: Tensor) -> Tensor:
    """(..., E), (..., E) → (...): E Σ_e share_e P_e, the load-balancing loss; 1 = balanced."""
    shares = counts / (_mean(counts) * counts.shape[-1])[..., None]
    return counts.shape[-1] * (shares * mean_probability).sum(-1)


def group_counts(counts: Tensor, groups: int) -> Tensor:
    """(..., E) → (..., groups): counts of groups of E / groups consecutive experts: router groups, or what the ranks of
    an expert axis hold.

    Raises:
        ValueError: If the groups do not divide the experts.
    """
    if counts.shape[-1] % groups:
        raise ValueError(f"{counts.shape[-1]} experts cannot be divided into {groups} groups")
    return counts.unflatten(-1, (groups, -1)).sum(-1)


def routing_drift(before_TK: Tensor, after_TK: Tensor) -> Tensor:
    """(..., K), (..., K) → (...): 1 − |A ∩ B| / |A ∪ B| of the two sets of chosen experts of each token."""
    common = (before_TK[..., :, None] == after_TK[..., None, :]).any(-1).sum(-1)
    return 1 - common / (2 * before_TK.shape[-1] - common)

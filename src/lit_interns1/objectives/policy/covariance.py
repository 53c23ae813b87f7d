"""Selection of the tokens that drive entropy down: KL-Cov and Clip-Cov (arXiv 2505.22617, §4).

    Cov(y_t) = (log π(y_t) − mean log π) · (A_t − mean A)

The batch is one optimizer step over all ranks, and π is π_old, so a selection does not depend on the split into
micro-batches (before the first update of a rollout π_old = π_θ; the released code uses π_θ and one micro-batch of one
rank). The k largest are found without gathering: the bits of a float32, read as an ordered integer, are fixed byte by
byte from a histogram of 256 that all ranks add up.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lit_interns1.objectives.policy.inputs import PolicyInputs
from lit_interns1.objectives.policy.objective import global_sums, safe_ratio
from lit_interns1.training.window_means import all_reduce_sum

_SIGN = 1 << 31


def top_k_mask(value_T: Tensor, candidate_T: Tensor, k: int, process_group: dist.ProcessGroup | None = None) -> Tensor:
    """The k largest candidates over all ranks. Among equal ones at the border, those of lower ranks and first places.

    Args:
        value_T: float32, finite.
        candidate_T: bool.
        k: How many; all, if there are fewer candidates.
        process_group: Ranks; default: all.

    Returns:
        (T,) bool.
    """
    bits_T = (value_T.float() + 0.0).contiguous().view(torch.int32).long()  # + 0.0: −0 is 0
    key_T = torch.where(bits_T < 0, ~bits_T & 0xFFFFFFFF, bits_T | _SIGN)  # ascends with the value
    inside_T, border, wanted = candidate_T.clone(), 0, k
    for shift in (24, 16, 8, 0):
        byte_T = (key_T >> shift) & 255
        histogram = all_reduce_sum(torch.bincount(byte_T[inside_T], minlength=256), process_group)
        above = histogram.flip(0).cumsum(0).flip(0) - histogram  # candidates with a larger byte
        fits = ((above < wanted) & (above + histogram >= wanted)).nonzero()
        if not len(fits):  # fewer candidates than k (only in the first round)
            return candidate_T if wanted > 0 else torch.zeros_like(candidate_T)
        byte = int(fits[0])
        border, wanted = border | (byte << shift), wanted - int(above[byte])
        inside_T = inside_T & (byte_T == byte)
    before = _sum_of_lower_ranks(inside_T.sum(), process_group)
    first_T = inside_T & (inside_T.cumsum(0) + before <= wanted)
    return (candidate_T & (key_T > border)) | first_T


def _sum_of_lower_ranks(count: Tensor, process_group: dist.ProcessGroup | None) -> Tensor:
    if not (dist.is_available() and dist.is_initialized()):
        return torch.zeros_like(count)
    counts = count.new_zeros(dist.get_world_size(process_group))
    rank = dist.get_rank(process_group)
    counts[rank] = count
    return all_reduce_sum(counts, process_group)[:rank].sum()


def covariances(inputs: PolicyInputs, process_group: dist.ProcessGroup | None = None) -> Tensor:
    """(T,) float32 Cov of the response tokens, 0 elsewhere; means over all ranks. Needs A and log π_old."""
    inputs.require(["advantages", "old_logprobs"], "the covariance of log-probabilities and advantages")
    mask_T = inputs.response_mask
    logp_T, advantage_T = inputs.value("old_logprobs").double(), inputs.value("advantages").double()
    sums = global_sums({"n": mask_T.sum(), "logp": logp_T.sum(), "advantage": advantage_T.sum()}, process_group)
    product_T = (logp_T - safe_ratio(sums["logp"], sums["n"])) * (
        advantage_T - safe_ratio(sums["advantage"], sums["n"])
    )
    return torch.where(mask_T, product_T, 0.0).float()


def kl_cov_mask(inputs: PolicyInputs, kl_cov_ratio: float, process_group: dist.ProcessGroup | None = None) -> Tensor:
    """The share of response tokens with the largest covariance.

    Args:
        inputs: One optimizer step.
        kl_cov_ratio: k as a fraction: max(1, ⌊k·N⌋) tokens.
        process_group: Ranks; default: all.

    Returns:
        (T,) bool.
    """
    covariance_T = covariances(inputs, process_group)
    tokens = int(global_sums({"n": inputs.response_mask.sum()}, process_group)["n"])
    return top_k_mask(covariance_T, inputs.response_mask, max(1, int(tokens * kl_cov_ratio)), process_group)


def clip_cov_mask(
    inputs: PolicyInputs, clip_cov_ratio: float, low: float, high: float, seed: int = 0,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:  # fmt: skip
    """A random share of the tokens whose covariance is between two bounds.

    The random numbers are a hash of the token's log-probability, its place in the response and the seed: the same on
    any number of ranks.

    Args:
        inputs: One optimizer step.
        clip_cov_ratio: At most max(1, ⌊ratio·N⌋) tokens.
        low: Lower bound of the covariance, exclusive.
        high: Upper bound of the covariance, exclusive.
        seed: Another choice of tokens.
        process_group: Ranks; default: all.

    Returns:
        (T,) bool.
    """
    covariance_T = covariances(inputs, process_group)
    candidate_T = inputs.response_mask & (covariance_T > low) & (covariance_T < high)
    tokens = int(global_sums({"n": inputs.response_mask.sum()}, process_group)["n"])
    step_SL = torch.arange(inputs.to_rows(covariance_T)[0].shape[1], device=covariance_T.device)
    place_T = inputs.from_rows(step_SL.expand(len(inputs.sample_lengths), -1))
    bits_T = inputs.value("old_logprobs").float().contiguous().view(torch.int32).long()
    key_T = _hash(bits_T + _hash(place_T + _hash(torch.full_like(place_T, seed))))
    return top_k_mask(key_T.float(), candidate_T, max(1, int(tokens * clip_cov_ratio)), process_group)


def _hash(value_T: Tensor) -> Tensor:
    """24 well-mixed bits of an integer below 2³² or above (murmur3's finalizer on 32 bits; int64 products may wrap)."""
    x = value_T & 0xFFFFFFFF
    for multiplier, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
        x = ((x ^ (x >> shift)) * multiplier) & 0xFFFFFFFF
    return (x ^ (x >> 16)) & 0xFFFFFF

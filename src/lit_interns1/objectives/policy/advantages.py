"""Advantages of whole responses from the rewards of their group (all responses to one prompt).

    group mean            A_i = R_i − mean(R)                       Dr. GRPO (arXiv 2503.20783, §3.2)
    group z-score         A_i = (R_i − mean(R)) / (std(R) + ε)      GRPO (arXiv 2402.03300, §4.1.2)
    leave-one-out         A_i = R_i − mean_{j≠i}(R_j)               RLOO (arXiv 2402.14740, §3.3), OREAL, Intern-S1-Pro
    length-weighted mean  A_i = R_i − Σ_j |y_j| R_j / Σ_j |y_j|     OPO (arXiv 2505.23585)
    pass@k                see `PassAtK`                             arXiv 2508.10751

Groups may differ in size. A failed sample (not `valid`, or reward NaN) is in no statistic and has A = 0; mask its
tokens, too. If all rewards of a group are equal, A = 0 exactly, and the group is counted. Statistics are float64.
Shapes: S samples, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lit_interns1.objectives.metrics import Metrics, masked_metric
from lit_interns1.objectives.options import check_choice, check_number
from lit_interns1.objectives.policy.objective import safe_ratio
from lit_interns1.training.window_means import all_reduce_sum

RewardScale = Literal["group", "batch", "none"]


class GroupAdvantages(NamedTuple):
    """What an estimator gives.

    Attributes:
        advantages: (S,) float32.
        valid: (S,) bool, samples that count.
        zero_variance: (S,) bool, valid samples of groups whose rewards are all equal (a group of one is such a group):
            nothing to learn from, and what dynamic sampling (DAPO) draws again.
        metrics: Over samples: `reward` (mean), `zero_variance` and `failed` (fractions).
    """

    advantages: Tensor
    valid: Tensor
    zero_variance: Tensor
    metrics: Metrics


class _Groups:
    """Sums over groups, on this rank or over all of them."""

    def __init__(
        self, rewards: Tensor, group_ids: Tensor, valid: Tensor | None, across_ranks: bool,
        process_group: dist.ProcessGroup | None,
    ) -> None:  # fmt: skip
        shapes = [tuple(x.shape) for x in (rewards, group_ids, *([] if valid is None else [valid]))]
        if rewards.ndim != 1 or len(set(shapes)) > 1:
            raise ValueError(f"rewards, group_ids and valid must be vectors of one length, got {shapes}")
        self.across_ranks, self.process_group = across_ranks, process_group
        self.valid = ~rewards.isnan() if valid is None else valid.bool() & ~rewards.isnan()
        self.rewards = torch.where(self.valid, rewards.detach().double(), 0.0)
        if across_ranks:
            top = group_ids.max() if len(group_ids) else group_ids.new_zeros(())
            self.index, self.number = group_ids.long(), int(self._extreme(top.long().reshape(1))) + 1
        else:
            names, self.index = torch.unique(group_ids, return_inverse=True)
            self.number = len(names)
        self.sizes = self.sums(torch.ones_like(self.rewards))[self.index]
        high_G = self.rewards.new_full((self.number,), -torch.inf)
        high_G = high_G.scatter_reduce(0, self.index, torch.where(self.valid, self.rewards, -torch.inf), "amax")
        low_G = high_G.new_full((self.number,), -torch.inf)
        low_G = low_G.scatter_reduce(0, self.index, torch.where(self.valid, -self.rewards, -torch.inf), "amax")
        equal_G = self._extreme(high_G) == -self._extreme(low_G)
        self.equal = equal_G[self.index] & self.valid

    def _extreme(self, value: Tensor) -> Tensor:
        if self.across_ranks and dist.is_available() and dist.is_initialized():
            dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.process_group)
        return value

    def _reduced(self, value: Tensor) -> Tensor:
        return all_reduce_sum(value, self.process_group) if self.across_ranks else value

    def sums(self, value: Tensor) -> Tensor:
        """(G,) sums over the valid samples of each group."""
        masked = torch.where(self.valid, value, 0.0)
        return self._reduced(value.new_zeros(self.number).index_add(0, self.index, masked))

    def means(self, value: Tensor) -> Tensor:
        """(S,) the mean of each sample's group."""
        return self.sums(value)[self.index] / self.sizes.clamp(min=1.0)

    def total(self, value: Tensor) -> Tensor:
        """Scalar sum over the valid samples of all groups."""
        return self._reduced(torch.where(self.valid, value, 0.0).sum())

    def finish(self, advantages: Tensor, zero: bool = True) -> GroupAdvantages:
        """Zeros where nothing can be learned, and the metrics."""
        keep = self.valid & ~self.equal if zero else self.valid
        everyone = torch.ones_like(self.valid)
        metrics = {
            "reward": masked_metric(self.rewards, self.valid),
            "zero_variance": masked_metric(self.equal, self.valid),
            "failed": masked_metric(~self.valid, everyone),
        }
        return GroupAdvantages(torch.where(keep, advantages, 0.0).float(), self.valid, self.equal, metrics)


class AdvantageEstimator(Protocol):
    """Rewards and groups in, advantages out."""

    def __call__(
        self, rewards: Tensor, group_ids: Tensor, *, lengths: Tensor | None = None, valid: Tensor | None = None,
        across_ranks: bool = False, process_group: dist.ProcessGroup | None = None,
    ) -> GroupAdvantages:  # fmt: skip
        """The advantages of a rollout batch.

        Args:
            rewards: (S,) R, NaN = failed.
            group_ids: (S,) any numbers; with `across_ranks` 0 … G−1, the same on all ranks.
            lengths: (S,) response tokens; for estimators that weigh by length.
            valid: (S,) bool, samples that count.
            across_ranks: Whether samples of a group, or of one batch statistic, lie on several ranks.
            process_group: Those ranks; default: all.
        """


@dataclass(frozen=True)
class GroupNormalized:
    """R minus the mean of the group, divided by a standard deviation or not.

    Args:
        scale_rewards: "group" divides by the std of the group (GRPO, DAPO), "batch" by that of all rewards (TRL),
            "none" by nothing (Dr. GRPO). XTuner's estimator of the name DrGRPO is something else: a z-score times
            length / maximum length.
        std_epsilon: Added to the std: 1e-4 in TRL, 1e-6 in verl, 1e-8 in XTuner and OREAL.
        unbiased: Whether the variance divides by n − 1 (all of these) or by n.

    Raises:
        ValueError: If an option is out of range.
    """

    scale_rewards: RewardScale = "group"
    std_epsilon: float = 1e-4
    unbiased: bool = True

    def __post_init__(self) -> None:
        check_choice("scale_rewards", self.scale_rewards, RewardScale)
        check_number("std_epsilon", self.std_epsilon, 0.0)

    def __call__(
        self, rewards: Tensor, group_ids: Tensor, *, lengths: Tensor | None = None, valid: Tensor | None = None,
        across_ranks: bool = False, process_group: dist.ProcessGroup | None = None,
    ) -> GroupAdvantages:  # fmt: skip
        """See `AdvantageEstimator`."""
        groups = _Groups(rewards, group_ids, valid, across_ranks, process_group)
        centred = groups.rewards - groups.means(groups.rewards)
        if self.scale_rewards == "none":
            return groups.finish(centred)
        if self.scale_rewards == "group":
            squares, counts = groups.sums(centred.square())[groups.index], groups.sizes
        else:
            counts = groups.total(torch.ones_like(centred))
            mean = groups.total(groups.rewards) / counts.clamp(min=1.0)
            squares = groups.total((groups.rewards - mean).square())
        std = (squares / (counts - float(self.unbiased)).clamp(min=1.0)).sqrt()
        return groups.finish(safe_ratio(centred, std + self.std_epsilon))


@dataclass(frozen=True)
class LeaveOneOut:
    """R minus the mean of the others in the group. A group of one has A = R: there are no others."""

    def __call__(
        self, rewards: Tensor, group_ids: Tensor, *, lengths: Tensor | None = None, valid: Tensor | None = None,
        across_ranks: bool = False, process_group: dist.ProcessGroup | None = None,
    ) -> GroupAdvantages:  # fmt: skip
        """See `AdvantageEstimator`."""
        groups = _Groups(rewards, group_ids, valid, across_ranks, process_group)
        others = groups.sums(groups.rewards)[groups.index] - groups.rewards
        baseline = safe_ratio(others, groups.sizes - 1.0)
        # equal rewards: exactly 0, whatever the sums round to; but one alone keeps its reward
        advantages = torch.where(groups.equal & (groups.sizes > 1), 0.0, groups.rewards - baseline)
        return groups.finish(advantages, zero=False)


@dataclass(frozen=True)
class LengthWeightedBaseline:
    """R minus the mean of the group's rewards weighted by length (OPO); needs `lengths`. A group of one has A = 0."""

    def __call__(
        self, rewards: Tensor, group_ids: Tensor, *, lengths: Tensor | None = None, valid: Tensor | None = None,
        across_ranks: bool = False, process_group: dist.ProcessGroup | None = None,
    ) -> GroupAdvantages:  # fmt: skip
        """See `AdvantageEstimator`."""
        if lengths is None or lengths.shape != rewards.shape:
            raise ValueError(f"LengthWeightedBaseline needs lengths, one per reward {tuple(rewards.shape)}: {lengths}")
        groups = _Groups(rewards, group_ids, valid, across_ranks, process_group)
        weight = lengths.double()
        baseline = safe_ratio(groups.sums(weight * groups.rewards), groups.sums(weight))[groups.index]
        return groups.finish(groups.rewards - baseline)


@dataclass(frozen=True)
class PassAtK:
    """Advantages for the reward "one of k responses is right", with n responses of which c are right.

        ρ = 1 − C(n−c, k)/C(n, k)          σ = √(ρ (1−ρ))
        right: (1−ρ)/σ          wrong: (1 − ρ − C(n−c−1, k−1)/C(n−1, k−1))/σ

    (arXiv 2508.10751, analytical form.) verl's `grpo_passk` is another estimator (best minus second best, arXiv
    2503.19595).

    Args:
        k: Responses that one success is enough for.
        threshold: A response is right if its reward is above.

    Raises:
        ValueError: If k < 1, or, when called, a group has fewer than k valid samples.
    """

    k: int = 4
    threshold: float = 0.0

    def __post_init__(self) -> None:
        check_number("k", self.k, 1)

    def __call__(
        self, rewards: Tensor, group_ids: Tensor, *, lengths: Tensor | None = None, valid: Tensor | None = None,
        across_ranks: bool = False, process_group: dist.ProcessGroup | None = None,
    ) -> GroupAdvantages:  # fmt: skip
        """See `AdvantageEstimator`."""
        groups = _Groups(rewards, group_ids, valid, across_ranks, process_group)
        n = groups.sizes
        if bool((groups.valid & (n < self.k)).any()):
            smallest = int(n[groups.valid].min())
            raise ValueError(
                f"k = {self.k} of PassAtK must not exceed the group size, but a group has {smallest} samples"
            )
        right = groups.rewards > self.threshold
        c = groups.sums(right.double())[groups.index]
        rest = _choose_ratio(n - c, n, self.k)  # 1 − ρ
        sigma = ((1.0 - rest) * rest).sqrt()
        wrong = rest - _choose_ratio(n - c - 1, n - 1, self.k - 1)
        return groups.finish(safe_ratio(torch.where(right, rest, wrong), sigma))


def _choose_ratio(a: Tensor, b: Tensor, k: int) -> Tensor:
    """C(a, k)/C(b, k) = Π_{i<k} (a−i)/(b−i) for a ≤ b; 0 where a < k."""
    step = torch.arange(k, dtype=torch.float64, device=a.device)
    return ((a[:, None] - step).clamp(min=0.0) / (b[:, None] - step).clamp(min=1.0)).prod(1)


def soft_overlong_penalty(lengths: Tensor, max_completion_length: int, soft_punish_cache: int) -> Tensor:
    """DAPO's reward for length (arXiv 2503.14476, Eq. 13), to be added to R.

        0 up to L − C          (L − C − |y|)/C up to L          −1 beyond

    Args:
        lengths: (S,) |y|, tokens.
        max_completion_length: L, tokens.
        soft_punish_cache: C, tokens, between 1 and L (0: a step at L).

    Raises:
        ValueError: If the cache is not within the length.
    """
    check_number("soft_punish_cache", soft_punish_cache, 0, max_completion_length)
    free = max_completion_length - soft_punish_cache
    if soft_punish_cache == 0:
        return -(lengths > max_completion_length).float()
    return ((free - lengths.float()) / soft_punish_cache).clamp(-1.0, 0.0)

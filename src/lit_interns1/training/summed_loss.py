"""A loss as (sum, count), so that the mean over an optimizer step is exact whatever the split into micro-batches.

    L = (Σ_ranks Σ_micro-batches sum) / (Σ_ranks Σ_micro-batches count)

A mean per micro-batch, averaged over micro-batches and ranks, weights a token by the size of the micro-batch it
happened to be in. `SummedLoss` keeps numerator and denominator apart: backward runs on the sums, the counts are added
up over the accumulation window and over all ranks, and the gradients are divided by the total once, before clipping.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_interns1.training.window_means import all_reduce_sum


@dataclass(frozen=True)
class SummedLoss:
    """The sum of a loss over its terms and the number of terms (or the sum of their weights).

    Attributes:
        sum: Scalar tensor with gradient: the sum of the (weighted) terms of this micro-batch on this rank.
        count: Scalar tensor without gradient: the sum of the weights. May be zero (nothing to learn from here).
    """

    sum: Tensor
    count: Tensor

    def __post_init__(self) -> None:
        if self.sum.numel() != 1:
            raise ValueError(f"SummedLoss.sum must be a scalar, got shape {tuple(self.sum.shape)}")
        if not isinstance(self.count, Tensor):
            object.__setattr__(self, "count", torch.as_tensor(self.count, dtype=torch.float32, device=self.sum.device))
        if self.count.numel() != 1:
            raise ValueError(f"SummedLoss.count must be a scalar, got shape {tuple(self.count.shape)}")
        if self.count.requires_grad:
            raise ValueError("SummedLoss.count must not require grad: it is a denominator, not a part of the loss")

    @property
    def mean(self) -> Tensor:
        """The mean over this micro-batch alone; 0 where there is nothing to average."""
        return self.sum / self.count.clamp(min=torch.finfo(torch.float32).tiny)

    def plus_mean(self, mean: Tensor, weight: Tensor | None = None) -> SummedLoss:
        """Adds a term that is already a mean (a balance or z loss), with a weight; default: this micro-batch's count.

        After the division by the total count the term enters as the weighted mean over micro-batches and ranks.
        """
        weight = self.count if weight is None else weight
        return SummedLoss(self.sum + mean * weight.to(mean.dtype), self.count)


def token_weight(count: Tensor, num_tokens: Tensor) -> Tensor:
    """The weight of a mean over this rank's tokens, such that ranks count by their tokens: C · n / N, with the count C
    and the tokens N of all ranks' micro-batches together.

    Args:
        count: Of this rank's `SummedLoss`.
        num_tokens: n, scalar.

    One small all-reduce, if there are several ranks. Then the ranks of a micro-batch are together what one process with
    all their rows is.
    """
    totals = all_reduce_sum(torch.stack([count.float(), num_tokens.float()]))
    return totals[0] * num_tokens / totals[1].clamp(min=1.0)


class LossWindow:
    """Adds up the counts of one accumulation window and turns them into the one factor for the gradients.

    With `averaged_over` = A·W, where backward has divided each micro-batch by A and the ranks were averaged over W,
    `gradient_factor` is A·W / Σ count. It is 0 when the whole window has nothing to learn from.
    """

    def __init__(self) -> None:
        self._counts: list[Tensor] = []

    def add(self, loss: SummedLoss) -> None:
        """Takes the count of one micro-batch."""
        self._counts.append(loss.count.detach().to(torch.float64).reshape(()))

    def take(self, output: Any, accumulation: int) -> tuple[bool, Any]:
        """Takes the `SummedLoss` out of what a training step returned (itself, or the "loss" of a dict).

        Args:
            output: Of `training_step`.
            accumulation: Micro-batches per step: the trainer divides the loss by them, which is undone.

        Returns:
            Whether there was one, and the output with a plain scalar in its place.
        """
        loss = output.get("loss") if isinstance(output, dict) else output
        if not isinstance(loss, SummedLoss):
            return False, output
        self.add(loss)
        summed = loss.sum * accumulation
        return True, {**output, "loss": summed} if isinstance(output, dict) else summed

    def local_count(self, device: torch.device) -> Tensor:
        """Σ count on this rank as a float64 scalar; empties the window."""
        counts, self._counts = self._counts, []
        return torch.stack(counts).sum() if counts else torch.zeros((), dtype=torch.float64, device=device)

    @staticmethod
    def gradient_factor(total_count: Tensor, averaged_over: int) -> Tensor:
        """The factor that turns accumulated, averaged gradients of sums into gradients of the global mean."""
        return torch.where(total_count > 0, averaged_over / total_count.clamp(min=1e-30), torch.zeros_like(total_count))

    @staticmethod
    def scale(gradients: Iterable[Tensor], factor: Tensor) -> None:
        """Multiplies every gradient in place (grouped by device and type, one fused call per group)."""
        groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for gradient in gradients:
            groups.setdefault((gradient.device, gradient.dtype), []).append(gradient)
        for (device, dtype), members in groups.items():
            torch._foreach_mul_(members, factor.to(device=device, dtype=dtype))

"""Mean loss per token over a dataset, in groups (sources, domains): a torchmetrics metric, synchronised, resumable."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class GroupedTokenLoss(Metric):
    """Σ loss / Σ tokens per group, in float64.

    Args:
        num_groups: Groups; tokens without a group number go to group 0.
    """

    full_state_update = False
    loss_sum: Tensor
    token_count: Tensor

    def __init__(self, num_groups: int = 1) -> None:
        super().__init__()
        self.add_state("loss_sum", torch.zeros(num_groups, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("token_count", torch.zeros(num_groups, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, loss_T: Tensor, mask_T: Tensor, group_T: Tensor | None = None) -> None:
        """Adds tokens.

        Args:
            loss_T: (T,) loss in nats.
            mask_T: (T,) bool, tokens that count.
            group_T: (T,) group numbers; negative = 0.
        """
        group_T = torch.zeros_like(mask_T, dtype=torch.long) if group_T is None else group_T.clamp(min=0)
        # a Trainer with precision bf16-true casts the states, too: sums of thousands of tokens need their float64 back
        self.loss_sum = self.loss_sum.double().index_add(0, group_T[mask_T], loss_T[mask_T].double())
        self.token_count = self.token_count.double() + torch.bincount(group_T[mask_T], minlength=len(self.token_count))

    def compute(self) -> dict[str, Tensor]:
        """`mean` over all tokens (scalar), `group_means` (G,) and `group_tokens` (G,); NaN where there is no token."""
        return {
            "mean": self.loss_sum.sum() / self.token_count.sum(),
            "group_means": self.loss_sum / self.token_count,
            "group_tokens": self.token_count,
        }

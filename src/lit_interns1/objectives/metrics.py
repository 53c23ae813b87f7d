"""Metrics of objectives: detached sums with their counts, exact over micro-batches and ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_interns1.training.summed_loss import SummedLoss

Metrics = dict[str, SummedLoss]
"""By name. Add up sums and counts over micro-batches and ranks, then divide."""


def masked_metric(value_T: Tensor, mask_T: Tensor) -> SummedLoss:
    """Σ over the mask, with its count, detached."""
    return SummedLoss(torch.where(mask_T, value_T.detach().float(), 0).sum(), mask_T.sum().float())


def mean_metric(value_N: Tensor) -> SummedLoss:
    """Σ over all entries, with their number, detached."""
    return masked_metric(value_N, torch.ones_like(value_N, dtype=torch.bool))


def weighted_sum(loss_N: Tensor, weight_N: Tensor | None, metrics: Metrics) -> SummedLoss:
    """Σ w l over terms, with their number; adds it to the metrics as `loss`. No weights: 1."""
    weighted_N = loss_N if weight_N is None else loss_N * weight_N.to(loss_N.dtype)
    loss = SummedLoss(weighted_N.sum(), torch.tensor(float(len(loss_N)), device=loss_N.device))
    metrics["loss"] = SummedLoss(loss.sum.detach(), loss.count)
    return loss

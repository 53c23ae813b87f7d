"""Sums of weighted per-token losses over a validation set: a torchmetrics metric with one all-reduce.

    c_j = Σ_t w_jt ℓ_t        (capability loss, arXiv 2506.13216)        mean = Σ_t ℓ_t / Σ_t 1

Weights are looked up by the stable number of each token, not by the order in which tokens come, so loaders may shuffle
and pack as they like. Every sum is float64. Each weighted token must come exactly once: its visits are counted.
Shapes: T tokens of a batch, W weighted tokens, J capabilities.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torchmetrics import Metric

from lit_interns1.training import all_reduce_sum


class SalienceSums(NamedTuple):
    """What a pass over the validation set adds up to. Plain numbers: torchmetrics takes the axis off tensors of one.

    Attributes:
        capability_losses: (J,) c_j in nats.
        mean_loss: Nats per token, over all tokens with a loss, weighted or not; NaN without any.
        bits_per_byte: Σ ℓ / (ln 2 · bytes of the predicted tokens); NaN if bytes are not known.
    """

    capability_losses: tuple[float, ...]
    mean_loss: float
    bits_per_byte: float


def check_visits(visits_W: ArrayLike, token_ids_W: ArrayLike) -> None:
    """Every weighted token must have been visited exactly once.

    Args:
        visits_W: (W,) how often each came.
        token_ids_W: (W,) their numbers.

    Raises:
        ValueError: Naming how many tokens came never or more than once, and the first of them.
    """
    visits, token_ids = np.asarray(visits_W).round().astype(np.int64), np.asarray(token_ids_W)
    never, repeated = visits == 0, visits > 1
    if not never.any() and not repeated.any():
        return
    wrong = int(token_ids[np.flatnonzero(visits != 1)[0]])
    raise ValueError(
        f"of {len(visits)} weighted validation tokens, {int(never.sum())} were never visited and "
        f"{int(repeated.sum())} more than once (up to {int(visits.max())} times); the first is validation_token_id "
        f"{wrong}. Each must come exactly once over all ranks: look for a sampler that repeats or drops rows, "
        "or for other documents, row_length or validation_rows than the weights were fitted with"
    )


class SalienceMetric(Metric):
    """Adds up c_j, the mean loss and bytes.

    All sums lie in one state, so that ranks need one all-reduce.

    Args:
        token_ids: (W,) int64, strictly ascending numbers of the weighted tokens.
        weights: (J, W) float weights.

    Raises:
        ValueError: If the shapes do not fit or the numbers do not ascend.
    """

    full_state_update = False
    totals: Tensor

    def __init__(self, token_ids: ArrayLike, weights: ArrayLike) -> None:
        super().__init__(dist_sync_fn=_sum_over_ranks)
        token_ids_W = torch.as_tensor(np.asarray(token_ids, dtype=np.int64))
        weights_JW = torch.as_tensor(np.asarray(weights, dtype=np.float64))
        if token_ids_W.ndim != 1 or weights_JW.ndim != 2 or weights_JW.shape[1] != len(token_ids_W):
            raise ValueError(
                f"token_ids {tuple(token_ids_W.shape)} and weights {tuple(weights_JW.shape)} are not (W,) and (J, W)"
            )
        if not len(token_ids_W) or not bool((token_ids_W.diff() > 0).all()):
            raise ValueError("token_ids must be strictly ascending and not empty")
        self.register_buffer("token_ids_W", token_ids_W, persistent=False)
        self.register_buffer("weights_JW", weights_JW, persistent=False)
        # J capability losses, Σ ℓ, Σ 1, bytes, then W visits
        self.num_capabilities = len(weights_JW)
        size = self.num_capabilities + 3 + len(token_ids_W)
        self.add_state("totals", torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, loss_N: Tensor, token_id_N: Tensor, bytes_N: Tensor | None = None) -> None:
        """Adds the tokens of a batch that have a loss.

        Args:
            loss_N: (N,) nats.
            token_id_N: (N,) numbers of the tokens.
            bytes_N: (N,) bytes of the predicted tokens.
        """
        loss_N = loss_N.detach().double()
        token_ids_W, weights_JW = self.token_ids_W, self.weights_JW
        place_N = torch.searchsorted(token_ids_W, token_id_N).clamp_(max=len(token_ids_W) - 1)  # type: ignore[arg-type]
        weighted_N = token_ids_W[place_N] == token_id_N  # type: ignore[index]
        place_N = place_N[weighted_N]
        sums = [weights_JW[:, place_N] @ loss_N[weighted_N], loss_N.sum()[None]]  # type: ignore[index]
        sums += [loss_N.new_tensor([loss_N.numel()]), (loss_N.new_zeros(1) if bytes_N is None else bytes_N.sum()[None])]
        self.totals[: self.num_capabilities + 3] += torch.cat([part.double() for part in sums])
        self.totals[self.num_capabilities + 3 :].index_add_(0, place_N, torch.ones_like(place_N, dtype=torch.float64))

    def compute(self) -> SalienceSums:
        """The sums over all ranks.

        Raises:
            ValueError: If a weighted token came never or more than once.
        """
        size = self.num_capabilities
        check_visits(self.totals[size + 3 :].cpu().numpy(), self.token_ids_W.cpu().numpy())  # type: ignore[operator]
        *capability_losses, loss, count, size_in_bytes = self.totals[: size + 3].tolist()
        mean = loss / count if count else math.nan
        bits = loss / (math.log(2) * size_in_bytes) if size_in_bytes else math.nan
        return SalienceSums(tuple(capability_losses), mean, bits)


def _sum_over_ranks(state: Tensor, group: Any = None) -> list[Tensor]:
    """Stands in for torchmetrics' gathering of the states of all ranks: their sum, as if it came from one."""
    return [all_reduce_sum(state.clone())]

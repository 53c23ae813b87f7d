"""Losses that keep the load of experts even, and router logits small.

With c_e tokens sent to expert e, n tokens, P_e the mean probability of e, E experts, K per token:
  layer        Σ_layers  E/(n·K) Σ_e c_e P_e                    per micro-batch; 1 per layer when balanced
  global       the same with c_e/(n·K) over all ranks and the micro-batches of the step so far   arXiv 2501.11873
  huggingface  E Σ_e f_e P_e, f and P averaged over layers first, f a K-hot mean; K when balanced (transformers)
  z-loss       Σ_layers mean_tokens (logsumexp z)²                                              arXiv 2202.08906

In `global` the fractions carry no gradient and the probabilities stay local: the mean over ranks of E Σ f̄_e P_e is
E Σ f̄_e P̄_e, since it is linear in P, so no gradient has to be communicated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lit_interns1.nn.moe.statistics import RouterStats

BalanceMode = Literal["layer", "global", "huggingface"]


def layer_balance_loss(stats: Sequence[RouterStats]) -> Tensor:
    """Σ over layers of E Σ_e load_e P_e; scalar."""
    return torch.stack([len(s.counts_E) * (s.load_E * s.mean_probability_E).sum() for s in stats]).sum()


def huggingface_balance_loss(stats: Sequence[RouterStats]) -> Tensor:
    """The form of transformers' `load_balancing_loss_func`, with counts of the ids really used; scalar."""
    tokens = torch.stack([s.num_tokens for s in stats]).sum().clamp(min=1.0)
    fraction_E = torch.stack([s.counts_E for s in stats]).sum(0) / tokens
    probability_E = torch.stack([s.probability_sum_E for s in stats]).sum(0) / tokens
    return len(fraction_E) * (fraction_E * probability_E).sum()


def router_z_loss(stats: Sequence[RouterStats]) -> Tensor:
    """Σ over layers of the mean over tokens of (logsumexp z)²; scalar."""
    return torch.stack([s.z_square_sum / s.num_tokens.clamp(min=1.0) for s in stats]).sum()


class BalanceLoss:
    """The auxiliary losses of a model with their coefficients.

    Args:
        mode: Form of the balance loss, see the module's docstring.
        coefficient: α of the balance loss; 0 switches it off.
        z_coefficient: Weight of the z-loss; 0 switches it off.

    Raises:
        ValueError: If the mode is unknown or a coefficient is negative.
    """

    def __init__(self, mode: BalanceMode = "global", coefficient: float = 1e-3, z_coefficient: float = 0.0) -> None:
        if mode not in ("layer", "global", "huggingface"):
            raise ValueError(f"balance mode {mode!r} is unknown: choose layer, global or huggingface")
        for name, value in (("coefficient", coefficient), ("z_coefficient", z_coefficient)):
            if value < 0:
                raise ValueError(f"balance {name} must not be negative, got {value}")
        self.mode, self.coefficient, self.z_coefficient = mode, coefficient, z_coefficient
        self._counts_LE: Tensor | None = None

    def start_step(self) -> None:
        """Forgets the counts of the last accumulation window; call it once per optimizer step."""
        self._counts_LE = None

    def __call__(
        self, stats: Sequence[RouterStats], process_group: dist.ProcessGroup | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The weighted auxiliary loss of one micro-batch (None without MoE layers) and its parts, unweighted.

        Args:
            stats: One per MoE layer.
            process_group: Data-parallel ranks of `global`; None = all ranks, if there are any.
        """
        if not stats:
            return None, {}
        if self.mode == "global":
            balance = self._global(stats, process_group)
        else:
            balance = (layer_balance_loss if self.mode == "layer" else huggingface_balance_loss)(stats)
        z = router_z_loss(stats)
        metrics = {"balance": balance.detach(), "router_z": z.detach()}
        return self.coefficient * balance + self.z_coefficient * z, metrics

    def _global(self, stats: Sequence[RouterStats], process_group: dist.ProcessGroup | None) -> Tensor:
        counts_LE = torch.stack([s.counts_E for s in stats])
        if dist.is_available() and dist.is_initialized() and dist.get_world_size(process_group) > 1:
            counts_LE = counts_LE.clone()
            dist.all_reduce(counts_LE, group=process_group)
        if self._counts_LE is not None and self._counts_LE.shape == counts_LE.shape:
            counts_LE = counts_LE + self._counts_LE
        self._counts_LE = counts_LE
        load_LE = counts_LE / counts_LE.sum(-1, keepdim=True).clamp(min=1.0)
        return load_LE.shape[1] * (load_LE * torch.stack([s.mean_probability_E for s in stats])).sum()

"""Token dispatch with sizes known beforehand, for routers that give every rank the same number of choices.

A grouped router takes K/G experts in each of G groups (arXiv 2603.25040 §2.1). Where each of P ranks holds G/P whole
groups, every token visits every rank, with K/P choices on each:

    to rank r:    x_t of all tokens (an all-gather), and (local expert, weight) of the K/P choices there
    from rank r:  Σ_{e ∈ S(t), rank(e) = r} w_e E_e(x_t)
    y_t = sum over the ranks in order, so the result does not depend on timing

All shapes follow from T: no size is exchanged, the host reads nothing of the device, and rows leave before the router
has decided. Ranks with unequal T, and replayed ids that break the rule, take the exact dispatcher for that call.

Letters: T tokens, K choices per token, E experts, P ranks, C = K/P choices per token and rank, S = P·T source rows, D
hidden size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as collectives

from lit_interns1.nn.moe.agreement import RowAgreement, Verdict
from lit_interns1.nn.moe.all_to_all import AllToAllDispatcher, exchange_rows
from lit_interns1.nn.moe.dispatch import LocalDispatcher, RoutedRows

_INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _start_gather(x_TD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(T, D) → (S, D) on its way: to be waited for before it is read."""
    return collectives.all_gather_single(x_TD.detach().contiguous(), 0, group)


def _sum_to_owners(rows_SD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(S, D) → (T, D): block r goes to rank r, and what comes is added in the order of ranks."""
    ranks = dist.get_world_size(group)
    parts_PTD = exchange_rows(rows_SD, None, None, group).unflatten(0, (ranks, rows_SD.shape[0] // ranks))
    y_TD = parts_PTD[0].to(torch.promote_types(rows_SD.dtype, torch.float32), copy=True)
    for part_TD in parts_PTD[1:]:
        y_TD += part_TD
    return y_TD.to(rows_SD.dtype)


class _Gather(torch.autograd.Function):
    """(T, D) → (S, D), of which the collective is under way; backward adds up in the order of ranks."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, pending_SD: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return collectives.wait_tensor(pending_SD)

    @staticmethod
    def backward(ctx: Any, gradient_SD: Tensor) -> tuple[Tensor, None, None]:
        return _sum_to_owners(gradient_SD, ctx.group), None, None


class _Sum(torch.autograd.Function):
    """(S, D) → (T, D), added up in the order of ranks; backward gathers."""

    @staticmethod
    def forward(ctx: Any, y_SD: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _sum_to_owners(y_SD, group)

    @staticmethod
    def backward(ctx: Any, gradient_TD: Tensor) -> tuple[Tensor, None]:
        return collectives.wait_tensor(_start_gather(gradient_TD, ctx.group)), None


class _SendChoices(torch.autograd.Function):
    """Choices ordered by rank, (T, K) → those of all tokens here, (S, C): ids and weights in one message, the ids as
    integers of the weights' width. Backward sends the gradient of the weights back."""

    @staticmethod
    def forward(ctx: Any, weights_TK: Tensor, ids_TK: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
        ctx.group, ranks = group, dist.get_world_size(group)
        integer = _INTEGER_OF_SIZE[weights_TK.element_size()]
        pairs_TK2 = torch.stack([ids_TK.to(integer), weights_TK.contiguous().view(integer)], -1)
        pairs_PTC2 = pairs_TK2.unflatten(1, (ranks, -1)).transpose(0, 1)
        bytes_SB = pairs_PTC2.flatten(2).flatten(0, 1).view(torch.uint8)  # gloo does not know int16
        received_SC2 = exchange_rows(bytes_SB, None, None, group).view(integer).unflatten(-1, (-1, 2))
        ids_SC = received_SC2[..., 0].to(torch.int64)
        ctx.mark_non_differentiable(ids_SC)
        return received_SC2[..., 1].contiguous().view(weights_TK.dtype), ids_SC

    @staticmethod
    def backward(ctx: Any, gradient_SC: Tensor, _: Any) -> tuple[Tensor, None, None]:
        gradient_PTC = exchange_rows(gradient_SC, None, None, ctx.group).unflatten(
            0, (dist.get_world_size(ctx.group), -1)
        )
        return gradient_PTC.transpose(0, 1).flatten(1), None, None


class _Started(NamedTuple):
    """What a layer began before its router ran.

    Attributes:
        verdict: Of the ranks.
        chooses: This rank's ids will come group after group.
        pending_SD: The gathered rows on their way, where nothing speaks against them.
    """

    verdict: Verdict
    chooses: bool
    pending_SD: Tensor | None


class _StaticRoute(NamedTuple):
    """Marks rows that came by static splits."""


class StaticSplitDispatcher:
    """Experts divided over the ranks of a process group in order, K/P choices of every token on each.

    Args:
        num_experts: E of the whole layer.
        group: The ranks that share the experts.
        agreement: Makes sure of equal row counts and of ids that keep the rule; shared by the layers of the group.
            None: both are promised by the caller, and nothing is read (what runs without data needs that).

    Raises:
        ValueError: If the number of ranks does not divide E.
    """

    def __init__(self, num_experts: int, group: dist.ProcessGroup, agreement: RowAgreement | None = None) -> None:
        self.exact = AllToAllDispatcher(num_experts, group)
        self.local = LocalDispatcher(self.exact.local_experts)
        self.group, self.ranks, self.agreement = group, self.exact.ranks, agreement

    def start(self, x_TD: Tensor, num_groups: int) -> _Started:
        """Agrees with the other ranks and lets the rows leave. See `StartsEarly`."""
        chooses = num_groups % self.ranks == 0
        rows = x_TD.shape[0]
        if self.agreement is None:
            verdict = Verdict(rows, rows, all_choose=True)
        else:
            verdict = self.agreement.on_rows(rows, chooses)
        ready = verdict.equal_rows and verdict.all_choose
        return _Started(verdict, chooses, _start_gather(x_TD, self.group) if ready else None)

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, started: _Started | None = None) -> RoutedRows:
        """See `TokenDispatcher`. Without `started` nothing is known of the ids, and they are checked.

        Raises:
            RuntimeError: If this rank replays ids that break the rule in a pass whose first layer chose on all ranks.
        """
        if started is None:
            started = self.start(x_TD, num_groups=1)
        if not self._possible(ids_TK, started):
            return self.exact.dispatch(x_TD, ids_TK, weights_TK)
        owner_TK, weights_TK, local_TK = self._by_rank(ids_TK, weights_TK, started.chooses)
        torch._assert_async(
            (owner_TK == self._expected_owner_K(owner_TK)).all(),
            "the router's choice must hold the same number of experts of every rank, in the order of ranks",
        )
        weights_SC, ids_SC = _SendChoices.apply(weights_TK, local_TK, self.group)
        pending_SD = started.pending_SD if started.pending_SD is not None else _start_gather(x_TD, self.group)
        x_SD = _Gather.apply(x_TD, pending_SD, self.group)
        rows = self.local.dispatch(x_SD, ids_SC, weights_SC)
        rows.context = _StaticRoute()
        return rows

    def combine(self, y_SD: Tensor, context: Any) -> Tensor:
        """Partial sums go back to their tokens and are added in the order of ranks."""
        if not isinstance(context, _StaticRoute):
            return self.exact.combine(y_SD, context)
        y_TD: Tensor = _Sum.apply(y_SD, self.group)
        return y_TD

    def _possible(self, ids_TK: Tensor, started: _Started) -> bool:
        """Whether this call can go by static splits; the same answer on all ranks."""
        verdict, agreement = started.verdict, self.agreement
        if agreement is None:
            return True
        if not verdict.equal_rows:
            agreement.tell_once(
                "ranks hold unequal numbers of tokens", f" (first from {verdict.fewest} to {verdict.most})"
            )
            return False
        kept = started.chooses or self._keeps_rule(ids_TK)
        if verdict.all_choose:
            if not kept:
                raise RuntimeError(
                    "replayed experts do not hold the same number of every rank's, and the pass began with ids that "
                    'were chosen: replay them in every sparse layer, or set dispatcher = "exact"'
                )
            return True
        if not agreement.everywhere(kept):
            agreement.tell_once("replayed experts do not hold the same number of every rank's")
            return False
        return True

    def _expected_owner_K(self, owner_TK: Tensor) -> Tensor:
        choices = owner_TK.shape[1]
        return torch.arange(choices, device=owner_TK.device) * self.ranks // max(choices, 1)

    def _keeps_rule(self, ids_TK: Tensor) -> bool:
        if ids_TK.shape[1] % self.ranks:
            return False
        owner_TK = torch.div(ids_TK, self.exact.local_experts, rounding_mode="floor").sort(-1).values
        return bool((owner_TK == self._expected_owner_K(owner_TK)).all())

    def _by_rank(self, ids_TK: Tensor, weights_TK: Tensor, ordered: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(T, K) owners, weights and local ids with the choices in the order of ranks."""
        owner_TK = torch.div(ids_TK, self.exact.local_experts, rounding_mode="floor")
        if not ordered:
            order_TK = torch.argsort(owner_TK, dim=-1, stable=True)
            owner_TK, ids_TK, weights_TK = (x.gather(-1, order_TK) for x in (owner_TK, ids_TK, weights_TK))
        return owner_TK, weights_TK, ids_TK - owner_TK * self.exact.local_experts

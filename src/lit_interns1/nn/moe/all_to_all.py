"""Token dispatch between ranks that share a layer's experts. Each token row travels once to every rank that owns any of
its experts, and one row comes back: the weighted sum of what that rank's experts made of it.

    token t chose experts S(t);  rank(e) = ⌊e / (E/P)⌋
    to rank r:    x_t once if any e ∈ S(t) has rank(e) = r, and (position, local expert, weight) for each such e
    from rank r:  Σ_{e ∈ S(t), rank(e) = r} w_e E_e(x_t)
    y_t = sum over the ranks in order, so the result does not depend on timing

Sizes are exchanged first: one small all-to-all, which the host reads, once. Rows for this rank itself are part of the
collectives, which copy them and send nothing.

Letters: T tokens, K choices per token, E experts, P ranks, S source rows received, R routed rows (pairs of a source row
and an expert), N rows sent, M pairs sent, D hidden size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as collectives

from lit_interns1.nn.moe.dispatch import RoutedRows
from lit_interns1_kernels.permute import group_by_expert


def exchange_rows(rows: Tensor, received: list[int] | None, sent: list[int] | None, group: dist.ProcessGroup) -> Tensor:
    """Sends `sent[r]` rows to rank r and returns the `received[r]` rows that came from each; None: equal numbers."""
    return collectives.wait_tensor(collectives.all_to_all_single(rows.contiguous(), received, sent, group))


class _Exchange(torch.autograd.Function):
    """Rows to other ranks; backward sends the gradient back the way they came."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.received, ctx.sent, ctx.group = received, sent, group
        return exchange_rows(rows, received, sent, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return exchange_rows(gradient, ctx.sent, ctx.received, ctx.group), None, None, None


def _sum_to_tokens(rows_ND: Tensor, token_N: Tensor, rows_per_rank: list[int], tokens: int) -> Tensor:
    """One rank after the other: within a rank every token occurs once, so the order of the sum is fixed."""
    y_TD = rows_ND.new_zeros(tokens, rows_ND.shape[1], dtype=torch.promote_types(rows_ND.dtype, torch.float32))
    for part, token in zip(rows_ND.split(rows_per_rank), token_N.split(rows_per_rank), strict=True):
        y_TD.index_add_(0, token, part.to(y_TD.dtype))
    return y_TD.to(rows_ND.dtype)


class _TakeTokens(torch.autograd.Function):
    """(T, D) → (N, D) by index; backward sums in the order of ranks."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_N: Tensor, rows_per_rank: list[int]) -> Tensor:
        ctx.save_for_backward(token_N)
        ctx.rows_per_rank, ctx.tokens = rows_per_rank, x_TD.shape[0]
        return x_TD.index_select(0, token_N)

    @staticmethod
    def backward(ctx: Any, gradient_ND: Tensor) -> tuple[Tensor, None, None]:
        (token_N,) = ctx.saved_tensors
        return _sum_to_tokens(gradient_ND, token_N, ctx.rows_per_rank, ctx.tokens), None, None


class _SumTokens(torch.autograd.Function):
    """(N, D) → (T, D), summed in the order of ranks; backward takes by index."""

    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, token_N: Tensor, rows_per_rank: list[int], tokens: int) -> Tensor:
        ctx.save_for_backward(token_N)
        return _sum_to_tokens(rows_ND, token_N, rows_per_rank, tokens)

    @staticmethod
    def backward(ctx: Any, gradient_TD: Tensor) -> tuple[Tensor, None, None, None]:
        (token_N,) = ctx.saved_tensors
        return gradient_TD.index_select(0, token_N), None, None, None


class _Route(NamedTuple):
    """How rows went out, to bring them back."""

    token_N: Tensor
    tokens: int
    rows_out: list[int]
    rows_in: list[int]


class AllToAllDispatcher:
    """Experts divided over the ranks of a process group in order: rank r owns experts r·E/P … (r+1)·E/P − 1.

    Args:
        num_experts: E of the whole layer.
        group: The ranks that share the experts.

    Raises:
        ValueError: If the number of ranks does not divide E.
    """

    def __init__(self, num_experts: int, group: dist.ProcessGroup) -> None:
        self.num_experts, self.group, self.ranks = num_experts, group, dist.get_world_size(group)
        if num_experts % self.ranks:
            raise ValueError(f"the {num_experts} experts must be divisible by the {self.ranks} ranks that share them")
        self.local_experts = num_experts // self.ranks

    @torch.no_grad()
    def _plan(self, ids_TK: Tensor) -> tuple[_Route, Tensor, list[int], list[int], Tensor, Tensor, Tensor]:
        tokens, device = ids_TK.shape[0], ids_TK.device
        owner_TK = torch.div(ids_TK, self.local_experts, rounding_mode="floor")
        order_M, token_M, pair_ends_P = group_by_expert(owner_TK, self.ranks)  # stable: tokens ascend for each rank
        owner_M = owner_TK.flatten()[order_M]
        needs_PT = torch.zeros(self.ranks, tokens, dtype=torch.bool, device=device)
        needs_PT[owner_M, token_M] = True
        sizes_P2 = torch.stack([needs_PT.sum(1), pair_ends_P.long().diff(prepend=pair_ends_P.new_zeros(1).long())], 1)
        theirs_P2 = exchange_rows(sizes_P2, [1] * self.ranks, [1] * self.ranks, self.group)
        (rows_out, pairs_out), (rows_in, pairs_in) = torch.stack([sizes_P2, theirs_P2]).transpose(1, 2).tolist()

        # a pair names its row by the position among the rows for that rank
        position_M = (needs_PT.cumsum(1) - 1)[owner_M, token_M]
        expert_M = ids_TK.flatten()[order_M] - owner_M * self.local_experts
        sent_M2 = torch.stack([position_M, expert_M], 1).to(torch.int32)
        received_R2 = exchange_rows(sent_M2, pairs_in, pairs_out, self.group).long()
        # sizes that the host knows already are given to the operations, or they would wait for the device to tell them
        row_start_P = theirs_P2[:, 0].cumsum(0) - theirs_P2[:, 0]
        row_start_R = torch.repeat_interleave(row_start_P, theirs_P2[:, 1], output_size=sum(pairs_in))
        order_R, _, offsets_E = group_by_expert(received_R2[:, 1:], self.local_experts)
        row_index_R = (received_R2[:, 0] + row_start_R)[order_R]
        route = _Route(torch.nonzero_static(needs_PT, size=sum(rows_out))[:, 1], tokens, rows_out, rows_in)
        return route, order_M, pairs_out, pairs_in, order_R, row_index_R, offsets_E

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> RoutedRows:
        """See `TokenDispatcher`."""
        route, order_M, pairs_out, pairs_in, order_R, row_index_R, offsets_E = self._plan(ids_TK)
        sent_ND = _TakeTokens.apply(x_TD, route.token_N, route.rows_out)
        x_SD = _Exchange.apply(sent_ND, route.rows_in, route.rows_out, self.group)
        weight_R = _Exchange.apply(weights_TK.flatten().index_select(0, order_M), pairs_in, pairs_out, self.group)
        return RoutedRows(x_SD, row_index_R, offsets_E, weight_R.index_select(0, order_R), context=route)

    def combine(self, y_SD: Tensor, context: _Route) -> Tensor:
        """Partial sums go back to their tokens and are added in the order of ranks."""
        y_ND = _Exchange.apply(y_SD, context.rows_out, context.rows_in, self.group)
        y_TD: Tensor = _SumTokens.apply(y_ND, context.token_N, context.rows_out, context.tokens)
        return y_TD

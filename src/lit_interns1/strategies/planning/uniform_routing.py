"""Sizes of the exact dispatch when routing is uniform, for routers whose sizes depend on data.

A token takes k = K/G of the E/G experts in each of G groups, every set of them equally likely; a rank holds n_g experts
of group g:
    P(token visits the rank) = 1 − Π_g C(E/G − n_g, k) / C(E/G, k)          choices on the rank: K/P for each token
A rank that holds whole groups is visited by every token, so then the sizes are exact.
"""

from __future__ import annotations

from math import comb, prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lit_interns1.nn.moe.all_to_all import AllToAllDispatcher, _Route, exchange_rows


def visit_probability(num_experts: int, choices: int, num_groups: int, ranks: int) -> float:
    """The probability that a token has an expert on a given rank; ranks hold consecutive experts.

    Args:
        num_experts: E.
        choices: K.
        num_groups: G.
        ranks: P.
    """
    held, size, k = num_experts // ranks, num_experts // num_groups, choices // num_groups
    whole, rest = divmod(held, size)  # groups of the first rank; where it holds a part of one, so do all
    missed = (comb(size - n, k) / comb(size, k) for n in [size] * whole + [rest])
    return 1.0 - prod(missed)


class UniformRouting(AllToAllDispatcher):
    """The exact dispatcher with the sizes of uniform routing in place of those that data gives.

    Args:
        num_experts: E of the whole layer.
        group: The ranks that share the experts.
        visited: The probability that a token visits a rank.
    """

    def __init__(self, num_experts: int, group: dist.ProcessGroup, visited: float) -> None:
        super().__init__(num_experts, group)
        self.visited = visited

    @torch.no_grad()
    def _plan(self, ids_TK: Tensor) -> Any:
        tokens, pairs = ids_TK.shape[0], ids_TK.numel()
        rows = [round(tokens * self.visited)] * self.ranks
        pairs_P = [pairs // self.ranks + (rank < pairs % self.ranks) for rank in range(self.ranks)]
        here = pairs_P[dist.get_rank(self.group)]
        received = [here] * self.ranks  # as many as every other rank sends here
        exchange_rows(ids_TK.new_empty(self.ranks, 2), [1] * self.ranks, [1] * self.ranks, self.group)
        exchange_rows(ids_TK.new_empty(pairs, 2, dtype=torch.int32), received, pairs_P, self.group)
        row_index_R = ids_TK.new_empty(sum(received))
        offsets_E = ids_TK.new_empty(self.local_experts, dtype=torch.int32)
        route = _Route(ids_TK.new_empty(sum(rows)), tokens, rows, rows)
        return route, ids_TK.new_empty(pairs), pairs_P, received, torch.empty_like(row_index_R), row_index_R, offsets_E

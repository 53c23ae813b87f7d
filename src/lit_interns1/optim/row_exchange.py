"""Matrices whose rows are divided over ranks, brought whole to one rank each, and back: one all-to-all each way.

    ranks hold rows of all matrices  ⇄  each rank holds all rows of its matrices

Rows are divided as `Shard` of a DTensor divides them: ⌈rows / ranks⌉ each, the last ranks fewer or none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


def divided(rows: int, parts: int) -> list[int]:
    """How many of `rows` each of `parts` ranks holds."""
    chunk = -(-rows // parts)
    return [max(min(rows - part * chunk, chunk), 0) for part in range(parts)]


def balanced_owners(costs: Sequence[float], ranks: int) -> list[int]:
    """An owner for each item so that the ranks' sums are near each other: the most costly first, to whom has least.

    Depends on nothing but its arguments, so all ranks agree.
    """
    owners, loads = [0] * len(costs), [0.0] * ranks
    for item in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
        owners[item] = min(range(ranks), key=lambda rank: (loads[rank], rank))
        loads[owners[item]] += costs[item]
    return owners


@dataclass
class Pending:
    """A collective under way; buffers live as long as this does."""

    output: Tensor
    source: Tensor
    work: dist.Work | None

    def wait(self) -> Tensor:
        """What arrived."""
        if self.work is not None:
            self.work.wait()
        return self.output


class RowExchange:
    """All-to-alls between a division by rows and one by matrices.

    Args:
        group: The ranks over which rows are divided.
        owners: The rank (within the group) that holds each matrix whole, by matrix.
    """

    def __init__(self, group: dist.ProcessGroup, owners: Sequence[int]) -> None:
        self.group, self.ranks, self.rank = group, dist.get_world_size(group), dist.get_rank(group)
        self.items = [[item for item, owner in enumerate(owners) if owner == rank] for rank in range(self.ranks)]
        self.owned = self.items[self.rank]

    def _start(self, source: Tensor, sends: list[int], receives: list[int]) -> Pending:
        output = source.new_empty(sum(receives))
        work = dist.all_to_all_single(output, source, receives, sends, group=self.group, async_op=True)
        return Pending(output, source, work)

    def start_gather(self, parts: Sequence[Tensor], rows: int) -> Pending:
        """Sends this rank's rows of every matrix to its owner.

        Args:
            parts: (own rows, columns) by matrix, all of one type and number of columns.
            rows: Rows of a whole matrix.
        """
        mine, columns = divided(rows, self.ranks)[self.rank], parts[0].shape[1]
        source = torch.cat([parts[item].reshape(-1) for items in self.items for item in items])
        sends = [len(items) * mine * columns for items in self.items]
        return self._start(source, sends, [len(self.owned) * n * columns for n in divided(rows, self.ranks)])

    def finish_gather(self, pending: Pending, rows: int, columns: int) -> Tensor:
        """(matrices of this rank, rows, columns)"""
        counts = divided(rows, self.ranks)
        received = pending.wait().split([len(self.owned) * n * columns for n in counts])
        return torch.cat([p.view(len(self.owned), n, columns) for p, n in zip(received, counts, strict=True)], dim=1)

    def start_scatter(self, matrices: Tensor) -> Pending:
        """Sends the rows of this rank's matrices to where they belong.

        Args:
            matrices: (matrices of this rank, rows, columns).
        """
        rows, columns = matrices.shape[1:]
        counts = divided(rows, self.ranks)
        source = torch.cat([part.reshape(-1) for part in matrices.split(counts, dim=1)])
        mine = counts[self.rank]
        sends = [len(self.owned) * n * columns for n in counts]
        return self._start(source, sends, [len(items) * mine * columns for items in self.items])

    def finish_scatter(self, pending: Pending, rows: int, columns: int) -> list[Tensor]:
        """(own rows, columns) by matrix."""
        mine = divided(rows, self.ranks)[self.rank]
        order = [item for items in self.items for item in items]
        received = pending.wait().view(len(order), mine, columns)
        parts: list[Tensor] = [received] * len(order)
        for place, item in enumerate(order):
            parts[item] = received[place]
        return parts

    def gather(self, parts: Sequence[Tensor], rows: int) -> Tensor:
        """`start_gather` and `finish_gather`."""
        return self.finish_gather(self.start_gather(parts, rows), rows, parts[0].shape[1])

    def scatter(self, matrices: Tensor) -> list[Tensor]:
        """`start_scatter` and `finish_scatter`."""
        return self.finish_scatter(self.start_scatter(matrices), *matrices.shape[1:])

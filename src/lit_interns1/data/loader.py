"""Loaders: which rows this rank reads next, and the one integer that resumes a run.

    micro-step from row g:  rank r reads rows  g + r·m … g + (r+1)·m,   then g += W·m

W ranks, m rows per rank and forward pass. The state of a run is g, the rows that all ranks have consumed together, so
it continues on another number of ranks, or with another m, with exactly the next row. An epoch is
E = (R // B)·B rows of the infinite order (R rows there are, B per optimizer step); the R − E rows that do not fill a
step come first in the next epoch, none is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from lit_interns1.data.order import RowOrder
from lit_interns1.data.packed_batch import PackedBatch
from lit_interns1.training import GlobalBatch


class ReadsRows(Protocol):
    """What loaders read from: `rows.RowReader`, and the reader of conversations."""

    def read(
        self, rows: Sequence[tuple[int, int]], num_rows: int | None = None, first: int | None = None
    ) -> PackedBatch:
        """A batch of rows, in the order given.

        Args:
            rows: (index of the source, row of that source) of each row.
            num_rows: Adds rows of padding up to this number.
            first: Number of the first row in the global order; None when evaluating. What is drawn at random for a row
                depends on this number alone, so that a resumed run draws the same.
        """
        ...


class _OrderedRows(Dataset[PackedBatch]):
    """Item g: the m rows of the global order from row g on."""

    def __init__(self, reader: ReadsRows, order: RowOrder, rows: int) -> None:
        self.reader, self.order, self.rows = reader, order, rows

    def __getitem__(self, first: int) -> PackedBatch:
        source_N, row_N = self.order.rows(first, self.rows)
        return self.reader.read(list(zip(source_N.tolist(), row_N.tolist(), strict=True)), first=first)


class _ListedRows(Dataset[PackedBatch]):
    """Item i: the m rows of a list from row i on, padded with empty rows behind its end."""

    def __init__(self, reader: ReadsRows, listed: list[tuple[int, int]], rows: int) -> None:
        self.reader, self.listed, self.rows = reader, listed, rows

    def __getitem__(self, first: int) -> PackedBatch:
        return self.reader.read(self.listed[first : first + self.rows], num_rows=self.rows)


def _batches(dataset: Dataset[PackedBatch], items: range, num_workers: int, pin_memory: bool) -> Iterator[PackedBatch]:
    """The items in their order; workers read ahead but change neither order nor content."""
    if not num_workers:
        for item in items:
            batch = dataset[item]
            yield batch.pin_memory() if pin_memory else batch
        return
    yield from DataLoader(
        dataset,
        batch_size=None,
        sampler=items,
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else it draws from the global one, and dropout would depend on num_workers
    )


class ResumableLoader:
    """Micro-batches of this rank along the global order; iteration continues where the last one stopped.

    It is no `torch.utils.data.DataLoader`, so Lightning leaves its sampling alone, and it has `state_dict` and
    `load_state_dict`, so Lightning stores its position in checkpoints. It has a length, so Lightning does not fetch
    ahead: in `on_train_batch_end` the position is behind the batch that has just been trained on.

    A checkpoint inside an accumulation window resumes with the next row, too; what the window had accumulated is lost,
    as always with Lightning.

    Args:
        reader: Reads rows.
        order: The global order.
        batch: B, m and W.
        rank: r, which of the W ranks this is.
        num_workers: Processes that read ahead; 0 = read in this process.
        pin_memory: Whether batches come in page-locked memory.
        batches_per_epoch: Micro-batches of an epoch, if fewer than there are (`limit_train_batches`).
        identity: What determines the order and content of the rows (seed, row length, sources, …), by name. Stored
            with the position; another value on resume is refused.

    Raises:
        ValueError: If the rank is not in [0, W), or there are fewer rows than one optimizer step needs.
    """

    equal_on_all_ranks = True
    """Every rank takes the same number of batches, so ranks need not agree on it."""

    def __init__(
        self,
        reader: ReadsRows,
        order: RowOrder,
        batch: GlobalBatch,
        rank: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
        batches_per_epoch: int | None = None,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        if not 0 <= rank < batch.data_parallel_size:
            raise ValueError(f"rank={rank} is not among the {batch.data_parallel_size} data-parallel ranks")
        if num_workers < 0:
            raise ValueError(f"num_workers must not be negative, got {num_workers}")
        steps = order.num_rows // batch.rows_per_step
        if not steps:
            raise ValueError(
                f"the training data fill {order.num_rows} rows, fewer than global_batch_size={batch.rows_per_step}: "
                "not one optimizer step; add data, or lower global_batch_size or row_length"
            )
        self.reader, self.order, self.batch, self.rank = reader, order, batch, rank
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.identity = dict(identity or {})
        self._length = steps * batch.accumulation
        if batches_per_epoch is not None:
            self._length = min(self._length, batches_per_epoch)
        self.on_load: Callable[[ResumableLoader], None] | None = None
        """Called after a state was loaded that was saved with another W·m."""
        self._rows = 0
        self._turn = 0

    @property
    def rows(self) -> int:
        """g: rows of the global order that all ranks together have consumed."""
        return self._rows

    @property
    def rows_per_epoch(self) -> int:
        """E."""
        return self._length * self.batch.rows_per_micro_step

    @property
    def batches_done(self) -> int:
        """Micro-batches of the current epoch that are behind; the full length at the end of an epoch."""
        inside = self._rows % self.rows_per_epoch
        return inside // self.batch.rows_per_micro_step if inside or not self._rows else self._length

    def __len__(self) -> int:
        """Micro-batches per epoch on each rank."""
        return self._length

    def __iter__(self) -> Iterator[PackedBatch]:
        """From the current position to the end of its epoch; a whole epoch if the last one is finished."""
        self._turn += 1
        return self._iterate(self._turn)

    def _iterate(self, turn: int) -> Iterator[PackedBatch]:
        step = self.batch.rows_per_micro_step
        first, left = self._rows, self.rows_per_epoch - self._rows % self.rows_per_epoch
        mine = self.rank * self.batch.micro_batch_rows
        # If the position is not on a micro-batch boundary (resumed with another W·m), the last batch goes beyond the
        # end of the epoch, and the next epoch is that much shorter.
        items = range(first + mine, first + mine + -(-left // step) * step, step)
        dataset = _OrderedRows(self.reader, self.order, self.batch.micro_batch_rows)
        for batch in _batches(dataset, items, self.num_workers, self.pin_memory):
            if turn != self._turn:
                raise RuntimeError("ResumableLoader: a newer iterator has taken over; two would read the same rows")
            self._rows += step
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """`rows`: the rows consumed by all ranks, those of the batch handed out last included; and the identity."""
        return {
            "rows": self._rows,
            "rows_per_micro_step": self.batch.rows_per_micro_step,
            "identity": self.identity,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues behind the rows of `state`.

        Raises:
            ValueError: If the order or content of the rows differs from the run that saved the state.
        """
        saved = dict(state.get("identity", {}))
        changed = [
            f"{name}: {saved.get(name)!r} in the checkpoint, {self.identity.get(name)!r} now"
            for name in sorted(saved.keys() | self.identity.keys())
            if saved.get(name) != self.identity.get(name)
        ]
        if changed:
            raise ValueError(
                "the data of the checkpoint are not those of this run, so its position means other rows: "
                + "; ".join(changed)
                + ". Restore these settings, or start a new run from the weights alone"
            )
        self._rows = int(state["rows"])
        self._turn += 1
        step = self.batch.rows_per_micro_step
        if self.on_load is not None and state.get("rows_per_micro_step", step) != step:
            self.on_load(self)


class EvaluationLoader:
    """Each row of a list once over all ranks, the same number of batches on every rank.

    Where the rows do not fill the last micro-step, ranks get rows of padding without loss, up to whole batches of
    nothing else: `num_tokens` and `num_loss_tokens` are then 0.

    Args:
        reader: Reads rows.
        listed: (source index, row) of each row, in order.
        micro_batch_rows: m, rows per rank and batch.
        data_parallel_size: W.
        rank: r.
        num_workers: Processes that read ahead; 0 = read in this process.
        pin_memory: Whether batches come in page-locked memory.
    """

    equal_on_all_ranks = True

    def __init__(
        self,
        reader: ReadsRows,
        listed: list[tuple[int, int]],
        micro_batch_rows: int,
        data_parallel_size: int = 1,
        rank: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        if not 0 <= rank < data_parallel_size:
            raise ValueError(f"rank={rank} is not among the {data_parallel_size} data-parallel ranks")
        self.reader, self.listed = reader, listed
        self.micro_batch_rows, self.data_parallel_size, self.rank = micro_batch_rows, data_parallel_size, rank
        self.num_workers, self.pin_memory = num_workers, pin_memory

    def __len__(self) -> int:
        """Batches on each rank."""
        return -(-len(self.listed) // (self.micro_batch_rows * self.data_parallel_size))

    def __iter__(self) -> Iterator[PackedBatch]:
        step = self.micro_batch_rows * self.data_parallel_size
        first = self.rank * self.micro_batch_rows
        dataset = _ListedRows(self.reader, self.listed, self.micro_batch_rows)
        return _batches(dataset, range(first, first + len(self) * step, step), self.num_workers, self.pin_memory)

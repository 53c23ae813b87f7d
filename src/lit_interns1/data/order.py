"""The global order of training rows: infinite, seeded, and a function of the row number alone.

    row g  ->  (source, row of that source)

Sources are mixed in blocks of 1,024 rows. The first n rows of the order hold c_s(n) rows of source s, where

    c(n) = the n smallest of { (k + ½) / w_s : k = 0, 1, … }   (the method of Webster and Sainte-Laguë)

so every prefix of whole blocks has the weights exactly, up to a row. (Largest remainders of n·w_s give the same counts
but for ties, except that they can shrink as n grows; this rule never takes a row back.) Inside a block the order is
permuted by (seed, block). The k-th row that source s gives is the (k mod R_s)-th of its permutation by
(seed, source, k div R_s): a source starts its next epoch when all of its rows have been read.

Without weights they are the numbers of rows, counted afresh in every epoch: then each row comes exactly once per epoch.

Every random choice is a sort by a hash that is written out here, not a call of a library's generator: the order of a
run does not change with the version of NumPy.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(values: NDArray[np.uint64], *key: int) -> NDArray[np.uint64]:
    """A 64-bit hash of each value under a key of integers (the finaliser of splitmix64, once per key entry)."""
    mixed = np.asarray(values, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for part in (*key, len(key)):
            mixed = mixed + np.uint64(part % 2**64) * _GOLDEN + _GOLDEN
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            mixed = mixed ^ (mixed >> np.uint64(31))
    return mixed


def permutation(size: int, *key: int) -> IntArray:
    """A random permutation of 0 … size−1 that depends on the key alone."""
    return np.argsort(mix(np.arange(size, dtype=np.uint64), *key), kind="stable")


def apportion(count: int, weights: Sequence[float] | NDArray[Any]) -> IntArray:
    """c(n): how many of the first `count` rows each source gives; sums to `count`, never shrinks as `count` grows."""
    weight_S = np.asarray(weights, dtype=np.float64)
    given_S = np.maximum(np.floor(count * (weight_S / weight_S.sum()) + 0.5).astype(np.int64) - 1, 0)
    while given_S.sum() > count:  # rounding alone cannot do this; kept for weights that are far apart
        given_S[np.argmax((given_S - 0.5) / weight_S)] -= 1
    for _ in range(count - int(given_S.sum())):
        given_S[np.argmin((given_S + 0.5) / weight_S)] += 1
    return given_S


class _Block(NamedTuple):
    source_B: IntArray
    """(B,) source of each row."""
    ordinal_B: IntArray
    """(B,) how many rows that source gave before, since its count began."""


class RowOrder:
    """Which row of which source is the g-th training row of a run.

    Args:
        rows_per_source: R_s, rows of each source.
        weights: w_s, the share of *rows* that each source gets in the long run (only their ratios count). Under
            `packing='split'` rows are full, so this is the share of tokens too. None: each row once per epoch.
        seed: Seed of all permutations.
        block_rows: Rows of a block, inside which the order of the sources is random.

    Raises:
        ValueError: If a source has no rows, or a weight is not positive.
    """

    def __init__(
        self,
        rows_per_source: Sequence[int],
        weights: Sequence[float] | None = None,
        seed: int = 0,
        block_rows: int = 1024,
    ) -> None:
        if not rows_per_source or min(rows_per_source) < 1:
            raise ValueError(f"every source needs at least one row, got rows_per_source={list(rows_per_source)}")
        if weights is not None and len(weights) != len(rows_per_source):
            raise ValueError(f"got {len(weights)} weights for {len(rows_per_source)} sources")
        if weights is not None and not min(weights) > 0:
            raise ValueError(f"weights must be positive, got {list(weights)}")
        if block_rows < 1:
            raise ValueError(f"block_rows must be at least 1, got {block_rows}")
        self.rows_per_source = [int(rows) for rows in rows_per_source]
        self.weights = None if weights is None else [float(weight) for weight in weights]
        self.seed, self.block_rows = int(seed), int(block_rows)
        self._blocks: OrderedDict[tuple[int, int], _Block] = OrderedDict()
        self._permutations: OrderedDict[tuple[int, int], IntArray] = OrderedDict()

    @property
    def num_rows(self) -> int:
        """R, rows of all sources together: the length of an epoch."""
        return sum(self.rows_per_source)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_blocks": OrderedDict(), "_permutations": OrderedDict()}

    def row(self, index: int) -> tuple[int, int]:
        """(source, row of that source) of global row `index`."""
        source_N, row_N = self.rows(index, 1)
        return int(source_N[0]), int(row_N[0])

    def rows(self, first: int, count: int) -> tuple[IntArray, IntArray]:
        """(count,) sources and (count,) rows of the global rows [first, first + count).

        Raises:
            ValueError: For a negative row number.
        """
        if first < 0 or count < 0:
            raise ValueError(f"rows are numbered from 0, got first={first}, count={count}")
        parts: list[tuple[IntArray, IntArray]] = []
        position, end = first, first + count
        period = self.num_rows if self.weights is None else None  # without weights the count begins anew in each epoch
        while position < end:
            epoch, inside = divmod(position, period) if period else (0, position)
            block, slot = divmod(inside, self.block_rows)
            entry = self._block(epoch, block)
            stop = min(slot + end - position, len(entry.source_B))
            source_N, ordinal_N = entry.source_B[slot:stop], entry.ordinal_B[slot:stop]
            row_N = np.empty_like(ordinal_N)
            for source in np.unique(source_N).tolist():
                of_source_N = source_N == source
                rounds_N, rest_N = np.divmod(ordinal_N[of_source_N], self.rows_per_source[source])
                picked_N = np.empty_like(rest_N)
                for turn in np.unique(rounds_N).tolist():
                    of_turn_N = rounds_N == turn
                    picked_N[of_turn_N] = self._permutation(source, epoch + turn)[rest_N[of_turn_N]]
                row_N[of_source_N] = picked_N
            parts.append((source_N, row_N))
            position += stop - slot
        if not parts:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])

    def _block(self, epoch: int, block: int) -> _Block:
        key = (epoch, block)
        if key not in self._blocks:
            weights = self.rows_per_source if self.weights is None else self.weights
            first, last = block * self.block_rows, (block + 1) * self.block_rows
            if self.weights is None:
                last = min(last, self.num_rows)
            before_S, after_S = apportion(first, weights), apportion(last, weights)
            counts_S = after_S - before_S
            source_B = np.repeat(np.arange(len(counts_S)), counts_S)
            source_B = source_B[permutation(last - first, self.seed, 1, epoch, block)]
            ordinal_B = np.empty_like(source_B)
            for source in np.flatnonzero(counts_S).tolist():
                ordinal_B[source_B == source] = before_S[source] + np.arange(counts_S[source])
            self._blocks[key] = _Block(source_B, ordinal_B)
            while len(self._blocks) > 4:
                self._blocks.popitem(last=False)
        return self._blocks[key]

    def _permutation(self, source: int, epoch: int) -> IntArray:
        key = (source, epoch)
        if key not in self._permutations:
            self._permutations[key] = permutation(self.rows_per_source[source], self.seed, 2, source, epoch)
            while len(self._permutations) > 2 * len(self.rows_per_source):
                self._permutations.popitem(last=False)
        return self._permutations[key]

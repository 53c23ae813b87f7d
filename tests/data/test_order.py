"""The global order: a permutation per epoch, exact shares, and the same rows however they are asked for."""

from __future__ import annotations

import numpy as np
import pytest

from lit_interns1.data.order import RowOrder, apportion, mix, permutation


def test_permutation_is_one_and_is_fixed():
    assert sorted(permutation(1000, 3, 1).tolist()) == list(range(1000))
    assert permutation(1000, 3, 1).tolist() != permutation(1000, 3, 2).tolist()
    # frozen: a run must be resumable by a later version
    assert permutation(8, 0).tolist() == GOLDEN_PERMUTATION
    assert [int(value) for value in mix(np.arange(2, dtype=np.uint64), 5, 6)] == GOLDEN_MIX


def test_permutations_are_uniform():
    first = np.array([permutation(6, 0, key) for key in range(6000)])
    counts = np.stack([np.bincount(first[:, place], minlength=6) for place in range(6)])
    assert np.abs(counts - 1000).max() < 150  # five standard deviations


def test_apportion_by_hand_and_never_shrinks():
    # quotients (k + ½)/w: 5: .1 .3 .5 .7 .9;  3: .17 .5 .83;  2: .25 .75 — the six smallest are 3 of the first (.1 .3
    # .5), 2 of the second (.17 .5), 1 of the third
    assert apportion(6, [5, 3, 2]).tolist() == [3, 2, 1]
    assert apportion(10, [5, 3, 2]).tolist() == [5, 3, 2]
    weights = [1e-4, 0.3, 0.5, 0.2, 1e-4]
    counts = np.array([apportion(n, weights) for n in range(6000)])
    assert (counts.sum(1) == np.arange(6000)).all()
    assert (np.diff(counts, axis=0) >= 0).all()
    assert np.abs(counts - np.arange(6000)[:, None] * np.array(weights) / sum(weights)).max() < 1.5


@pytest.mark.parametrize("block_rows", [1, 7, 64])
def test_without_weights_each_row_once_per_epoch(block_rows: int):
    order = RowOrder([50, 7, 13], seed=4, block_rows=block_rows)
    epochs = []
    for epoch in range(3):
        source_N, row_N = order.rows(epoch * 70, 70)
        pairs = list(zip(source_N.tolist(), row_N.tolist(), strict=True))
        assert len(set(pairs)) == 70
        epochs.append(pairs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_weights_are_shares_of_rows_in_every_block():
    order = RowOrder([500, 3, 100], [0.25, 0.5, 0.25], seed=1, block_rows=128)
    source_N, row_N = order.rows(0, 128 * 40)
    for block in range(40):
        assert np.bincount(source_N[block * 128 : (block + 1) * 128], minlength=3).tolist() == [32, 64, 32]
    assert sorted(set(source_N[:16].tolist())) == [0, 1, 2]  # mixed inside the block
    # each source runs through its own epochs: the first 500 rows of source 0 are all of its rows
    first = row_N[source_N == 0]
    assert sorted(first[:500].tolist()) == list(range(500))
    assert sorted(first[500:1000].tolist()) == list(range(500))
    assert first[:500].tolist() != first[500:1000].tolist()
    small = row_N[source_N == 1]
    assert all(sorted(small[i : i + 3].tolist()) == [0, 1, 2] for i in range(0, len(small) - 3, 3))


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 3.5]])
def test_random_access_equals_reading_through(weights: list[float] | None):
    order = RowOrder([40, 11, 23], weights, seed=2, block_rows=16)
    source_N, row_N = order.rows(0, 500)
    fresh = RowOrder([40, 11, 23], weights, seed=2, block_rows=16)
    for index in np.random.default_rng(0).permutation(500).tolist():
        assert fresh.row(index) == (source_N[index], row_N[index])
    some_source, some_row = fresh.rows(123, 200)
    assert some_source.tolist() == source_N[123:323].tolist()
    assert some_row.tolist() == row_N[123:323].tolist()
    other_source, other_row = RowOrder([40, 11, 23], weights, seed=3, block_rows=16).rows(0, 500)
    assert (other_source.tolist(), other_row.tolist()) != (source_N.tolist(), row_N.tolist())


def test_far_rows_are_near():
    order = RowOrder([1000, 10], [1.0, 1e-3], seed=0)
    assert order.row(10**12) == RowOrder([1000, 10], [1.0, 1e-3], seed=0).row(10**12)


def test_errors():
    with pytest.raises(ValueError, match="at least one row"):
        RowOrder([3, 0])
    with pytest.raises(ValueError, match="weights must be positive"):
        RowOrder([3, 1], [1.0, 0.0])
    with pytest.raises(ValueError, match="1 weights for 2 sources"):
        RowOrder([3, 1], [1.0])
    with pytest.raises(ValueError, match="rows are numbered from 0"):
        RowOrder([3]).rows(-1, 2)


GOLDEN_PERMUTATION = [2, 5, 3, 4, 7, 0, 6, 1]
GOLDEN_MIX = [15539843378701342658, 13764890340492840777]

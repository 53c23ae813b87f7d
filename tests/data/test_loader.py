"""Resuming at every position, on any number of ranks, with and without workers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lit_interns1.data.loader import EvaluationLoader, ResumableLoader
from lit_interns1.data.order import RowOrder
from lit_interns1.data.packed_batch import PackedBatch
from lit_interns1.data.rows import RowReader, SourceRows
from lit_interns1.data.token_store import TokenStore
from lit_interns1.training import GlobalBatch

ROW_LENGTH = 4


def make_store(folder: Path, name: str, lengths: list[int], first: int = 0) -> TokenStore:
    """Token n of the store has the id first + n, so that a token names its place."""
    folder = folder / name
    folder.mkdir()
    total = sum(lengths)
    np.arange(first, first + total, dtype=np.uint16).tofile(folder / "tokens.bin")
    return TokenStore(
        folder, name, {"name": name, "dtype": "uint16"}, np.cumsum(lengths), np.arange(len(lengths), dtype=np.uint64)
    )


@pytest.fixture
def reader(tmp_path: Path) -> RowReader:
    """Two sources of 21 and 5 rows."""
    stores = [make_store(tmp_path, "a", [7] * 12), make_store(tmp_path, "b", [9, 11], first=1000)]
    rows = [
        SourceRows.pack(store, index, np.arange(store.num_documents), ROW_LENGTH, "split", "error")
        for index, store in enumerate(stores)
    ]
    assert [source.plan.num_rows for source in rows] == [21, 5]
    return RowReader(rows, ROW_LENGTH)


def make_loader(reader: RowReader, ranks: int = 1, rank: int = 0, rows: int = 2, step: int = 8, **options):
    order = RowOrder([source.plan.num_rows for source in reader.sources], seed=5, block_rows=8)
    return ResumableLoader(reader, order, GlobalBatch(step, rows, ranks), rank, **options)


def rows_of(batch: PackedBatch) -> list[tuple[int, ...]]:
    return [tuple(row) for row in batch.input_ids.view(batch.num_rows, -1).tolist()]


def expected(reader: RowReader, first: int, count: int) -> list[tuple[int, ...]]:
    order = make_loader(reader).order
    batches = (reader.read([order.row(index)]) for index in range(first, first + count))
    return [tuple(batch.input_ids.tolist()) for batch in batches]


def test_labels_and_fields_of_rows_by_hand(reader: RowReader):
    batch = reader.read([(0, 1), (1, 4)], num_rows=3)
    # documents of 7 tokens: row 1 holds tokens 4 5 6 | 7; row 4 of b its last 4 tokens of 20
    assert batch.input_ids.tolist() == [4, 5, 6, 7, 1016, 1017, 1018, 1019, 0, 0, 0, 0]
    assert batch.labels.tolist() == [5, 6, -100, 8, 1017, 1018, 1019, -100, -100, -100, -100, -100]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 0, 1, 2, 3]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 8, 12]
    assert batch.token_fields["source_id"].tolist() == [0] * 4 + [1] * 4 + [-1] * 4
    assert (batch.num_rows, batch.num_tokens, batch.num_loss_tokens) == (3, 8, 6)


def test_epochs_follow_one_another_without_loss(reader: RowReader):
    loader = make_loader(reader)  # 26 rows, 8 per step: epochs of 24 rows
    assert len(loader) == 12
    seen = [row for _ in range(3) for batch in loader for row in rows_of(batch)]
    assert seen == expected(reader, 0, 72)
    assert loader.rows == 72
    assert len(set(seen[:26])) == 26  # each row once before any comes again


def test_iteration_continues(reader: RowReader):
    loader = make_loader(reader)
    taken = []
    for batch in loader:
        taken += rows_of(batch)
        if len(taken) == 10:
            break
    assert loader.state_dict()["rows"] == 10
    rest = [row for batch in loader for row in rows_of(batch)]
    assert len(rest) == 14
    assert taken + rest == expected(reader, 0, 24)


@pytest.mark.parametrize("rows", [1, 2])
def test_resume_at_every_position_on_one_two_one_ranks(reader: RowReader, rows: int):
    whole = expected(reader, 0, 60)
    for first_stop in range(0, 24, rows):
        state: dict = {"rows": 0, "identity": {}}
        seen: list[tuple[int, ...]] = []
        for ranks, count in ((1, first_stop // rows), (2, 3), (1, 2)):
            loaders = [make_loader(reader, ranks, rank, rows) for rank in range(ranks)]
            for loader in loaders:
                loader.load_state_dict(state)
            if count:
                iterators = [iter(loader) for loader in loaders]
                for _ in range(count):
                    for position, iterator in enumerate(iterators):
                        batch = next(iterator, None)
                        if batch is None:  # the end of an epoch
                            iterators[position] = iter(loaders[position])
                            batch = next(iterators[position])
                        seen += rows_of(batch)
            states = [loader.state_dict() for loader in loaders]
            assert all(other == states[0] for other in states)
            state = states[0]
        assert seen == whole[: len(seen)], first_stop
        assert state["rows"] == len(seen) == first_stop + 6 * rows + 2 * rows


def test_another_micro_batch_size(reader: RowReader):
    loader = make_loader(reader, rows=4)
    loader.load_state_dict({"rows": 6, "identity": {}})
    assert [row for batch in loader for row in rows_of(batch)] == expected(reader, 6, 20)  # over the end of the epoch
    assert [row for batch in loader for row in rows_of(batch)] == expected(reader, 26, 24)


def test_workers_change_nothing(reader: RowReader):
    plain, parallel = make_loader(reader), make_loader(reader, num_workers=2)
    for _ in range(2):
        for one, other in zip(plain, parallel, strict=True):
            assert one.input_ids.equal(other.input_ids)
            assert one.labels.equal(other.labels)
            assert one.cu_seqlens.equal(other.cu_seqlens)
            assert plain.state_dict() == parallel.state_dict()  # batches read ahead do not count
    stopped = make_loader(reader, num_workers=2)
    for count, _ in enumerate(stopped, start=1):
        if count == 3:
            break
    assert stopped.rows == 6
    assert rows_of(next(iter(stopped))) == expected(reader, 6, 2)


def test_workers_leave_the_random_state_alone(reader: RowReader):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    next(iter(make_loader(reader, num_workers=1)))
    assert torch.get_rng_state().equal(before)


def test_limited_epochs(reader: RowReader):
    loader = make_loader(reader, batches_per_epoch=4)
    assert len(loader) == 4
    seen = [[row for batch in loader for row in rows_of(batch)] for _ in range(4)]
    assert [row for epoch in seen for row in epoch] == expected(reader, 0, 32)
    assert [len(epoch) for epoch in seen] == [8] * 4
    assert loader.batches_done == 4


def test_two_iterators_at_once_are_refused(reader: RowReader):
    loader = make_loader(reader)
    old = iter(loader)
    next(old)
    next(iter(loader))
    with pytest.raises(RuntimeError, match="a newer iterator has taken over"):
        next(old)


def test_other_data_are_refused(reader: RowReader):
    state = make_loader(reader, identity={"seed": 1, "row_length": 4}).state_dict()
    with pytest.raises(ValueError, match="seed: 1 in the checkpoint, 2 now"):
        make_loader(reader, identity={"seed": 2, "row_length": 4}).load_state_dict(state)


def test_errors(reader: RowReader):
    with pytest.raises(ValueError, match="fill 26 rows, fewer than global_batch_size=32"):
        make_loader(reader, step=32)
    with pytest.raises(ValueError, match="rank=2 is not among the 2"):
        make_loader(reader, ranks=2, rank=2)


@pytest.mark.parametrize(
    ("ranks", "rows", "num_workers"), [(1, 1, 0), (1, 4, 0), (2, 1, 0), (2, 4, 0), (3, 1, 0), (3, 4, 0), (2, 4, 1)]
)
def test_evaluation_sees_each_row_once(reader: RowReader, ranks: int, rows: int, num_workers: int):
    listed = [(index, row) for index, source in enumerate(reader.sources) for row in range(source.plan.num_rows)]
    loaders = [EvaluationLoader(reader, listed, rows, ranks, rank, num_workers) for rank in range(ranks)]
    assert len({len(loader) for loader in loaders}) == 1
    seen = []
    for loader in loaders:
        batches = list(loader)
        assert len(batches) == len(loader)
        for batch in batches:
            assert batch.num_rows == rows
            real = batch.sample_id_T >= 0
            assert batch.num_tokens == int(real.sum())
            assert bool(batch.labels[~real].eq(-100).all())
            seen.append(batch.input_ids[real])
    tokens = torch.cat(seen)
    assert sorted(tokens.tolist()) == [*range(84), *range(1000, 1020)]

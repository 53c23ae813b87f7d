"""The packer against cases worked by hand and against properties on random documents."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch

from lit_interns1.data.packed_batch import IGNORED_LABEL, PackedBatch
from lit_interns1.data.packing import lay_out, pack_documents, plan_rows


def documents(lengths: list[int], spacing: int = 100) -> list[dict[str, torch.Tensor]]:
    """Document d holds the tokens spacing·d, spacing·d + 1, …; `tag` is 1,000 more than the token."""
    ids = [torch.arange(spacing * d, spacing * d + n) for d, n in enumerate(lengths)]
    return [{"input_ids": x, "tag": x + 1000} for x in ids]


def test_split_by_hand():
    batch = pack_documents(documents([3, 5, 2]), row_length=4, pad_values={"input_ids": 7, "tag": -5})
    assert batch.num_rows == 3
    assert batch.input_ids.tolist() == [0, 1, 2, 100, 101, 102, 103, 104, 200, 201, 7, 7]
    # the label before the cut (100 -> 101) is still the true next token
    assert batch.labels.tolist() == [1, 2, -100, 101, 102, 103, 104, -100, 201, -100, -100, -100]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 0, 1, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 8, 10, 12]
    assert batch.sample_id_T.tolist() == [0, 0, 0, 1, 2, 2, 2, 2, 3, 3, -1, -1]
    assert batch.token_fields["tag"].tolist() == [1000, 1001, 1002, 1100, 1101, 1102, 1103, 1104, 1200, 1201, -5, -5]
    assert (batch.num_tokens, batch.num_loss_tokens, batch.max_seqlen) == (10, 7, 4)


def test_whole_by_hand():
    # decreasing: 6 | 5 | 4 | 3 -> none fits (rooms 0, 1, 2): new row | 2 -> the row of the 4, fullest with room for it
    # | 1 -> the row of the 5 | 1 -> the row of the 3
    plan = plan_rows([3, 5, 2, 4, 1, 1, 6], 6, "whole")
    rows = [plan.piece_document_P[a:b].tolist() for a, b in zip(plan.first_piece_R[:-1], plan.first_piece_R[1:])]
    assert rows == [[6], [1, 4], [2, 3], [0, 5]]
    assert plan.padding_tokens == 4 * 6 - 22
    batch = pack_documents(documents([3, 5]), row_length=6, policy="whole")
    assert batch.input_ids.tolist() == [100, 101, 102, 103, 104, 0, 0, 1, 2, 0, 0, 0]
    assert batch.sample_id_T.tolist() == [0] * 5 + [-1] + [1] * 3 + [-1] * 3
    assert batch.cu_seqlens.tolist() == [0, 5, 6, 9, 12]
    assert batch.labels[batch.sample_id_T < 0].eq(IGNORED_LABEL).all()


def reference_best_fit(lengths: list[int], row_length: int) -> list[int]:
    """Room used per row, by the definition: one document at a time."""
    used: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row, n in enumerate(used) if n + length <= row_length]
        if fitting:
            used[max(fitting, key=lambda row: used[row])] += length
        else:
            used.append(length)
    return sorted(used)


@pytest.mark.parametrize("seed", range(40))
def test_random_documents(seed: int):
    generator = np.random.default_rng(seed)
    row_length = int(generator.integers(1, 40))
    longest = row_length if seed % 2 else 3 * row_length
    lengths = generator.integers(0 if seed % 3 else 1, longest + 1, size=generator.integers(1, 60)).tolist()
    lengths[0] = max(lengths[0], 1)
    policy = "split" if seed % 4 < 2 else "whole"
    pieces = documents(lengths, spacing=1000)
    batch = pack_documents(pieces, row_length, policy, overlong="split", pad_values={"input_ids": -1, "tag": -1})

    everything = torch.cat([entry["input_ids"] for entry in pieces])
    real = batch.sample_id_T >= 0
    # every token exactly once, with its own field
    assert sorted(batch.input_ids[real].tolist()) == sorted(everything.tolist())
    assert batch.token_fields["tag"][real].equal(batch.input_ids[real] + 1000)
    assert batch.input_ids[~real].eq(-1).all()
    # labels: the next token of the document, wherever it lies
    last = {entry["input_ids"][-1].item() for entry in pieces if len(entry["input_ids"])}
    expected = [IGNORED_LABEL if token in last else token + 1 for token in batch.input_ids[real].tolist()]
    assert batch.labels[real].tolist() == expected
    assert batch.labels[~real].eq(IGNORED_LABEL).all()
    # segments: no segment crosses a row, positions restart, ids are constant inside and ascend
    bounds = batch.cu_seqlens.tolist()
    assert bounds[0] == 0
    assert bounds[-1] == len(batch.input_ids) == batch.num_rows * row_length
    seen = []
    for a, b in pairwise(bounds):
        assert a // row_length == (b - 1) // row_length
        assert batch.position_ids[a:b].tolist() == list(range(b - a))
        assert len(set(batch.sample_id_T[a:b].tolist())) == 1
        if batch.sample_id_T[a] >= 0:
            seen.append(int(batch.sample_id_T[a]))
            assert batch.input_ids[a:b].diff().eq(1).all()
    assert seen == list(range(len(seen)))
    assert batch.max_seqlen == max(b - a for a, b in pairwise(bounds))
    assert batch.num_tokens == len(everything)
    assert batch.num_loss_tokens == sum(max(n - 1, 0) for n in lengths)
    if policy == "split":
        assert batch.input_ids[real].equal(everything)
        assert len(batch.input_ids) - batch.num_tokens < row_length
    elif longest == row_length:
        used = real.view(batch.num_rows, row_length).sum(1).tolist()
        assert sorted(used) == reference_best_fit([n for n in lengths if n], row_length)


def test_split_in_parts_equals_separate_packing():
    batch = pack_documents(documents([3, 5, 2, 9]), row_length=4, rows_multiple_of=6)
    assert batch.num_rows == 6
    parts = batch.split(2)
    again = PackedBatch.concatenate(parts)
    for name in ("input_ids", "labels", "position_ids", "cu_seqlens", "sample_id_T"):
        assert getattr(again, name).equal(getattr(batch, name)), name
    assert [part.num_tokens for part in parts] == [8, 8, 3]
    assert parts[1].sample_id_T[0] == 0
    assert again.num_loss_tokens == batch.num_loss_tokens
    with pytest.raises(ValueError, match="rows_per_part=4 does not divide the 6 rows"):
        batch.split(4)


def test_from_documents_is_the_same_packer():
    one = PackedBatch.from_documents(documents([3, 2]), row_length=7, pad_values={"tag": -1})
    other = pack_documents(documents([3, 2]), row_length=7, pad_values={"tag": -1})
    for name in ("input_ids", "labels", "position_ids", "cu_seqlens", "sample_id_T"):
        assert getattr(one, name).equal(getattr(other, name)), name
    assert one.token_fields["tag"].equal(other.token_fields["tag"])
    with pytest.raises(ValueError, match="documents of 5 tokens do not fit into a row of 4"):
        PackedBatch.from_documents(documents([3, 2]), row_length=4)
    given = PackedBatch.from_documents([{"input_ids": torch.arange(2), "labels": torch.tensor([5, -100])}])
    assert given.labels.tolist() == [5, -100]


def test_as_rows_are_views():
    batch = pack_documents(documents([3, 5]), row_length=4)
    rows = batch.as_rows()
    assert {name: tuple(value.shape) for name, value in rows.items()} == dict.fromkeys(
        ("input_ids", "labels", "position_ids"), (2, 4)
    )
    assert rows["input_ids"].data_ptr() == batch.input_ids.data_ptr()


def test_rows_of_nothing():
    layout = lay_out(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), num_rows=2, row_length=3)
    assert layout.sample_id_T.tolist() == [-1] * 6
    assert layout.cu_seqlens.tolist() == [0, 3, 6]


def test_errors():
    with pytest.raises(ValueError, match="chapter 2 has 9 tokens, more than row_length=4"):
        plan_rows([3, 9], 4, "whole", names=["chapter 1", "chapter 2"])
    with pytest.raises(ValueError, match="packing='best' is unknown; choose one of 'split', 'whole'"):
        plan_rows([3], 4, "best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="row_length must be at least 1"):
        plan_rows([3], 0)
    with pytest.raises(ValueError, match="differ in their fields"):
        pack_documents([{"input_ids": torch.arange(2)}, {"input_ids": torch.arange(2), "x": torch.arange(2)}], 4)
    with pytest.raises(ValueError, match="document 0: tag has 3 tokens, input_ids has 2"):
        pack_documents([{"input_ids": torch.arange(2), "tag": torch.arange(3)}], 4)


def test_the_packer_needs_no_lightning():
    code = "import sys, lit_interns1.data.packing; assert not {'lightning', 'tokenizers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

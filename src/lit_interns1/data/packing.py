"""The one packer: which piece of which document lies where in rows of equal length.

    split:  the documents form one stream, row r holds its tokens [r·L, (r+1)·L)
    whole:  best-fit decreasing: the longest document first, each into the fullest row that still has room

A plan is arrays over pieces, made from the document lengths alone; no loop runs over tokens. Under `split` every token
is used and only the last row is padded. A document that crosses the end of a row is cut there and goes on in the next
row with positions from 0: it no longer sees what was before the cut, but the label of the last position before the cut
is still the true next token, so no prediction is lost. Under `whole` no document is cut, and rows end in padding.

Shape suffixes: D documents, P pieces, R rows, N tokens without padding, T = R·L tokens with padding.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_interns1.data.packed_batch import IGNORED_LABEL, PackedBatch

IntArray = NDArray[np.int64]
PackingPolicy = Literal["split", "whole"]
OverlongPolicy = Literal["error", "split"]


@dataclass(frozen=True)
class PackingPlan:
    """Where each piece of each document goes.

    Attributes:
        row_length: L, tokens per row.
        piece_document_P: (P,) index of the document; pieces are in the order of their rows.
        piece_start_P: (P,) first token of the piece inside its document.
        piece_length_P: (P,) tokens of the piece.
        first_piece_R: (R+1,) row r holds the pieces [first_piece_R[r], first_piece_R[r+1]).
    """

    row_length: int
    piece_document_P: IntArray
    piece_start_P: IntArray
    piece_length_P: IntArray
    first_piece_R: IntArray

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.first_piece_R) - 1

    @property
    def num_tokens(self) -> int:
        """N, tokens without padding."""
        return int(self.piece_length_P.sum())

    @property
    def padding_tokens(self) -> int:
        """Positions that hold no token."""
        return self.num_rows * self.row_length - self.num_tokens

    @property
    def piece_row_P(self) -> IntArray:
        """(P,) row of each piece."""
        return np.repeat(np.arange(self.num_rows), np.diff(self.first_piece_R))

    def first_rows(self, rows: int) -> PackingPlan:
        """The plan cut off after `rows` rows."""
        rows = min(rows, self.num_rows)
        last = int(self.first_piece_R[rows])
        return PackingPlan(
            self.row_length,
            self.piece_document_P[:last],
            self.piece_start_P[:last],
            self.piece_length_P[:last],
            self.first_piece_R[: rows + 1],
        )


def check_policies(policy: str, overlong: str) -> None:
    """Raises ValueError with the choices if one of the two names is unknown."""
    for name, value, choices in (
        ("packing", policy, get_args(PackingPolicy)),
        ("overlong", overlong, get_args(OverlongPolicy)),
    ):
        if value not in choices:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, choices))}")


def plan_rows(
    length_D: Sequence[int] | NDArray[Any],
    row_length: int,
    policy: PackingPolicy = "split",
    overlong: OverlongPolicy = "error",
    names: Sequence[str] | None = None,
) -> PackingPlan:
    """Plans the rows of documents from their lengths.

    Args:
        length_D: Tokens of each document; documents without tokens take no place.
        row_length: L, tokens per row.
        policy: `split` or `whole`, see the top of this module.
        overlong: Under `whole`, what to do with a document longer than a row: refuse (`error`), or cut it into pieces
            of L and a remainder (`split`).
        names: Names of the documents for error messages; their index otherwise.

    Raises:
        ValueError: For an unknown policy, a row length below 1, or an overlong document under `whole`.
    """
    check_policies(policy, overlong)
    if row_length < 1:
        raise ValueError(f"row_length must be at least 1 token, got {row_length}")
    length_D = np.asarray(length_D, dtype=np.int64)
    if policy == "split":
        return _plan_split(length_D, row_length)
    too_long = np.flatnonzero(length_D > row_length)
    if len(too_long) and overlong == "error":
        first = int(too_long[0])
        name = names[first] if names is not None else f"document {first}"
        raise ValueError(
            f"{name} has {int(length_D[first])} tokens, more than row_length={row_length}, and packing='whole' never "
            f"cuts a document ({len(too_long)} of {len(length_D)} documents are too long); raise row_length, or set "
            "overlong='split' or packing='split'"
        )
    return _plan_whole(length_D, row_length)


def _plan_split(length_D: IntArray, row_length: int) -> PackingPlan:
    end_D = np.cumsum(length_D)
    total = int(end_D[-1]) if len(end_D) else 0
    row_start_R = np.arange(0, total, row_length, dtype=np.int64)
    start_P = np.union1d((end_D - length_D)[length_D > 0], row_start_R)
    document_P = np.searchsorted(end_D, start_P, side="right")
    return PackingPlan(
        row_length,
        piece_document_P=document_P,
        piece_start_P=start_P - (end_D - length_D)[document_P],
        piece_length_P=np.diff(start_P, append=total),
        first_piece_R=np.append(np.searchsorted(start_P, row_start_R), len(start_P)),
    )


def _plan_whole(length_D: IntArray, row_length: int) -> PackingPlan:
    pieces_D = -(-length_D // row_length)
    document_P = np.repeat(np.arange(len(length_D)), pieces_D)
    start_P = (np.arange(len(document_P)) - np.repeat(np.cumsum(pieces_D) - pieces_D, pieces_D)) * row_length
    length_P = np.minimum(length_D[document_P] - start_P, row_length)
    row_P, num_rows = _best_fit_decreasing(length_P, row_length)
    order_P = np.argsort(row_P, kind="stable")  # inside a row the documents keep their order
    counts_R = np.bincount(row_P, minlength=num_rows)
    return PackingPlan(
        row_length,
        piece_document_P=document_P[order_P],
        piece_start_P=start_P[order_P],
        piece_length_P=length_P[order_P],
        first_piece_R=np.concatenate([[0], np.cumsum(counts_R)]).astype(np.int64),
    )


def _best_fit_decreasing(length_P: IntArray, row_length: int) -> tuple[IntArray, int]:
    """The row of each piece, and the number of rows.

    The loop runs over pairs of (piece length, room left in a row), never over pieces: best fit fills the row with the
    least sufficient room first, and after a piece that row has less room still, so a row with room c takes c // length
    pieces in a go, and all rows with the same room are alike.
    """
    row_P = np.zeros(len(length_P), dtype=np.int64)
    order_P = np.argsort(-length_P, kind="stable")
    lengths, counts = np.unique(length_P, return_counts=True)
    rows_by_room: dict[int, list[NDArray[Any]]] = {}
    rooms: list[int] = []  # sorted keys of rows_by_room
    num_rows = taken = 0

    def put(room: int, rows: NDArray[Any]) -> None:
        if room and len(rows):
            if room not in rows_by_room:
                rows_by_room[room] = []
                insort(rooms, room)
            rows_by_room[room].append(rows)

    for length, count in zip(lengths[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            position = bisect_left(rooms, length)
            if position < len(rooms):
                room = rooms.pop(position)
                rows = np.concatenate(rows_by_room.pop(room))
            else:  # no open row has room: open as many as the rest of this length needs
                room = row_length
                rows = np.arange(num_rows, num_rows - (-count // (room // length)))
                num_rows += len(rows)
            each = room // length
            full = min(count // each, len(rows))
            pieces = order_P[taken : taken + full * each]
            row_P[pieces] = np.repeat(rows[:full], each)
            put(room - each * length, rows[:full])
            taken, count, rows = taken + full * each, count - full * each, rows[full:]
            if len(rows) and count:  # fewer pieces are left than one row would take
                row_P[order_P[taken : taken + count]] = rows[0]
                put(room - count * length, rows[:1])
                taken, count, rows = taken + count, 0, rows[1:]
            put(room, rows)
    return row_P, num_rows


class RowLayout(NamedTuple):
    """The parts of a `PackedBatch` that follow from the lengths alone.

    Attributes:
        num_rows: R.
        target_N: (N,) where each token of the concatenated pieces goes.
        position_ids_T: (T,) restarting in every piece.
        sample_id_T: (T,) number of the piece; -1 = padding.
        cu_seqlens: (S+1,) int32 over pieces and the padding at the end of each row.
        max_seqlen: Longest segment.
    """

    num_rows: int
    target_N: IntArray
    position_ids_T: IntArray
    sample_id_T: IntArray
    cu_seqlens: NDArray[np.int32]
    max_seqlen: int


def lay_out(piece_length_P: NDArray[Any], piece_row_P: NDArray[Any], num_rows: int, row_length: int) -> RowLayout:
    """Lays pieces side by side in their rows, padding behind the last piece of each row.

    Args:
        piece_length_P: Tokens of each piece.
        piece_row_P: Row of each piece, ascending; rows without a piece are all padding.
        num_rows: R.
        row_length: L.
    """
    used_R = np.bincount(piece_row_P, weights=piece_length_P, minlength=num_rows).astype(np.int64)
    padding_R = row_length - used_R
    lengths = np.concatenate([piece_length_P, padding_R])
    samples = np.concatenate([np.arange(len(piece_length_P)), np.full(num_rows, -1)])
    order = np.argsort(np.concatenate([piece_row_P, np.arange(num_rows)]), kind="stable")
    order = order[lengths[order] > 0]
    lengths = lengths[order]
    ends = np.cumsum(lengths)
    sample_id_T = np.repeat(samples[order], lengths)
    return RowLayout(
        num_rows=num_rows,
        target_N=np.flatnonzero(sample_id_T >= 0),
        position_ids_T=np.arange(len(sample_id_T)) - np.repeat(ends - lengths, lengths),
        sample_id_T=sample_id_T,
        cu_seqlens=np.concatenate([[0], ends]).astype(np.int32),
        max_seqlen=int(lengths.max()) if len(lengths) else 0,
    )


def assemble(
    columns: Mapping[str, Tensor], layout: RowLayout, pad_values: Mapping[str, Any] | None = None
) -> PackedBatch:
    """Puts the concatenated tokens of the pieces into their places.

    Args:
        columns: `input_ids` (N,), `labels` (N,) and any token fields (N, ...), in the order of the pieces.
        layout: From `lay_out`.
        pad_values: Pad value by name of the field; 0 where nothing is said, -100 for labels.
    """
    pads: dict[str, Any] = {"labels": IGNORED_LABEL, **(pad_values or {})}
    total, used = len(layout.sample_id_T), len(layout.target_N)
    target_N = torch.from_numpy(layout.target_N)
    placed = {}
    for name, value in columns.items():
        if used == total:
            placed[name] = value
            continue
        placed[name] = value.new_full((total, *value.shape[1:]), pads.get(name, 0))
        placed[name][target_N.to(value.device)] = value
    labels = placed.pop("labels")
    device = labels.device
    return PackedBatch(
        input_ids=placed.pop("input_ids"),
        labels=labels,
        position_ids=torch.from_numpy(layout.position_ids_T).to(device),
        cu_seqlens=torch.from_numpy(layout.cu_seqlens).to(device),
        sample_id_T=torch.from_numpy(layout.sample_id_T).to(device),
        num_rows=layout.num_rows,
        num_tokens=used,
        num_loss_tokens=int((labels != IGNORED_LABEL).sum()),
        max_seqlen=layout.max_seqlen,
        token_fields=placed,
    )


def concatenate_documents(documents: Sequence[Mapping[str, Tensor]]) -> tuple[dict[str, Tensor], IntArray]:
    """The fields of all documents behind one another, and the document lengths (D,); adds missing `labels`.

    Raises:
        ValueError: If there is no document, documents differ in their fields, or a field differs in length.
    """
    if not documents:
        raise ValueError("packing needs at least one document")
    completed: list[dict[str, Tensor]] = []
    for index, document in enumerate(documents):
        entry = dict(document)
        if "input_ids" not in entry:
            raise ValueError(f"document {index} has no input_ids, only {sorted(entry)}")
        if "labels" not in entry:
            ids = entry["input_ids"]
            entry["labels"] = torch.cat([ids[1:], ids.new_full((min(1, len(ids)),), IGNORED_LABEL)])
        if completed and set(entry) != set(completed[0]):
            raise ValueError(f"documents differ in their fields: {sorted(completed[0])} and {sorted(entry)}")
        for name, value in entry.items():
            if len(value) != len(entry["input_ids"]):
                raise ValueError(
                    f"document {index}: {name} has {len(value)} tokens, input_ids has {len(entry['input_ids'])}"
                )
        completed.append(entry)
    columns = {name: torch.cat([entry[name] for entry in completed]) for name in completed[0]}
    return columns, np.array([len(entry["input_ids"]) for entry in completed], dtype=np.int64)


def token_index(piece_offset_P: NDArray[Any], piece_length_P: NDArray[Any]) -> IntArray:
    """(N,) positions in a flat store of the tokens of pieces that begin at `piece_offset_P`."""
    before_P = np.cumsum(piece_length_P) - piece_length_P
    return np.repeat(piece_offset_P - before_P, piece_length_P) + np.arange(int(piece_length_P.sum()))


def pack_documents(
    documents: Sequence[Mapping[str, Tensor]],
    row_length: int,
    policy: PackingPolicy = "split",
    overlong: OverlongPolicy = "error",
    pad_values: Mapping[str, Any] | None = None,
    rows_multiple_of: int = 1,
) -> PackedBatch:
    """Packs documents with any token fields into as many rows as they need.

    `batch.split(rows)` then gives micro-batches or the shares of the ranks.

    Args:
        documents: Each with `input_ids` (n,), optionally `labels` (n,) already shifted, and any token fields (n, ...).
        row_length: L, tokens per row.
        policy: `split` or `whole`.
        overlong: What `whole` does with a document longer than a row.
        pad_values: Pad value by name of the field; 0 where nothing is said, -100 for labels.
        rows_multiple_of: Adds empty rows (padding only) up to a multiple of this.

    Raises:
        ValueError: For documents that differ in their fields or do not fit.
    """
    columns, length_D = concatenate_documents(documents)
    plan = plan_rows(length_D, row_length, policy, overlong)
    offset_D = np.cumsum(length_D) - length_D
    index_N = torch.from_numpy(token_index(offset_D[plan.piece_document_P] + plan.piece_start_P, plan.piece_length_P))
    num_rows = -(-plan.num_rows // rows_multiple_of) * rows_multiple_of
    layout = lay_out(plan.piece_length_P, plan.piece_row_P, num_rows, row_length)
    return assemble({name: value[index_N.to(value.device)] for name, value in columns.items()}, layout, pad_values)

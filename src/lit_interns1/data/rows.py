"""Rows of tokens: a packing plan over documents of a token store, and the reader that turns rows into batches.

A batch holds, beside the ids and labels, the token field `source_id` (index of the source, −1 on padding) and, for
validation rows, `validation_token_id`: the number of the token in the stream of all validation documents, sources in
their order, documents in the order of their source. The number belongs to a position of a document, not of a row: it
does not change with row length, batch size, ranks, packing or order. The loss at a position has this number; what is
predicted there is the token behind it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lit_interns1.data.packed_batch import IGNORED_LABEL, PackedBatch
from lit_interns1.data.packing import (
    IntArray,
    OverlongPolicy,
    PackingPlan,
    PackingPolicy,
    assemble,
    lay_out,
    plan_rows,
    token_index,
)
from lit_interns1.data.token_store import TokenStore

PAD_VALUES = {"input_ids": 0, "labels": IGNORED_LABEL, "source_id": -1, "validation_token_id": -1}


class Segment(NamedTuple):
    """Consecutive tokens of one validation document.

    Attributes:
        source_id: Index of the source.
        first_token_id: `validation_token_id` of the first token.
        tokens_N: (n,) int64 token ids; the last may be the end-of-text id.
    """

    source_id: int
    first_token_id: int
    tokens_N: IntArray


@dataclass
class SourceRows:
    """The rows that some documents of one source fill.

    Attributes:
        store: The tokens.
        source_id: Index of the source.
        document_D: (D,) which documents of the store, in packing order.
        plan: How they lie in rows; its documents are indices into `document_D`.
        first_token_id_D: (D,) `validation_token_id` of the first token of each document; None for training rows.
    """

    store: TokenStore
    source_id: int
    document_D: IntArray
    plan: PackingPlan
    first_token_id_D: IntArray | None = None

    @staticmethod
    def pack(
        store: TokenStore,
        source_id: int,
        document_D: IntArray,
        row_length: int,
        policy: PackingPolicy,
        overlong: OverlongPolicy,
        first_token_id_D: IntArray | None = None,
    ) -> SourceRows:
        """Packs documents of a store; see `plan_rows` for the arguments and errors."""
        length_D = (store.document_end_D - store.document_start_D)[document_D]
        try:
            plan = plan_rows(length_D, row_length, policy, overlong)
        except ValueError as error:
            raise ValueError(f"source {store.metadata['name']!r}: {error}") from None
        return SourceRows(store, source_id, document_D, plan, first_token_id_D)

    def pieces(self, row: int) -> tuple[IntArray, IntArray, IntArray]:
        """(P,) offset in the store, length, and end of the document in the store, for each piece of a row."""
        span = slice(int(self.plan.first_piece_R[row]), int(self.plan.first_piece_R[row + 1]))
        document_P = self.document_D[self.plan.piece_document_P[span]]
        end_P = self.store.document_end_D[document_P]
        start_P = np.where(document_P > 0, self.store.document_end_D[document_P - 1], 0)
        return start_P + self.plan.piece_start_P[span], self.plan.piece_length_P[span], end_P

    def tokens(self, row: int) -> IntArray:
        """(n,) token ids of a row without padding."""
        offset_P, length_P, _ = self.pieces(row)
        return self.store.tokens_N[token_index(offset_P, length_P)].astype(np.int64)

    def token_ids(self, row: int) -> IntArray:
        """(n,) `validation_token_id` of the tokens of a row."""
        if self.first_token_id_D is None:
            raise ValueError("training rows have no validation_token_id")
        span = slice(int(self.plan.first_piece_R[row]), int(self.plan.first_piece_R[row + 1]))
        first_P = self.first_token_id_D[self.plan.piece_document_P[span]] + self.plan.piece_start_P[span]
        return token_index(first_P, self.plan.piece_length_P[span])

    def segments(self) -> Iterator[Segment]:
        """The tokens of all rows as the longest runs of consecutive tokens, by document."""
        if self.first_token_id_D is None:
            raise ValueError("training rows have no validation_token_id")
        plan = self.plan
        order = np.lexsort((plan.piece_start_P, plan.piece_document_P))
        document_P, start_P = plan.piece_document_P[order], plan.piece_start_P[order]
        end_P = start_P + plan.piece_length_P[order]
        begins_P = np.ones(len(order), dtype=bool)
        begins_P[1:] = (document_P[1:] != document_P[:-1]) | (start_P[1:] != end_P[:-1])
        first = np.flatnonzero(begins_P)
        last = np.append(first[1:], len(order)) - 1
        for i, j in zip(first.tolist(), last.tolist(), strict=True):
            tokens = self.store.document(int(self.document_D[document_P[i]]))[int(start_P[i]) : int(end_P[j])]
            first_id = int(self.first_token_id_D[document_P[i]] + start_P[i])
            yield Segment(self.source_id, first_id, tokens.astype(np.int64))


class RowReader:
    """Makes batches of rows of several sources.

    Args:
        sources: The rows of each source.
        row_length: L, tokens per row.
    """

    def __init__(self, sources: Sequence[SourceRows], row_length: int) -> None:
        self.sources, self.row_length = list(sources), row_length
        self._with_token_ids = any(source.first_token_id_D is not None for source in self.sources)

    def read(
        self, rows: Sequence[tuple[int, int]], num_rows: int | None = None, first: int | None = None
    ) -> PackedBatch:
        """A batch of rows, in the order given.

        Args:
            rows: (index of the source, row of that source) of each row.
            num_rows: Adds rows of padding up to this number.
            first: Number of the first row in the global order; text does not depend on it.
        """
        num_rows = len(rows) if num_rows is None else num_rows
        columns: dict[str, list[NDArray[Any]]] = {name: [] for name in ("input_ids", "labels", "source_id")}
        if self._with_token_ids:
            columns["validation_token_id"] = []
        lengths: list[IntArray] = []
        piece_rows: list[int] = []
        for position, (source_index, row) in enumerate(rows):
            source = self.sources[source_index]
            offset_P, length_P, end_P = source.pieces(row)
            index_N = token_index(offset_P, length_P)
            tokens_N = source.store.tokens_N
            labels = tokens_N[np.minimum(index_N + 1, len(tokens_N) - 1)].astype(np.int64)
            labels[index_N + 1 == np.repeat(end_P, length_P)] = IGNORED_LABEL
            columns["input_ids"].append(tokens_N[index_N].astype(np.int64))
            columns["labels"].append(labels)
            columns["source_id"].append(np.full(len(index_N), source.source_id, dtype=np.int64))
            if self._with_token_ids:
                columns["validation_token_id"].append(source.token_ids(row))
            lengths.append(length_P)
            piece_rows += [position] * len(length_P)
        empty = np.zeros(0, dtype=np.int64)
        layout = lay_out(
            np.concatenate([empty, *lengths]), np.array(piece_rows, dtype=np.int64), num_rows, self.row_length
        )
        tensors = {name: torch.from_numpy(np.concatenate([empty, *parts])) for name, parts in columns.items()}
        return assemble(tensors, layout, PAD_VALUES)

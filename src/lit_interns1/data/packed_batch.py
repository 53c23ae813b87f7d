"""Packed rows: several documents side by side in rows of equal length, without padding between them.

Tensors are flat over the tokens of the micro-batch (suffix T: rows × row length): attention, the router and the loss
see documents, not rows. A row boundary is always a document boundary: a document that is longer than its row is cut
there, and its remainder counts as a document of its own (see `packing`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from lit_interns1.nn.media import MediaItems

IGNORED_LABEL = -100
"""Label of a position without loss."""

INDEX_FIELDS = frozenset({"pair_ids"})
"""Token fields that number things within a batch; negative = none. Like sample ids, they stay distinct when batches are
put behind one another."""


@dataclass
class PackedBatch:
    """One micro-batch of packed rows.

    Attributes:
        input_ids: (T,) int64 token ids.
        labels: (T,) int64, the token to be predicted *at* each position, i.e. the next token of the same document
            (already shifted); -100 where there is no loss.
        position_ids: (T,) int64, restarting at 0 in every document.
        cu_seqlens: (D+1,) int32, cumulative document lengths: starts with 0, ends with T.
        sample_id_T: (T,) int64, which sample (document) of the micro-batch a token belongs to, 0-based; -1 = padding.
        num_rows: Rows in this micro-batch.
        num_tokens: Consumed tokens: T without padding.
        num_loss_tokens: Positions with a label.
        max_seqlen: Longest segment of `cu_seqlens`, in tokens (the padding at the end of a row is a segment too).
        token_fields: Any other per-token tensors (T, ...) by name: `validation_token_id`, rollout log-probs,
            advantages, `routed_experts` (T, L, K), modality, …
        media: Images and signals by kind, in the order of their placeholder tokens.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    sample_id_T: Tensor
    num_rows: int
    num_tokens: int
    num_loss_tokens: int
    max_seqlen: int
    token_fields: dict[str, Tensor] = field(default_factory=dict)
    media: dict[str, MediaItems] = field(default_factory=dict)

    def __post_init__(self) -> None:
        length = self.input_ids.numel()
        per_token = {"labels": self.labels, "position_ids": self.position_ids, "sample_id_T": self.sample_id_T}
        for name, value in {**per_token, **self.token_fields}.items():
            if value.shape[0] != length:
                raise ValueError(f"PackedBatch: {name} has {value.shape[0]} tokens, input_ids has {length}")

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.input_ids.device

    def _map(self, function: Any) -> PackedBatch:
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        mapped = {name: function(value) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(
            self, **mapped, token_fields={name: function(value) for name, value in self.token_fields.items()},
            media={kind: items.map(function) for kind, items in self.media.items()},
        )  # fmt: skip

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """A copy on `device` (what Lightning calls to move a batch)."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """A copy in page-locked memory (what the DataLoader calls)."""
        return self._map(lambda tensor: tensor.pin_memory())

    @staticmethod
    def concatenate(rows: Sequence[PackedBatch]) -> PackedBatch:
        """Puts packed rows behind one another; sample ids stay distinct. The collate function of the kit."""
        if not rows:
            raise ValueError("PackedBatch.concatenate needs at least one row")
        names = set(rows[0].token_fields)
        for row in rows[1:]:
            if set(row.token_fields) != names:
                raise ValueError(f"rows differ in their token fields: {sorted(names)} and {sorted(row.token_fields)}")
        lengths, sample_ids = [rows[0].cu_seqlens[:1]], []
        media: dict[str, list[tuple[MediaItems, int]]] = {}
        tokens = samples = before = 0
        for row in rows:
            for kind, items in row.media.items():
                media.setdefault(kind, []).append((items, before))
            before += row.num_rows
            lengths.append(row.cu_seqlens[1:] + tokens)
            sample_ids.append(torch.where(row.sample_id_T >= 0, row.sample_id_T + samples, row.sample_id_T))
            tokens += row.input_ids.numel()
            samples += int(row.sample_id_T.max()) + 1 if row.sample_id_T.numel() else 0
        return PackedBatch(
            input_ids=torch.cat([row.input_ids for row in rows]),
            labels=torch.cat([row.labels for row in rows]),
            position_ids=torch.cat([row.position_ids for row in rows]),
            cu_seqlens=torch.cat(lengths),
            sample_id_T=torch.cat(sample_ids),
            num_rows=sum(row.num_rows for row in rows),
            num_tokens=sum(row.num_tokens for row in rows),
            num_loss_tokens=sum(row.num_loss_tokens for row in rows),
            max_seqlen=max(row.max_seqlen for row in rows),
            token_fields={name: _joined(name, [row.token_fields[name] for row in rows]) for name in names},
            media={kind: MediaItems.joined(*zip(*parts, strict=True)) for kind, parts in media.items()},
        )

    @staticmethod
    def from_documents(
        documents: Sequence[Mapping[str, Tensor]],
        row_length: int | None = None,
        pad_values: Mapping[str, Any] | None = None,
    ) -> PackedBatch:
        """Packs whole documents, in the order given, into one row (padded to `row_length` if that is given).

        For many rows, and for documents longer than a row, see `lit_interns1.data.packing.pack_documents`.

        Args:
            documents: Each with `input_ids` (n,), optionally `labels` (n,) already shifted, and any token fields
                (n, ...), the same names in every document. Without `labels`, the next token of the document.
            row_length: Length of the row; padding takes `pad_values` and no loss.
            pad_values: Pad value by name of the field; 0 where nothing is said, -100 for labels.

        Raises:
            ValueError: If the documents are longer than the row, or differ in their fields.
        """
        from lit_interns1.data.packing import assemble, concatenate_documents, lay_out

        columns, length_D = concatenate_documents(documents)
        used = int(length_D.sum())
        if row_length is not None and row_length < used:
            raise ValueError(f"documents of {used} tokens do not fit into a row of {row_length}")
        layout = lay_out(length_D, length_D * 0, num_rows=1, row_length=used if row_length is None else row_length)
        return assemble(columns, layout, pad_values)

    @property
    def row_length(self) -> int:
        """Tokens of one row, padding included."""
        return self.input_ids.numel() // self.num_rows

    def as_rows(self) -> dict[str, Tensor]:
        """`input_ids`, `labels` and `position_ids` as (rows, row length) views, for modules that know no packed rows.

        A foreign module that takes no document boundaries attends across the documents of a row; the labels are
        already shifted, so they are compared with the logits of the same position.
        """
        names = ("input_ids", "labels", "position_ids")
        return {name: getattr(self, name).view(self.num_rows, self.row_length) for name in names}

    def split(self, rows_per_part: int) -> list[PackedBatch]:
        """The same rows as several batches of `rows_per_part` rows: micro-batches, or the shares of the ranks.

        Raises:
            ValueError: If the rows do not divide.
        """
        if rows_per_part < 1 or self.num_rows % rows_per_part:
            raise ValueError(f"rows_per_part={rows_per_part} does not divide the {self.num_rows} rows of this batch")
        size = rows_per_part * self.row_length
        parts = []
        for part, first in enumerate(range(0, self.input_ids.numel(), size)):
            rows = part * rows_per_part, (part + 1) * rows_per_part
            media = {kind: items.of_rows(*rows) for kind, items in self.media.items()}
            span = slice(first, first + size)
            inside = (self.cu_seqlens >= first) & (self.cu_seqlens <= first + size)
            cu_seqlens = self.cu_seqlens[inside] - first
            sample_id_T = self.sample_id_T[span]
            real_T = sample_id_T >= 0
            offset = sample_id_T[real_T].min() if bool(real_T.any()) else 0
            labels = self.labels[span]
            parts.append(
                PackedBatch(
                    input_ids=self.input_ids[span],
                    labels=labels,
                    position_ids=self.position_ids[span],
                    cu_seqlens=cu_seqlens,
                    sample_id_T=torch.where(real_T, sample_id_T - offset, sample_id_T),
                    num_rows=rows_per_part,
                    num_tokens=int(real_T.sum()),
                    num_loss_tokens=int((labels != IGNORED_LABEL).sum()),
                    max_seqlen=int(cu_seqlens.diff().max()),
                    token_fields={name: value[span] for name, value in self.token_fields.items()},
                    media={kind: items for kind, items in media.items() if items is not None},
                )
            )
        return parts


def _joined(name: str, values: Sequence[Tensor]) -> Tensor:
    """A token field of several batches behind one another."""
    if name not in INDEX_FIELDS:
        return torch.cat(list(values))
    shifted, used = [], 0
    for value in values:
        shifted.append(torch.where(value >= 0, value + used, value))
        used += int(value.max()) + 1 if value.numel() else 0
    return torch.cat(shifted)

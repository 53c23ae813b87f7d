"""Packed rows: several documents side by side in rows of equal length, without padding between them.

Tensors are flat over the tokens of the micro-batch (suffix T: rows × row length): attention, the router and the loss
see documents, not rows. A row boundary is always a document boundary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

IGNORED_LABEL = -100
"""Label of a position without loss."""


@dataclass(frozen=True)
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
        max_seqlen: Longest document, in tokens.
        token_fields: Any other per-token tensors (T, ...) by name: `validation_token_id`, rollout log-probs,
            advantages, `routed_experts` (T, L, K), modality, …
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
        mapped = {f.name: function(getattr(self, f.name)) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **mapped, token_fields={name: function(value) for name, value in self.token_fields.items()})

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
        tokens = samples = 0
        for row in rows:
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
            token_fields={name: torch.cat([row.token_fields[name] for row in rows]) for name in names},
        )

    @staticmethod
    def from_documents(
        documents: Sequence[Mapping[str, Tensor]], row_length: int | None = None, pad_values: Mapping[str, Any] | None = None
    ) -> PackedBatch:
        """Packs whole documents, in the order given, into one row (padded to `row_length` if that is given).

        Args:
            documents: Each with `input_ids` (n,), optionally `labels` (n,) already shifted, and any token fields
                (n, ...), the same names in every document. Without `labels`, the next token of the document.
            row_length: Length of the row; padding takes `pad_values` and no loss.
            pad_values: Pad value by name of the field; 0 where nothing is said, -100 for labels.

        Raises:
            ValueError: If the documents are longer than the row, or differ in their fields.
        """
        if not documents:
            raise ValueError("from_documents needs at least one document")
        pads: dict[str, Any] = {"labels": IGNORED_LABEL, **(pad_values or {})}
        completed = []
        for document in documents:
            entry = dict(document)
            if "labels" not in entry:
                entry["labels"] = torch.cat([entry["input_ids"][1:], entry["input_ids"].new_full((1,), IGNORED_LABEL)])
            if completed and set(entry) != set(completed[0]):
                raise ValueError(f"documents differ in their fields: {sorted(completed[0])} and {sorted(entry)}")
            completed.append(entry)
        lengths = [entry["input_ids"].numel() for entry in completed]
        used = sum(lengths)
        padding = 0 if row_length is None else row_length - used
        if padding < 0:
            raise ValueError(f"documents of {used} tokens do not fit into a row of {row_length}")
        columns = {name: torch.cat([entry[name] for entry in completed]) for name in completed[0]}
        if padding:
            for name, value in columns.items():
                fill = value.new_full((padding, *value.shape[1:]), pads.get(name, 0))
                columns[name] = torch.cat([value, fill])
        segments = lengths + ([padding] if padding else [])
        samples = [torch.full((n,), i if i < len(lengths) else -1, dtype=torch.int64) for i, n in enumerate(segments)]
        labels = columns.pop("labels")
        return PackedBatch(
            input_ids=columns.pop("input_ids"),
            labels=labels,
            position_ids=torch.cat([torch.arange(n) for n in segments]),
            cu_seqlens=torch.tensor([0, *segments]).cumsum(0).to(torch.int32),
            sample_id_T=torch.cat(samples),
            num_rows=1,
            num_tokens=used,
            num_loss_tokens=int((labels != IGNORED_LABEL).sum()),
            max_seqlen=max(segments),
            token_fields=columns,
        )

"""Images with captions, for contrastive training, in a fixed global order.

    conversation with one image and one answer → pair (patches, tokens of the answer) → row → global order → ranks

A row is one pair. A contrastive loss compares all pairs of a step with one another, so the rows of a step are not dealt
out in micro-batches: every rank gets its B / W pairs at once. (`VisionEncoderModule(pairs_per_pass=...)` saves memory
without changing the loss.) Captions are tokenised when the run begins; images are opened when a row is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from lit_interns1.data.conversation_data_module import check_patches
from lit_interns1.data.conversation_media import ImageTransform, Item, NativeVisuals, Visuals
from lit_interns1.data.conversation_rows import ConversationFormat
from lit_interns1.data.conversations import Conversation, Conversations, ConversationSource
from lit_interns1.data.media_tokens import tokens_of_style
from lit_interns1.data.order import permutation
from lit_interns1.data.packed_batch import IGNORED_LABEL, PackedBatch
from lit_interns1.data.packing import IntArray, PackingPlan, assemble, lay_out
from lit_interns1.data.rows import PAD_VALUES
from lit_interns1.data.source_data_module import SourceDataModule
from lit_interns1.data.sources import SourceError
from lit_interns1.data.tokenizer import TextTokenizer
from lit_interns1.nn.media import MediaItems

CAPTION_KEY = "caption_key"
"""Token field: a number of the caption that a token belongs to, equal for equal captions; −1 on padding."""


def caption_of(conversation: Conversation) -> str:
    """The caption of a conversation with one image and one answer; what is asked does not matter.

    Raises:
        SourceError: If it is not of that form.
    """
    kinds = [part.kind for part in conversation.media]
    answers = [message for message in conversation.messages if message.role == "assistant"]
    if kinds != ["image"] or len(answers) != 1:
        raise SourceError(
            f"{conversation.where}: a pair has one image and one message of the assistant, its caption; got "
            f"{', '.join(kinds) or 'no media'} and {len(answers)} message(s)"
        )
    return "".join(part.value for part in answers[0].parts)


@dataclass
class CaptionRows:
    """The pairs of one source.

    Attributes:
        conversations: The source, for the images.
        tokens_N: (N,) int32, all captions behind one another.
        end_D: (D,) end of each caption there.
        key_D: (D,) number of each caption, equal for equal ones.
        document_D: (D,) which pairs, in the order of rows.
        plan: One pair a row; its documents are indices into `document_D`.
    """

    conversations: Conversations
    tokens_N: NDArray[np.int32]
    end_D: IntArray
    key_D: IntArray
    document_D: IntArray
    plan: PackingPlan


class CaptionReader:
    """Makes batches of pairs of several sources.

    Args:
        sources: The pairs of each source.
        form: How images are read.
        row_length: L, most tokens of a caption.
    """

    def __init__(self, sources: Sequence[CaptionRows], form: ConversationFormat, row_length: int) -> None:
        self.sources, self.form, self.row_length = list(sources), form, row_length

    def read(
        self, rows: Sequence[tuple[int, int]], num_rows: int | None = None, first: int | None = None
    ) -> PackedBatch:
        """A batch of rows; see `loader.ReadsRows`. Random changes depend on the seed and the number of the row."""
        num_rows = len(rows) if num_rows is None else num_rows
        tokens: list[NDArray[np.int64]] = [np.zeros(0, dtype=np.int64)]
        images: list[Item] = []
        sources, keys = [], []
        for position, (index, row) in enumerate(rows):
            source = self.sources[index]
            document = int(source.document_D[row])
            start = int(source.end_D[document - 1]) if document else 0
            length = int(source.plan.piece_length_P[row])
            tokens.append(source.tokens_N[start : start + length].astype(np.int64))
            sources.append(index)
            keys.append(int(source.key_D[document]))
            random = None if first is None else np.random.default_rng([self.form.seed % 2**64, first + position])
            ((_, item),) = self.form.items(source.conversations.read(document), random)
            images.append(item)
        lengths = np.array([len(part) for part in tokens[1:]], dtype=np.int64)
        ids = torch.from_numpy(np.concatenate(tokens))
        columns = {
            "input_ids": ids,
            "labels": torch.full_like(ids, IGNORED_LABEL),
            "source_id": torch.from_numpy(np.repeat(np.array(sources, dtype=np.int64), lengths)),
            CAPTION_KEY: torch.from_numpy(np.repeat(np.array(keys, dtype=np.int64), lengths)),
        }
        layout = lay_out(lengths, np.arange(len(rows)), num_rows, self.row_length)
        batch = assemble(columns, layout, {**PAD_VALUES, CAPTION_KEY: -1})
        if images:
            facts = [item.facts for item in images]
            batch.media["image"] = MediaItems.of([item.values for item in images], facts, list(range(len(images))))
        return batch


class CaptionDataModule(SourceDataModule):
    """Pairs of an image and a caption as `PackedBatch`es with one caption a row.

    Args:
        sources: What to train on: paths of JSONL files, bundled sets, or `ConversationSource`s, each conversation with
            one image and one answer, the caption.
        validation_sources: What to validate on; None = nothing.
        tokenizer: As for `TextDataModule`.
        visuals: How images are read: `NativeVisuals` (Intern-S1-Pro; the default) or `TiledVisuals` (Intern-S1).
        transform: A random change of training images, such as `RandomAffine`.
        row_length: L, most tokens of a caption.
        global_batch_size: B, pairs per optimizer step over all ranks; a multiple of the ranks.
        validation_rows: Validate on at most this many pairs.
        validation_batch_size: Pairs per rank and forward pass in validation.
        overlong: A caption longer than L: `error`, or `cut` to its first L tokens.
        seed: Seed of order and `transform`.
        num_workers: Processes per rank that read ahead; 0 = read in the training process.
        pin_memory: As for `TextDataModule`.
        block_rows: As for `TextDataModule`.
        end_of_text: As for `TextDataModule`.

    Raises:
        ValueError: For an option out of its range, by name. What cannot be read raises `SourceError` or `MediaError`,
            with file and line.
    """

    def __init__(
        self,
        sources: list[str | ConversationSource] | str,
        validation_sources: list[str | ConversationSource] | str | None = None,
        tokenizer: str | TextTokenizer = "bundled:tokenizer",
        visuals: Visuals | None = None,
        transform: ImageTransform | None = None,
        row_length: int = 64,
        global_batch_size: int = 64,
        validation_rows: int | None = None,
        validation_batch_size: int = 64,
        overlong: Literal["error", "cut"] = "error",
        seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        block_rows: int = 1024,
        end_of_text: str | None = None,
    ) -> None:
        super().__init__(
            ConversationSource, sources, validation_sources, tokenizer, end_of_text, row_length=row_length,
            global_batch_size=global_batch_size, micro_batch_size=global_batch_size, validation_rows=validation_rows,
            seed=seed, num_workers=num_workers, pin_memory=pin_memory, block_rows=block_rows,
        )  # fmt: skip
        if overlong not in ("error", "cut"):
            raise ValueError(f"overlong={overlong!r} is unknown; choose one of 'error', 'cut'")
        if validation_batch_size < 1:
            raise ValueError(f"validation_batch_size must be at least 1, got {validation_batch_size}")
        self.visuals, self.transform, self.overlong = visuals or NativeVisuals(), transform, overlong
        self.validation_batch_size = validation_batch_size

    def _make_form(self, tokenizer: TextTokenizer) -> ConversationFormat:
        return ConversationFormat(tokenizer, tokens_of_style("pro"), self.visuals, None, self.transform, self.seed)

    def setup(self, stage: str | None = None) -> None:
        """Plans rows and order; every rank takes its part of a step at once.

        Raises:
            ValueError: If B is not a multiple of the ranks, or there are too few pairs.
        """
        ranks = self.data_parallel_size
        if self.global_batch_size % ranks:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} is not a multiple of the {ranks} data-parallel ranks, "
                "which each take a part of its pairs"
            )
        self.micro_batch_size = self.global_batch_size // ranks
        super().setup(stage)

    def val_dataloader(self) -> Any:
        """Every validation pair once over all ranks; an empty list if there is nothing to validate on."""
        training, self.micro_batch_size = self.micro_batch_size, self.validation_batch_size
        try:
            return super().val_dataloader()
        finally:
            self.micro_batch_size = training

    def check_vision(self, vision: Any) -> None:
        """Raises ValueError if an image encoder (its config) takes other patches than `visuals` makes."""
        check_patches(self.visuals, vision)

    # inside

    def _open(self, source: ConversationSource) -> tuple[Conversations, list[list[int]], IntArray]:
        """The source, its captions as tokens, and their keys."""
        if source not in self._opened:
            conversations = source.open()
            captions = [caption_of(conversations.read(index)) for index in range(len(conversations))]
            ids = self.tokenizer.encode_batch(captions)
            digests = (hashlib.blake2b(caption.encode(), digest_size=8).digest() for caption in captions)
            keys = np.array([int.from_bytes(digest, "big") >> 1 for digest in digests], dtype=np.int64)
            if not all(ids):
                where = conversations.read([bool(entry) for entry in ids].index(False)).where
                raise SourceError(f"{where}: the caption has no token")
            self._opened[source] = conversations, ids, keys
        return self._opened[source]

    def _rows(self, source: ConversationSource) -> CaptionRows:
        conversations, ids, key_D = self._open(source)
        length_D = np.array([len(entry) for entry in ids], dtype=np.int64)
        if self.overlong == "error" and length_D.max() > self.row_length:
            longest = int(np.argmax(length_D))
            raise ValueError(
                f"{conversations.read(longest).where}: the caption has {int(length_D.max())} tokens, more than "
                f"row_length={self.row_length} ({int((length_D > self.row_length).sum())} of {len(length_D)} are too "
                "long); raise row_length, or set overlong='cut'"
            )
        document_D = permutation(len(ids), self.seed, 5)
        pieces = np.arange(len(ids))
        plan = PackingPlan(
            self.row_length, pieces, np.zeros_like(pieces), np.minimum(length_D, self.row_length)[document_D],
            np.arange(len(ids) + 1),
        )  # fmt: skip
        tokens_N = np.concatenate([np.array(entry, dtype=np.int32) for entry in ids])
        return CaptionRows(conversations, tokens_N, np.cumsum(length_D), key_D, document_D, plan)

    def _make_reader(self, rows: list[CaptionRows]) -> CaptionReader:
        return CaptionReader(rows, self.form, self.row_length)

    def _identity(self) -> dict[str, Any]:
        return {
            "sources": {source.display_name: [self._open(source)[0].key, source.weight] for source in self.sources},
            "tokenizer": self.tokenizer.fingerprint,
            "visuals": str(self.visuals),
            "row_length": self.row_length,
            "overlong": self.overlong,
            "transform": str(self.transform),
            "seed": self.seed,
            "block_rows": self.block_rows,
        }

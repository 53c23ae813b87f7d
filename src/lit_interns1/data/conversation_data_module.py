"""From conversations with images, videos and signals to packed batches in a fixed global order.

    JSONL → tokens and numbers of vectors (headers only) → rows of L tokens, conversations whole → global order → ranks

Media are opened and cut when a row is read, in the workers. A random change of an image depends on (seed, number of the
row in the global order, place in the row), so a resumed run sees the same pixels.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lit_interns1.data.conversation_media import ImageTransform, NativeVisuals, Visuals
from lit_interns1.data.conversation_rows import ConversationFormat, ConversationReader, ConversationRows, build_store
from lit_interns1.data.conversations import ConversationSource
from lit_interns1.data.media.signals import TimeSeriesProcessor
from lit_interns1.data.media_tokens import MediaTokens, token_id, tokens_of_style, with_media_tokens
from lit_interns1.data.order import permutation
from lit_interns1.data.packing import plan_rows
from lit_interns1.data.source_data_module import SourceDataModule
from lit_interns1.data.token_store import DEFAULT_CACHE_FOLDER
from lit_interns1.data.tokenizer import TextTokenizer


def check_patches(visuals: Visuals, vision: Any) -> None:
    """Raises ValueError if an image encoder (its config) takes other patches than `visuals` makes."""
    ours = (visuals.patch_values, visuals.merge_size)
    theirs = (vision.patch_values, vision.merge_size)
    if ours != theirs:
        raise ValueError(
            f"{type(visuals).__name__} makes patches of {ours[0]} numbers, merged {ours[1]} × {ours[1]}; the vision "
            f"encoder takes {theirs[0]}, merged {theirs[1]} × {theirs[1]}: patch_size, temporal_patch_size and "
            "merge_size must agree"
        )


class ConversationDataModule(SourceDataModule):
    """Conversations as `PackedBatch`es with media.

    Args:
        sources: What to train on: paths of JSONL files, bundled sets, or `ConversationSource`s.
        validation_sources: What to validate on; None = nothing.
        tokenizer: As for `TextDataModule`. Tokens for turns and media that it lacks are added behind its vocabulary.
        visuals: How images and videos are read: `NativeVisuals` (Intern-S1-Pro; the default) or `TiledVisuals`
            (Intern-S1).
        signals: How time series are read.
        media_tokens: Names of the tokens for turns and media: "pro", "s1", or a `MediaTokens`.
        transform: A random change of training images, such as `RandomAffine`.
        row_length: L, tokens per row.
        global_batch_size: B, rows per optimizer step over all ranks and accumulated micro-batches.
        micro_batch_size: m, rows per rank and forward pass.
        validation_rows: Validate on at most this many rows.
        overlong: A conversation longer than a row: `error`, or `skip` (left out, with a warning that counts them).
        read_media: Read all pixels and points once before training, so that damaged ones are found first. Otherwise
            only headers are read then.
        seed: Seed of packing, order and `transform`.
        num_workers: Processes per rank that read ahead; 0 = read in the training process.
        pin_memory: As for `TextDataModule`.
        cache_dir: Where tokens are kept.
        block_rows: As for `TextDataModule`.
        end_of_text: As for `TextDataModule`.

    Raises:
        ValueError: For an option out of its range, by name. What cannot be read raises `SourceError` or `MediaError` in
            `prepare_data`, with file, line and field.
    """

    def __init__(
        self,
        sources: list[str | ConversationSource] | str,
        validation_sources: list[str | ConversationSource] | str | None = None,
        tokenizer: str | TextTokenizer = "bundled:tokenizer",
        visuals: Visuals | None = None,
        signals: TimeSeriesProcessor | None = None,
        media_tokens: str | MediaTokens = "pro",
        transform: ImageTransform | None = None,
        row_length: int = 512,
        global_batch_size: int = 32,
        micro_batch_size: int = 8,
        validation_rows: int | None = None,
        overlong: Literal["error", "skip"] = "error",
        read_media: bool = False,
        seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        cache_dir: str | Path = DEFAULT_CACHE_FOLDER,
        block_rows: int = 1024,
        end_of_text: str | None = None,
    ) -> None:
        super().__init__(
            ConversationSource, sources, validation_sources, tokenizer, end_of_text, row_length=row_length,
            global_batch_size=global_batch_size, micro_batch_size=micro_batch_size, validation_rows=validation_rows,
            seed=seed, num_workers=num_workers, pin_memory=pin_memory, block_rows=block_rows,
        )  # fmt: skip
        if overlong not in ("error", "skip"):
            raise ValueError(f"overlong={overlong!r} is unknown; choose 'error' or 'skip'")
        self.visuals, self.signals = visuals or NativeVisuals(), signals or TimeSeriesProcessor()
        self.media_tokens, self.transform = tokens_of_style(media_tokens), transform
        self.overlong, self.read_media, self.cache_dir = overlong, read_media, Path(cache_dir)
        self.skipped = 0

    def _make_form(self, tokenizer: TextTokenizer) -> ConversationFormat:
        return ConversationFormat(
            with_media_tokens(tokenizer, self.media_tokens), self.media_tokens, self.visuals, self.signals,
            self.transform, self.seed,
        )  # fmt: skip

    def prepare_data(self) -> None:
        """Renders all conversations that the cache lacks; opens the headers of their media."""
        for source in self.all_sources:
            self._open(source)

    def check_model(self, config: Any) -> None:
        """Compares what the data hold with what a model takes.

        Args:
            config: A `MultimodalConfig`.

        Raises:
            ValueError: If the model lacks an encoder that is needed, or has another placeholder or other patches.
        """
        for kind in self._kinds():
            name = self.media_tokens.placeholders[kind]
            index = token_id(self.tokenizer, name)
            if kind not in config.token_ids:
                raise ValueError(
                    f"the conversations hold media of the kind {kind}, the model takes "
                    f"{', '.join(config.token_ids) or 'text only'}: set {kind}_token_id={index} and its encoder"
                )
            if config.token_ids[kind] != index:
                raise ValueError(
                    f"{kind}_token_id={config.token_ids[kind]} of the model differs from the tokenizer's {name!r}, "
                    f"which has the id {index}: set {kind}_token_id={index}"
                )
            if kind in ("image", "video"):
                check_patches(self.visuals, config.vision)

    # inside

    def _kinds(self) -> list[str]:
        stores = [self._open(source)[1] for source in self.all_sources]
        return sorted({kind for store in stores for kind in store.kinds})

    def _open(self, source: ConversationSource) -> tuple[Any, Any]:
        if source not in self._opened:
            conversations = source.open()
            store = build_store(conversations, self.form, self.cache_dir, self.read_media)
            self._opened[source] = conversations, store
        return self._opened[source]

    def _plan(self) -> None:
        self.skipped = 0
        super()._plan()
        if self.skipped:
            warnings.warn(
                f"{self.skipped} conversations are longer than row_length={self.row_length} and are left out",
                stacklevel=2,
            )

    def _make_reader(self, rows: list[ConversationRows]) -> ConversationReader:
        return ConversationReader(rows, self.form, self.row_length)

    def _rows(self, source: ConversationSource) -> ConversationRows:
        """Conversations in a random order, so that files sorted by class give mixed rows."""
        conversations, store = self._open(source)
        document_D = permutation(len(store.end_D), self.seed, 5)
        length_D = np.diff(store.end_D, prepend=0)[document_D]
        if self.overlong == "skip":
            fits = length_D <= self.row_length
            self.skipped += int((~fits).sum())
            document_D, length_D = document_D[fits], length_D[fits]
            if not len(document_D):
                raise ValueError(
                    f"source {source.display_name!r}: all {len(store.end_D)} conversations are longer than "
                    f"row_length={self.row_length}; raise it"
                )
        elif (length_D > self.row_length).any():
            longest = int(document_D[np.argmax(length_D)])
            raise ValueError(
                f"{conversations.read(longest).where}: the conversation has {int(length_D.max())} tokens, more than "
                f"row_length={self.row_length} ({int((length_D > self.row_length).sum())} of {len(length_D)} are too "
                "long); raise row_length, or set overlong='skip'"
            )
        return ConversationRows(conversations, store, document_D, plan_rows(length_D, self.row_length, "whole"))

    def _identity(self) -> dict[str, Any]:
        sources = {
            source.display_name: [self._open(source)[1].content_hash(), source.weight] for source in self.sources
        }
        return {
            "sources": sources,
            "row_length": self.row_length,
            "overlong": self.overlong,
            "transform": str(self.transform),
            "seed": self.seed,
            "block_rows": self.block_rows,
        }

"""From files to packed batches in a fixed global order: the DataModule for language-model training.

    sources -> tokens on disk (once) -> training and validation documents -> rows of L tokens -> global order -> ranks

A document is for validation when a hash of (seed, its text) falls below `validation_fraction`: the choice depends on
the text alone, so a text that occurs twice, even in two sources, is never on both sides.

Optimizer step s consumes rows [s·B, (s+1)·B) of the global order whatever the ranks and the micro-batch; the
accumulation that follows from that is set on the Trainer.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lit_interns1.data.order import IntArray, RowOrder, apportion, mix, permutation
from lit_interns1.data.packing import OverlongPolicy, PackingPolicy, check_policies
from lit_interns1.data.row_data_module import RowDataModule
from lit_interns1.data.rows import RowReader, Segment, SourceRows
from lit_interns1.data.sources import TextSource, named_sources
from lit_interns1.data.token_store import DEFAULT_CACHE_FOLDER, TokenStore, open_or_build
from lit_interns1.data.tokenizer import TextTokenizer, load_tokenizer


class TextDataModule(RowDataModule):
    """Text from files as `PackedBatch`es.

    Args:
        sources: What to train on: paths or `TextSource`s (in YAML a list of paths or of mappings).
        tokenizer: A `tokenizer.json`, a directory, `bundled:tokenizer`, or a loaded `TextTokenizer`.
        row_length: L, tokens per row.
        global_batch_size: B, rows per optimizer step over all ranks and accumulated micro-batches.
        micro_batch_size: m, rows per rank and forward pass, in training and validation.
        validation_fraction: Share of the documents of every source that is kept for validation, in [0, 1).
        validation_sources: Documents to validate on instead; then no training document is held back.
        validation_rows: Validate on at most this many rows, spread over the sources by their size.
        packing: `split` (default: rows are full, a document is cut where its row ends) or `whole` (documents are never
            cut, rows end in padding); see `lit_interns1.data.packing`.
        overlong: What `whole` does with a document longer than a row: `error` or `split`.
        seed: Seed of the validation split and of the global order.
        num_workers: Processes per rank that read ahead; 0 = read in the training process.
        pin_memory: Page-locked batches, for asynchronous copies to a GPU; None = when the Trainer uses CUDA.
        cache_dir: Where tokens are kept; by default `.cache/lit_interns1` in the working directory.
        block_rows: Rows of a block of the global order, inside which the sources are mixed exactly by weight.
        end_of_text: The token that ends each document; by default found among the tokenizer's special tokens.

    Raises:
        ValueError: For an option out of its range, by name. Unreadable sources raise `SourceError` in `prepare_data`.
    """

    def __init__(
        self,
        sources: list[str | TextSource] | str,
        tokenizer: str | TextTokenizer = "bundled:tokenizer",
        row_length: int = 512,
        global_batch_size: int = 32,
        micro_batch_size: int = 8,
        validation_fraction: float = 0.0,
        validation_sources: list[str | TextSource] | str | None = None,
        validation_rows: int | None = None,
        packing: PackingPolicy = "split",
        overlong: OverlongPolicy = "error",
        seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        cache_dir: str | Path = DEFAULT_CACHE_FOLDER,
        block_rows: int = 1024,
        end_of_text: str | None = None,
    ) -> None:
        super().__init__(
            row_length, global_batch_size, micro_batch_size, validation_rows, seed, num_workers, pin_memory, block_rows
        )
        self.sources = named_sources(sources)
        self.validation_sources = None if validation_sources is None else named_sources(validation_sources)
        if not 0 <= validation_fraction < 1:
            raise ValueError(f"validation_fraction must be in [0, 1), got {validation_fraction}")
        if validation_fraction and validation_sources is not None:
            raise ValueError(
                f"give either validation_fraction (got {validation_fraction}) or validation_sources, not both"
            )
        check_policies(packing, overlong)
        self.validation_fraction = validation_fraction
        self.packing, self.overlong = packing, overlong
        self.cache_dir = Path(cache_dir)
        self._tokenizer_option, self._end_of_text = tokenizer, end_of_text
        self._tokenizer: TextTokenizer | None = None
        self._stores: dict[TextSource, TokenStore] = {}

    # what is known before any data is read

    @property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer, loaded when first asked for."""
        if self._tokenizer is None:
            option = self._tokenizer_option
            loaded = option if isinstance(option, TextTokenizer) else load_tokenizer(option, self._end_of_text)
            self._tokenizer = loaded
        return self._tokenizer

    @property
    def source_names(self) -> list[str]:
        """Names of the training sources, in the order of `source_id` in training batches."""
        return [source.display_name for source in self.sources]

    @property
    def validation_source_names(self) -> list[str]:
        """Names in the order of `source_id` in validation batches."""
        return [source.display_name for source in self.validation_sources or self.sources]

    # Lightning's hooks

    def prepare_data(self) -> None:
        """Checks that all sources exist, then tokenises those that the cache lacks."""
        for source in [*self.sources, *(self.validation_sources or [])]:
            source.files()
        for source in [*self.sources, *(self.validation_sources or [])]:
            self._store(source)

    # for reports

    def iter_training_rows(self, rows: int | None = None, first: int = 0) -> Iterator[IntArray]:
        """The (n,) int64 token ids of the global rows first … rows−1, in order, without padding.

        Documents end with the end-of-text id; a row that starts inside a document starts without one.

        Args:
            rows: End of the rows; by default those consumed so far.
            first: Start of the rows.
        """
        reader = self._reader(self._training)
        end = self.rows_consumed if rows is None else rows
        for start in range(first, end, self.block_rows):
            source_N, row_N = self.row_order.rows(start, min(self.block_rows, end - start))
            for source, row in zip(source_N.tolist(), row_N.tolist(), strict=True):
                yield reader.sources[source].tokens(row)

    def iter_validation_documents(self) -> Iterator[Segment]:
        """The validation tokens by document, with source and `validation_token_id`; see `rows.Segment`."""
        for source in self._reader(self._validation).sources:
            yield from source.segments()

    @property
    def num_validation_tokens(self) -> int:
        """Validation tokens that there are; `validation_token_id` is below this, also where `validation_rows` caps."""
        self._reader(self._validation)
        return self._num_validation_tokens

    # inside

    def _store(self, source: TextSource) -> TokenStore:
        if source not in self._stores:
            self._stores[source] = open_or_build(source, self.tokenizer, self.cache_dir)
        return self._stores[source]

    def _plan(self) -> None:
        stores = [self._store(source) for source in self.sources]
        held_back = [self._held_back(store) for store in stores]
        training = []
        for index, (store, held) in enumerate(zip(stores, held_back, strict=True)):
            document_D = np.flatnonzero(~held)
            if not len(document_D):
                raise ValueError(
                    f"source {self.source_names[index]!r}: validation_fraction={self.validation_fraction} leaves none "
                    f"of its {store.num_documents} documents for training"
                )
            training.append(SourceRows.pack(store, index, document_D, self.row_length, self.packing, self.overlong))
        self._training = RowReader(training, self.row_length)
        weights = [source.weight for source in self.sources if source.weight is not None]
        rows = [source.plan.num_rows for source in training]
        self._order = RowOrder(rows, weights or None, self.seed, self.block_rows)
        if self.validation_sources is not None:
            stores = [self._store(source) for source in self.validation_sources]
            self._warn_of_shared_documents(stores)
            held_back = [np.ones(store.num_documents, dtype=bool) for store in stores]
        self._validation = RowReader(self._validation_rows_of(stores, held_back), self.row_length)

    def _held_back(self, store: TokenStore) -> np.ndarray:
        """(D,) which documents are for validation: a uniform hash below the fraction."""
        if self.validation_sources is not None or not self.validation_fraction:
            return np.zeros(store.num_documents, dtype=bool)
        return mix(store.document_hash_D, self.seed, 4) < np.uint64(int(self.validation_fraction * 2.0**64))

    def _validation_rows_of(self, stores: list[TokenStore], held_back: list[np.ndarray]) -> list[SourceRows]:
        listed: list[SourceRows] = []
        token_id = 0
        for index, (store, held) in enumerate(zip(stores, held_back, strict=True)):
            document_D = np.flatnonzero(held)
            if len(document_D):
                length_D = (store.document_end_D - store.document_start_D)[document_D]
                first_D = token_id + np.cumsum(length_D) - length_D
                listed.append(self._pack_validation(store, index, document_D, first_D))
                token_id += int(length_D.sum())
        self._num_validation_tokens = token_id
        if not listed and self.validation_fraction:
            documents = sum(store.num_documents for store in stores)
            raise ValueError(
                f"validation_fraction={self.validation_fraction} selects none of the {documents} documents; raise it, "
                "cut the files into more documents (document_separator, lines), or give validation_sources"
            )
        available = [source.plan.num_rows for source in listed]
        if self.validation_rows is None or self.validation_rows >= sum(available):
            return listed
        share_S = apportion(self.validation_rows, available)
        for empty in np.flatnonzero(share_S == 0).tolist():  # a source without a row would have no metric
            if share_S.max() > 1:
                share_S[np.argmax(share_S)] -= 1
                share_S[empty] += 1
        return [self._cap(source, int(share)) for source, share in zip(listed, share_S, strict=True) if share]

    def _pack_validation(self, store: TokenStore, index: int, document_D: IntArray, first_D: IntArray) -> SourceRows:
        return SourceRows.pack(store, index, document_D, self.row_length, self.packing, self.overlong, first_D)

    def _cap(self, source: SourceRows, rows: int) -> SourceRows:
        """`rows` rows of documents that are drawn at random."""
        assert source.first_token_id_D is not None
        drawn = permutation(len(source.document_D), self.seed, 3, source.source_id)
        length_D = (source.store.document_end_D - source.store.document_start_D)[source.document_D[drawn]]
        enough = int(np.searchsorted(np.cumsum(length_D), rows * self.row_length)) + 1
        drawn = drawn[:enough]
        capped = self._pack_validation(
            source.store, source.source_id, source.document_D[drawn], source.first_token_id_D[drawn]
        )
        capped.plan = capped.plan.first_rows(rows)
        return capped

    def _warn_of_shared_documents(self, validation: list[TokenStore]) -> None:
        hashes = np.concatenate([store.document_hash_D for store in validation])
        for source in self._reader(self._training).sources:
            shared = int(np.isin(source.store.document_hash_D, hashes).sum())
            if shared:
                warnings.warn(
                    f"{shared} documents of the training source {self.source_names[source.source_id]!r} are also in "
                    "validation_sources: the validation loss will be too low",
                    stacklevel=2,
                )

    def _identity(self) -> dict[str, Any]:
        sources: dict[str, Any] = {
            source.display_name: [self._store(source).key, source.weight] for source in self.sources
        }
        return {
            "sources": sources,
            "row_length": self.row_length,
            "packing": self.packing,
            "overlong": self.overlong,
            "validation_fraction": self.validation_fraction,
            "seed": self.seed,
            "block_rows": self.block_rows,
        }

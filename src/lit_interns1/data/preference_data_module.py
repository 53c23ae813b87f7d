"""From preferences between responses to packed batches in a fixed global order.

    JSONL → tokens → rows of L tokens, pairs whole → global order → ranks

Both responses of a pair lie side by side in the same row, so every micro-batch and every rank has whole pairs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, get_args

import numpy as np

from lit_interns1.data.conversation_rows import ConversationFormat
from lit_interns1.data.media_tokens import MediaTokens, tokens_of_style, with_media_tokens
from lit_interns1.data.order import permutation
from lit_interns1.data.packing import plan_rows
from lit_interns1.data.preference_rows import (
    Group,
    Overlong,
    PreferenceReader,
    PreferenceRows,
    PreferenceStore,
    RankingPairs,
    groups_of,
)
from lit_interns1.data.preferences import Preferences, PreferenceSource
from lit_interns1.data.source_data_module import SourceDataModule
from lit_interns1.data.tokenizer import TextTokenizer


class PreferenceDataModule(SourceDataModule):
    """Pairs, rankings or single judged responses as `PackedBatch`es; the token fields are listed in `preference_rows`.

    Args:
        sources: What to train on: paths of JSONL files, bundled sets, or `PreferenceSource`s.
        validation_sources: What to validate on; None = nothing.
        tokenizer: As for `TextDataModule`. If a source holds messages and it lacks the tokens for turns, they are added
            behind its vocabulary.
        media_tokens: Names of the tokens for turns: "pro", "s1", or a `MediaTokens`.
        ranking: Which pairs a ranking gives: "all", or those of "adjacent" places.
        mismatched: Put the response of another line beside every response that stands alone, for KTO's estimate of the
            KL; token field `mismatched`.
        row_length: L, tokens per row. Both responses of a pair, each behind the prompt, must fit.
        global_batch_size: B, rows per optimizer step over all ranks and accumulated micro-batches.
        micro_batch_size: m, rows per rank and forward pass.
        validation_rows: Validate on at most this many rows.
        overlong: What is longer than a row: `error`; `skip` (left out, with a warning that counts); `truncate_prompt`
            (its prompts lose tokens on the left until it fits).
        seed: Seed of packing and order.
        num_workers: Processes per rank that read ahead; 0 = read in the training process.
        pin_memory: As for `TextDataModule`.
        block_rows: As for `TextDataModule`.
        end_of_text: As for `TextDataModule`.

    Raises:
        ValueError: For an option out of its range, by name. What cannot be read raises `SourceError` in `prepare_data`,
            with file and line.
    """

    source_kind: Any = PreferenceSource
    """Class of the sources."""

    def __init__(
        self,
        sources: list[str | PreferenceSource] | str,
        validation_sources: list[str | PreferenceSource] | str | None = None,
        tokenizer: str | TextTokenizer = "bundled:tokenizer",
        media_tokens: str | MediaTokens = "pro",
        ranking: RankingPairs = "all",
        mismatched: bool = False,
        row_length: int = 512,
        global_batch_size: int = 32,
        micro_batch_size: int = 8,
        validation_rows: int | None = None,
        overlong: Overlong = "error",
        seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        block_rows: int = 1024,
        end_of_text: str | None = None,
    ) -> None:
        super().__init__(
            self.source_kind, sources, validation_sources, tokenizer, end_of_text, row_length=row_length,
            global_batch_size=global_batch_size, micro_batch_size=micro_batch_size, validation_rows=validation_rows,
            seed=seed, num_workers=num_workers, pin_memory=pin_memory, block_rows=block_rows,
        )  # fmt: skip
        for name, value, choices in (("ranking", ranking, RankingPairs), ("overlong", overlong, Overlong)):
            if value not in get_args(choices):
                raise ValueError(
                    f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, get_args(choices)))}"
                )
        self.media_tokens = tokens_of_style(media_tokens)
        self.ranking, self.mismatched, self.overlong = ranking, mismatched, overlong
        self._lines: dict[PreferenceSource, Preferences] = {}

    def prepare_data(self) -> None:
        """Reads all sources and makes their tokens, so that whatever is wrong is found now."""
        for source in self.all_sources:
            self._open(source)

    @property
    def skipped(self) -> int:
        """Pairs (or responses) that are longer than a row and were left out."""
        return sum(self._open(source).skipped for source in self.all_sources)

    # inside

    def _make_form(self, tokenizer: TextTokenizer) -> ConversationFormat:
        if any(self._has_turns(self._read(source)) for source in self.all_sources):
            tokenizer = with_media_tokens(tokenizer, self.media_tokens, turns_only=True)
        return ConversationFormat(tokenizer, self.media_tokens, None, None)

    @staticmethod
    def _has_turns(lines: Preferences) -> bool:
        return any(lines.read(index).has_turns for index in range(len(lines)))

    def _read(self, source: PreferenceSource) -> Preferences:
        if source not in self._lines:
            self._lines[source] = source.open()
        return self._lines[source]

    def _open(self, source: PreferenceSource) -> PreferenceStore:
        if source not in self._opened:
            store = PreferenceStore.build(self._groups(source), self.row_length, self.overlong)
            if not len(store.pair_G):
                raise ValueError(
                    f"source {source.display_name!r}: all {store.skipped} pairs or responses are longer than "
                    f"row_length={self.row_length}; raise it"
                )
            self._opened[source] = store
        store = self._opened[source]
        assert isinstance(store, PreferenceStore)
        return store

    def _groups(self, source: Any) -> Iterator[Group]:
        """What the lines of a source become."""
        return groups_of(self._read(source), self.form, self.ranking, self.mismatched)

    def _check_kinds(self) -> None:
        """Pairs and single responses do not mix, and references are known for all or none."""
        stores = {source.display_name: self._open(source) for source in self.all_sources}
        names = {kind: [n for n, store in stores.items() if (store.pair_G == kind).any()] for kind in (True, False)}
        if names[True] and names[False]:
            raise ValueError(
                "a run learns from pairs and rankings, or from single responses, not from both: there are pairs in "
                f"{', '.join(names[True])}, single responses in {', '.join(names[False])}"
            )
        if "ref_logprobs" not in self._optional_fields:
            return
        if "mismatched" in self._optional_fields:
            raise ValueError(
                "mismatched=True adds responses whose log-probabilities under the reference the data do not hold: "
                "leave ref_response_logps out, and let the module keep a copy as its reference"
            )
        for name, store in stores.items():
            if missing := int(np.isnan(store.reference_N[store.learned_N]).sum()):
                raise ValueError(
                    f"source {name!r}: the log-probabilities of a reference are missing on {missing} of "
                    f"{int(store.learned_N.sum())} response tokens; give them on all lines of all sources or on none"
                )

    @property
    def _optional_fields(self) -> set[str]:
        return set().union(*(self._open(source).optional_fields for source in self.all_sources))

    def _plan(self) -> None:
        self._check_kinds()
        super()._plan()
        if self.skipped:
            warnings.warn(
                f"{self.skipped} pairs or responses are longer than row_length={self.row_length} and are left out",
                stacklevel=2,
            )

    def _make_reader(self, rows: list[PreferenceRows]) -> PreferenceReader:
        return PreferenceReader(rows, self.row_length, self._optional_fields)

    def _rows(self, source: PreferenceSource) -> PreferenceRows:
        """Groups in a random order, so that files sorted by topic give mixed rows."""
        store = self._open(source)
        group_D = permutation(len(store.pair_G), self.seed, 5)
        return PreferenceRows(store, group_D, plan_rows(store.length_G[group_D], self.row_length, "whole"))

    def _identity(self) -> dict[str, Any]:
        sources = {source.display_name: [self._open(source).content_hash(), source.weight] for source in self.sources}
        return {
            "sources": sources,
            "row_length": self.row_length,
            "seed": self.seed,
            "block_rows": self.block_rows,
        }

"""From judged candidates, or trajectories of policies, to packed pairs for a POLAR reward model.

    JSONL → pairs of candidates → the text that is read for each → rows of L tokens, pairs whole → global order → ranks

Batches are those of `PreferenceDataModule`: pairs by `pair_ids` and `is_chosen`. A document is prompt and reference,
prompt and candidate, and the token whose value is the reward; that token is the response (`response_mask`).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any, cast

from lit_interns1.data.conversation_rows import ConversationFormat
from lit_interns1.data.polar_lines import PolarPair, PolarSource
from lit_interns1.data.polar_template import PolarEncoder, PolarTemplate
from lit_interns1.data.preference_data_module import PreferenceDataModule
from lit_interns1.data.preference_rows import Answer, Group, Overlong
from lit_interns1.data.tokenizer import TextTokenizer


class PolarDataModule(PreferenceDataModule):
    """Pairs for `RewardModelModule` with POLAR's losses.

    Args:
        sources: What to train on: paths of JSONL files, or `PolarSource`s; see `polar_lines` for their form.
        validation_sources: What to validate on; None = nothing.
        tokenizer: As for `TextDataModule`; it must have `template.end` as one token.
        template: The form of what is read; a wrapper of "pretrain" belongs to trajectories.
        triples_per_policy: Of trajectories: how often each policy is compared with another, for each prompt.
        row_length: L, tokens per row; both candidates of a pair, each behind prompt and reference, must fit.
        global_batch_size: B, rows per optimizer step over all ranks and accumulated micro-batches.
        micro_batch_size: m, rows per rank and forward pass.
        validation_rows: Validate on at most this many rows.
        overlong: A pair that is longer than a row in spite of the template's limits: `error`, or `skip`.
        seed: Seed of triples, packing and order. Triples of validation sources have the seed 0.
        num_workers: Processes per rank that read ahead; 0 = read in the training process.
        pin_memory: As for `TextDataModule`.
        block_rows: As for `TextDataModule`.
        end_of_text: As for `TextDataModule`.

    Raises:
        ValueError: For an option out of its range, by name. What cannot be read raises `SourceError`, with file and
            line, in `prepare_data`.
    """

    source_kind: Any = PolarSource

    def __init__(
        self,
        sources: list[str | PolarSource] | str,
        validation_sources: list[str | PolarSource] | str | None = None,
        tokenizer: str | TextTokenizer = "bundled:tokenizer",
        template: PolarTemplate | None = None,
        triples_per_policy: int = 1,
        row_length: int = 32768,
        global_batch_size: int = 32,
        micro_batch_size: int = 1,
        validation_rows: int | None = None,
        overlong: Overlong = "error",
        seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        block_rows: int = 1024,
        end_of_text: str | None = None,
    ) -> None:
        super().__init__(
            cast(Any, sources), cast(Any, validation_sources), tokenizer, row_length=row_length,
            global_batch_size=global_batch_size, micro_batch_size=micro_batch_size, validation_rows=validation_rows,
            overlong=overlong, seed=seed, num_workers=num_workers, pin_memory=pin_memory, block_rows=block_rows,
            end_of_text=end_of_text,
        )  # fmt: skip
        if triples_per_policy < 1:
            raise ValueError(f"triples_per_policy must be at least 1, got {triples_per_policy}")
        if overlong == "truncate_prompt":
            raise ValueError("overlong='truncate_prompt' is not for POLAR: template.max_length says where prompts end")
        self.template, self.triples_per_policy = template or PolarTemplate(), triples_per_policy

    @cached_property
    def encoder(self) -> PolarEncoder:
        """Makes the ids of what is read."""
        return PolarEncoder(self.tokenizer, self.template)

    def pairs(self, source: PolarSource) -> list[PolarPair]:
        """The pairs of one of the sources."""
        return source.pairs(0 if source in self.validation_sources else self.seed, self.triples_per_policy)

    # inside

    def _make_form(self, tokenizer: TextTokenizer) -> ConversationFormat:
        return ConversationFormat(tokenizer, self.media_tokens, None, None)

    def _groups(self, source: PolarSource) -> Iterator[Group]:
        for pair in self.pairs(source):
            documents = self.encoder.ids(pair.prompt, pair.reference, [pair.chosen, pair.rejected], pair.wrapper)
            answers = (
                Answer(ids[:-1], ids[-1:], [True], chosen) for ids, chosen in zip(documents, (True, False), strict=True)
            )
            yield Group(tuple(answers), True, 0.0, 1.0, pair.where)

"""What DataModules of named sources share: one format (with its tokenizer) for all, and the plan of their rows.

source → tokens (once) → rows of a source → one global order over all sources → ranks
"""

from __future__ import annotations

from typing import Any

from lit_interns1.data.conversation_rows import ConversationFormat
from lit_interns1.data.order import RowOrder, apportion
from lit_interns1.data.row_data_module import RowDataModule
from lit_interns1.data.sources import named_sources
from lit_interns1.data.tokenizer import TextTokenizer, load_tokenizer


class SourceDataModule(RowDataModule):
    """Base of DataModules whose sources a `ConversationFormat` turns into tokens. A subclass makes the format, the rows
    of a source and the reader of rows, and says in `_identity` what determines its rows.

    Args:
        kind: Class of the sources, with `path`, `weight` and `display_name`.
        sources: What to train on.
        validation_sources: What to validate on; None = nothing.
        tokenizer: A `TextTokenizer`, or what `load_tokenizer` takes.
        end_of_text: As `load_tokenizer` takes it.
        rows: Arguments of `RowDataModule`.
    """

    def __init__(
        self,
        kind: Any,
        sources: Any,
        validation_sources: Any,
        tokenizer: str | TextTokenizer,
        end_of_text: str | None,
        **rows: Any,
    ) -> None:
        super().__init__(**rows)
        self.sources = named_sources(sources, kind)
        self.validation_sources = named_sources(validation_sources, kind) if validation_sources else []
        self._tokenizer_option, self._end_of_text = tokenizer, end_of_text
        self._form: ConversationFormat | None = None
        self._opened: dict[Any, Any] = {}

    # what a subclass says

    def _make_form(self, tokenizer: TextTokenizer) -> ConversationFormat:
        """The format, with the tokenizer or one that has more tokens."""
        raise NotImplementedError

    def _rows(self, source: Any) -> Any:
        """The rows of a source: an object with a `plan`."""
        raise NotImplementedError

    def _make_reader(self, rows: list[Any]) -> Any:
        """What reads rows of several sources; see `loader.ReadsRows`."""
        raise NotImplementedError

    # what follows

    @property
    def form(self) -> ConversationFormat:
        """How what is in the sources becomes tokens and items."""
        if self._form is None:
            option = self._tokenizer_option
            loaded = option if isinstance(option, TextTokenizer) else load_tokenizer(option, self._end_of_text)
            self._form = self._make_form(loaded)
        return self._form

    @property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer, with the tokens that the format needs."""
        return self.form.tokenizer

    @property
    def source_names(self) -> list[str]:
        """Names of the validation sources if there are any, else of the training sources."""
        return [source.display_name for source in self.validation_sources or self.sources]

    @property
    def all_sources(self) -> list[Any]:
        """Those for training, and then those for validation."""
        return [*self.sources, *self.validation_sources]

    def _plan(self) -> None:
        training = [self._rows(source) for source in self.sources]
        self._training = self._make_reader(training)
        weights = [source.weight for source in self.sources if source.weight is not None]
        self._order = RowOrder([rows.plan.num_rows for rows in training], weights or None, self.seed, self.block_rows)
        validation = [self._rows(source) for source in self.validation_sources]
        available = [rows.plan.num_rows for rows in validation]
        if self.validation_rows is not None and self.validation_rows < sum(available):
            for rows, share in zip(validation, apportion(self.validation_rows, available).tolist(), strict=True):
                rows.plan = rows.plan.first_rows(share)
        self._validation = self._make_reader(validation)

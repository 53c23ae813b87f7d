"""What every DataModule here has: a tokenizer, whose ids the model must have, and its place among the ranks."""

from __future__ import annotations

import lightning.pytorch as pl

from lit_interns1.data.tokenizer import TextTokenizer


class TokenizedDataModule(pl.LightningDataModule):
    """Base of DataModules with a `tokenizer`."""

    @property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer."""
        raise NotImplementedError

    @property
    def vocab_size(self) -> int:
        """Largest token id plus one: what the model's vocabulary must hold at least."""
        return self.tokenizer.vocab_size

    def check_vocabulary(self, model_vocab_size: int) -> None:
        """Raises ValueError if the tokenizer has ids that the model has not."""
        if model_vocab_size < self.vocab_size:
            raise ValueError(
                f"the model's vocabulary has {model_vocab_size} entries, the tokenizer {self.vocab_size}: "
                f"vocab_size of the model must be at least {self.vocab_size}"
            )

    def _ranks(self) -> tuple[int, int]:
        """(W, rank) from the strategy, (1, 0) without a Trainer or on a single device."""
        strategy = getattr(self.trainer, "strategy", None)
        ranks = getattr(strategy, "distributed_sampler_kwargs", None) or {"num_replicas": 1, "rank": 0}
        return int(ranks["num_replicas"]), int(ranks["rank"])

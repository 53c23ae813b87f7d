"""The clock of a run: consumed tokens. Schedules, batch size, evaluation and plots run on it, not on steps.

Steps lose their meaning when the batch size changes during a run (arXiv 2601.05034 raises it by consumed data), so
everything that is scheduled reads this state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor


class TokenCounts(NamedTuple):
    """Tokens of one batch on one rank: consumed (padding excluded), and those with a loss."""

    tokens: int
    loss_tokens: int


def count_tokens(batch: Any, counter: Callable[[Any], int | TokenCounts] | None = None) -> TokenCounts:
    """Counts the tokens of any batch.

    In this order: the user's `counter`; `num_tokens` (and `num_loss_tokens`) as attribute or key; the sum of
    `attention_mask`; the number of `input_ids`; for a bare tensor or the first tensor of a sequence, its size.

    Args:
        batch: What the dataloader yields.
        counter: A callable that gives the number of tokens, or `TokenCounts`.

    Raises:
        TypeError: If nothing countable is found; the message says what to pass.
    """
    if counter is not None:
        counted = counter(batch)
        return counted if isinstance(counted, TokenCounts) else TokenCounts(int(counted), int(counted))

    def look_up(name: str) -> Any:
        return batch.get(name) if isinstance(batch, Mapping) else getattr(batch, name, None)

    tokens = look_up("num_tokens")
    if tokens is None:
        mask, ids = look_up("attention_mask"), look_up("input_ids")
        if isinstance(mask, Tensor):
            tokens = int(mask.sum())
        elif isinstance(ids, Tensor):
            tokens = ids.numel()
        elif isinstance(batch, Tensor):
            tokens = batch.numel()
        elif isinstance(batch, (list, tuple)) and batch and isinstance(batch[0], Tensor):
            tokens = batch[0].numel()
        else:
            raise TypeError(
                f"cannot count the tokens of a batch of type {type(batch).__name__}: it has no num_tokens, "
                "attention_mask or input_ids; pass TokenClock(counter=...)"
            )
    loss_tokens = look_up("num_loss_tokens")
    if loss_tokens is None:
        labels = look_up("labels")
        loss_tokens = int((labels != -100).sum()) if isinstance(labels, Tensor) else tokens
    return TokenCounts(int(tokens), int(loss_tokens))


@dataclass
class TokenClockState:
    """What has been consumed up to the last finished optimizer step, over all ranks.

    Attributes:
        tokens: Consumed tokens, padding excluded.
        loss_tokens: Consumed tokens that had a loss.
        steps: Optimizer steps.
        pending: Tokens of this rank that belong to the step in progress; not saved.
    """

    tokens: int = 0
    loss_tokens: int = 0
    steps: int = 0
    pending: TokenCounts = field(default=TokenCounts(0, 0))

    def add(self, counts: TokenCounts) -> None:
        """Adds one micro-batch of this rank to the step in progress."""
        self.pending = TokenCounts(self.pending.tokens + counts.tokens, self.pending.loss_tokens + counts.loss_tokens)

    def commit(self, total: TokenCounts) -> None:
        """Ends the step: `total` is the pending count summed over ranks."""
        self.tokens += total.tokens
        self.loss_tokens += total.loss_tokens
        self.steps += 1
        self.pending = TokenCounts(0, 0)

    def state_dict(self) -> dict[str, int]:
        """Plain integers."""
        return {
            "tokens": self.tokens,
            "loss_tokens": self.loss_tokens,
            "steps": self.steps,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restores the counts and forgets the step in progress."""
        self.tokens, self.loss_tokens = int(state["tokens"]), int(state["loss_tokens"])
        self.steps = int(state["steps"])
        self.pending = TokenCounts(0, 0)

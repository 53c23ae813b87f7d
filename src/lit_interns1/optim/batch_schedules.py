"""The batch size of an optimizer step as a function of consumed tokens, or of the loss (arXiv 2601.05034).

    table     B_k from the D_k-th token on           law     ln B = p + q ln D
    loss      ln B_opt by linear interpolation in the smoothed training loss
    ramp      B_0 + (B_1 − B_0) · (D − D_0) / (D_1 − D_0)         doubling  B_0 · 2^⌊D / Δ⌋

D: consumed tokens. B is in the unit of whoever asks, tokens or rows per optimizer step; fitted laws and tables by loss
are in tokens. The paper raises B by consumed data; how it fits the curve is not known, so `law` and `loss` are
reconstructions.
"""

from __future__ import annotations

import itertools
import json
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARTEFACT_FORMAT = "lit-interns1 batch-size law 1"
"""What `format` says in the file that `lit-interns1 batch-size-law` writes."""


class BatchSchedule(ABC):
    """A batch size as a function of consumed tokens and the loss. Derive from it to add a schedule."""

    loss_half_life_tokens: float | None = None
    """Consumed tokens in which a training loss loses half its weight in the mean that is passed; None: not needed."""

    @abstractmethod
    def __call__(self, tokens: float, loss: float | None = None) -> float | None:
        """The batch size after `tokens` tokens; None: as it is.

        Args:
            tokens: Consumed tokens.
            loss: Smoothed training loss, nats per token; None: none is known yet.
        """


@dataclass(frozen=True)
class TabulatedBatch(BatchSchedule):
    """Steps: from each number of consumed tokens on, the batch size beside it.

    Attributes:
        table: (tokens, batch size), tokens ascending. Before the first entry the batch is what it was at the start.
    """

    table: list[tuple[float, float]]

    def __post_init__(self) -> None:
        _check_table("table", self.table, "consumed tokens")

    def __call__(self, tokens: float, loss: float | None = None) -> float | None:
        """The last entry that is reached."""
        reached = [batch for threshold, batch in self.table if tokens >= threshold]
        return reached[-1] if reached else None


@dataclass(frozen=True)
class FittedBatch(BatchSchedule):
    """ln B = p + q ln D with B in tokens per step.

    Attributes:
        p: Intercept; needs `q`.
        q: Exponent.
        artefact: File of `lit-interns1 batch-size-law` that holds both, instead.
    """

    p: float | None = None
    q: float | None = None
    artefact: str | None = None

    def __post_init__(self) -> None:
        if self.artefact is not None and self.p is None and self.q is None:
            law = read_artefact(self.artefact)["law"]
            if law is None:
                raise ValueError(f"{self.artefact} holds no law: B_opt was found at fewer than two losses")
            object.__setattr__(self, "p", float(law["p"]))
            object.__setattr__(self, "q", float(law["q"]))
        elif self.artefact is not None or self.p is None or self.q is None:
            raise ValueError(
                f"a batch-size law needs either p and q or an artefact, got p={self.p}, q={self.q}, "
                f"artefact={self.artefact}"
            )

    def __call__(self, tokens: float, loss: float | None = None) -> float | None:
        """exp(p + q ln D); None before the first token."""
        assert self.p is not None
        assert self.q is not None
        return math.exp(self.p + self.q * math.log(tokens)) if tokens > 0 else None


@dataclass(frozen=True)
class BatchForLoss(BatchSchedule):
    """B_opt at the loss that is reached, in tokens per step.

    Between two losses ln B is interpolated; beyond the first and the last B is constant.

    Attributes:
        table: (loss in nats per token, batch size), losses descending.
        artefact: File of `lit-interns1 batch-size-law` that holds it, instead.
        loss_half_life_tokens: Consumed tokens in which a training loss loses half its weight in the smoothed one.
    """

    table: list[tuple[float, float]] | None = None
    artefact: str | None = None
    loss_half_life_tokens: float = 0.0

    def __post_init__(self) -> None:
        if (self.table is None) == (self.artefact is None):
            raise ValueError("a batch size by loss needs either a table or an artefact")
        if not self.loss_half_life_tokens > 0:
            raise ValueError(f"loss_half_life_tokens must be positive, got {self.loss_half_life_tokens}")
        if self.artefact is not None:
            rows = read_artefact(self.artefact)["table"]["rows"]
            known = [(row["loss"], row["b_opt"]) for row in rows if row["b_opt_bound"] == "none"]
            if not known:
                raise ValueError(f"{self.artefact}: at no loss do the batch sizes of its runs bracket B_opt")
            object.__setattr__(self, "table", sorted(known, reverse=True))
        assert self.table is not None
        _check_table("table", [(-loss, batch) for loss, batch in self.table], "minus the loss", least=-math.inf)

    def __call__(self, tokens: float, loss: float | None = None) -> float | None:
        """B at the loss; None while there is none."""
        if loss is None:
            return None
        assert self.table is not None
        if loss >= self.table[0][0]:
            return self.table[0][1]
        for (high, before), (low, after) in itertools.pairwise(self.table):
            if loss >= low:
                share = (high - loss) / (high - low)
                return math.exp((1 - share) * math.log(before) + share * math.log(after))
        return self.table[-1][1]


@dataclass(frozen=True)
class LinearBatch(BatchSchedule):
    """Linear from one batch size to another.

    Attributes:
        first: B_0.
        last: B_1.
        start_tokens: D_0.
        end_tokens: D_1.
    """

    first: float
    last: float
    end_tokens: float
    start_tokens: float = 0.0

    def __post_init__(self) -> None:
        _check_positive(first=self.first, last=self.last)
        if not 0 <= self.start_tokens < self.end_tokens:
            raise ValueError(f"need 0 ≤ start_tokens={self.start_tokens:g} < end_tokens={self.end_tokens:g}")

    def __call__(self, tokens: float, loss: float | None = None) -> float | None:
        """B_0 up to D_0, B_1 from D_1 on."""
        progress = (tokens - self.start_tokens) / (self.end_tokens - self.start_tokens)
        return self.first + (self.last - self.first) * min(max(progress, 0.0), 1.0)


@dataclass(frozen=True)
class DoublingBatch(BatchSchedule):
    """Doubles after every Δ consumed tokens.

    Attributes:
        first: B_0.
        every_n_tokens: Δ.
        last: The batch size is never more than this; None: no limit.
    """

    first: float
    every_n_tokens: float
    last: float | None = None

    def __post_init__(self) -> None:
        _check_positive(first=self.first, every_n_tokens=self.every_n_tokens)
        if self.last is not None and self.last < self.first:
            raise ValueError(f"last={self.last:g} must not be below first={self.first:g}")

    def __call__(self, tokens: float, loss: float | None = None) -> float | None:
        """B_0 · 2^⌊D / Δ⌋."""
        limit = math.inf if self.last is None else self.last
        doublings = min(math.floor(tokens / self.every_n_tokens), 1000)
        return min(self.first * 2.0**doublings, limit)


def read_artefact(path: str | Path) -> dict[str, Any]:
    """What `lit-interns1 batch-size-law` found.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no such file.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"batch-size artefact {file} does not exist")
    try:
        artefact = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"batch-size artefact {file} is no JSON: {error}") from None
    if not isinstance(artefact, dict) or artefact.get("format") != ARTEFACT_FORMAT:
        raise ValueError(
            f"{file} was not written by lit-interns1 batch-size-law: its format is not {ARTEFACT_FORMAT!r}"
        )
    return artefact


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be positive and finite, got {value}")


def _check_table(name: str, table: list[tuple[float, float]], key: str, least: float = 0.0) -> None:
    if not table:
        raise ValueError(f"{name} must have an entry")
    keys = [entry[0] for entry in table]
    if any(after <= before for before, after in itertools.pairwise(keys)) or keys[0] < least:
        raise ValueError(f"{name}: {key} must ascend strictly from {least:g} on, got {keys}")
    for _, batch in table:
        _check_positive(**{f"{name}: batch size": batch})

"""Images and signals of a micro-batch: items of one kind, one behind the other, never padded.

    values (N, …) = item 0 | item 1 | …,   lengths (M,),   facts (M, K)

    kind            values               facts of an item
    image, video    (ΣP, 3·t·p·p)        time, height, width of its grid of patches
    time_series     (Σ T·C,), by point   points, channels, sampling rate in Hz

Items stand in the order of their placeholder tokens, so that features can be put in their places in one go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("image", "video", "time_series")


@dataclass
class MediaItems:
    """Items of one kind.

    Attributes:
        values: Their numbers, joined along the first dimension.
        length_M: (M,) int64, how many of them belong to each item.
        fact_MK: (M, K) float64, what else is known of an item; see the top of this module.
        row_M: (M,) int64, the row of the micro-batch that an item belongs to, ascending.
    """

    values: Tensor
    length_M: Tensor
    fact_MK: Tensor
    row_M: Tensor

    def __post_init__(self) -> None:
        if int(self.length_M.sum()) != self.values.shape[0]:
            raise ValueError(f"items of {int(self.length_M.sum())} values, but there are {self.values.shape[0]}")
        if not len(self.length_M) == len(self.fact_MK) == len(self.row_M):
            raise ValueError(
                f"{len(self.length_M)} items have {len(self.fact_MK)} facts and {len(self.row_M)} rows: all must agree"
            )

    def __len__(self) -> int:
        return len(self.length_M)

    @staticmethod
    def of(values: Sequence[Tensor], facts: Sequence[Sequence[float]], rows: Sequence[int] | None = None) -> MediaItems:
        """Joins single items; without `rows` all belong to row 0."""
        if not values:
            raise ValueError("there must be at least one item")
        return MediaItems(
            torch.cat(list(values)),
            torch.tensor([len(value) for value in values]),
            torch.tensor([list(fact) for fact in facts], dtype=torch.float64),
            torch.tensor(list(rows) if rows is not None else [0] * len(values)),
        )

    @staticmethod
    def joined(parts: Sequence[MediaItems], first_rows: Sequence[int]) -> MediaItems:
        """Items of several batches, whose rows begin at `first_rows` of the whole."""
        return MediaItems(
            torch.cat([part.values for part in parts]),
            torch.cat([part.length_M for part in parts]),
            torch.cat([part.fact_MK for part in parts]),
            torch.cat([part.row_M + first for part, first in zip(parts, first_rows, strict=True)]),
        )

    def of_rows(self, first: int, last: int) -> MediaItems | None:
        """Items of the rows first … last − 1, counted from there; None if there are none."""
        chosen = (self.row_M >= first) & (self.row_M < last)
        if not bool(chosen.any()):
            return None
        index = torch.nonzero(chosen).flatten()
        start, stop = int(self.length_M[: index[0]].sum()), int(self.length_M[: index[-1] + 1].sum())
        return MediaItems(
            self.values[start:stop], self.length_M[chosen], self.fact_MK[chosen], self.row_M[chosen] - first
        )

    def map(self, function) -> MediaItems:
        """A copy whose values went through `function`; the small tensors stay on the CPU, where sizes are read."""
        return MediaItems(function(self.values), self.length_M, self.fact_MK, self.row_M)


def signals_of(items: MediaItems) -> tuple[list[Tensor], list[float]]:
    """Time series as (T, C) each, and their sampling rates."""
    parts = items.values.split(items.length_M.tolist())
    facts = items.fact_MK.tolist()
    signals = [part.view(int(t), int(c)) for part, (t, c, _) in zip(parts, facts, strict=True)]
    return signals, [rate for _, _, rate in facts]

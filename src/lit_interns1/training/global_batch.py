"""Which rows of the global order an optimizer step consumes, and who reads them.

    step s consumes rows [s·B, (s+1)·B);   B = A · W · m
    micro-batch a of that step, rank r:  rows  s·B + a·(W·m) + r·m  …  + m

B rows per optimizer step, W data-parallel ranks, m rows per rank and forward pass, A accumulated micro-batches. Rows
that are read by global micro-step j = s·A + a are [j·W·m, (j+1)·W·m), so the stream does not depend on A, and a run
continues on another number of ranks with the same rows in every optimizer step.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GlobalBatch:
    """The arithmetic of one optimizer step.

    Attributes:
        rows_per_step: B, rows of all ranks and micro-batches together.
        micro_batch_rows: m, rows of one forward pass on one rank.
        data_parallel_size: W, ranks that read different rows.

    Raises:
        ValueError: If B is not a multiple of W·m.
    """

    rows_per_step: int
    micro_batch_rows: int
    data_parallel_size: int = 1

    def __post_init__(self) -> None:
        for name in ("rows_per_step", "micro_batch_rows", "data_parallel_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        rows_per_pass = self.micro_batch_rows * self.data_parallel_size
        if self.rows_per_step % rows_per_pass:
            raise ValueError(
                f"the global batch of {self.rows_per_step} rows is not divisible by micro-batch × ranks = "
                f"{self.micro_batch_rows} × {self.data_parallel_size} = {rows_per_pass}"
            )

    @property
    def accumulation(self) -> int:
        """A, micro-batches per optimizer step."""
        return self.rows_per_step // (self.micro_batch_rows * self.data_parallel_size)

    @property
    def rows_per_micro_step(self) -> int:
        """W·m, rows that all ranks together read in one forward pass."""
        return self.micro_batch_rows * self.data_parallel_size

    def rows_of(self, micro_step: int, rank: int) -> range:
        """Global row indices that `rank` reads in global micro-step `micro_step`."""
        first = micro_step * self.rows_per_micro_step + rank * self.micro_batch_rows
        return range(first, first + self.micro_batch_rows)

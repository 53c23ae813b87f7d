"""What happens to one rank happens to all: an error anywhere is raised everywhere, so that nobody waits for ever.

    rank r:  work → error_r or none;   all ranks:  gather(error_0 … error_{N−1});   the first that is one is raised

Without a process group there is one rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, TypeVar

import torch.distributed as dist

from lit_interns1.checkpoints.huggingface.errors import WeightsError

Value = TypeVar("Value")


def this_rank() -> tuple[int, int]:
    """Rank and number of ranks."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather(value: Value) -> list[Value]:
    """The values of all ranks, by rank. All ranks call it."""
    _, world = this_rank()
    if world == 1:
        return [value]
    values: list[Any] = [None] * world
    dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def together() -> Iterator[None]:
    """All ranks leave the block with the same `WeightsError`, or all without one.

    Raises:
        WeightsError: That of the first rank that has one; also where another rank failed for another reason.
        Exception: Any other error of this rank.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    rank, _ = this_rank()
    told = own if own is None or isinstance(own, WeightsError) else WeightsError(f"rank {rank} failed: {own!r}")
    errors = gather(told)
    if own is not None and not isinstance(own, WeightsError):
        raise own
    for first in errors:
        if first is not None:
            raise first

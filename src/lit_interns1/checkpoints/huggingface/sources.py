"""Tensors under our names, wherever they are stored or held: what an export reads.

    tensor = ∪ windows over all processes, each number in one window; read(window) gives part of one window

So a source is never whole in memory, and a run that is divided over ranks is a source like any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lit_interns1.checkpoints.huggingface.files import Window


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it.

    Attributes:
        shape: Its whole shape.
        dtype: Type of its numbers in the source.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype


class WeightSource(Protocol):
    """Tensors by our names. A tied weight is there once, under its first name."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors, also those of which this process holds nothing."""

    def windows(self, name: str) -> Sequence[Window]:
        """What this process contributes of a tensor: boxes that no other process contributes."""

    def read(self, name: str, window: Window) -> Tensor:
        """The numbers of a box that lies inside one of `windows(name)`, of the source's type."""

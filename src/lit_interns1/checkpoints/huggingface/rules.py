"""Which tensor of ours is which tensors of theirs: rules that are read in both directions.

    ours   layers.{layer}.mlp.experts.gate_up_proj            (E, 2I, D)
    theirs {body}layers.{layer}.mlp.experts.{expert}.gate_proj.weight   (I, D), rows 0 … I−1 of expert e
           {body}layers.{layer}.mlp.experts.{expert}.up_proj.weight     (I, D), rows I … 2I−1 of expert e

A rule and a shape of ours give pieces: a key, the box of our tensor that it fills, and whether it is transposed.
Reading copies file → box, writing box → file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from lit_interns1.checkpoints.huggingface.files import Window


@dataclass(frozen=True)
class Spelling:
    """Keys that together hold one tensor of ours.

    Attributes:
        keys: With `{expert}` each names one matrix of a stack, otherwise the whole tensor. Several keys are equal parts
            of the rows, one below the other.
        transposed: Rows and columns are exchanged in the files.
    """

    keys: tuple[str, ...]
    transposed: bool = False


@dataclass(frozen=True)
class Piece:
    """One tensor of theirs and the box of ours that it fills.

    Attributes:
        key: Its name.
        box: The box, in our coordinates.
        is_matrix: The first dimension of the box, which has length 1, does not exist in the file.
        transposed: The last two dimensions are exchanged in the file.
    """

    key: str
    box: Window
    is_matrix: bool
    transposed: bool

    def _in_file(self, window: Window) -> Window:
        theirs = list(window[1:] if self.is_matrix else window)
        if self.transposed:
            theirs[-2], theirs[-1] = theirs[-1], theirs[-2]
        return tuple(theirs)

    @property
    def file_shape(self) -> tuple[int, ...]:
        """Shape in the file."""
        return tuple(part.stop - part.start for part in self._in_file(self.box))

    def common(self, window: Window) -> tuple[Window, Window] | None:
        """What box and window share: in our coordinates, and in those of the file; None if nothing."""
        pairs = zip(self.box, window, strict=True)
        ours = tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in pairs)
        if any(part.start >= part.stop for part in ours):
            return None
        moved = tuple(slice(o.start - b.start, o.stop - b.start) for o, b in zip(ours, self.box, strict=True))
        return ours, self._in_file(moved)

    def as_ours(self, values: Tensor) -> Tensor:
        """Numbers of a window of the file as they lie in our box."""
        values = values.mT if self.transposed else values
        return values[None] if self.is_matrix else values

    def as_theirs(self, values: Tensor) -> Tensor:
        """Numbers of a window of our box as they lie in the file; the inverse of `as_ours`."""
        values = values[0] if self.is_matrix else values
        return values.mT if self.transposed else values

    def in_ours(self, window: Window) -> Window:
        """The window of our tensor that a window of the file fills."""
        theirs = list(window)
        if self.transposed:
            theirs[-2], theirs[-1] = theirs[-1], theirs[-2]
        inside = [slice(0, 1), *theirs] if self.is_matrix else theirs
        return tuple(slice(b.start + w.start, b.start + w.stop) for b, w in zip(self.box, inside, strict=True))


@dataclass(frozen=True)
class Rule:
    """One kind of tensor.

    Attributes:
        ours: Name in our models; `{layer}` stands for a number, `{name}` for any name.
        theirs: How files may spell it. The first is how it is written.
    """

    ours: str
    theirs: tuple[Spelling, ...]

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        pattern = re.escape(self.ours)
        for placeholder, group in (("{layer}", r"(?P<layer>\d+)"), ("{name}", r"(?P<name>.+)")):
            pattern = pattern.replace(re.escape(placeholder), group)
        return re.compile(pattern)

    def spellings(self, name: str) -> tuple[Spelling, ...] | None:
        """The spellings of one tensor, placeholders filled in; None if the rule is not about it."""
        match = self._pattern.fullmatch(name)
        if match is None:
            return None

        def filled(key: str) -> str:
            for placeholder, value in match.groupdict().items():
                key = key.replace(f"{{{placeholder}}}", value)
            return key

        return tuple(Spelling(tuple(map(filled, s.keys)), s.transposed) for s in self.theirs)


def pieces(spelling: Spelling, shape: tuple[int, ...]) -> Iterator[Piece]:
    """The pieces of a tensor of ours with this shape.

    Raises:
        ValueError: If its rows cannot be divided among the keys.
    """
    rows = max(len(shape) - 2, 0)
    if shape[rows] % len(spelling.keys):
        raise ValueError(f"{shape[rows]} rows cannot be divided among {spelling.keys}")
    part = shape[rows] // len(spelling.keys)
    whole = tuple(slice(0, size) for size in shape)
    for number, key in enumerate(spelling.keys):
        box = (*whole[:rows], slice(number * part, (number + 1) * part), *whole[rows + 1 :])
        if "{expert}" not in key:
            yield Piece(key, box, False, spelling.transposed)
            continue
        for expert in range(shape[0]):
            inside = (slice(expert, expert + 1), *box[1:])
            yield Piece(key.replace("{expert}", str(expert)), inside, True, spelling.transposed)

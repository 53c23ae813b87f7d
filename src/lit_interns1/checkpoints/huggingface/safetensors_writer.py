"""Safetensors files whose numbers arrive in any order, from any rank.

    file = N | header of N bytes | numbers;   header first, from shapes and types alone, so every offset is known

Files are made in their full size; then every window of every tensor has its place, and whoever holds it writes it
there. Keys are put into files in their natural order (layer 2 before layer 10). Inside a file wider types come first,
so that every tensor begins at a multiple of its numbers' size without gaps, which the format does not allow.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_interns1.checkpoints.huggingface.files import Window
from lit_interns1.checkpoints.huggingface.safetensors_file import DTYPES, StoredTensor

DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, (_, dtype) in DTYPES.items() if dtype is not None}
"""Types as headers spell them."""


@dataclass(frozen=True)
class PlannedFile:
    """A file before it is written.

    Attributes:
        name: Its name.
        header: Its first bytes, length included.
        size: Bytes of the whole file.
    """

    name: str
    header: bytes
    size: int


def natural(key: str) -> list[str | int]:
    """What keys are sorted by: numbers inside them count as numbers."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", key)]


def plan_files(
    tensors: Mapping[str, tuple[tuple[int, ...], str]], max_file_bytes: int
) -> tuple[list[PlannedFile], dict[str, StoredTensor]]:
    """Divides tensors among files and finds the place of each.

    Args:
        tensors: Shape and type (as headers spell it) by key.
        max_file_bytes: A file holds no more bytes of numbers than this, unless one tensor does.
    """
    sizes = {key: math.prod(tensors[key][0]) * _bits(tensors[key]) // 8 for key in sorted(tensors, key=natural)}
    groups: list[list[str]] = [[]]
    filled = 0
    for key, size in sizes.items():
        if groups[-1] and filled + size > max_file_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(key)
        filled += size
    files, places = [], {}
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        ordered = sorted(group, key=lambda key: -_bits(tensors[key]))
        starts = dict(zip(ordered, itertools.accumulate((sizes[key] for key in ordered), initial=0), strict=False))
        header = _header({key: (*tensors[key], starts[key], starts[key] + sizes[key]) for key in ordered})
        files.append(PlannedFile(name, header, len(header) + sum(sizes[key] for key in group)))
        for key in group:
            places[key] = StoredTensor(name, *tensors[key], len(header) + starts[key])
    return files, places


def _bits(tensor: tuple[tuple[int, ...], str]) -> int:
    return DTYPES[tensor[1]][0]


def _header(entries: Mapping[str, tuple[tuple[int, ...], str, int, int]]) -> bytes:
    """Length and JSON, padded so that the numbers begin at a multiple of 8; entries: shape, type, begin and end."""
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for key, (shape, dtype, begin, end) in entries.items():
        content[key] = {"dtype": dtype, "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class SafetensorsWriter:
    """Writes windows of tensors into files that exist in their full size.

    Args:
        folder: Where the files are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.bytes_written = folder, 0
        self._descriptors: dict[str, int] = {}

    def create(self, files: Iterable[PlannedFile]) -> None:
        """Makes the files: headers, and room for the numbers. On one rank."""
        for file in files:
            with (self.folder / file.name).open("xb") as stream:
                stream.write(file.header)
                stream.truncate(file.size)

    def write(self, place: StoredTensor, window: Window, values: Tensor) -> None:
        """Writes a window of a tensor.

        Args:
            place: Where the tensor is.
            window: Part of it.
            values: Its numbers, of the tensor's type and on any device.
        """
        content = values.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data
        item = DTYPES[place.dtype][0] // 8
        position = 0
        for start, length in _runs(place.shape, window):
            self.write_bytes(place.file, place.start + start * item, content[position : position + length * item])
            position += length * item

    def write_bytes(self, file: str, position: int, content: memoryview | bytes) -> None:
        """Writes bytes at a position of a file."""
        if file not in self._descriptors:
            self._descriptors[file] = os.open(self.folder / file, os.O_WRONLY)
        rest = memoryview(content)
        while rest:
            written = os.pwrite(self._descriptors[file], rest, position)
            rest, position = rest[written:], position + written
            self.bytes_written += written

    def close(self) -> None:
        """Waits until all that was written is on the disk."""
        try:
            for descriptor in self._descriptors.values():
                os.fsync(descriptor)
        finally:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()


def _runs(shape: tuple[int, ...], window: Window) -> Iterator[tuple[int, int]]:
    """A window as stretches of numbers that lie one behind the other: first number and length."""
    whole = len(shape)
    while whole > 0 and window[whole - 1] == slice(0, shape[whole - 1]):
        whole -= 1
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    if whole == 0:
        yield 0, math.prod(shape)
        return
    last = window[whole - 1]
    length = (last.stop - last.start) * strides[whole - 1]
    for indices in itertools.product(*(range(part.start, part.stop) for part in window[: whole - 1])):
        outer = sum(i * stride for i, stride in zip(indices, strides, strict=False))
        yield outer + last.start * strides[whole - 1], length


def blocks(window: Window, numbers: int, multiple: int = 1) -> Iterator[Window]:
    """A window in parts of at most so many numbers, of whole rows.

    Args:
        window: What is divided.
        numbers: Limit; a single row may be longer.
        multiple: The rows of a part are a multiple of this, but for the last part; a part has at least so many rows.
    """
    if not window or math.prod(part.stop - part.start for part in window) <= numbers:
        yield window
        return
    first, rest = window[0], window[1:]
    each = math.prod(part.stop - part.start for part in rest)
    if len(window) > 2 and each > numbers:
        for i in range(first.start, first.stop):
            for part in blocks(rest, numbers, multiple):
                yield (slice(i, i + 1), *part)
        return
    step = max(1, numbers // each)
    if len(window) == 2:
        step = max(1, step // multiple) * multiple
    for start in range(first.start, first.stop, step):
        yield (slice(start, min(start + step, first.stop)), *rest)

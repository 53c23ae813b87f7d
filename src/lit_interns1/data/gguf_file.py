"""The head of a GGUF file: metadata and the table of tensors, every count checked against the bytes that are there.

    file = "GGUF" · version · number of tensors · number of values · values · tensor table · padding · numbers
    value = key · type · content;   table entry = name · dimensions (innermost first) · type · offset into the numbers

The format is that of llama.cpp (ggml), versions 2 and 3, little-endian. A file may be truncated or hostile: nothing is
allocated or looped over because a count in it says so.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

MAGIC = b"GGUF"
VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: np.uint8, 1: np.int8, 2: np.uint16, 3: np.int16, 4: np.uint32, 5: np.int32, 6: np.float32, 7: np.bool_,
    10: np.uint64, 11: np.int64, 12: np.float64,
}  # fmt: skip
"""Types of values by their number in the format; beside them strings and arrays."""
_MOST_ENTRIES = 1 << 22
"""Longest array that is read: more than any vocabulary or list of merges."""
_MOST_BYTES = 1 << 26
"""Longest head that is read; the largest vocabularies in use take a quarter of it."""
_MOST_DIMENSIONS = 4
_SMALLEST_VALUE, _SMALLEST_ENTRY = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8
"""Bytes that a value and an entry of the table take at least."""


class GGUFError(ValueError):
    """A file is no GGUF file, or is damaged; the message names it and the place."""


@dataclass(frozen=True)
class GGUFTensor:
    """One entry of the tensor table.

    Attributes:
        name: Its name.
        shape: Outermost dimension first, as torch and numpy count.
        type_number: Type of its numbers, as ggml numbers them.
        start: Byte of the file at which its numbers start.
    """

    name: str
    shape: tuple[int, ...]
    type_number: int
    start: int


def is_gguf_file(path: str | Path) -> bool:
    """Whether `path` is meant as a GGUF file: a file (or nothing yet) with the ending .gguf."""
    return Path(path).suffix.lower() == ".gguf" and not Path(path).is_dir()


class GGUFFile:
    """Metadata and tensor table of a file.

    Args:
        path: The file.

    Attributes:
        metadata: Values by key; arrays are lists.
        tensors: Entries of the table by name. Whether they end within the file depends on their types.
        size: Bytes of the file.

    Raises:
        GGUFError: If it does not exist, is no GGUF file of a known version, is truncated, or contradicts itself.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise GGUFError(f"{path} is no file" if self.path.exists() else f"{path} does not exist")
        try:
            with self.path.open("rb", buffering=1 << 20) as self._file:
                self.size, self._at = os.fstat(self._file.fileno()).st_size, 0
                self._read()
        except OSError as error:
            raise GGUFError(f"{path} cannot be read: {error}") from None

    def _read(self) -> None:
        if self._take(4, "the first bytes") != MAGIC:
            raise GGUFError(f"{self.path} is no GGUF file: it does not start with {MAGIC.decode()}")
        version = self._number("I", "the version")
        if version not in VERSIONS:
            big_endian = " (big-endian?)" if version and version & 0xFFFF == 0 else ""
            known = " and ".join(map(str, VERSIONS))
            raise GGUFError(f"{self.path}: version {version}{big_endian} of GGUF is not supported, only {known}")
        num_tensors, num_values = self._number("Q", "the counts"), self._number("Q", "the counts")
        self._fits(num_values, _SMALLEST_VALUE, "metadata values")
        self._fits(num_tensors, _SMALLEST_ENTRY, "tensors")
        self.metadata: dict[str, Any] = {}
        for key, value in self._values(num_values):
            if key in self.metadata:
                raise GGUFError(f"{self.path}: the metadata holds {key!r} twice")
            self.metadata[key] = value
        self.tensors = self._table(num_tensors)

    def _take(self, size: int, what: str) -> bytes:
        if size > self.size - self._at:
            raise GGUFError(
                f"{self.path} is truncated or damaged: {what} would take {size} bytes at byte {self._at} of {self.size}"
            )
        if size > _MOST_BYTES - self._at:
            raise GGUFError(f"{self.path}: metadata and tensor table are longer than {_MOST_BYTES} bytes at {what}")
        self._at += size
        if len(content := self._file.read(size)) != size:
            raise GGUFError(f"{self.path} became shorter while it was read")
        return content

    def _number(self, code: str, what: str) -> int:
        return int(struct.unpack("<" + code, self._take(struct.calcsize(code), what))[0])

    def _fits(self, count: int, smallest: int, what: str) -> None:
        """Whether as many things can follow."""
        if count * smallest > self.size - self._at:
            raise GGUFError(
                f"{self.path} is truncated or damaged: {count} {what} do not fit into its {self.size} bytes"
            )

    def _string(self, what: str) -> str:
        raw = self._take(self._number("Q", what), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise GGUFError(f"{self.path}: {what}, {raw[:40]!r}, is no UTF-8") from None

    def _values(self, count: int) -> Iterator[tuple[str, Any]]:
        for number in range(count):
            key = self._string(f"the key of metadata value {number}")
            yield key, self._value(key, self._number("I", f"the type of {key!r}"))

    def _value(self, key: str, kind: int) -> Any:
        if kind == _STRING:
            return self._string(f"metadata {key!r}")
        if kind in _SCALARS:
            return self._scalars(key, kind, 1)[0]
        if kind != _ARRAY:
            raise GGUFError(f"{self.path}: metadata {key!r} is of type {kind}, which GGUF does not have")
        entries = self._number("I", f"the type of {key!r}")
        count = self._number("Q", f"the length of {key!r}")
        if count > _MOST_ENTRIES:
            raise GGUFError(f"{self.path}: metadata {key!r} is said to have {count} entries, more than {_MOST_ENTRIES}")
        if entries == _STRING:
            self._fits(count, 8, f"strings of {key!r}")
            what = f"an entry of metadata {key!r}"
            return [self._string(what) for _ in range(count)]
        if entries in _SCALARS:
            return self._scalars(key, entries, count)
        raise GGUFError(f"{self.path}: metadata {key!r} is an array of type {entries}, which is not read")

    def _scalars(self, key: str, kind: int, count: int) -> list[Any]:
        kinds = np.dtype(_SCALARS[kind]).newbyteorder("<")
        return np.frombuffer(self._take(count * kinds.itemsize, f"metadata {key!r}"), kinds).tolist()

    def _table(self, count: int) -> dict[str, GGUFTensor]:
        entries: list[GGUFTensor] = []
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise GGUFError(f"{self.path}: general.alignment = {alignment!r} is no power of two")
        for number in range(count):
            name = self._string(f"the name of tensor {number}")
            dimensions = self._number("I", f"the dimensions of {name!r}")
            if not 1 <= dimensions <= _MOST_DIMENSIONS:
                raise GGUFError(f"{self.path}: tensor {name!r} has {dimensions} dimensions, not 1 to 4")
            shape = tuple(self._number("Q", f"the shape of {name!r}") for _ in range(dimensions))[::-1]
            # no type takes less than a bit per number
            if not 0 < prod(shape) <= 8 * self.size:
                raise GGUFError(f"{self.path} is truncated or damaged: tensor {name!r} has the shape {shape}")
            kind = self._number("I", f"the type of {name!r}")
            entries.append(GGUFTensor(name, shape, kind, self._number("Q", f"the offset of {name!r}")))
        numbers_start = -(-self._at // alignment) * alignment
        table: dict[str, GGUFTensor] = {}
        for entry in entries:
            start = numbers_start + entry.start
            if entry.name in table:
                raise GGUFError(f"{self.path}: tensor {entry.name!r} is there twice")
            if entry.start % alignment or start >= self.size:
                raise GGUFError(
                    f"{self.path} is truncated or damaged: tensor {entry.name!r} is said to start at byte {start} of "
                    f"{self.size}"
                )
            table[entry.name] = GGUFTensor(entry.name, entry.shape, entry.type_number, start)
        return table

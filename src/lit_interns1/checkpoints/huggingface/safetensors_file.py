"""One safetensors file: a header that is checked to the last byte, and windows of its tensors.

    N, 8 bytes little-endian | N bytes of JSON: key → dtype, shape, [begin, end) | the numbers, no gap and no overlap

A file that is not exactly this is refused, and no code in it is run. Windows are read, not mapped: where a file is cut
off or a disk fails, reading ends with an error, while a mapped page would end the process.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_interns1.checkpoints.huggingface.errors import WeightsError
from lit_interns1.checkpoints.huggingface.json_file import MAX_JSON_BYTES, open_regular, parse_object, read_exactly

Window = tuple[slice, ...]
"""One slice with start and stop per dimension."""

DTYPES: dict[str, tuple[int, torch.dtype | None]] = {
    "F64": (64, torch.float64), "F32": (32, torch.float32), "F16": (16, torch.float16), "BF16": (16, torch.bfloat16),
    "F8_E4M3": (8, torch.float8_e4m3fn), "F8_E5M2": (8, torch.float8_e5m2), "F8_E8M0": (8, torch.float8_e8m0fnu),
    "F8_E4M3FNUZ": (8, torch.float8_e4m3fnuz), "F8_E5M2FNUZ": (8, torch.float8_e5m2fnuz),
    "F6_E2M3": (6, None), "F6_E3M2": (6, None), "F4": (4, None), "C64": (64, torch.complex64),
    "I64": (64, torch.int64), "I32": (32, torch.int32), "I16": (16, torch.int16), "I8": (8, torch.int8),
    "U64": (64, torch.uint64), "U32": (32, torch.uint32), "U16": (16, torch.uint16), "U8": (8, torch.uint8),
    "BOOL": (8, torch.bool),
}  # fmt: skip
"""Bits of a number, and its type in torch if it has one, by the name that headers use."""

SCALED_TYPES = ("F8_E4M3", "F8_E5M2")
"""Types of numbers that need scales."""

_CHUNK_BYTES = 4 << 20
_STRANGERS = {
    b"PK\x03\x04": "a zip archive, as torch.save writes it: a pickle, which is not read",
    b"\x80": "a pickle, which is not read",
    b"GGUF": "a GGUF file",
    b"version https://git-lfs": "a pointer of Git LFS: the file itself has not been downloaded (git lfs pull)",
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is and what its header says.

    Attributes:
        file: Name of the file.
        shape: Its shape.
        dtype: Its type as safetensors spells it, such as "BF16".
        start: Position of its first byte in the file.
    """

    file: str
    shape: tuple[int, ...]
    dtype: str
    start: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * DTYPES[self.dtype][0] // 8

    @property
    def is_scaled(self) -> bool:
        """Whether its numbers are FP8 and need scales."""
        return self.dtype in SCALED_TYPES


class SafetensorsFile:
    """A file whose header has been checked.

    Args:
        path: The file; links are followed.

    Attributes:
        path: The file.
        tensors: What it holds, by key, in the order of the header.
        size: Bytes of the whole file.

    Raises:
        WeightsError: If it is no safetensors file, or header and size disagree in any way.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_regular(path) as (descriptor, status):
            self.size, self._modified = status.st_size, status.st_mtime_ns
            start = bytearray(min(self.size, 24))
            read_exactly(descriptor, memoryview(start), 0, path)
            length = self._header_length(bytes(start))
            header = bytearray(length)
            read_exactly(descriptor, memoryview(header), 8, path)
        self.tensors = self._checked(parse_object(bytes(header), f"{path}: the header"), 8 + length)

    def _damaged(self, detail: str) -> WeightsError:
        return WeightsError(f"{self.path} is damaged or no safetensors file: {detail}")

    def _header_length(self, start: bytes) -> int:
        for magic, what in _STRANGERS.items():
            if start.startswith(magic) and start[8:9] != b"{":
                raise WeightsError(f"{self.path} is no safetensors file but {what}")
        if len(start) < 10:
            raise self._damaged(f"it has {self.size} bytes")
        length = int.from_bytes(start[:8], "little")
        if length > min(self.size - 8, MAX_JSON_BYTES):
            raise self._damaged(f"a header of {length} bytes in a file of {self.size}; at most {MAX_JSON_BYTES}")
        if start[8:9] != b"{":
            raise self._damaged("the header does not begin with '{'")
        return length

    def _checked(self, header: Mapping[str, Any], first: int) -> dict[str, StoredTensor]:
        metadata = header.get("__metadata__")
        if metadata is not None and not (
            isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
        ):
            raise self._damaged("__metadata__ does not map names to strings")
        spans = {key: self._span(key, entry) for key, entry in header.items() if key != "__metadata__"}
        position = 0
        for key, (_, _, begin, end) in sorted(spans.items(), key=lambda item: item[1][2:]):
            if begin != position:
                how = "overlaps the tensor before it" if begin < position else "leaves a gap before it"
                raise self._damaged(f"{key} begins at byte {begin} of the numbers and {how}, which ends at {position}")
            position = end
        if first + position != self.size:
            raise self._damaged(f"the header describes {first + position} bytes, the file has {self.size}")
        name = self.path.name
        return {key: StoredTensor(name, shape, dtype, first + begin) for key, (shape, dtype, begin, _) in spans.items()}

    def _span(self, key: str, entry: Any) -> tuple[tuple[int, ...], str, int, int]:
        """Shape, type, and the first byte and the one behind the last among the numbers."""
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise self._damaged(f"{key} is not described by dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise self._damaged(f"{key} has the dtype {dtype!r:.80}, known are {', '.join(DTYPES)}")
        for what, numbers in (("shape", shape), ("data_offsets", offsets)):
            if not isinstance(numbers, list) or any(type(n) is not int or not 0 <= n < 1 << 63 for n in numbers):
                raise self._damaged(f"{key} has the {what} {numbers!r:.80}: not whole numbers from 0 on")
        if len(offsets) != 2 or offsets[0] > offsets[1]:
            raise self._damaged(f"{key} has the data_offsets {offsets!r:.80}: not a begin and an end")
        bits = math.prod(shape) * DTYPES[dtype][0]
        if bits != 8 * (offsets[1] - offsets[0]):
            raise self._damaged(
                f"{key} of {dtype} and shape {tuple(shape)!r:.80} needs {bits / 8:g} bytes, data_offsets are {offsets}"
            )
        return tuple(shape), dtype, offsets[0], offsets[1]

    def read(self, key: str, window: Window) -> Tensor:
        """A window of a tensor, in memory of its own.

        Rows are read whole, so a window of a few columns takes the memory of all of them while it is read.

        Raises:
            WeightsError: If the file cannot be read or is no longer the one that was checked, or the type is not
                torch's.
        """
        stored = self.tensors[key]
        bits, dtype = DTYPES[stored.dtype]
        if dtype is None:
            raise WeightsError(f"{self.path}: {key} is {stored.dtype}, which cannot be read")
        position, parts = stored.start, list(window)
        strides = [math.prod(stored.shape[i + 1 :]) * bits // 8 for i in range(len(stored.shape))]
        rows = next((i for i, part in enumerate(parts) if part.stop - part.start != 1), len(parts))
        for i in range(rows):
            position += parts[i].start * strides[i]
            parts[i] = slice(0, 1)
        span = [1] * rows
        if rows < len(parts):
            position += parts[rows].start * strides[rows]
            span += [parts[rows].stop - parts[rows].start, *stored.shape[rows + 1 :]]
            parts[rows] = slice(0, span[rows])
        values = torch.empty(span, dtype=dtype)
        self._fill(values.flatten().view(torch.uint8).numpy().data, position)
        part = values[tuple(parts)]
        return part if part.shape == values.shape else part.clone()

    def _fill(self, buffer: memoryview, position: int) -> None:
        with open_regular(self.path) as (descriptor, status):
            if (status.st_size, status.st_mtime_ns) != (self.size, self._modified):
                raise WeightsError(f"{self.path} has been changed since its header was read")
            read_exactly(descriptor, buffer, position, self.path)

    def sha256(self) -> str:
        """The file's SHA-256, read in chunks.

        Raises:
            WeightsError: If it cannot be read or has changed.
        """
        digest, chunk = hashlib.sha256(), memoryview(bytearray(min(_CHUNK_BYTES, self.size)))
        for position in range(0, self.size, _CHUNK_BYTES):
            part = chunk[: self.size - position]
            self._fill(part, position)
            digest.update(part)
        return digest.hexdigest()

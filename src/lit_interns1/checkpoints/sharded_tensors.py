"""Tensors of a sharded checkpoint in their files: any window of any tensor, without reading the rest.

    tensor = ∪ chunks;   chunk = a torch.save archive at [offset, offset + length) of a file, numbers stored as they are

The archive's own pickle is read with fake tensors, which tells type, strides and where the numbers begin; the files are
memory-mapped. The numbers may begin at any byte, so what is read is copied: a window, never a chunk.
"""

from __future__ import annotations

import io
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from lit_interns1.checkpoints.sharded import read_sharded_metadata

Window = tuple[slice, ...]


@dataclass(frozen=True)
class _Chunk:
    """One stored part of a tensor: its box, and its archive's file, offset and length in bytes."""

    box: Window
    file: Path
    offset: int
    length: int


class _Slice(io.RawIOBase):
    """A range of bytes of a file as a file."""

    def __init__(self, file: io.BufferedReader, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._position = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        self._file.seek(self._offset + self._position)
        count = self._file.readinto(memoryview(buffer)[: max(0, self._length - self._position)])
        self._position += count
        return count


def _slice(file: io.BufferedReader, chunk: _Chunk) -> io.BufferedReader:
    return io.BufferedReader(_Slice(file, chunk.offset, chunk.length))


class ShardedTensors:
    """The tensors of a sharded checkpoint whose names begin with a prefix.

    Args:
        path: Folder of the checkpoint.
        prefix: What their names begin with; it is left out of `tensors`.

    Attributes:
        tensors: Shape and type by name.

    Raises:
        ValueError: If the folder is damaged, or written in a way that cannot be mapped.
        UnsafeCheckpointError: If the metadata names more than data.
    """

    def __init__(self, path: str | Path, prefix: str = "") -> None:
        self.path = Path(path)
        self.tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self._chunks: dict[str, list[_Chunk]] = {}
        self._files: dict[Path, Tensor] = {}
        self._views: dict[tuple[Path, int], Tensor] = {}
        metadata = read_sharded_metadata(self.path)
        stored = {(index.fqn, index.offset): info for index, info in (metadata.storage_data or {}).items()}
        for full_name, entry in metadata.state_dict_metadata.items():
            if not full_name.startswith(prefix) or not isinstance(entry, TensorStorageMetadata):
                continue
            name, shape = full_name.removeprefix(prefix), tuple(entry.size)
            self.tensors[name] = shape, entry.properties.dtype
            chunks = []
            for chunk in entry.chunks:
                index = MetadataIndex(full_name, chunk.offsets)
                chunks.append(self._chunk(full_name, chunk.offsets, chunk.sizes, stored.get((index.fqn, index.offset))))
            self._check_cover(full_name, shape, [chunk.box for chunk in chunks])
            self._chunks[name] = chunks

    def _chunk(self, name: str, first: torch.Size, sizes: torch.Size, info: Any) -> _Chunk:
        if info is None:
            raise ValueError(f"checkpoint {self.path} is damaged: {name} at {tuple(first)} is in none of its files")
        relative, offset, length = (getattr(info, key) for key in ("relative_path", "offset", "length"))
        if getattr(info, "transform_descriptors", None):
            raise ValueError(
                f"checkpoint {self.path}: {name} is stored transformed ({info.transform_descriptors}), "
                "so it cannot be mapped"
            )
        file = self.path / relative
        if Path(relative).name != relative or not file.is_file():
            raise ValueError(f"checkpoint {self.path} is damaged: {name} is said to be in {relative!r}, no file of it")
        if not 0 <= offset <= offset + length <= file.stat().st_size:
            raise ValueError(f"checkpoint {self.path} is damaged: {relative} ends before {name} does")
        return _Chunk(tuple(slice(a, a + n) for a, n in zip(first, sizes, strict=True)), file, offset, length)

    def _check_cover(self, name: str, shape: tuple[int, ...], boxes: list[Window]) -> None:
        numbers = sum(torch.Size(part.stop - part.start for part in box).numel() for box in boxes)
        inside = all(
            0 <= part.start <= part.stop <= size for box in boxes for part, size in zip(box, shape, strict=True)
        )
        if not inside or numbers != torch.Size(shape).numel():
            raise ValueError(f"checkpoint {self.path} is damaged: the parts of {name} do not make up {shape}")

    def read(self, name: str, window: Window) -> Tensor:
        """The numbers of a window, in new memory.

        Raises:
            ValueError: If they are not stored as the metadata says.
        """
        dtype = self.tensors[name][1]
        result = torch.empty([part.stop - part.start for part in window], dtype=dtype)
        for chunk in self._chunks[name]:
            shared = [slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(chunk.box, window, strict=True)]
            if any(part.start >= part.stop for part in shared):
                continue
            inside = tuple(slice(s.start - c.start, s.stop - c.start) for s, c in zip(shared, chunk.box, strict=True))
            target = tuple(slice(s.start - w.start, s.stop - w.start) for s, w in zip(shared, window, strict=True))
            as_bytes = result[target].unsqueeze(-1).view(torch.uint8)
            as_bytes.copy_(self._chunk_bytes(name, chunk)[inside])
        return result

    def _chunk_bytes(self, name: str, chunk: _Chunk) -> Tensor:
        """(*shape, bytes per number), a view of the file."""
        key = chunk.file, chunk.offset
        if key not in self._views:
            self._views[key] = self._view(name, chunk)
        return self._views[key]

    def _view(self, name: str, chunk: _Chunk) -> Tensor:
        shape, dtype = tuple(part.stop - part.start for part in chunk.box), self.tensors[name][1]
        try:
            with chunk.file.open("rb") as stream, FakeTensorMode():
                stored = torch.load(_slice(stream, chunk), weights_only=True)
            first = stored.untyped_storage()._checkpoint_offset
            size = stored.untyped_storage().nbytes()
            plain = _stored_uncompressed(chunk, first)
        except Exception as error:
            raise ValueError(f"checkpoint {self.path}: {name} cannot be read: {str(error).split('. ')[0]}") from None
        item = dtype.itemsize
        last = sum((n - 1) * step for n, step in zip(stored.shape, stored.stride(), strict=True))
        end = (stored.storage_offset() + last + 1) * item if stored.numel() else 0
        if tuple(stored.shape) != shape or stored.dtype != dtype or end > size or first + size > chunk.length:
            raise ValueError(
                f"checkpoint {self.path} is damaged: {name} is {tuple(stored.shape)} {stored.dtype} in "
                f"{chunk.file.name}, {shape} {dtype} in the metadata"
            )
        if not plain:
            raise ValueError(f"checkpoint {self.path}: {name} is stored compressed, so it cannot be mapped")
        strides = [step * item for step in stored.stride()]
        return self._mapped(chunk.file).as_strided(
            (*shape, item), (*strides, 1), chunk.offset + first + stored.storage_offset() * item
        )

    def _mapped(self, file: Path) -> Tensor:
        if file not in self._files:
            size = file.stat().st_size
            storage = torch.UntypedStorage.from_file(str(file), shared=False, nbytes=size)
            self._files[file] = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (size,))  # type: ignore[call-overload]
        return self._files[file]


def _stored_uncompressed(chunk: _Chunk, first: int) -> bool:
    """Whether the record that begins behind `first` bytes of the archive is stored as it is."""
    with chunk.file.open("rb") as stream, zipfile.ZipFile(_slice(stream, chunk)) as archive:
        before = [entry for entry in archive.infolist() if entry.header_offset < first]
    return max(before, key=lambda entry: entry.header_offset).compress_type == zipfile.ZIP_STORED

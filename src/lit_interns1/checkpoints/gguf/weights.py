"""The tensors of a GGUF file: any window of them, multiplied out by the `gguf` library as it is read.

    W[i, block] = scale(i, block) · integers(i, block) (+ minimum(i, block))      a block: 32 … 256 numbers of a row

Only the blocks that a window touches are read. Rows of queries and keys that lie in the order of neighbours, (head, j,
half), are put into that of halves, (head, half, j); for these whole heads are read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_interns1.checkpoints.gguf.config import gguf_architecture, gguf_config, open_gguf_file
from lit_interns1.checkpoints.huggingface.errors import Problem, WeightsError
from lit_interns1.checkpoints.huggingface.files import WeightFiles
from lit_interns1.checkpoints.huggingface.json_file import open_regular, read_exactly
from lit_interns1.checkpoints.huggingface.safetensors_file import StoredTensor, Window
from lit_interns1.data.gguf_file import GGUFFile, GGUFTensor

_PLAIN = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types that are numbers as they lie."""


@dataclass(frozen=True)
class _Type:
    """How numbers lie.

    Attributes:
        name: As ggml names it.
        block: Numbers of a row that are stored together.
        block_bytes: Bytes that they take.
        unpack: (rows, bytes) → (rows, numbers); None: the bytes are the numbers.
    """

    name: str
    block: int
    block_bytes: int
    unpack: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]] | None

    @property
    def dtype(self) -> torch.dtype:
        return _PLAIN.get(self.name, torch.float32)

    def numbers(self, raw: Tensor) -> Tensor:
        """(rows, bytes) uint8 → (rows, numbers)."""
        if self.unpack is None:
            return raw.view(self.dtype)
        return torch.from_numpy(self.unpack(raw.numpy()))


class GGUFWeights(WeightFiles):
    """All tensors of a file, read as those of a folder are.

    Args:
        file: Its head.
        head_dim: Width of an attention head.

    Raises:
        WeightsError: If the `gguf` library is missing, a tensor is of a type that it cannot multiply out, or one
            reaches beyond the file or into another.
    """

    def __init__(self, file: GGUFFile, head_dim: int) -> None:
        self.folder, self.block_shape, self.bytes_read = file.path, (1, 1), 0
        self.checksums, self.sizes = {}, {file.path.name: file.size}
        self._file, self._head_dim = file, head_dim
        neighbours = gguf_architecture(file).neighbours
        self._permuted = {name for name in file.tensors if neighbours and (".attn_q." in name or ".attn_k." in name)}
        self._types = _types(file)
        _check_places(file, self._types)
        self.tensors = {
            name: StoredTensor(file.path.name, tensor.shape, _safetensors_name(self._types[name]), tensor.start)
            for name, tensor in file.tensors.items()
        }

    def read(self, key: str, window: Window) -> Tensor:
        """A window of a tensor; see `WeightFiles`."""
        together = self._head_dim if key in self._permuted else 1
        rows = window[0]
        first, last = rows.start // together * together, -(-rows.stop // together) * together
        values = self._rows(key, first, last, window[1] if len(window) > 1 else slice(0, 1))
        if together > 1:
            values = values.unflatten(0, (-1, together // 2, 2)).transpose(1, 2).flatten(0, 2)
        return values[rows.start - first : rows.stop - first].reshape([part.stop - part.start for part in window])

    def _rows(self, key: str, first: int, last: int, columns: slice) -> Tensor:
        """Rows of a matrix as they lie in the file; a vector is a matrix of one column."""
        tensor, kind = self._file.tensors[key], self._types[key]
        width = tensor.shape[1] if len(tensor.shape) > 1 else 1
        row_bytes = width // kind.block * kind.block_bytes
        blocks = slice(columns.start // kind.block, -(-columns.stop // kind.block))
        skip, taken = blocks.start * kind.block_bytes, (blocks.stop - blocks.start) * kind.block_bytes
        offset = columns.start - blocks.start * kind.block
        raw = np.empty((last - first, taken), np.uint8)
        whole_rows = taken == row_bytes  # they lie one behind the other
        with open_regular(self._file.path) as (descriptor, _):
            for number, part in enumerate(raw[None] if whole_rows else raw):
                place = tensor.start + (first + number) * row_bytes + skip
                read_exactly(descriptor, memoryview(part).cast("B"), place, self._file.path)
        self.bytes_read += raw.nbytes
        return kind.numbers(torch.from_numpy(raw))[:, offset : offset + columns.stop - columns.start]


def open_gguf_weights(path: str | Path) -> GGUFWeights:
    """The tensors of a file.

    Raises:
        WeightsError: If it cannot be read, or describes no model that can be.
    """
    file = open_gguf_file(path)
    return GGUFWeights(file, gguf_config(file).head_dim)


def _types(file: GGUFFile) -> dict[str, _Type]:
    """Types of the tensors by name."""
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
    except ImportError:
        raise WeightsError(
            f"{file.path}: weights of GGUF files are read with the gguf library: pip install 'lit-interns1[gguf]'"
        ) from None
    known: dict[int, _Type] = {}
    for number in {tensor.type_number for tensor in file.tensors.values()}:
        try:
            kind = GGMLQuantizationType(number)
            block, block_bytes = GGML_QUANT_SIZES[kind]
            unpack = None if kind.name in _PLAIN else lambda raw, kind=kind: dequantize(raw, kind)
            known[number] = _Type(kind.name, block, block_bytes, unpack)
            known[number].numbers(torch.zeros(1, block_bytes, dtype=torch.uint8))
        except (ValueError, KeyError, NotImplementedError):
            names = [tensor.name for tensor in file.tensors.values() if tensor.type_number == number]
            what = getattr(kind, "name", "type") if number in list(GGMLQuantizationType) else "an unknown type"
            detail = f"{what} (number {number} of ggml) cannot be multiplied out"
            raise WeightsError(
                f"{file.path} has tensors that cannot be read:", [Problem("type", name, detail) for name in names]
            ) from None
    return {name: known[tensor.type_number] for name, tensor in file.tensors.items()}


def _check_places(file: GGUFFile, types: dict[str, _Type]) -> None:
    problems: list[Problem] = []
    before: GGUFTensor | None = None
    end = 0
    for tensor in sorted(file.tensors.values(), key=lambda tensor: tensor.start):
        kind = types[tensor.name]
        if tensor.shape[-1] % kind.block or (len(tensor.shape) == 1 and kind.block > 1):
            detail = f"{tensor.shape} cannot be made of rows of {kind.name} blocks of {kind.block}"
            problems.append(Problem("shape", tensor.name, detail))
        if before is not None and tensor.start < end:
            problems.append(Problem("duplicate", tensor.name, f"lies at the place of {before.name}"))
        end = tensor.start + int(np.prod(tensor.shape, dtype=object)) // kind.block * kind.block_bytes
        before = tensor
        if end > file.size:
            detail = f"ends at byte {end}, the file at byte {file.size}: it is truncated"
            problems.append(Problem("missing", tensor.name, detail))
    if problems:
        raise WeightsError(f"{file.path} is damaged:", problems)


def _safetensors_name(kind: _Type) -> str:
    """The type that is read, as safetensors names it."""
    return kind.name if kind.name in _PLAIN else "F32"

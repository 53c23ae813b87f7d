"""The safetensors files of a folder: what they hold, and any window of it.

    model.safetensors, or the files that model.safetensors.index.json names

Files are memory-mapped: a window is a view, and only its pages are read. A matrix W stored as FP8 comes with one scale
per block of b₀ × b₁ numbers under its key plus `_scale_inv`, and is multiplied by it:

    W[i, j] = fp8[i, j] · scale[⌊i/b₀⌋, ⌊j/b₁⌋]            (DeepSeek-V3, arXiv 2412.19437 §3.3; Intern-S1-Pro's files)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lit_interns1.checkpoints.huggingface.errors import Problem, WeightsError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SCALE_SUFFIX = "_scale_inv"
SCALED_TYPES = ("F8_E4M3", "F8_E5M2")
"""Types of numbers that need scales."""
WEIGHT_TYPES = ("F64", "F32", "F16", "BF16", *SCALED_TYPES)
SCALE_TYPES = ("F32", "F16", "BF16", "F8_E8M0")

Window = tuple[slice, ...]
"""One slice with start and stop per dimension."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is and what its header says.

    Attributes:
        file: Name of the file.
        shape: Its shape.
        dtype: Its type as safetensors spells it, such as "BF16".
    """

    file: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def is_scaled(self) -> bool:
        """Whether its numbers are FP8 and need scales."""
        return self.dtype in SCALED_TYPES


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        WeightsError: If the file does not exist or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not an object")
    return content


class WeightFiles:
    """All tensors of a folder.

    Args:
        folder: The folder.
        block_shape: b₀ and b₁, rows and columns of a block that shares one FP8 scale.

    Attributes:
        tensors: What the files hold, by key.
        bytes_read: Bytes of all windows so far, scales included.

    Raises:
        WeightsError: If there are no such files, one is damaged, or index and files disagree.
    """

    def __init__(self, folder: Path, block_shape: tuple[int, int] = (128, 128)) -> None:
        self.folder, self.block_shape, self.bytes_read = folder, block_shape, 0
        self._open_files: dict[str, Any] = {}
        self.tensors: dict[str, StoredTensor] = {}
        index = self._read_index()
        names = sorted(set(index.values())) if index is not None else [self._single_file()]
        problems: list[Problem] = []
        for name in names:
            for key, tensor in self._read_header(name).items():
                if key in self.tensors:
                    detail = f"in {self.tensors[key].file} and in {name}"
                    problems.append(Problem("duplicate", key, detail))
                elif index is not None and key not in index:
                    problems.append(Problem("unexpected", key, f"in {name}, but {INDEX} does not list it"))
                self.tensors.setdefault(key, tensor)
        for key, name in (index or {}).items():
            if key not in self.tensors:
                problems.append(Problem("missing", key, f"{INDEX} says that it is in {name}, which does not hold it"))
        if problems:
            raise WeightsError(f"{folder}: the files and their index disagree:", problems)

    def _read_index(self) -> Mapping[str, str] | None:
        path = self.folder / INDEX
        if not path.is_file():
            return None
        if (self.folder / SINGLE).is_file():
            raise WeightsError(f"{self.folder} holds both {SINGLE} and {INDEX}: remove the one that is out of date")
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise WeightsError(f"{path} has no 'weight_map'")
        for key, name in weight_map.items():
            if not isinstance(name, str) or Path(name).name != name:
                raise WeightsError(f"{path}: {key!r} is said to be in {name!r}, which is no file of this folder")
        return weight_map

    def _single_file(self) -> str:
        if (self.folder / SINGLE).is_file():
            return SINGLE
        found = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if len(found) == 1:
            return found[0]
        if found:
            raise WeightsError(f"{self.folder} holds {len(found)} *.safetensors files, but no {INDEX} that lists them")
        other = sorted(path.name for path in self.folder.glob("*.bin"))
        hint = f"; {other[0]} is a pickle, which is not read: save it as safetensors first" if other else ""
        raise WeightsError(f"{self.folder} holds no *.safetensors file{hint}")

    def _open(self, name: str) -> Any:
        if name not in self._open_files:
            path = self.folder / name
            if not path.is_file():
                raise WeightsError(f"{INDEX} names {name}, but {path} does not exist")
            try:
                self._open_files[name] = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise WeightsError(f"{path} is damaged or no safetensors file: {error}") from None
        return self._open_files[name]

    def _read_header(self, name: str) -> dict[str, StoredTensor]:
        file, tensors = self._open(name), {}
        for key in file.keys():  # noqa: SIM118  # a safe_open is no dict
            part = file.get_slice(key)
            tensors[key] = StoredTensor(name, tuple(part.get_shape()), str(part.get_dtype()))
        return tensors

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales that belong to an FP8 tensor of this shape."""
        return (*shape[:-2], *(-(-size // block) for size, block in zip(shape[-2:], self.block_shape, strict=True)))

    def read(self, key: str, window: Window) -> Tensor:
        """A window of a tensor: a view of the file, or for FP8 the float32 numbers."""
        stored = self.tensors[key]
        values = self._view(key, window)
        if not stored.is_scaled:
            return values
        blocks: list[slice] = list(window[:-2])
        for part, block in zip(window[-2:], self.block_shape, strict=True):
            blocks.append(slice(part.start // block, -(-part.stop // block)))
        scales = self._view(key + SCALE_SUFFIX, tuple(blocks))
        return dequantize(values, scales, self.block_shape, (window[-2].start, window[-1].start))

    def _view(self, key: str, window: Window) -> Tensor:
        try:
            view: Tensor = self._open(self.tensors[key].file).get_slice(key)[window]
        except SafetensorError as error:
            raise WeightsError(f"{self.folder / self.tensors[key].file}: {key} cannot be read: {error}") from None
        self.bytes_read += view.numel() * view.element_size()
        return view


def dequantize(values: Tensor, scales: Tensor, block_shape: tuple[int, int], first: tuple[int, int] = (0, 0)) -> Tensor:
    """FP8 numbers times the scales of their blocks, float32.

    Args:
        values: (..., rows, columns), a window.
        scales: Scales of the blocks that the window touches.
        block_shape: Rows and columns of a block.
        first: Row and column of the whole matrix at which the window starts; it need not start with a block.
    """
    scales = scales.to(torch.float32)
    for dimension, block, start in zip((-2, -1), block_shape, first, strict=True):
        offset = start % block
        scales = scales.repeat_interleave(block, dimension).narrow(dimension, offset, values.shape[dimension])
    return values.to(torch.float32) * scales

"""The safetensors files of a folder: what they hold, and any window of it.

    model.safetensors, or the files that model.safetensors.index.json names

A matrix W stored as FP8 comes with one scale per block of b₀ × b₁ numbers under its key plus `_scale_inv`, and is
multiplied by it:

    W[i, j] = fp8[i, j] · scale[⌊i/b₀⌋, ⌊j/b₁⌋]            (DeepSeek-V3, arXiv 2412.19437 §3.3; Intern-S1-Pro's files)

Where the index lists SHA-256 sums of the files, as exports of this project do, they can be checked.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_interns1.checkpoints.huggingface.errors import Problem, WeightsError
from lit_interns1.checkpoints.huggingface.json_file import read_json
from lit_interns1.checkpoints.huggingface.safetensors_file import SCALED_TYPES, SafetensorsFile, StoredTensor, Window

_log = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SUFFIX = ".safetensors"
CHECKSUMS = "sha256"
"""Entry of the index's metadata: SHA-256 of every file, in hexadecimal digits, by its name."""
SCALE_SUFFIX = "_scale_inv"
WEIGHT_TYPES = ("F64", "F32", "F16", "BF16", *SCALED_TYPES)
SCALE_TYPES = ("F32", "F16", "BF16", "F8_E8M0")


class WeightFiles:
    """All tensors of a folder.

    Args:
        folder: The folder.
        block_shape: b₀ and b₁, rows and columns of a block that shares one FP8 scale.

    Attributes:
        tensors: What the files hold, by key.
        sizes: Bytes of the files, by name.
        checksums: SHA-256 of the files, by name; empty if the index has none.
        bytes_read: Bytes of all windows so far, scales included.

    Raises:
        WeightsError: If there are no such files, one is damaged, or index and files disagree.
    """

    def __init__(self, folder: Path, block_shape: tuple[int, int] = (128, 128)) -> None:
        self.folder, self.block_shape, self.bytes_read = folder, block_shape, 0
        self.tensors: dict[str, StoredTensor] = {}
        self.checksums: dict[str, str] = {}
        index = self._read_index()
        weight_map = None if index is None else self._weight_map(index)
        names = [self._single_file()] if weight_map is None else sorted(set(weight_map.values()))
        self._files = {name: SafetensorsFile(folder / name) for name in names}
        self.sizes = {name: file.size for name, file in self._files.items()}
        self._check_index(weight_map)
        if index is not None:
            self._read_metadata(index.get("metadata"))

    def _read_index(self) -> dict[str, Any] | None:
        path = self.folder / INDEX
        if not os.path.lexists(path):
            return None
        if os.path.lexists(self.folder / SINGLE):
            raise WeightsError(f"{self.folder} holds both {SINGLE} and {INDEX}: remove the one that is out of date")
        return read_json(path)

    def _weight_map(self, index: Mapping[str, Any]) -> dict[str, str]:
        """Which file holds which key."""
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise WeightsError(f"{self.folder / INDEX} has no 'weight_map' from keys to files")
        for key, name in weight_map.items():
            if not isinstance(name, str) or re.fullmatch(r"[^/\\\0]+" + re.escape(SUFFIX), name) is None:
                raise WeightsError(
                    f"{self.folder / INDEX}: {key!r} is said to be in {name!r:.200}, which is no file of this folder "
                    f"that ends with {SUFFIX}"
                )
        return weight_map

    def _single_file(self) -> str:
        if os.path.lexists(self.folder / SINGLE):
            return SINGLE
        found = sorted(path.name for path in self.folder.glob("*" + SUFFIX))
        if len(found) == 1:
            return found[0]
        if found:
            raise WeightsError(f"{self.folder} holds {len(found)} *{SUFFIX} files, but no {INDEX} that lists them")
        other = sorted(path.name for path in self.folder.glob("*.bin"))
        hint = f"; {other[0]} is a pickle, which is not read: save it as safetensors first" if other else ""
        raise WeightsError(f"{self.folder} holds no *{SUFFIX} file{hint}")

    def _check_index(self, weight_map: Mapping[str, str] | None) -> None:
        problems: list[Problem] = []
        for name, file in self._files.items():
            for key, tensor in file.tensors.items():
                if key in self.tensors:
                    detail = f"in {self.tensors[key].file} and in {name}"
                    problems.append(Problem("duplicate", key, detail))
                elif weight_map is not None and key not in weight_map:
                    problems.append(Problem("unexpected", key, f"in {name}, but {INDEX} does not list it"))
                self.tensors.setdefault(key, tensor)
        for key, name in (weight_map or {}).items():
            if key not in self._files[name].tensors:
                problems.append(Problem("missing", key, f"{INDEX} says that it is in {name}, which does not hold it"))
        if problems:
            raise WeightsError(f"{self.folder}: the files and their index disagree:", problems)

    def _read_metadata(self, metadata: Any) -> None:
        """Total size and checksums. Only where the index has checksums must the size be right: published ones err."""
        path = self.folder / INDEX
        if not isinstance(metadata, dict | None):
            raise WeightsError(f"{path}: metadata is a {type(metadata).__name__}, not an object")
        metadata = metadata or {}
        stated, total = metadata.get("total_size"), sum(tensor.nbytes for tensor in self.tensors.values())
        if stated is not None and stated != total:
            message = f"{path}: total_size is {stated!r:.80}, but the tensors of the files have {total} bytes"
            if CHECKSUMS in metadata:
                raise WeightsError(message)
            _log.warning("%s", message)
        if CHECKSUMS not in metadata:
            return
        checksums = metadata[CHECKSUMS]
        if not isinstance(checksums, dict):
            raise WeightsError(f"{path}: {CHECKSUMS} is a {type(checksums).__name__}, not an object")
        if checksums.keys() != self._files.keys():
            missing, unknown = self._files.keys() - checksums.keys(), checksums.keys() - self._files.keys()
            raise WeightsError(
                f"{path}: {CHECKSUMS} does not list the files of weight_map: missing {_some(missing)}, unknown "
                f"{_some(unknown)}"
            )
        for name, digest in checksums.items():
            if not isinstance(digest, str) or re.fullmatch("[0-9a-f]{64}", digest) is None:
                raise WeightsError(f"{path}: {CHECKSUMS} of {name} is {digest!r:.80}, not 64 hexadecimal digits")
        self.checksums = checksums

    def verify(self, names: Iterable[str]) -> int:
        """Compares files with their checksums.

        Args:
            names: Files; those without a checksum are passed over.

        Returns:
            Bytes that were hashed.

        Raises:
            WeightsError: With all files that are not what was written.
        """
        hashed, changed = 0, []
        for name in names:
            if name in self.checksums:
                hashed += self.sizes[name]
                if (digest := self._files[name].sha256()) != self.checksums[name]:
                    changed.append(f"{name} ({digest}, written was {self.checksums[name]})")
        if changed:
            raise WeightsError(f"{self.folder}: the SHA-256 of {', '.join(changed)} is not that of {INDEX}")
        return hashed

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales that belong to an FP8 tensor of this shape."""
        return (*shape[:-2], *(-(-size // block) for size, block in zip(shape[-2:], self.block_shape, strict=True)))

    def read(self, key: str, window: Window) -> Tensor:
        """A window of a tensor, in memory of its own: of the file's type, or for FP8 the float32 numbers.

        Raises:
            WeightsError: If the file cannot be read, or has changed since its header was.
        """
        stored = self.tensors[key]
        values = self.read_stored(key, window)
        if not stored.is_scaled:
            return values
        blocks: list[slice] = list(window[:-2])
        for part, block in zip(window[-2:], self.block_shape, strict=True):
            blocks.append(slice(part.start // block, -(-part.stop // block)))
        scales = self.read_stored(key + SCALE_SUFFIX, tuple(blocks))
        return dequantize(values, scales, self.block_shape, (window[-2].start, window[-1].start))

    def read_stored(self, key: str, window: Window) -> Tensor:
        """As `read`, but FP8 numbers as they are, without their scales."""
        values = self._files[self.tensors[key].file].read(key, window)
        self.bytes_read += values.numel() * values.element_size()
        return values


def _some(names: Iterable[str]) -> str:
    found = sorted(names)
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "") if found else "none"


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

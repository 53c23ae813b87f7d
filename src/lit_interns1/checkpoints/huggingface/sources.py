"""Tensors under our names, wherever they are stored or held: what an export reads.

    tensor = ∪ windows over all processes, each number in one window; read(window) gives part of one window

So a source is never whole in memory, and a run that is divided over ranks is a source like any other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lit_interns1.checkpoints.agreement import this_rank, together
from lit_interns1.checkpoints.huggingface.audit import plan_weights, saved_tensors
from lit_interns1.checkpoints.huggingface.config import is_pretrained_folder
from lit_interns1.checkpoints.huggingface.encoder_config import (
    NetworkConfig,
    multimodal_config_from_pretrained,
    network,
    text_of,
)
from lit_interns1.checkpoints.huggingface.errors import WeightsError
from lit_interns1.checkpoints.huggingface.files import Window
from lit_interns1.checkpoints.huggingface.opening import open_pretrained, verify_share
from lit_interns1.checkpoints.huggingface.rules import Piece
from lit_interns1.checkpoints.huggingface.safetensors_file import DTYPES
from lit_interns1.checkpoints.reading import CONFIG_KEY, MULTIMODAL_KEY, read_checkpoint
from lit_interns1.checkpoints.sharded_tensors import ShardedTensors
from lit_interns1.models.config import config_from_dict
from lit_interns1.models.multimodal import multimodal_config_from_dict


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


def held_window(tensor: Tensor) -> Window:
    """What this rank holds of a tensor: all of a plain one, its part of a DTensor."""
    shape, first = tuple(tensor.shape), (0,) * tensor.ndim
    if isinstance(tensor, DTensor):
        shape, first = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(start, start + size) for start, size in zip(first, shape, strict=True))


def whole_window(shape: Sequence[int]) -> Window:
    """All of a tensor."""
    return tuple(slice(0, size) for size in shape)


class ModelSource:
    """The tensors of a model, plain or DTensors of any mesh: a run as it is.

    Of numbers that several ranks hold, the first of them contributes: coordinate 0 of the mesh dimensions that
    replicate, and rank 0 for plain tensors, which are taken to be equal on all ranks.

    Args:
        model: The model; its names are those of its `state_dict`.

    Raises:
        WeightsError: If it is on the meta device.
    """

    def __init__(self, model: nn.Module) -> None:
        self._tensors = {name: tensor.detach() for name, (tensor, _) in saved_tensors(model).items()}
        self.tensors = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in self._tensors.items()}
        if empty := [name for name, tensor in self._tensors.items() if tensor.is_meta]:
            raise WeightsError(f"the model has no weights yet: {empty[0]} is on the meta device")

    def windows(self, name: str) -> Sequence[Window]:
        """See `WeightSource`."""
        tensor = self._tensors[name]
        if not isinstance(tensor, DTensor):
            return [held_window(tensor)] if this_rank()[0] == 0 else []
        if any(placement.is_partial() for placement in tensor.placements):
            raise WeightsError(f"{name} is a sum over ranks that has not been taken: {tensor.placements}")
        coordinate = tensor.device_mesh.get_coordinate()
        if coordinate is None:
            return []
        copies = [c for c, placement in zip(coordinate, tensor.placements, strict=True) if placement.is_replicate()]
        window = held_window(tensor)
        return [] if any(copies) or any(part.start == part.stop for part in window) else [window]

    def read(self, name: str, window: Window) -> Tensor:
        """See `WeightSource`; a view."""
        tensor = self._tensors[name]
        held, local = held_window(tensor), tensor.to_local() if isinstance(tensor, DTensor) else tensor
        return local[inside(window, held)]


class StoredSource(ABC):
    """Tensors in files, of which every rank may read any window; ranks contribute whole tensors in turn."""

    tensors: dict[str, TensorInfo]

    def windows(self, name: str) -> Sequence[Window]:
        """See `WeightSource`."""
        rank, world = this_rank()
        number = list(self.tensors).index(name)
        return [whole_window(self.tensors[name].shape)] if number % world == rank else []

    @abstractmethod
    def read(self, name: str, window: Window) -> Tensor:
        """See `WeightSource`."""


class CheckpointSource(StoredSource):
    """The model in a checkpoint of a run, one file or sharded, without reading more than is asked for.

    Args:
        path: The checkpoint. Its optimizer states and everything else are left alone.
        prefix: What the names of the model's tensors begin with.

    Attributes:
        config: The model's config.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If it is no checkpoint, is damaged, or has no config of a language model.
    """

    def __init__(self, path: str | Path, prefix: str = "model.") -> None:
        checkpoint = read_checkpoint(path)
        if CONFIG_KEY not in checkpoint:
            raise ValueError(f"checkpoint {path} has no {CONFIG_KEY!r}: it was not written by LanguageModelModule")
        self.config: NetworkConfig = config_from_dict(checkpoint[CONFIG_KEY])
        head, embedding = "lm_head.weight", "embed_tokens.weight"
        if MULTIMODAL_KEY in checkpoint:
            self.config = multimodal_config_from_dict(checkpoint[MULTIMODAL_KEY])
            head, embedding = f"language_model.{head}", f"language_model.{embedding}"
        self._sharded = ShardedTensors(path, f"state_dict.{prefix}") if Path(path).is_dir() else None
        self._whole: dict[str, Tensor] = {}
        if self._sharded is not None:
            self.tensors = {name: TensorInfo(*info) for name, info in self._sharded.tensors.items()}
        else:
            entries = checkpoint["state_dict"].items()
            self._whole = {name.removeprefix(prefix): tensor for name, tensor in entries if name.startswith(prefix)}
            self.tensors = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in self._whole.items()}
        if not self.tensors:
            raise ValueError(f"checkpoint {path} holds no tensors whose names begin with {prefix!r}")
        if text_of(self.config).tie_word_embeddings and embedding in self.tensors:
            self.tensors.pop(head, None)  # the same numbers

    def read(self, name: str, window: Window) -> Tensor:
        """See `WeightSource`; of a single file a view of it."""
        return self._whole[name][window] if self._sharded is None else self._sharded.read(name, window)


class FolderSource(StoredSource):
    """The model in a Hugging Face folder of any layout, under our names. FP8 comes as float32.

    Args:
        folder: Holds config.json and safetensors files.
        whole: Take the encoders, too; False: the language model.
        verify_checksums: Compare the files with the SHA-256 sums of their index, if it has any.

    Attributes:
        config: The model's config.
        layout: How the files name their tensors.

    Raises:
        WeightsError: If the folder cannot be read or does not hold what its config.json describes.
    """

    def __init__(self, folder: str | Path, whole: bool = False, verify_checksums: bool = True) -> None:
        with together():
            pretrained, self._files = open_pretrained(folder)
            self.layout = pretrained.layout
            self.config: NetworkConfig = multimodal_config_from_pretrained(folder) if whole else pretrained.model
            with torch.device("meta"):
                model = network(self.config)
            plan, shapes = plan_weights(model, self._files, self.layout), saved_tensors(model)
            if verify_checksums:
                verify_share(self._files)
        self._pieces = {source.name: source.pieces for source in plan.sources}
        self.tensors = {
            name: TensorInfo(tuple(shapes[name][0].shape), self._common_type(pieces))
            for name, pieces in self._pieces.items()
        }

    def _common_type(self, pieces: Sequence[Piece]) -> torch.dtype:
        stored = [self._files.tensors[piece.key] for piece in pieces]
        types = [torch.float32 if entry.is_scaled else torch_type(entry.dtype) for entry in stored]
        return reduce(torch.promote_types, types)

    def read(self, name: str, window: Window) -> Tensor:
        """See `WeightSource`."""
        dtype = self.tensors[name].dtype
        parts = [(piece, shared) for piece in self._pieces[name] if (shared := piece.common(window)) is not None]
        values = (piece.as_ours(self._files.read(piece.key, theirs)).to(dtype) for piece, (_, theirs) in parts)
        if len(parts) == 1:
            return next(values)
        result = torch.empty([part.stop - part.start for part in window], dtype=dtype)
        for (_, (ours, _)), part in zip(parts, values, strict=True):
            result[inside(ours, window)].copy_(part)
        return result


def torch_type(name: str) -> torch.dtype:
    """The type of weights that safetensors names so."""
    dtype = DTYPES[name][1]
    assert dtype is not None  # the audit has let it pass
    return dtype


def inside(window: Window, outer: Window) -> Window:
    """A window in the coordinates of another one that it lies in."""
    return tuple(slice(w.start - o.start, w.stop - o.start) for w, o in zip(window, outer, strict=True))


def open_source(path: str | Path, whole: bool = False) -> tuple[WeightSource, NetworkConfig]:
    """The weights of a Hugging Face folder or of a checkpoint of a run (one file or sharded), and their config.

    Args:
        path: Where they are.
        whole: Of a folder take the encoders, too. Of a checkpoint all is taken that it holds.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: As `CheckpointSource`.
        WeightsError: As `FolderSource`.
    """
    source = FolderSource(path, whole) if is_pretrained_folder(path) else CheckpointSource(path)
    return source, source.config

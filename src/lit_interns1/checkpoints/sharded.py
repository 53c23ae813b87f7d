"""Reads sharded checkpoints (torch.distributed.checkpoint) without executing what they contain.

The metadata of torch's format is a pickle, and so is every entry that is no tensor; torch unpickles both without
limits, so that a checkpoint could run any code. Here the metadata may name only the classes that describe tensors and
files, and the entries are read by torch's weights-only unpickler.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, load
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

_METADATA_CLASSES = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    )
}
_ALLOWED = _METADATA_CLASSES | {
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("torch", "Size"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
}


class UnsafeCheckpointError(pickle.UnpicklingError):
    """A checkpoint names something that no checkpoint needs."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(value := getattr(torch, name, None), torch.dtype):
            return value
        raise UnsafeCheckpointError(f"the metadata names {module}.{name}, which no checkpoint needs; not loaded")


class _SafeReader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with self.fs.create_stream(self._get_metadata_path(kwargs.get("rank")), "rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise UnsafeCheckpointError(f"the metadata is a {type(metadata).__name__}: nothing was loaded")
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _SafePlanner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        try:
            entry = torch.load(value, weights_only=True)
        except pickle.UnpicklingError as error:
            raise UnsafeCheckpointError(f"entry {read_item.dest_index.fqn!r} is not plain data: {error}") from None
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], entry)
        else:
            self.state_dict[read_item.dest_index.fqn] = entry


def read_sharded_metadata(path: str | Path) -> Metadata:
    """What a sharded checkpoint says that its files hold.

    Raises:
        FileNotFoundError: If the folder has no metadata.
        UnsafeCheckpointError: If they name more than data.
    """
    return _SafeReader(path).read_metadata()


def load_sharded(state: dict[str, Any], path: str | Path, allow_missing: bool = False) -> None:
    """Reads a sharded checkpoint into `state`, resharding to its tensors' present layout.

    Args:
        state: Nested dict of tensors and plain values that is filled in place.
        path: Folder of the checkpoint.
        allow_missing: Leave what the checkpoint does not have as it is.

    Raises:
        UnsafeCheckpointError: If the checkpoint holds more than data (from the rank that noticed; torch wraps it in a
            `CheckpointException` on the others).
    """
    alone = not torch.distributed.is_initialized()
    load(state, storage_reader=_SafeReader(path), planner=_SafePlanner(allow_partial_load=allow_missing), no_dist=alone)

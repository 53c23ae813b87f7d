"""Writes sharded checkpoints (torch.distributed.checkpoint): each rank its part, published as a whole.

    partial folder ← every rank's shards, then .metadata, then meta.pt ← rank 0;   final name ← partial, in one step

Asynchronously, the tensors are copied to memory of their own before `save` returns, and a thread writes the copies over
a process group of its own while training goes on. One save is under way at a time.
"""

from __future__ import annotations

import io
import logging
import shutil
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch.distributed.checkpoint import FileSystemWriter, async_save, save
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult

from lit_interns1.checkpoints.publish import partial_path, publish

METADATA_FILE = "meta.pt"
"""Everything of a checkpoint that is no tensor of the model or an optimizer, in Lightning's folder format."""

_log = logging.getLogger(__name__)


class _PublishingWriter(FileSystemWriter):
    """Publishes when every rank has written; torch calls `finish` on one rank, behind the last shard."""

    def __init__(self, final: Path, metadata: bytes) -> None:
        super().__init__(partial_path(final))
        self.final, self.metadata = final, metadata

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        folder = partial_path(self.final)
        (folder / METADATA_FILE).write_bytes(self.metadata)
        publish(folder, self.final)


class ShardedWriter:
    """Saves sharded checkpoints; every method must be called on all ranks.

    Args:
        asynchronous: Write in the background. The default process group must then have a backend for the CPU.
    """

    def __init__(self, asynchronous: bool = False) -> None:
        self.asynchronous = asynchronous
        self._group: dist.ProcessGroup | None = None
        self._pending: tuple[Future[Any], Path] | None = None

    def save(self, tensors: Mapping[str, Any], metadata: Mapping[str, Any], final: Path) -> None:
        """Writes a checkpoint in place of the one that may be there.

        Args:
            tensors: Nested dict of tensors, DTensors of any mesh, and plain values.
            metadata: The rest; what a reader could only load by executing code is left out, with a warning.
            final: Folder of the checkpoint.
        """
        self.wait()
        folder = partial_path(final)
        if dist.get_rank() == 0:
            final.parent.mkdir(parents=True, exist_ok=True)
            if folder.exists():
                shutil.rmtree(folder)  # of a run that was stopped while it wrote
        dist.barrier()
        writer = _PublishingWriter(final, _serialized(metadata) if dist.get_rank() == 0 else b"")
        if not self.asynchronous:
            save(dict(tensors), storage_writer=writer)
            return
        if self._group is None:
            self._group = dist.new_group(backend="gloo")  # background traffic must not mix with the training's
        future = async_save(dict(tensors), storage_writer=writer, process_group=self._group)
        assert isinstance(future, Future)
        self._pending = future, final

    def wait(self) -> None:
        """Returns when nothing is being written any more.

        Raises:
            RuntimeError: If writing failed; the checkpoint that was there before is still there.
        """
        if self._pending is None:
            return
        (future, final), self._pending = self._pending, None
        try:
            future.result()
        except Exception as error:
            raise RuntimeError(f"checkpoint {final} could not be written in the background: {error}") from error


def _serialized(metadata: Mapping[str, Any]) -> bytes:
    """As bytes that torch's weights-only unpickler takes."""
    kept = {key: value for key, value in _plain(metadata).items() if _is_data(key, value)}
    buffer = io.BytesIO()
    torch.save(kept, buffer)
    return buffer.getvalue()


def _plain(value: Any) -> Any:
    """OmegaConf containers as dicts and lists, at any depth."""
    if isinstance(value, (DictConfig, ListConfig)):
        return OmegaConf.to_container(value, resolve=True)
    if type(value) is dict:
        return {key: _plain(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(entry) for entry in value)
    return value


def _is_data(key: str, value: Any) -> bool:
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception as error:
        _log.warning("%r is left out of the checkpoint: it is more than data (%s)", key, str(error).split("\n")[0])
        return False
    return True

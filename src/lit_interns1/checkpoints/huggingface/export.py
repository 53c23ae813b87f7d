"""Weights out into a Hugging Face folder: each rank writes what it holds, and no weight travels between ranks.

    file[window] ← source[box ∩ window]        for every piece of every tensor, cast on the way

That is the reading of a folder backwards. The files are made in their full size beside the final name, filled by all
ranks at once in blocks of at most 64 MB, hashed, and take the final name in one step: whoever looks there finds nothing
or everything.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
from torch import Tensor

from lit_interns1.checkpoints.agreement import gather, this_rank, together
from lit_interns1.checkpoints.huggingface.config import CONFIG_FILE, GENERATION_CONFIG_FILE
from lit_interns1.checkpoints.huggingface.encoder_config import NetworkConfig, pretrained_values, text_of
from lit_interns1.checkpoints.huggingface.errors import WeightsError
from lit_interns1.checkpoints.huggingface.export_plan import FP8, ExportPlan, LikeFolder, WrittenPiece, plan_export
from lit_interns1.checkpoints.huggingface.files import CHECKSUMS, INDEX, SCALE_SUFFIX, Window
from lit_interns1.checkpoints.huggingface.fp8_blocks import FP8Blocks, keep_unchanged, quantized, scale_window
from lit_interns1.checkpoints.huggingface.opening import verify_share
from lit_interns1.checkpoints.huggingface.safetensors_file import SafetensorsFile
from lit_interns1.checkpoints.huggingface.safetensors_writer import SafetensorsWriter, blocks
from lit_interns1.checkpoints.huggingface.sources import WeightSource, torch_type
from lit_interns1.checkpoints.publish import partial_path
from lit_interns1_kernels.fp8_quantize import BLOCK

_log = logging.getLogger(__name__)

BLOCK_BYTES = 64 << 20
"""What is read, cast and written at a time."""
SHARED_FOLDER_SECONDS = 10.0
"""How long a rank waits for the folder that rank 0 has made: file systems of a network are slow to show it."""
_TOKEN = ".export"
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_BESIDE_FILES = (
    *_TOKENIZER_FILES, GENERATION_CONFIG_FILE, "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "*.py",
)  # fmt: skip
"""What is copied from `like`: its config.json may name code that lies beside it."""


@dataclass(frozen=True)
class ExportedWeights:
    """What was written, or with `dry_run` would be.

    Attributes:
        folder: Where.
        layout: `model_type` of its config.json.
        tensors: Tensors in the files, scales and copies included.
        total_bytes: Bytes of their numbers.
        files: Bytes of each file.
        copied: Tensors taken over from `like` byte by byte.
        without_encoders: The layout is one of models with encoders, of which nothing was written.
        bytes_written: Bytes that this rank has written.
        plan: Everything in detail.
    """

    folder: Path
    layout: str
    tensors: int
    total_bytes: int
    files: dict[str, int]
    copied: int
    without_encoders: bool
    bytes_written: int
    plan: ExportPlan


def export_pretrained(
    source: WeightSource,
    config: NetworkConfig,
    folder: str | Path,
    *,
    layout: str | None = None,
    dtype: str = "native",
    like: str | Path | None = None,
    max_shard_bytes: int = 5_000_000_000,
    dry_run: bool = False,
    progress: bool = True,
    tokenizer: str | Path | None = None,
) -> ExportedWeights:
    """Writes a Hugging Face folder. All ranks of a run call it; the folder must be on a file system that all see.

    Args:
        source: The weights.
        config: The network that they are of.
        folder: What is written. It must not exist, or be empty.
        layout: How tensors are named, see `LAYOUTS`; default: that of `like`, else the plainest that can say what the
            network is.
        dtype: "native", "float32", "bfloat16", "float16" or "fp8", see `export_plan`.
        like: A Hugging Face folder to resemble, usually the one that the weights came from: types of tensors, encoders,
            fields of config.json that mean nothing here, tokenizer and generation config are taken from it.
        max_shard_bytes: Bytes of numbers in one file, unless a single tensor has more.
        dry_run: Only plan; nothing is written.
        progress: Show a bar, if rank 0 has a terminal.
        tokenizer: A tokenizer.json, or a folder with the files of a tokenizer; goes before that of `like`.

    Raises:
        WeightsError: If something does not fit; there is then nothing new on the disk. It is raised on all ranks.
    """
    final = Path(folder)
    with together():
        like_folder = LikeFolder(like) if like is not None else None
        plan = plan_export(source.tensors, config, layout, dtype, like_folder, max_shard_bytes)
        values = pretrained_values(
            config, plan.layout, plan.dtype, like_folder.values if like_folder else None, plan.quantization
        )
        windows = {name: source.windows(name) for name in source.tensors}
        _check_blocks(plan, windows)
        _check_free(final)
        if like_folder is not None and plan.copied:
            verify_share(like_folder.files)
        beside = _beside(like_folder, tokenizer, config)
    _check_cover(source, windows)
    total = sum(place.nbytes for place in plan.places.values())
    encoders = any(plan.layout.part_of(name) is not plan.layout.text for name in source.tensors)
    encoders = encoders or bool(plan.copied) or not plan.layout.encoders
    written = 0
    if not dry_run:
        content = {CONFIG_FILE: _as_json(values), **beside}
        written = _Export(final, plan, source, windows, like_folder, progress).run(content)
    result = ExportedWeights(
        final, plan.layout.name, len(plan.places), total, {file.name: file.size for file in plan.files},
        len(plan.copied), not encoders, written, plan,
    )  # fmt: skip
    if this_rank()[0] == 0:
        if result.without_encoders:
            _log.warning(
                "%s: the layout %s is one of models with encoders, but there is only the language model; like = a "
                "folder with encoders takes them over",
                final,
                plan.layout.name,
            )
        if not dry_run:
            _log.info("%s: wrote %d tensors, %.3f GB", final, result.tensors, total / 1e9)
    return result


# -- checks before anything is written ---------------------------------------------------------------------------------


def _check_free(final: Path) -> None:
    """Nothing has the final name but perhaps an empty folder."""
    if os.path.lexists(final) and (final.is_symlink() or not final.is_dir() or any(final.iterdir())):
        raise WeightsError(f"{final} exists: an export overwrites nothing; name another folder or remove it")


def _check_blocks(plan: ExportPlan, windows: Mapping[str, Sequence[Window]]) -> None:
    """What this process holds of an FP8 matrix is whole blocks, whose scales need all of their numbers."""
    for written in plan.pieces:
        for window in windows[written.name] if written.scaled else ():
            shared = written.piece.common(window)
            if shared is None:
                continue
            for part, size in zip(shared[1][-2:], written.piece.file_shape[-2:], strict=True):
                if part.start % BLOCK or (part.stop % BLOCK and part.stop != size):
                    raise WeightsError(
                        f"{written.name} is divided among ranks at {part.start} … {part.stop} of {size}, across the "
                        f"{BLOCK} × {BLOCK} blocks of FP8: save a checkpoint and export that, with lit-interns1 export"
                    )


def _check_cover(source: WeightSource, windows: Mapping[str, Sequence[Window]]) -> None:
    """All ranks together contribute every number once."""
    held = [sum(prod(p.stop - p.start for p in window) for window in windows[name]) for name in source.tensors]
    everywhere = [sum(counts) for counts in zip(*gather(held), strict=True)]
    for (name, info), count in zip(source.tensors.items(), everywhere, strict=True):
        if count != prod(info.shape):
            raise WeightsError(f"the ranks contribute {count} numbers to {name}, which has {prod(info.shape)}")


def _beside(like: LikeFolder | None, tokenizer: str | Path | None, config: NetworkConfig) -> dict[str, bytes]:
    """Small files by name, read while nothing has been written yet."""
    found: dict[str, bytes] = {}
    if like is not None:
        for pattern in _BESIDE_FILES:
            found |= {path.name: path.read_bytes() for path in sorted(like.folder.glob(pattern)) if path.is_file()}
    if tokenizer is None:
        return found
    from lit_interns1.data import load_tokenizer

    encoder = load_tokenizer(tokenizer)
    vocabulary = text_of(config).vocab_size
    if encoder.vocab_size > vocabulary:
        raise WeightsError(
            f"the tokenizer {tokenizer} has {encoder.vocab_size} entries, the vocabulary only {vocabulary}"
        )
    for name in _TOKENIZER_FILES:
        found.pop(name, None)
    if Path(tokenizer).is_dir():
        names = (*_TOKENIZER_FILES, GENERATION_CONFIG_FILE)
        return found | {n: (Path(tokenizer) / n).read_bytes() for n in names if (Path(tokenizer) / n).is_file()}
    found["tokenizer.json"] = encoder.tokenizer.to_str().encode()
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": encoder.end_of_text}
    found["tokenizer_config.json"] = _as_json(settings)
    found.setdefault(GENERATION_CONFIG_FILE, _as_json({"eos_token_id": encoder.end_of_text_id}))
    return found


def _as_json(values: Mapping[str, object]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


# -- writing -----------------------------------------------------------------------------------------------------------


class _Export:
    """One folder under way."""

    def __init__(
        self, final: Path, plan: ExportPlan, source: WeightSource, windows: Mapping[str, Sequence[Window]],
        like: LikeFolder | None, progress: bool,
    ) -> None:  # fmt: skip
        self.final, self.partial = final, partial_path(final)
        self.plan, self.source, self.windows, self.like, self.progress = plan, source, windows, like, progress
        self.rank, self.world = this_rank()
        self.writer = SafetensorsWriter(self.partial)
        self._lock: int | None = None

    def run(self, content: Mapping[str, bytes]) -> int:
        """Writes and publishes; returns the bytes that this rank has written."""
        token = gather(uuid.uuid4().hex)[0]
        try:
            with together():
                if self.rank == 0:
                    self._begin(token)
            with together():
                self._check_shared(token)
                try:
                    self._write()
                finally:
                    self.writer.close()
            with together():
                mine = [file.name for file in self.plan.files[self.rank :: self.world]]
                digests = {name: SafetensorsFile(self.partial / name).sha256() for name in mine}
            checksums = {name: digest for part in gather(digests) for name, digest in part.items()}
            with together():
                if self.rank == 0:
                    self._publish(content, checksums)
        except BaseException:
            if self._lock is not None:
                shutil.rmtree(self.partial, ignore_errors=True)
            raise
        finally:
            if self._lock is not None:
                os.close(self._lock)
        return self.writer.bytes_written

    def _begin(self, token: str) -> None:
        """Makes the partial folder; that of an export that was killed is replaced, that of one under way is not."""
        self.final.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(self.partial):
            old = os.open(self.partial, os.O_RDONLY)
            try:
                fcntl.flock(old, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(self.partial)
            except BlockingIOError:
                raise WeightsError(f"another process is exporting to {self.final}") from None
            finally:
                os.close(old)
        needed, free = sum(file.size for file in self.plan.files), shutil.disk_usage(self.final.parent).free
        if needed > free:
            raise WeightsError(
                f"{self.final} needs {needed / 1e9:.3f} GB, its file system has {free / 1e9:.3f} GB left"
            )
        self.partial.mkdir()
        self._lock = os.open(self.partial, os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.writer.create(self.plan.files)
        (self.partial / _TOKEN).write_text(token)

    def _check_shared(self, token: str) -> None:
        path, end = self.partial / _TOKEN, time.monotonic() + SHARED_FOLDER_SECONDS
        while not path.is_file() and time.monotonic() < end:
            time.sleep(0.1)
        if not path.is_file() or path.read_text() != token:
            raise WeightsError(
                f"rank {self.rank} does not see {self.partial}, which rank 0 has made: export to a file system that "
                "all ranks share"
            )

    def _write(self) -> None:
        steps = self._steps()
        if not self.progress or self.rank != 0 or not sys.stderr.isatty():
            for _ in steps:
                pass
            return
        columns = ("exporting", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            # ranks write about as much as one another
            task = bar.add_task("", total=sum(file.size for file in self.plan.files) / self.world)
            for _ in steps:
                bar.update(task, completed=self.writer.bytes_written)

    def _steps(self) -> Iterator[None]:
        """Everything that this rank writes, a block at a time."""
        for written in sorted(self.plan.pieces, key=lambda written: self.plan.places[written.piece.key].file):
            for window in self.windows[written.name]:
                shared = written.piece.common(window)
                if shared is not None:
                    yield from self._write_window(written, shared[1])
        for key in self.plan.copied[self.rank :: self.world]:
            yield from self._copy(key)

    def _write_window(self, written: WrittenPiece, window: Window) -> Iterator[None]:
        key, piece = written.piece.key, written.piece
        place = self.plan.places[key]
        dtype = torch_type(place.dtype)
        numbers = BLOCK_BYTES // max(self.source.tensors[written.name].dtype.itemsize, dtype.itemsize)
        for block in blocks(window, numbers, BLOCK if written.scaled else 1):
            values = piece.as_theirs(self.source.read(written.name, piece.in_ours(block)))
            if written.scaled:
                values = self._quantized(key, block, values)
            self.writer.write(place, block, _cast(key, values, dtype))
            yield

    def _quantized(self, key: str, block: Window, values: Tensor) -> Tensor:
        """The numbers in FP8; their scales are written here."""
        result = quantized(values, self.plan.power_of_two_scales)
        if not result.scales.isfinite().all():
            raise WeightsError(f"{key} holds numbers that are not finite, which FP8 cannot")
        scale_key, window = key + SCALE_SUFFIX, scale_window(block)
        files = self.like.files if self.like is not None else None
        stored = files.tensors.get(key) if files is not None else None
        if (
            files is not None
            and stored is not None
            and (stored.dtype, stored.shape) == (FP8, self.plan.places[key].shape)
        ):
            old = (files.read_stored(*part) for part in ((key, block), (scale_key, window)))
            result = keep_unchanged(values, result, FP8Blocks(*old))
        place = self.plan.places[scale_key]
        self.writer.write(place, window, result.scales.to(torch_type(place.dtype)))
        return result.numbers

    def _copy(self, key: str) -> Iterator[None]:
        assert self.like is not None
        stored, place = self.like.files.tensors[key], self.plan.places[key]
        with (self.like.folder / stored.file).open("rb", buffering=0) as stream:
            for first in range(0, stored.nbytes, BLOCK_BYTES):
                length = min(BLOCK_BYTES, stored.nbytes - first)
                content = os.pread(stream.fileno(), length, stored.start + first)
                if len(content) != length:
                    raise WeightsError(f"{self.like.folder / stored.file} has been changed while it was copied")
                self.writer.write_bytes(place.file, place.start + first, content)
                yield

    def _publish(self, content: Mapping[str, bytes], checksums: Mapping[str, str]) -> None:
        places = self.plan.places
        total = sum(place.nbytes for place in places.values())
        index = {
            "metadata": {"total_size": total, CHECKSUMS: dict(sorted(checksums.items()))},
            "weight_map": {key: place.file for key, place in places.items()},
        }
        for name, data in {INDEX: _as_json(index), **content}.items():
            with (self.partial / name).open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
        (self.partial / _TOKEN).unlink()
        _sync_folder(self.partial)
        _check_free(self.final)
        os.rename(self.partial, self.final)
        _sync_folder(self.final.parent)


def _cast(key: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    result = values.to(dtype)
    if (
        dtype == torch.float16
        and values.dtype != dtype
        and not bool(result.isfinite().all())
        and values.isfinite().all()
    ):
        raise WeightsError(f"{key} holds numbers beyond ±65504, which float16 cannot")
    return result


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

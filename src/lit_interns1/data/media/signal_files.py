"""Opening time series: arrays and `.npy`, `.npz`, `.csv` and `.wav` files, as blocks of points.

A block is (n, C) of at most a million values, so that a file which is larger than memory can be normalised.
Nothing in a file is executed: arrays of Python objects are refused.
"""

from __future__ import annotations

import math
import wave
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeAlias

import numpy as np
from torch import Tensor

from lit_interns1.data.media.errors import MediaError
from lit_interns1.data.media.images import as_numpy, describe, local_path

SignalSource: TypeAlias = str | Path | Sequence[float] | np.ndarray | Tensor
BLOCK = 1 << 20
"""Most values of a block."""
MAX_ARCHIVE_BYTES = 1 << 30
"""Largest array in a `.npz` file, which is unpacked as a whole."""
_MAX_LINE = 1 << 16


@dataclass(frozen=True)
class OpenSignal:
    """A series that is read while one iterates, once.

    Attributes:
        blocks: Blocks (n, C).
        sampling_rate: Hz, if the file says it.
        name: What to call it in messages.
    """

    blocks: Iterator[np.ndarray]
    sampling_rate: float | None
    name: str


def open_signal(source: SignalSource, time_axis: int | None, archive_key: str | None, max_channels: int) -> OpenSignal:
    """Finds out what a source is; the arguments are those of `TimeSeriesProcessor`.

    Raises:
        MediaError: If it cannot be a series.
    """
    name = describe(source)
    if not isinstance(source, (str, Path)):
        try:
            values = as_numpy(source) if isinstance(source, Tensor) else np.asarray(source)
        except ValueError as error:
            raise MediaError(f"{name}: no rectangular series of numbers ({error})") from error
        return OpenSignal(_array_blocks(values, time_axis, max_channels, name), None, name)
    path = local_path(source)
    suffix = path.suffix.lower()
    if suffix == ".wav":
        return _open_wave(path, max_channels)
    if suffix == ".csv":
        return OpenSignal(_csv_blocks(path, max_channels), None, name)
    if suffix in (".npy", ".npz"):
        values = _read_npy(path) if suffix == ".npy" else _read_npz(path, archive_key)
        return OpenSignal(_array_blocks(values, time_axis, max_channels, name), None, name)
    raise MediaError(f"{name}: cannot tell the kind of file; the name must end in .npy, .npz, .csv or .wav")


def _array_blocks(values: np.ndarray, time_axis: int | None, max_channels: int, name: str) -> Iterator[np.ndarray]:
    if not (np.issubdtype(values.dtype, np.integer) or np.issubdtype(values.dtype, np.floating)):
        raise MediaError(f"{name}: dtype {values.dtype} is neither an integer nor a float")
    if values.ndim not in (1, 2):
        raise MediaError(f"{name}: a series has the shape (T,) or (T, C), got {values.shape}")
    if values.ndim == 1:
        values = values[:, None]
    elif time_axis is None and values.shape[0] <= values.shape[1] and values.shape != (1, 1) and values.size:
        raise MediaError(
            f"{name}: shape {values.shape} may be (T, C) or (C, T); say time_axis=0 if the first axis is time, else 1"
        )
    elif time_axis == 1:
        values = values.T
    if not values.size:
        raise MediaError(f"{name}: the series has no points (shape {values.shape})")
    _check_channels(values.shape[1], max_channels, name)
    step = max(1, BLOCK // values.shape[1])
    return (values[first : first + step] for first in range(0, len(values), step))


def _check_channels(channels: int, max_channels: int, name: str) -> None:
    if channels > max_channels:
        raise MediaError(f"{name}: {channels:,} channels are more than max_channels={max_channels}")


def _read_npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise MediaError(f"{path}: damaged, or no array of numbers ({error})") from error


def _read_npz(path: Path, key: str | None) -> np.ndarray:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [entry.removesuffix(".npy") for entry in archive.namelist()]
            if key is None and len(names) != 1:
                raise MediaError(f"{path}: archive_key must name one of the arrays {', '.join(names) or '(none)'}")
            key = names[0] if key is None else key
            if key not in names:
                raise MediaError(f"{path}: archive_key={key!r} is not among the arrays {', '.join(names)}")
            with archive.open(f"{key}.npy") as member:
                size = _size_in_header(member)
        if size > MAX_ARCHIVE_BYTES:
            raise MediaError(
                f"{path}: array {key!r} unpacks to {size:,} bytes, more than {MAX_ARCHIVE_BYTES:,}; save it as .npy, "
                "which is read in blocks"
            )
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[key]
    except MediaError:
        raise
    except (ValueError, EOFError, OSError, KeyError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise MediaError(f"{path}: damaged, or no array of numbers ({error})") from error


def _size_in_header(member: IO[bytes]) -> int:
    version = np.lib.format.read_magic(member)
    reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = reader(member)
    return math.prod(shape) * dtype.itemsize


def _open_wave(path: Path, max_channels: int) -> OpenSignal:
    try:
        with wave.open(str(path), "rb") as file:
            channels, rate, width = file.getnchannels(), file.getframerate(), file.getsampwidth()
    except (wave.Error, EOFError, OSError, RuntimeError) as error:
        raise MediaError(f"{path}: damaged, or not integer PCM ({error})") from error
    _check_channels(channels, max_channels, str(path))
    if rate <= 0 or width not in (1, 2, 3, 4):
        raise MediaError(f"{path}: a rate of {rate} Hz or {8 * width} bits per sample cannot be")
    return OpenSignal(_wave_blocks(path), float(rate), str(path))


def _wave_blocks(path: Path) -> Iterator[np.ndarray]:
    with wave.open(str(path), "rb") as file:
        channels, width, missing = file.getnchannels(), file.getsampwidth(), file.getnframes()
        while missing > 0:
            data = file.readframes(min(BLOCK // channels, missing))
            read = len(data) // (channels * width)
            if read == 0 or len(data) % (channels * width):
                raise MediaError(f"{path}: truncated: {missing} points less than its header says")
            missing -= read
            samples = np.frombuffer(data, dtype=np.uint8).reshape(-1, width)
            if width == 1:
                values = samples[:, 0].astype(np.int32) - 128  # 8-bit samples have no sign
            else:  # little endian, into the upper bytes of 32 bits
                filled = np.zeros((len(samples), 4), dtype=np.uint8)
                filled[:, 4 - width :] = samples
                values = filled.view("<i4")[:, 0] >> (32 - 8 * width)
            yield (values / float(1 << (8 * width - 1))).reshape(-1, channels)


def _csv_blocks(path: Path, max_channels: int) -> Iterator[np.ndarray]:
    """Rows are points, columns are channels; a first line without any number is a header."""
    columns, number = 0, 1
    try:
        with open(path, encoding="utf-8-sig") as file:
            while lines := _some_lines(file, path):
                rows = {at: text for at, text in enumerate(lines, start=number) if not text.isspace()}
                number += len(lines)
                if rows and columns == 0:
                    first, text = next(iter(rows.items()))
                    columns = len(text.split(","))
                    _check_channels(columns, max_channels, str(path))
                    if not any(map(_is_number, text.split(","))):
                        del rows[first]
                if rows:
                    yield _parse(rows, columns, path)
    except UnicodeDecodeError as error:
        raise MediaError(f"{path}: not UTF-8 ({error})") from error


def _parse(rows: dict[int, str], columns: int, path: Path) -> np.ndarray:
    """Numbers (n, columns) of rows of text by their line."""
    try:
        block = np.loadtxt(list(rows.values()), delimiter=",", comments=None, quotechar='"', ndmin=2)
    except ValueError as error:
        reason = str(error)
    else:
        if block.shape[1] == columns:
            return block
        reason = f"{block.shape[1]} columns"
    for line, text in rows.items():  # which line is it?
        cells = text.split(",")
        if len(cells) != columns:
            raise MediaError(f"{path}, line {line}: {len(cells)} columns, {columns} in the first line")
        if not all(map(_is_number, cells)):
            raise MediaError(f"{path}, line {line}: not a number in {text.strip()[:80]!r}")
    raise MediaError(f"{path}, lines {min(rows)}…{max(rows)}: {reason}")


def _some_lines(file: IO[str], path: Path) -> list[str]:
    """The next lines, of some hundred thousand characters; none at the end."""
    lines, size = [], 0
    while size < BLOCK // 4 and (line := file.readline(_MAX_LINE)):
        if len(line) == _MAX_LINE and not line.endswith("\n"):
            raise MediaError(f"{path}: a line of more than {_MAX_LINE} characters; rows are points, columns channels")
        lines.append(line)
        size += len(line)
    return lines


def _is_number(cell: str) -> bool:
    try:
        float(cell.strip().strip('"'))
    except ValueError:
        return False
    return True

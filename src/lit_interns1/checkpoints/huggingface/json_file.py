"""JSON of strangers: one object, every key once, numbers that are numbers, of bounded size."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lit_interns1.checkpoints.huggingface.errors import WeightsError

MAX_JSON_BYTES = 100_000_000
"""Longest JSON that is read; also the limit of the safetensors format for a header."""

_KINDS = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


@contextmanager
def open_regular(path: Path) -> Iterator[tuple[int, os.stat_result]]:
    """Descriptor and status of a regular file, links followed. A pipe or a device is refused and never waited for.

    Raises:
        WeightsError: If it does not exist, cannot be opened, or is something else.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        what = "is a link to what does not exist" if path.is_symlink() else "does not exist"
        raise WeightsError(f"{path} {what}") from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise WeightsError(f"{str(path)!r} cannot be opened: {error}") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise WeightsError(f"{path} is {_KINDS.get(stat.S_IFMT(status.st_mode), 'a device')}, not a file")
        yield descriptor, status
    finally:
        os.close(descriptor)


def read_exactly(descriptor: int, buffer: memoryview, position: int, path: Path) -> None:
    """Fills a buffer with the bytes of a file from a position on.

    Raises:
        WeightsError: If the file ends before, or cannot be read.
    """
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(descriptor, [buffer[done:]], position + done)
        except OSError as error:
            raise WeightsError(f"{path} cannot be read at byte {position + done}: {error}") from None
        if count == 0:
            raise WeightsError(f"{path} ends at byte {position + done}: it was cut off while it was read")
        done += count


def parse_object(content: bytes, where: str) -> dict[str, Any]:
    """The JSON object that bytes hold.

    Raises:
        WeightsError: If they hold anything else, or say something twice.
    """
    try:
        values = json.loads(content.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_number)
    except RecursionError:
        raise WeightsError(f"{where} is no JSON of ours: it is nested too deeply") from None
    except ValueError as error:
        raise WeightsError(f"{where} is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise WeightsError(f"{where} holds a {type(values).__name__}, not an object")
    return values


def read_json(path: Path) -> dict[str, Any]:
    """A file with a JSON object.

    Raises:
        WeightsError: If the file does not exist, is too long, or holds something else.
    """
    with open_regular(path) as (descriptor, status):
        if status.st_size > MAX_JSON_BYTES:
            raise WeightsError(f"{path} has {status.st_size} bytes, more than the {MAX_JSON_BYTES} of any JSON here")
        content = bytearray(status.st_size)
        read_exactly(descriptor, memoryview(content), 0, path)
    return parse_object(bytes(content), str(path))


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"the key {key!r} stands there twice")
        key.encode()  # half of a surrogate pair cannot even be shown
        values[key] = value
    return values


def _no_number(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")

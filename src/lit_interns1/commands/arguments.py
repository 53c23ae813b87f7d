"""What commands of our own share: repeated options, errors of one line, files that are new, JSON."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def appending(arguments: Sequence[str], names: Sequence[str]) -> list[str]:
    """Arguments in which `--data a --data b` means both, where jsonargparse would keep the last."""
    appended = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        appended.append(f"{name}+{equals}{value}" if name in names else argument)
    return appended


@contextmanager
def errors_in_one_line(command: str) -> Iterator[None]:
    """Makes a complaint about the user's input one line on standard error, and the status 2."""
    try:
        yield
    except (OSError, ValueError) as error:
        print(f"lit-interns1 {command}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def check_new(option: str, path: str | None) -> None:
    """Raises ValueError if the file that an option names exists already."""
    if path is not None and Path(path).exists():
        raise ValueError(f"{option} {path} exists already")


def write_new(path: Path, text: str) -> None:
    """Writes a file, all of it or nothing.

    Raises:
        ValueError: If it exists by now.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    temporary.write_text(text, encoding="utf-8")
    if path.exists():
        raise ValueError(f"{path} exists by now: what was to be written is in {temporary}")
    os.replace(temporary, path)


def without_nan(value: Any) -> Any:
    """A value as JSON can hold it: None for numbers that are not finite, inside dictionaries and lists, too."""
    if isinstance(value, dict):
        return {key: without_nan(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

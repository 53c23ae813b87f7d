"""Packages that only some judges need."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def need(module: str, package: str) -> Any:
    """A module of an optional package.

    Args:
        module: What is imported.
        package: Its name for pip, of the extra `rl`.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise ImportError(f"{package} is not installed: pip install 'lit-interns1[rl]', or {package} alone") from None

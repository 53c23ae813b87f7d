"""Which parts of a module are trained or measured: all but what stands beside them for comparison."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from torch import nn

Part = TypeVar("Part", bound=nn.Module)


def trained_parts(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """As `module.named_modules()`, but without what is in parts that have `stands_beside = True`.

    Args:
        module: Where to look.
        prefix: What stands before the names.
    """
    found: set[nn.Module] = set()

    def walk(part: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        if part in found:
            return
        found.add(part)
        yield name, part
        for key, child in part.named_children():
            if not getattr(child, "stands_beside", False):
                yield from walk(child, f"{name}.{key}" if name else key)

    return walk(module, prefix)


def parts_of_type(module: nn.Module, kind: type[Part]) -> list[Part]:
    """The trained parts that are of a class, in order."""
    return [part for _, part in trained_parts(module) if isinstance(part, kind)]

"""Puts a finished checkpoint in its place in one step, so that whoever looks finds the old one or the new one, whole.

A file is renamed over the old one. Folders cannot be swapped in one step, but links to them can: the final name is a
link to one of two folders beside it, `.NAME.a` and `.NAME.b`; the new checkpoint becomes the other one, the link is
replaced, and the old folder is removed.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def partial_path(final: Path) -> Path:
    """Where a checkpoint is written before it is published: in the same folder, hence on the same file system."""
    return final.with_name(f".{final.name}.partial")


def publish(partial: Path, final: Path) -> None:
    """Replaces `final`, if there is one, by `partial`, a file or a folder. Call it on one rank.

    A folder of another origin that has the final name is moved aside to `NAME.before`.
    """
    if not partial.is_dir():
        if final.is_dir():
            _clear(final)
        os.replace(partial, final)
        return
    old = final.resolve() if final.is_symlink() else None
    first, second = (final.with_name(f".{final.name}.{letter}") for letter in "ab")
    new = second if old == first.resolve() else first
    if new.exists():
        shutil.rmtree(new)  # of a process that was stopped before it removed it
    os.rename(partial, new)
    link = final.with_name(f".{final.name}.link")
    link.unlink(missing_ok=True)
    link.symlink_to(new.name, target_is_directory=True)
    if final.is_dir() and not final.is_symlink():
        _clear(final)
    os.replace(link, final)
    if old is not None and old != new.resolve() and old.is_dir():
        shutil.rmtree(old)


def _clear(folder: Path) -> None:
    if folder.is_symlink():
        remove_published(folder)
    else:
        os.rename(folder, folder.with_name(f"{folder.name}.before"))


def remove_published(path: Path) -> None:
    """Removes a checkpoint, and the folder that a link of `publish` leads to. Nothing happens if there is none."""
    if path.is_symlink():
        folder = path.resolve()
        path.unlink()
        if folder.parent == path.parent.resolve() and folder.name in (f".{path.name}.a", f".{path.name}.b"):
            shutil.rmtree(folder, ignore_errors=True)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

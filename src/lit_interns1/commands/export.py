"""`lit-interns1 export`: the weights of a checkpoint, or of a Hugging Face folder, as a Hugging Face folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def bytes_of(size: str) -> int:
    """Bytes of a size such as 5GB, 500 MB or 2GiB.

    Raises:
        ValueError: If it is none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"--shard_size={size!r} is no size: write it as 5GB, 500MB or 2GiB")
    count = int(float(match[1]) * _UNITS[match[2].upper()])
    if count < 1:
        raise ValueError(f"--shard_size={size!r} must be at least one byte")
    return count


def export_weights(
    ckpt: str,
    out: str,
    layout: str | None = None,
    dtype: Literal["native", "float32", "bfloat16", "float16", "fp8"] = "native",
    like: str | None = None,
    shard_size: str = "5GB",
    tokenizer: str | None = None,
    dry_run: bool = False,
) -> None:
    """Writes a Hugging Face folder: config.json, safetensors files, and the tokenizer if it is known.

    Args:
        ckpt: Checkpoint of a run (one file or a sharded folder), or a Hugging Face folder.
        out: Folder to write; it must not exist, or be empty.
        layout: model_type to write, e.g. qwen3_moe or interns1_pro; default: that of --like, else the plainest that can
            say what the network is.
        dtype: Type of the weights; native = that of the source, or with --like that of each tensor there; fp8 = linear
            layers in e4m3 with scales of 128 × 128 blocks, the rest in bfloat16.
        like: Hugging Face folder to resemble, usually the one that training started from: types, encoders, fields of
            config.json, tokenizer. A folder that is converted is like itself, unless --layout says otherwise.
        shard_size: Bytes in one file at most, e.g. 5GB or 500MB.
        tokenizer: tokenizer.json, folder, or bundled:tokenizer; default: that of --like, or of the run directory.
        dry_run: Print which tensor would become which, and write nothing.
    """
    import logging
    import sys

    from lit_interns1.checkpoints.huggingface.export_table import as_bytes, mapping_table

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        from lit_interns1.checkpoints import export_pretrained, open_source

        max_shard_bytes, path = bytes_of(shard_size), Path(ckpt)
        like = like or _itself(path, layout)
        source, config = open_source(path, whole=like is None and _both_have_encoders(path, layout))
        result = export_pretrained(
            source, config, out, layout=layout, dtype=dtype, like=like, max_shard_bytes=max_shard_bytes,
            dry_run=dry_run, tokenizer=tokenizer_to_write(path, tokenizer, like),
        )  # fmt: skip
    except (OSError, ValueError) as error:
        print(f"lit-interns1 export: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if dry_run:
        print(mapping_table(result.plan))
        print(f"nothing was written; without --dry_run {out} would have the layout {result.layout}")
        return
    copied = f", {result.copied} of them as they are in {like}" if result.copied else ""
    print(
        f"{out}: {result.tensors} tensors{copied}, {as_bytes(result.total_bytes)} in {len(result.files)} "
        f"file{'s' if len(result.files) > 1 else ''}, layout {result.layout}"
    )


def _itself(path: Path, layout: str | None) -> str | None:
    """A folder that is converted and keeps its layout is like itself."""
    from lit_interns1.checkpoints.huggingface.config import is_pretrained_folder, read_pretrained_config

    if path.is_dir() and is_pretrained_folder(path) and layout in (None, read_pretrained_config(path).layout.name):
        return str(path)
    return None


def _both_have_encoders(path: Path, layout: str | None) -> bool:
    """Whether a folder of a whole model becomes one of another layout of whole models."""
    from lit_interns1.checkpoints.huggingface.config import is_pretrained_folder, read_pretrained_config
    from lit_interns1.checkpoints.huggingface.layouts import LAYOUTS

    if not is_pretrained_folder(path) or layout not in LAYOUTS:
        return False
    return bool(read_pretrained_config(path).layout.encoders and LAYOUTS[layout].encoders)


def tokenizer_to_write(path: Path, tokenizer: str | None, like: str | None) -> str | None:
    """The tokenizer that goes along; None: that of `like`, or none is known."""
    import logging

    from lit_interns1.commands.generate import find_tokenizer
    from lit_interns1.data import load_tokenizer

    if tokenizer is not None or like is not None:
        return tokenizer
    try:
        found = find_tokenizer(path, None)
        load_tokenizer(found)
    except (FileNotFoundError, ValueError) as error:
        logging.getLogger(__name__).warning("no tokenizer is written: %s", error)
        return None
    return found

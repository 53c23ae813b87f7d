"""The losses of one checkpoint on every validation token, kept with what they belong to: one row of ℓ[m, t].

A safetensors file: `token_ids` (W,) int64 ascending, `losses` (W,) float32 in nats, and in its header the checkpoint's
name, its data recipe, its consumed tokens, and the hashes of tokenizer and validation tokens. Losses are stacked only
where both hashes agree.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FORMAT = "lit-interns1 token losses 1"


@dataclass(frozen=True)
class RecordedLosses:
    """Losses of one checkpoint.

    Attributes:
        name: Name of the checkpoint, by which scores refer to it.
        recipe: Name of the training data distribution; whole recipes are held out when a fit is judged.
        tokens: Consumed training tokens.
        tokenizer_hash: See `validation_tokens.tokenizer_hash`.
        data_hash: See `validation_tokens.data_hash`.
        token_ids: (W,) int64 `validation_token_id`, strictly ascending.
        losses: (W,) float32, nats.
    """

    name: str
    recipe: str
    tokens: int
    tokenizer_hash: str
    data_hash: str
    token_ids: NDArray[np.int64]
    losses: NDArray[np.float32]

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the file, all of it or nothing; parent directories are made."""
        from safetensors.numpy import save_file

        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        header = {
            "format": FORMAT, "name": self.name, "recipe": self.recipe, "tokens": str(self.tokens),
            "tokenizer_hash": self.tokenizer_hash, "data_hash": self.data_hash,
        }  # fmt: skip
        temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
        save_file({"token_ids": self.token_ids, "losses": self.losses}, temporary, metadata=header)
        os.replace(temporary, target)
        return target

    @staticmethod
    def load(path: str | os.PathLike[str]) -> RecordedLosses:
        """Reads a file.

        Raises:
            ValueError: If it is no file of recorded losses, or is damaged.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="numpy") as file:
                header = dict(file.metadata() or {})
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read as recorded losses: {error}") from None
        if header.get("format") != FORMAT or set(found) != {"token_ids", "losses"}:
            raise ValueError(f"{path} holds no recorded losses: its format is {header.get('format')!r}, not {FORMAT!r}")
        token_ids, losses = found["token_ids"], found["losses"]
        if token_ids.shape != losses.shape or token_ids.ndim != 1 or not (np.diff(token_ids) > 0).all():
            raise ValueError(f"{path}: token_ids {token_ids.shape} and losses {losses.shape} do not belong together")
        if not np.isfinite(losses).all():
            raise ValueError(f"{path}: {int((~np.isfinite(losses)).sum())} of {len(losses)} losses are not finite")
        return RecordedLosses(
            header["name"], header["recipe"], int(header["tokens"]), header["tokenizer_hash"], header["data_hash"],
            token_ids, losses,
        )  # fmt: skip


def load_recorded(where: str | os.PathLike[str]) -> list[RecordedLosses]:
    """All recorded losses of a file, of a glob pattern, or of the `salience` folders below a directory, sorted by path.

    Raises:
        ValueError: If there are none, two have the same name, or they differ in tokenizer or validation tokens.
    """
    import glob

    path = Path(where)
    if path.is_dir():
        files = sorted({*path.glob("*.safetensors"), *path.glob("**/salience/*.safetensors")})
    else:
        files = sorted(Path(found) for found in glob.glob(str(where), recursive=True))
    if not files:
        raise ValueError(f"losses: {where} holds no recorded losses; `lit-interns1 salience record` writes them")
    recorded = [RecordedLosses.load(file) for file in files]
    for entry, file in zip(recorded[1:], files[1:], strict=True):
        for what in ("tokenizer_hash", "data_hash"):
            if getattr(entry, what) != getattr(recorded[0], what):
                raise ValueError(
                    f"{file} and {files[0]} differ in their {what}: {getattr(entry, what)} and "
                    f"{getattr(recorded[0], what)}; losses on different tokens or contexts cannot be compared"
                )
    names = [entry.name for entry in recorded]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"losses: several files are called {', '.join(twice)}; record them with distinct --name")
    return recorded


def stacked(recorded: Sequence[RecordedLosses]) -> NDArray[np.float64]:
    """(M, W) losses of M checkpoints on the same tokens."""
    return np.stack([entry.losses for entry in recorded]).astype(np.float64)

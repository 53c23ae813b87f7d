"""Tokens on disk: each source is tokenised once and then memory-mapped.

    <cache_dir>/tokens-<key>/   tokens.bin          uint16 or uint32, all documents, each ends with the end-of-text id
                                document_end.npy    (D,) int64, where each document ends in tokens.bin
                                document_hash.npy   (D,) uint64, hash of the text of each document
                                metadata.json

The key is a hash of the file contents, of the options that change documents, and of the tokenizer. A store is written
into a temporary directory beside it and renamed when complete: an interrupted run leaves nothing that looks finished,
and of two processes that build the same store at once, the second to finish finds the first one's and drops its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_interns1.data.sources import SourceError, TextSource
from lit_interns1.data.tokenizer import TextTokenizer

FORMAT = 1
DEFAULT_CACHE_FOLDER = Path(".cache") / "lit_interns1"
_BATCH_CHARACTERS = 4_000_000
_BATCH_DOCUMENTS = 10_000


@dataclass
class TokenStore:
    """The tokens of one source.

    Attributes:
        folder: Where it is.
        key: Hash of everything that determines the tokens.
        metadata: `documents`, `tokens`, `characters`, `vocab_size`, `end_of_text_id`, `tokenizer`, `name`.
        document_end_D: (D,) end of each document in the flat tokens.
        document_hash_D: (D,) uint64 hash of the text of each document.
    """

    folder: Path
    key: str
    metadata: dict[str, Any]
    document_end_D: NDArray[np.int64]
    document_hash_D: NDArray[np.uint64]
    _tokens: NDArray[Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tokens": None}  # a worker maps the file itself

    @property
    def tokens_N(self) -> NDArray[Any]:
        """(N,) all tokens, memory-mapped."""
        if self._tokens is None:
            self._tokens = np.memmap(self.folder / "tokens.bin", dtype=self.metadata["dtype"], mode="r")
        return self._tokens

    @property
    def num_documents(self) -> int:
        """D."""
        return len(self.document_end_D)

    @property
    def num_tokens(self) -> int:
        """N."""
        return int(self.document_end_D[-1])

    @property
    def document_start_D(self) -> NDArray[np.int64]:
        """(D,) start of each document in the flat tokens."""
        return np.concatenate([[0], self.document_end_D[:-1]])

    def document(self, index: int) -> NDArray[Any]:
        """(n,) tokens of one document, with the end-of-text id."""
        start = int(self.document_end_D[index - 1]) if index else 0
        return self.tokens_N[start : int(self.document_end_D[index])]


def open_or_build(
    source: TextSource, tokenizer: TextTokenizer, cache_dir: str | Path = DEFAULT_CACHE_FOLDER, progress: bool = True
) -> TokenStore:
    """Opens the tokens of a source, tokenising it first if the cache has them not.

    Args:
        source: What to read.
        tokenizer: What to read it with.
        cache_dir: Where the stores are kept; relative to the working directory.
        progress: Whether to show progress on the standard error stream when that is a terminal.

    Raises:
        SourceError: If the source cannot be read, or the cache directory cannot be written.
    """
    cache_folder = Path(cache_dir).expanduser()
    parts = [FORMAT, source.content_hash(), tokenizer.fingerprint, tokenizer.end_of_text_id]
    key = hashlib.blake2b(json.dumps(parts).encode(), digest_size=12).hexdigest()
    folder = cache_folder / f"tokens-{key}"
    if not (folder / "metadata.json").is_file():
        try:
            cache_folder.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".building-{key}-", dir=cache_folder))
        except OSError as error:
            raise SourceError(f"cache_dir={str(cache_dir)!r} cannot be written ({error.strerror})") from None
        try:
            _build(source, tokenizer, temporary, progress)
            os.chmod(temporary, 0o755)  # mkdtemp is private; a cache may be shared
            try:
                temporary.rename(folder)
            except OSError:
                if not (folder / "metadata.json").is_file():
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    metadata = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
    size = (folder / "tokens.bin").stat().st_size
    if size != metadata["tokens"] * np.dtype(metadata["dtype"]).itemsize:
        raise SourceError(f"{folder / 'tokens.bin'}: {size} bytes for {metadata['tokens']} tokens: delete the folder")
    return TokenStore(
        folder, key, metadata, np.load(folder / "document_end.npy"), np.load(folder / "document_hash.npy")
    )


def _build(source: TextSource, tokenizer: TextTokenizer, folder: Path, progress: bool) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    lengths: list[int] = []
    hashes: list[int] = []
    characters = 0
    end_of_text = np.array([tokenizer.end_of_text_id], dtype=dtype)
    with (folder / "tokens.bin").open("wb") as stream, _Progress(source.display_name, progress) as bar:
        for texts in _batches(source.documents()):
            for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
                stream.write(np.asarray(ids, dtype=dtype).tobytes() + end_of_text.tobytes())
                lengths.append(len(ids) + 1)
                digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
                hashes.append(int.from_bytes(digest, "little"))
                characters += len(text)
            bar.update(len(lengths), characters)
    np.save(folder / "document_end.npy", np.cumsum(np.array(lengths, dtype=np.int64)))
    np.save(folder / "document_hash.npy", np.array(hashes, dtype=np.uint64))
    metadata = {
        "format": FORMAT,
        "name": source.display_name,
        "documents": len(lengths),
        "tokens": sum(lengths),
        "characters": characters,
        "dtype": dtype.name,
        "vocab_size": tokenizer.vocab_size,
        "end_of_text_id": tokenizer.end_of_text_id,
        "tokenizer": tokenizer.fingerprint,
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=1), encoding="utf-8")


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Progress:
    """Shows how far tokenising has come; silent where nobody watches."""

    def __init__(self, name: str, wanted: bool) -> None:
        self._name, self._status = name, None
        self._context: AbstractContextManager[Any] = nullcontext()
        if wanted and sys.stderr.isatty():
            from rich.console import Console

            self._context = Console(stderr=True).status(f"tokenising {name}")

    def __enter__(self) -> _Progress:
        self._status = self._context.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        self._context.__exit__(*details)

    def update(self, documents: int, characters: int) -> None:
        """Counts so far."""
        if self._status is not None:
            self._status.update(f"tokenising {self._name}: {documents:,} documents, {characters:,} characters")

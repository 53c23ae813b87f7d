"""`lit-interns1 tokenizer`: new domain vocabularies, and what they are worth (arXiv 2508.15763, section 2.2).

train      a dynamic tokenizer from a base tokenizer and texts of each domain
ratio      characters per token of texts, overall and by domain
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path


def train_tokenizer(
    domains: dict[str, str],
    out: str,
    base: str = "bundled:tokenizer",
    size: int = 1024,
    documents: int | None = None,
    split_digits: bool = True,
) -> None:
    """Trains one vocabulary per domain and writes base and domains as one file.

    Args:
        domains: Texts of each domain: a file, directory, pattern or `bundled:molecules`, by name. SMILES, PROT and XNA
            get the tags and detectors of Intern-S1-Pro; another name is its own tag and is not detected. A `.txt` file
            is read line by line.
        out: The file to write, e.g. runs/chemistry/tokenizer.json; it must not exist.
        base: tokenizer.json, directory or bundled:tokenizer for plain text.
        size: Pieces of each vocabulary.
        documents: Read at most this many documents of each domain.
        split_digits: Whether a digit is always a piece of its own.
    """
    with _errors("train"):
        from lit_interns1.data import load_tokenizer
        from lit_interns1.data.dynamic_tokenizer import DynamicTokenizer, standard_domain, train_vocabulary

        if not domains:
            raise ValueError("--domains must name at least one domain")
        if Path(out).exists():
            raise ValueError(f"--out {out} exists already")
        if documents is not None and documents < 1:
            raise ValueError(f"--documents must be at least 1, got {documents}")
        plain = load_tokenizer(base)
        specs = [
            standard_domain(name, train_vocabulary(islice(_texts(path), documents), size, split_digits))
            for name, path in domains.items()
        ]
        tokenizer = DynamicTokenizer.extend(plain, specs)
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        tokenizer.save(out)
        for spec in specs:
            ids = tokenizer.id_range(spec.name)
            print(f"{spec.name}: {len(ids)} pieces, ids {ids.start} to {ids.stop - 1}")
        print(f"vocab_size {tokenizer.vocab_size}, for a model {tokenizer.padded_vocab_size}; written to {out}")


def compression(tokenizer: str, source: str, documents: int | None = 10_000) -> None:
    """Prints characters per token.

    Args:
        tokenizer: tokenizer.json, directory or bundled:tokenizer.
        source: File, directory, pattern or bundled source of texts; a `.txt` file is read line by line.
        documents: Read at most this many documents; null = all.
    """
    with _errors("ratio"):
        from lit_interns1.data import load_tokenizer
        from lit_interns1.data.dynamic_tokenizer import compression_ratio

        ratio = compression_ratio(load_tokenizer(tokenizer), islice(_texts(source), documents))
        print(f"{'':<12}  characters      tokens  characters per token")
        rows = [(name, ratio.characters[name], ratio.tokens[name]) for name in ratio.tokens]
        for name, characters, tokens in [*rows, ("all", sum(row[1] for row in rows), sum(row[2] for row in rows))]:
            print(f"{name:<12}  {characters:>10,}  {tokens:>10,}  {characters / max(1, tokens):.3f}")


SUBCOMMANDS: dict[str, Callable[..., None]] = {"train": train_tokenizer, "ratio": compression}
"""The second word of the command line, and what it does."""


def _texts(path: str) -> Iterator[str]:
    from lit_interns1.data import TextSource

    return TextSource(path, lines=not path.startswith("bundled:")).documents()


@contextmanager
def _errors(command: str) -> Iterator[None]:
    """Errors of the user's input as one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        print(f"lit-interns1 tokenizer {command}: {error}", file=sys.stderr)
        raise SystemExit(2) from None

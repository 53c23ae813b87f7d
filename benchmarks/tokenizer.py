"""Tokens per second of the dynamic tokenizer beside its base tokenizer, in the same run.

    python benchmarks/tokenizer.py [--tokenizer DIR] [--megabytes 10] [--repeats 3]

Plain: plays and Python modules, where the detectors find nothing. Mixed: the same with a molecule in every kilobyte,
untagged (each is judged) and tagged. Without --tokenizer: the bundled one, with domains trained here. Both encode the
same batches; the base reads everything as plain text, so it gives other tokens where a molecule is.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from itertools import cycle, islice

from measure import interleaved_medians

from lit_interns1.data import TextSource, TextTokenizer, load_tokenizer
from lit_interns1.data.dynamic_tokenizer import DynamicTokenizer, SmilesDetector, standard_domain, train_vocabulary

MEGABYTE = 1_000_000


def plain_texts(size: int) -> list[str]:
    """Documents of `size` characters in all, plays and modules in random order."""
    texts = [
        text for name in ("shakespeare", "python-stdlib") for text in TextSource(f"bundled:{name}").documents()
    ]  # fmt: skip
    random.Random(0).shuffle(texts)
    taken: list[str] = []
    while size > 0:
        taken.append(texts[len(taken) % len(texts)][:size])
        size -= len(taken[-1])
    return taken


def with_molecules(texts: list[str], opening: str = "", closing: str = "") -> list[str]:
    """A molecule behind every kilobyte."""
    molecules = cycle(TextSource("bundled:molecules").documents())
    return [
        "".join(
            f"{text[at : at + 1000]} {opening}{next(molecules)}{closing} " if at + 1000 < len(text) else text[at:]
            for at in range(0, len(text), 1000)
        )
        for text in texts
    ]


def main() -> None:
    """Prints one line per kind of text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", help="folder or file of a dynamic tokenizer")
    parser.add_argument("--megabytes", type=float, default=10.0)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if options.tokenizer:
        dynamic = load_tokenizer(options.tokenizer)
        if not isinstance(dynamic, DynamicTokenizer):
            raise SystemExit(f"{options.tokenizer} is no dynamic tokenizer")
    else:
        molecules = list(islice(TextSource("bundled:molecules").documents(), 5000))
        dynamic = DynamicTokenizer.extend(
            load_tokenizer(), [standard_domain("SMILES", train_vocabulary(molecules, size=512))]
        )
    base = TextTokenizer(dynamic.tokenizer)
    plain = plain_texts(int(options.megabytes * MEGABYTE))
    kinds = {
        "plain": plain,
        "molecules": with_molecules(plain),
        "tagged molecules": with_molecules(plain, "<SMILES>", "</SMILES>"),
    }
    check = next((d.detector.resolved_check for d in dynamic.domains if isinstance(d.detector, SmilesDetector)), "none")
    print(f"{options.megabytes:g} MB of plain text, {len(plain)} documents; SMILES checked by: {check}")
    print(f"{'text':<18}{'base':>14}{'dynamic':>14}   tokens/s    ratio   seconds base, dynamic")
    for kind, texts in kinds.items():
        runs: dict[str, Callable[[], object]] = {
            "base": lambda texts=texts: base.encode_batch(texts),
            "dynamic": lambda texts=texts: dynamic.encode_batch(texts),
        }
        seconds = interleaved_medians(runs, repeats=options.repeats)
        rate = {
            name: sum(map(len, tokenizer.encode_batch(texts))) / seconds[name]
            for name, tokenizer in (("base", base), ("dynamic", dynamic))
        }
        print(
            f"{kind:<18}{rate['base']:>14,.0f}{rate['dynamic']:>14,.0f}   tokens/s    "
            f"{rate['dynamic'] / rate['base']:.2f}    {seconds['base']:.2f}, {seconds['dynamic']:.2f}"
        )


if __name__ == "__main__":
    main()

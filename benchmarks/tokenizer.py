"""Tokens per second of the dynamic tokenizer beside its base tokenizer, in the same run.

    python benchmarks/tokenizer.py [--tokenizer DIR] [--megabytes 10] [--repeats 3]

Plain: plays and Python modules, where the detectors find nothing. Mixed: the same with a molecule in every kilobyte,
untagged (each is judged) and tagged. Without --tokenizer: the bundled one, with domains trained here. Both encode the
same batches; the base reads everything as plain text, so it gives other tokens where a molecule is. CPU seconds of all
threads stand beside the rates: on a machine with other work they are the ones to trust.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
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


class Run:
    """Encodes the texts when called; keeps the tokens, and the CPU seconds of every call, threads included."""

    def __init__(self, tokenizer: TextTokenizer, texts: list[str]) -> None:
        self.tokenizer, self.texts = tokenizer, texts
        self.tokens, self.cpu_seconds = 0, list[float]()

    def __call__(self) -> None:
        started = time.process_time()
        self.tokens = sum(map(len, self.tokenizer.encode_batch(self.texts)))
        self.cpu_seconds.append(time.process_time() - started)


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
    print(f"{'text':<18}{'base':>12}{'dynamic':>12}  tokens/s   ratio   {'CPU seconds base, dynamic':>26}   ratio")
    for kind, texts in kinds.items():
        runs = {name: Run(tokenizer, texts) for name, tokenizer in (("base", base), ("dynamic", dynamic))}
        seconds = interleaved_medians(runs, repeats=options.repeats)
        rate = {name: run.tokens / seconds[name] for name, run in runs.items()}
        cpu = {name: statistics.median(run.cpu_seconds[1:]) for name, run in runs.items()}
        cpu_ratio = (runs["dynamic"].tokens / cpu["dynamic"]) / (runs["base"].tokens / cpu["base"])
        print(
            f"{kind:<18}{rate['base']:>12,.0f}{rate['dynamic']:>12,.0f}  tokens/s   "
            f"{rate['dynamic'] / rate['base']:.2f}   {cpu['base']:>17.2f}, {cpu['dynamic']:.2f}   {cpu_ratio:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()

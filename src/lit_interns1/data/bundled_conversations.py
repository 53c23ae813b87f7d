"""Labelled images, signals, molecules and arithmetic that come with the package, as questions and answers.

digits   28 × 28 handwritten digits (a part of MNIST)          "Which digit is this?"      "7"
vowels   utterances of nine speakers, 12 channels, 7–29 points  "Which speaker is this?"    "3"
pairs    two of the digits on 48 × 48 pixels    "What is in the image?"     "a large one above a small two"
science-pictures    crops of 32 × 32 pixels     "What does this picture show?"    "astronomy"
molecule-questions  text alone                  "How many rings does CC(=O)O have?"    "0"
chain-sum           text alone, made by rule    "12 + 5 ="      "17"
"""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from lit_interns1.data.arithmetic import ArithmeticProblems
from lit_interns1.data.digit_pairs import digit_pair
from lit_interns1.data.molecule_questions import MOLECULE_FILE, molecule_question
from lit_interns1.data.sources import BUNDLED_FOLDER


class BundledSet(NamedTuple):
    """A part of a bundled file.

    Attributes:
        file: Its name; empty if the set is made by rule.
        question: What is asked; empty where every molecule has its own question.
        training: Whether it is the part for training.
        pairs: How many pairs are made of its digits; 0 = the digits themselves.
        molecules: How many of its molecules are asked about; 0 = it holds images or signals.
        problems: How many arithmetic problems are made.
    """

    file: str
    question: str
    training: bool
    pairs: int = 0
    molecules: int = 0
    problems: int = 0


_DIGITS, _VOWELS = ("digits.npz", "Which digit is this?"), ("vowels.npz", "Which speaker is this?")
_PICTURES = ("science_pictures.npz", "What does this picture show?")
BUNDLED_CONVERSATIONS = {
    "bundled:digits/train": BundledSet(*_DIGITS, True),
    "bundled:digits/test": BundledSet(*_DIGITS, False),
    "bundled:digit-pairs/train": BundledSet("digits.npz", "What is in the image?", True, 8_000),
    "bundled:digit-pairs/test": BundledSet("digits.npz", "What is in the image?", False, 400),
    "bundled:vowels/train": BundledSet(*_VOWELS, True),
    "bundled:vowels/test": BundledSet(*_VOWELS, False),
    "bundled:science-pictures/train": BundledSet(*_PICTURES, True),
    "bundled:science-pictures/test": BundledSet(*_PICTURES, False),
    "bundled:molecule-questions/train": BundledSet(MOLECULE_FILE, "", True, molecules=20_000),
    "bundled:molecule-questions/test": BundledSet(MOLECULE_FILE, "", False, molecules=1_000),
    "bundled:chain-sum/train": BundledSet("", "", True, problems=10_000),
    "bundled:chain-sum/test": BundledSet("", "", False, problems=1_000),
}
"""Sets by name."""


@cache
def _arrays(file: str) -> dict[str, np.ndarray]:
    with np.load(BUNDLED_FOLDER / file, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def labelled_arrays(path: str) -> tuple[list[np.ndarray], np.ndarray]:
    """Images (28, 28) or (32, 32, 3), or signals (T, 12), of a set, and their labels."""
    entry = BUNDLED_CONVERSATIONS[path]
    arrays = _arrays(entry.file)
    count = int(arrays["num_training"])
    part = slice(0, count) if entry.training else slice(count, None)
    if "images" in arrays:
        values = list(arrays["images"])
    elif "planes" in arrays:
        values = list(np.ascontiguousarray(arrays["planes"].transpose(0, 2, 3, 1)))
    else:
        values = np.split(arrays["points"], np.cumsum(arrays["lengths"])[:-1])
    return values[part], arrays["labels"][part]


_labelled = cache(labelled_arrays)


def bundled_size(path: str) -> int:
    """How many there are."""
    entry = BUNDLED_CONVERSATIONS[path]
    return entry.pairs or entry.molecules or entry.problems or len(_labelled(path)[1])


@cache
def bundled_key(path: str) -> str:
    """Identifies what is in a set."""
    entry = BUNDLED_CONVERSATIONS[path]
    if entry.problems:
        content = repr([_problems(entry)[i] for i in range(entry.problems)]).encode()
    else:
        content = (BUNDLED_FOLDER / entry.file).read_bytes()
    return f"{path} {hashlib.blake2b(content, digest_size=16).hexdigest()}"


@cache
def _problems(entry: BundledSet) -> ArithmeticProblems:
    """The problems of a set; `ArithmeticPrompts` has the same by default."""
    return ArithmeticProblems(size=entry.problems, split="train" if entry.training else "test")


def bundled_record(path: str, index: int) -> dict[str, Any]:
    """One question with its answer, in the `messages` form."""
    entry = BUNDLED_CONVERSATIONS[path]
    question: str | list[dict[str, Any]]
    if entry.molecules:
        question, answer = molecule_question(index, entry.training)
    elif entry.problems:
        question, answer = _problems(entry)[index]
    else:
        value, answer = _medium(path, index)
        kind = "image" if value.dtype == np.uint8 else "time_series"
        question = [{"type": kind, kind: value}, {"type": "text", "text": entry.question}]
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def _medium(path: str, index: int) -> tuple[np.ndarray, str]:
    """An image or a signal, and what is said of it."""
    values, labels = _labelled(path)
    entry = BUNDLED_CONVERSATIONS[path]
    if entry.pairs:
        return digit_pair(index, entry.training, values, labels)
    label = int(labels[index])
    names = _arrays(entry.file).get("names")
    return values[index], str(label) if names is None else str(names[label])

"""Questions about the bundled molecules, with answers computed from the graph that their SMILES describe.

    How many carbon atoms does CC(=O)O have?   2        also nitrogen, oxygen: atoms of that element
    How many rings does c1ccccc1 have?         1        bonds − atoms + 1: independent rings (3 in adamantane)
    Does CCS contain sulfur?                   yes

Question i asks about molecule i of a random order (the file is sorted), in the five ways in turn; test questions begin
at the end of that order.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable
from functools import cache

import numpy as np

from lit_interns1.data.smiles import Molecule, parse_smiles
from lit_interns1.data.sources import BUNDLED_FILES, BUNDLED_FOLDER

MOLECULE_FILE = BUNDLED_FILES["bundled:molecules"]


def _count(symbol: str) -> Callable[[Molecule], str]:
    return lambda molecule: str(sum(atom.symbol == symbol for atom in molecule.atoms))


def _rings(molecule: Molecule) -> str:
    return str(len(molecule.bonds) - len(molecule.atoms) + 1)


def _has_sulfur(molecule: Molecule) -> str:
    return "yes" if any(atom.symbol == "S" for atom in molecule.atoms) else "no"


QUESTIONS: tuple[tuple[str, Callable[[Molecule], str]], ...] = (
    ("How many carbon atoms does {} have?", _count("C")),
    ("How many nitrogen atoms does {} have?", _count("N")),
    ("How many oxygen atoms does {} have?", _count("O")),
    ("How many rings does {} have?", _rings),
    ("Does {} contain sulfur?", _has_sulfur),
)
"""What is asked, and how it is answered."""


@cache
def shuffled_molecules() -> list[str]:
    """All molecules in a random order that is always the same."""
    with gzip.open(BUNDLED_FOLDER / MOLECULE_FILE, "rt", encoding="ascii") as stream:
        written = stream.read().split()
    return [written[place] for place in np.random.default_rng(50).permutation(len(written))]


def molecule_question(index: int, training: bool) -> tuple[str, str]:
    """Question and answer number `index` of a set.

    Args:
        index: Its number, from 0.
        training: Whether it is of the training set, which begins at the other end of the order.
    """
    molecules = shuffled_molecules()
    written = molecules[index if training else len(molecules) - 1 - index]
    question, answer = QUESTIONS[index % len(QUESTIONS)]
    return question.format(written), answer(parse_smiles(written))

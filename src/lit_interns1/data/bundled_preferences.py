"""Preferences about the bundled molecules: a molecule that is written as it should be, and one with a slip of the pen.

    <SMILES>    c1ccccc1</SMILES>  is preferred to  c1cccc1)</SMILES>

A slip is a character that is left out, put in, replaced, or swapped with its neighbour, so that the text is no valid
SMILES any more by `data.smiles`. Pair number i is of molecule i of a random order (the file is sorted); the test pairs
begin at the end of that order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from lit_interns1.data.molecule_questions import MOLECULE_FILE, shuffled_molecules
from lit_interns1.data.smiles import is_valid_smiles


class BundledPairs(NamedTuple):
    """A set of pairs.

    Attributes:
        file: Where the molecules are.
        training: Whether it is the part for training.
        pairs: How many.
    """

    file: str
    training: bool
    pairs: int


BUNDLED_PREFERENCES = {
    "bundled:molecule-preferences/train": BundledPairs(MOLECULE_FILE, True, 8_000),
    "bundled:molecule-preferences/test": BundledPairs(MOLECULE_FILE, False, 1_000),
}
"""Sets by name."""

_ALPHABET = "CNOScnos()[]=#123456+-FBrl"


def bundled_preferences_size(path: str) -> int:
    """How many there are."""
    return BUNDLED_PREFERENCES[path].pairs


def slip(written: str, random: np.random.Generator) -> str:
    """A text with one character left out, put in, replaced, or swapped with the next, that is no valid SMILES.

    Args:
        written: A SMILES of at least two characters.
        random: Which slip, and where; drawn again until the text is invalid.
    """
    while True:
        place, kind = int(random.integers(len(written) - 1)), int(random.integers(4))
        before, here, behind = written[:place], written[place], written[place + 1 :]
        other = _ALPHABET[int(random.integers(len(_ALPHABET)))]
        changed = before + ("", other + here, other, behind[0] + here)[kind] + (behind[1:] if kind == 3 else behind)
        if not is_valid_smiles(changed):
            return changed


def bundled_preference(path: str, index: int) -> dict[str, Any]:
    """Pair number `index` of a set, in the JSON form of preferences."""
    training = BUNDLED_PREFERENCES[path].training
    molecules = shuffled_molecules()
    written = molecules[index if training else len(molecules) - 1 - index]
    wrong = slip(written, np.random.default_rng([60, index, int(training)]))
    return {"prompt": "<SMILES>", "chosen": f"{written}</SMILES>", "rejected": f"{wrong}</SMILES>"}

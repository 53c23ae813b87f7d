"""Detectors: which parts of a plain text are a molecule, a protein, a nucleic acid (arXiv 2508.15763, section 2.2).

    SMILES   a run of ≥ 10 units (bracket atoms, elements, bonds, ring numbers, branches) with ≥ 5 ASCII letters,
             none touching it, that does not start or end with one of `: . =`, and that a chemistry check accepts
    PROT     [A-Z]{27,}, not all of it ATCGU
    XNA      [ATCGU]{27,}

Expressions and lengths are those of the published Intern-S1-Pro tokenizer. A table lookup over the characters finds
the few stretches of a long text that can hold a hit, so the expressions need not look at the rest.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import re
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from lit_interns1.data.smiles import ELEMENTS, is_valid_smiles
from lit_interns1.data.tokenizer import TokenizerError

Span = tuple[int, int]
"""Start and end of a hit, in characters."""
SmilesCheck = Literal["auto", "rdkit", "grammar", "rules"]

_SHORT_TEXT = 2_000
"""Characters up to which the expression alone is faster than the lookup."""
_LONGEST_JUDGED = 20_000
"""Characters of a candidate up to which atoms and bonds are built; longer ones are judged by the rules."""


class Detector(Protocol):
    """Finds the spans of one domain. `settings` is what a saved tokenizer keeps of it."""

    def find(self, text: str) -> list[Span]:
        """Hits from left to right, without overlap."""
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """Kind and options, as JSON."""
        ...

    @property
    def identity(self) -> str:
        """What the hits depend on."""
        ...


def _codes(text: str) -> NDArray[np.uint8]:
    """(n,) the characters as Latin-1; `?` where they are none."""
    return np.frombuffer(text.encode("latin-1", "replace"), dtype=np.uint8)


def _table(characters: str) -> NDArray[np.bool_]:
    table = np.zeros(256, dtype=bool)
    table[[ord(character) for character in characters]] = True
    return table


class LetterRunDetector:
    """Long runs of some capital letters.

    Args:
        letters: The letters of a run, from A to Z.
        least: Shortest run.
        not_only: Runs all of whose letters are among these are left out, for a later detector.

    Raises:
        TokenizerError: For `least` below 2 or letters that are no capital letters.
    """

    def __init__(self, letters: str = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", least: int = 27, not_only: str = "") -> None:
        if least < 2:
            raise TokenizerError(f"least must be at least 2, got {least}")
        for name, value in (("letters", letters), ("not_only", not_only)):
            if not re.fullmatch("[A-Z]+" if name == "letters" else "[A-Z]*", value):
                raise TokenizerError(f"{name} must be capital letters from A to Z, got {value!r}")
        self.letters, self.least, self.not_only = letters, least, frozenset(not_only)
        self._expression = re.compile(f"[{letters}]{{{least},}}+")
        self._letter_table = _table(letters)

    @property
    def settings(self) -> dict[str, Any]:
        """Kind and options, as JSON."""
        not_only = "".join(sorted(self.not_only))
        return {"kind": "letter_run", "letters": self.letters, "least": self.least, "not_only": not_only}

    @property
    def identity(self) -> str:
        """What the hits depend on."""
        return repr(self.settings)

    def find(self, text: str) -> list[Span]:
        """Runs from left to right."""
        if len(text) < self.least or (len(text) > _SHORT_TEXT and not self._possible(text)):
            return []
        spans = [match.span() for match in self._expression.finditer(text)]
        return [(start, end) for start, end in spans if not self.not_only.issuperset(text[start:end])]

    def _possible(self, text: str) -> bool:
        """A run covers a whole block of half its length, wherever it starts."""
        block = (self.least + 1) // 2
        inside = self._letter_table[_codes(text)[: len(text) // block * block]]
        return bool(inside.reshape(-1, block).all(axis=1).any())


_TWO_LETTERS = tuple(element for element in ELEMENTS if len(element) == 2)
_ONE_LETTER = "".join(element for element in ELEMENTS if len(element) == 1) + "bcnops"
_SYMBOLS = "().=-#@$%*:+/\\"
_BONDS = frozenset("-=#:/\\.$")


def _unit_expression(bracket: str) -> str:
    """One unit; alternatives begin differently, and a two-letter element goes before a one-letter one."""
    second: dict[str, str] = {}
    for element in _TWO_LETTERS:
        second[element[0]] = second.get(element[0], "") + element[1]
    elements = [f"{first}[{letters}]" + ("?+" if first in _ONE_LETTER else "") for first, letters in second.items()]
    alone = "".join(letter for letter in _ONE_LETTER if letter not in second)
    return rf"(?>[{alone}{re.escape(_SYMBOLS)}\d]|{'|'.join(elements)}|{bracket})"


def _run_expression(bracket: str) -> re.Pattern[str]:
    return re.compile(rf"(?![:.=]){_unit_expression(bracket)}{{10,}}(?<![:.=])")


_RUN = _run_expression(r"\[[^\]]++\]")
_RUN_SHORT_BRACKETS = _run_expression(r"\[[^\]]{1,255}+\]")
_BRACKET_STRETCH = re.compile(r"\[[^\]]*+")
_OTHER_DIGIT = re.compile(r"[^\D0-9]")
_SINGLE_TABLE = _table(_ONE_LETTER + _SYMBOLS + "0123456789")
_PAIR_TABLE = np.zeros(1 << 16, dtype=bool)
_PAIR_TABLE[[ord(element[0]) << 8 | ord(element[1]) for element in _TWO_LETTERS]] = True
_LETTER_TABLE = _table("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")


class SmilesDetector:
    """Molecules written as SMILES.

    Args:
        check: How candidates are judged. `rdkit`: RDKit can read them, as in the published tokenizer. `grammar`:
            `lit_interns1.data.smiles`, which needs no chemistry package. `rules`: brackets, bonds and ring numbers
            alone, as the published tokenizer does without RDKit. `auto`: `rdkit` if installed, else `grammar`.

    Raises:
        TokenizerError: For an unknown check, or `rdkit` without the package.
    """

    def __init__(self, check: SmilesCheck = "auto") -> None:
        if check not in ("auto", "rdkit", "grammar", "rules"):
            raise TokenizerError(f"check must be auto, rdkit, grammar or rules, got {check!r}")
        installed = importlib.util.find_spec("rdkit") is not None
        if check == "rdkit" and not installed:
            raise TokenizerError("check='rdkit' needs the package rdkit: pip install rdkit, or check='grammar'")
        self.check = check
        self.resolved_check = check if check != "auto" else "rdkit" if installed else "grammar"

    @property
    def settings(self) -> dict[str, Any]:
        """Kind and options, as JSON."""
        return {"kind": "smiles", "check": self.check}

    @property
    def identity(self) -> str:
        """What the hits depend on."""
        return f"smiles, checked by {self.resolved_check}"

    def find(self, text: str) -> list[Span]:
        """Molecules from left to right."""
        spans: list[Span] = []
        expression = _RUN if _brackets_are_cheap(text) else _RUN_SHORT_BRACKETS
        for first, last in [(0, len(text))] if len(text) <= _SHORT_TEXT else _promising_stretches(text):
            for match in expression.finditer(text, first, last):
                start, end = match.span()
                if _is_letter(text, start - 1) or _is_letter(text, end):
                    continue
                if self.accepts(match.group()):
                    spans.append((start, end))
        return spans

    def accepts(self, candidate: str) -> bool:
        """Whether a run of units is a molecule."""
        if sum(character.isascii() and character.isalpha() for character in candidate) < 5:
            return False
        if self.resolved_check == "rules" or len(candidate) > _LONGEST_JUDGED:
            return follows_rules(candidate)
        return _rdkit_reads(candidate) if self.resolved_check == "rdkit" else is_valid_smiles(candidate)


def _is_letter(text: str, position: int) -> bool:
    return 0 <= position < len(text) and text[position].isascii() and text[position].isalpha()


def _brackets_are_cheap(text: str) -> bool:
    """Whether the work at opening brackets, each of which looks for the next closing one, is linear in the text."""
    if "[" not in text:
        return True
    stretches = (match.group() for match in _BRACKET_STRETCH.finditer(text))
    return sum(stretch.count("[") * len(stretch) for stretch in stretches) <= 100_000 + 50 * len(text)


def _promising_stretches(text: str) -> list[Span]:
    """Stretches outside which there is no run of units, and that are long enough to hold one.

    A character of a run belongs to a unit of one or two characters, or lies between `[` and the next `]`. So a run
    lies within a maximal stretch of such characters, and a stretch has at most as many units as it has characters of
    the former kind and opening brackets.
    """
    code_N = _codes(text)
    if not text.isascii():
        digits = [match.start() for match in _OTHER_DIGIT.finditer(text)]
        if digits:
            code_N = code_N.copy()
            code_N[digits] = ord("0")
    unit_N = _SINGLE_TABLE[code_N]
    pair_N = _PAIR_TABLE[(code_N[:-1].astype(np.uint16) << 8) | code_N[1:]]
    unit_N[:-1] |= pair_N
    unit_N[1:] |= pair_N
    inside_N = np.zeros(len(text) + 2, dtype=bool)
    inside_N[1:-1] = unit_N
    if "[" in text:
        unit_N |= code_N == ord("[")
        for match in _BRACKET_STRETCH.finditer(text):
            start, end = match.span()
            if end < len(text) and end - start > 1:  # closed, and not empty
                inside_N[start + 1 : end + 2] = True
    border_B = np.flatnonzero(inside_N[1:] != inside_N[:-1])
    start_S, end_S = border_B[::2], border_B[1::2]
    long_enough_S = end_S - start_S >= 10
    return [
        (start, end)
        for start, end in zip(start_S[long_enough_S].tolist(), end_S[long_enough_S].tolist())
        if np.count_nonzero(unit_N[start:end]) >= 10 and np.count_nonzero(_LETTER_TABLE[code_N[start:end]]) >= 5
    ]


@functools.cache
def _rdkit() -> tuple[Any, Any]:
    from rdkit import Chem, rdBase

    return Chem, rdBase


def _rdkit_reads(candidate: str) -> bool:
    chem, base = _rdkit()
    with base.BlockLogs():
        return chem.MolFromSmiles(candidate) is not None


_RULE_UNIT = re.compile(
    r"\[(?P<bracket>[^\[\]]+)\]|%(?P<pair>\d\d)|(?P<digit>\d)|Cl|Br|[BCNOPSFIbcnops]|[-=#:/\\.$();]"
)
_BRACKET_LETTERS = re.compile("[A-GI-Za-z]{3}")
_NUMBER = re.compile(r"\d+")


def follows_rules(candidate: str) -> bool:
    """Whether a candidate obeys rules of notation; atoms and valences are not looked at.

    Branches are balanced; no bond symbol stands first, last or beside another; every ring number occurs an even
    number of times; outside brackets there are only atoms of the organic subset; a bracket holds at most two numbers,
    none of four digits, and no three letters in a row unless one is H; a text all in lower case has two digits.
    """
    position, depth, digits = 0, 0, 0
    open_rings: set[str] = set()
    if candidate[:1] in _BONDS or candidate[-1:] in _BONDS:
        return False
    if any(first in _BONDS and second in _BONDS for first, second in itertools.pairwise(candidate)):
        return False
    for unit in _RULE_UNIT.finditer(candidate):
        if unit.start() != position:
            return False
        position = unit.end()
        if bracket := unit["bracket"]:
            numbers = _NUMBER.findall(bracket)
            if len(numbers) > 2 or any(len(number) > 3 for number in numbers) or _BRACKET_LETTERS.search(bracket):
                return False
        elif ring := unit["pair"] or unit["digit"]:
            open_rings ^= {ring}
            digits += 1
        elif unit.group() == "(":
            depth += 1
        elif unit.group() == ")":
            depth -= 1
            if depth < 0:
                return False
    if position != len(candidate) or depth or open_rings:
        return False
    return digits >= 2 or candidate.lower() != candidate


def detector_from_settings(settings: dict[str, Any] | None) -> Detector | None:
    """The detector that `settings` describe; None for none.

    Raises:
        TokenizerError: For an unknown kind or option.
    """
    if settings is None:
        return None
    options = dict(settings)
    kind = options.pop("kind", None)
    kinds: dict[str, type[Any]] = {"smiles": SmilesDetector, "letter_run": LetterRunDetector}
    if kind not in kinds:
        raise TokenizerError(f"unknown kind of detector {kind!r}: known are {', '.join(kinds)}")
    try:
        detector: Detector = kinds[kind](**options)
    except TypeError as error:
        raise TokenizerError(f"detector {kind!r}: {error}") from None
    return detector

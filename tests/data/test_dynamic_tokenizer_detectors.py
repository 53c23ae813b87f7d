"""Detectors against their defining expressions, the chemistry checks against RDKit, and hostile texts."""

from __future__ import annotations

import random
import re
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_interns1.data.dynamic_tokenizer import LetterRunDetector, SmilesDetector, detectors
from lit_interns1.data.dynamic_tokenizer.detectors import detector_from_settings, follows_rules
from lit_interns1.data.sources import TextSource
from lit_interns1.data.tokenizer import TokenizerError

ELEMENTS = (
    "Ac Ag Al Am Ar As At Au Ba Be Bh Bi Bk Br Ca Cd Ce Cf Cl Cm Cn Co Cr Cs Cu Db Ds Dy Er Es Eu Fe Fl Fm Fr Ga Gd "
    "Ge He Hf Hg Ho Hs In Ir Kr La Li Lr Lu Lv Mc Md Mg Mn Mo Mt Na Nb Nd Ne Nh Ni No Np Og Os Pa Pb Pd Pm Po Pr Pt "
    "Pu Ra Rb Re Rf Rg Rh Rn Ru Sb Sc Se Sg Si Sm Sn Sr Ta Tb Tc Te Th Ti Tl Tm Ts Xe Yb Zn Zr "
    "B C F H I K N O P S U V W Y b c n o p s"
)
UNIT = rf"(?>\[[^\]]+\]|{'|'.join(ELEMENTS.split(' '))}|[().=\-#@\d$%*:+/\\])"
RUN = re.compile(rf"(?![:.=]){UNIT}{{10,}}(?<![:.=])")
"""The run of units as it is defined, without any shortcut."""


def runs_by_definition(text: str) -> list[tuple[int, int]]:
    found = []
    for match in RUN.finditer(text):
        before, behind = text[: match.start()][-1:], text[match.end() :][:1]
        letters = len(re.findall("[A-Za-z]", match.group()))
        if letters >= 5 and not re.fullmatch("[A-Za-z]", before) and not re.fullmatch("[A-Za-z]", behind):
            found.append(match.span())
    return found


@pytest.fixture
def any_run(monkeypatch) -> SmilesDetector:
    """Accepts every run of units with five letters."""
    monkeypatch.setattr(detectors, "follows_rules", lambda candidate: True)
    return SmilesDetector("rules")


PARTS = ["C", "c", "Cl", "[C@H]", "[", "]", "1", "%12", "=", ".", ":", "(", ")", " ", "x", "q", "Na", "l", "é", "٣"]
PARTS += [
    "[a long way to the end]",
    "-",
    "CC(=O)Nc1ccc(Cl)cc1",
    "\n",
    "e",
    "O",
    "N",
    "S",
    "[]",
    "漢",
    "a",
    "CCCCCC",
    f"[{'much ' * 60}]",
]


def test_runs_of_units_are_those_of_the_expression(any_run, monkeypatch):
    rng = random.Random(3)
    for shortcut_above in (2_000, 0):  # the expression alone, and behind the table lookup
        monkeypatch.setattr(detectors, "_SHORT_TEXT", shortcut_above)
        hits = 0
        for _ in range(1000):
            text = "".join(rng.choices(PARTS, k=rng.randint(1, 40)))
            assert any_run.find(text) == runs_by_definition(text), text
            hits += bool(any_run.find(text))
        assert hits > 60


def test_runs_in_long_texts(any_run):
    rng = random.Random(4)
    lines = [text for text, _ in zip(TextSource("bundled:molecules").documents(), range(60))]
    for document in [*islice(TextSource("bundled:shakespeare").documents(), 6), "漢字 " * 900, "x[i] = c[j](n) " * 400]:
        words = re.split("( )", document[:20_000])
        for line in rng.sample(lines, 12):
            words.insert(rng.randrange(len(words) + 1), f" {line} " if rng.random() < 0.5 else line)
        text = "".join(words) + " and more" * 250
        assert len(text) > detectors._SHORT_TEXT
        assert any_run.find(text) == runs_by_definition(text)


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet="ACGTUX a\n", max_size=120), st.integers(2, 30), st.integers(0, 40))
def test_letter_runs(text: str, least: int, repeats: int):
    text += ("ATCGU" * 9)[:repeats] + " " + ("ATXGU" * 9)[:repeats]
    for padded in (text, "some words " * 200 + text + "Z" * 3):
        expected = [m.span() for m in re.finditer(f"[A-Z]{{{least},}}", padded) if not re.fullmatch("[ATCGU]+", m[0])]
        assert LetterRunDetector(least=least, not_only="ATCGU").find(padded) == expected
        expected = [m.span() for m in re.finditer(f"[ATCGU]{{{least},}}", padded)]
        assert LetterRunDetector("ATCGU", least).find(padded) == expected


RULES = {
    "CC(=O)Oc1ccccc1C(=O)O": True,
    "C[C@H](N)C(=O)O": True,
    "CC(=O)O)C(CCC": False,  # a branch that was not opened
    "CC(CCCCCCCC": False,
    "-CCCCCCCCC": False,  # a bond at the beginning
    "CCCCCCCCC=": False,
    "CC==CCCCCC": False,  # two bonds
    "C1CCCCCCCC": False,  # a ring that is not closed
    "C%12CCCCCCC%12": True,
    "C%12CCCCCCC%21": False,
    "C%1CCCCCCC%1": False,
    "C1CCCC1CCC1CC1": True,  # a ring number used twice
    "C[12C3H4-5]CCCC": False,  # four numbers in a bracket
    "C[13CH3]CCCC": True,
    "C[1234C]CCCC": False,
    "C[Nasty]CCCC": False,
    "C[NHe+]CCCC": True,
    "CKCCCCCCCC": False,  # outside the organic subset
    "ccccccccccc": False,  # lower case without two digits
    "c1ccccccccc1": True,
}


def test_rules():
    assert {text: follows_rules(text) for text in RULES} == RULES


def test_checks_agree_with_rdkit():
    pytest.importorskip("rdkit")
    rng = random.Random(5)
    rdkit, grammar, rules = (SmilesDetector(check) for check in ("rdkit", "grammar", "rules"))
    assert SmilesDetector().resolved_check == "rdkit"
    verdicts = []
    for text in islice(TextSource("bundled:molecules").documents(), 1500):
        characters = list(text)
        for _ in range(rng.randint(0, 2)):
            at = rng.randrange(len(characters))
            characters[at : at + 1] = rng.choice(["", "(", ")", "=", "1", "c", "C", "N"])
        changed = "".join(characters)
        verdicts.append((rdkit.accepts(changed), grammar.accepts(changed), rules.accepts(changed)))
    accepted = sum(verdict[0] for verdict in verdicts)
    by_grammar = sum(a == b for a, b, _ in verdicts)
    by_rules = sum(a == c for a, _, c in verdicts)
    print(f"RDKit accepts {accepted} of {len(verdicts)}; grammar agrees on {by_grammar}, rules on {by_rules}")
    assert 500 < accepted < 1400
    assert by_grammar >= 0.99 * len(verdicts)
    assert by_grammar > by_rules > 0.7 * len(verdicts)


def test_without_rdkit(monkeypatch):
    monkeypatch.setattr(detectors.importlib.util, "find_spec", lambda name: None)
    detector = SmilesDetector()
    assert detector.resolved_check == "grammar"
    assert "grammar" in detector.identity
    assert detector.find("see CC(=O)Nc1ccc(Cl)cc1 and CC(C)(C)(C)(C)CCCC.") == [(4, 23)]
    assert SmilesDetector("rules").find("see CC(=O)Nc1ccc(Cl)cc1 and CC(C)(C)(C)(C)CCCC.") == [(4, 23), (28, 46)]
    with pytest.raises(TokenizerError, match="check='rdkit' needs the package rdkit"):
        SmilesDetector("rdkit")


@pytest.mark.parametrize(
    ("unit", "length"),
    [
        *((unit, 150_000) for unit in ("[", "[]", "[[", "=", "-", "(", "1", "CCCCCCCCC=:. ")),
        *((unit, 30_000) for unit in ("C", "C(", "C.", "N=", "C1", "c1ccccc1", "[C@H]", "[[C]")),
    ],
)
def test_hostile_texts_take_time_in_proportion(unit: str, length: int):
    """One thing for very long: were the work quadratic, the first ones would take a minute each."""
    for tail in ("", "]", " CC(=O)Nc1ccc(Cl)cc1"):
        spans = SmilesDetector("grammar").find(unit * (length // len(unit)) + tail)
        assert len(spans) <= 2


def test_settings():
    for detector in (SmilesDetector("rules"), LetterRunDetector("ATCGU", 30, "AT")):
        copy = detector_from_settings(detector.settings)
        assert (type(copy), copy.settings) == (type(detector), detector.settings)
    assert detector_from_settings(None) is None
    with pytest.raises(TokenizerError, match="unknown kind of detector 'other': known are smiles, letter_run"):
        detector_from_settings({"kind": "other"})
    with pytest.raises(TokenizerError, match=r"detector 'smiles': .*colour"):
        detector_from_settings({"kind": "smiles", "colour": 1})
    with pytest.raises(TokenizerError, match="check must be auto, rdkit, grammar or rules, got 'x'"):
        SmilesDetector("x")  # type: ignore[arg-type]
    with pytest.raises(TokenizerError, match="least must be at least 2, got 1"):
        LetterRunDetector(least=1)
    with pytest.raises(TokenizerError, match="letters must be capital letters from A to Z, got 'aé'"):
        LetterRunDetector("aé")

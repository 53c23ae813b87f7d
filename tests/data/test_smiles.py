"""The SMILES checker against hand-made cases and against RDKit's verdicts.

`smiles_verdicts.jsonl` holds molecules of the MOSES test set (Polykovskiy et al., arXiv 1811.12823; MIT licence), their
Kekulé and randomly ordered forms, and corrupted versions (deleted, inserted, exchanged characters), each with whether
RDKit 2026.09.1 `Chem.MolFromSmiles` accepts it.
"""

import itertools
import json
import random
from pathlib import Path

import pytest

from lit_interns1.data.perfect_matching import unmatched_vertex
from lit_interns1.data.smiles import SmilesError, check_smiles, is_valid_smiles, parse_smiles

VERDICTS = [json.loads(line) for line in (Path(__file__).parent / "smiles_verdicts.jsonl").read_text().splitlines()]

VALID = [
    "C",
    "CC(=O)Oc1ccccc1C(=O)O",
    "CN1C=NC2=C1C(=O)N(C(=O)N2C)C",
    "c1ccccc1c1ccccc1",
    "c1ccccc1-c1ccccc1",
    "c1cc[nH]c1",
    "Cn1cccc1",
    "c1ccoc1",
    "c1ccsc1",
    "c1ccncc1",
    "c1cc[n+](C)cc1",
    "c1ccn(=O)cc1",
    "c1cc[cH-]c1",
    "c1cc[cH+]ccc1",
    "O=c1cc[nH]cc1",
    "c1ccc2cc3ccccc3cc2c1",
    "c1ccc2cccc2cc1",
    "C1=CC=c2ccccc2=C1",
    "CN(=O)=O",
    "C[N+](=O)[O-]",
    "CN=N#N",
    "CN=[N+]=[N-]",
    "OCl(=O)(=O)=O",
    "CS(=O)(=O)N",
    "OP(=O)(O)O",
    "F[P-](F)(F)(F)(F)F",
    "FS(F)(F)(F)(F)F",
    "CI(Cl)Cl",
    "[BH4-].[Na+]",
    "[NH4+].[Cl-]",
    "[NH3][Pt]([NH3])(Cl)Cl",
    "[13CH4]",
    "[2H]O[2H]",
    "[CH3]",
    "N[C@@H](C)C(=O)O",
    "C[C@TH2H](F)Cl",
    "F/C=C/F",
    "C/1CCCC\\1",
    "C1.C1",
    "C%12CC%12",
    "C1CC2C1CC2",
    "C12C3C4C1C5C2C3C45",
    "C=1CCCCC=1",
    "C=1CCCCC1",
    "C(C)1CC1",
    "*c1ccccc1",
    "[CH3:7][OH:8]",
    "[Fe+3]",
    "[Fe++]",
]

INVALID = [  # text, position of the fault, a word of the reason
    ("", 0, "empty"),
    ("C C", 1, "unexpected"),
    ("CX", 1, "unexpected"),
    ("cl", 1, "unexpected"),
    ("(C)C", 0, "branch"),
    ("C((C))C", 2, "branch"),
    ("C()C", 2, "branch"),
    ("C(C", 1, "never closed"),
    ("CC)C", 2, "without"),
    ("C(=)C", 3, "branch"),
    ("=C", 0, "bond"),
    ("C==C", 2, "bond"),
    ("C=", 2, "ends"),
    ("C.", 2, "ends"),
    ("C..C", 2, "follow"),
    ("C.=C", 2, "bond"),
    ("1CC1", 0, "ring number"),
    ("C(1CC1)", 2, "ring number"),
    ("C(=1CC1)", 3, "ring number"),
    ("C1CC", 1, "never closed"),
    ("C2C1CC2", 3, "ring 1 is never closed"),
    ("C11", 2, "itself"),
    ("C1C1", 3, "twice"),
    ("C12CCC12", 7, "twice"),
    ("C=1CCCC-1", 8, "opened with"),
    ("C=1CCCC/1", 8, "opened with"),
    ("C%1CC1", 1, "two digits"),
    ("[C", 0, "bracket"),
    ("[]", 0, "bracket"),
    ("[Uue]", 0, "bracket"),
    ("[CH10]", 0, "bracket"),
    ("[C+++]", 0, "bracket"),
    ("[C@TH3]", 0, "bracket"),
    ("C[HH]", 1, "hydrogen"),
    ("C:C", 2, "aromatic bond"),
    ("CC(C)(C)(C)C", 1, "C has 5 bonds"),
    ("CN(C)(C)C", 1, "N has 4 bonds"),
    ("C=N(C)(C)C", 2, "N has 5 bonds"),
    ("C[O+](C)(C)C", 1, "O+1 has 4 bonds"),
    ("CO(C)C", 1, "O has 3 bonds"),
    ("CFC", 1, "F has 2 bonds"),
    ("FCl(F)F", 1, "Cl has 3 bonds"),
    ("[CH5]", 0, "C has 5 bonds"),
    ("[NH4]", 0, "N has 4 bonds"),
    ("S(F)(F)(F)(F)(F)(F)F", 0, "S has 7 bonds"),
    ("[H](C)C", 0, "H has 2 bonds"),
    ("cC", 0, "not in a ring"),
    ("c1ccccc1Cc", 9, "not in a ring"),
    ("c1cccc1", None, "Kekulé"),
    ("c1ccnc1", None, "Kekulé"),
    ("c1ccc2cccc2c1", None, "Kekulé"),
    ("c1cc[cH]c1", None, "Kekulé"),
    ("c1ccccc1=O", None, "Kekulé"),
    ("[nH]1ccccc1", None, "Kekulé"),
    ("c1cCcc1CC1ccc1", None, "Kekulé"),
]


@pytest.mark.parametrize("text", VALID)
def test_valid(text):
    assert check_smiles(text) == (True, None, None)


@pytest.mark.parametrize(("text", "position", "reason"), INVALID)
def test_invalid_with_reason_and_position(text, position, reason):
    check = check_smiles(text)
    assert not check.valid
    assert not is_valid_smiles(text)
    assert reason in check.reason
    assert position is None or check.position == position


def test_agrees_with_rdkit():
    wrong = [row["smiles"] for row in VERDICTS if is_valid_smiles(row["smiles"]) != row["rdkit_valid"]]
    assert len(VERDICTS) == 400
    assert len(wrong) <= 2, wrong  # 99.5 %; what is left are the differences that the module's docstring lists


def test_parse_gives_the_graph():
    molecule = parse_smiles("[13C@@H2+:3]1=CC%10.[O--]%10n1")
    first, _, _, oxygen, nitrogen = molecule.atoms
    assert (first.symbol, first.isotope, first.chirality, first.hydrogens) == ("C", 13, "@@", 2)
    assert (first.charge, first.atom_class, first.bracket, first.position) == (1, 3, True, 0)
    assert (oxygen.charge, oxygen.symbol, nitrogen.symbol, nitrogen.aromatic) == (-2, "O", "N", True)
    bonds = [(bond.first, bond.second, bond.order) for bond in molecule.bonds]
    assert bonds == [(0, 1, 2), (1, 2, 1), (2, 3, 1), (3, 4, 1), (0, 4, 1)]
    benzene = parse_smiles("c1cc/cc-c1C")
    assert [bond.aromatic for bond in benzene.bonds] == [True, True, True, True, False, True, False]


def test_parse_ignores_valence_but_not_grammar():
    assert len(parse_smiles("C(C)(C)(C)(C)C").bonds) == 5
    with pytest.raises(SmilesError, match="at character 1") as caught:
        parse_smiles("C)")
    assert caught.value.position == 1


def test_any_text_gets_a_verdict():
    generator = random.Random(3)
    alphabet = "CNOcno[]()=#$:/\\.%0123456789+-@HSeB l*\u00b2\u0663é\n"
    for _ in range(3000):
        text = "".join(generator.choices(alphabet, k=generator.randint(0, 12)))
        check = check_smiles(text)
        assert check.valid == (check.reason is None) == (check.position is None)
    assert is_valid_smiles("C" * 20000)  # no recursion
    assert is_valid_smiles("C(" * 5000 + "C" + ")" * 5000)


def test_matching_equals_brute_force():
    """Random graphs of up to eight vertices, most of them with odd cycles."""
    generator = random.Random(4)
    perfect = 0
    for _ in range(600):
        count = generator.choice((4, 6, 8))
        edges = [pair for pair in itertools.combinations(range(count), 2) if generator.random() < 0.3]
        neighbours: list[list[int]] = [[] for _ in range(count)]
        for first, second in edges:
            neighbours[first].append(second)
            neighbours[second].append(first)
        expected = any(
            len({vertex for edge in chosen for vertex in edge}) == count
            for chosen in itertools.combinations(edges, count // 2)
        )
        assert (unmatched_vertex(neighbours, range(count)) is None) == expected
        perfect += expected
    assert 100 < perfect < 500


def test_matching_contracts_a_blossom():
    """Two triangles joined by an edge between 2 and 3, and a tail at each: the greedy start has to be undone."""
    edges = [(0, 1), (1, 2), (0, 2), (2, 3), (3, 4), (4, 5), (3, 5), (0, 6), (5, 7)]
    neighbours: list[list[int]] = [[] for _ in range(8)]
    for first, second in edges:
        neighbours[first].append(second)
        neighbours[second].append(first)
    assert unmatched_vertex(neighbours, range(8)) is None
    neighbours[5].remove(7), neighbours[7].remove(5)
    assert unmatched_vertex(neighbours, range(8)) is not None

"""SMILES checker: the OpenSMILES grammar, then valence, then Kekulé structures. No chemistry package is needed.

Grammar: OpenSMILES 1.0 (opensmiles.org, 2016), after Weininger, J. Chem. Inf. Comput. Sci. 28 (1988) 31. An aromatic
system is accepted when the atoms that lack one bond to their valence have a perfect matching along aromatic bonds
(Edmonds, Can. J. Math. 17 (1965) 449), i.e. when it can be written with alternating single and double bonds.

**Valid** means: the text parses; every ring closure is closed once, between two distinct atoms that are not bonded
already, with bond symbols that agree; no main-group atom has more bonds than its highest valence allows (fewer are
filled up with hydrogen in the organic subset and are radicals in brackets); every aromatic atom lies in a ring; the
aromatic bonds have a Kekulé structure. Valences of ions are those of the neutral element with as many electrons
(N+ as C, O- as F). Five-bonded neutral nitrogen is valid only where it stands for a charge-separated form
(`N(=O)=O`, `N=N#N`, aromatic `n=O`), as are halogen oxides (`OCl(=O)(=O)=O`). Metals have no valence limit, and one
single bond to a metal may be a lone pair lent by an atom whose valence is used up. Stereo marks must be well formed;
whether they describe a possible isomer is not checked.

It differs from RDKit's `MolFromSmiles` (parsing and sanitisation) in that it refuses the empty text, surrounding
white space or a molecule name, disagreeing ring-bond symbols (`C=1CCCC-1`), hydrogen on hydrogen (`[HH]`), the
aromatic bond `:` at atoms written in upper case, aromatic atoms that exceed their valence by one (`C[nH]1CCCC1`, a
triple bond in an aromatic ring), RDKit's extensions (`->`, `~`, `[#6]`, `%(100)`, `[D]`). Like RDKit, and unlike the
strict grammar, it allows a ring-closure number behind a branch (`C(C)1CC1`), and an aromatic atom of the organic subset
without any aromatic bond in an aliphatic ring (`C1CcCC1`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lit_interns1.data.perfect_matching import unmatched_vertex

_PERIODIC_TABLE = (
    "H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr "
    "Rb Sr Y Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu "
    "Hf Ta W Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr "
    "Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts Og"
)
ELEMENTS = tuple(_PERIODIC_TABLE.split())
"""Symbols of the elements in the order of their atomic numbers."""
_ATOMIC_NUMBER = {symbol: number for number, symbol in enumerate(ELEMENTS, start=1)}
_AROMATIC_IN_BRACKETS = ("b", "c", "n", "o", "p", "s", "se", "as", "te", "si")

_VALENCES: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("He", "Ne", "Ar", "Kr", "Rn"), (0,)),
    **dict.fromkeys(("H", "F", "Cl", "Br"), (1,)),
    **dict.fromkeys(("O",), (2,)),
    **dict.fromkeys(("B", "N", "Ga", "In"), (3,)),
    **dict.fromkeys(("C", "Si", "Ge"), (4,)),
    **dict.fromkeys(("P", "As", "Sb", "Bi"), (3, 5)),
    **dict.fromkeys(("S", "Se", "Te", "Po"), (2, 4, 6)),
    **dict.fromkeys(("I", "At"), (1, 3, 5)),
    **dict.fromkeys(("Sn", "Pb"), (2, 4)),
    "Be": (2,),
    "Al": (3,),
    "Xe": (0, 2, 4, 6),
}

_BOND_ORDER = {"-": 1, "=": 2, "#": 3, "$": 4, ":": 1, "/": 1, "\\": 1}

_BRACKET_ATOM = re.compile(
    r"\[(?P<isotope>\d{1,3})?"
    rf"(?P<symbol>{'|'.join(sorted((*ELEMENTS, *_AROMATIC_IN_BRACKETS), key=lambda s: (-len(s), s)))}|\*)"
    r"(?P<chirality>@(?:@|TH[12]|AL[12]|SP[1-3]|TB(?:1\d?|20?|[3-9])|OH(?:[12]\d?|30?|[4-9]))?)?"
    r"(?P<hydrogens>H\d?)?"
    r"(?P<charge>\+\+|--|[+-](?:1[0-5]|\d)?)?"
    r"(?::(?P<atom_class>\d+))?\]"
)
_ORGANIC_ATOM = re.compile(r"Cl|Br|[BCNOPSFI*bcnops]")


class SmilesError(ValueError):
    """The text is not a SMILES. `reason` says why, `position` (0-based character) says where."""

    def __init__(self, reason: str, position: int):
        super().__init__(f"{reason} (at character {position})")
        self.reason, self.position = reason, position


class SmilesCheck(NamedTuple):
    """The verdict on one text.

    Attributes:
        valid: Whether the text is a valid SMILES (the module's docstring says what that means).
        reason: Why it is not; None if it is.
        position: The 0-based character where the fault shows; None if it is valid.
    """

    valid: bool
    reason: str | None
    position: int | None


@dataclass(frozen=True, slots=True)
class Atom:
    """One atom as it is written.

    Attributes:
        symbol: Element symbol with a capital letter, or `*`.
        aromatic: Whether it is written in lower case.
        bracket: Whether it stands in brackets; if it does not, missing hydrogens are implied.
        isotope: Mass number, None if not given.
        chirality: `@`, `@@`, `@TH1`, …, None if not given.
        hydrogens: Hydrogens written in the bracket (0 outside brackets).
        charge: Formal charge, in elementary charges.
        atom_class: The number behind `:` in the bracket, None if not given.
        position: Character at which the atom begins.
    """

    symbol: str
    aromatic: bool
    bracket: bool
    isotope: int | None
    chirality: str | None
    hydrogens: int
    charge: int
    atom_class: int | None
    position: int


@dataclass(frozen=True, slots=True)
class Bond:
    """One bond.

    Attributes:
        first: Index of the atom that is written first.
        second: Index of the other atom.
        order: 1 to 4; 1 for an aromatic bond (its second electron pair is placed by the Kekulé structure).
        aromatic: Whether it may take part in a Kekulé structure: `:`, `/`, `\\` or no symbol between two
            aromatic atoms.
        symbol: `-`, `=`, `#`, `$`, `:`, `/`, `\\`, or empty.
        position: Character at which the bond (or the second atom, or the closing ring number) stands.
    """

    first: int
    second: int
    order: int
    aromatic: bool
    symbol: str
    position: int


@dataclass(frozen=True, slots=True)
class Molecule:
    """The graph that a SMILES describes: what is written, before any valence is looked at.

    Attributes:
        atoms: In the order of the text.
        bonds: In the order in which they are completed.
    """

    atoms: tuple[Atom, ...]
    bonds: tuple[Bond, ...]


def is_valid_smiles(text: str) -> bool:
    """Whether `text` is a valid SMILES; `check_smiles` gives the reason too."""
    return check_smiles(text).valid


def check_smiles(text: str) -> SmilesCheck:
    """Parses `text` and checks valences and aromaticity.

    Returns:
        The verdict, with reason and position of the first fault. Never raises for any string.
    """
    try:
        molecule = parse_smiles(text)
        _check_chemistry(molecule)
    except SmilesError as error:
        return SmilesCheck(False, error.reason, error.position)
    return SmilesCheck(True, None, None)


def parse_smiles(text: str) -> Molecule:
    """Reads the grammar only: `C(C)(C)(C)(C)C` parses, although `check_smiles` refuses its valence.

    Raises:
        SmilesError: At the first character that the grammar does not allow, with the reason.
    """
    if not text:
        raise SmilesError("the text is empty", 0)
    return _Parser(text).parse()


class _Parser:
    """One pass over the text: `previous` is the atom the next bond starts from, `branches` the atoms to return to."""

    def __init__(self, text: str):
        self.text = text
        self.atoms: list[Atom] = []
        self.bonds: list[Bond] = []
        self.bonded: set[tuple[int, int]] = set()
        self.branches: list[tuple[int, int]] = []  # (atom, position of the parenthesis)
        self.open_rings: dict[int, tuple[int, str, int]] = {}  # number -> (atom, bond symbol, position)
        self.previous: int | None = None
        self.bond_symbol = ""
        self.last = "start"  # start | atom (also a ring number) | branch end | open | bond | open bond | dot

    def parse(self) -> Molecule:
        text, position = self.text, 0
        while position < len(text):
            character = text[position]
            if character == "[":
                position = self._bracket_atom(position)
            elif match := _ORGANIC_ATOM.match(text, position):
                written = match.group()
                symbol = written.capitalize()
                self._add_atom(Atom(symbol, written.islower(), False, None, None, 0, 0, None, position))
                position = match.end()
            elif character in _BOND_ORDER:
                if self.last not in ("atom", "branch end", "open"):
                    raise SmilesError(f"the bond {character!r} does not follow an atom", position)
                self.bond_symbol, self.last = character, "open bond" if self.last == "open" else "bond"
                position += 1
            elif character in "0123456789%":
                position = self._ring_number(position)
            elif character == "(":
                if self.last not in ("atom", "branch end") or self.previous is None:
                    raise SmilesError("a branch does not follow an atom", position)
                self.branches.append((self.previous, position))
                self.last = "open"
                position += 1
            elif character == ")":
                if not self.branches:
                    raise SmilesError("')' without '('", position)
                if self.last not in ("atom", "branch end"):
                    raise SmilesError("a branch ends without an atom", position)
                self.previous = self.branches.pop()[0]
                self.last = "branch end"
                position += 1
            elif character == ".":
                if self.last not in ("atom", "branch end"):
                    raise SmilesError("'.' does not follow an atom", position)
                self.previous, self.last = None, "dot"
                position += 1
            else:
                raise SmilesError(f"unexpected character {character!r}", position)
        if self.branches:
            raise SmilesError("'(' is never closed", self.branches[-1][1])
        if self.last not in ("atom", "branch end"):
            raise SmilesError("the text ends where an atom is expected", len(text))
        if self.open_rings:
            number, (_, _, opened) = min(self.open_rings.items(), key=lambda item: item[1][2])
            raise SmilesError(f"ring {number} is never closed", opened)
        return Molecule(tuple(self.atoms), tuple(self.bonds))

    def _bracket_atom(self, position: int) -> int:
        match = _BRACKET_ATOM.match(self.text, position)
        if match is None:
            raise SmilesError("malformed bracket atom", position)
        isotope, written, chirality, hydrogens, charge, atom_class = match.groups()
        if written == "H" and hydrogens:
            raise SmilesError("a hydrogen atom cannot carry hydrogens", position)
        self._add_atom(
            Atom(
                symbol=written.capitalize(),
                aromatic=written.islower(),
                bracket=True,
                isotope=int(isotope) if isotope else None,
                chirality=chirality,
                hydrogens=int(hydrogens[1:] or 1) if hydrogens else 0,
                charge=_charge(charge),
                atom_class=int(atom_class) if atom_class else None,
                position=position,
            )
        )
        return match.end()

    def _add_atom(self, atom: Atom) -> None:
        index = len(self.atoms)
        self.atoms.append(atom)
        if self.previous is not None:
            self._add_bond(self.previous, index, self.bond_symbol, atom.position)
        self.previous, self.bond_symbol, self.last = index, "", "atom"

    def _ring_number(self, position: int) -> int:
        end = position + (3 if self.text[position] == "%" else 1)
        digits = self.text[position + 1 : end] if self.text[position] == "%" else self.text[position]
        if len(digits) != max(1, end - position - 1) or not (digits.isascii() and digits.isdigit()):
            raise SmilesError("'%' needs two digits", position)
        if self.last not in ("atom", "branch end", "bond") or self.previous is None:
            raise SmilesError("a ring number does not follow an atom", position)
        number, atom, symbol = int(digits), self.previous, self.bond_symbol
        if number not in self.open_rings:
            self.open_rings[number] = (atom, symbol, position)
        else:
            other, other_symbol, _ = self.open_rings.pop(number)
            if other == atom:
                raise SmilesError(f"ring {number} bonds an atom to itself", position)
            if symbol and other_symbol and _ring_symbol(symbol) != _ring_symbol(other_symbol):
                raise SmilesError(f"ring {number} is opened with {other_symbol!r} and closed with {symbol!r}", position)
            self._add_bond(other, atom, symbol or other_symbol, position)
        self.bond_symbol, self.last = "", "atom"
        return end

    def _add_bond(self, first: int, second: int, symbol: str, position: int) -> None:
        pair = (first, second) if first < second else (second, first)
        if pair in self.bonded:
            raise SmilesError("two atoms are bonded twice", position)
        both_aromatic = self.atoms[first].aromatic and self.atoms[second].aromatic
        if symbol == ":" and not both_aromatic:
            raise SmilesError("an aromatic bond needs two aromatic atoms", position)
        self.bonded.add(pair)
        aromatic = both_aromatic and symbol not in ("-", "=", "#", "$")  # a direction mark leaves the order open
        self.bonds.append(Bond(first, second, _BOND_ORDER.get(symbol, 1), aromatic, symbol, position))


def _charge(written: str | None) -> int:
    if not written:
        return 0
    magnitude = len(written) if written[1:] in ("", "+", "-") else int(written[1:])
    return magnitude if written[0] == "+" else -magnitude


def _ring_symbol(symbol: str) -> str:
    """Directions say nothing about the order: `/`, `\\` and `-` agree."""
    return "-" if symbol in "/\\" else symbol


# --- chemistry ---------------------------------------------------------------------------------------------------


def _check_chemistry(molecule: Molecule) -> None:
    """Valence of every atom, then the Kekulé structure of the aromatic bonds. Raises SmilesError."""
    atoms = molecule.atoms
    ring_bond = _ring_bonds(len(atoms), molecule.bonds)
    bonds_of: list[list[tuple[int, Bond, bool]]] = [[] for _ in atoms]  # (neighbour, bond, in a ring)
    for bond, in_ring in zip(molecule.bonds, ring_bond):
        bonds_of[bond.first].append((bond.second, bond, in_ring))
        bonds_of[bond.second].append((bond.first, bond, in_ring))

    needs_double = [False] * len(atoms)
    for index, atom in enumerate(atoms):
        if atom.aromatic and not any(in_ring for _, _, in_ring in bonds_of[index]):
            raise SmilesError(f"aromatic atom {atom.symbol.lower()!r} is not in a ring", atom.position)
        needs_double[index] = _check_valence(atom, [(atoms[other], bond) for other, bond, _ in bonds_of[index]])

    neighbours: list[list[int]] = [[] for _ in atoms]
    for bond, in_ring in zip(molecule.bonds, ring_bond):
        if bond.aromatic and in_ring and needs_double[bond.first] and needs_double[bond.second]:
            neighbours[bond.first].append(bond.second)
            neighbours[bond.second].append(bond.first)
    unmatched = unmatched_vertex(neighbours, [index for index, needed in enumerate(needs_double) if needed])
    if unmatched is not None:
        raise SmilesError("the aromatic system has no Kekulé structure", atoms[unmatched].position)


def _check_valence(atom: Atom, bonds: Sequence[tuple[Atom, Bond]]) -> bool:
    """Whether the atom needs a double bond along its aromatic bonds. Raises SmilesError if it has too many bonds."""
    if atom.symbol == "*":
        return False
    charge, total = atom.charge, atom.hydrogens + sum(bond.order for _, bond in bonds)
    if charge == 0:
        separated = _separated_charges(atom, total, bonds)
        charge, total = separated, total - separated
    allowed = _allowed_valences(atom.symbol, charge)
    if allowed is None:
        return False
    if total > allowed[-1]:
        # Beyond its valence an atom can still lend an electron pair to a metal; such a bond takes no place.
        total = max(allowed[-1], total - sum(bond.order == 1 and _is_metal(other.symbol) for other, bond in bonds))
    if total > allowed[-1]:
        sign = f"{atom.charge:+d}" if atom.charge else ""
        raise SmilesError(f"{atom.symbol}{sign} has {total} bonds, at most {allowed[-1]} are possible", atom.position)
    aromatic_bonds = sum(bond.aromatic for _, bond in bonds)
    if aromatic_bonds > 3:
        raise SmilesError(f"aromatic {atom.symbol} has {aromatic_bonds} aromatic bonds, 3 are possible", atom.position)
    if not atom.aromatic or not (aromatic_bonds or atom.bracket):
        return False
    # Outside brackets, carbon's implied hydrogens leave exactly one place open; other elements have none implied.
    return total < 4 if atom.symbol == "C" and not atom.bracket else total not in allowed


def _separated_charges(atom: Atom, total: int, bonds: Sequence[tuple[Atom, Bond]]) -> int:
    """How many multiple bonds of a neutral atom stand for a charge pair, as N(=O)=O for [N+](=O)[O-]."""
    if atom.symbol == "N" and total + atom.aromatic == 5:
        for other, bond in bonds:
            if other.charge == 0 and (other.symbol, bond.order) in (("O", 2), ("N", 3)):
                return 1
    if atom.symbol in ("Cl", "Br", "I") and all(other.symbol == "O" for other, _ in bonds):
        return sum(bond.order == 2 and other.charge == 0 for other, bond in bonds) if total in (3, 5, 7) else 0
    return 0


def _is_metal(symbol: str) -> bool:
    return symbol not in _VALENCES and symbol != "*"


def _allowed_valences(symbol: str, charge: int) -> tuple[int, ...] | None:
    """Valences in ascending order, None = no limit: those of the neutral element with as many electrons."""
    if _is_metal(symbol):
        return None
    number = _ATOMIC_NUMBER[symbol] - charge
    if (symbol in ("P", "S") and number > 16) or (symbol in ("As", "Se") and number > 34):
        # [PF6]2-, [SF5]-: the shell that can expand stays what it was, an added electron takes one place.
        return tuple(valence + charge for valence in _VALENCES[symbol] if valence + charge >= 0)
    if number < 1:
        return (0,)
    if number > len(ELEMENTS):
        return None
    return _VALENCES.get(ELEMENTS[number - 1], (0,))


def _ring_bonds(count: int, bonds: Sequence[Bond]) -> list[bool]:
    """Which bonds lie in a ring, i.e. are not bridges (Tarjan's low links, without recursion)."""
    incident: list[list[int]] = [[] for _ in range(count)]
    for number, bond in enumerate(bonds):
        incident[bond.first].append(number)
        incident[bond.second].append(number)
    in_ring = [True] * len(bonds)
    discovered, low, clock = [-1] * count, [0] * count, 0
    for root in range(count):
        if discovered[root] >= 0:
            continue
        discovered[root] = low[root] = clock
        clock += 1
        stack = [(root, -1, iter(incident[root]))]
        while stack:
            atom, entered_by, remaining = stack[-1]
            for number in remaining:
                if number == entered_by:
                    continue
                bond = bonds[number]
                other = bond.second if bond.first == atom else bond.first
                if discovered[other] >= 0:
                    low[atom] = min(low[atom], discovered[other])
                    continue
                discovered[other] = low[other] = clock
                clock += 1
                stack.append((other, number, iter(incident[other])))
                break
            else:
                stack.pop()
                if stack:
                    parent = stack[-1][0]
                    low[parent] = min(low[parent], low[atom])
                    in_ring[entered_by] = low[atom] <= discovered[parent]
    return in_ring

"""Arithmetic problems that are made, not stored, and are the same everywhere.

    chain_sum    12 + 5 - 30 =    -13
    product      12 * 5 =          60

Problem i is the first of the draws h(seed, i, 0), h(seed, i, 1), … that belongs to the split. One problem in ten is
for testing, chosen by a hash of its signed terms in sorted order and of nothing else. So no problem is in both splits,
under whatever seeds, sizes and ranges, nor with its terms in another order.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from lit_interns1.data.order import IntArray, mix

ArithmeticKind = Literal["chain_sum", "product"]
Split = Literal["train", "test"]
TEST_SHARE = 10
"""One problem in so many is for testing."""
_MAX_DRAWS = 1_000


class Problem(NamedTuple):
    """A question with its answer."""

    question: str
    answer: str


class ArithmeticProblems:
    """Problems by number.

    Args:
        kind: "chain_sum": terms joined by the signs of `operators`; "product": factors.
        min_digits: Fewest decimal digits of a term, at least 1; numbers of one digit include 0.
        max_digits: Most digits of a term, at most 9; each number of digits is as probable as any other.
        min_terms: Fewest terms, at least 2.
        max_terms: Most terms.
        operators: Signs of a chain sum: "+", "-" or "+-".
        size: How many problems. They are drawn with replacement: a small range repeats.
        seed: Another seed gives other draws.
        split: Which nine tenths or tenth of all problems they are from.

    Raises:
        ValueError: If an option is out of range, or the split has no problem of this kind and range.
    """

    def __init__(
        self,
        kind: ArithmeticKind = "chain_sum",
        min_digits: int = 1,
        max_digits: int = 2,
        min_terms: int = 2,
        max_terms: int = 2,
        operators: str = "+-",
        size: int = 10_000,
        seed: int = 0,
        split: Split = "train",
    ) -> None:
        if kind not in get_args(ArithmeticKind):
            raise ValueError(f"kind = {kind!r} is unknown: choose one of {', '.join(get_args(ArithmeticKind))}")
        if split not in get_args(Split):
            raise ValueError(f"split = {split!r} must be train or test")
        if not 1 <= min_digits <= max_digits <= 9:
            raise ValueError(f"digits: 1 ≤ min_digits = {min_digits} ≤ max_digits = {max_digits} ≤ 9 is wanted")
        if not 2 <= min_terms <= max_terms:
            raise ValueError(f"terms: 2 ≤ min_terms = {min_terms} ≤ max_terms = {max_terms} is wanted")
        if operators not in ("+", "-", "+-"):
            raise ValueError(f"operators = {operators!r} must be '+', '-' or '+-'")
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        self.kind, self.split, self.seed, self.operators = kind, split, seed, operators
        self._digits, self._terms = (min_digits, max_digits), (min_terms, max_terms)
        self._signs = (1,) if kind == "product" else tuple(1 if sign == "+" else -1 for sign in operators)
        self._term_NT, self._count_N = self._draw_all(size)

    def _draw_all(self, size: int) -> tuple[IntArray, IntArray]:
        """(N, T) signed terms and (N,) how many of them there are."""
        term_NT = np.zeros((size, self._terms[1]), dtype=np.int64)
        count_N = np.zeros(size, dtype=np.int64)
        missing = np.arange(size)
        for attempt in range(_MAX_DRAWS):
            drawn_MT, drawn_M = self._draw(missing, attempt)
            wanted_M = _is_test(drawn_MT, drawn_M) == (self.split == "test")
            place = missing[wanted_M]
            term_NT[place], count_N[place] = drawn_MT[wanted_M], drawn_M[wanted_M]
            missing = missing[~wanted_M]
            if not len(missing):
                return term_NT, count_N
        raise ValueError(
            f"the {self.split} split has no problem of kind = {self.kind!r} with {self._digits[0]} to "
            f"{self._digits[1]} digits and {self._terms[0]} to {self._terms[1]} terms; take a wider range"
        )

    def _draw(self, index: IntArray, attempt: int) -> tuple[IntArray, IntArray]:
        def below(limit_M: int | IntArray, *key: int) -> IntArray:
            """Uniform in 0 … limit − 1."""
            mixed = mix(index.astype(np.uint64), self.seed, attempt, *key)
            return (mixed % np.asarray(limit_M, dtype=np.uint64)).astype(np.int64)

        count_M = self._terms[0] + below(self._terms[1] - self._terms[0] + 1, 0)
        term_MT = np.zeros((len(index), self._terms[1]), dtype=np.int64)
        for place in range(self._terms[1]):
            digits_M = self._digits[0] + below(self._digits[1] - self._digits[0] + 1, 1, place)
            low_M = np.where(digits_M == 1, 0, 10 ** (digits_M - 1))
            value_M = low_M + below(10**digits_M - low_M, 2, place)
            sign_M = np.array(self._signs if place else (1,))[below(len(self._signs) if place else 1, 3, place)]
            term_MT[:, place] = np.where(place < count_M, sign_M * value_M, 0)
        return term_MT, count_M

    def __len__(self) -> int:
        """How many there are."""
        return len(self._count_N)

    def __getitem__(self, index: int) -> Problem:
        """One of them."""
        terms = [int(term) for term in self._term_NT[index, : self._count_N[index]]]
        if self.kind == "product":
            result = 1
            for term in terms:
                result *= term
            return Problem(" * ".join(map(str, terms)) + " =", str(result))
        signs = {True: "-", False: self.operators[0]}  # 0 has no sign of its own
        rest = "".join(f" {signs[term < 0] if term <= 0 else '+'} {abs(term)}" for term in terms[1:])
        return Problem(f"{terms[0]}{rest} =", str(sum(terms)))


def _is_test(term_NT: IntArray, count_N: IntArray) -> NDArray[np.bool_]:
    """(N,) whether problems of these signed terms are for testing."""
    absent_NT = np.arange(term_NT.shape[1]) >= count_N[:, None]
    sorted_NT = np.sort(np.where(absent_NT, np.iinfo(np.int64).max, term_NT), axis=1)
    mixed_N = mix(count_N.astype(np.uint64), 0)
    for place in range(sorted_NT.shape[1]):
        further_N = mix(mixed_N ^ sorted_NT[:, place].astype(np.uint64), 1)
        mixed_N = np.where(place < count_N, further_N, mixed_N)
    return mixed_N % np.uint64(TEST_SHARE) == 0

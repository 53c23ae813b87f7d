"""Two handwritten digits on a black ground, and what can be said about them: 800 different captions.

    "a large seven left of a small two"       10 × 2 digits and sizes, twice; left of, or above

Pair i of a set depends on the set and i alone, so that nothing but the digits need be stored. The digits of the
test set are in no image of the training set; its captions, each used once, may be.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIZES = (("large", 24), ("small", 16))
RELATIONS = ("left of", "above")
NUM_CAPTIONS = (len(NAMES) * len(SIZES)) ** 2 * len(RELATIONS)
CANVAS = 48
_MARGIN = 4
"""Empty pixels around the digits in their files."""
_DRIFT = 6
"""Most pixels by which two digits miss a common line."""


class Scene(NamedTuple):
    """What a caption says.

    Attributes:
        digits: First and second digit.
        sizes: Their indices in `SIZES`.
        relation: Index in `RELATIONS`.
    """

    digits: tuple[int, int]
    sizes: tuple[int, int]
    relation: int

    @property
    def caption(self) -> str:
        """The scene in words."""
        first, second = (
            f"a {SIZES[size][0]} {NAMES[digit]}" for digit, size in zip(self.digits, self.sizes, strict=True)
        )
        return f"{first} {RELATIONS[self.relation]} {second}"


def scene(number: int) -> Scene:
    """One of the `NUM_CAPTIONS` scenes."""
    choices = (len(NAMES), len(SIZES), len(NAMES), len(SIZES), len(RELATIONS))
    digit1, size1, digit2, size2, relation = (int(i) for i in np.unravel_index(number, choices))
    return Scene((digit1, digit2), (size1, size2), relation)


def draw(what: Scene, images: list[np.ndarray], labels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """(48, 48) uint8: the scene with digits chosen, and places found, at random.

    Args:
        what: The scene.
        images: (28, 28) digits to choose from.
        labels: What they are.
        random: Source of chance.
    """
    sides = [SIZES[size][1] for size in what.sizes]
    first_along = int(random.integers(0, CANVAS - sum(sides) + 1))
    second_along = int(random.integers(first_along + sides[0], CANVAS - sides[1] + 1))
    first_across = int(random.integers(0, CANVAS - sides[0] + 1))
    middle = first_across + (sides[0] - sides[1]) // 2 + int(random.integers(-_DRIFT, _DRIFT + 1))
    second_across = int(np.clip(middle, 0, CANVAS - sides[1]))
    canvas = np.zeros((CANVAS, CANVAS), dtype=np.uint8)
    for digit, side, along, across in zip(
        what.digits, sides, (first_along, second_along), (first_across, second_across), strict=True
    ):
        chosen = images[int(random.choice(np.flatnonzero(labels == digit)))]
        inner = np.ascontiguousarray(chosen[_MARGIN:-_MARGIN, _MARGIN:-_MARGIN])
        resized = np.asarray(Image.fromarray(inner).resize((side, side), Image.Resampling.BILINEAR))
        row, column = (across, along) if what.relation == 0 else (along, across)
        canvas[row : row + side, column : column + side] = resized
    return canvas


@cache
def _scene_order(training: bool, turn: int) -> np.ndarray:
    return np.random.default_rng([48, int(training), turn]).permutation(NUM_CAPTIONS)


def digit_pair(index: int, training: bool, images: list[np.ndarray], labels: np.ndarray) -> tuple[np.ndarray, str]:
    """Image and caption number `index` of a set; captions come in a random order, each once before any comes again."""
    turn, place = divmod(index, NUM_CAPTIONS)
    what = scene(int(_scene_order(training, turn)[place]))
    return draw(what, images, labels, np.random.default_rng([49, int(training), index])), what.caption

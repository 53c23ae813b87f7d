"""Means and standard deviations that do not depend on the order of adding: sums of integers.

    unit = 2^(⌈log₂ largest⌉ + ⌈log₂ n⌉ − 61);   Σ x ≈ unit · Σ round(x / unit)        exact in 64 bits, and so is Σ x²

So windows of any size, read by any number of processes, give the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_interns1.checkpoints.agreement import gather
from lit_interns1.checkpoints.huggingface.errors import WeightsError
from lit_interns1.checkpoints.huggingface.sources import WeightSource

_ROWS = 4096  # in memory at once


def column_moments(source: WeightSource, name: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every column, over the rows of all processes; (D,) float64 each."""
    rows, width = source.tensors[name].shape
    blocks = [
        (slice(first, min(first + _ROWS, part.stop)), columns)
        for part, columns in source.windows(name)
        for first in range(part.start, part.stop, _ROWS)
    ]
    largest_D = torch.zeros(width, dtype=torch.float64)
    for block in blocks:
        largest_D[block[1]] = largest_D[block[1]].maximum(source.read(name, block).double().abs().amax(0))
    largest_D = torch.stack(gather(largest_D)).amax(0)
    if not largest_D.isfinite().all():
        raise WeightsError(f"{name} has numbers that are not finite: there is no mean for new rows")
    sums_2D = torch.zeros(2, width, dtype=torch.int64)
    for block in blocks:
        sums_2D[:, block[1]] += exact_sums(source.read(name, block), 0, largest_D[block[1]], rows)
    return moments(torch.stack(gather(sums_2D)).sum(0), largest_D, rows)


def exact_sums(values: Tensor, dim: int, largest: Tensor, count: int) -> Tensor:
    """Sums of values and of squares as integers, in units that `moments` knows: their order does not matter.

    Args:
        values: Any tensor.
        dim: What is summed over.
        largest: Of each sum, the largest magnitude that is ever added.
        count: How many numbers are ever added.

    Returns:
        (2, ...) int64.
    """
    wide = values.double()
    sums = [
        (power * _power_of_two(-unit).unsqueeze(dim)).round().long().sum(dim)
        for power, unit in zip((wide, wide.square()), _units(largest, count), strict=True)
    ]
    return torch.stack(sums)


def moments(sums: Tensor, largest: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of `count` numbers with these `exact_sums`, float64."""
    units = [_power_of_two(unit) for unit in _units(largest, count)]
    mean, square = (total.double() * unit / count for total, unit in zip(sums, units, strict=True))
    return mean, (square - mean.square()).clamp(min=0).sqrt()


def _units(largest: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Binary exponents of units in which `count` numbers, and their squares, stay below 2^62."""
    exponent = torch.frexp(largest.clamp(min=2.0**-200)).exponent.long()
    room = count.bit_length() - 61
    return exponent + room, 2 * exponent + room


def _power_of_two(exponent: Tensor) -> Tensor:
    """Exactly, from the bits of a float64."""
    return ((exponent + 1023) << 52).view(torch.float64)

"""Mean and standard deviation of numbers that come in parts (Chan, Golub and LeVeque 1979).

n = n_a + n_b        δ = mean_b − mean_a        mean = mean_a + δ n_b/n        M = M_a + M_b + δ² n_a n_b/n
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass
from typing import Any


@dataclass(frozen=True)
class RunningMoments:
    """What is known of the numbers so far.

    Attributes:
        count: n.
        mean: Of them.
        squares: M, the sum of squared deviations from the mean.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, values: Iterable[float]) -> RunningMoments:
        """Of all values at once; M is exactly 0 if they are equal."""
        numbers = list(values)
        if not numbers or min(numbers) == max(numbers):
            return cls(len(numbers), numbers[0] if numbers else 0.0)
        mean = sum(numbers) / len(numbers)
        return cls(len(numbers), mean, sum((value - mean) ** 2 for value in numbers))

    @property
    def std(self) -> float:
        """√(M / (n − 1)), as in GRPO; 0 if there are fewer than two."""
        return (self.squares / (self.count - 1)) ** 0.5 if self.count > 1 else 0.0

    def merged(self, other: RunningMoments) -> RunningMoments:
        """Of both together."""
        count = self.count + other.count
        if count == 0:
            return self
        shift = other.mean - self.mean
        return RunningMoments(
            count,
            self.mean + shift * other.count / count,
            self.squares + other.squares + shift * shift * self.count * other.count / count,
        )

    def numbers(self) -> tuple[Any, ...]:
        """The fields, for a checkpoint."""
        return astuple(self)

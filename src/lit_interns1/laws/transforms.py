"""Parameters with constraints as functions of free ones, so that a fit needs no constraint at all.

    any        θ = u                      positive     θ = exp(u)
    bounded    θ = low + (high − low) / (1 + exp(−u))
    increasing θ_1 = exp(u_1),  θ_i = θ_{i−1} + exp(u_i):  0 < θ_1 < θ_2 < …

Shapes: R problems solved at once, P parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def sigmoid(x: Floats) -> Floats:
    """1 / (1 + exp(−x)), without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * x))


def logit(p: Floats) -> Floats:
    """ln p − ln(1 − p), the inverse of `sigmoid`."""
    return np.log(p) - np.log1p(-p)


class Transform(ABC):
    """Maps free numbers u to parameters θ that keep their constraints.

    Attributes:
        names: Names of the P parameters, in order.
    """

    def __init__(self, *names: str) -> None:
        self.names = names

    @abstractmethod
    def constrained(self, u_RP: Floats) -> Floats:
        """θ of u, (R, P)."""

    @abstractmethod
    def free(self, theta_RP: Floats) -> Floats:
        """u of θ, (R, P); not finite where θ breaks a constraint."""


class Unbounded(Transform):
    """Parameters that may have any value."""

    def constrained(self, u_RP: Floats) -> Floats:
        """θ = u."""
        return u_RP

    def free(self, theta_RP: Floats) -> Floats:
        """u = θ."""
        return theta_RP


class Positive(Transform):
    """Parameters above zero."""

    def constrained(self, u_RP: Floats) -> Floats:
        """θ = exp(u)."""
        return np.exp(u_RP)

    def free(self, theta_RP: Floats) -> Floats:
        """u = ln θ."""
        return np.log(theta_RP)


class Bounded(Transform):
    """Parameters strictly between two numbers.

    Args:
        names: Names of the parameters.
        low: Lower end.
        high: Upper end.
    """

    def __init__(self, *names: str, low: float, high: float) -> None:
        super().__init__(*names)
        if not low < high:
            raise ValueError(f"{', '.join(names)}: low={low} must be below high={high}")
        self.low, self.high = low, high

    def constrained(self, u_RP: Floats) -> Floats:
        """θ = low + (high − low) sigmoid(u)."""
        return self.low + (self.high - self.low) * sigmoid(u_RP)

    def free(self, theta_RP: Floats) -> Floats:
        """The inverse of `constrained`."""
        return logit((theta_RP - self.low) / (self.high - self.low))


class Increasing(Transform):
    """Parameters 0 < θ_1 < θ_2 < …"""

    def constrained(self, u_RP: Floats) -> Floats:
        """θ_i = exp(u_1) + … + exp(u_i)."""
        return np.cumsum(np.exp(u_RP), axis=-1)

    def free(self, theta_RP: Floats) -> Floats:
        """Logarithms of the differences."""
        return np.log(np.diff(theta_RP, axis=-1, prepend=0.0))


class Joint(Transform):
    """Several transforms side by side."""

    def __init__(self, *parts: Transform) -> None:
        super().__init__(*(name for part in parts for name in part.names))
        self.parts = parts
        self._cuts = np.cumsum([len(part.names) for part in parts])[:-1]

    def constrained(self, u_RP: Floats) -> Floats:
        """Each part's `constrained` on its own columns."""
        pieces = np.split(u_RP, self._cuts, axis=-1)
        return np.concatenate([part.constrained(u) for part, u in zip(self.parts, pieces)], axis=-1)

    def free(self, theta_RP: Floats) -> Floats:
        """Each part's `free` on its own columns."""
        pieces = np.split(theta_RP, self._cuts, axis=-1)
        return np.concatenate([part.free(theta) for part, theta in zip(self.parts, pieces)], axis=-1)

"""Learning-rate schedules as pure functions of consumed tokens.

Warmup-Stable-Decay (arXiv 2404.06395; Intern-S1: arXiv 2508.15763 §4.2) with warm-up W, total S, decay of length C,
p = (s − (S − C)) / C, floor r:

    s < W      w₀ + (1 − w₀)·s/W
    stable     1
    decay      r + (1 − r)·f(p)        after the end: r

f: linear 1−p · cosine ½(1+cos πp) · one_minus_sqrt 1−√p (arXiv 2405.18392) · square 1−p² · exponential ½^((s−T)/h)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

DecayShape = Literal["linear", "cosine", "one_minus_sqrt", "square", "exponential"]


class TokenSchedule(ABC):
    """A factor on the peak learning rate as a function of consumed tokens. Derive from it to add a schedule."""

    @abstractmethod
    def __call__(self, tokens: float) -> float:
        """The factor after `tokens` tokens."""


@dataclass(frozen=True)
class WarmupStableDecay(TokenSchedule):
    """Warm-up, constant phase, decay.

    Attributes:
        total_tokens: S, tokens of the whole run.
        warmup_tokens: W; below 1 it is a share of the total.
        decay_tokens: C; at most 1 it is a share of the total. C = S − W leaves no constant phase.
        shape: f, the form of the decay.
        final_factor: r, the floor.
        warmup_start_factor: w₀; transformers' `get_wsd_schedule` corresponds to w₀ = r.
        half_life_tokens: h of the exponential shape; default: a fifth of the decay.
    """

    total_tokens: float
    warmup_tokens: float = 0.01
    decay_tokens: float = 0.2
    shape: DecayShape = "one_minus_sqrt"
    final_factor: float = 0.1
    warmup_start_factor: float = 0.0
    half_life_tokens: float | None = None

    def __post_init__(self) -> None:
        if self.total_tokens <= 0:
            raise ValueError(f"schedule.total_tokens must be positive, got {self.total_tokens}")
        for name in ("warmup_tokens", "decay_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"schedule.{name} must not be negative, got {getattr(self, name)}")
        if self.shape not in ("linear", "cosine", "one_minus_sqrt", "square", "exponential"):
            raise ValueError(
                f"schedule.shape {self.shape!r} is unknown: "
                "choose linear, cosine, one_minus_sqrt, square or exponential"
            )
        for name in ("final_factor", "warmup_start_factor"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"schedule.{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.warmup + self.decay > self.total_tokens * (1 + 1e-9):
            raise ValueError(
                f"schedule.warmup_tokens ({self.warmup:.4g}) and decay_tokens ({self.decay:.4g}) together exceed "
                f"total_tokens ({self.total_tokens:.4g})"
            )

    @property
    def warmup(self) -> float:
        """W in tokens."""
        return self.warmup_tokens * self.total_tokens if self.warmup_tokens < 1 else self.warmup_tokens

    @property
    def decay(self) -> float:
        """C in tokens."""
        return self.decay_tokens * self.total_tokens if self.decay_tokens <= 1 else self.decay_tokens

    @property
    def decay_start(self) -> float:
        """T = S − C, where the decay begins; other schedules freeze from there on."""
        return self.total_tokens - self.decay

    def phase(self, tokens: float) -> Literal["warmup", "stable", "decay"]:
        """Which part of the schedule holds after `tokens` tokens."""
        if tokens < self.warmup:
            return "warmup"
        return "stable" if tokens < self.decay_start else "decay"

    def __call__(self, tokens: float) -> float:
        """The factor on the peak learning rate after `tokens` tokens."""
        phase = self.phase(tokens)
        if phase == "warmup":
            return self.warmup_start_factor + (1 - self.warmup_start_factor) * tokens / self.warmup
        if phase == "stable":
            return 1.0
        if tokens >= self.total_tokens:
            return self.final_factor
        progress = (tokens - self.decay_start) / self.decay
        return self.final_factor + (1 - self.final_factor) * self._shape(progress)

    def _shape(self, progress: float) -> float:
        if self.shape == "linear":
            return 1 - progress
        if self.shape == "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        if self.shape == "one_minus_sqrt":
            return 1 - math.sqrt(progress)
        if self.shape == "square":
            return 1 - progress**2
        return 0.5 ** (progress * self.decay / (self.half_life_tokens or self.decay / 5))

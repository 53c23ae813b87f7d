"""How a signal is cut into patches, by its sampling rate (arXiv 2603.25040 §2.5; sizes as in the released code).

    stride s = ⌊160 / (1 + e^(−rate/100))⁶⌋,  patch p = 2s,  L₁ = ⌈(T − p)/s⌉ + 1 patches of T points,
    tokens = ⌊(⌊L₁/2⌋ + 1)/2⌋

A signal of at most p points has no token in the released code; here zeros extend it to p + s, two patches, one token.
"""

from __future__ import annotations

import math

MAX_POINTS = 240_000
"""Longest signal, in points; the rest is cut off."""


def patch_stride(sampling_rate: float) -> int:
    """s, points between the beginnings of two patches, for a sampling rate in Hz.

    Raises:
        ValueError: If the rate is not positive and finite.
    """
    if not (sampling_rate > 0 and math.isfinite(sampling_rate)):
        raise ValueError(f"sampling_rate = {sampling_rate} must be positive, in Hz")
    return int(160 / (1 + math.exp(-sampling_rate / 100)) ** 6)


def patch_count(points: int, stride: int) -> int:
    """L₁ of a signal, extended to two patches if it is shorter."""
    return max(2, math.ceil((points - 2 * stride) / stride) + 1)


def token_count(points: int, sampling_rate: float) -> int:
    """Tokens that a signal becomes in the language model."""
    return (patch_count(points, patch_stride(sampling_rate)) // 2 + 1) // 2

"""The experts' shares over a run, in bounded memory, and their file.

At most N points are kept: when there would be more, neighbours are averaged and a point stands for twice as many
windows from then on.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


class LoadHistory:
    """Points of (tokens, shares of the routed slots per layer and expert).

    The file holds `tokens` (N,), `load` (N, layers, experts), whose rows sum to 1, and `windows_per_point`.

    Args:
        max_points: N, even.

    Raises:
        ValueError: If it is odd or below 2.
    """

    def __init__(self, max_points: int = 256) -> None:
        if max_points < 2 or max_points % 2:
            raise ValueError(f"max_points must be even and at least 2, got {max_points}")
        self.max_points, self.windows_per_point = max_points, 1
        self.tokens: list[int] = []
        self.loads: list[NDArray[np.float32]] = []
        self._pending: list[NDArray[np.float32]] = []

    def add(self, tokens: int, load_LE: NDArray[np.floating]) -> None:
        """Adds the shares of a window that ended at `tokens`."""
        self._pending.append(load_LE.astype(np.float32))
        if len(self._pending) < self.windows_per_point:
            return
        self.tokens.append(tokens)
        self.loads.append(np.mean(self._pending, axis=0))
        self._pending = []
        if len(self.tokens) >= self.max_points:
            self.tokens = self.tokens[1::2]
            self.loads = [(a + b) / np.float32(2) for a, b in zip(self.loads[::2], self.loads[1::2], strict=True)]
            self.windows_per_point *= 2

    def read(self, path: Path, until: int) -> None:
        """Continues a file, up to the consumed tokens of the checkpoint that a run continues from."""
        with np.load(path) as saved:
            keep = saved["tokens"] <= until
            self.tokens = saved["tokens"][keep].tolist()
            self.loads = list(saved["load"][keep].astype(np.float32))
            self.windows_per_point = int(saved["windows_per_point"]) if "windows_per_point" in saved else 1

    def write(self, path: Path) -> None:
        """Writes the file in one step; does nothing without a point."""
        if not self.tokens:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npz")
        np.savez_compressed(
            partial, tokens=np.array(self.tokens), load=np.stack(self.loads), windows_per_point=self.windows_per_point
        )
        os.replace(partial, path)

"""Losses of many checkpoints at many tokens, read in blocks: T may be far larger than memory, M may not.

    Z = L − mean over checkpoints  (M, T),    K = Z Zᵀ  (M, M)    from one pass over the tokens

Whatever a ridge fit over token weights needs is in K (Kimeldorf & Wahba 1971: its weights are Zᵀ a). With a pool, the
tokens of a group share one weight: columns are Σ_{t∈g} ℓ_t/√n_g and weights u_g/√n_g, which leaves Σ w² as it is.
Shapes: M checkpoints, T tokens, G groups (G = T without a pool), R checkpoints of a fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lit_interns1.laws.transforms import Floats

BLOCK_TOKENS = 65536


class TokenLosses:
    """Reads losses (M, T) block by block in float64.

    Args:
        losses: (M, T) nats; an array, a memory map, or what can be sliced like one.
        pool: (T,) group of each token, such as its sample or its vocabulary id; None gives each token its own weight.
        block_tokens: Tokens per block.

    Raises:
        ValueError: If the losses are no finite matrix, or the pool does not fit them.
    """

    def __init__(self, losses: Any, pool: ArrayLike | None = None, block_tokens: int = BLOCK_TOKENS) -> None:
        if getattr(losses, "ndim", None) != 2 or 0 in losses.shape:
            raise ValueError(f"losses must be (checkpoints, tokens), got shape {getattr(losses, 'shape', None)}")
        self.num_checkpoints, self.num_tokens = losses.shape
        self._losses, self._block = losses, block_tokens
        self._group_T: NDArray[np.int64] | None = None
        self.uniform_G = np.full(self.num_tokens, 1 / self.num_tokens)
        """(G,) column weights that give the plain mean over tokens."""
        if pool is not None:
            self._pool(np.asarray(pool))
        self.mean_M, self.gram_MM = self._statistics()

    def _pool(self, pool_T: NDArray[Any]) -> None:
        if pool_T.shape != (self.num_tokens,):
            raise ValueError(f"pool {pool_T.shape} must name a group for each of the {self.num_tokens} tokens")
        _, group_T, size_G = np.unique(pool_T, return_inverse=True, return_counts=True)
        pooled_MG = np.zeros((self.num_checkpoints, size_G.size))
        for span in self._spans(self.num_tokens):
            block_MB = np.asarray(self._losses[:, span], dtype=np.float64)
            for row_B, out_G in zip(block_MB, pooled_MG):
                out_G += np.bincount(group_T[span], row_B, minlength=size_G.size)
        self._losses, self._group_T, self._root_G = pooled_MG / np.sqrt(size_G), group_T, np.sqrt(size_G)
        self.uniform_G = self._root_G / self.num_tokens

    def _spans(self, size: int) -> Iterator[slice]:
        return (slice(start, min(start + self._block, size)) for start in range(0, size, self._block))

    def blocks(self) -> Iterator[tuple[slice, Floats]]:
        """Column ranges and their losses, (M, block)."""
        for span in self._spans(self.uniform_G.size):
            yield span, np.asarray(self._losses[:, span], dtype=np.float64)

    def _statistics(self) -> tuple[Floats, Floats]:
        """Mean loss of each checkpoint and K."""
        mean_M = np.zeros(self.num_checkpoints)
        gram_MM = np.zeros((self.num_checkpoints, self.num_checkpoints))
        for span, block_MB in self.blocks():
            if not np.isfinite(block_MB).all():
                bad = np.flatnonzero(~np.isfinite(block_MB).all(axis=1)).tolist()
                raise ValueError(f"losses of checkpoints {bad} are not finite")
            mean_M += block_MB @ self.uniform_G[span]
            block_MB = block_MB - block_MB.mean(axis=0)
            gram_MM += block_MB @ block_MB.T
        return mean_M, gram_MM

    def kernel(self, rows_R: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """K centred on some checkpoints: among themselves (R, R), and of all with them (M, R)."""
        cross_MR = self.gram_MM[:, rows_R] - self.gram_MM[np.ix_(rows_R, rows_R)].mean(axis=0)
        inner_RR = cross_MR[rows_R]
        return inner_RR - inner_RR.mean(axis=1, keepdims=True), cross_MR

    def combine(self, rows_R: NDArray[np.int64], a_R: Floats) -> Floats:
        """(G,) Zᵀ a, with Z centred on `rows_R`."""
        return np.concatenate([(b[rows_R] - b[rows_R].mean(axis=0)).T @ a_R for _, b in self.blocks()])

    def project(self, weight_G: Floats) -> Floats:
        """(M,) L w."""
        return sum((block_MB @ weight_G[span] for span, block_MB in self.blocks()), np.zeros(self.num_checkpoints))

    def token_weights(self, weight_G: Floats) -> Floats:
        """(T,) weights of the tokens."""
        return weight_G if self._group_T is None else (weight_G / self._root_G)[self._group_T]

    def nonnegative_ridge(self, rows_R: NDArray[np.int64], target_R: Floats, rho: float) -> Floats:
        """(G,) w ≥ 0 that minimises |Z w − t|² + ρ |w|².

        w = (Zᵀ a)₊, where a minimises the convex ½ρ|a|² + ½|(Zᵀ a)₊|² − t·a: R unknowns, Newton with backtracking.
        """
        centred_R = target_R - target_R.mean()

        def state(a_R: Floats) -> tuple[float, Floats, Floats]:
            value, slope_R, curvature_RR = 0.5 * rho * a_R @ a_R - centred_R @ a_R, rho * a_R - centred_R, 0.0
            for _, block_MB in self.blocks():
                z_RB = block_MB[rows_R] - block_MB[rows_R].mean(axis=0)
                w_B = z_RB.T @ a_R
                z_RB, w_B = z_RB[:, w_B > 0], w_B[w_B > 0]
                value, slope_R = value + 0.5 * w_B @ w_B, slope_R + z_RB @ w_B
                curvature_RR = curvature_RR + z_RB @ z_RB.T
            return float(value), slope_R, curvature_RR + rho * np.eye(a_R.size)

        a_R = np.zeros(rows_R.size)
        value, slope_R, curvature_RR = state(a_R)
        for _ in range(100):
            step_R = np.linalg.solve(curvature_RR, slope_R)
            decrease = slope_R @ step_R
            if decrease <= 1e-14 * max(1.0, abs(value)):
                break
            share = 1.0
            trial = state(a_R - step_R)
            while trial[0] > value - 1e-4 * share * decrease and share > 1e-6:
                share /= 2
                trial = state(a_R - share * step_R)
            a_R = a_R - share * step_R
            value, slope_R, curvature_RR = trial
        return np.maximum(self.combine(rows_R, a_R), 0.0)

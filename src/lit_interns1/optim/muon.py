"""Muon: momentum, orthogonalised.

    M ← μ M + G;    U = G + μ M (Nesterov) or M;    W ← W (1 − η λ) − η · factor(shape) · polar(U)

Keller Jordan's rule (kellerjordan.github.io/posts/muon) with the choices that training at scale added: weight decay and
the factor 0.2 √max(rows, columns), with which AdamW's rate and decay carry over (arXiv 2502.16982).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from lit_interns1.optim.elementwise import ElementwiseName
from lit_interns1.optim.matrix_optimizer import MatrixOptimizer, Polar, RateAdjustment
from lit_interns1.optim.orthogonalization import CoefficientSet


class Muon(MatrixOptimizer):
    """Muon for matrices and stacks of experts, AdamW or Lion for everything else.

    Modules of this kit give it `matrix_groups(model)` by themselves; in other code give them as `params`. Under FSDP2
    and expert parallelism every matrix is computed whole, by one rank. A matrix whose gradient is zero, such as that of
    an expert without tokens, only decays; its momentum waits.

    Args:
        params: Parameter groups of `matrix_groups`, or parameters: those of two and three dimensions are matrices then.
        lr: η.
        momentum: μ.
        nesterov: Look one step ahead.
        weight_decay: λ, decoupled.
        adjust_lr: The factor for a matrix of A × B: "match_rms_adamw" 0.2 √max(A, B), with which the update's root mean
            square is about AdamW's; "spectral_norm" √(A/B); "original" √max(1, A/B); "none" 1.
        coefficients: Of the Newton–Schulz iteration; see `newton_schulz`.
        polar: "newton_schulz", or "svd" for the exact polar factor (slow).
        compute_dtype: What Newton–Schulz computes with; None: bfloat16 on GPUs, the type of the momentum on CPUs.
        split_heads: Orthogonalise the heads of query, key and value projections one by one.
        elementwise_optimizer: For the parameters that are no matrices: "adamw" or "lion".
        elementwise_lr: Their rate; None: `lr`.
        elementwise_betas: Their β₁, β₂; None: (0.9, 0.95) for AdamW, (0.9, 0.99) for Lion.
        elementwise_eps: ε of AdamW.
        elementwise_clip: Limit the norm of their gradients. The size of a matrix's gradient does not matter, so this is
            the clipping to use here; leave `Trainer(gradient_clip_val)` alone.

    Raises:
        ValueError: For an option out of its range; for a parameter that is divided over ranks by columns.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.1,
        adjust_lr: RateAdjustment = "match_rms_adamw",
        coefficients: CoefficientSet = "dion",
        polar: Polar = "newton_schulz",
        compute_dtype: torch.dtype | str | None = None,
        split_heads: bool = False,
        elementwise_optimizer: ElementwiseName = "adamw",
        elementwise_lr: float | None = None,
        elementwise_betas: tuple[float, float] | None = None,
        elementwise_eps: float = 1e-8,
        elementwise_clip: float | None = None,
    ) -> None:
        super().__init__(
            params, lr, momentum, nesterov, weight_decay, adjust_lr, coefficients, polar, compute_dtype, split_heads,
            elementwise_optimizer, elementwise_lr, elementwise_betas, elementwise_eps, elementwise_clip,
        )  # fmt: skip

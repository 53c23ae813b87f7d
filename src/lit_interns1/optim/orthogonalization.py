"""The nearest orthogonal matrix (polar factor) of a stack of matrices.

    U Σ Vᵀ  →  U Vᵀ          X ← a X + (b X Xᵀ + c (X Xᵀ)²) X   with X = G / ‖G‖_F at first

Newton–Schulz iterations act on each singular value as the odd polynomial a σ + b σ³ + c σ⁵; few of them, with
coefficients chosen for speed, bring all singular values near 1, not to it. Coefficients: "quintic" are those of Muon
(Keller Jordan; also torch.optim.Muon), "dion" those of Dion and Mousse (arXiv 2504.05295, 2603.09697), "polar_express"
those of arXiv 2505.16932.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

CoefficientSet = Literal["quintic", "dion", "polar_express"]

COEFFICIENTS: dict[CoefficientSet, tuple[tuple[float, float, float], ...]] = {
    "quintic": ((3.4445, -4.7750, 2.0315),) * 5,
    "dion": (
        (4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037), (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    "polar_express": (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
}  # fmt: skip
"""(a, b, c) of each iteration."""

_HEADROOM: dict[CoefficientSet, float] = {"quintic": 1.0, "dion": 1.0, "polar_express": 1.02}
"""The largest singular value is at most 1 over this at first; beyond 1 polar_express's polynomials grow."""


def newton_schulz(matrices: Tensor, coefficients: CoefficientSet = "dion", dtype: torch.dtype | None = None) -> Tensor:
    """Matrices with about the same singular vectors, and singular values near 1.

    Args:
        matrices: (..., m, n). A matrix of zeros stays one.
        coefficients: Which polynomials.
        dtype: What is computed with; None: that of `matrices`.

    Returns:
        (..., m, n) in the type of `matrices`.
    """
    # scaled before it is rounded: the norm of a large gradient may not fit the smaller type
    scale = torch.linalg.matrix_norm(matrices, keepdim=True).clamp(min=1e-30) * _HEADROOM[coefficients]
    x = (matrices / scale).to(dtype or matrices.dtype).reshape(-1, *matrices.shape[-2:])
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    for a, b, c in COEFFICIENTS[coefficients]:
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    if tall:
        x = x.mT
    return x.reshape(matrices.shape).to(matrices.dtype)


def polar_factor(matrices: Tensor) -> Tensor:
    """The exact polar factor U Vᵀ, by singular value decomposition; of a matrix of zeros, zeros.

    Args:
        matrices: (..., m, n).
    """
    u, values, vh = torch.linalg.svd(matrices, full_matrices=False)
    return (u * (values.amax(-1) > 0)[..., None, None]) @ vh


def factor_from_gram(gram: Tensor, coefficients: CoefficientSet | None = "dion") -> Tensor:
    """T such that X T is what `newton_schulz(X)` gives, from Xᵀ X alone: rows of X may be on different ranks.

    The iteration acts on X from the right, X ← X P(Xᵀ X), and P(Xᵀ X) commutes with Xᵀ X. Squares of singular values
    need twice the digits, so give float64.

    Args:
        gram: (..., n, n) Xᵀ X.
        coefficients: Of the iteration; None: T = (Xᵀ X)^−½, for the exact polar factor.
    """
    if coefficients is None:
        values, vectors = torch.linalg.eigh(gram)
        kept = values > values.amax(-1, keepdim=True) * torch.finfo(gram.dtype).eps * gram.shape[-1]
        return (vectors * torch.where(kept, values.clamp(min=1e-300).rsqrt(), 0.0)[..., None, :]) @ vectors.mT
    squared_norm = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].clamp(min=1e-60)
    scale = squared_norm.rsqrt() / _HEADROOM[coefficients]
    present = (gram * scale**2).reshape(-1, *gram.shape[-2:])
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    total = identity.expand_as(present)
    for a, b, c in COEFFICIENTS[coefficients]:
        polynomial = a * identity + torch.baddbmm(present, present, present, beta=b, alpha=c)
        total = total @ polynomial
        present = polynomial @ present @ polynomial
    return total.reshape(gram.shape) * scale


def check_coefficients(name: str) -> None:
    """Raises:
    ValueError: If there is no such set.
    """
    if name not in get_args(CoefficientSet):
        raise ValueError(f"coefficients must be one of {', '.join(get_args(CoefficientSet))}, got {name!r}")

"""Powers of means of G Gᵀ that a step applies, in their eigenbases.

    X̂ = X · d / (tr X) + ε I = Q diag(λ) Qᵀ;    λ ← λ + max(0, −min λ) + ε        mean eigenvalue 1

(Mousse, arXiv 2603.09697; the shift and the second ε are those of the authors' code.)
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def refresh(means: Tensor, bases: Tensor, values: Tensor, chosen: Sequence[int], eps: float) -> None:
    """Computes eigenbases anew, in place.

    A matrix that is zero (an expert that has had no tokens) keeps what it has; so does one that is not finite, or whose
    decomposition fails in float32 and in float64. Shapes do not depend on numbers, so a device need not be waited for.

    Args:
        means: (N, d, d) symmetric.
        bases: (N, d, d) Q, in columns.
        values: (N, d) λ.
        chosen: Which ones.
        eps: ε.
    """
    if len(chosen) < len(means):
        index = torch.tensor(chosen, device=means.device)
        part = bases[index], values[index]
        refresh(means[index], *part, range(len(chosen)), eps)
        bases[index], values[index] = part
        return
    if not len(means):
        return
    size, identity = means.shape[-1], torch.eye(means.shape[-1], dtype=means.dtype, device=means.device)
    traces = means.diagonal(dim1=-2, dim2=-1).sum(-1)
    good = means.isfinite().all(-1).all(-1) & (traces > torch.finfo(means.dtype).tiny)
    scaled = torch.where(good[:, None, None], means * (size / traces)[:, None, None], identity)
    scaled.diagonal(dim1=-2, dim2=-1).add_(eps)
    try:
        found, basis = torch.linalg.eigh(scaled)
    except torch.linalg.LinAlgError:
        found, basis = _decomposed_one_by_one(scaled)
        good &= found.isfinite().all(-1)
        if lost := int((~good & (traces != 0)).sum()):
            message = f"{lost} of {len(means)} preconditioners could not be decomposed; they keep their last basis"
            warnings.warn(message, stacklevel=2)
    found = found + (-found.amin(-1, keepdim=True)).clamp(min=0) + eps
    values.copy_(torch.where(good[:, None], found, values))
    bases.copy_(torch.where(good[:, None, None], basis, bases))


def _decomposed_one_by_one(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors by float64 on the host; NaN where there are none to be had."""
    values, vectors = torch.full_like(matrices[..., 0], torch.nan), torch.full_like(matrices, torch.nan)
    for number, one in enumerate(matrices):  # one bad matrix must not take the others with it
        try:
            roots, columns = torch.linalg.eigh(one.to("cpu", torch.float64))
        except torch.linalg.LinAlgError:
            continue
        values[number], vectors[number] = roots.to(values), columns.to(vectors)
    return values, vectors

"""Powers of means of G Gᵀ that a step applies, in their eigenbases.

    X̂ = X · d / (tr X) + ε I = Q diag(λ) Qᵀ;    λ ← λ + max(0, −min λ) + ε        mean eigenvalue 1

(Mousse, arXiv 2603.09697; the shift and the second ε are those of the authors' code.)
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor


@torch.no_grad()
def refresh(means: Tensor, bases: Tensor, values: Tensor, chosen: Tensor, eps: float) -> None:
    """Computes eigenbases anew, in place.

    A matrix that is zero (an expert that has had no tokens) keeps what it has, and so does one whose decomposition
    fails in float32 and in float64.

    Args:
        means: (N, d, d) symmetric.
        bases: (N, d, d) Q, in columns.
        values: (N, d) λ.
        chosen: (N,) which ones, bool.
        eps: ε.
    """
    traces = means.diagonal(dim1=-2, dim2=-1).sum(-1)
    empty = traces <= torch.finfo(means.dtype).tiny  # not so where a trace is no number
    which = (chosen & ~empty).nonzero().squeeze(-1)
    if not len(which):
        return
    size = means.shape[-1]
    scaled = means[which] * (size / traces[which])[:, None, None]
    scaled.diagonal(dim1=-2, dim2=-1).add_(eps)
    found, basis = _decomposed(scaled)
    found = found + (-found.amin(-1, keepdim=True)).clamp(min=0) + eps
    good = (found.isfinite().all(-1) & basis.isfinite().all(-1).all(-1)).nonzero().squeeze(-1)
    values[which[good]], bases[which[good]] = found[good].to(values.dtype), basis[good].to(bases.dtype)


def _decomposed(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors; NaN where there are none to be had."""
    finite = matrices.isfinite().all(-1).all(-1)
    try:
        if bool(finite.all()):
            values, vectors = torch.linalg.eigh(matrices)
            return values, vectors
    except torch.linalg.LinAlgError:
        pass
    values, vectors = torch.full_like(matrices[..., 0], torch.nan), torch.full_like(matrices, torch.nan)
    for number in finite.nonzero().squeeze(-1).tolist():  # one bad matrix must not take the others with it
        try:
            one, columns = torch.linalg.eigh(matrices[number].to("cpu", torch.float64))
        except torch.linalg.LinAlgError:
            continue
        values[number], vectors[number] = one.to(values), columns.to(vectors)
    lost = int((~values.isfinite().all(-1)).sum())
    if lost:
        message = f"{lost} of {len(matrices)} preconditioners could not be decomposed; they keep their last basis"
        warnings.warn(message, stacklevel=2)
    return values, vectors

"""The mixing law at a size and a token count that were not trained (arXiv 2403.16952 §4).

    per size, mixture and validation set   L(D) = c + (D_0/D)^α       over tokens,  read at the target's tokens
    per mixture and validation set         L(N) = c + (N_0/N)^α       over sizes,   read at the target's size
    per validation set                     L(r) = c + exp(t · r)      over mixtures (`mixing`)

Small runs rank mixtures by their own losses; the best mixture of a large run differs. Exponents may be shared, since
few points per curve do not fix them. The paper's code minimises Huber's loss from random starts; here least squares,
with c and the amplitude solved for at each α. Intervals of the last law know nothing of the two extrapolations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from lit_interns1.laws.mixing import MixingLaw, check_proportions, fit_mixing_law
from lit_interns1.laws.power_law import fit_power_law, fit_shared_power_laws
from lit_interns1.laws.transforms import Floats

Share = Literal["all", "target", "none"]
"""Which curves have one exponent: all, those of one validation set, or each its own."""


@dataclass(frozen=True)
class NestedMixingLaw:
    """A mixing law at the target, with what led there.

    Attributes:
        law: At the target's size and tokens.
        proportions_MK: The mixtures.
        losses_MV: Their extrapolated losses, which `law` was fitted to.
        target_size: Parameters.
        target_tokens: Tokens.
        step_exponents: Exponents α over tokens by size: (V,), one each; (M, V) if none is shared. Empty if every run
            already has the target's tokens.
        size_exponents: Exponents over sizes, likewise; None if every run has the target's size.
        token_factor: The target's tokens over the most that were trained.
        size_factor: The target's size over the largest that was trained.
    """

    law: MixingLaw
    proportions_MK: Floats
    losses_MV: Floats
    target_size: float
    target_tokens: float
    step_exponents: dict[float, Floats]
    size_exponents: Floats | None
    token_factor: float
    size_factor: float


def fit_nested_mixing_law(
    sizes: ArrayLike,
    tokens: ArrayLike,
    proportions: ArrayLike,
    losses: ArrayLike,
    domains: Sequence[str],
    targets: Sequence[str],
    target_size: float,
    target_tokens: float,
    share_steps: Share = "target",
    share_sizes: Share = "all",
    step_range: tuple[float, float] = (0.02, 3.0),
    size_range: tuple[float, float] = (0.02, 3.0),
    huber: float | None = None,
    bootstrap: int = 200,
    seed: int = 0,
) -> NestedMixingLaw:
    """Extrapolates every mixture over tokens, then over sizes, then fits the mixing law.

    Args:
        sizes: (P,) parameters of the run behind each point, non-embedding by the paper's count.
        tokens: (P,) consumed tokens of each point: several points of one run are its curve.
        proportions: (P, K) mixtures.
        losses: (P, V) nats per token.
        domains: K names.
        targets: V names.
        target_size: Parameters to extrapolate to.
        target_tokens: Tokens to extrapolate to.
        share_steps: Curves of one size with a common exponent over tokens.
        share_sizes: Curves with a common exponent over sizes.
        step_range: Where shared exponents over tokens are searched; the paper's code starts in 0.65 … 0.9.
        size_range: Likewise over sizes; the paper's code starts in 0.3 … 0.8.
        huber: δ of the mixing law, nats per token; None is least squares.
        bootstrap: Samples of the mixing law.
        seed: Of the samples.

    Raises:
        ValueError: If shapes do not fit, a mixture was not trained at every size, or a curve is too short.
    """
    rows_PK = check_proportions(proportions, domains)
    size_P, tokens_P, losses_PV = (np.asarray(a, dtype=np.float64) for a in (sizes, tokens, losses))
    if not size_P.shape == tokens_P.shape == rows_PK.shape[:1] or losses_PV.shape != (size_P.size, len(targets)):
        raise ValueError(
            f"sizes {size_P.shape}, tokens {tokens_P.shape}, proportions {rows_PK.shape} and losses {losses_PV.shape} "
            f"must have one row per point and {len(targets)} losses in each"
        )
    if not (target_size > 0 and target_tokens > 0):
        raise ValueError(f"target_size={target_size} and target_tokens={target_tokens} must be positive")
    mixture_MK, mixture_P = np.unique(rows_PK.round(9), axis=0, return_inverse=True)
    mixture_P = mixture_P.reshape(-1)
    points = {
        (float(size), m): np.flatnonzero((size_P == size) & (mixture_P == m))
        for size in np.unique(size_P)
        for m in range(len(mixture_MK))
    }
    for (size, m), rows in points.items():
        if not rows.size:
            raise ValueError(f"the mixture {mixture_MK[m].tolist()} was not trained at size {size:g}: leave it out")
    at_size: dict[float, Floats] = {}
    step_exponents: dict[float, Floats] = {}
    mixtures = range(len(mixture_MK))
    for size in map(float, np.unique(size_P)):
        curves = [(tokens_P[points[size, m]], losses_PV[points[size, m]]) for m in mixtures]
        at_size[size], exponents = _extrapolate(curves, target_tokens, share_steps, step_range, "tokens")
        if exponents is not None:
            step_exponents[size] = exponents
    x_S, losses_SMV = np.array(list(at_size)), np.stack(list(at_size.values()))
    losses_MV, size_exponents = _extrapolate(
        [(x_S, losses_SMV[:, m]) for m in mixtures], target_size, share_sizes, size_range, "sizes"
    )
    law = fit_mixing_law(mixture_MK, losses_MV, domains, targets, huber, bootstrap, seed)
    return NestedMixingLaw(
        law=law,
        proportions_MK=mixture_MK,
        losses_MV=losses_MV,
        target_size=target_size,
        target_tokens=target_tokens,
        step_exponents=step_exponents,
        size_exponents=size_exponents,
        token_factor=float(target_tokens / tokens_P.max()),
        size_factor=float(target_size / size_P.max()),
    )


def _extrapolate(
    curves: list[tuple[Floats, Floats]], target: float, share: Share, exponents: tuple[float, float], axis: str
) -> tuple[Floats, Floats | None]:
    """Losses (M, V) at `target` of M curves (x (N,), losses (N, V)), and exponents; None if nothing is extrapolated."""
    if all((x_N == target).all() for x_N, _ in curves):
        return np.stack([losses_NV.mean(axis=0) for _, losses_NV in curves]), None
    short = next((x_N for x_N, _ in curves if np.unique(x_N).size < (3 if share == "none" else 2)), None)
    if short is not None:
        raise ValueError(
            f"a mixture has losses at the {axis} {np.unique(short).tolist()} only: to reach {target:g} give three of "
            "them, or two with a shared exponent"
        )
    num_targets = curves[0][1].shape[1]
    if share == "none":
        laws = [[fit_power_law(x_N, losses_NV[:, v]) for v in range(num_targets)] for x_N, losses_NV in curves]
        found = np.array([[law(target) for law in row] for row in laws])
        return found, np.array([[law.exponent for law in row] for row in laws])
    groups = [list(range(num_targets))] if share == "all" else [[v] for v in range(num_targets)]
    found, exponent_V = np.empty((len(curves), num_targets)), np.empty(num_targets)
    for group in groups:
        each = [(x_N, losses_NV[:, v]) for x_N, losses_NV in curves for v in group]
        shared = fit_shared_power_laws([x for x, _ in each], [y for _, y in each], exponents)
        found[:, group] = shared(target).reshape(len(curves), len(group))
        exponent_V[group] = shared.exponent
    return found, exponent_V

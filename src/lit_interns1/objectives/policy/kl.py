"""Estimators of KL(π‖π_ref) from tokens that π sampled (Schulman, "Approximating KL divergence", 2020).

    d = log π_ref − log π          k1 = −d          k2 = d²/2          k3 = e^d − d − 1          abs = |d|

k1 and k3 have the KL as their mean, k2 nearly. Gradients are another matter: that of k2 is right in the mean, those of
k1 (mean 0) and k3 are not. Two cures: "k1+" and "k3+" take the gradient of k2 (so named in verl); an objective can
multiply the estimate by the ratio π_θ/π_old, as TRL does (`use_bias_correction_kl`).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0
"""Differences of log-probabilities are clamped to ±20 before they are exponentiated."""

KLType = Literal["k1", "kl", "k2", "mse", "k3", "low_var_kl", "abs", "k1+", "k3+"]
"""Names of the estimators; "kl" is k1, "mse" is k2, "low_var_kl" is k3, as in verl."""


def check_kl_type(name: str, kl_type: str) -> None:
    """Raises a ValueError if the option `name` is not an estimator."""
    if kl_type not in get_args(KLType):
        raise ValueError(f"{name} = {kl_type!r} must be one of {get_args(KLType)}")


def ratio(logp_T: Tensor, other_logp_T: Tensor) -> Tensor:
    """π/π', with the difference of the logs clamped to ±20."""
    return (logp_T - other_logp_T).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def kl_estimate(logp_T: Tensor, ref_logp_T: Tensor, kl_type: KLType = "k3") -> Tensor:
    """An estimate of KL(π‖π_ref) per token.

    verl also clamps k3 itself to 10, which differs from d ≈ 2.4 on; this one does not.

    Args:
        logp_T: log π of the tokens, nats.
        ref_logp_T: log π_ref of the same tokens.
        kl_type: The estimator.

    Returns:
        (T,) nats.

    Raises:
        ValueError: If the estimator is unknown.
    """
    check_kl_type("kl_type", kl_type)
    if kl_type.endswith("+"):
        value_T = kl_estimate(logp_T.detach(), ref_logp_T, kl_type[:-1])  # type: ignore[arg-type]
        gradient_T = kl_estimate(logp_T, ref_logp_T, "k2")
        return value_T + gradient_T - gradient_T.detach()
    difference_T = ref_logp_T - logp_T
    if kl_type in ("k1", "kl"):
        return -difference_T
    if kl_type in ("k2", "mse"):
        return 0.5 * difference_T.square()
    if kl_type == "abs":
        return difference_T.abs()
    clamped_T = difference_T.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return torch.expm1(clamped_T) - clamped_T

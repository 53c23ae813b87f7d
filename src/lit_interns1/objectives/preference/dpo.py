"""Direct preference optimization (arXiv 2305.18290, Eq. 7) and its relatives, on the log-ratios h of a pair.

    Δ = s(h_w) − s(h_l)                                   s: the score of an f-divergence (arXiv 2309.16240), h for KL
    sigmoid   −(1−ε) log σ(βΔ) − ε log σ(−βΔ)             ε: label smoothing (conservative DPO)
    robust    (−(1−ε) log σ(βΔ) + ε log σ(−βΔ))/(1−2ε)    arXiv 2403.00409
    hinge     max(0, 1 − βΔ)                              arXiv 2309.06657
    ipo       (Δ − 1/(2β))²                               arXiv 2310.12036, Eq. 17; s divided by the response tokens

Exponentials of a score go on linearly beyond e^20, so that losses and gradients stay finite.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_interns1.objectives.options import check_choice, check_number
from lit_interns1.objectives.preference.objective import PairObjective

LossType = Literal["sigmoid", "hinge", "ipo"]
FDivergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]

EXPONENT_LIMIT = 20.0
"""Beyond it e^x is continued by its tangent."""


def tangent_exp(x: Tensor) -> Tensor:
    """e^x, and beyond `EXPONENT_LIMIT` the line that touches it there."""
    inside = x.clamp(max=EXPONENT_LIMIT)
    return inside.exp() * (1.0 + x - inside)


def divergence_score(ratio: Tensor, divergence: FDivergence, alpha: float = 0.5) -> Tensor:
    """s(h) = f'(e^h), without a constant that is the same for all responses of a prompt.

        reverse_kl  h                  js     log 2 + log σ(h)
        forward_kl  1 − e^{−h}         alpha  (e^{(α−1)h} − 1)/(α−1); for α = 1 it is h

    Args:
        ratio: h, nats.
        divergence: Which.
        alpha: α of "alpha".
    """
    if divergence == "forward_kl":
        return 1.0 - tangent_exp(-ratio)
    if divergence == "js":
        return math.log(2.0) + F.logsigmoid(ratio)
    if divergence == "alpha" and abs(alpha - 1.0) >= 1e-6:
        return (tangent_exp((alpha - 1.0) * ratio) - 1.0) / (alpha - 1.0)
    return ratio


class DPO(PairObjective):
    """Direct preference optimization.

    Args:
        beta: β > 0; for "ipo" it is τ of the paper.
        loss_type: Form of the loss.
        label_smoothing: ε in [0, ½), the share of pairs whose label is believed to be wrong; for "sigmoid".
        robust: The loss that is unbiased under flips with probability ε.
        f_divergence: Divergence that holds the policy to the reference.
        alpha: α of the divergence "alpha".
        length_normalized: Divides the score of a response by its tokens; None = only for "ipo", which needs it.

    Raises:
        ValueError: If an option is out of range or two do not go together.
    """

    def __init__(
        self, beta: float = 0.1, loss_type: LossType = "sigmoid", label_smoothing: float = 0.0, robust: bool = False,
        f_divergence: FDivergence = "reverse_kl", alpha: float = 0.5, length_normalized: bool | None = None,
    ) -> None:  # fmt: skip
        super().__init__(beta)
        check_choice("loss_type", loss_type, LossType)
        check_choice("f_divergence", f_divergence, FDivergence)
        check_number("label_smoothing", label_smoothing, 0.0)
        check_number("alpha", alpha, -math.inf)
        if label_smoothing >= 0.5:
            raise ValueError(f"label_smoothing = {label_smoothing} must be below 0.5: from there on labels say nothing")
        if label_smoothing > 0 and loss_type != "sigmoid":
            raise ValueError(f"label_smoothing = {label_smoothing} goes with loss_type = 'sigmoid', not {loss_type!r}")
        if robust and label_smoothing == 0:
            raise ValueError("robust = True needs label_smoothing > 0, the probability of a flipped label")
        if loss_type == "ipo" and length_normalized is False:
            raise ValueError("length_normalized = False does not go with loss_type = 'ipo', whose target is per token")
        self.loss_type, self.label_smoothing, self.robust = loss_type, label_smoothing, robust
        self.f_divergence, self.alpha = f_divergence, alpha
        self.length_normalized = loss_type == "ipo" if length_normalized is None else length_normalized

    def pair_loss(self, chosen_P: Tensor, rejected_P: Tensor, lengths_2P: Tensor) -> Tensor:
        """(P,) losses of the chosen form."""
        score_2P = divergence_score(torch.stack([chosen_P, rejected_P]), self.f_divergence, self.alpha)
        if self.length_normalized:
            score_2P = score_2P / lengths_2P
        difference_P = score_2P[0] - score_2P[1]
        if self.loss_type == "ipo":
            return (difference_P - 1.0 / (2.0 * self.beta)).square()
        logit_P = self.beta * difference_P
        if self.loss_type == "hinge":
            return (1.0 - logit_P).relu()
        right_P, flipped_P = -F.logsigmoid(logit_P), -F.logsigmoid(-logit_P)
        noise = self.label_smoothing
        if self.robust:
            return ((1.0 - noise) * right_P - noise * flipped_P) / (1.0 - 2.0 * noise)
        return (1.0 - noise) * right_P + noise * flipped_P


class IPO(DPO):
    """Identity preference optimization: `DPO(loss_type="ipo")`.

    Args:
        beta: τ > 0.

    Raises:
        ValueError: If β is not a positive number.
    """

    def __init__(self, beta: float = 0.1) -> None:
        super().__init__(beta, loss_type="ipo")

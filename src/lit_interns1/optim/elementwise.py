"""Updates of single numbers, for the parameters that a matrix optimizer leaves over.

AdamW (arXiv 1711.05101)    m, v: means of g, g²;  p ← p (1 − η λ) − η m̂ / (√v̂ + ε)
Lion (arXiv 2302.06675)     p ← p (1 − η λ) − η sign(β₁ m + (1 − β₁) g);  m ← β₂ m + (1 − β₂) g
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

ElementwiseName = Literal["adamw", "lion"]
BETAS: dict[ElementwiseName, tuple[float, float]] = {"adamw": (0.9, 0.95), "lion": (0.9, 0.99)}
"""Defaults."""


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def new_state(name: ElementwiseName, parameter: Tensor) -> dict[str, Any]:
    """State of a parameter before its first step, divided as the parameter is."""
    if name == "lion":
        return {"exp_avg": torch.zeros_like(parameter)}
    return {
        "step": torch.zeros((), dtype=torch.float32), "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }  # fmt: skip


def update(
    name: ElementwiseName,
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[dict[str, Any]],
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """One step, in place. Tensors may be DTensors; ranks do not talk to each other.

    Args:
        name: Which rule.
        parameters: What is changed.
        gradients: Of each.
        states: From `new_state`.
        lr: η.
        weight_decay: λ.
        betas: β₁, β₂.
        eps: ε of AdamW.
    """
    own = [local(p) for p in parameters]
    grads = [local(g) for g in gradients]
    means = [local(state["exp_avg"]) for state in states]
    if name == "adamw":
        adamw(
            own, grads, means, [local(state["exp_avg_sq"]) for state in states], [],
            [state["step"] for state in states], foreach=True, amsgrad=False, beta1=betas[0], beta2=betas[1], lr=lr,
            weight_decay=weight_decay, eps=eps, maximize=False,
        )  # fmt: skip
        return
    torch._foreach_mul_(own, 1 - lr * weight_decay)
    directions = torch._foreach_lerp(grads, means, betas[0])
    torch._foreach_add_(own, torch._foreach_sign(directions), alpha=-lr)
    torch._foreach_lerp_(means, grads, 1 - betas[1])

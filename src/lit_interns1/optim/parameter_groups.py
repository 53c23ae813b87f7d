"""Which parameters are decayed.

Weight decay acts on matrices and stacks of matrices; vectors (norms, biases) are left out, as usual for AdamW.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def weight_decay_groups(model: nn.Module, decay_embeddings: bool = True) -> list[dict[str, Any]]:
    """Two parameter groups: the first takes the optimizer's weight decay, the second none. Empty groups are left out.

    Args:
        model: Parameters that do not require a gradient are left out.
        decay_embeddings: Also decay embedding tables (a tied head is decayed with its table).
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        matrix = parameter.ndim >= 2 and (decay_embeddings or id(parameter) not in embeddings)
        (decayed if matrix else free).append(parameter)
    groups: list[dict[str, Any]] = []
    if decayed:
        groups.append({"params": decayed})
    if free:
        groups.append({"params": free, "weight_decay": 0.0})
    return groups


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Sets the rate of a parameter group; one that is a tensor (torchao's optimizers need it so) stays that tensor."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate

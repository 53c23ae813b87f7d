"""Puts whole tensors, as one process saves them, into a model and an optimizer of any layout: each rank takes its part.

Parameters of an optimizer are matched by their place in its groups. (Numbers of parameters in a file count them in the
order of the groups, or in that of the module, depending on who wrote it; the places are the same.)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim import Optimizer


def local_part(whole: Tensor, like: Tensor) -> Tensor:
    """What this rank holds of `whole`, divided as `like` is.

    Raises:
        ValueError: If the shapes differ.
    """
    if whole.shape != like.shape:
        raise ValueError(f"a tensor of shape {tuple(whole.shape)} does not fit one of {tuple(like.shape)}")
    if not isinstance(like, DTensor):
        return whole
    shape, offset = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    return whole[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]


@torch.no_grad()
def load_whole_weights(
    model: nn.Module, weights: Mapping[str, Tensor], strict: bool = True, absent: Collection[str] = ()
) -> None:
    """Fills a model in place.

    Args:
        model: The model.
        weights: Whole tensors by name.
        strict: Whether the names must be those of the model.
        absent: Names of the model that the weights lack, and that stay as they are.

    Raises:
        ValueError: If names (with `strict`) or shapes differ.
    """
    own = {name: tensor for name, tensor in model.state_dict().items() if name not in absent}
    if strict and (different := own.keys() ^ weights.keys()):
        raise ValueError(f"the checkpoint and the model do not have the same weights: {sorted(different)[:5]} differ")
    for name in own.keys() & weights.keys():
        target = own[name].to_local() if isinstance(own[name], DTensor) else own[name]
        target.copy_(local_part(weights[name], own[name]))


def load_whole_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Fills an optimizer's state and the options of its groups.

    Raises:
        ValueError: If the groups differ in size.
    """
    sizes, saved = ([len(g["params"]) for g in groups] for groups in (optimizer.param_groups, state["param_groups"]))
    if sizes != saved:
        raise ValueError(f"the optimizer has groups of {sizes} parameters, the checkpoint of {saved}")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    keys = [key for group in state["param_groups"] for key in group["params"]]

    def divided(value: Any, name: str, parameter: Tensor) -> Any:
        like = optimizer.state[parameter].get(name, parameter) if parameter in optimizer.state else parameter
        if not isinstance(value, Tensor) or not isinstance(like, DTensor) or value.shape != like.shape:
            return value
        part = local_part(value, like).clone().to(like.device)
        return DTensor.from_local(
            part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )

    entries = {
        number: {name: divided(value, name, parameter) for name, value in state["state"][key].items()}
        for number, (key, parameter) in enumerate(zip(keys, parameters, strict=True))
        if key in state["state"]
    }
    numbers = iter(range(len(parameters)))
    groups = [{**group, "params": [next(numbers) for _ in group["params"]]} for group in state["param_groups"]]
    optimizer.load_state_dict({"state": entries, "param_groups": groups})

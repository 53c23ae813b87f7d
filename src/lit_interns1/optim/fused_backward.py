"""Optimizers that update a parameter while backward runs, and free its gradient at once (LOMO, arXiv 2306.09782 §3.1).

    backward reaches θ:   θ ← update(θ, c · ∂L/∂θ);   ∂L/∂θ is given back        c: one factor for all gradients
    step():               nothing is left to do

The gradients of all parameters never exist together: one process holds that of one parameter, FSDP2 those of one unit,
whose hooks run when its gradients have been summed over ranks. So nothing may look at all gradients between backward
and step: no clipping by the global norm, no accumulation, no loss scaler. Parameters that are used several times are
sound: autograd adds up their gradient before it hands it over.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from lit_interns1.optim.elementwise import local

_OWNERS: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter → handle of the hook that updates it


class FusedBackwardOptimizer(Optimizer, ABC):
    """Updates every parameter as soon as backward has its gradient; a subclass says how, in `update`.

    A gradient that stands at a parameter when `step` is called, because somebody put it there, is applied by `step`.
    Of several such optimizers of one parameter the one that was made last updates it.

    Args:
        params: Parameters or groups of them.
        defaults: Options of groups.

    Raises:
        ValueError: If several ranks hold a parameter whole: its gradient would be applied before ranks have summed it.
        RuntimeError: In backward, if a parameter gets a second gradient before `step` or `zero_grad`.
    """

    gradient_factor: Tensor | float = 1.0
    """c: what gradients are multiplied by in the next backward; `step` sets it back to 1. A strategy that would scale
    all gradients after backward sets it before."""

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._updated: set[int] = set()
        super().__init__(params, defaults)

    @abstractmethod
    def update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Changes a parameter in place, without autograd.

        Args:
            parameter: A plain tensor or a DTensor.
            gradient: This rank's part of its gradient, scaled, in float32 or what is wider; may be overwritten.
            group: Options.
        """

    def init_state(self, parameter: Tensor) -> None:
        """Makes the state of a parameter; the default has none. (At once, so that checkpoints find what to fill.)"""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group and takes over the gradients of its parameters."""
        super().add_param_group(param_group)
        number = len(self.param_groups) - 1
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        for parameter in self.param_groups[number]["params"]:
            if several and not isinstance(parameter, DTensor):
                raise ValueError(
                    f"{type(self).__name__} updates in backward, and a parameter of shape {tuple(parameter.shape)} is "
                    f"held whole by each of {dist.get_world_size()} ranks: its gradient is not summed over them yet. "
                    "Divide the model with FSDP2 (MoEParallelStrategy, or fully_shard); DistributedDataParallel and "
                    "FSDP1 are not possible"
                )
            if parameter.requires_grad:
                self.init_state(parameter)
                if handle := _OWNERS.get(parameter):
                    handle.remove()
                _OWNERS[parameter] = self._take_gradients_of(parameter, number)

    def _take_gradients_of(self, parameter: Tensor, group: int) -> RemovableHandle:
        reference = weakref.ref(self)  # parameters do not keep their optimizer alive

        def with_gradient(parameter: Tensor) -> None:
            optimizer = reference()
            if optimizer is not None and parameter.grad is not None:
                optimizer._update_in_backward(parameter, group)

        return parameter.register_post_accumulate_grad_hook(with_gradient)

    def _update_in_backward(self, parameter: Tensor, group: int) -> None:
        if id(parameter) in self._updated:
            raise RuntimeError(
                f"{type(self).__name__} updates in backward, and a parameter of shape {tuple(parameter.shape)} got a "
                "second gradient before step() or zero_grad(): gradients cannot be accumulated over several calls of "
                "backward, nor over several forward passes of an FSDP2 unit"
            )
        self._updated.add(id(parameter))
        self._apply(parameter, self.param_groups[group])

    @torch.no_grad()
    def _apply(self, parameter: Tensor, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        gradient, parameter.grad = local(parameter.grad), None
        if gradient.layout != torch.strided:
            raise RuntimeError(f"{type(self).__name__} takes dense gradients, got {gradient.layout}")
        gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        if isinstance(self.gradient_factor, Tensor):
            gradient.mul_(self.gradient_factor.to(gradient))
        elif self.gradient_factor != 1.0:
            gradient.mul_(self.gradient_factor)
        self.update(parameter, gradient, group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Ends the step; the updates have happened in the backward of the closure, or before.

        Returns:
            What the closure returns.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._apply(parameter, group)
        self._updated.clear()
        self.gradient_factor = 1.0
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Begins a step."""
        super().zero_grad(set_to_none)
        self._updated.clear()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_updated", set())  # a copy, which has no hooks: `step` applies gradients

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state, in the types that it has in the file: torch would cast it to those of parameters."""
        super().load_state_dict(state_dict)
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for key, parameter in zip(keys, parameters, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if isinstance(value, Tensor) and value.dtype != self.state[parameter][name].dtype:
                    self.state[parameter][name] = value.to(parameter.device)


def fused_optimizers(optimizers: Iterable[Optimizer]) -> list[FusedBackwardOptimizer]:
    """Those among optimizers that update in backward."""
    return [optimizer for optimizer in optimizers if isinstance(optimizer, FusedBackwardOptimizer)]

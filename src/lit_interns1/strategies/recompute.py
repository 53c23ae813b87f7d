"""Recomputes parts of a model in backward instead of keeping what is inside them.

What chose experts is kept (top-k, sort, and the routing operation): a recomputation that chose again could choose
otherwise at a near-tie, and rows would no longer match those of the forward pass, here and on other ranks.

torch's selective checkpointing wants the same operations both times. FSDP2 units inside a block do not keep to that:
what they gather depends on what is gathered already.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from lit_interns1.nn.parallel_plan import ParallelPlan

_CHOICES = {"topk", "sort", "argsort", "route", "multinomial"}


def recompute_in_backward(model: nn.Module, plan: ParallelPlan) -> None:
    """Switches recomputation on: the model's own way if its plan names one, and of the modules that the plan names.

    Raises:
        ValueError: If the plan names neither.
    """
    if plan.recompute is not None:
        plan.recompute()
    elif not plan.checkpointed:
        raise ValueError(
            f"activation_checkpointing = True, but the parallel plan of {type(model).__name__} names no modules to "
            "recompute: set `checkpointed` in it"
        )
    for module in plan.checkpointed:
        module.forward = partial(_checkpointed, module.forward)


def _checkpointed(forward: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments, **options)
    return checkpoint(forward, *arguments, use_reentrant=False, context_fn=_contexts, **options)


def _contexts() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    kept: list[Any] = []
    return _KeepChoices(kept), _RepeatChoices(kept)


def _chooses(operation: Any) -> bool:
    return operation.name().split("::")[-1].split(".")[0] in _CHOICES


class _KeepChoices(TorchDispatchMode):
    def __init__(self, kept: list[Any]) -> None:
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if _chooses(func):
            self.kept.append(tree_map_only(Tensor, Tensor.detach, result))
        return result


class _RepeatChoices(TorchDispatchMode):
    def __init__(self, kept: list[Any]) -> None:
        super().__init__()
        self.kept = kept

    def __enter__(self) -> TorchDispatchMode:
        self.remaining = iter(self.kept)
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _chooses(func):
            return tree_map_only(Tensor, Tensor.detach, next(self.remaining))
        return func(*args, **(kwargs or {}))

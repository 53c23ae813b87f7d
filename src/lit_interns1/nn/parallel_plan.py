"""What a model says about itself so that a strategy can divide it over ranks. The strategy decides sizes and meshes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import nn

from lit_interns1.nn.moe.dispatch import TokenDispatcher


@runtime_checkable
class ExpertLayer(Protocol):
    """A sparse layer whose experts can live on several ranks.

    Attributes:
        experts: A module whose parameters all have the experts as first dimension; it computes on `RoutedRows`.
        dispatcher: Brings tokens to experts; a strategy replaces it.
    """

    experts: nn.Module
    dispatcher: TokenDispatcher


@dataclass(frozen=True)
class ParallelPlan:
    """How a model may be divided.

    Args:
        units: Parts that are gathered and given back as a whole, in the order of execution; a sequence of modules is
            one unit (parts that share a weight must be). What belongs to no unit belongs to the model's own.
        expert_layers: Sparse layers.
        float32: Modules that compute in float32 when the rest does not, such as routers. Each becomes a unit.
        checkpointed: Modules that are recomputed in backward, if that is asked for.
        recompute: The model's own way to switch that on, for parts that are not named in `checkpointed`.
    """

    units: Sequence[nn.Module | Sequence[nn.Module]]
    expert_layers: Sequence[nn.Module] = ()
    float32: Sequence[nn.Module] = ()
    checkpointed: Sequence[nn.Module] = ()
    recompute: Callable[[], None] | None = None


@runtime_checkable
class HasParallelPlan(Protocol):
    """A module that declares its plan."""

    def parallel_plan(self) -> ParallelPlan:
        """The plan of this module."""
        ...


def default_plan(model: nn.Module) -> ParallelPlan:
    """For a model that declares none: every entry of its `nn.ModuleList`s is a unit, every `ExpertLayer` is sparse."""
    units: list[nn.Module] = []
    for module in model.modules():
        inside = any(module is part for unit in units for part in unit.modules())
        if isinstance(module, nn.ModuleList) and not inside:
            units += [entry for entry in module if any(True for _ in entry.parameters())]
    experts = [m for m in model.modules() if isinstance(m, nn.Module) and isinstance(m, ExpertLayer)]
    return ParallelPlan(units, experts, checkpointed=units)

"""Divides a model over a mesh: experts over the expert axis, everything over FSDP2 units, gradients as plain sums.

Sums, because means would be wrong for experts: the all-to-all has already added up what P ranks contributed, and FSDP
averages over fewer ranks than for dense parameters. Who owns the loss scales the gradients once. (The divide factor 1
is also immune to torch 2.13 dividing twice where an FSDP group has one rank and sums are forced.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from lit_interns1.nn.moe.agreement import RowAgreement
from lit_interns1.nn.moe.all_to_all import AllToAllDispatcher
from lit_interns1.nn.moe.deep_ep import DeepEPDispatcher, SharedBuffer
from lit_interns1.nn.moe.dispatch import TokenDispatcher
from lit_interns1.nn.moe.router import Router
from lit_interns1.nn.moe.static_split import StaticSplitDispatcher
from lit_interns1.nn.parallel_plan import ExpertLayer, ParallelPlan
from lit_interns1.strategies.parallel_dims import Meshes, ParallelDims

DispatcherName = Literal["auto", "exact", "static", "deepep"]
"""How tokens travel: "static" needs no sizes, for grouped routers with whole groups on each rank; "exact" exchanges
them, for any router; "auto": static where it can be, else exact; "deepep": DeepEP's kernels."""


@dataclass(frozen=True)
class Precision:
    """Types of FSDP2 units; parameters and optimizer state stay in their own.

    Args:
        compute: Parameters are gathered, and computed with, in this type. None: their own.
        reduce: Gradients are summed over ranks in this type. None: their own.
    """

    compute: torch.dtype | None = None
    reduce: torch.dtype | None = None

    def policy(self) -> MixedPrecisionPolicy:
        """For most units."""
        return MixedPrecisionPolicy(param_dtype=self.compute, reduce_dtype=self.reduce)

    def float32_policy(self) -> MixedPrecisionPolicy:
        """For units that compute in float32 and are given inputs as they are."""
        return MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=self.reduce, cast_forward_inputs=False)


class Dispatchers:
    """Makes the dispatchers of the layers whose experts live on one axis, and holds what they share.

    Args:
        name: Which; see `DispatcherName`.
        group: The ranks of the axis.

    Raises:
        ValueError: If the name is unknown.
    """

    def __init__(self, name: DispatcherName, group: dist.ProcessGroup) -> None:
        if name not in get_args(DispatcherName):
            raise ValueError(f"dispatcher = {name!r} is unknown: choose one of {', '.join(get_args(DispatcherName))}")
        self.name, self.group, self.ranks = name, group, dist.get_world_size(group)
        self._agreement: RowAgreement | None = None
        self._buffer: SharedBuffer | None = None

    def make(self, layer: ExpertLayer, name: str, num_experts: int) -> TokenDispatcher:
        """For one layer.

        Raises:
            ValueError: If "static" is asked for where ranks do not hold whole groups of a grouped router.
            ImportError: If "deepep" is asked for and cannot run here.
        """
        router = getattr(layer, "router", None)
        groups = router.num_groups if isinstance(router, Router) else 1
        whole = groups > 1 and groups % self.ranks == 0
        if self.name == "static" and not whole:
            problem = (
                f"num_groups = {groups} of {name} is not divisible by expert_parallel_size = {self.ranks}"
                if groups > 1
                else f"{name} has no grouped router, and expert_parallel_size = {self.ranks}"
            )
            raise ValueError(f'dispatcher = "static" needs whole groups per rank: {problem}')
        if self.name == "deepep":
            self._buffer = self._buffer or SharedBuffer(self.group)
            return DeepEPDispatcher(num_experts, self._buffer)
        if whole and self.name != "exact":
            if self._agreement is None and dist.get_backend(self.group) != "fake":  # nobody is there to agree with
                self._agreement = RowAgreement(self.group)
            return StaticSplitDispatcher(num_experts, self.group, self._agreement)
        return AllToAllDispatcher(num_experts, self.group)

    def watch(self, model: nn.Module) -> None:
        """Tells the layers' agreement when a forward pass of the model begins and ends."""
        if self._agreement is not None:
            self._agreement.watch(model)


def shard_experts(layer: ExpertLayer, name: str, meshes: Meshes, dims: ParallelDims, dispatchers: Dispatchers) -> None:
    """Leaves each rank of the expert axis its part of the experts, and lets tokens travel.

    Raises:
        ValueError: If the experts do not divide, a parameter has another first dimension than the others, or the
            dispatcher does not suit the layer.
        ImportError: If the dispatcher cannot run here.
    """
    experts = layer.experts
    counts = {parameter.shape[0] if parameter.ndim else 0 for parameter in experts.parameters()}
    if len(counts) != 1:
        raise ValueError(f"parameters of {name}.experts must all have the experts as first dimension, got {counts}")
    (num_experts,) = counts
    dims.check_experts(num_experts, name)
    if dims.expert_parallel_size == 1:
        return
    layer.dispatcher = dispatchers.make(layer, name, num_experts)
    axis = meshes.expert
    size, rank = num_experts // axis.size(), axis.get_local_rank()
    for module in experts.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            local = parameter.detach()[rank * size : (rank + 1) * size].clone()
            shared = DTensor.from_local(local, axis, [Shard(0)], run_check=False)
            module.register_parameter(key, nn.Parameter(shared, requires_grad=parameter.requires_grad))


def parallelize(
    model: nn.Module, plan: ParallelPlan, meshes: Meshes, dims: ParallelDims, precision: Precision | None = None,
    reshard_after_forward: bool = True, dispatcher: DispatcherName = "auto",
) -> None:  # fmt: skip
    """Makes `model` and its units FSDP2 modules, in place. Works on the meta device and on real weights that are equal
    on all ranks.

    Args:
        model: The root unit: its `forward` is what a step calls.
        plan: What the model declares.
        meshes: From `dims.build_meshes`.
        dims: Sizes of the axes.
        precision: Types of the units.
        reshard_after_forward: Give gathered parameters back after forward and gather them again for backward; the last
            unit always keeps them.
        dispatcher: How tokens travel to experts on other ranks.

    Raises:
        ValueError: If experts do not divide, or the dispatcher does not suit a layer.
        ImportError: If the dispatcher cannot run here.
    """
    precision = precision or Precision()
    dispatchers = Dispatchers(dispatcher, meshes.expert.get_group())
    names = {module: name for name, module in model.named_modules()}
    for layer in plan.expert_layers:
        assert isinstance(layer, ExpertLayer)
        shard_experts(layer, names[layer], meshes, dims, dispatchers)
        experts = layer.experts
        first = next(experts.parameters())
        # ranks would hold nothing where there are more of them than experts: divide the second dimension instead
        by_rows = dims.shards > first.shape[0]
        fully_shard(
            experts, mesh=meshes.expert_part, mp_policy=precision.policy(), reshard_after_forward=reshard_after_forward,
            shard_placement_fn=(lambda parameter: Shard(1)) if by_rows else None,
        )  # fmt: skip
    dispatchers.watch(model)
    if precision.compute not in (None, torch.float32):
        for module in plan.float32:
            fully_shard(module, mesh=meshes.dense, mp_policy=precision.float32_policy(), reshard_after_forward=False)
    units = [[unit] if isinstance(unit, nn.Module) else list(unit) for unit in plan.units]
    for number, unit in enumerate(units):
        keep = number == len(units) - 1
        fully_shard(
            unit,
            mesh=meshes.dense,
            mp_policy=precision.policy(),
            reshard_after_forward=reshard_after_forward and not keep,
        )
    fully_shard(model, mesh=meshes.dense, mp_policy=precision.policy(), reshard_after_forward=False)
    for unit_module in fsdp_modules(model):
        unit_module.set_gradient_divide_factor(1.0)
        unit_module.set_force_sum_reduction_for_comms(True)
    _prefetch([unit[0] for unit in units])


def _prefetch(units: Sequence[nn.Module]) -> None:
    """While a unit computes, the next one is gathered, with its experts: the host waits for sizes in between, so FSDP's
    own order would come too late."""
    groups = [[unit, *(m for m in unit.modules() if isinstance(m, FSDPModule) and m is not unit)] for unit in units]
    for present, following in pairwise(groups):
        _fsdp(present[0]).set_modules_to_forward_prefetch([_fsdp(m) for m in following])
        _fsdp(following[0]).set_modules_to_backward_prefetch([_fsdp(m) for m in reversed(present)])


def _fsdp(module: nn.Module) -> FSDPModule:
    assert isinstance(module, FSDPModule)
    return module


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    """All FSDP2 units of a model."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

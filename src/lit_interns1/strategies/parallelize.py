"""Divides a model over a mesh: experts over the expert axis, everything over FSDP2 units, gradients as plain sums.

Sums, because means would be wrong for experts: the all-to-all has already added up what P ranks contributed, and FSDP
averages over fewer ranks than for dense parameters. Who owns the loss scales the gradients once. (The divide factor 1
is also immune to torch 2.13 dividing twice where an FSDP group has one rank and sums are forced.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from lit_interns1.nn.moe.all_to_all import AllToAllDispatcher
from lit_interns1.nn.parallel_plan import ExpertLayer, ParallelPlan
from lit_interns1.strategies.parallel_dims import Meshes, ParallelDims


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


def shard_experts(layer: ExpertLayer, name: str, meshes: Meshes, dims: ParallelDims) -> None:
    """Leaves each rank of the expert axis its part of the experts, and lets tokens travel.

    Raises:
        ValueError: If the experts do not divide, or a parameter has another first dimension than the others.
    """
    experts = layer.experts
    counts = {parameter.shape[0] if parameter.ndim else 0 for parameter in experts.parameters()}
    if len(counts) != 1:
        raise ValueError(f"parameters of {name}.experts must all have the experts as first dimension, got {counts}")
    (num_experts,) = counts
    dims.check_experts(num_experts, name)
    if dims.expert_parallel_size == 1:
        return
    axis = meshes.expert
    size, rank = num_experts // axis.size(), axis.get_local_rank()
    for module in experts.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            local = parameter.detach()[rank * size : (rank + 1) * size].clone()
            shared = DTensor.from_local(local, axis, [Shard(0)], run_check=False)
            module.register_parameter(key, nn.Parameter(shared, requires_grad=parameter.requires_grad))
    layer.dispatcher = AllToAllDispatcher(num_experts, axis.get_group())


def parallelize(
    model: nn.Module, plan: ParallelPlan, meshes: Meshes, dims: ParallelDims, precision: Precision | None = None,
    reshard_after_forward: bool = True,
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
    """
    precision = precision or Precision()
    names = {module: name for name, module in model.named_modules()}
    for layer in plan.expert_layers:
        assert isinstance(layer, ExpertLayer)
        shard_experts(layer, names[layer], meshes, dims)
        experts = layer.experts
        first = next(experts.parameters())
        # ranks would hold nothing where there are more of them than experts: divide the second dimension instead
        by_rows = dims.shards > first.shape[0]
        fully_shard(
            experts, mesh=meshes.expert_part, mp_policy=precision.policy(), reshard_after_forward=reshard_after_forward,
            shard_placement_fn=(lambda parameter: Shard(1)) if by_rows else None,
        )  # fmt: skip
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

"""What a run says when it starts: the meshes, and what each rank holds of the model."""

from __future__ import annotations

from torch import nn
from torch.distributed.tensor import DTensor

from lit_interns1.nn.parallel_plan import ExpertLayer
from lit_interns1.strategies.parallel_dims import ParallelDims
from lit_interns1.strategies.parallelize import local
from lit_interns1.training.units import with_unit


def layout_summary(module: nn.Module, dims: ParallelDims) -> str:
    """Two lines: the sizes of the axes, and parameters in all, active per token, and on this rank.

    Args:
        module: Divided, with whole shapes (DTensors).
        dims: Sizes of the axes.

    A layer's active share is known where its router has `experts_per_token` and `num_experts`.
    """
    total = sum(parameter.numel() for parameter in module.parameters())
    here = sum(local(parameter).numel() for parameter in module.parameters())
    experts = idle = 0
    for layer in module.modules():
        if not isinstance(layer, ExpertLayer):
            continue
        held = sum(parameter.numel() for parameter in layer.experts.parameters())
        experts += held
        router = getattr(layer, "router", None)
        chosen, among = getattr(router, "experts_per_token", None), getattr(router, "num_experts", None)
        if chosen and among:
            idle += held // among * (among - chosen)
    divided = sum(isinstance(parameter, DTensor) for parameter in module.parameters())
    return (
        f"{dims.world_size} ranks = {dims.replicate_size} × {dims.shards} (replicate × shard), "
        f"shard = {dims.expert_shard_size} × {dims.expert_parallel_size} (expert shard × expert parallel)\n"
        f"{with_unit(total)} parameters ({with_unit(experts)} in experts), {with_unit(total - idle)} active per token; "
        f"{with_unit(here)} on this rank, {divided} tensors divided"
    )

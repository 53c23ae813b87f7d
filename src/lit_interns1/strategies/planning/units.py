"""Bytes that FSDP2 moves and holds for any layout, from the shapes of the parameters alone.

    a parameter with first dimension d over S ranks:   each holds ⌈d/S⌉ rows, S·⌈d/S⌉ rows travel (the rest is padding)
    all-gather       A · (1, or 2 where units are given back after forward)        in the compute type
    reduce-scatter   1 per optimizer step                                          in the type of sums
    all-reduce       1 per optimizer step, of a rank's part, where there are replicas

Experts: E/P of them on each rank of the expert axis, over X = S/P ranks; by rows where ranks outnumber experts.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import ceil, prod

import torch
from torch import nn

from lit_interns1.strategies.moe_parallel import roots
from lit_interns1.strategies.parallel_dims import ParallelDims
from lit_interns1.strategies.parallelize import Precision
from lit_interns1.strategies.planning.recorder import DENSE, EXPERTS, Kind


@dataclass(frozen=True)
class _Parameter:
    """One parameter and how its unit behaves.

    Attributes:
        shape: Of the whole parameter.
        itemsize: Bytes of an element as it is kept.
        is_expert: Routed experts.
        given_back: Its unit may be given back after forward.
        is_float32: Its unit is gathered in float32.
    """

    shape: tuple[int, ...]
    itemsize: int
    is_expert: bool
    given_back: bool
    is_float32: bool


@dataclass(frozen=True)
class ShardedBytes:
    """Of one rank.

    Attributes:
        resident: Its parts of the parameters.
        kept: Parameters that stay gathered after forward, with their padding.
        whole_gradients: Gradients of all that is gathered, before they are exchanged.
        payload: Of one micro-batch ("all-gather") and one optimizer step (the others) by kind.
    """

    resident: int
    kept: int
    whole_gradients: int
    payload: Counter[Kind]


class UnitTable:
    """The parameters of a module by unit.

    Args:
        module: Built on the meta device and not divided.
        precision: Types of the units.
    """

    def __init__(self, module: nn.Module, precision: Precision) -> None:
        self.precision = precision
        self.rows: list[_Parameter] = []
        for model, plan in roots(module):
            experts = {id(p) for layer in plan.expert_layers for p in layer.experts.parameters()}  # type: ignore[union-attr]
            computes_low = precision.compute not in (None, torch.float32)
            wide = {id(p) for part in plan.float32 for p in part.parameters()} if computes_low else set()
            last = plan.units[-1]
            parts = [last] if isinstance(last, nn.Module) else list(last)
            inside = {id(p) for unit in plan.units for part in ([unit] if isinstance(unit, nn.Module) else unit)
                      for p in part.parameters()}  # fmt: skip
            last_ids = {id(p) for part in parts for p in part.parameters()}
            for p in model.parameters():
                given_back = id(p) in experts or (id(p) in inside and id(p) not in last_ids and id(p) not in wide)
                self.rows.append(_Parameter(tuple(p.shape), p.itemsize, id(p) in experts, given_back, id(p) in wide))

    def bytes_of(self, dims: ParallelDims, reshard_after_forward: bool) -> ShardedBytes:
        """For a layout."""
        payload: Counter[Kind] = Counter()
        resident = kept = whole = 0
        for row in self.rows:
            ranks = dims.expert_shard_size if row.is_expert else dims.shards
            shape = list(row.shape)
            stride = 1
            by_rows = row.is_expert and dims.shards > row.shape[0]
            if row.is_expert:
                shape[0] //= dims.expert_parallel_size
                stride = dims.expert_parallel_size
            axis = 1 if by_rows else 0
            part = list(shape)
            part[axis] = ceil(shape[axis] / ranks)
            mine = prod(part)
            compute = torch.float32 if row.is_float32 else self.precision.compute
            gathered = mine * ranks * (compute.itemsize if compute is not None else row.itemsize)
            reduce_size = self.precision.reduce.itemsize if self.precision.reduce is not None else row.itemsize
            resident += mine * row.itemsize
            whole += prod(shape) * reduce_size
            back = row.given_back and reshard_after_forward
            kept += 0 if back else gathered
            purpose = EXPERTS if row.is_expert else DENSE
            if ranks > 1:
                payload[Kind("all-gather", purpose, ranks, stride)] += gathered * (2 if back else 1)
                payload[Kind("reduce-scatter", purpose, ranks, stride)] += mine * ranks * reduce_size
            if dims.replicate_size > 1:
                payload[Kind("all-reduce", purpose, dims.replicate_size, dims.shards)] += mine * reduce_size
        return ShardedBytes(resident, kept, whole, payload)

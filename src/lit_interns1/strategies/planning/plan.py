"""What a training run costs each of N ranks, found out before any of them exists.

    cost(layers) = cost(one layer of each kind) + Σ over kinds (number − 1) · cost of one more

Costs come from the real code on shapes (`count_step`), at one and at two layers of a kind; all layers of a kind are
alike, so the sum is exact but for working memory, which is the larger of the two. The whole model is built once on the
meta device, and its number of parameters must come out.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

from lightning.pytorch import LightningModule

from lit_interns1.models import LanguageModelConfig
from lit_interns1.strategies.moe_parallel import MoEParallelStrategy
from lit_interns1.strategies.parallel_dims import ParallelDims
from lit_interns1.strategies.planning.bounds import Bounds, bounds_of
from lit_interns1.strategies.planning.fake_world import fake_world
from lit_interns1.strategies.planning.hardware import Hardware
from lit_interns1.strategies.planning.step import StepCost, build, count_step, synthetic_batch
from lit_interns1.training import GlobalBatch

EXACT_LAYERS = 2
"""Models with at most this many layers of each kind are counted as they are."""


@dataclass(frozen=True)
class Workload:
    """What is trained on.

    Attributes:
        row_length: Tokens of a row.
        micro_batch_rows: Rows of one forward pass on one rank.
        rows_per_step: Rows of an optimizer step over all ranks.
        clip: `gradient_clip_val`, or None.
    """

    row_length: int
    micro_batch_rows: int
    rows_per_step: int
    clip: float | None = None


@dataclass(frozen=True)
class Plan:
    """The answer.

    Attributes:
        dims: Sizes of the axes.
        workload: What is trained on.
        hardware: On what.
        accumulation: Micro-batches per optimizer step.
        cost: Of one rank.
        bounds: Least times of an optimizer step.
        basis: How `cost` was found, for the report.
        dispatch_is_counted: Whether sizes of the token dispatch follow from the code; else they are by formula.
    """

    dims: ParallelDims
    workload: Workload
    hardware: Hardware
    accumulation: int
    cost: StepCost
    bounds: Bounds
    basis: str
    dispatch_is_counted: bool

    @property
    def peak(self) -> int:
        """Bytes that suffice on a rank: all parts together, as if each were largest at the same time."""
        return sum(self.cost.memory.values())

    @property
    def fits(self) -> bool:
        """Whether the device has as much memory."""
        return self.peak <= self.hardware.memory

    @property
    def tokens_per_second(self) -> float:
        """Of one rank, at most."""
        tokens = self.accumulation * self.workload.micro_batch_rows * self.workload.row_length
        return tokens / self.bounds.step

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for machines."""
        dims = self.dims
        return {
            "world_size": dims.world_size,
            "replicate_size": dims.replicate_size,
            "shard_size": dims.shards,
            "expert_parallel_size": dims.expert_parallel_size,
            "hardware": vars(self.hardware),
            "workload": {**vars(self.workload), "accumulation": self.accumulation},
            "parameters": {"total": self.cost.parameters, "per_rank": self.cost.local_parameters},
            "memory_bytes": {**self.cost.memory, "peak": self.peak},
            "fits": self.fits,
            "collectives": [
                {**kind._asdict(), "calls": calls, "payload_bytes": self.cost.payload[kind], "how": self.how(kind)}
                for kind, calls in self.cost.calls.items()
            ],
            "flops": self.cost.flops,
            "bound_seconds": {**vars(self.bounds), "step": self.bounds.step, "limit": self.bounds.limit},
            "bound_tokens_per_second_per_rank": self.tokens_per_second,
            "basis": self.basis,
        }

    def how(self, kind: Any) -> str:
        """ "counted" or "formula"."""
        return "counted" if self.dispatch_is_counted or kind.operation != "all-to-all" else "formula"


def with_layers(module: LightningModule, layers: list[int], **changes: Any) -> LightningModule:
    """A module that is not built yet, with some of the layers of its `config`, by their indices.

    Args:
        module: With a `LanguageModelConfig` as `config`.
        layers: Indices in ascending order.
        changes: Other fields of the config.
    """
    config: LanguageModelConfig = module.config  # type: ignore[assignment]
    dense = tuple(number for number, layer in enumerate(layers) if not config.is_moe_layer(layer))
    other = copy.deepcopy(module)
    dense_layers = dense if config.moe is not None else ()
    other.config = replace(config, num_layers=len(layers), dense_layers=dense_layers, **changes)  # type: ignore[assignment]
    return other


def layer_kinds(config: LanguageModelConfig) -> list[list[int]]:
    """Indices of the layers that are alike: sparse ones, dense ones."""
    kinds = [[i for i in range(config.num_layers) if config.is_moe_layer(i) == sparse] for sparse in (True, False)]
    return [kind for kind in kinds if kind]


def total_parameters(module: LightningModule, strategy: MoEParallelStrategy) -> int:
    """Parameters of the whole model, built on the meta device."""
    whole = copy.deepcopy(module)
    build(whole, strategy)
    return sum(parameter.numel() for parameter in whole.parameters())


def count(
    module: LightningModule, strategy: MoEParallelStrategy, dims: ParallelDims, workload: Workload, accumulation: int
) -> tuple[StepCost, bool, str]:
    """The cost of one optimizer step, whether the dispatch was counted, and how layers were counted."""
    batch = synthetic_batch(workload.micro_batch_rows, workload.row_length)

    def counted(one: LightningModule) -> tuple[StepCost, bool]:
        return count_step(one, copy.copy(strategy), dims, batch, accumulation, workload.clip)

    config = getattr(module, "config", None)
    kinds = layer_kinds(config) if isinstance(config, LanguageModelConfig) else []
    with fake_world(dims.world_size):
        if all(len(kind) <= EXACT_LAYERS for kind in kinds):
            cost, exact = counted(copy.deepcopy(module))
            return cost, exact, "counted on the whole model"
        base_layers = [kind[0] for kind in kinds]
        base, exact = counted(with_layers(module, sorted(base_layers)))
        cost, working = base, base.memory["working memory"]
        for kind in kinds:
            if len(kind) == 1:
                continue
            more, _ = counted(with_layers(module, sorted([*base_layers, kind[1]])))
            working = max(working, more.memory["working memory"])
            cost = cost.plus(more.plus(base, -1), len(kind) - 1)
        cost.memory["working memory"] = working
    total = total_parameters(module, strategy)
    if total != cost.parameters:
        raise RuntimeError(f"layers are not alike: {cost.parameters} parameters by layers, {total} in the whole model")
    depths = " and ".join(str(n) for n in (len(kinds), len(kinds) + 1))
    return cost, exact, f"counted on {depths} layers, linear in the {config.num_layers} layers"  # type: ignore[union-attr]


def make_plan(
    module: LightningModule, strategy: MoEParallelStrategy, dims: ParallelDims, workload: Workload, hardware: Hardware
) -> Plan:
    """Plans a run. The module is copied, and not built.

    Args:
        module: Whose `training_step` takes a `PackedBatch`; with a `LanguageModelConfig` as `config` it is counted by
            layers, else as a whole.
        strategy: For its precision and options.
        dims: Sizes of the axes.
        workload: Rows and their length.
        hardware: For the bounds.

    Raises:
        ValueError: If rows or experts do not divide.
        RuntimeError: If this process has a process group already.
    """
    batch = GlobalBatch(workload.rows_per_step, workload.micro_batch_rows, dims.world_size)
    cost, exact, basis = count(module, strategy, dims, workload, batch.accumulation)
    return Plan(dims, workload, hardware, batch.accumulation, cost, bounds_of(cost, hardware), basis, exact)

"""The best layouts for a number of ranks, by formula from a few counted steps, then counted.

    layouts: R·S = N, P | S, P | E; units given back after forward or kept; blocks recomputed or not; rows m | B/N
    per layer and row, for P ranks that share experts:   c(P) = a + b·V(P),   V = source rows that reach a rank
    bytes of FSDP2: by the shapes of the parameters (`UnitTable`)

a and b come from steps counted on one layer in small worlds. What fits is ranked by the bound on seconds per token; the
first few are then counted in full, since formulas for working memory are rough.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from lightning.pytorch import LightningModule

from lit_interns1.models import LanguageModelConfig
from lit_interns1.strategies.moe_parallel import MoEParallelStrategy
from lit_interns1.strategies.parallel_dims import ParallelDims
from lit_interns1.strategies.planning.bounds import Bounds, bounds_of
from lit_interns1.strategies.planning.fake_world import fake_world
from lit_interns1.strategies.planning.hardware import Hardware
from lit_interns1.strategies.planning.plan import Workload, layer_kinds, with_layers
from lit_interns1.strategies.planning.recorder import TOKENS, Kind
from lit_interns1.strategies.planning.step import StepCost, build, count_step, synthetic_batch
from lit_interns1.strategies.planning.units import UnitTable

MAX_EXPERT_PARALLEL = 64
"""Tokens that travel over more ranks than this cost more than gathering experts does; each size is a counted step."""


@dataclass(frozen=True)
class Layout:
    """One way to run.

    Attributes:
        dims: Sizes of the axes.
        reshard_after_forward: Of the strategy.
        activation_checkpointing: Of the model.
        micro_batch_rows: Of the data.
    """

    dims: ParallelDims
    reshard_after_forward: bool
    activation_checkpointing: str
    micro_batch_rows: int


@dataclass(frozen=True)
class Candidate:
    """A layout and what it costs, by formula."""

    layout: Layout
    cost: StepCost
    bounds: Bounds
    accumulation: int

    @property
    def peak(self) -> int:
        """Bytes on a rank."""
        return sum(self.cost.memory.values())


def divisors(number: int) -> list[int]:
    """In ascending order."""
    return [d for d in range(1, number + 1) if number % d == 0]


def layouts(world_size: int, num_experts: int, rows_per_rank: int) -> Iterator[Layout]:
    """All layouts of a world.

    Args:
        world_size: N.
        num_experts: E, 1 without experts.
        rows_per_rank: Rows of an optimizer step on one rank; micro-batches divide it.
    """
    for replicas in divisors(world_size):
        shards = world_size // replicas
        for experts in divisors(num_experts):
            if shards % experts or experts > MAX_EXPERT_PARALLEL:
                continue
            dims = ParallelDims(world_size, shards, replicas, experts)
            for reshard in (True, False):
                for checkpointing in ("none", "block"):
                    for rows in divisors(rows_per_rank):
                        yield Layout(dims, reshard, checkpointing, rows)


class CostModel:
    """Costs by formula, from steps counted on one layer of each kind in worlds of a few ranks.

    Args:
        module: With a `LanguageModelConfig` as `config`, not built.
        strategy: Its options, sizes apart.
        workload: Its row length, clip and optimizer-step rows.
    """

    def __init__(self, module: LightningModule, strategy: MoEParallelStrategy, workload: Workload) -> None:
        if not isinstance(getattr(module, "config", None), LanguageModelConfig):
            raise ValueError(f"--search needs a module with a LanguageModelConfig, got {type(module).__name__}")
        # recomputation is one of the things that layouts differ in
        self.module, self.strategy, self.workload = module, copy.copy(strategy), workload
        self.strategy.activation_checkpointing = False
        self.config: LanguageModelConfig = module.config  # type: ignore[assignment]
        whole = copy.deepcopy(module)
        build(whole, strategy)
        self.units = UnitTable(whole, strategy.precision)
        self.parameters = sum(parameter.numel() for parameter in whole.parameters())
        one = self._count([self.kinds[0][0]], 1, "none")
        two_rows = self._count([self.kinds[0][0]], 1, "none", rows=2)
        self._state_ratio = one.memory["optimizer state"] / one.memory["parameters"]
        self._rows_grow = max(two_rows.memory["working memory"] - one.memory["working memory"], 0)
        self._fixed_activations = 2 * one.memory["activations"] - two_rows.memory["activations"]
        """Saved whatever the rows are: the gradient that the head makes in forward."""
        twice = [self.kinds[0][0], self.kinds[0][min(1, len(self.kinds[0]) - 1)]]
        self._frame = one.plus(self._count(twice, 1, "none").plus(one, -1), -1)
        """What does not depend on depth: embedding, head, loss, and the state of an optimizer for them."""
        self._parts: dict[tuple[int, str], StepCost] = {}

    @property
    def kinds(self) -> list[list[int]]:
        """Indices of the layers that are alike."""
        return layer_kinds(self.config)

    def _count(self, layers: list[int], experts: int, checkpointing: str, rows: int = 1) -> StepCost:
        module = with_layers(self.module, sorted(layers), activation_checkpointing=checkpointing)
        dims = ParallelDims(experts, "auto", 1, experts)
        batch = synthetic_batch(rows, self.workload.row_length)
        with fake_world(experts):
            return count_step(module, copy.copy(self.strategy), dims, batch, 1, self.workload.clip)[0]

    def per_row(self, experts: int, checkpointing: str) -> StepCost:
        """The whole model for one row per rank; what FSDP2 moves and holds is not meant."""
        key = (experts, checkpointing)
        if key not in self._parts:
            total, working = self._frame, 0
            for kind in self.kinds:
                ranks = experts if self.config.is_moe_layer(kind[0]) else 1
                one = self._count([kind[0]], ranks, checkpointing)
                working = max(working, one.memory["working memory"])
                total = total.plus(one.plus(self._frame, -1), len(kind))
            total.memory["working memory"] = working
            self._parts[key] = total
        return self._parts[key]

    def cost(self, layout: Layout, accumulation: int) -> StepCost:
        """Of one optimizer step on one rank."""
        dims, rows = layout.dims, layout.micro_batch_rows
        per_row = self.per_row(dims.expert_parallel_size, layout.activation_checkpointing)
        held = self.units.bytes_of(dims, layout.reshard_after_forward)
        payload: Counter[Kind] = Counter()
        for kind, size in held.payload.items():
            payload[kind] = size * (accumulation if kind.operation == "all-gather" else 1)
        for kind, size in per_row.payload.items():
            if kind.purpose == TOKENS:
                payload[kind] = size * rows * accumulation
        memory = Counter(
            {
                "parameters": held.resident,
                "buffers": per_row.memory["buffers"],
                "gradients": held.resident,
                "optimizer state": round(self._state_ratio * held.resident),
                "activations": self._fixed_activations
                + rows * (per_row.memory["activations"] - self._fixed_activations),
                "kept units": held.kept,
                "accumulated gradients": held.whole_gradients if accumulation > 1 else 0,
                "working memory": per_row.memory["working memory"] + (rows - 1) * self._rows_grow,
            }
        )
        return StepCost(
            memory, Counter(), payload, per_row.flops * rows * accumulation, self.parameters,
            held.resident // self.units.rows[0].itemsize,
        )  # fmt: skip


def search(
    module: LightningModule, strategy: MoEParallelStrategy, world_size: int, workload: Workload, hardware: Hardware
) -> list[Candidate]:
    """Layouts that fit, the best first.

    Raises:
        ValueError: If the rows of an optimizer step do not divide over the ranks, or nothing fits.
    """
    if workload.rows_per_step % world_size:
        raise ValueError(
            f"the global batch of {workload.rows_per_step} rows must be a multiple of the {world_size} ranks"
        )
    per_rank = workload.rows_per_step // world_size
    model = CostModel(module, strategy, workload)
    experts = model.config.moe.num_experts if model.config.moe is not None else 1
    found: list[Candidate] = []
    tightest: Candidate | None = None
    for layout in layouts(world_size, experts, per_rank):
        accumulation = per_rank // layout.micro_batch_rows
        cost = model.cost(layout, accumulation)
        candidate = Candidate(layout, cost, bounds_of(cost, hardware), accumulation)
        if tightest is None or candidate.peak < tightest.peak:
            tightest = candidate
        if candidate.peak <= hardware.memory:
            found.append(candidate)
    if not found:
        assert tightest is not None
        raise ValueError(
            f"no layout of {world_size} ranks fits in {hardware.memory / 1e9:g} GB: the smallest needs "
            f"{tightest.peak / 1e9:.1f} GB"
        )
    return sorted(found, key=lambda c: (c.bounds.step, c.peak))


def with_layout(
    module: LightningModule, strategy: MoEParallelStrategy, workload: Workload, layout: Layout
) -> tuple[LightningModule, MoEParallelStrategy, Workload]:
    """What `make_plan` needs to count a layout that was found."""
    config: LanguageModelConfig = module.config  # type: ignore[assignment]
    changed = with_layers(
        module, list(range(config.num_layers)), activation_checkpointing=layout.activation_checkpointing
    )
    other = copy.copy(strategy)
    other.reshard_after_forward, other.activation_checkpointing = layout.reshard_after_forward, False
    return changed, other, replace(workload, micro_batch_rows=layout.micro_batch_rows)

"""One optimizer step of a LightningModule in a fake world, by the strategy's own parts, and what it costs one rank.

    A micro-batches: forward, backward (gradients are exchanged in the last one), scaling, clipping, optimizer

Two micro-batches stand for any larger number: all but the last cost the same.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils._pytree import tree_leaves

from lit_interns1.data.packed_batch import PackedBatch
from lit_interns1.nn.head import LanguageModelHead
from lit_interns1.nn.moe.all_to_all import AllToAllDispatcher
from lit_interns1.nn.moe.router import Router
from lit_interns1.strategies import gradients
from lit_interns1.strategies.moe_parallel import MoEParallelStrategy
from lit_interns1.strategies.parallel_dims import ParallelDims
from lit_interns1.strategies.parallelize import local
from lit_interns1.strategies.planning.fake_world import KnownValues, fake_mode
from lit_interns1.strategies.planning.memory import StorageEvents
from lit_interns1.strategies.planning.recorder import Counts, Kind, StepRecorder
from lit_interns1.strategies.planning.uniform_routing import UniformRouting, visit_probability
from lit_interns1_kernels import linear_token_scores

_HEAD_BYTES, _HEAD_TILE_BYTES = 512 << 20, 128 << 20


@dataclass
class StepCost:
    """What one rank does and holds; a sum of costs of parts, so that costs of models of two depths give any depth.

    Attributes:
        memory: Bytes by what they are for: "parameters", "buffers", "gradients", "optimizer state", "activations",
            "kept units" (parameters that stay gathered after forward), "accumulated gradients" (whole ones, while
            micro-batches are added up), "working memory" (the most of everything else at one time).
        calls: Collectives of one optimizer step by kind.
        payload: Their bytes.
        flops: Floating-point operations of one optimizer step.
        parameters: Parameters of the whole model.
        local_parameters: Parameters on this rank.
    """

    memory: Counter[str] = field(default_factory=Counter)
    calls: Counter[Kind] = field(default_factory=Counter)
    payload: Counter[Kind] = field(default_factory=Counter)
    flops: float = 0.0
    parameters: int = 0
    local_parameters: int = 0

    def plus(self, other: StepCost, times: int = 1) -> StepCost:
        """The sum with `times` another one."""
        result = StepCost(
            Counter(self.memory), Counter(self.calls), Counter(self.payload),
            self.flops + times * other.flops,
            self.parameters + times * other.parameters,
            self.local_parameters + times * other.local_parameters,
        )  # fmt: skip
        for name, size in other.memory.items():
            result.memory[name] += times * size
        for kind, number in other.calls.items():
            result.calls[kind] += times * number
            result.payload[kind] += times * other.payload[kind]
        return result


def synthetic_batch(rows: int, row_length: int) -> PackedBatch:
    """A micro-batch in which every row is one document and every position has a label."""
    tokens = rows * row_length
    return PackedBatch(
        input_ids=torch.zeros(tokens, dtype=torch.int64),
        labels=torch.zeros(tokens, dtype=torch.int64),
        position_ids=torch.arange(row_length).repeat(rows),
        cu_seqlens=torch.arange(rows + 1, dtype=torch.int32) * row_length,
        sample_id_T=torch.arange(rows).repeat_interleave(row_length),
        num_rows=rows, num_tokens=tokens, num_loss_tokens=tokens, max_seqlen=row_length,
    )  # fmt: skip


def divide(module: LightningModule, strategy: MoEParallelStrategy, dims: ParallelDims) -> bool:
    """Divides a module on the meta device as the strategy would, in the present (fake) process group.

    Returns:
        Whether the sizes of the token dispatch follow from the shapes (else they are those of uniform routing).
    """
    exact = True
    for plan in strategy.divide(module, dims.build_meshes("cpu"), dims):
        for layer in plan.expert_layers:
            dispatcher, router = layer.dispatcher, getattr(layer, "router", None)
            if type(dispatcher) is not AllToAllDispatcher:
                continue
            if not isinstance(router, Router):
                raise ValueError(f"the routing of {type(layer).__name__} is unknown: it has no Router of the kit")
            visited = visit_probability(
                router.num_experts, router.experts_per_token, router.num_groups, dispatcher.ranks
            )
            layer.dispatcher = UniformRouting(dispatcher.num_experts, dispatcher.group, visited)
            exact = exact and visited == 1.0
    return exact


@dataclass
class _Setting:
    """All of a Trainer that `configure_model` may ask before anything runs."""

    strategy: MoEParallelStrategy


def build(module: LightningModule, strategy: MoEParallelStrategy) -> None:
    """Makes the module's network, with parameters on the meta device."""
    module._trainer = _Setting(strategy)  # type: ignore[assignment]
    try:
        with torch.device("meta"):
            module.configure_model()
    finally:
        module._trainer = None
    if not all(parameter.is_meta for parameter in module.parameters()):
        module.to("meta")
        _tie(module)


def _tie(module: nn.Module) -> None:
    for part in module.modules():
        if callable(tie := getattr(part, "tie_weights", None)):
            tie()


@contextmanager
def _device_head(module: nn.Module) -> Iterator[None]:
    """The head works in chunks of the size that it has on a GPU, and adds to its weight's gradient in few tiles."""
    for head in (part for part in module.modules() if isinstance(part, LanguageModelHead)):
        if head.chunk_tokens is None:
            head.chunk_tokens = max(_HEAD_BYTES // (head.weight.shape[0] * 4), 1)
    usual = linear_token_scores._WEIGHT_TILE_BYTES
    linear_token_scores._WEIGHT_TILE_BYTES = _HEAD_TILE_BYTES
    try:
        yield
    finally:
        linear_token_scores._WEIGHT_TILE_BYTES = usual


def count_step(
    module: LightningModule, strategy: MoEParallelStrategy, dims: ParallelDims, batch: PackedBatch,
    accumulation: int, clip: float | None = None,
) -> tuple[StepCost, bool]:  # fmt: skip
    """Runs one optimizer step on shapes.

    Args:
        module: Not built yet; `configure_model` is called here, and may leave parameters on the meta device.
        strategy: Its precision and options; it is not set up otherwise.
        dims: Sizes of the axes; the fake process group must have as many ranks.
        batch: What `training_step` gets.
        accumulation: Micro-batches of the step.
        clip: `gradient_clip_val`.

    Returns:
        The cost, and whether the token dispatch was counted (else its sizes are by formula).
    """
    build(module, strategy)
    exact = divide(module, strategy, dims)
    strategy.dims, strategy.model = dims, module
    strategy.parallel_devices = [torch.device("cpu")]
    with (
        warnings.catch_warnings(), _device_head(module), fake_mode(), StorageEvents() as storages,
        StepRecorder(module) as recorder,
    ):  # fmt: skip
        warnings.simplefilter("ignore")
        module.to_empty(device="cpu")
        _tie(module)
        with KnownValues():
            cost = _Run(module, strategy, storages, recorder).step(batch, accumulation, clip)
    return cost, exact


class _Run:
    """The state of one step."""

    def __init__(
        self, module: LightningModule, strategy: MoEParallelStrategy, storages: StorageEvents, recorder: StepRecorder
    ) -> None:
        self.module, self.strategy, self.storages, self.recorder = module, strategy, storages, recorder
        self.parameters = list(module.parameters())
        self.resident = storages.register([*self.parameters, *module.buffers()])
        self.gathered: set[int] = set()
        self.kept: set[int] = set()
        self.saved: set[int] = set()
        self.accumulated: set[int] = set()
        self.memory: Counter[str] = Counter()

    def _note_gathered(self, unit: nn.Module, *_: Any) -> None:
        self.gathered |= self.storages.register(unit.parameters()) - self.resident

    def _bytes(self, numbers: set[int]) -> int:
        live = self.storages.live()
        return sum(live.get(number, 0) for number in numbers)

    def step(self, batch: PackedBatch, accumulation: int, clip: float | None) -> StepCost:
        self.memory["parameters"] = self._bytes(self.storages.register(self.parameters))
        self.memory["buffers"] = self._bytes(self.resident) - self.memory["parameters"]
        optimizers = self.module.configure_optimizers()
        if not isinstance(optimizers, torch.optim.Optimizer):
            raise ValueError(
                f"a plan needs one optimizer, {type(self.module).__name__}.configure_optimizers gave "
                f"{type(optimizers).__name__}"
            )
        hooks = [
            part.register_forward_pre_hook(self._note_gathered)
            for part in self.module.modules()
            if isinstance(part, FSDPModule)
        ]
        parts = [self._micro_batch(batch, accumulation, last=False)] if accumulation > 1 else []
        last = self._micro_batch(batch, accumulation, last=True)
        for hook in hooks:
            hook.remove()
        finished = self.storages.now
        final = self._finish(optimizers, clip)
        state = [leaf for leaf in tree_leaves(dict(optimizers.state)) if isinstance(leaf, Tensor)]
        self.memory["optimizer state"] = sum(local(t).numel() * local(t).element_size() for t in state)
        owned = self.resident | self.gradients
        in_passes = self.storages.peak(0, finished, owned | self.kept | self.saved | self.accumulated)
        in_optimizer = self.storages.peak(finished, self.storages.now, owned | self.storages.register(state))
        self.memory["working memory"] = max(in_passes, in_optimizer)
        total = StepCost(
            self.memory,
            parameters=sum(parameter.numel() for parameter in self.parameters),
            local_parameters=sum(local(parameter).numel() for parameter in self.parameters),
        )
        for counts, times in [*((part, accumulation - 1) for part in parts), (last, 1), (final, 1)]:
            total = total.plus(StepCost(calls=counts.calls, payload=counts.payload, flops=counts.flops), times)
        return total

    def _micro_batch(self, batch: PackedBatch, accumulation: int, last: bool) -> Counts:
        counts = self.recorder.counts = Counts()
        before = set(self.storages.live())
        output = self.module.training_step(batch, 0)
        loss = self.strategy.take_loss(output, accumulation)
        loss = loss["loss"] if isinstance(loss, dict) else loss
        if loss is None:
            raise ValueError(f"{type(self.module).__name__}.training_step gave no loss, so there is nothing to plan")
        live = set(self.storages.live())
        saved, kept = live - before - self.gathered - self.resident, live & self.gathered
        self.kept |= kept
        self.memory["kept units"] = max(self.memory["kept units"], self._bytes(kept))
        self.memory["activations"] = max(self.memory["activations"], self._bytes(saved))
        self.saved |= saved
        del output
        if last:
            loss.backward()
            self.gradients = self.storages.register(p.grad for p in self.parameters if p.grad is not None)
            self.memory["gradients"] = self._bytes(self.gradients)
        else:
            with self.strategy.block_backward_sync():
                loss.backward()
            del loss
            self.accumulated = set(self.storages.live()) - before - self.gathered - self.resident
            self.memory["accumulated gradients"] = self._bytes(self.accumulated)
        return counts

    def _finish(self, optimizer: torch.optim.Optimizer, clip: float | None) -> Counts:
        counts = self.recorder.counts = Counts()
        self.recorder.in_optimizer = True
        self.strategy.scale_gradients(optimizer)
        self.module.on_before_optimizer_step(optimizer)
        if clip:
            given = [p.grad for p in self.parameters if p.grad is not None]
            gradients.clip_by_norm(given, clip, self.strategy.gradient_norm_type)
        optimizer.step()
        return counts

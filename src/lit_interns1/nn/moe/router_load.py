"""The load of every expert of every layer, added up on the device and over ranks, and the metrics that follow from it.

    counts_LE = Σ_ranks Σ_passes c_LE        window: since the last reset;   step: the passes of one optimizer step
    micro-batch violation = mean over ranks and passes of (max_e c_e − μ) / μ

Synchronising is one all-reduce: all sums are laid one behind the other, and a maximum is a sum of slots of which each
rank fills its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

from lit_interns1.nn.moe import load_metrics
from lit_interns1.nn.moe.statistics import RouterStats

_SUMS = ("counts_LE", "probability_sum_LE", "step_counts_LE", "scalars_LS")
_MAXIMA = ("logit_max_L", "bias_max_L")
_SCALARS = (
    "tokens", "z_square", "micro_violation", "passes", "replayed", "logit_tokens", "logit", "top_probability",
    "entropy", "drift", "drift_tokens",
)  # fmt: skip

ROUTER_METRICS = (
    "max_violation", "max_violation_step", "max_violation_micro_batch", "min_violation", "cv", "gini", "entropy",
    "effective_experts", "load_deviation", "dead_experts", "starved_experts", "group_max_violation",
    "rank_max_violation", "drop_rate", "balance_loss", "z", "logit_max", "logit_mean", "top_probability",
    "routing_entropy", "bias_max", "drift",
)  # fmt: skip
"""Names of all metrics of a layer."""

PARTIAL_METRICS = ("group_max_violation", "bias_max")
"""Metrics that only some kinds of routers have; NaN where a layer has another kind."""


def _measured(maximum_L: Tensor) -> Tensor:
    return maximum_L.masked_fill(torch.isneginf(maximum_L), torch.nan)


class RouterEvent(NamedTuple):
    """One forward pass of one router.

    Attributes:
        layer: Its index.
        stats: What it did.
        replayed: Whether expert ids were given to it.
        training: Whether its model was in training mode.
    """

    layer: int
    stats: RouterStats
    replayed: bool
    training: bool


class LoadSums(NamedTuple):
    """What `RouterLoad` has added up, over ranks, float64 on the CPU.

    Attributes:
        counts_LE: Tokens per expert.
        probability_sum_LE: Σ over tokens of the probabilities.
        step_counts_LE: Tokens per expert in the last optimizer step.
        scalars: Sums (L,) by name.
        logit_max_L: Largest logit where logits were measured, else -inf.
        bias_max_L: Largest |bias|, -inf without.
    """

    counts_LE: Tensor
    probability_sum_LE: Tensor
    step_counts_LE: Tensor
    scalars: dict[str, Tensor]
    logit_max_L: Tensor
    bias_max_L: Tensor

    def metrics(
        self, groups_L: Sequence[int], expert_parallel_size: int = 1, capacity_factor: float | None = None
    ) -> dict[str, Tensor]:
        """(L,) per metric of `ROUTER_METRICS`; what was not measured is left out.

        Args:
            groups_L: Groups of each layer's router, 1 = none. A layer without what others have gets NaN.
            expert_parallel_size: Ranks that share the experts.
            capacity_factor: For `drop_rate`.
        """
        s, counts = self.scalars, self.counts_LE
        tokens_L = s["tokens"].clamp(min=1.0)
        found = {
            "max_violation": load_metrics.max_violation(counts),
            "max_violation_step": load_metrics.max_violation(self.step_counts_LE),
            "max_violation_micro_batch": s["micro_violation"] / s["passes"].clamp(min=1.0),
            "min_violation": load_metrics.min_violation(counts),
            "cv": load_metrics.coefficient_of_variation(counts),
            "gini": load_metrics.gini(counts),
            "entropy": load_metrics.normalized_entropy(counts),
            "effective_experts": load_metrics.effective_experts(counts),
            "load_deviation": load_metrics.load_deviation(counts),
            "dead_experts": load_metrics.dead_experts(counts).double(),
            "starved_experts": load_metrics.starved_experts(counts).double(),
            "balance_loss": load_metrics.balance(counts, self.probability_sum_LE / tokens_L[:, None]),
            "z": s["z_square"] / tokens_L,
        }
        if any(groups > 1 for groups in groups_L):
            found["group_max_violation"] = torch.stack(
                [
                    load_metrics.max_violation(load_metrics.group_counts(counts_E, groups))
                    if groups > 1
                    else counts_E.new_tensor(torch.nan)
                    for counts_E, groups in zip(counts, groups_L, strict=True)
                ]
            )
        if expert_parallel_size > 1:
            on_ranks = load_metrics.group_counts(counts, expert_parallel_size)
            found["rank_max_violation"] = load_metrics.max_violation(on_ranks)
        if capacity_factor is not None:
            found["drop_rate"] = load_metrics.drop_rate(counts, capacity_factor)
        if bool(s["logit_tokens"].any()):
            measured = s["logit_tokens"].clamp(min=1.0)
            found |= {
                "logit_max": _measured(self.logit_max_L),
                "logit_mean": s["logit"] / measured,
                "top_probability": s["top_probability"] / measured,
                "routing_entropy": s["entropy"] / measured,
            }
        if not bool(torch.isneginf(self.bias_max_L).all()):
            found["bias_max"] = _measured(self.bias_max_L)
        if bool(s["drift_tokens"].any()):
            found["drift"] = s["drift"] / s["drift_tokens"].clamp(min=1.0)
        return {name: found[name] for name in ROUTER_METRICS if name in found}

    def uneven_groups(self, groups_L: Sequence[int]) -> dict[int, Tensor]:
        """Counts per group of the layers whose grouped router did not give every group the same number of tokens,
        although it chose itself."""
        uneven = {}
        for layer, groups in enumerate(groups_L):
            if groups > 1 and not self.scalars["replayed"][layer]:
                counts_G = load_metrics.group_counts(self.counts_LE[layer], groups)
                if bool((counts_G != counts_G[0]).any()):
                    uneven[layer] = counts_G
        return uneven


class StepLoad:
    """Adds up the events of one optimizer step, or of one validation batch, on the device of this rank.

    Args:
        num_layers: L.
        num_experts: E.
        device: Where.
    """

    def __init__(self, num_layers: int, num_experts: int, device: torch.device | str = "cpu") -> None:
        options: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self.counts_LE = torch.zeros(num_layers, num_experts, **options)
        self.probability_sum_LE = torch.zeros(num_layers, num_experts, **options)
        self.scalars_LS = torch.zeros(num_layers, len(_SCALARS), **options)
        self.logit_max_L = torch.full((num_layers,), -torch.inf, **options)
        self._indices: dict[tuple[int, ...], Tensor] = {}
        self._constants: dict[tuple[int, bool], Tensor] = {}

    def clear(self) -> None:
        """Forgets everything."""
        for sums in (self.counts_LE, self.probability_sum_LE, self.scalars_LS):
            sums.zero_()
        self.logit_max_L.fill_(-torch.inf)

    def _index(self, layers: tuple[int, ...]) -> Tensor:
        if layers not in self._indices:
            self._indices[layers] = torch.tensor(layers, device=self.counts_LE.device)
        return self._indices[layers]

    def _constant(self, passes: int, replayed: bool) -> Tensor:
        """(2, passes): one pass each, and whether ids were given."""
        if (passes, replayed) not in self._constants:
            rows = torch.tensor([1.0, float(replayed)], device=self.counts_LE.device)
            self._constants[passes, replayed] = rows[:, None].expand(2, passes)
        return self._constants[passes, replayed]

    @torch.no_grad()
    def add(self, events: Sequence[RouterEvent]) -> None:
        """Adds the passes of one micro-batch; nothing waits for the device."""
        if not events:
            return
        stats = [event.stats for event in events]
        layer_N = self._index(tuple(event.layer for event in events))
        counts_NE = torch.stack([s.counts_E for s in stats])
        sums_2N = torch.stack([s.num_tokens for s in stats] + [s.z_square_sum for s in stats]).view(2, -1)
        replayed = any(event.replayed for event in events)
        rows = [sums_2N, load_metrics.max_violation(counts_NE)[None], self._constant(len(events), replayed)]
        known = [s.logits for s in stats if s.logits is not None]
        if len(known) == len(stats):
            parts = [part for column in zip(*known, strict=True) for part in column]
            highest_1N, sums_3N = torch.stack(parts).view(4, -1).split([1, 3])
            rows += [sums_2N[:1], sums_3N]
            self.logit_max_L.scatter_reduce_(0, layer_N, highest_1N[0].double(), "amax")
        rows_CN = torch.cat(rows)
        self.counts_LE.index_add_(0, layer_N, counts_NE.double())
        self.probability_sum_LE.index_add_(0, layer_N, torch.stack([s.probability_sum_E for s in stats]).double())
        self.scalars_LS[:, : len(rows_CN)].index_add_(0, layer_N, rows_CN.T.double())


class RouterLoad(Metric):
    """Adds up steps; `totals` gives `LoadSums` over all ranks.

    Args:
        num_layers: L.
        num_experts: E.
    """

    full_state_update = False
    counts_LE: Tensor
    probability_sum_LE: Tensor
    step_counts_LE: Tensor
    scalars_LS: Tensor
    logit_max_L: Tensor
    bias_max_L: Tensor

    def __init__(self, num_layers: int, num_experts: int) -> None:
        super().__init__()
        for name, width in zip(_SUMS, (num_experts, num_experts, num_experts, len(_SCALARS)), strict=True):
            self.add_state(name, torch.zeros(num_layers, width, dtype=torch.float64), "sum", persistent=True)
        for name in _MAXIMA:
            self.add_state(name, torch.full((num_layers,), -torch.inf, dtype=torch.float64), "max", persistent=True)

    def update(self, step: StepLoad) -> None:
        """Adds a step, and keeps its counts as those of the last one."""
        self.counts_LE += step.counts_LE
        self.probability_sum_LE += step.probability_sum_LE
        self.scalars_LS += step.scalars_LS
        self.step_counts_LE.copy_(step.counts_LE)
        torch.maximum(self.logit_max_L, step.logit_max_L, out=self.logit_max_L)

    def add_drift(self, drift_sum_L: Tensor, tokens_L: Tensor) -> None:
        """Adds Σ over probe tokens of the routing drift, and the number of these tokens."""
        first = _SCALARS.index("drift")
        self.scalars_LS[:, first] += drift_sum_L
        self.scalars_LS[:, first + 1] += tokens_L

    def set_bias(self, layer: int, bias_E: Tensor) -> None:
        """Notes the bias of a router."""
        self.bias_max_L[layer] = bias_E.abs().amax()

    def compute(self) -> Tensor:
        """All states one behind the other, on the CPU: the host reads once."""
        return torch.cat([getattr(self, name).flatten() for name in (*_SUMS, *_MAXIMA)]).cpu()

    def totals(self) -> LoadSums:
        """The sums over all ranks; all of them must call it."""
        shapes = [getattr(self, name).shape for name in (*_SUMS, *_MAXIMA)]
        flat = self.compute().split([shape.numel() for shape in shapes])
        counts, probabilities, step_counts, scalars, logit_max, bias_max = (
            part.view(shape) for part, shape in zip(flat, shapes, strict=True)
        )
        by_name = dict(zip(_SCALARS, scalars.unbind(1), strict=True))
        return LoadSums(counts, probabilities, step_counts, by_name, logit_max, bias_max)

    def _sync_dist(self, dist_sync_fn: Callable[..., Any] | None = None, process_group: Any | None = None) -> None:
        """One all-reduce instead of one gather per state."""
        group = process_group or self.process_group
        sums = [getattr(self, name) for name in _SUMS]
        maxima_ML = torch.stack([getattr(self, name) for name in _MAXIMA])
        slots_RML = maxima_ML.new_zeros(dist.get_world_size(group), *maxima_ML.shape)
        slots_RML[dist.get_rank(group)] = maxima_ML
        flat = torch.cat([*(s.flatten() for s in sums), slots_RML.flatten()])
        dist.all_reduce(flat, group=group)
        *reduced, slots = flat.split([*(s.numel() for s in sums), slots_RML.numel()])
        for name, whole, own in zip(_SUMS, reduced, sums, strict=True):
            setattr(self, name, whole.view_as(own))
        for name, highest_L in zip(_MAXIMA, slots.view_as(slots_RML).amax(0), strict=True):
            setattr(self, name, highest_L)

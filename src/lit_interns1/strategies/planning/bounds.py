"""The least time that an optimizer step can take, by what limits it. Nothing is derated, everything overlaps.

    compute  FLOPs / peak
    node     Σ bytes that must reach a rank / bandwidth of the node's links
    network  Σ bytes that must come from other nodes / bandwidth of the network
    memory   parameters, gradients and optimizer state once through the optimizer / memory bandwidth
    step ≥ max of these

A collective of payload B in a group of n ranks, m of them on each node:
    all-gather, reduce-scatter     node B·(n−1)/n, network B·(n−m)/(n·m)        all-reduce: twice that
    all-to-all                     node B·(m−1)/n, network B·(n−m)/n
Ranks are numbered node by node; every rank has a network port of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from lit_interns1.strategies.planning.hardware import Hardware
from lit_interns1.strategies.planning.recorder import Kind
from lit_interns1.strategies.planning.step import StepCost


@dataclass(frozen=True)
class Bounds:
    """Seconds per optimizer step.

    Attributes:
        compute: By floating-point operations.
        node: By links inside nodes.
        network: By links between nodes.
        memory: By the optimizer's memory traffic.
    """

    compute: float
    node: float
    network: float
    memory: float

    @property
    def step(self) -> float:
        """The largest."""
        return max(self.compute, self.node, self.network, self.memory)

    @property
    def limit(self) -> str:
        """Which one that is."""
        return max(("compute", "node", "network", "memory"), key=lambda name: float(getattr(self, name)))


def link_seconds(kind: Kind, payload: float, hardware: Hardware) -> tuple[float, float]:
    """Least seconds of collectives on the links inside a node, and between nodes.

    Args:
        kind: What they are.
        payload: Their bytes.
        hardware: The machine.
    """
    n = kind.ranks
    m = min(n, max(1, ceil(hardware.devices_per_node / kind.stride)))
    if kind.operation == "all-to-all":
        inside, outside = payload * (m - 1) / n, payload * (n - m) / n
    else:
        passes = 2 if kind.operation == "all-reduce" else 1
        inside, outside = passes * payload * (n - 1) / n, passes * payload * (n - m) / (n * m)
        if m == 1:
            inside = 0.0
    return inside / hardware.node_bandwidth, outside / hardware.network_bandwidth


def bounds_of(cost: StepCost, hardware: Hardware) -> Bounds:
    """The bounds of one optimizer step."""
    seconds = [link_seconds(kind, payload, hardware) for kind, payload in cost.payload.items()]
    memory = cost.memory
    traffic = 2 * memory["parameters"] + memory["gradients"] + 2 * memory["optimizer state"]
    return Bounds(
        cost.flops / hardware.flops,
        sum(inside for inside, _ in seconds),
        sum(outside for _, outside in seconds),
        traffic / hardware.memory_bandwidth,
    )

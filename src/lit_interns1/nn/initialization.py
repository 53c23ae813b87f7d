"""Initial weights that depend on a parameter's name and the seed, and on nothing else.

    w = draw(generator seeded with crc32("{seed}:{name}[:{expert}]")),  then the local slice of it

The same weights come out whatever the layout: one process or many, sharded over any mesh, built in any order. A matrix
is drawn whole and then sliced; a stack of experts is drawn one expert at a time, so no rank holds more than one matrix
beside its own shard.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


@dataclass(frozen=True)
class Normal:
    """A normal distribution with mean 0."""

    std: float


@dataclass(frozen=True)
class Constant:
    """One value everywhere."""

    value: float


Distribution = Normal | Constant


@runtime_checkable
class HasDistributions(Protocol):
    """A module that says how its own parameters start."""

    def parameter_distribution(self, name: str) -> Distribution:
        """The distribution of the parameter `name` of this module (not of its children)."""
        ...


@runtime_checkable
class HasComputedBuffers(Protocol):
    """A module with buffers that are computed, not trained (frequencies, counters)."""

    def reset_buffers(self) -> None:
        """Recomputes the buffers in place; must give the same values on every rank."""
        ...


def _distribution(module: nn.Module, name: str, std: float) -> Distribution:
    if isinstance(module, HasDistributions):
        return module.parameter_distribution(name)
    if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return Constant(0.0) if name == "bias" else Normal(std)
    if isinstance(module, nn.LayerNorm):
        return Constant(1.0 if name == "weight" else 0.0)
    raise TypeError(
        f"{type(module).__name__} has the parameter {name!r} but does not say how it starts: "
        "give the class a method parameter_distribution(name)"
    )


def keyed_generator(key: str) -> torch.Generator:
    """Random numbers that depend on the key and on nothing else."""
    return torch.Generator().manual_seed(zlib.crc32(key.encode()))


def draw_normal(key: str, shape: tuple[int, ...], std: float) -> Tensor:
    """Normal numbers of a key, float32."""
    return torch.empty(shape, dtype=torch.float32, device="cpu").normal_(0.0, std, generator=keyed_generator(key))


@torch.no_grad()
def _fill(parameter: Tensor, name: str, distribution: Distribution, seed: int) -> None:
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    if isinstance(distribution, Constant):
        local.fill_(distribution.value)
        return
    if isinstance(parameter, DTensor):
        shape, offset = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
    else:
        shape, offset = tuple(parameter.shape), (0,) * parameter.ndim
    if local.numel() == 0:
        return
    window = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
    if parameter.ndim == 3:
        for i, expert in enumerate(range(window[0].start, window[0].stop)):
            whole = draw_normal(f"{seed}:{name}:{expert}", tuple(parameter.shape[1:]), distribution.std)
            local[i].copy_(whole[window[1:]])
    else:
        local.copy_(draw_normal(f"{seed}:{name}", tuple(parameter.shape), distribution.std)[window])


def initialize_parameters(
    model: nn.Module, seed: int = 0, std: float = 0.02, only: Collection[str] | None = None
) -> None:
    """Gives every parameter its starting value in place and recomputes computed buffers.

    Args:
        model: Any module; parameters may be DTensors of any mesh. Names are those of `model.named_parameters()`.
        seed: Start of every key.
        std: Standard deviation of linear, convolution and embedding weights whose module does not say otherwise.
        only: Names of parameters; all else, buffers too, stays as it is. None = everything.

    Raises:
        TypeError: If a module holds a parameter and nobody says how it starts.
    """
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            full_name = f"{prefix}.{name}" if prefix else name
            if only is None or full_name in only:
                _fill(parameter, full_name, _distribution(module, name, std), seed)
        if only is None and isinstance(module, HasComputedBuffers):
            module.reset_buffers()


def allocate(model: nn.Module, device: torch.device | str = "cpu") -> None:
    """Gives a model built on the meta device memory on `device`, ties shared weights again and computes buffers.

    Parameters hold whatever was in the memory. A model that is already on a real device is left as it is.
    """
    if not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]):
        return
    model.to_empty(device=device)
    for module in model.modules():
        tie = getattr(module, "tie_weights", None)
        if callable(tie):
            tie()
        if isinstance(module, HasComputedBuffers):
            module.reset_buffers()


def materialize(model: nn.Module, device: torch.device | str = "cpu", seed: int = 0, std: float = 0.02) -> nn.Module:
    """Moves a model built on the meta device to `device` and initialises it; ties shared weights again.

    A model that is already on a real device is only initialised.
    """
    allocate(model, device)
    initialize_parameters(model, seed=seed, std=std)
    return model

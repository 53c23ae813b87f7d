"""What every Triton kernel here shares: how it is tuned, launched, and told apart from its interpreted self."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import triton

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Kernels run in Triton's interpreter (`TRITON_INTERPRET=1` before the import of this package). Its product of two
bfloat16 tiles is wrong, so that kernels take a constant `UPCAST_DOT` and widen the operands where it is set."""


def tuned(
    configurations: Sequence[triton.Config], key: Sequence[str], **options: Any
) -> Callable[[Callable[..., Any]], Any]:
    """`triton.autotune` over `configurations` on a GPU; the first of them, fixed, in the interpreter.

    The first configuration must fit every supported chip: it is the one for callers that cannot measure.
    """

    def decorate(kernel: Any) -> Any:
        if INTERPRETED:
            return _Fixed(kernel, configurations[0])
        return triton.autotune(configs=list(configurations), key=list(key), **options)(kernel)

    return decorate


class _Fixed:
    """A kernel with one configuration, launched like an autotuned one."""

    def __init__(self, kernel: Any, configuration: triton.Config) -> None:
        self.fn, self.configs, self._configuration = kernel, [configuration], configuration

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: self.fn[grid](*args, **kwargs, **self._configuration.all_kwargs())


@cache
def multiprocessor_count(device_index: int) -> int:
    """Streaming multiprocessors of a CUDA device."""
    return torch.cuda.get_device_properties(device_index).multi_processor_count


def persistent_programs(device: torch.device) -> int:
    """How many programs a persistent kernel starts: one per multiprocessor, and few in the interpreter."""
    if device.type != "cuda":
        return 4
    return multiprocessor_count(device.index if device.index is not None else torch.cuda.current_device())


def ensure_descriptor_memory() -> None:
    """Lets kernels build tensor descriptors on the device: Triton asks for scratch memory through an allocator."""
    if INTERPRETED:
        return

    def allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
        return torch.empty(size, device="cuda", dtype=torch.int8)

    triton.set_allocator(allocate)


def has_descriptors(device: torch.device) -> bool:
    """Whether tensor descriptors are hardware (Hopper and newer), or the interpreter plays them."""
    if device.type != "cuda":
        return INTERPRETED
    return torch.cuda.get_device_capability(device) >= (9, 0)

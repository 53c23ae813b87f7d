"""Which form of an operation runs on which device, decided in one place and told once."""

from __future__ import annotations

import importlib.util
import logging
from functools import cache

import torch
from torch import Tensor, nn

_log = logging.getLogger(__name__)
_reported: set[tuple[torch.device, str]] = set()


@cache
def triton_target(device: torch.device) -> str | None:
    """`sm90` and the like for a CUDA device that our Triton kernels are built for, `hip` for an AMD one, else None."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    if torch.version.hip is not None:
        return "hip"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}" if major >= 8 else None


def runs_plainly(*tensors: Tensor | None) -> bool:
    """Whether an operation on a CPU may be called as the Python function that it is.

    Without gradients, tracing, and modes that must see it, torch's dispatch of a custom operation adds nothing but its
    own time, some 50 µs: more than the operation takes on the few tokens of a decoding step.
    """
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and all(t is None or (t.is_cpu and type(t) in (Tensor, nn.Parameter)) for t in tensors)
    )


def fused_experts_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the fused experts cannot run on this device in this dtype, or None."""
    if device.type in ("cpu", "meta"):
        return None
    if triton_target(device) is None:
        return (
            f"there is no kernel for {device}: it needs a CPU, or Triton and a GPU of compute capability 8.0 or higher"
        )
    if dtype == torch.float64:
        return f"the kernel for {device} takes bfloat16, float16 and float32, not {dtype}"
    return None


@torch.compiler.assume_constant_result  # a compiler runs it when it traces
def report_experts(device: torch.device, form: str) -> None:
    """Logs once per device and form what computes the experts: `experts: triton-sm90`, `experts: cpu`, ..."""
    if (device, form) in _reported:
        return
    _reported.add((device, form))
    if form == "fused":
        form = "cpu" if device.type == "cpu" else f"triton-{triton_target(device)}"
    _log.info("experts: %s (%s)", form, device)

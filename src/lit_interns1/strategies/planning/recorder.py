"""What a training step does, counted operation by operation: collectives with their payload, floating-point operations.

    all-gather       payload = bytes of the gathered result          all-reduce    payload = bytes of the input
    reduce-scatter   payload = bytes of the whole input              all-to-all    payload = bytes of the input

Works on real ranks and in a fake world alike: it watches what torch dispatches, and knows no dispatcher or strategy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as fsdp_groups
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import sdpa_flop_count

import lit_interns1_kernels.routed_swiglu  # noqa: F401  its operations are counted below

DENSE, EXPERTS, TOKENS, OPTIMIZER, SUMS, OTHER = (
    "dense parameters",
    "expert parameters",
    "token dispatch",
    "optimizer",
    "sums",
    "other",
)
"""What collectives are for. Sums: of losses, counts, statistics and norms, some bytes each."""


class Kind(NamedTuple):
    """Collectives that are counted together.

    Attributes:
        operation: "all-gather", "reduce-scatter", "all-reduce", "all-to-all", or torch's name.
        purpose: One of the constants above.
        ranks: Size of the group.
        stride: Distance between neighbouring ranks of the group in the world, 1 for neighbours.
    """

    operation: str
    purpose: str
    ranks: int
    stride: int


@dataclass
class Counts:
    """Sums over a part of a step.

    Attributes:
        calls: By kind.
        payload: Bytes by kind.
        flops: Floating-point operations.
    """

    calls: Counter[Kind] = field(default_factory=Counter)
    payload: Counter[Kind] = field(default_factory=Counter)
    flops: float = 0.0


def _bytes(value: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


# name of the operation: (its kind, position of the tensors that count, whether they are one rank's part of the result)
_COLLECTIVES: dict[str, tuple[str, int, bool]] = {
    "c10d::_allgather_base_": ("all-gather", 0, False),
    "c10d::allgather_": ("all-gather", 0, False),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", 1, False),
    "c10d::allreduce_": ("all-reduce", 0, False),
    "c10d::alltoall_base_": ("all-to-all", 1, False),
    "_c10d_functional::all_gather_into_tensor": ("all-gather", 0, True),
    "_c10d_functional::reduce_scatter_tensor": ("reduce-scatter", 0, False),
    "_c10d_functional::all_reduce": ("all-reduce", 0, False),
    "_c10d_functional::all_reduce_": ("all-reduce", 0, False),
    "_c10d_functional::all_to_all_single": ("all-to-all", 0, False),
}
_NO_TRAFFIC = {
    "_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd", "c10d::barrier",
    "c10d::monitored_barrier_",
}  # fmt: skip


def _group_of(leaves: list[Any]) -> dist.ProcessGroup:
    for leaf in leaves:
        if isinstance(leaf, torch.ScriptObject) and "ProcessGroup" in str(leaf._type()):
            return dist.ProcessGroup.unbox(leaf)
        if isinstance(leaf, dist.ProcessGroup):
            return leaf
    names = [leaf for leaf in leaves if isinstance(leaf, str)]
    return dist.distributed_c10d._resolve_process_group(names[-1])  # type: ignore[arg-type]


class StepRecorder(TorchDispatchMode):
    """Counts while it is active, into `counts`, which may be replaced at any time to begin a new part.

    Args:
        module: What is trained; its parts named `experts` of layers with a `dispatcher` are the routed experts.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.counts = Counts()
        self.in_optimizer = False
        """Set by who runs the step: from now on the optimizer is at work."""
        layers = [part for part in module.modules() if hasattr(part, "dispatcher") and hasattr(part, "experts")]
        self._experts = {id(part) for layer in layers for part in layer.experts.modules()}  # type: ignore[union-attr]
        self._purpose: str | None = None
        self._restore: list[Callable[[], None]] = []

    def __enter__(self) -> StepRecorder:
        for name in ("foreach_all_gather", "foreach_reduce"):
            original = getattr(fsdp_groups, name)
            setattr(fsdp_groups, name, self._labelled(original))
            self._restore.append(partial(setattr, fsdp_groups, name, original))
        super().__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        super().__exit__(*details)
        while self._restore:
            self._restore.pop()()

    def _labelled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def labelled(parameters: Any, *args: Any, **kwargs: Any) -> Any:
            is_expert = any(id(parameter._module_info.module) in self._experts for parameter in parameters)
            with self._for(EXPERTS if is_expert else DENSE):
                return function(parameters, *args, **kwargs)

        return labelled

    @contextmanager
    def _for(self, purpose: str) -> Iterator[None]:
        self._purpose = purpose
        try:
            yield
        finally:
            self._purpose = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes back in parts, its collectives among them
        kwargs = kwargs or {}
        name = func._schema.name
        if name.startswith(("c10d::", "_c10d_functional::")):
            if name not in _NO_TRAFFIC:
                self._collective(name, args, kwargs)
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        formula = _FLOPS.get(name)
        if formula is not None:
            self.counts.flops += formula(*args, **kwargs)
        return result

    def _collective(self, name: str, args: Any, kwargs: Any) -> None:
        operation, position, is_part = _COLLECTIVES.get(name, (name.split("::")[1], 0, False))
        leaves = tree_leaves((args, kwargs))
        group = _group_of(leaves)
        ranks = dist.get_process_group_ranks(group)
        size = _bytes(args[position]) * (len(ranks) if is_part else 1)
        fallback = OPTIMIZER if self.in_optimizer else TOKENS
        if operation == "all-reduce":
            fallback = SUMS
        elif operation not in ("all-gather", "all-to-all"):
            fallback = OTHER
        stride = ranks[1] - ranks[0] if len(ranks) > 1 else 1
        kind = Kind(operation, self._purpose or fallback, len(ranks), stride)
        self.counts.calls[kind] += 1
        self.counts.payload[kind] += size


def _mm(a: Tensor, b: Tensor, *_: Any, **__: Any) -> float:
    return 2.0 * a.shape[0] * a.shape[1] * b.shape[1]


def _addmm(_: Tensor, a: Tensor, b: Tensor, *__: Any, **___: Any) -> float:
    return _mm(a, b)


def _bmm(a: Tensor, b: Tensor, *_: Any, **__: Any) -> float:
    return 2.0 * prod(a.shape) * b.shape[2]


def _attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> float:
    causal = options.get("is_causal", rest[1] if len(rest) > 1 else False)
    flops = float(sdpa_flop_count(q.shape, k.shape, v.shape))
    return flops * (0.5 + 0.5 / k.shape[2]) if causal is True else flops


def _attention_backward(_: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> float:
    return 2.5 * _attention(q, k, v, None, options.get("is_causal", rest[3] if len(rest) > 3 else False))


def _swiglu(x_SD: Tensor, gate_up_EID: Tensor, down_EDI: Tensor, row_index_R: Tensor, *_: Any, **__: Any) -> float:
    return 6.0 * row_index_R.shape[0] * x_SD.shape[1] * down_EDI.shape[2]


def _swiglu_backward(_: Tensor, *args: Any, **kwargs: Any) -> float:
    return 2.0 * _swiglu(*args, **kwargs)


def _fp8_linear(x_MK: Tensor, weight_GNK: Tensor, *_: Any, **__: Any) -> float:
    return 2.0 * prod(x_MK.shape) * weight_GNK.shape[1]


def _fp8_linear_backward(_: Tensor, x_MK: Tensor, weight_GNK: Tensor, *rest: Any, **__: Any) -> float:
    need_x, need_weight = rest[-2:]
    return _fp8_linear(x_MK, weight_GNK) * (need_x + need_weight)


def _grouped_mm(a: Tensor, b: Tensor, *_: Any, **__: Any) -> float:
    return 2.0 * prod(a.shape) * b.shape[-1]


_FLOPS: dict[str, Callable[..., float]] = {
    "aten::mm": _mm, "aten::addmm": _addmm, "aten::addmm_": _addmm, "aten::bmm": _bmm,
    "aten::_grouped_mm": _grouped_mm,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "lit_interns1::routed_swiglu": _swiglu, "lit_interns1::routed_swiglu_backward": _swiglu_backward,
    "lit_interns1::fp8_grouped_linear": _fp8_linear,
    "lit_interns1::fp8_grouped_linear_backward": _fp8_linear_backward,
}  # fmt: skip
"""Matrix products. Where torch counts attention as a full square, causal attention is half of it here, as it must be
for a lower bound of the time."""

"""A training step without data, devices or other ranks: what is known is computed, what is not has only a shape.

    tokens, labels, positions, document boundaries   real values: the code that reads them takes its real path
    parameters and all that they touch               fake tensors: shape, type and device, no storage
    collectives                                      torch's "fake" backend: N ranks that all seem to be this one

Where a fake value is asked for, the answer is the one that a healthy step gives: yes, 1.0, and 0 for integers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor._redistribute import clear_redistribute_planner_cache
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
_DEVICE = torch.ops.prim.device.default
"""What Python asks most often; answered at once, or it would cost most of the time."""
_KNOWN_FACTORIES = {_aten.arange.default, _aten.arange.start, _aten.arange.start_step}


@contextmanager
def fake_world(size: int) -> Iterator[None]:
    """This process as rank 0 of a default process group of `size` ranks that do not exist.

    Raises:
        RuntimeError: If there is a process group already.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("a plan needs a process without a process group, but one is initialised")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()
        # DTensor remembers meshes by their ranks, with groups that are gone now
        _clear_sharding_prop_cache()
        clear_redistribute_planner_cache()


class KnownValues(TorchDispatchMode):
    """On top of a `FakeTensorMode`: operations on real tensors alone stay real.

    Raises:
        RuntimeError: If a fake value is written into a real tensor, whose other values would then be wrong.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        kwargs = kwargs or {}
        if any(issubclass(kind, Tensor) and kind not in (Tensor, torch.nn.Parameter, FakeTensor) for kind in types):
            return NotImplemented  # DTensor and its like come back in parts
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(isinstance(tensor, FakeTensor) for tensor in tensors):
            if func is _aten._local_scalar_dense.default:
                return _healthy_answer(tensors[0].dtype)
            self._check_targets(func, args, kwargs)
            return func(*args, **kwargs)
        if tensors or func in _KNOWN_FACTORIES:
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    @staticmethod
    def _check_targets(func: Any, args: Any, kwargs: Any) -> None:
        for number, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            if any(isinstance(leaf, Tensor) and not isinstance(leaf, FakeTensor) for leaf in tree_leaves(value)):
                raise RuntimeError(f"{func} writes values that a plan does not know into a tensor that it knows")


def _healthy_answer(dtype: torch.dtype) -> bool | int | float:
    if dtype == torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 0


@contextmanager
def fake_mode() -> Iterator[None]:
    """Where parameters become fake: `module.to_empty` in here.

    DTensor finds out shapes with fake tensors of its own, as large as whole parameters; nobody is to see them.
    """
    original = ShardingPropagator._propagate_tensor_meta_non_cached

    def unseen(propagator: ShardingPropagator, schema: Any) -> Any:
        with _disable_current_modes():
            return original(propagator, schema)

    ShardingPropagator._propagate_tensor_meta_non_cached = unseen  # type: ignore[assignment, method-assign]
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        ShardingPropagator._propagate_tensor_meta_non_cached = original  # type: ignore[method-assign]

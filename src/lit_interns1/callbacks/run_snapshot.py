"""A run in memory: everything that a few steps of training change, put back in place and bit by bit.

    snapshot → steps → restore:  the run goes on as if the steps had not been

Each rank keeps a copy of its own part: local shards of parameters and buffers, optimizer state, what modules,
callbacks, strategy, schedulers and Lightning's loops count, the position in the data, and the random states of PyTorch,
NumPy and Python. No file is written and no rank asks another, so any layout of the mesh will do.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, MutableMapping, MutableSequence
from copy import deepcopy
from dataclasses import is_dataclass
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.loops.utilities import _select_data_fetcher
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.combined_loader import CombinedLoader, _shutdown_workers_and_reset_iterator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

_KEPT_BY_REFERENCE = (Optimizer, Callback, Trainer, _Loop, type)


class StateCopy:
    """Copies of plain state, restored in place: objects keep their identity and get their content back.

    Tensors (of distributed ones the local part), arrays, containers, generators of random numbers, modules,
    dataclasses, objects of this package and objects with `state_dict` and `load_state_dict` are copied, to any depth.
    Anything else stays a reference.
    """

    def __init__(self) -> None:
        self._restorers: list[Callable[[], Any]] = []
        self._seen: dict[int, Any] = {}

    def add(self, value: Any) -> None:
        """Takes a copy of `value` and of what it holds."""
        if id(value) in self._seen or value is None or isinstance(value, (bool, int, float, str, bytes)):
            return
        self._seen[id(value)] = value
        if isinstance(value, Tensor):
            self._add_tensor(value)
        elif isinstance(value, np.ndarray) and not isinstance(value, np.memmap):
            array = value.copy()
            self._restorers.append(lambda: np.copyto(value, array))
        elif isinstance(value, MutableMapping):
            items = dict(value)
            self._restorers.append(lambda: _refill(value, value.update, items))
            self._add_all([*items.keys(), *items.values()])
        elif isinstance(value, (MutableSequence, set, deque)):
            self._add_collection(value)
        elif isinstance(value, (tuple, frozenset)):
            self._add_all(value)
        elif isinstance(value, torch.Generator):
            generator_state = value.get_state()
            self._restorers.append(lambda: value.set_state(generator_state))
        elif isinstance(value, random.Random):
            python_state = value.getstate()
            self._restorers.append(lambda: value.setstate(python_state))
        elif isinstance(value, np.random.Generator):
            bits, numpy_state = value.bit_generator, deepcopy(value.bit_generator.state)
            self._restorers.append(lambda: setattr(bits, "state", numpy_state))
        elif isinstance(value, nn.Module):
            for part in value.modules():
                self.add_attributes(part)
        elif not isinstance(value, _KEPT_BY_REFERENCE):
            self._add_object(value)

    def skip(self, *values: Any) -> None:
        """Leaves these objects alone wherever they are met."""
        self._seen.update({id(value): value for value in values})

    def add_attributes(self, owner: Any) -> None:
        """Takes a copy of the attributes of an object, whatever its class."""
        self.add(vars(owner))

    def restore(self) -> None:
        """Puts everything back; may be called again and again."""
        with torch.no_grad():
            for restorer in self._restorers:
                restorer()

    def _add_all(self, values: Any) -> None:
        for value in values:
            self.add(value)

    def _add_tensor(self, value: Tensor) -> None:
        if value.is_meta or torch._debug_has_internal_overlap(value) == 1:  # an expanded tensor cannot be written to
            return
        with torch.no_grad():
            saved, gradient = _local(value).clone(), value.grad if value.is_leaf else None
        self._restorers.append(lambda: _local(value).copy_(saved))
        if value.is_leaf:
            self._restorers.append(lambda: setattr(value, "grad", gradient))
            self.add(gradient)

    def _add_collection(self, value: Any) -> None:
        items = list(value)
        put = value.update if isinstance(value, set) else value.extend
        self._restorers.append(lambda: _refill(value, put, items))
        self._add_all(items)

    def _add_object(self, value: Any) -> None:
        if hasattr(value, "state_dict") and hasattr(value, "load_state_dict"):
            state = deepcopy(value.state_dict())
            self._restorers.append(lambda: value.load_state_dict(deepcopy(state)))
        elif hasattr(value, "__dict__") and (is_dataclass(value) or type(value).__module__.startswith("lit_interns1.")):
            self.add_attributes(value)


def _refill(container: Any, put: Callable[[Any], None], items: Any) -> None:
    container.clear()
    put(items)


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


class TrainingData:
    """The Trainer's training data, read from its present position any number of times.

    Loaders with a state are set back to it; others are iterated anew, which gives the same batches if the random states
    are the same. The iterator of the run itself stays where it is.

    Args:
        trainer: In `fit`, its data set up.

    Raises:
        ValueError: If a loader or its dataset can be iterated only once.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        combined = trainer.fit_loop._combined_loader
        assert combined is not None
        self._combined = combined
        for loader in combined.flattened:
            for part in (loader, getattr(loader, "dataset", None)):
                if isinstance(part, Iterator):
                    raise ValueError(
                        f"the training data {type(part).__name__} is an iterator, which can be read only once, and "
                        "every trial reads the same batches: give an object whose __iter__ starts anew"
                    )
        self._states = {
            i: deepcopy(loader.state_dict()) for i, loader in enumerate(combined.flattened) if _has_state(loader)
        }
        self._workers = {
            i: loader._iterator for i, loader in enumerate(combined.flattened) if getattr(loader, "_iterator", None)
        }

    @property
    def loaders(self) -> list[Any]:
        """The loaders, and those inside wrappers."""
        flat = self._combined.flattened
        return [*flat, *(loader.loader for loader in flat if hasattr(loader, "loader"))]

    def generators(self) -> list[torch.Generator]:
        """Those that the loaders and samplers draw from, if they have their own."""
        found = []
        for loader in self._combined.flattened:
            batch_sampler = getattr(loader, "batch_sampler", None)
            for owner in (
                loader,
                getattr(loader, "sampler", None),
                batch_sampler,
                getattr(batch_sampler, "sampler", None),
            ):
                generator = getattr(owner, "generator", None)
                if isinstance(generator, torch.Generator):
                    found.append(generator)
        return found

    def start(self) -> _DataFetcher:
        """A fetcher at the position, with iterators of its own."""
        for i, loader in enumerate(self._combined.flattened):
            if i in self._states:
                loader.load_state_dict(deepcopy(self._states[i]))
            if i in self._workers:
                loader._iterator = None
        combined = CombinedLoader(self._combined.iterables, self._combined._mode)
        combined.limits = self._combined.limits
        fetcher = _select_data_fetcher(self._trainer, RunningStage.TRAINING)
        fetcher.setup(combined)
        iter(fetcher)
        return fetcher

    def restore(self) -> None:
        """Gives the run its iterators back."""
        for i, loader in enumerate(self._combined.flattened):
            if i in self._workers and loader._iterator is not self._workers[i]:
                _shutdown_workers_and_reset_iterator(loader)
                loader._iterator = self._workers[i]
            if i in self._states:
                loader.load_state_dict(deepcopy(self._states[i]))
                iterator = self._combined._iterator
                assert iterator is not None
                iterator.iterators[i] = iter(loader)


def _has_state(loader: Any) -> bool:
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


class RunSnapshot:
    """The state of a fit between two optimizer steps.

    Args:
        trainer: In `fit`, between two optimizer steps.

    Raises:
        ValueError: See `TrainingData`.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.data = TrainingData(trainer)
        self._shard()
        copy = self._copy = StateCopy()
        module = trainer.lightning_module
        wrapper = None if trainer.strategy.model is module else trainer.strategy.model
        copy.skip(*self.data.loaders, getattr(trainer, "datamodule", None), wrapper)
        copy.add(module)
        for optimizer in trainer.optimizers:
            copy.add_attributes(optimizer)
        epoch_loop = trainer.fit_loop.epoch_loop
        loops = (trainer.fit_loop, epoch_loop, epoch_loop.automatic_optimization, epoch_loop.manual_optimization,
                 epoch_loop.val_loop)  # fmt: skip
        # the strategy holds the schedulers
        owners = (*loops, trainer, trainer._logger_connector, trainer.strategy, trainer.precision_plugin)
        for owner in (*owners, *trainer.callbacks):  # type: ignore[attr-defined]
            copy.add_attributes(owner)
        for generator in self.data.generators():
            copy.add(generator)
        self._random = _collect_rng_states()

    def restore(self) -> None:
        """Puts the run back to where it was."""
        self._shard()
        self._copy.restore()
        self.data.restore()
        _set_rng_states(self._random)

    def _shard(self) -> None:
        """FSDP may hold gathered parameters between steps; the shards are what counts."""
        for part in self._trainer.lightning_module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()

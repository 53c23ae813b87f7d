"""What lives in a device's memory during a training step, followed storage by storage in a fake world.

    live(t) = parameters and buffers + gradients + optimizer state + activations + gradients held while accumulating
              + working memory (gathered units, communication buffers, logits of the head's chunk, temporaries)

Events (a storage appears, changes its size, goes) are written down while the step runs; what class a storage belongs to
is known only later (an activation is what outlives forward), so peaks of a class are taken from the events afterwards.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_interns1.strategies.parallelize import local


class StorageEvents(TorchDispatchMode):
    """Follows the storages of fake tensors while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self._events: list[tuple[int, int]] = []
        self._sizes: dict[int, int] = {}
        self._numbers: dict[int, int] = {}
        self._original_resize: Any = None

    def __enter__(self) -> StorageEvents:
        original = self._original_resize = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:  # FSDP's way to free and to refill; no dispatch
            result = original(storage, size)
            number = self._numbers.get(id(storage))
            if number is not None:
                self._set(number, storage.nbytes())
            return result

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
        super().__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        super().__exit__(*details)
        torch.UntypedStorage.resize_ = self._original_resize  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.register(leaf for leaf in tree_leaves(result) if isinstance(leaf, FakeTensor))
        return result

    def _set(self, number: int, size: int) -> None:
        change = size - self._sizes.get(number, 0)
        if change:
            self._sizes[number] = size
            self._events.append((number, change))

    def _forget(self, key: int, number: int) -> None:
        self._numbers.pop(key, None)
        self._set(number, 0)

    def register(self, tensors: Iterable[Tensor]) -> set[int]:
        """Follows the storages of these tensors from now on, and gives their numbers."""
        numbers = set()
        for tensor in tensors:
            storage = local(tensor).untyped_storage()
            number = self._numbers.get(id(storage))
            if number is None:
                number = len(self._sizes)
                self._numbers[id(storage)] = number
                self._set(number, storage.nbytes())
                weakref.finalize(storage, self._forget, id(storage), number)
            numbers.add(number)
        return numbers

    @property
    def now(self) -> int:
        """The number of events so far."""
        return len(self._events)

    def live(self) -> dict[int, int]:
        """Bytes of every storage that is alive, by its number."""
        return {number: size for number, size in self._sizes.items() if size}

    def peak(self, first: int, last: int, without: set[int]) -> int:
        """The most bytes alive at the same time between two events, storages of `without` left out."""
        present = most = 0
        for position, (number, change) in enumerate(self._events[:last]):
            if number not in without:
                present += change
            if position >= first:
                most = max(most, present)
        return most

"""Every rank runs the same number of steps, whatever data it has.

    training: steps = min over ranks of their batches        evaluation: steps = max over ranks

Where parameters are sharded and experts remote, a forward pass is a collective: a rank that stops early leaves the
others waiting in it. So before a batch is handed out, all ranks say whether they have one, by an all-reduce of two
integers between hosts. Comparing lengths once would not do: a loader may have none, may end before it, may continue in
the middle of an epoch, or may raise.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

_NOTHING = object()


def equal_steps(dataloader: Any, stage: RunningStage | None, group: dist.ProcessGroup | None = None) -> Any:
    """The dataloader, such that all ranks take the same number of batches from it. All ranks call this together.

    Args:
        dataloader: Anything that can be iterated. It is returned as it is where there is one rank, and where it says
            `equal_on_all_ranks = True` on every rank.
        stage: TRAINING stops at the shortest rank; any other stage goes on to the longest.
        group: The ranks; None: all. Its backend for the CPU is used, such as gloo.

    Raises:
        ValueError: If the group has no backend for the CPU.
    """
    if dist.get_world_size(group) == 1:
        return dataloader
    backends = dist.get_backend_config(group)
    if "cpu:" not in backends:
        raise ValueError(
            f"process_group_backend = {backends!r} has none for the CPU, over which ranks agree on their number of "
            'steps; set it to "cpu:gloo,cuda:nccl"'
        )
    loader = dataloader.loader if isinstance(dataloader, EqualSteps) else dataloader
    if all(_gather(getattr(loader, "equal_on_all_ranks", False), group)):
        return loader
    is_stateful = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
    return (StatefulEqualSteps if is_stateful else EqualSteps)(loader, stage, group)


class EqualSteps:
    """A dataloader of which every rank takes the same number of batches.

    In training, batches that a rank has beyond the shortest are dropped. In evaluation, a rank that has run out repeats
    its last batch, which then counts again; a step must not change its batch in place. One warning tells of either.

    Iteration and the first `len()` are collectives: all ranks do them together, as Lightning's loops do. `loader` is
    the wrapped one; all other attributes are read from it and written to it.

    Raises:
        RuntimeError: On all ranks, if the loader of one raises.
        ValueError: On all ranks, if the loader of one has no batch while others do.
    """

    _length: int | None
    _is_agreed: bool
    _is_resumed: bool
    _has_warned: bool

    def __init__(self, loader: Any, stage: RunningStage | None, group: dist.ProcessGroup | None = None) -> None:
        self.__dict__.update(
            loader=loader, _stage=stage, _group=group, _is_agreed=False, _length=None, _is_resumed=False,
            _has_warned=False,
        )  # fmt: skip

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "loader":  # a copy in the making has no loader yet
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Lightning sets `worker_init_fn` and `_iterator`, and means the loader's."""
        if name in self.__dict__:
            self.__dict__[name] = value
        else:
            setattr(self.loader, name, value)

    def __len__(self) -> int:
        """Steps that every rank takes.

        Raises:
            TypeError: If the loader of any rank has no length.
        """
        if not self._is_agreed:
            self._agree()
        if self._length is None:
            raise TypeError(f"the {self._name} has no length on some rank")
        return self._length

    def __iter__(self) -> Iterator[Any]:
        self._agree()
        return self._steps()

    @property
    def _name(self) -> str:
        return f"{self._stage.dataloader_prefix}_dataloader" if self._stage else "dataloader"

    @property
    def _is_training(self) -> bool:
        return bool(self._stage == RunningStage.TRAINING)

    def _agree(self) -> None:
        """Sets the length from those of all ranks."""
        length, error = None, None
        try:
            length = sized_len(self.loader)
        except Exception as raised:
            error = raised
        self._raise_together(error)
        lengths = _gather(length, self._group)
        self._is_agreed, self._length = True, None
        if None in lengths:
            return
        if any(lengths):
            self._refuse([rank for rank, length in enumerate(lengths) if not length])
        self._length = min(lengths) if self._is_training else max(lengths)
        if self._is_training and max(lengths) > self._length:
            self._warn(
                f"an epoch has {self._length} batches, as many as the shortest rank has; the others' tails are dropped "
                f"(batches by rank: {lengths})"
            )

    def _steps(self) -> Iterator[Any]:
        batches, batch = self._batches(), _NOTHING
        may_be_empty, self._is_resumed = self._is_resumed and self._is_training, False
        has_met_end = False
        while True:
            fresh, error = _NOTHING, None
            try:
                fresh = next(batches, _NOTHING)
            except Exception as raised:  # whatever it is, the other ranks must know
                error = raised
            ended, failed = self._count(fresh is _NOTHING, error is not None)
            if failed:
                self._raise_together(error)
            if ended == dist.get_world_size(self._group):
                return
            if ended and not has_met_end:
                is_empty = fresh is _NOTHING and batch is _NOTHING and not may_be_empty
                self._meet_end(fresh is _NOTHING, is_empty)
                has_met_end = True
            if ended and self._is_training:
                return
            if fresh is _NOTHING:
                self._repeat_indices()
            else:
                batch = fresh
            yield batch

    def _batches(self) -> Iterator[Any]:
        """A generator, so that an error in the loader's `__iter__` comes with the first batch."""
        yield from self.loader

    def _count(self, *facts: bool) -> list[int]:
        """On how many ranks each of them holds."""
        counts = torch.tensor(facts, dtype=torch.int64, device="cpu")
        dist.all_reduce(counts, group=self._group)
        return counts.tolist()

    def _meet_end(self, is_over: bool, is_empty: bool) -> None:
        """Some ranks have run out and others have not: refuses ranks without any batch, and warns."""
        ends = _gather((is_over, is_empty), self._group)
        self._refuse([rank for rank, (_, is_empty) in enumerate(ends) if is_empty])
        ranks = [rank for rank, (is_over, _) in enumerate(ends) if is_over]
        if self._is_training:
            self._warn(f"the epoch ends on every rank, as ranks {ranks} have run out; the others' tails are dropped")
        else:
            self._warn(
                f"ranks {ranks} have run out before the others; a rank repeats its last batch until all have, and the "
                "repetitions count again in means and are predicted again"
            )

    def _repeat_indices(self) -> None:
        """Lightning's prediction writers look up the indices of every batch that was handed out."""
        seen = getattr(getattr(self.loader, "batch_sampler", None), "seen_batch_indices", None)
        if seen:
            seen.append(seen[-1])

    def _refuse(self, empty: list[int]) -> None:
        if empty:
            raise ValueError(
                f"{self._name}: ranks {empty} have no batch while others have; give every rank at least one"
            )

    def _raise_together(self, error: Exception | None) -> None:
        """Raises on all ranks if one has an error."""
        messages = _gather(f"{type(error).__name__}: {error}" if error else None, self._group)
        failed = "; ".join(f"on rank {rank}: {message}" for rank, message in enumerate(messages) if message)
        if failed:
            raise RuntimeError(f"{self._name} failed {failed}") from error

    def _warn(self, message: str) -> None:
        if not self._has_warned:
            advice = "give every rank the same number of batches to avoid this"
            rank_zero_warn(f"{self._name}: ranks have different numbers of batches: {message}; {advice}")
            self._has_warned = True


class StatefulEqualSteps(EqualSteps):
    """Of a loader with a state. Lightning recognises one by these methods."""

    def state_dict(self) -> dict[str, Any]:
        """The loader's."""
        state: dict[str, Any] = self.loader.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues the loader; on some ranks it may be at the end of its epoch."""
        self.loader.load_state_dict(state_dict)
        self._is_resumed = True


def _gather(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """The value of every rank."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values

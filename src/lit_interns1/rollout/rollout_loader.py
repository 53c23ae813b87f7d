"""The loader of reinforcement learning: hands out the micro-batches of one rollout batch after another.

    rollout r = rows [r·S, (r+1)·S)      a row is a sample      micro-batch: W·k rows over all ranks

When the first micro-batch of a rollout is asked for, the rollout is generated with the weights of that moment. Rows
that have been handed out, and the samples of the rollout in progress, are its state: a resumed run goes on with the
same samples, prepared by the same weights, also on another number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from lit_interns1.data.packed_batch import PackedBatch
from lit_interns1.rollout.collector import gather_objects
from lit_interns1.rollout.plan import RolloutPlan, blank_document, documents_of, micro_batches

Documents = list[dict[str, Tensor]]


class ReadyRollout(NamedTuple):
    """A rollout batch that can be trained on.

    Attributes:
        number: Of the batch.
        updates: Micro-batches of this rank by optimizer step, with everything that losses need.
    """

    number: int
    updates: list[list[PackedBatch]]


class RolloutLoader:
    """Micro-batches for the Trainer.

    Args:
        make: Makes the rollout of a number; all ranks call it together.
        plan: Sizes.
        rollouts_per_epoch: Length of an epoch.
        rank: This rank among the data-parallel ones.
        identity: What determines the order of prompts, by name: a resumed run must have the same.

    Raises:
        ValueError: If an epoch has no rollout.
    """

    equal_on_all_ranks = True

    def __init__(
        self,
        make: Callable[[int], ReadyRollout],
        plan: RolloutPlan,
        rollouts_per_epoch: int,
        rank: int = 0,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        if rollouts_per_epoch < 1:
            raise ValueError(f"an epoch needs at least one rollout, got rollouts_per_epoch = {rollouts_per_epoch}")
        self.make, self.plan, self.rank = make, plan, rank
        self.rollouts_per_epoch, self.identity = rollouts_per_epoch, dict(identity or {})
        self.current: ReadyRollout | None = None
        self._rows = 0
        self._turn = 0

    @property
    def rows(self) -> int:
        """Samples that all ranks together have been handed."""
        return self._rows

    def __len__(self) -> int:
        """Micro-batches per epoch on each rank."""
        return self.rollouts_per_epoch * self.plan.micro_batches

    def __iter__(self) -> Iterator[PackedBatch]:
        """From the current position to the end of its epoch; a whole epoch if the last one is finished."""
        self._turn += 1
        return self._iterate(self._turn)

    def _iterate(self, turn: int) -> Iterator[PackedBatch]:
        epoch = self.rollouts_per_epoch * self.plan.samples_per_rollout
        end = (self._rows // epoch + 1) * epoch
        while self._rows < end:
            number, inside = divmod(self._rows, self.plan.samples_per_rollout)
            if self.current is None or self.current.number != number:
                self.current = None  # its memory is free before the next one is made
                self.current = self.make(number)
            update, micro = divmod(inside // self.plan.samples_per_micro_step, self.plan.accumulation)
            batch = self.current.updates[update][micro]
            if turn != self._turn:
                raise RuntimeError(
                    "RolloutLoader: a newer iterator has taken over; two would train on the same samples"
                )
            self._rows += self.plan.samples_per_micro_step
            yield batch

    # -- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The position alone; the samples are in `rollout_state`."""
        return {
            "rows": self._rows, "rows_per_micro_step": self.plan.samples_per_micro_step, "identity": self.identity,
        }  # fmt: skip

    def rollout_state(self) -> dict[str, Any] | None:
        """The samples of the rollout in progress, of all ranks, by optimizer step; None between rollouts. All ranks
        call it together."""
        if self.current is None:
            return None
        mine = [documents_of(batches) for batches in self.current.updates]
        parts = gather_objects(mine, self.plan.data_parallel_size)
        updates = [[document for part in parts for document in part[u]] for u in range(len(mine))]
        return {"number": self.current.number, "updates": updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues behind the rows of `state`.

        Raises:
            ValueError: If the prompts or sizes differ from the run that saved the state, or the position does not lie
                between micro-batches of this number of ranks.
        """
        saved = dict(state.get("identity", {}))
        changed = [
            f"{name}: {saved.get(name)!r} in the checkpoint, {self.identity.get(name)!r} now"
            for name in sorted(saved.keys() | self.identity.keys())
            if saved.get(name) != self.identity.get(name)
        ]
        if changed:
            raise ValueError("the prompts of the checkpoint are not those of this run: " + "; ".join(changed))
        rows = int(state["rows"])
        if rows % (self.plan.samples_per_rollout // self.plan.updates_per_rollout):
            raise ValueError(f"the checkpoint stands inside an optimizer step ({rows} samples): it cannot be continued")
        self._rows = rows
        self._turn += 1

    def load_rollout(self, state: Mapping[str, Any]) -> None:
        """Takes over the samples of a rollout in progress."""
        updates = []
        like = next((document for documents in state["updates"] for document in documents), blank_document(None))
        for update, documents in enumerate(state["updates"]):
            mine = set(self.plan.slots(update, self.rank))
            share = [document for document in documents if int(document["sample_slot"][0]) in mine]
            updates.append(micro_batches(share, self.plan, like))
        self.current = ReadyRollout(int(state["number"]), updates)

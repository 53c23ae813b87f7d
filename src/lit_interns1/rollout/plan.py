"""The arithmetic of reinforcement learning, and how samples become micro-batches.

    rollout batch    P prompts × G samples = S        U optimizer steps of S/U samples
    optimizer step   W ranks × A micro-batches × k samples; k·A samples a rank, whole groups
    prompt p of a step belongs to rank  p div (P/(U·W))

Micro-batches hold k whole samples, flat and without padding, so their number is fixed although lengths are not; the
samples of a step are dealt so that the longest micro-batch is short.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lit_interns1.data.packed_batch import PackedBatch
from lit_interns1.rollout.samples import Sample

EMPTY_SLOT = -1
"""Slot of a place in a micro-batch that no sample fills."""
PAD_VALUES: dict[str, Any] = {
    "labels": -100, "response_mask": False, "rollout_logprobs": float("nan"), "weight_versions": -1,
    "routed_experts": -1, "sample_slot": EMPTY_SLOT, "group_id": -1,
}  # fmt: skip
"""What stands in an empty place, by field; 0 for any other."""


@dataclass(frozen=True)
class RolloutPlan:
    """Sizes of a rollout batch.

    Attributes:
        prompts_per_rollout: P, over all ranks.
        num_generations: G, samples of each prompt.
        updates_per_rollout: U, optimizer steps on each rollout batch.
        samples_per_micro_batch: k, samples of one forward pass on one rank.
        data_parallel_size: W.

    Raises:
        ValueError: If a size is below 1, or they do not divide.
    """

    prompts_per_rollout: int
    num_generations: int
    updates_per_rollout: int = 1
    samples_per_micro_batch: int = 8
    data_parallel_size: int = 1

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        parts = self.updates_per_rollout * self.data_parallel_size
        if self.prompts_per_rollout % parts:
            raise ValueError(
                f"prompts_per_rollout = {self.prompts_per_rollout} must be divisible by updates_per_rollout × ranks = "
                f"{self.updates_per_rollout} × {self.data_parallel_size} = {parts}: samples of a prompt stay together"
            )
        if self.samples_per_rank_update % self.samples_per_micro_batch:
            raise ValueError(
                f"samples_per_micro_batch = {self.samples_per_micro_batch} must divide the "
                f"{self.samples_per_rank_update} samples that a rank has per optimizer step (prompts_per_rollout × "
                f"num_generations / updates_per_rollout / ranks)"
            )

    @property
    def prompts_per_rank_update(self) -> int:
        """P/(U·W)."""
        return self.prompts_per_rollout // (self.updates_per_rollout * self.data_parallel_size)

    @property
    def samples_per_rank_update(self) -> int:
        """k·A."""
        return self.prompts_per_rank_update * self.num_generations

    @property
    def accumulation(self) -> int:
        """A, micro-batches per optimizer step on each rank."""
        return self.samples_per_rank_update // self.samples_per_micro_batch

    @property
    def samples_per_rollout(self) -> int:
        """S."""
        return self.prompts_per_rollout * self.num_generations

    @property
    def samples_per_micro_step(self) -> int:
        """W·k, samples that all ranks together read in one forward pass."""
        return self.samples_per_micro_batch * self.data_parallel_size

    @property
    def micro_batches(self) -> int:
        """U·A, micro-batches of a rollout batch on each rank."""
        return self.updates_per_rollout * self.accumulation

    def places(self, rank: int) -> list[list[int]]:
        """Prompts of a rollout batch (0 … P−1) that a rank generates for, by optimizer step."""
        per_update, mine = self.prompts_per_rollout // self.updates_per_rollout, self.prompts_per_rank_update
        firsts = [update * per_update + rank * mine for update in range(self.updates_per_rollout)]
        return [list(range(first, first + mine)) for first in firsts]

    def slots(self, update: int, rank: int) -> range:
        """Numbers of the samples of a rank in an optimizer step, within the rollout batch."""
        first = self.places(rank)[update][0] * self.num_generations
        return range(first, first + self.samples_per_rank_update)


def deal(lengths: Sequence[int], bins: int, size: int) -> list[list[int]]:
    """Deals samples to micro-batches of equal number, longest first, each to the shortest micro-batch with room.

    Args:
        lengths: Tokens of each sample, `bins · size` of them.
        bins: Micro-batches.
        size: Samples of each.

    Returns:
        Indices by micro-batch, ascending inside.
    """
    found: list[list[int]] = [[] for _ in range(bins)]
    load = [0] * bins
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        bin_ = min((b for b in range(bins) if len(found[b]) < size), key=lambda b: (load[b], b))
        found[bin_].append(index)
        load[bin_] += lengths[index]
    return [sorted(indices) for indices in found]


def micro_batches(
    documents: Sequence[dict[str, Tensor]], plan: RolloutPlan, like: Mapping[str, Tensor]
) -> list[PackedBatch]:
    """The micro-batches of one optimizer step on one rank.

    Args:
        documents: At most k·A, the same fields in each; missing ones are places without loss.
        plan: Sizes.
        like: A document with the fields that the places without loss get: all ranks must have the same.

    Raises:
        ValueError: If there are too many.
    """
    room = plan.samples_per_rank_update
    if len(documents) > room:
        raise ValueError(f"{len(documents)} samples for the {room} places of an optimizer step")
    filled = [*documents, *[empty_document(like)] * (room - len(documents))]
    dealt = deal([len(d["input_ids"]) for d in filled], plan.accumulation, plan.samples_per_micro_batch)
    return [_packed([filled[index] for index in indices]) for indices in dealt]


def _packed(documents: list[dict[str, Tensor]]) -> PackedBatch:
    """Documents side by side; those of empty places count as padding."""
    batch = PackedBatch.from_documents(documents)
    slot_T = batch.token_fields["sample_slot"]
    empty_T = slot_T == EMPTY_SLOT
    if not bool(empty_T.any()):
        return batch
    return replace(
        batch, sample_id_T=torch.where(empty_T, EMPTY_SLOT, batch.sample_id_T),
        num_tokens=int((~empty_T).sum()),
    )  # fmt: skip


def empty_document(like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One token without loss, with the fields of another document."""
    return {
        name: torch.full((1, *value.shape[1:]), PAD_VALUES.get(name, 0), dtype=value.dtype)
        for name, value in like.items()
    }


def placed_document(
    sample: Sample, slot: int, group: int, reward: float, counts: bool, routing: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """A sample at its place in the rollout batch: `Sample.document` with `rewards`, `sample_slot` and `group_id`.

    Args:
        sample: With at least one response token.
        slot: Its number.
        group: The number of its prompt.
        reward: R.
        counts: Whether it is learned from; else its `response_mask` is empty.
        routing: (MoE layers, K) if documents need routing.
    """
    document = sample.document(routing)
    if routing is None:
        document.pop("routed_experts", None)
    length = len(document["input_ids"])
    if not counts:
        document["response_mask"] = torch.zeros(length, dtype=torch.bool)
    return {
        **document, "rewards": torch.full((length,), float(reward)), "sample_slot": torch.full((length,), slot),
        "group_id": torch.full((length,), group),
    }  # fmt: skip


def blank_document(routing: tuple[int, int] | None) -> dict[str, Tensor]:
    """The document of an empty place, with the fields of `placed_document`."""
    sample = Sample((0,), [0], torch.full((1,), torch.nan), "abort", 0, torch.full((1,), -1))
    return empty_document(placed_document(sample, EMPTY_SLOT, -1, 0.0, False, routing))


def documents_of(batches: Sequence[PackedBatch]) -> list[dict[str, Tensor]]:
    """The samples in micro-batches as documents again, in the order of their slots, empty places left out."""
    found: list[tuple[int, dict[str, Tensor]]] = []
    for batch in batches:
        bounds = batch.cu_seqlens.tolist()
        columns = {"input_ids": batch.input_ids, "labels": batch.labels, **batch.token_fields}
        for first, last in pairwise(bounds):
            slot = int(batch.token_fields["sample_slot"][first])
            if slot != EMPTY_SLOT:
                found.append((slot, {name: value[first:last].clone() for name, value in columns.items()}))
    return [document for _, document in sorted(found, key=lambda entry: entry[0])]

"""One rollout batch: prompts drawn, samples generated, judged, chosen, and made documents.

    draw → generate → judge → leave out groups that teach nothing → documents by optimizer step

All ranks draw the same prompts and take their share of them. Groups stay whole on a rank. A rank that is left with
fewer samples than it has places leaves places empty: losses have denominators over all ranks, so nothing is distorted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lit_interns1.rollout.plan import RolloutPlan, placed_document
from lit_interns1.rollout.prompt_format import PromptFormat
from lit_interns1.rollout.prompts import PromptOutcome, PromptSampler, PromptSource
from lit_interns1.rollout.samples import GenerationRequest, Prompt, Sample, SamplingOptions, ScoredSample, sample_seeds

Generate = Callable[[Sequence[GenerationRequest], SamplingOptions, int | None], list[list[Sample]]]
"""Of an engine: requests, options, and how many finished requests are enough."""


class Rewards(Protocol):
    """Judges samples, group by group.

    What has statistics may also have, as `MixtureOfRewards`: `check_sources(sources)`, which refuses prompts it cannot
    judge before anything is generated; `start_rollout(number)` and `finish_rollout(gather)`, called around the
    judgements of a rollout batch on all ranks together; `state_dict()` and `load_state_dict(state)`.
    """

    def __call__(
        self, prompts: Sequence[Prompt], samples: Sequence[Sequence[Sample]], texts: Sequence[Sequence[str]]
    ) -> list[list[ScoredSample]]:
        """The samples of each prompt with their rewards; NaN where there is no judgement."""


@dataclass(frozen=True)
class Selection:
    """Which groups are learned from.

    Attributes:
        drop_equal_groups: Leave out groups whose rewards are all equal, or all failed: they have no advantage (dynamic
            sampling of DAPO, arXiv 2503.14476).
        over_sample: Draw so many more prompts, as a fraction of P, and stop generating when P are finished.
        max_rounds: Rounds of drawing and generating, until no rank lacks groups.
        mask_truncated: Do not learn from samples that reached the limit of tokens; they count as failed.

    Raises:
        ValueError: If an option is out of range.
    """

    drop_equal_groups: bool = False
    over_sample: float = 0.0
    max_rounds: int = 1
    mask_truncated: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.over_sample < math.inf:
            raise ValueError(f"over_sample = {self.over_sample} must be at least 0")
        if self.max_rounds < 1:
            raise ValueError(f"max_rounds must be at least 1, got {self.max_rounds}")


@dataclass
class Collected:
    """A rollout batch of this rank.

    Attributes:
        number: Of the batch.
        documents: By optimizer step, in the order of their slots; see `Sample.document`, with `rewards`, `sample_slot`
            and `group_id` (0 … P−1 over all ranks).
        samples: The same samples with their texts and rewards, and those that were left out.
        sums: Metrics over all samples of this rank that were generated, as (sum, count); names differ among ranks.
        seconds: Wall time by phase.
    """

    number: int
    documents: list[list[dict[str, Tensor]]]
    samples: list[ScoredSample]
    sums: dict[str, tuple[float, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class Collector:
    """Makes rollout batches.

    Attributes:
        source: Prompts by number.
        sampler: Chooses numbers.
        form: Prompts to tokens.
        rewards: The judges.
        plan: Sizes.
        selection: Which groups are learned from.
        options: How tokens are drawn.
        rank: This rank among the data-parallel ones.
        seed: Of the samples.
        routing: (MoE layers, K) if documents need routing.
    """

    source: PromptSource
    sampler: PromptSampler
    form: PromptFormat
    rewards: Rewards
    plan: RolloutPlan
    selection: Selection
    options: SamplingOptions
    rank: int = 0
    seed: int = 0
    routing: tuple[int, int] | None = None

    def collect(self, number: int, generate: Generate) -> Collected:
        """The batch of that number. All ranks call it together."""
        per_rank = self.plan.prompts_per_rollout // self.plan.data_parallel_size
        kept: list[list[ScoredSample]] = []
        everything: list[ScoredSample] = []
        outcomes: list[PromptOutcome] = []
        seconds = {"generate": 0.0, "judge": 0.0}
        if hasattr(self.rewards, "start_rollout"):
            self.rewards.start_rollout(number)
        for round_ in range(self.selection.max_rounds):
            if round_ and not self._anyone(len(kept) < per_rank):
                break
            groups, took = self._round(number, round_, generate)
            for name, value in took.items():
                seconds[name] += value
            for group in groups:
                everything += group
                outcomes.append(_outcome(group))
                finished = all(s.sample.finish_reason != "abort" for s in group)
                if finished and len(kept) < per_rank and not (self.selection.drop_equal_groups and _equal(group)):
                    kept.append(group)
        if hasattr(self.rewards, "finish_rollout"):
            self.rewards.finish_rollout(self._gathered)
        self.sampler.report(self._all_outcomes(outcomes))
        return Collected(number, self._documents(kept), everything, _sums(everything), seconds)

    def _round(self, number: int, round_: int, generate: Generate) -> tuple[list[list[ScoredSample]], dict[str, float]]:
        """Groups of this rank's share of a draw; aborted ones, too."""
        prompts, requests, enough = self.draw(number, round_)
        started = time.perf_counter()
        samples = generate(requests, self.options, enough)
        generated = time.perf_counter()
        texts = [[self.form.text(sample.response_ids) for sample in group] for group in samples]
        scored = self.rewards(prompts, samples, texts)
        took = {"generate": generated - started, "judge": time.perf_counter() - generated}
        return scored, took

    def draw(self, number: int, round_: int = 0) -> tuple[list[Prompt], list[GenerationRequest], int | None]:
        """This rank's share of the next prompts: the prompts, what an engine is asked, and how many are enough.

        Args:
            number: Of the rollout batch.
            round_: Of drawing and generating.
        """
        per_rank = self.plan.prompts_per_rollout // self.plan.data_parallel_size
        extra = math.ceil(per_rank * self.selection.over_sample)
        width = (per_rank + extra) * self.plan.data_parallel_size
        indices = self.sampler.draw(width)
        # by optimizer step, so that a step has the same prompts on any number of ranks; what is drawn beyond P at last
        first_extra = self.plan.prompts_per_rollout + self.rank * extra
        places = [p for update in self.plan.places(self.rank) for p in update]
        places += range(first_extra, first_extra + extra)
        prompts = [self.form.prompt(self.source[indices[place]], indices[place]) for place in places]
        requests = [
            GenerationRequest(
                prompt.ids, sample_seeds(self.seed, number, round_ * width + place, self.plan.num_generations)
            )
            for prompt, place in zip(prompts, places, strict=True)
        ]
        return prompts, requests, per_rank if extra else None

    def _documents(self, groups: list[list[ScoredSample]]) -> list[list[dict[str, Tensor]]]:
        """Documents by optimizer step."""
        found: list[list[dict[str, Tensor]]] = []
        per_update, count = self.plan.prompts_per_rank_update, self.plan.num_generations
        for update in range(self.plan.updates_per_rollout):
            slots = self.plan.slots(update, self.rank)
            documents = []
            for place, group in enumerate(groups[update * per_update : (update + 1) * per_update]):
                first = slots[place * count]
                for offset, scored in enumerate(group):
                    documents.append(self._document(scored, first + offset, first // count))
            found.append(documents)
        return found

    def _document(self, scored: ScoredSample, slot: int, group: int) -> dict[str, Tensor]:
        sample = scored.sample
        if not sample.response_ids:  # aborted before its first token: nothing to learn, but a place
            sample = replace(
                sample, response_ids=[self.form.stop_ids[-1]], logprobs=torch.full((1,), torch.nan),
                weight_versions=torch.tensor([-1]), routed_experts=None,
            )  # fmt: skip
        truncated = self.selection.mask_truncated and sample.finish_reason == "length"
        reward = scored.reward if scored.counts else 0.0
        return placed_document(sample, slot, group, reward, scored.counts and not truncated, self.routing)

    # over the ranks

    def _anyone(self, flag: bool) -> bool:
        return any(self._gathered(flag))

    def _all_outcomes(self, mine: list[PromptOutcome]) -> list[PromptOutcome]:
        return [outcome for part in self._gathered(mine) for outcome in part]

    def _gathered(self, value: Any) -> list[Any]:
        return gather_objects(value, self.plan.data_parallel_size)


def gather_objects(value: Any, ranks: int) -> list[Any]:
    """The value of every data-parallel rank, in their order."""
    if ranks == 1:
        return [value]
    values: list[Any] = [None] * ranks
    dist.all_gather_object(values, value)
    return values


def _equal(group: Sequence[ScoredSample]) -> bool:
    """Whether nothing can be learned from a group."""
    rewards = {scored.reward for scored in group if scored.counts}
    return len(rewards) < 2


def _outcome(group: Sequence[ScoredSample]) -> PromptOutcome:
    prompt = group[0].prompt
    rewards = tuple(scored.reward if scored.counts else math.nan for scored in group)
    known = [scored.correct for scored in group if scored.counts and scored.correct is not None]
    return PromptOutcome(prompt.index, prompt.source, rewards, sum(known) / len(known) if known else math.nan)


def _sums(samples: Sequence[ScoredSample]) -> dict[str, tuple[float, float]]:
    """(Σ, n) by metric: lengths in tokens, and fractions."""
    found: dict[str, tuple[float, float]] = {}

    def add(name: str, value: float) -> None:
        total, count = found.get(name, (0.0, 0.0))
        found[name] = (total + value, count + 1.0)

    for scored in samples:
        aborted = scored.sample.finish_reason == "abort"
        add("aborted", float(aborted))
        if aborted:
            continue
        add("response_length", float(len(scored.sample.response_ids)))
        add("prompt_length", float(len(scored.sample.prompt_ids)))
        add("truncated", float(scored.sample.finish_reason == "length"))
        add("failed", float(not scored.counts))
        for name, value in scored.parts.items():
            if value == value:
                add(f"judge/{name}", value)
        if not scored.counts:
            continue
        add("reward", scored.reward)
        if scored.prompt.source:
            add(f"reward/{scored.prompt.source}", scored.reward)
        if scored.correct is not None:
            add("correct", float(scored.correct))
    return found


def merged_means(parts: Sequence[Mapping[str, tuple[float, float]]]) -> dict[str, float]:
    """Means over the ranks' sums, by name."""
    names = sorted({name for part in parts for name in part})
    totals = {name: [sum(part.get(name, (0.0, 0.0))[i] for part in parts) for i in (0, 1)] for name in names}
    return {name: total / count for name, (total, count) in totals.items() if count}

"""Prompts in, prepared micro-batches out: the data of reinforcement learning.

    prompts → engine → judges → advantages → micro-batches         engine and objective are those of the `PolicyModule`

Generation happens when the first micro-batch of a rollout batch is asked for, on all ranks together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any, Protocol

from lit_interns1.data.packed_batch import PackedBatch
from lit_interns1.data.tokenized_data_module import TokenizedDataModule
from lit_interns1.data.tokenizer import TextTokenizer
from lit_interns1.rollout.collector import Collected, Collector, Rewards, Selection, gather_objects, merged_means
from lit_interns1.rollout.engine import RolloutEngine
from lit_interns1.rollout.overlap import Asked, GenerationAhead
from lit_interns1.rollout.plan import RolloutPlan, blank_document, micro_batches
from lit_interns1.rollout.prompt_format import PromptFormat
from lit_interns1.rollout.prompts import PromptSampler, PromptSource, ShuffledPrompts
from lit_interns1.rollout.rollout_loader import ReadyRollout, RolloutLoader
from lit_interns1.rollout.samples import GenerationRequest, Sample, SamplingOptions, ScoredSample, sample_seeds


class Policy(Protocol):
    """What the data module asks of the LightningModule."""

    temperature: float
    """Of training samples."""

    def generate_samples(
        self, requests: Sequence[GenerationRequest], options: SamplingOptions, enough: int | None = None
    ) -> list[list[Sample]]:
        """Samples of the present weights; all ranks call it together."""

    def synced_engine(self) -> RolloutEngine:
        """The engine, with the present weights; all ranks call it together."""

    def prepare_rollout(self, updates: list[list[PackedBatch]], number: int) -> list[list[PackedBatch]]:
        """The micro-batches with everything that the losses need."""

    def routing_shape(self) -> tuple[int, int] | None:
        """(MoE layers, K) if the routing of samples is replayed."""


class ScoredGroups:
    """Samples of validation prompts, with their rewards; not a collection, so that Lightning leaves it whole.

    Args:
        groups: Samples by prompt; empty on a rank that has no prompt left.
    """

    def __init__(self, groups: list[list[ScoredSample]]) -> None:
        self.groups = groups

    def to(self, *arguments: Any, **options: Any) -> ScoredGroups:
        """Nothing here is moved."""
        return self


class RolloutDataModule(TokenizedDataModule):
    """Rollout batches as micro-batches of `PackedBatch`es.

    Args:
        prompts: Where training prompts come from.
        rewards: The judges, such as `MixtureOfRewards`.
        validation_prompts: Prompts that are only validated on; None = no validation.
        form: How prompts become tokens.
        sampler: Chooses prompts; default: each once per epoch, shuffled.
        prompts_per_rollout: P, prompts of a rollout batch over all ranks.
        num_generations: G, samples per prompt.
        updates_per_rollout: U, optimizer steps on each rollout batch.
        samples_per_micro_batch: k, samples of one forward pass on one rank.
        max_completion_length: Limit of new tokens per sample.
        top_p: Nucleus mass of training samples. Below 1 their log μ is that of a truncated distribution.
        top_k: Draw among the k most probable tokens; 0 = all.
        selection: Which groups are learned from.
        rollouts_per_epoch: Length of an epoch; default: as many as the prompts fill.
        validation_limit: Validate on at most this many prompts.
        validation_generations: Samples per validation prompt.
        validation_temperature: Of validation samples; 0 = greedy.
        validation_batch: Prompts of one validation step on one rank.
        seed: Of prompts and samples.
        overlap: Generate the next rollout batch while this one is trained on, with an engine that generates beside the
            trainer; samples are then one rollout batch old.

    Raises:
        ValueError: If sizes do not fit, or there are fewer prompts than a rollout needs.
    """

    def __init__(
        self,
        prompts: PromptSource,
        rewards: Rewards,
        validation_prompts: PromptSource | None = None,
        form: PromptFormat | None = None,
        sampler: PromptSampler | None = None,
        prompts_per_rollout: int = 32,
        num_generations: int = 8,
        updates_per_rollout: int = 1,
        samples_per_micro_batch: int = 32,
        max_completion_length: int = 512,
        top_p: float = 1.0,
        top_k: int = 0,
        selection: Selection | None = None,
        rollouts_per_epoch: int | None = None,
        validation_limit: int | None = None,
        validation_generations: int = 1,
        validation_temperature: float = 1.0,
        validation_batch: int = 64,
        seed: int = 0,
        overlap: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (
            ("validation_generations", validation_generations),
            ("validation_batch", validation_batch),
            ("validation_limit", 1 if validation_limit is None else validation_limit),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.prompts, self.rewards, self.validation_prompts = prompts, rewards, validation_prompts
        self.form, self.sampler = form or PromptFormat(), sampler or ShuffledPrompts()
        self.sizes = (prompts_per_rollout, num_generations, updates_per_rollout, samples_per_micro_batch)
        RolloutPlan(*self.sizes)  # what does not fit one rank fits none
        self.options = SamplingOptions(max_completion_length, 1.0, top_p, top_k, self.form.stop_ids)
        self.selection, self.rollouts_per_epoch = selection or Selection(), rollouts_per_epoch
        self.validation_limit, self.validation_generations = validation_limit, validation_generations
        self.validation_temperature, self.validation_batch, self.seed = validation_temperature, validation_batch, seed
        self.collected: Collected | None = None
        """The last rollout batch of this rank: samples, texts, rewards."""
        self.rollout_metrics: dict[str, float] = {}
        """Means over the last rollout batch of all ranks."""
        self._ahead = GenerationAhead() if overlap else None
        self._loader: RolloutLoader | None = None
        self._restored: dict[str, Any] = {}
        self._sampler_started = False

    # -- what others read ---------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer, with the tokens for turns."""
        return self.form.tokenizer

    @property
    def plan(self) -> RolloutPlan:
        """Sizes on the present number of ranks."""
        return RolloutPlan(*self.sizes, data_parallel_size=self._ranks()[0])

    @property
    def policy(self) -> Policy:
        """The LightningModule that generates.

        Raises:
            TypeError: If it cannot.
        """
        module: Any = self.trainer.lightning_module if self.trainer is not None else None
        if not hasattr(module, "generate_samples"):
            raise TypeError(
                f"RolloutDataModule needs a module that generates, such as PolicyModule; got {type(module).__name__}"
            )
        return module

    # -- Lightning's hooks ---------------------------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        """Starts the sampler; for `fit` also sets the accumulation on the Trainer.

        Raises:
            ValueError: If the Trainer has another accumulation, there are too few prompts, or `overlap` is asked of an
                engine that cannot.
        """
        if not self._sampler_started:
            sources = _sources(self.prompts)
            if hasattr(self.rewards, "check_sources"):
                self.rewards.check_sources({*sources, *_sources(self.validation_prompts)})
            self.sampler.start(sources, self.seed)
            self._sampler_started = True
        if stage not in ("fit", None) or self.trainer is None:
            return
        plan = self.plan
        if self.trainer.accumulate_grad_batches not in (1, plan.accumulation):
            raise ValueError(
                f"Trainer(accumulate_grad_batches={self.trainer.accumulate_grad_batches}) contradicts the "
                f"{plan.accumulation} micro-batches of an optimizer step; leave accumulate_grad_batches at 1"
            )
        self.trainer.accumulate_grad_batches = plan.accumulation
        self._loader = None
        engine = getattr(self.trainer.lightning_module, "engine", None)
        if self._ahead is not None and not (engine is not None and engine.capabilities.concurrent):
            raise ValueError(
                "overlap = True needs an engine that generates beside the trainer, such as RemoteEngine; "
                f"{type(engine).__name__} does not"
            )

    def teardown(self, stage: str | None = None) -> None:
        """Ends a generation that is under way."""
        if self._ahead is not None:
            self._ahead.stop()

    def train_dataloader(self) -> RolloutLoader:
        """The loader of this rank; the same one, at its position, until the next `setup`."""
        if self._loader is None:
            plan = self.plan
            per_epoch = self.rollouts_per_epoch or max(1, len(self.prompts) // plan.prompts_per_rollout)
            identity = {
                "prompts": len(self.prompts), "seed": self.seed, "prompts_per_rollout": plan.prompts_per_rollout,
                "num_generations": plan.num_generations, "updates_per_rollout": plan.updates_per_rollout,
            }  # fmt: skip
            self._loader = RolloutLoader(self._make, plan, per_epoch, self._ranks()[1], identity)
            if self._restored:
                self._restore(self._restored)
        return self._loader

    def val_dataloader(self) -> ValidationLoader | list[Any]:
        """Every validation prompt once over all ranks."""
        if self.validation_prompts is None:
            return []
        count = min(len(self.validation_prompts), self.validation_limit or len(self.validation_prompts))
        size, rank = self._ranks()
        return ValidationLoader(self._validate, count, self.validation_batch, size, rank)

    test_dataloader = val_dataloader

    def state_dict(self) -> dict[str, Any]:
        """Position, sampler, and the samples of the rollout in progress. All ranks call it together."""
        if self._loader is None:
            return {}
        state = {**self._loader.state_dict(), "sampler": dict(self.sampler.state_dict())}
        if hasattr(self.rewards, "state_dict"):
            state["rewards"] = dict(self.rewards.state_dict())
        rollout = self._loader.rollout_state()
        return state if rollout is None else {**state, "rollout": rollout}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues where the checkpoint was written."""
        self._restored = state_dict
        if self._loader is not None and state_dict:
            self._restore(state_dict)

    def _restore(self, state: Mapping[str, Any]) -> None:
        assert self._loader is not None
        self._loader.load_state_dict(state)
        self.sampler.load_state_dict(state["sampler"])
        if "rewards" in state and hasattr(self.rewards, "load_state_dict"):
            self.rewards.load_state_dict(state["rewards"])
        if "rollout" in state:
            self._loader.load_rollout(state["rollout"])

    # -- rollouts ------------------------------------------------------------------------------------------------------

    def _collector(self, plan: RolloutPlan) -> Collector:
        options = SamplingOptions(**{**vars(self.options), "temperature": self.policy.temperature})
        return Collector(
            self.prompts, self.sampler, self.form, self.rewards, plan, self.selection, options, self._ranks()[1],
            self.seed, self.policy.routing_shape(),
        )  # fmt: skip

    def _make(self, number: int) -> ReadyRollout:
        """Generates, judges and prepares a rollout batch."""
        plan, policy = self.plan, self.policy
        collected = self._collector(plan).collect(number, self._generate)
        if self._ahead is not None and self._ahead.seconds is not None:
            collected.seconds |= {"wait": collected.seconds["generate"], "generate": self._ahead.seconds}
            self._ahead.seconds = None
        started = time.perf_counter()
        like = blank_document(policy.routing_shape())
        updates = [micro_batches(documents, plan, like) for documents in collected.documents]
        ready = policy.prepare_rollout(updates, number)
        collected.seconds["prepare"] = time.perf_counter() - started
        parts = gather_objects(collected.sums, plan.data_parallel_size)
        tokens = sum(part.get("response_length", (0.0, 0.0))[0] for part in parts)
        self.rollout_metrics = {f"rollout/{name}": value for name, value in merged_means(parts).items()} | {
            f"throughput/{name}_seconds": seconds for name, seconds in collected.seconds.items()
        }
        self.rollout_metrics["throughput/rollout_tokens_per_second"] = tokens / max(collected.seconds["generate"], 1e-9)
        self.collected = collected
        if self._ahead is not None and self._is_wanted(number + 1):
            following = replace(self._collector(plan), sampler=deepcopy(self.sampler))  # which draws in earnest later
            _, requests, enough = following.draw(number + 1)
            self._ahead.start(policy.synced_engine(), Asked(requests, following.options, enough))
        return ReadyRollout(number, ready)

    def _generate(
        self, requests: Sequence[GenerationRequest], options: SamplingOptions, enough: int | None = None
    ) -> list[list[Sample]]:
        """Samples that were generated ahead, or else of the present weights."""
        ahead = None if self._ahead is None else self._ahead.take(Asked(requests, options, enough))
        return self.policy.generate_samples(requests, options, enough) if ahead is None else ahead

    def _is_wanted(self, number: int) -> bool:
        """Whether the Trainer will come to a rollout batch."""
        assert self.trainer is not None
        assert self._loader is not None
        steps, epochs = self.trainer.max_steps, self.trainer.max_epochs
        within = steps < 0 or number * self.plan.updates_per_rollout < steps
        return within and (epochs is None or epochs < 0 or number < epochs * self._loader.rollouts_per_epoch)

    def _validate(self, places: Sequence[int]) -> ScoredGroups:
        """Samples of validation prompts, judged; all ranks call it together, with as many calls."""
        source = self.validation_prompts
        assert source is not None
        prompts = [self.form.prompt(source[place], place) for place in places]
        options = SamplingOptions(
            **{**vars(self.options), "temperature": self.validation_temperature, "top_p": 1.0, "top_k": 0}
        )
        requests = [
            GenerationRequest(prompt.ids, sample_seeds(self.seed, -1, place, self.validation_generations))
            for prompt, place in zip(prompts, places, strict=True)
        ]
        if self._ahead is not None:
            self._ahead.settle()
        samples = self.policy.generate_samples(requests, options, None)
        texts = [[self.form.text(sample.response_ids) for sample in group] for group in samples]
        return ScoredGroups(self.rewards(prompts, samples, texts) if prompts else [])


def _sources(prompts: PromptSource | None) -> list[str]:
    """The source of every prompt."""
    return [] if prompts is None else [prompts[index].source for index in range(len(prompts))]


class ValidationLoader:
    """Validation prompts in steps, as many on every rank; the last may be empty on some.

    Args:
        make: Generates for the prompts of the given numbers.
        count: Prompts.
        batch: Prompts of a step on one rank.
        size: W.
        rank: r.
    """

    equal_on_all_ranks = True

    def __init__(
        self, make: Callable[[Sequence[int]], ScoredGroups], count: int, batch: int, size: int, rank: int
    ) -> None:
        self.make, self.count, self.batch, self.size, self.rank = make, count, batch, size, rank

    def __len__(self) -> int:
        """Steps."""
        return -(-self.count // (self.batch * self.size))

    def __iter__(self) -> Iterator[ScoredGroups]:
        for step in range(len(self)):
            first = (step * self.size + self.rank) * self.batch
            yield self.make(range(min(first, self.count), min(first + self.batch, self.count)))

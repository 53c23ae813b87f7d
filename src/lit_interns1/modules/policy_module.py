"""Reinforcement learning of a language model: any policy objective, any engine, several steps on one rollout batch.

    samples of π_old from an engine → log π_old, log π_ref, values, token rewards, once → optimizer steps on log π_θ

What a rollout batch needs is asked of the objective (`requires`) and made before its first step; the steps themselves
are those of any module here. A token reward model (OREAL) and a critic (PPO) are networks beside the policy that learn
in the same step, with gradients of their own losses only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lit_interns1.data.packed_batch import PackedBatch
from lit_interns1.models import LanguageModelConfig
from lit_interns1.models.config import changed
from lit_interns1.models.reward_model import RewardModel
from lit_interns1.modules.frozen_reference import FrozenReference, packed_inputs
from lit_interns1.modules.language_model_module import LanguageModelModule
from lit_interns1.nn.moe import BalanceLoss
from lit_interns1.nn.precision import INTERN_S1_PRO, AppliedPrecision, PrecisionRecipe, apply_precision
from lit_interns1.objectives.metrics import Metrics
from lit_interns1.objectives.policy import (
    GRPO,
    Advantages,
    GroupNormalized,
    PolicyInputs,
    PolicyObjective,
    RolloutCorrection,
    RolloutSettings,
    TokenRewardLoss,
    ValueLoss,
    WeightedTokenLoss,
    prepare_updates,
)
from lit_interns1.objectives.rollout_metrics import RolloutMetrics
from lit_interns1.optim import TokenSchedule, build_optimizer
from lit_interns1.rollout.embedded import EmbeddedEngine
from lit_interns1.rollout.engine import RolloutEngine
from lit_interns1.rollout.rollout_data_module import ScoredGroups
from lit_interns1.rollout.samples import GenerationRequest, Sample, SamplingOptions
from lit_interns1.training import SummedLoss, all_reduce_sum

Replay = Literal["none", "r2", "r3"]


class PolicyModule(LanguageModelModule):
    """Trains a policy on rollout batches of a `RolloutDataModule`.

    Args:
        config: As for `LanguageModelModule`.
        changes: As for `LanguageModelModule`.
        optimizer: As for `LanguageModelModule`; default AdamW, rate 1e-6, β (0.9, 0.95), decay 0.1.
        schedule: As for `LanguageModelModule`.
        objective: The policy loss; default `GRPO()`.
        advantages: The estimator; default: the one that the objective names.
        engine: What generates; default `EmbeddedEngine()`.
        temperature: τ of training samples, and of all log-probabilities that are compared with theirs.
        replay: Which experts training visits: "r3" those of the rollout, "r2" those of the forward pass that gives
            log π_old, "none" whatever the router chooses now (arXiv 2510.11370, 2512.01374). Scores stay live. The
            reference always chooses for itself.
        old_logprobs: "recompute" runs the trained model at the weights of the rollout; "rollout" takes the engine's.
        correction: Weights and rejection by the mismatch of the engines.
        reward_kl: β of the KL to the reference in the reward of a sample.
        one_pair_per_group: Learn from one right and one wrong sample of each group, at random (OREAL's released code).
        reference_weights: Where the reference comes from, if an objective needs one; default: the initial weights.
        reference_offload: Keep the reference in the memory of the host between uses.
        critic: Loss of a critic beside the policy; None = no critic.
        side_learning_rate: Rate of critic and token reward model; default: that of the policy.
        policy_freeze_steps: Optimizer steps in which only critic and token reward model learn (10 in OREAL).
        freeze_router: Routers do not learn.
        trainable: Names of the policy's parameters that learn, `*` stands for any characters, as in
            `["layers.29.*", "norm.weight"]`; None = all.
        precision: Formats in which the policy computes, in training and, since the embedded engine runs the same
            network, in the rollout: `PrecisionRecipe`, or "intern_s1_pro" for experts in FP8, the rest in bfloat16
            and the head in float32. None: as its config says.
        log_entropy: Log the policy's entropy; costs a little time.
        balance: Balance and z losses of the routers; default: none.
        seed: As for `LanguageModelModule`.
        decay_embeddings: As for `LanguageModelModule`.
        init_weights: As for `LanguageModelModule`.

    Logs `train/loss`, `policy/…` (entropy, terms of the loss, clip fractions, KL), `rollout/…`, `mismatch/…`,
    `throughput/…`, and in validation `val/reward`, `val/reward_standard_error`, `val/correct`, `val/response_length`.

    Raises:
        ValueError: If an option is out of range, or options exclude one another.
    """

    def __init__(
        self,
        config: LanguageModelConfig | str | None = None,
        changes: dict[str, Any] | None = None,
        optimizer: Callable[[Iterable[Any]], Optimizer] = lambda parameters: AdamW(
            parameters, lr=1e-6, betas=(0.9, 0.95), weight_decay=0.1
        ),
        schedule: TokenSchedule | None = None,
        objective: PolicyObjective | None = None,
        advantages: Advantages | None = None,
        engine: RolloutEngine | None = None,
        temperature: float = 1.0,
        replay: Replay = "r3",
        old_logprobs: Literal["recompute", "rollout"] = "recompute",
        correction: RolloutCorrection | None = None,
        reward_kl: float = 0.0,
        one_pair_per_group: bool = False,
        reference_weights: str | None = None,
        reference_offload: bool = False,
        critic: ValueLoss | None = None,
        side_learning_rate: float | None = None,
        policy_freeze_steps: int = 0,
        freeze_router: bool = False,
        trainable: list[str] | None = None,
        precision: PrecisionRecipe | Literal["intern_s1_pro"] | None = None,
        log_entropy: bool = True,
        balance: BalanceLoss | None = None,
        seed: int = 0,
        decay_embeddings: bool = True,
        init_weights: str | None = None,
    ) -> None:
        super().__init__(
            config, changes, optimizer, schedule, None, balance or BalanceLoss(coefficient=0.0), seed, decay_embeddings,
            init_weights,
        )  # fmt: skip
        if not temperature > 0:
            raise ValueError(f"temperature = {temperature} must be positive: greedy samples have no gradient")
        if replay not in ("none", "r2", "r3"):
            raise ValueError(f"replay = {replay!r} must be none, r2 or r3")
        if old_logprobs not in ("recompute", "rollout"):
            raise ValueError(f"old_logprobs = {old_logprobs!r} must be recompute or rollout")
        if replay == "r2" and old_logprobs == "rollout":
            raise ValueError(
                "replay = 'r2' records routing in the forward pass that old_logprobs = 'rollout' leaves out"
            )
        if policy_freeze_steps < 0:
            raise ValueError(f"policy_freeze_steps must not be negative, got {policy_freeze_steps}")
        if isinstance(precision, str) and precision != "intern_s1_pro":
            raise ValueError(f"precision = {precision!r} must be a PrecisionRecipe, 'intern_s1_pro' or None")
        self.precision = INTERN_S1_PRO if isinstance(precision, str) else precision
        self._applied_precision: AppliedPrecision | None = None
        if freeze_router and self.config.moe is not None:
            self.config = changed(self.config, {"moe": {"freeze_router": True}})
        self.policy_objective = objective or GRPO()
        self.engine: RolloutEngine = engine or EmbeddedEngine()
        self.temperature, self.replay, self.old_logprobs = temperature, replay, old_logprobs
        found: Advantages = advantages or getattr(self.policy_objective, "advantages", None) or GroupNormalized()
        self.settings = RolloutSettings(found, reward_kl, correction, one_pair_per_group)
        self.reference_weights, self.reference_offload = reference_weights, reference_offload
        self.value_loss, self.side_learning_rate = critic, side_learning_rate
        self.policy_freeze_steps, self.log_entropy, self.trainable = policy_freeze_steps, log_entropy, trainable
        self.requires = self.policy_objective.requires | self.settings.requires
        self.token_reward_loss = TokenRewardLoss() if "token_rewards" in self.requires else None
        if "values" in self.requires and critic is None:
            raise ValueError(f"{type(self.policy_objective).__name__} needs values: set critic to a ValueLoss")
        self.rollout_metrics: dict[str, float] = {}
        """Of the last rollout batch, over all ranks."""
        self.validation_rollouts = RolloutMetrics()
        self._connected = False

    # -- building ----------------------------------------------------------------------------------------------------

    def build_beside(self) -> None:
        """The reference, the token reward model and the critic, as far as they are needed."""
        super().build_beside()
        if self.trainable is not None:
            self._freeze(self.trainable)
        if "ref_logprobs" in self.requires:
            self.reference = FrozenReference(self.build_model(), self.reference_offload)
        if self.token_reward_loss is not None:
            self.token_reward_model = RewardModel(self.config)
        if self.value_loss is not None:
            self.critic = RewardModel(self.config)

    def _freeze(self, patterns: list[str]) -> None:
        names = [name for name, _ in self.model.named_parameters()]
        unknown = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]
        if unknown or not patterns:
            raise ValueError(
                f"trainable = {patterns}: no parameter is called {unknown or 'so'}; names are like {names[0]!r}"
            )
        for name, parameter in self.model.named_parameters():
            learns = any(fnmatchcase(name, pattern) for pattern in patterns)
            parameter.requires_grad_(parameter.requires_grad and learns)

    def _side_networks(self) -> list[RewardModel]:
        return [getattr(self, name) for name in ("token_reward_model", "critic") if hasattr(self, name)]

    def materialize(self, device: torch.device | str) -> None:
        """The networks beside the policy start from the same weights; heads of reward models from zero."""
        super().materialize(device)
        if hasattr(self, "reference"):
            self.fill(self.reference.network, device, self.reference_weights)
        for network in self._side_networks():
            self.fill(network, device)

    def configure_optimizers(self) -> Optimizer:
        """One optimizer over policy and networks beside it, each with parameter groups of its own."""
        networks = [self.model, *self._side_networks()]
        optimizer = build_optimizer(self.make_optimizer, *networks, decay_embeddings=self.decay_embeddings)
        own = {id(parameter) for parameter in self.model.parameters()}
        if self.side_learning_rate is not None:
            for group in optimizer.param_groups:
                if id(group["params"][0]) not in own:
                    group["lr"] = self.side_learning_rate
        return optimizer

    def on_fit_start(self) -> None:
        """Switches the number formats."""
        super().on_fit_start()
        self._apply_precision()

    on_validation_start = on_test_start = on_fit_start

    def _apply_precision(self) -> None:
        if self.precision is not None and self._applied_precision is None:
            self._applied_precision = apply_precision(self.model, self.precision)

    # -- what the data module asks -------------------------------------------------------------------------------------

    def routing_shape(self) -> tuple[int, int] | None:
        """(MoE layers, K) if the routing of samples is replayed."""
        if self.replay == "none" or self.config.moe is None:
            return None
        return self.config.num_moe_layers, self.config.moe.experts_per_token

    def generate_samples(
        self, requests: Sequence[GenerationRequest], options: SamplingOptions, enough: int | None = None
    ) -> list[list[Sample]]:
        """Samples of the present weights; all ranks call it together."""
        return self.synced_engine().generate(requests, options, enough)

    def synced_engine(self) -> RolloutEngine:
        """The engine, with the present weights; all ranks call it together."""
        if not self._connected:
            self.engine.connect(self.model, needs_routing=self.replay == "r3" and self.routing_shape() is not None)
            self._connected = True
        version = self.trainer.global_step if self._trainer is not None else 0
        copied = self.engine.capabilities.copies_weights
        self.engine.sync_weights(self.exported_weights() if copied else iter(()), version)
        return self.engine

    def exported_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The policy's weights under their names in a Hugging Face folder, one by one; all ranks iterate together."""
        from lit_interns1.checkpoints.huggingface import exported_tensors

        yield from exported_tensors(self.model)

    @torch.no_grad()
    def prepare_rollout(self, updates: list[list[PackedBatch]], number: int) -> list[list[PackedBatch]]:
        """Adds to micro-batches, by optimizer step, everything that the losses need. All ranks call it together.

        Args:
            updates: With the fields of `Collector`.
            number: Of the rollout batch; seeds random choices.
        """
        with self._evaluating():
            scored = [[self._with_scores(batch.to(self.device)) for batch in batches] for batches in updates]
        parts = [
            [PolicyInputs.from_fields(b.token_fields, b.token_fields["sample_slot"]) for b in batches]
            for batches in scored
        ]
        groups = [torch.cat([b.token_fields["group_id"] for b in batches]) for batches in scored]
        losses: list[WeightedTokenLoss] = [self.policy_objective]
        losses += [loss for loss in (self.token_reward_loss, self.value_loss) if loss is not None]
        seed = self.seed * 1_000_003 + number
        steps, metrics = prepare_updates([PolicyInputs.joined(p) for p in parts], groups, losses, self.settings, seed)
        self.rollout_metrics = reduced(metrics)
        ready = []
        for batches, step in zip(scored, steps, strict=True):
            split = step.split([batch.input_ids.numel() for batch in batches])
            ready.append([
                replace(batch, token_fields={**batch.token_fields, **inputs.fields()})
                for batch, inputs in zip(batches, split, strict=True)
            ])  # fmt: skip
        return ready

    def _with_scores(self, batch: PackedBatch) -> PackedBatch:
        """The batch with log π_old, log π_ref, values and token rewards, as far as they are needed."""
        fields = dict(batch.token_fields)
        if self.replay != "r3":
            fields.pop("routed_experts", None)
        batch = replace(batch, token_fields=fields)
        if self.old_logprobs == "rollout":
            fields["old_logprobs"] = fields["rollout_logprobs"]
        else:
            record = self.replay == "r2" and self.config.moe is not None
            output = self(batch, targets=batch.labels, temperature=self.temperature, record_routing=record)
            fields["old_logprobs"] = output.scores.logp_T
            if record:
                fields["routed_experts"] = output.routing.stacked()
        if hasattr(self, "reference"):
            fields["ref_logprobs"] = self.reference.reference_scores(batch, temperature=self.temperature).logp_T
        if hasattr(self, "token_reward_model"):
            fields["token_rewards"] = self.token_reward_model(**packed_inputs(batch)).values_T
        if hasattr(self, "critic"):
            fields["values"] = self.critic(**packed_inputs(batch)).values_T
        return replace(batch, token_fields=fields)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        networks: list[nn.Module] = [self.model, *self._side_networks()]
        modes = [network.training for network in networks]
        try:
            for network in networks:
                network.eval()
            yield
        finally:
            for network, mode in zip(networks, modes, strict=True):
                network.train(mode)

    # -- steps -------------------------------------------------------------------------------------------------------

    def training_step(self, batch: PackedBatch, batch_idx: int) -> SummedLoss:  # type: ignore[override]
        """The policy loss, and those of the networks beside it."""
        inputs = PolicyInputs.from_fields(batch.token_fields, batch.sample_id_T)
        entropy = self.log_entropy or self.policy_objective.needs_entropy
        output = self(batch, targets=batch.labels, temperature=self.temperature, entropy=entropy)
        assert output.scores is not None
        loss, metrics = self.policy_objective(output.scores, inputs)
        if self.token_reward_loss is not None:
            values_T = self.token_reward_model(**packed_inputs(batch)).values_T
            loss = self._with_loss(loss, metrics, *self.token_reward_loss(values_T, inputs))
        if self.value_loss is not None:
            values_T = self.critic(**packed_inputs(batch)).values_T
            loss = self._with_loss(loss, metrics, *self.value_loss(values_T, inputs))
        for name, metric in metrics.items():
            self._means.add({f"policy/{name}": metric.mean}, metric.count)
        return self.finished_loss(loss, {}, output.router_stats)

    @staticmethod
    def _with_loss(loss: SummedLoss, metrics: Metrics, more: SummedLoss, more_metrics: Metrics) -> SummedLoss:
        metrics |= more_metrics
        return SummedLoss(loss.sum + more.sum, loss.count)

    @property
    def reads_gradients(self) -> bool:
        """Whether gradients must exist between backward and step: those of a frozen policy are taken away."""
        return self.policy_freeze_steps > 0

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Keeps the policy where only the networks beside it learn, and logs."""
        if self.trainer.global_step < self.policy_freeze_steps:
            for parameter in self.model.parameters():
                parameter.grad = None
        super().on_before_optimizer_step(optimizer)
        data = getattr(self.trainer, "datamodule", None)
        for name, value in {**getattr(data, "rollout_metrics", {}), **self.rollout_metrics}.items():
            self.log(name, value)

    # -- validation --------------------------------------------------------------------------------------------------

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        """Counts rewards of samples; packed batches are scored as a language model's."""
        if isinstance(batch, PackedBatch):
            return super().validation_step(batch, batch_idx)
        assert isinstance(batch, ScoredGroups)
        for group in batch.groups:
            counted = [scored for scored in group if scored.counts]
            if counted:
                self.validation_rollouts.update(
                    torch.tensor([scored.reward for scored in counted]),
                    torch.tensor([float("nan") if s.correct is None else float(s.correct) for s in counted]),
                    torch.tensor([len(scored.sample.response_ids) for scored in counted]),
                )
        return None

    def on_validation_epoch_end(self) -> None:
        """Logs rewards, and the loss if there were packed batches."""
        result = self.validation_rollouts.compute()
        self.validation_rollouts.reset()
        for name, value in result.items():
            self.log(f"val/{name}", value, prog_bar=name == "reward", sync_dist=True)
        if bool(self.validation_loss.update_called):
            super().on_validation_epoch_end()

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end


def reduced(metrics: Metrics) -> dict[str, float]:
    """Means over all ranks, by name; every rank has the same names."""
    if not metrics:
        return {}
    sums = torch.stack([torch.stack([m.sum.double(), m.count.double()]) for m in metrics.values()])
    sums = all_reduce_sum(sums)
    means = (sums[:, 0] / sums[:, 1].clamp(min=1e-30)).tolist()
    names = [name if "/" in name else f"rollout/{name}" for name in metrics]
    return dict(zip(names, means, strict=True))

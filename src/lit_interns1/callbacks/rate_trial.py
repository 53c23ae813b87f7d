"""A short run at one learning rate: the trial of a learning-rate search.

    η(t) = η · min(1, t / W)        t tokens since the trial began, W tokens of warm-up

The constant phase after a warm-up stands for the stable phase of a WSD schedule, whose runs are shared by all lengths:
the loss after D tokens is that of a run of D tokens before its decay, so one trial is a probe at several D
(arXiv 2601.05049, Eq. 4). Lightning's own loop runs the steps, with those callbacks only that shape training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lit_interns1.callbacks.expert_bias import ExpertBiasUpdate
from lit_interns1.callbacks.run_snapshot import RunSnapshot
from lit_interns1.callbacks.token_clock import TokenClock
from lit_interns1.callbacks.token_exact_loss import TokenExactLoss
from lit_interns1.callbacks.token_learning_rate import TokenLearningRate
from lit_interns1.optim import fused_optimizers, set_rate
from lit_interns1.training import SummedLoss, all_reduce_sum

SHAPING_CALLBACKS: tuple[type[Callback], ...] = (
    TokenClock, TokenExactLoss, TokenLearningRate, ExpertBiasUpdate, WeightAveraging,
)  # fmt: skip
"""Callbacks that shape training and so take part in trials; others do if they have `shapes_training = True`."""


class GroupRates:
    """The rates of all parameter groups as multiples of one base rate.

    The base is the first group's initial rate divided by its `lr_multiplier`, if it has one (`mup_groups` gives it);
    the other groups keep their ratio to it.

    Raises:
        ValueError: If the base rate is not positive.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self._initial = {id(group): float(group.get("initial_lr", group["lr"])) for group in groups}
        self.base = self._initial[id(groups[0])] / float(groups[0].get("lr_multiplier", 1.0))
        if not self.base > 0:
            raise ValueError(f"the optimizer's learning rate is {self.base}; a search needs a positive one to scale")

    def hold(self, optimizer: Optimizer, rate: float) -> None:
        """Sets the present rates to those that belong to the base rate `rate`, whatever a schedule says."""
        for group in optimizer.param_groups:
            set_rate(group, self._initial[id(group)] * rate / self.base)

    def rescale(self, trainer: Trainer, rate: float) -> None:
        """Scales present and initial rates, and what schedulers start from, from the base rate to `rate`."""
        factor = rate / self.base
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                for key in ("lr", "initial_lr"):
                    if key in group:
                        group[key] = group[key] * factor
        for config in trainer.lr_scheduler_configs:
            if hasattr(config.scheduler, "base_lrs"):
                config.scheduler.base_lrs = [base * factor for base in config.scheduler.base_lrs]


@dataclass
class Trial:
    """What one rate gave.

    Attributes:
        rate: η.
        tokens: Tokens since the trial began, after every optimizer step.
        losses: The loss of every step, over all micro-batches and ranks.
        weights: What each of them counts in means.
        probe_tokens: Tokens at which the probes were taken, by horizon.
        probe_losses: Loss of each probe.
        stopped: Why it was cut off; None if it went to its end.
    """

    rate: float
    tokens: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    probe_tokens: list[int] = field(default_factory=list)
    probe_losses: list[float] = field(default_factory=list)
    stopped: str | None = None

    def recent_loss(self, window: float) -> float:
        """The mean over the last `window` (a share) of the tokens up to now, at least the last step."""
        first = (1 - window) * self.tokens[-1]
        recent = [i for i, tokens in enumerate(self.tokens) if tokens > first] or [len(self.tokens) - 1]
        weight = sum(self.weights[i] for i in recent)
        return sum(self.losses[i] * self.weights[i] for i in recent) / weight if weight else float("nan")

    def has_risen(self, margin: float, steps: int = 5) -> bool:
        """Whether the mean of the last steps exceeds the first loss by `margin`; steps without a loss do not count."""
        counted = [loss for loss, weight in zip(self.losses, self.weights, strict=True) if weight]
        return len(counted) > steps and sum(counted[-steps:]) / steps > counted[0] + margin


@dataclass(frozen=True)
class TrialPlan:
    """How trials run; every field as in `LearningRateSearch`."""

    horizons: tuple[int, ...]
    unit: Literal["tokens", "steps"]
    warmup: float
    schedule: Literal["stable", "run"]
    window: float
    divergence_margin: float
    monitor: str | None
    validation_metric: str | None


class TrialCallback(Callback):
    """Sets the rate, measures the loss, and ends the trial; all ranks decide alike."""

    def __init__(self, trial: Trial, plan: TrialPlan, rates: GroupRates, clock: TokenClock) -> None:
        self.trial, self.plan, self.rates, self.clock = trial, plan, rates, clock
        self._first_tokens, self._steps = clock.state.tokens, clock.state.steps
        self._sum: Tensor | float = 0.0
        self._weight: Tensor | float = 0.0
        self.finished = False

    def take_loss(self, output: Any) -> None:
        """Adds what a training step returned."""
        loss = output.get("loss") if isinstance(output, dict) else output
        if isinstance(loss, SummedLoss):
            self._sum = self._sum + loss.sum.detach().double()
            self._weight = self._weight + loss.count.detach().double()
        elif isinstance(loss, Tensor):
            self._sum = self._sum + loss.detach().double()
            self._weight += 1.0

    def _progress(self) -> int:
        return len(self.trial.tokens) if self.plan.unit == "steps" else self.trial.tokens[-1]

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Sets the rate of optimizers that update in backward."""
        for optimizer in fused_optimizers(trainer.optimizers):
            self.on_before_optimizer_step(trainer, pl_module, optimizer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Sets the rate of the step, the step's own tokens included."""
        if self.plan.schedule == "run":
            return
        state = self.clock.commit(trainer)
        done = state.steps - self._steps if self.plan.unit == "steps" else state.tokens - self._first_tokens
        warm = self.plan.warmup * self.plan.horizons[-1]
        self.rates.hold(optimizer, self.trial.rate * (min(1.0, done / warm) if warm else 1.0))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """At the end of an optimizer step: takes the loss, the probes that are due, and cuts off what diverges."""
        taken = self.clock.state.steps - self._steps
        if taken == len(self.trial.tokens):
            return
        self.trial.tokens.append(self.clock.state.tokens - self._first_tokens)
        loss, weight, is_finite = self._reduce(trainer, pl_module)
        self.trial.losses.append(loss)
        self.trial.weights.append(weight)
        if not is_finite:
            self.trial.stopped = "loss or weights are not finite"
        elif self.trial.has_risen(self.plan.divergence_margin):
            self.trial.stopped = f"the loss rose by more than {self.plan.divergence_margin:g}"
        if self.trial.stopped is None:
            self._probe(trainer)
        self.finished = self.trial.stopped is not None or len(self.trial.probe_tokens) == len(self.plan.horizons)
        trainer.should_stop = self.finished

    def _reduce(self, trainer: Trainer, pl_module: LightningModule) -> tuple[float, float, bool]:
        """Loss of the step over all ranks, its weight, and whether loss and weights are finite on all ranks."""
        if self.plan.monitor is not None:
            if self.plan.monitor not in trainer.callback_metrics:
                logged = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
                raise ValueError(f"monitor={self.plan.monitor!r} was not logged in a training step; logged: {logged}")
            self._sum, self._weight = trainer.callback_metrics[self.plan.monitor].double(), 1.0
        elif isinstance(self._weight, float) and not self._weight:
            raise ValueError("training_step returned no loss; name a metric that it logs by monitor=...")
        device = trainer.strategy.root_device
        norms = torch.stack(
            torch._foreach_norm([_local(p.detach()).float() for p in pl_module.parameters() if p.numel()], float("inf"))
        )
        broken = (~norms.isfinite()).any().to(device)
        numbers = [torch.as_tensor(x, dtype=torch.float64, device=device) for x in (self._sum, self._weight, broken)]
        total, weight, num_broken = all_reduce_sum(torch.stack(numbers)).tolist()
        self._sum = self._weight = 0.0
        loss = total / weight if weight else 0.0
        return loss, weight, not num_broken and loss - loss == 0

    def _probe(self, trainer: Trainer) -> None:
        while len(self.trial.probe_tokens) < len(self.plan.horizons):
            if self._progress() < self.plan.horizons[len(self.trial.probe_tokens)]:
                return
            if self.plan.validation_metric is None:
                loss = self.trial.recent_loss(self.plan.window)
            else:
                loss = self._validate(trainer, self.plan.validation_metric)
            self.trial.probe_tokens.append(self.trial.tokens[-1])
            self.trial.probe_losses.append(loss)

    def _validate(self, trainer: Trainer, metric: str) -> float:
        """Runs the validation loop inside the training loop, as Lightning does."""
        epoch_loop, connector = trainer.fit_loop.epoch_loop, trainer._logger_connector
        first, fx = connector._first_loop_iter, trainer.lightning_module._current_fx_name
        trainer.limit_val_batches, trainer.validating = self._limit_val_batches, True
        try:
            epoch_loop.val_loop.run()
        finally:
            trainer.training, trainer.limit_val_batches = True, 0
            connector._first_loop_iter, trainer.lightning_module._current_fx_name = first, fx
        if metric not in trainer.callback_metrics:
            logged = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
            raise ValueError(f"validation_metric={metric!r} was not logged in validation; logged: {logged}")
        value = trainer.callback_metrics[metric].double()
        ranks = all_reduce_sum(torch.stack([value, torch.ones_like(value)]))
        return float(ranks[0] / ranks[1])

    def start(self, trainer: Trainer) -> None:
        """Remembers what validation may use."""
        self._limit_val_batches = trainer.limit_val_batches


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def run_trial(trainer: Trainer, snapshot: RunSnapshot, plan: TrialPlan, rate: float) -> Trial:
    """Trains at one rate from the snapshot, and puts everything back.

    Args:
        trainer: In `fit`, at the state of the snapshot.
        snapshot: Where the trial begins.
        plan: How it runs.
        rate: The base rate, see `GroupRates`.

    Raises:
        ValueError: If a metric that the plan names is not logged, or the data hold no optimizer step.
    """
    trial = Trial(rate)
    try:
        _run(trainer, snapshot, plan, trial)
    except ArithmeticError as error:  # a module that checks its numbers itself
        if trainer.world_size > 1:
            raise  # the others wait for this rank
        trial.stopped = f"{type(error).__name__}: {error}"
    finally:
        snapshot.restore()
    return trial


def _run(trainer: Trainer, snapshot: RunSnapshot, plan: TrialPlan, trial: Trial) -> None:
    fit_loop, epoch_loop, module = trainer.fit_loop, trainer.fit_loop.epoch_loop, trainer.lightning_module
    present: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    taking_part = [c for c in present if isinstance(c, SHAPING_CALLBACKS) or getattr(c, "shapes_training", False)]
    clock = next((c for c in taking_part if isinstance(c, TokenClock)), None)
    if clock is None:
        clock = TokenClock()
        taking_part.insert(0, clock)
    clock.max_tokens = None
    rates = GroupRates(trainer.optimizers)
    measure = TrialCallback(trial, plan, rates, clock)
    measure.start(trainer)
    if plan.schedule == "run":
        rates.rescale(trainer, trial.rate)
    trainer.callbacks = [*taking_part, measure]  # type: ignore[attr-defined]
    trainer.loggers = []
    trainer.should_stop, trainer.limit_val_batches = False, 0
    fit_loop.min_epochs, epoch_loop.min_steps, epoch_loop.max_steps = 0, None, -1
    fit_loop._restarting = epoch_loop._restarting = False
    epoch_loop._results = _ResultCollection(training=True)
    _listen(module, measure.take_loss)
    fetcher = snapshot.data.start()
    while not measure.finished:
        steps = len(trial.tokens)
        epoch_loop.run(fetcher)
        trainer._logger_connector.epoch_end_reached()
        if not measure.finished:
            if len(trial.tokens) == steps:
                raise ValueError("a pass over the training data holds no optimizer step, so no rate can be tried")
            iter(fetcher)


def _listen(module: LightningModule, take: Callable[[Any], None]) -> None:
    """Shows what `training_step` returns to `take`; the snapshot takes the listener away again."""
    training_step = module.training_step

    def heard(*args: Any, **kwargs: Any) -> Any:
        output = training_step(*args, **kwargs)
        take(output)
        return output

    module.training_step = heard  # type: ignore[method-assign]

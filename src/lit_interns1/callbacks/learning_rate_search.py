"""The best learning rate, searched before training from the state in which training will begin (arXiv 2601.05049).

    L(η | N, D) = L_min + C · (ln η − ln η*)²        a few short runs at log-spaced rates, same weights, same data
    L(D | N, η) = L_0 + A · D^−γ                     several lengths D out of each, to reach a longer horizon

Every trial starts from one snapshot in memory and is undone bit by bit, so training afterwards is what it would have
been without the search. How the paper chooses trial lengths, averages losses and extends a search is not known: those
choices here are reconstructions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_interns1.callbacks.rate_trial import GroupRates, Trial, TrialPlan, run_trial
from lit_interns1.callbacks.run_snapshot import RunSnapshot
from lit_interns1.callbacks.token_clock import TokenClock
from lit_interns1.models import Decoder, count_parameters
from lit_interns1.models.trained_parts import parts_of_type
from lit_interns1.reports.figures import save_figure
from lit_interns1.reports.learning_rate_search import RateSearchResult, next_rate, rate_search_figure
from lit_interns1.training.units import with_unit


class LearningRateSearch(Callback):
    """Searches the learning rate when training starts; works with any module, optimizer and strategy.

    The rate of a search is the first parameter group's; other groups keep their ratio to it. Gradient clipping,
    accumulation and the rest of a step are the Trainer's. Only callbacks that shape training take part in trials: those
    in `SHAPING_CALLBACKS`, and any with the attribute `shapes_training = True`.

    Args:
        rates: The rates; or give `lr_min`, `lr_max` and `num_rates`.
        lr_min: Lowest rate.
        lr_max: Highest rate.
        num_rates: Number of rates, equally spaced in ln η.
        tokens: Length of each trial in consumed tokens of all ranks; several horizons are probes inside one trial.
        steps: The same in optimizer steps; give one of the two.
        schedule: "stable": linear warm-up, then constant, whatever the run's schedule. "run": the run's own schedule,
            scaled; it sees the tokens from the search on, so a long warm-up may be all that a trial meets.
        warmup: Warm-up of "stable", as a share of the longest horizon.
        window: The loss at a horizon is the mean over this last share of the trial's tokens, exact by tokens.
        monitor: Take the loss from this metric, logged in every training step, instead of from what `training_step`
            returns (which may hold auxiliary losses).
        validation_metric: Take the loss at a horizon from this metric of a validation run instead.
        divergence_margin: Cut a trial off when the mean loss of five steps exceeds the first loss by so much (nats),
            besides when the loss or a weight is not finite.
        max_extensions: Rates that may be added at the ends until the minimum is bracketed.
        num_points: Fit the parabola to so many neighbouring rates around the lowest loss; None: to all.
        target_tokens: Also extrapolate to a run of so many tokens; needs three horizons.
        apply: Train with the rate that was found; False: with the one that was configured.
        stop_after: End the run after the search, without training.
        write: Write `lr_search.json` and `pictures/lr_search.png` to the Trainer's `default_root_dir`.

    Logs `lr_search/rate`, `lr_search/loss`, `lr_search/diverged` per trial; `lr_search/best_rate`,
    `lr_search/log_rate_std`, `lr_search/factor_two_cost`, `lr_search/num_diverged` at the end; to W&B also a table and
    a picture.

    Raises:
        ValueError: For an option out of its range; when training starts, if the data can be read only once, a metric is
            not logged, or the optimizer's rate is not positive.
    """

    result: RateSearchResult | None = None
    """What the last search found."""

    def __init__(
        self,
        rates: Sequence[float] | None = None,
        lr_min: float | None = None,
        lr_max: float | None = None,
        num_rates: int = 5,
        tokens: int | Sequence[int] | None = None,
        steps: int | Sequence[int] | None = None,
        schedule: Literal["stable", "run"] = "stable",
        warmup: float = 0.1,
        window: float = 0.2,
        monitor: str | None = None,
        validation_metric: str | None = None,
        divergence_margin: float = 1.0,
        max_extensions: int = 4,
        num_points: int | None = 5,
        target_tokens: int | None = None,
        apply: bool = False,
        stop_after: bool = False,
        write: bool = False,
    ) -> None:
        self.rates = _rates(rates, lr_min, lr_max, num_rates)
        if (tokens is None) == (steps is None):
            raise ValueError(f"give the length of a trial as tokens or as steps, got tokens={tokens}, steps={steps}")
        lengths = tokens if tokens is not None else steps
        horizons = tuple(sorted(lengths)) if isinstance(lengths, Sequence) else (int(lengths or 0),)
        if not horizons or horizons[0] < 1:
            raise ValueError(f"horizons must be at least 1, got {lengths}")
        for name, value, low, high in (("warmup", warmup, 0, 1), ("window", window, 0, 1)):
            if not low <= value <= high:
                raise ValueError(f"LearningRateSearch.{name} must lie in [{low}, {high}], got {value}")
        if divergence_margin <= 0 or max_extensions < 0:
            raise ValueError(
                f"divergence_margin must be positive and max_extensions not negative, got {divergence_margin} and "
                f"{max_extensions}"
            )
        if num_points is not None and num_points < 3:
            raise ValueError(f"num_points must be at least 3, the coefficients of a parabola, got {num_points}")
        if target_tokens is not None and len(horizons) < 3:
            raise ValueError(f"target_tokens needs three horizons or more, got {len(horizons)}")
        self.plan = TrialPlan(
            horizons, "tokens" if tokens is not None else "steps", warmup, schedule, window, divergence_margin, monitor,
            validation_metric,
        )  # fmt: skip
        self.max_extensions, self.num_points, self.target_tokens = max_extensions, num_points, target_tokens
        self.apply, self.stop_after, self.write = apply, stop_after, write

    # -- when it runs --------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the search behind everything else that happens at the start of training.

        The strategy is told last; until then callbacks and the module may still set themselves up.
        """
        strategy: Any = trainer.strategy
        told = strategy.on_train_start

        def search_after() -> None:
            del strategy.on_train_start
            told()
            self._search(trainer)

        strategy.on_train_start = search_after

    def _search(self, trainer: Trainer) -> None:
        snapshot = RunSnapshot(trainer)
        trials: list[Trial] = []
        for given in self.rates:
            trials.append(self._try(trainer, snapshot, given, len(trials)))
        step = (self.rates[-1] / self.rates[0]) ** (1 / (len(self.rates) - 1))
        for _ in range(self.max_extensions):
            rate = next_rate(self._result(trainer, trials), step)
            if rate is None:
                break
            trials.append(self._try(trainer, snapshot, rate, len(trials)))
        self.result = self._result(trainer, trials)
        if trainer.is_global_zero:
            self._report(trainer, self.result)
        best = self._recommended(self.result)
        if self.apply and math.isfinite(best):
            GroupRates(trainer.optimizers).rescale(trainer, best)
        elif self.apply:
            rank_zero_warn("every trial of the learning-rate search was cut off: training keeps the configured rate")
        if self.stop_after:
            trainer.fit_loop.min_epochs, trainer.fit_loop.epoch_loop.min_steps = 0, None
            trainer.should_stop = True

    def _try(self, trainer: Trainer, snapshot: RunSnapshot, rate: float, number: int) -> Trial:
        trial = run_trial(trainer, snapshot, self.plan, rate)
        loss = trial.probe_losses[-1] if len(trial.probe_losses) == len(self.plan.horizons) else math.nan
        rank_zero_info(
            f"learning-rate search, trial {number + 1}: rate {rate:.4g}, "
            + (f"cut off ({trial.stopped})" if trial.stopped else f"loss {loss:.4f}")
        )
        metrics = {"lr_search/rate": rate, "lr_search/diverged": float(trial.stopped is not None)}
        if math.isfinite(loss):
            metrics["lr_search/loss"] = loss
        for logger in trainer.loggers:
            if number == 0 and isinstance(logger, WandbLogger) and trainer.is_global_zero:
                logger.experiment.define_metric("lr_search/rate")
                logger.experiment.define_metric("lr_search/loss", step_metric="lr_search/rate")
                logger.experiment.define_metric("lr_search/diverged", step_metric="lr_search/rate")
            logger.log_metrics(metrics, step=number)
        return trial

    # -- what it found -------------------------------------------------------------------------------------------------

    def _result(self, trainer: Trainer, trials: list[Trial]) -> RateSearchResult:
        trials = sorted(trials, key=lambda trial: trial.rate)
        first = next((c.tokens for c in trainer.callbacks if isinstance(c, TokenClock)), 0)  # type: ignore[attr-defined]
        size = len(self.plan.horizons)
        longest = max(trials, key=lambda trial: len(trial.probe_tokens)).probe_tokens
        # where every trial was cut off before a horizon, its tokens are those of the steps that were made
        trial = max(trials, key=lambda trial: len(trial.tokens))
        per_unit = trial.tokens[-1] / len(trial.tokens) if self.plan.unit == "steps" and trial.tokens else 1.0
        tokens = [*longest, *(round(horizon * per_unit) for horizon in self.plan.horizons[len(longest) :])]
        module = trainer.lightning_module
        total = sum(parameter.numel() for parameter in module.parameters())
        idle = sum(c.total - c.active for c in map(count_parameters, _decoders(module)))
        return RateSearchResult(
            parameters=total,
            active_parameters=total - idle,
            first_tokens=first,
            tokens=tuple(first + t for t in tokens),
            rates=tuple(trial.rate for trial in trials),
            losses=tuple(tuple((trial.probe_losses + [math.nan] * size)[:size]) for trial in trials),
            stopped=tuple(trial.stopped for trial in trials),
            stopped_tokens=tuple(trial.tokens[-1] if trial.stopped and trial.tokens else None for trial in trials),
            measure=self.plan.validation_metric or self.plan.monitor or "training loss",
            num_points=self.num_points,
        )

    def _recommended(self, result: RateSearchResult) -> float:
        """The best rate: at `target_tokens` if they were given and can be reached, else at the longest horizon."""
        if self.target_tokens is not None:
            try:
                parabola = result.extrapolate(self.target_tokens).parabola
            except ValueError as error:
                rank_zero_warn(f"learning-rate search: no extrapolation to {self.target_tokens} tokens: {error}")
            else:
                if parabola.extension == "none":
                    return parabola.best_rate
        return result.best_rate()

    def _report(self, trainer: Trainer, result: RateSearchResult) -> None:
        best, parabola = self._recommended(result), result.parabola()
        rank_zero_info(result.text())
        if self.target_tokens is not None and math.isfinite(best):
            rank_zero_info(f"D = {with_unit(self.target_tokens)} (extrapolated): best rate {best:.3g}")
        metrics = {"lr_search/num_diverged": float(sum(reason is not None for reason in result.stopped))}
        if math.isfinite(best):
            metrics["lr_search/best_rate"] = best
        if parabola is not None and result.is_bracketed():
            metrics["lr_search/factor_two_cost"] = parabola.penalty()
            if math.isfinite(parabola.log_rate_std):
                metrics["lr_search/log_rate_std"] = parabola.log_rate_std
        figure = rate_search_figure(result)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=len(result.rates))
            if isinstance(logger, WandbLogger):
                logger.log_table("lr_search/trials", *result.table())
                figure.canvas.draw()
                logger.log_image("lr_search/loss_over_rate", [np.asarray(figure.canvas.buffer_rgba())])  # type: ignore[attr-defined]
        if self.write:
            directory = Path(trainer.default_root_dir)
            result.save(directory / "lr_search.json")
            save_figure(figure, directory / "pictures" / "lr_search.png")


def _rates(
    rates: Sequence[float] | None, lr_min: float | None, lr_max: float | None, num_rates: int
) -> tuple[float, ...]:
    """The rates, ascending.

    Raises:
        ValueError: If there are fewer than three, one is not positive, or both or neither way of naming them is used.
    """
    if (rates is None) == (lr_min is None or lr_max is None):
        raise ValueError(f"give either rates or lr_min and lr_max, got rates={rates}, lr_min={lr_min}, lr_max={lr_max}")
    if rates is None:
        assert lr_min is not None
        assert lr_max is not None
        if not 0 < lr_min < lr_max or num_rates < 3:
            raise ValueError(
                f"lr_min={lr_min} must be positive and below lr_max={lr_max}, and num_rates={num_rates} at least 3"
            )
        return tuple(float(rate) for rate in np.geomspace(lr_min, lr_max, num_rates))
    ordered = tuple(sorted(float(rate) for rate in rates))
    if len(ordered) < 3 or ordered[0] <= 0 or any(low == high for low, high in pairwise(ordered)):
        raise ValueError(f"rates must be three or more different positive numbers, got {list(rates)}")
    return ordered


def _decoders(module: LightningModule) -> list[Decoder]:
    return parts_of_type(module, Decoder)

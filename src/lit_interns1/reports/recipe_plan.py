"""A recipe: batch sizes, peak rate, schedule and mixture of a run, each with interval and source, from small runs.

What no small run speaks for is a default, and marked as one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from lit_interns1.laws import RateLaw, RateParabola, published_rate_law
from lit_interns1.laws.mixing import MixingLaw
from lit_interns1.laws.mixing_search import caps_of_tokens
from lit_interns1.laws.recipe import (
    BatchPlan,
    BatchSizeBand,
    Quantity,
    log_interval,
    measured_rate_std,
    slices,
    times_beyond,
)
from lit_interns1.reports.learning_rate_search import (
    RateSearchResult,
    SizeCount,
    joint_law,
    nearest_optimum,
    size_of,
)
from lit_interns1.training.units import with_unit

NOTABLE = 1.05
"""How many times outside of what was tried is worth a warning."""
EPOCHS = 4
"""Repeating data so often costs little (arXiv 2305.16264)."""
LITTLE = 1 / 16
"""A proportion below this is near a corner, where the mixing law does not hold (arXiv 2403.16952)."""


def beyond(what: str, target: float, tried: Sequence[float]) -> list[str]:
    """A warning, if a target is outside of what was tried."""
    times = times_beyond(target, tried)
    if times < NOTABLE:
        return []
    ends = with_unit(min(tried)) if min(tried) == max(tried) else f"{with_unit(min(tried))} … {with_unit(max(tried))}"
    return [f"{what} = {with_unit(target)} is {times:.3g} times beyond what was tried ({ends})"]


# -- peak rate ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RatePlan:
    """The peak of the learning rate.

    Attributes:
        peak: η.
        law: Of the searches; None if they do not fix one.
        reference: The optimum that ratios start from.
        others: What other ways would say, by name.
        factor_two_cost: Nats per token lost with a rate twice too high or low, at the reference; NaN: not known.
        warnings: What to know.
    """

    peak: Quantity
    law: RateLaw | None = None
    reference: RateParabola | None = None
    others: Mapping[str, float] = field(default_factory=dict)
    factor_two_cost: float = math.nan
    warnings: tuple[str, ...] = ()


def plan_rate(
    results: Sequence[RateSearchResult], parameters: float, tokens: float, count: SizeCount = "total"
) -> RatePlan:
    """By the law of the searches where they fix one, else by ratios with the published exponents.

    Args:
        results: Searches, at least one.
        parameters: N of the run.
        tokens: D of the run.
        count: What N counts.

    Raises:
        ValueError: If every trial diverged.
    """
    target = (parameters, tokens)
    near, probe = nearest_optimum(results, target, count)
    parabola = near.parabola(probe)
    warnings, std = [], math.nan
    if near.is_bracketed(probe):
        assert parabola is not None
        std = parabola.log_rate_std
    else:
        parabola = None
        warnings.append("no search brackets its best rate: the best of the rates that were tried is taken")
    reference, size, seen = near.best_rate(probe), size_of(near, count), near.tokens[probe]
    if not math.isfinite(reference):
        raise ValueError("rates: every trial of the searches diverged; search lower rates")
    start = (reference, size, seen, *target, std if math.isfinite(std) else 0.0)
    published = published_rate_law().predict_ratio(*start)
    where = f"{reference:.3g} at N = {with_unit(size)}, D = {with_unit(seen)}"
    others = {f"ratios with the published exponents from {where}": published.rate}
    law, why = None, ""
    try:
        law = joint_law(results, count)
    except ValueError as error:
        why = str(error)
    if law is None:
        same = (size, seen) == target
        source = f"{'the search itself' if same else 'ratios with the published exponents'} from {where}"
        peak = Quantity(published.rate, source, log_interval(published.rate, math.log(published.high / published.rate)))
        if not same:
            warnings.append(f"the searches do not fix a law of their own ({why}): the exponents −0.2219 (N) and "
                            "−0.3509 (D) are published ones without errors, so the interval is that of the search "
                            "alone")  # fmt: skip
    else:
        found = law.predict(parameters, tokens)
        spread = math.log(found.high / found.rate)
        if not math.isfinite(spread):
            warnings.append("the optima only just fix the law of the rate: their own errors alone make its interval")
        spread = max(
            0.0 if math.isnan(spread) else spread, law.held_out_error or 0.0, _measured(results, target, count)
        )
        source = (
            f"joint law of {len(results)} searches: N^{law.size_exponent:.3f} D^{law.data_exponent:.3f}, "
            f"R² {law.r_squared:.3f}"
        )
        peak = Quantity(found.rate, source, log_interval(found.rate, spread))
        others = {f"ratios with the exponents found from {where}": law.predict_ratio(*start).rate, **others}
        if len({size_of(result, count) for result in results}) < 3:
            warnings.append(f"the exponent of N rests on two sizes; with the published ones it is {published.rate:.3g}")
    optima = [(size_of(r, count), r.tokens[p]) for r in results for p in range(len(r.tokens)) if r.is_bracketed(p)]
    sizes, horizons = zip(*(optima or [(size, seen)]), strict=True)
    warnings = [f"peak rate: {warning}" for warning in warnings]
    warnings += beyond("peak rate: N", parameters, sizes) + beyond("peak rate: D", tokens, horizons)
    cost = math.nan if parabola is None else parabola.penalty()
    return RatePlan(peak, law, parabola, others, cost, tuple(warnings))


def _measured(results: Sequence[RateSearchResult], target: tuple[float, float], count: SizeCount) -> float:
    points = []
    for search, result in enumerate(results):
        for probe, tokens in enumerate(result.tokens):
            parabola = result.parabola(probe)
            if parabola is not None and result.is_bracketed(probe):
                points.append((size_of(result, count), tokens, parabola.log_rate_std, search))
    return measured_rate_std(*zip(*points, strict=True), target)


def published_rate(parameters: float, tokens: float) -> RatePlan:
    """The published law with its constant, whose units could not be verified."""
    rate = published_rate_law(absolute=True).predict(parameters, tokens).rate
    warning = (
        "the published law is used with its constant: what N counts in it is not known, and it gives low rates for "
        "AdamW"
    )
    return RatePlan(Quantity(rate, "published law K N^a D^b of arXiv 2601.05049, absolute"), warnings=(warning,))


# -- schedule and mixture ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DecayPlan:
    """Warm-up, constant phase and decay.

    Attributes:
        share: Of the tokens in the decay.
        warmup_share: Of the tokens in the warm-up.
        shape: See `WarmupStableDecay`.
        final_factor: What is left of the rate.
        loss: Predicted at the end, nats per token; None: not known.
        shares: Decay shares of the curve.
        losses: Predicted losses at these.
        warnings: What to know.
    """

    share: Quantity
    warmup_share: float
    shape: str
    final_factor: float
    loss: Quantity | None = None
    shares: tuple[float, ...] = ()
    losses: tuple[float, ...] = ()
    warnings: tuple[str, ...] = ()


def default_decay(warmup_share: float) -> DecayPlan:
    """A fifth of the tokens, 1 − √p down to a tenth."""
    source = "default: 20 % with 1 − √p loses nothing against a cosine in arXiv 2405.18392"
    return DecayPlan(Quantity(0.2, source, is_default=True), warmup_share, "one_minus_sqrt", 0.1)


@dataclass(frozen=True)
class SourcePlan:
    """One source of the data.

    Attributes:
        name: Of the source.
        share: Of the tokens; its interval is over bootstrap samples of the law.
        before: Share in the base config.
        epochs: How often it is read; None: its tokens are not known.
        limit: The floor or cap that the share lies at, or nothing.
    """

    name: str
    share: Quantity
    before: float
    epochs: float | None = None
    limit: str = ""


@dataclass(frozen=True)
class MixturePlan:
    """The shares of the sources.

    Attributes:
        sources: In the config's order.
        losses: Predicted by validation set, (proposed, base config); empty without a law.
        total: The weighted loss that was minimised, nats per token; None without a law.
        lines: Weighted loss over each share, the others in their ratios: (name, shares, losses).
        warnings: What to know.
    """

    sources: tuple[SourcePlan, ...]
    losses: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    total: Quantity | None = None
    lines: tuple[tuple[str, tuple[float, ...], tuple[float, ...]], ...] = ()
    warnings: tuple[str, ...] = ()


def plan_mixture(
    law: MixingLaw,
    before: Mapping[str, float],
    tokens: float,
    weights: Mapping[str, float] | None = None,
    floors: Mapping[str, float] | None = None,
    caps: Mapping[str, float] | None = None,
    available: Mapping[str, float] | None = None,
    epochs: float = EPOCHS,
) -> MixturePlan:
    """The best mixture of a law within floors, caps, and what there is to read.

    Args:
        law: Its domains are the sources.
        before: Shares of the base config, by source.
        tokens: D of the run.
        weights: Of the validation losses; equal by default.
        floors: Lowest shares; `LITTLE` where none is named.
        caps: Highest shares.
        available: Tokens of sources, where they are known; a share needs at most `epochs` times as many.
        epochs: How often a token may be read.

    Raises:
        ValueError: If names do not fit, or no mixture keeps the bounds.
    """
    if set(law.domains) != set(before):
        raise ValueError(
            f"the mixing law is of the domains {', '.join(law.domains)}, the config's sources are {', '.join(before)}"
        )
    highest = dict(caps or {})
    for name, share in (caps_of_tokens(available, tokens, epochs) if available else {}).items():
        highest[name] = min(highest.get(name, 1.0), share)
    lowest = {name: min(LITTLE, highest.get(name, 1.0)) for name in law.domains} | dict(floors or {})
    found = law.optimise(weights, lowest, highest)
    warnings = [f"mixture: {warning}" for warning in found.warnings]
    source = f"mixing law of {law.num_runs} runs"
    planned = []
    for name, base_share in before.items():
        share, limit = found.proportions[name], ""
        if name in found.at_bound:
            at_floor = abs(share - lowest[name]) <= abs(share - highest.get(name, 1.0))
            limit = "floor" if at_floor else "cap"
        reads = share * tokens / available[name] if available and available.get(name) else None
        if limit == "cap":
            note = f", read {reads:.3g} times" if reads else ""
            warnings.append(f"mixture: {name} is at its cap of {share:.3f}{note}: the law would take more")
        if share < LITTLE - 1e-9:
            warnings.append(f"mixture: {name} has {share:.3f}, and below 1/16 the law does not hold")
        interval = found.proportion_intervals[name]
        known = interval if all(map(math.isfinite, interval)) else None
        planned.append(SourcePlan(name, Quantity(share, source, known), base_share, reads, limit))
    weight_V = np.array([(weights or dict.fromkeys(law.targets, 1.0)).get(name, 0.0) for name in law.targets])
    weight_V /= weight_V.sum()
    base_K = np.array([before[name] for name in law.domains])
    base_V = law.predict(base_K)[0]
    losses = {name: (found.losses[name], float(base_V[v])) for v, name in enumerate(law.targets)}
    best_K = np.array([found.proportions[name] for name in law.domains])
    drawn = slices(lambda mixtures_MK: law.predict(mixtures_MK) @ weight_V, best_K)
    lines = tuple(
        (name, tuple(map(float, shares)), tuple(map(float, totals)))
        for name, (shares, totals) in zip(law.domains, drawn, strict=True)
    )
    ends = found.interval if all(map(math.isfinite, found.interval)) else None
    total = Quantity(found.total, f"{source}; at the base mixture {float(base_V @ weight_V):.4f}", ends)
    return MixturePlan(tuple(planned), losses, total, lines, tuple(warnings))


def kept_mixture(before: Mapping[str, float], tokens: float, available: Mapping[str, float] | None) -> MixturePlan:
    """The mixture of the base config, where there is no law."""
    planned, warnings = [], []
    for name, share in before.items():
        reads = share * tokens / available[name] if available and available.get(name) else None
        if reads is not None and reads > EPOCHS:
            warnings.append(f"mixture: {name} would be read {reads:.3g} times; up to {EPOCHS} times cost little")
        quantity = Quantity(share, "default: the base config's", is_default=True)
        planned.append(SourcePlan(name, quantity, share, reads))
    return MixturePlan(tuple(planned), warnings=tuple(warnings))


# -- all of it ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """What is proposed.

    Attributes:
        base: The config that it changes.
        parameters: N, all parameters.
        active_parameters: Those that act on a token.
        tokens: Total tokens.
        rate: Peak rate.
        batch: Batch sizes.
        batch_source: Where they come from.
        batch_is_default: Whether no small run speaks for them.
        batch_law: B*(D); None without a law.
        decay: Schedule.
        mixture: Shares of sources; None if the data have no named sources.
        ranks: Data-parallel ranks that batches are whole on.
        warnings: Of everything.
    """

    base: str
    parameters: int
    active_parameters: int
    tokens: Quantity
    rate: RatePlan
    batch: BatchPlan
    batch_source: str
    batch_is_default: bool
    batch_law: BatchSizeBand | None
    decay: DecayPlan
    mixture: MixturePlan | None
    ranks: int
    warnings: tuple[str, ...]

    @property
    def total_tokens(self) -> int:
        """D: whole steps."""
        return self.batch.total_tokens

    @property
    def decay_start(self) -> float:
        """Consumed tokens at which the decay begins."""
        return self.tokens.value * (1 - self.decay.share.value)

    @property
    def decay_tokens(self) -> float:
        """Tokens of the decay."""
        return self.total_tokens - self.decay_start

    @property
    def warmup_tokens(self) -> float:
        """Tokens of the warm-up."""
        return self.tokens.value * self.decay.warmup_share

    def batch_interval(self, tokens: float) -> tuple[float, float] | None:
        """Of the batch size that the law has after `tokens`."""
        return None if self.batch_law is None else self.batch_law.interval(tokens)

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Quantity, value, interval and source of everything proposed, as people read it."""
        rows = [("tokens", with_unit(self.total_tokens), "", _mark(self.tokens))]
        peak = self.rate.peak
        rows.append(("peak rate", f"{peak.value:.3g}", _ends(peak.interval, "{:.3g}"), _mark(peak)))
        for step in self.batch.steps:
            ends = _ends(self.batch_interval(step.tokens), "{:,.0f}")
            note = "default: " if self.batch_is_default else ""
            name = f"tokens per step from {with_unit(step.tokens)}" if step.tokens else "tokens per step"
            rows.append((name, f"{step.batch:,}", ends, note + self.batch_source))
        share = self.decay.share
        rows.append(("warm-up", with_unit(self.warmup_tokens), "", "share of the base config, else 1 %"))
        rows.append(
            ("decay", f"last {share.value:.0%}, {self.decay.shape} to {self.decay.final_factor:g} of the peak",
             _ends(share.interval, "{:.0%}"), _mark(share))
        )  # fmt: skip
        for source in self.mixture.sources if self.mixture else ():
            epochs = "" if source.epochs is None else f", {source.epochs:.2g} epochs"
            limit = f", at its {source.limit}" if source.limit else ""
            value = f"{source.share.value:.3f} (base {source.before:.3f}{epochs}{limit})"
            rows.append((f"share of {source.name}", value, _ends(source.share.interval, "{:.3f}"), _mark(source.share)))
        for name, quantity in self.predictions().items():
            rows.append((name, f"{quantity.value:.4f}", _ends(quantity.interval, "{:.4f}"), _mark(quantity)))
        return rows

    def predictions(self) -> dict[str, Quantity]:
        """Losses that a law predicts for the run."""
        found = {"loss by the annealing law": self.decay.loss}
        if self.mixture is not None:
            found["weighted loss by the mixing law"] = self.mixture.total
        return {name: quantity for name, quantity in found.items() if quantity is not None}

    def to_dict(self) -> dict[str, Any]:
        """For JSON: numbers, intervals, sources and warnings."""
        return {
            "base": self.base,
            "parameters": self.parameters,
            "active_parameters": self.active_parameters,
            "ranks": self.ranks,
            "tokens": {**asdict(self.tokens), "value": self.total_tokens},
            "optimizer_steps": self.batch.optimizer_steps,
            "peak_rate": {
                **asdict(self.rate.peak),
                "factor_two_cost": self.rate.factor_two_cost,
                "others": dict(self.rate.others),
            },
            "batch": {
                "unit": "tokens per optimizer step",
                "source": self.batch_source,
                "is_default": self.batch_is_default,
                "steps": [{**asdict(step), "interval": self.batch_interval(step.tokens)} for step in self.batch.steps],
            },
            "schedule": {
                "decay_share": asdict(self.decay.share),
                "warmup_tokens": self.warmup_tokens,
                "decay_start": self.decay_start,
                "decay_tokens": self.decay_tokens,
                "shape": self.decay.shape,
                "final_factor": self.decay.final_factor,
                "loss_over_decay_share": [list(p) for p in zip(self.decay.shares, self.decay.losses, strict=True)],
            },
            "mixture": None if self.mixture is None else {
                "sources": [asdict(source) for source in self.mixture.sources],
                "losses": {name: list(pair) for name, pair in self.mixture.losses.items()},
            },
            "predictions": {name: asdict(quantity) for name, quantity in self.predictions().items()},
            "warnings": list(self.warnings),
        }  # fmt: skip


def _ends(interval: tuple[float, float] | None, form: str) -> str:
    return "" if interval is None else f"{form.format(interval[0])} … {form.format(interval[1])}"


def _mark(quantity: Quantity) -> str:
    has_mark = quantity.source.startswith("default: ")
    return f"default: {quantity.source}" if quantity.is_default and not has_mark else quantity.source

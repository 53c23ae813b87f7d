"""The parts of a recipe: peak rate, decay and mixture of a run, each with interval and source, from small runs.

What no small run speaks for is a default, and marked as one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lit_interns1.laws import (
    AnnealingLaw,
    MixingLaw,
    RateLaw,
    RateParabola,
    ScheduleFamily,
    caps_of_tokens,
    plan_wsd,
    published_rate_law,
)
from lit_interns1.laws.recipe import (
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
    others = _by_loss_over_tokens(near, target, count)
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
        others |= {
            f"ratios with the exponents found from {where}": law.predict_ratio(*start).rate,
            f"ratios with the published exponents from {where}": published.rate,
        }
        if len({size_of(result, count) for result in results}) < 3:
            warnings.append(f"the exponent of N rests on two sizes; with the published ones it is {published.rate:.3g}")
    optima = [(size_of(r, count), r.tokens[p]) for r in results for p in range(len(r.tokens)) if r.is_bracketed(p)]
    sizes, horizons = zip(*(optima or [(size, seen)]), strict=True)
    warnings = [f"peak rate: {warning}" for warning in warnings]
    warnings += beyond("peak rate: N", parameters, sizes) + beyond("peak rate: D", tokens, horizons)
    cost = math.nan if parabola is None else parabola.penalty()
    return RatePlan(peak, law, parabola, others, cost, tuple(warnings))


def _by_loss_over_tokens(result: RateSearchResult, target: tuple[float, float], count: SizeCount) -> dict[str, float]:
    """The rate by L(D) at each rate of a search of the same size, where it has three horizons and brackets it."""
    if size_of(result, count) != target[0]:
        return {}
    try:
        parabola = result.extrapolate(target[1]).parabola
    except ValueError:
        return {}
    return {"loss over tokens at each rate, extrapolated": parabola.best_rate} if parabola.extension == "none" else {}


def _measured(results: Sequence[RateSearchResult], target: tuple[float, float], count: SizeCount) -> float:
    points: list[tuple[float, float, float, int]] = []
    for search, result in enumerate(results):
        for probe, tokens in enumerate(result.tokens):
            parabola = result.parabola(probe)
            if parabola is not None and result.is_bracketed(probe):
                points.append((size_of(result, count), tokens, parabola.log_rate_std, search))
    sizes, horizons, stds, searches = zip(*points, strict=True)
    return measured_rate_std(sizes, horizons, stds, searches, target)


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


def plan_decay(
    law: AnnealingLaw,
    tokens: float,
    tokens_per_step: float,
    peak: float,
    warmup_share: float,
    schedule: ScheduleFamily,
    runs: int,
    same_model: bool,
) -> DecayPlan:
    """Share, shape and floor of the decay by the annealing law.

    Args:
        law: Of small runs.
        tokens: D of the run.
        tokens_per_step: Of the small runs: the law's momentum counts their steps.
        peak: Planned peak rate.
        warmup_share: Share of the tokens in the warm-up.
        schedule: Makes schedules, warm-up included.
        runs: How many runs are behind the law.
        same_model: Whether they trained this model: only then the law predicts the loss.
    """
    plan = plan_wsd(law, tokens, tokens_per_step, peak, schedule, max_share=min(0.9, 1 - warmup_share))
    warnings = [f"decay: {warning}" for warning in plan.warnings]
    if not same_model:
        warnings.append("decay: the annealing law is of another model; its share is taken over, not its loss")
    known = plan.share_interval if len(law.samples_R4) else None
    source = f"annealing law of {runs} run" + ("s" if runs > 1 else "")
    return DecayPlan(
        Quantity(plan.decay_share, source, known), warmup_share, plan.shape, plan.floor,
        Quantity(plan.loss, source, plan.interval) if same_model else None,
        tuple(map(float, plan.shares_G)), tuple(map(float, plan.losses_G)), tuple(warnings),
    )  # fmt: skip


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
    seen: Sequence[float] = (),
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
        seen: D of the runs behind the law, where they are known.
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
    warnings += beyond("mixture: D", tokens, seen) if seen else []
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
    asked = weights or dict.fromkeys(law.targets, 1.0)
    weight_V = np.array([asked.get(name, 0.0) for name in law.targets], dtype=np.float64)
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

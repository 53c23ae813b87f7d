"""A recipe: batch sizes, peak rate, schedule and mixture of a run together, as a table and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lit_interns1.laws.recipe import BatchPlan, BatchSizeBand, Quantity
from lit_interns1.reports.recipe_parts import DecayPlan, MixturePlan, RatePlan
from lit_interns1.training.units import with_unit


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
        return max(self.total_tokens - self.decay_start, 0.0)

    @property
    def warmup_tokens(self) -> float:
        """Tokens of the warm-up."""
        return self.tokens.value * self.decay.warmup_share

    def batch_interval(self, tokens: float) -> tuple[float, float] | None:
        """Of the batch size that the law has after `tokens`."""
        return None if self.batch_law is None else self.batch_law.interval(tokens)

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Quantity, value, interval and source of everything proposed, as people read it."""
        rows = [("tokens", with_unit(self.total_tokens), "", self.tokens.source)]
        peak = self.rate.peak
        rows.append(("peak rate", f"{peak.value:.3g}", _ends(peak.interval, "{:.3g}"), peak.source))
        for step in self.batch.steps:
            ends = _ends(self.batch_interval(step.tokens), "{:,.0f}")
            name = f"tokens per step from {with_unit(step.tokens)}" if step.tokens else "tokens per step"
            rows.append((name, f"{step.batch:,}", ends, self.batch_source))
        share = self.decay.share
        rows.append(("warm-up", with_unit(self.warmup_tokens), "", "share of the base config, else 1 %"))
        rows.append(
            ("decay", f"last {share.value:.0%}, {self.decay.shape} to {self.decay.final_factor:g} of the peak",
             _ends(share.interval, "{:.0%}"), share.source)
        )  # fmt: skip
        for source in self.mixture.sources if self.mixture else ():
            epochs = "" if source.epochs is None else f", {source.epochs:.2g} epochs"
            limit = f", at its {source.limit}" if source.limit else ""
            value = f"{source.share.value:.3f} (base {source.before:.3f}{epochs}{limit})"
            rows.append((f"share of {source.name}", value, _ends(source.share.interval, "{:.3f}"), source.share.source))
        for name, quantity in self.predictions().items():
            rows.append((name, f"{quantity.value:.4f}", _ends(quantity.interval, "{:.4f}"), quantity.source))
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

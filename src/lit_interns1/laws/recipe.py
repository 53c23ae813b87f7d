"""From the laws of small runs to the numbers of a large one: batch sizes that a run can really take, and intervals.

    batch size   ln B*(D) = p + q ln D;  planned B_k = a_k · G with a = 1, 2, 3, 4, 6, 8, 12, …,  G = tokens of a pass
    switch       B*(D) = √(B_k B_{k+1}), moved up to the first multiple of lcm(B_k, B_{k+1}): windows there are whole
    end          a whole number of steps
    intervals    exp(ln x ± z σ)

The laws are those of arXiv 2601.05034 (batch size) and 2601.05049 (learning rate). How their authors round a fitted
schedule to batches is not known: the grid of a, in which a switch waits for three steps at most, is a reconstruction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from lit_interns1.laws.batch_size_table import BatchSizeTable
from lit_interns1.laws.linear import linear_fit
from lit_interns1.laws.transforms import Floats

LEVEL = 0.95
"""Share of a planned number's interval."""


@dataclass(frozen=True)
class Quantity:
    """A planned number and where it comes from.

    Attributes:
        value: The number.
        source: What it rests on, in words.
        interval: Where it lies with `LEVEL` confidence; None: not known.
        is_default: Whether no small run speaks for it; then the source begins with "default".
    """

    value: float
    source: str
    interval: tuple[float, float] | None = None
    is_default: bool = False


def log_interval(value: float, log_std: float, level: float = LEVEL) -> tuple[float, float] | None:
    """exp(ln value ± z σ); None if σ is zero or not known."""
    if not (math.isfinite(log_std) and log_std > 0):
        return None
    reach = NormalDist().inv_cdf((1 + level) / 2) * log_std
    return value * math.exp(-reach), value * math.exp(reach)


def times_beyond(target: float, tried: Sequence[float]) -> float:
    """How many times a target lies outside of what was tried; 1 inside."""
    return max(target / max(tried), min(tried) / target, 1.0)


# -- peak rate ---------------------------------------------------------------------------------------------------------


def measured_rate_std(
    parameters: ArrayLike, tokens: ArrayLike, log_stds: ArrayLike, groups: ArrayLike, target: tuple[float, float]
) -> float:
    """Standard error of ln η* that the joint law takes over from the errors of its optima.

    The scatter of a few optima around a law of three coefficients says little, and the horizons of one search share
    their trials: here their errors count as wholly correlated, so more horizons do not make a law surer.

    Args:
        parameters: (M,) N of the optima.
        tokens: (M,) D.
        log_stds: (M,) standard errors of ln η*, from the parabolas; where they are not known the median stands in.
        groups: (M,) the search of each.
        target: N and D to predict for.

    Returns:
        The error; 0 if no optimum has one.
    """
    columns = [np.log(np.asarray(column, dtype=np.float64)) for column in (parameters, tokens)]
    design_M3 = np.stack([np.ones_like(columns[0]), *columns], axis=1)
    std_M = np.asarray(log_stds, dtype=np.float64)
    if not np.isfinite(std_M).any():
        return 0.0
    std_M = np.where(np.isfinite(std_M), std_M, np.nanmedian(std_M))
    row_3 = np.array([1.0, math.log(target[0]), math.log(target[1])])
    share_M = row_3 @ np.linalg.pinv(design_M3)  # ln η*(target) = Σ share · ln η*
    labels = np.asarray(groups)
    sums = [float((share_M * std_M)[labels == label].sum()) for label in np.unique(labels)]
    return math.hypot(*sums)


# -- batch size --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchSizeBand:
    """B*(D) with the error of one B_opt at a D.

    Attributes:
        p: Constant.
        q: Exponent of D; 0 if B_opt is known at one loss only.
        covariance_22: Of (p, q); zero where the rows do not tell.
        scatter: Standard deviation of ln B_opt around the law; zero where the rows do not tell.
        sampling_std: Of one ln B_opt, from the bootstrap of its loss curves: the median over losses.
        tokens: Least and greatest E_min of the rows, D.
        batches: Least and greatest batch size that was trained.
    """

    p: float
    q: float
    covariance_22: Floats
    scatter: float
    sampling_std: float
    tokens: tuple[float, float]
    batches: tuple[float, float]

    def __call__(self, tokens: float) -> float:
        """B*, tokens per step; below the least D that was seen it is what it is there."""
        return math.exp(self.p + self.q * math.log(max(tokens, self.tokens[0])))

    def interval(self, tokens: float) -> tuple[float, float] | None:
        """Of B*: the error of the law, the scatter around it, and the noise of the curves that it was fitted to.

        The noise is in the scatter, too, but neighbouring losses share it, so it is added once more.
        """
        row_2 = np.array([1.0, math.log(max(tokens, self.tokens[0]))])
        variance = float(row_2 @ self.covariance_22 @ row_2) + self.scatter**2 + self.sampling_std**2
        return log_interval(self(tokens), math.sqrt(variance))

    def tokens_for(self, batch: float) -> float:
        """D from which on B* is more than a batch size; infinite if it never is."""
        if self.q <= 0:
            return 0.0 if self(1.0) >= batch else math.inf
        tokens = math.exp(min((math.log(batch) - self.p) / self.q, 700.0))
        return 0.0 if tokens <= self.tokens[0] else tokens


def batch_size_band(table: BatchSizeTable) -> BatchSizeBand:
    """The law through the rows in which B_opt is bracketed; a constant through one row.

    Raises:
        ValueError: If no row has a B_opt.
    """
    found = [row for row in table.rows if row.b_opt_bound == "none"]
    if not found:
        raise ValueError(
            f"in none of {len(table.rows)} target losses do the batches {list(table.batches)} bracket B_opt: train "
            "smaller or larger ones"
        )
    log_tokens, log_batches = np.log([row.e_min for row in found]), np.log([row.b_opt for row in found])
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    widths = [math.log(row.b_opt_interval[1] / row.b_opt_interval[0]) / (2 * z) for row in found
              if all(math.isfinite(end) for end in row.b_opt_interval)]  # fmt: skip
    ends = (min(row.e_min for row in found), max(row.e_min for row in found))
    columns = [np.ones_like(log_tokens), log_tokens][: 2 if ends[1] > ends[0] else 1]
    fit = linear_fit(np.stack(columns, axis=1), log_batches)
    covariance_22 = np.zeros((2, 2))
    size = len(columns)
    covariance_22[:size, :size] = np.nan_to_num(fit.covariance_PP)
    return BatchSizeBand(
        float(fit.beta_P[0]), float(fit.beta_P[1]) if size == 2 else 0.0, covariance_22,
        float(np.nan_to_num(fit.residual_std)), float(np.median(widths)) if widths else 0.0, ends,
        (min(table.batches), max(table.batches)),
    )  # fmt: skip


@dataclass(frozen=True)
class BatchStep:
    """A batch size, and from when on it holds.

    Attributes:
        tokens: Consumed tokens at the switch.
        batch: B, tokens per optimizer step.
        accumulation: a, passes of all ranks in a step.
    """

    tokens: int
    batch: int
    accumulation: int


@dataclass(frozen=True)
class BatchPlan:
    """The batch sizes of a run.

    Attributes:
        steps: By consumed tokens; the first from 0 on.
        total_tokens: Where the last whole step ends, at most what was asked for.
        optimizer_steps: How many there are.
        warnings: What the plan could not do.
    """

    steps: tuple[BatchStep, ...]
    total_tokens: int
    optimizer_steps: int
    warnings: tuple[str, ...] = ()

    def batch_at(self, tokens: float) -> int:
        """B of the step that begins after so many tokens."""
        return [step.batch for step in self.steps if step.tokens <= tokens][-1]


def accumulations(limit: float = math.inf) -> Iterator[int]:
    """1, 2, 3, 4, 6, 8, 12, …: neighbours have a least common multiple of at most three times the greater."""
    yield from (number for number in (1, 2) if number <= limit)
    power = 2
    while power * 3 // 2 <= limit:
        yield power * 3 // 2
        power *= 2
        if power <= limit:
            yield power


def plan_batch_sizes(
    law: BatchSizeBand, total_tokens: float, freeze_tokens: float, tokens_per_pass: int, max_batch: float = math.inf
) -> BatchPlan:
    """The steps of a law that a run can take: rising, of whole passes, at places where every window is whole.

    Args:
        law: B*(D).
        total_tokens: Of the run.
        freeze_tokens: Where the decay of the learning rate begins: no switch from there on.
        tokens_per_pass: G, tokens that all ranks read in one forward pass.
        max_batch: No step has more tokens.

    Raises:
        ValueError: If a number is not positive, or not one step fits.
    """
    _check_positive(total_tokens=total_tokens, tokens_per_pass=tokens_per_pass, max_batch=max_batch)
    warnings = []
    highest = min(max_batch, total_tokens) / tokens_per_pass
    grid = list(accumulations(highest))
    if not grid:
        raise ValueError(
            f"a pass of {tokens_per_pass:,} tokens is more than max_batch={max_batch:,.0f} or the total of "
            f"{total_tokens:,.0f} tokens: make micro_batch_size smaller"
        )
    first = law(0.0)
    if first < tokens_per_pass / math.sqrt(2):
        warnings.append(
            f"the law begins with {first:,.0f} tokens per step, and a pass has {tokens_per_pass:,}: a smaller "
            "micro_batch_size could follow it"
        )
    index = int(np.argmin([abs(math.log(first / (a * tokens_per_pass))) for a in grid]))
    passes, steps = 0, [BatchStep(0, grid[index] * tokens_per_pass, grid[index])]
    optimizer_steps = 0
    for before, after in zip(grid[index:], grid[index + 1 :], strict=False):
        wanted = law.tokens_for(math.sqrt(before * after) * tokens_per_pass)
        if wanted >= freeze_tokens:
            break
        multiple = math.lcm(before, after)
        place = max(math.ceil(wanted / tokens_per_pass / multiple - 1e-9), passes // multiple + 1) * multiple
        if place * tokens_per_pass >= freeze_tokens:
            warnings.append(
                f"the step to {after * tokens_per_pass:,} tokens is not reached: from {before * tokens_per_pass:,} it "
                f"is possible at multiples of {multiple * tokens_per_pass:,} tokens, and at {freeze_tokens:,.0f} the "
                "decay begins"
            )
            break
        optimizer_steps += (place - passes) // before
        passes = place
        steps.append(BatchStep(passes * tokens_per_pass, after * tokens_per_pass, after))
    wanted_last = law(freeze_tokens)
    if wanted_last > max_batch * math.sqrt(2):
        warnings.append(f"the law ends with {wanted_last:,.0f} tokens per step, max_batch is {max_batch:,.0f}")
    last = steps[-1].accumulation
    rest = (int(total_tokens // tokens_per_pass) - passes) // last
    end = (passes + rest * last) * tokens_per_pass
    return BatchPlan(tuple(steps), end, optimizer_steps + rest, tuple(warnings))


def constant_batch_size(accumulation: int, tokens_per_pass: int, total_tokens: float) -> BatchPlan:
    """One batch size from the beginning to the end.

    Args:
        accumulation: a, passes in a step.
        tokens_per_pass: G.
        total_tokens: Of the run.

    Raises:
        ValueError: If not one step fits.
    """
    _check_positive(accumulation=accumulation, tokens_per_pass=tokens_per_pass)
    batch = accumulation * tokens_per_pass
    steps = int(total_tokens // batch)
    if not steps:
        raise ValueError(f"a step of {batch:,} tokens is more than the total of {total_tokens:,.0f}")
    return BatchPlan((BatchStep(0, batch, accumulation),), steps * batch, steps)


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name}={value} must be positive")


# -- mixture -----------------------------------------------------------------------------------------------------------


def slices(
    loss: Callable[[Floats], Floats], proportions_K: Floats, points: int = 41, least: float = 1 / 16
) -> list[tuple[Floats, Floats]]:
    """How a loss depends on each proportion while the others keep their ratios: (proportions, losses) per domain.

    Args:
        loss: Of (M, K) mixtures, (M,).
        proportions_K: The mixture that all lines go through.
        points: Of a line.
        least: Where a line begins; it ends where the others are together as little.
    """
    lines = []
    for domain, own in enumerate(proportions_K):
        at_M = np.union1d(np.linspace(least, 1 - least, points), [own])
        mixtures_MK = np.outer(1 - at_M, proportions_K / max(1 - own, 1e-300))
        mixtures_MK[:, domain] = at_M
        lines.append((at_M, loss(mixtures_MK)))
    return lines

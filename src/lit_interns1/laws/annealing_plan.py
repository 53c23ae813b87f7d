"""The warmup-stable-decay schedule that the annealing law calls best (Eq. 2 of arXiv 2508.15763 §4.2, reconstructed).

    minimise L_0 + A S_1^−α − C S_2 over peak ≤ η_max, decay share, decay shape and floor, at a given number of tokens

Both sums are proportional to the peak, so under the law a higher peak is never worse: the plan always takes η_max. The
law knows of no instability; η_max has to come from a search of the rate. A longer decay costs S_1 and gains S_2.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lit_interns1.laws.annealing import AnnealingLaw
from lit_interns1.laws.fitter import percentile_interval
from lit_interns1.laws.transforms import Floats

SHARES_TO_COMPARE = (0.0, 0.05, 0.1, 0.2, 0.5)
MAX_POINTS = 2000


class ScheduleFamily(Protocol):
    """Makes a schedule: the factor on the peak after so many tokens."""

    def __call__(self, decay_share: float, shape: str, floor: float) -> Callable[[float], float]:
        """The schedule that decays over the last `decay_share` of the tokens, in this shape, down to `floor`."""


@dataclass(frozen=True)
class WSDPlan:
    """A schedule and what the law says of it.

    Attributes:
        peak: Peak learning rate: the largest allowed.
        decay_share: Share of the tokens that decay.
        decay_start: Tokens after which the decay begins.
        shape: Form of the decay.
        floor: Factor on the peak at the end.
        loss: Predicted final loss, nats per token.
        interval: Of `loss`, 95 %, from the law's bootstrap samples.
        share_interval: Where 95 % of those samples have their own best share (of the shares tried).
        shares_G: Decay shares that were tried.
        losses_G: Their final losses, at the plan's peak, shape and floor.
        cost: For some shares, how much more loss than the plan's.
        warnings: What to doubt.
    """

    peak: float
    decay_share: float
    decay_start: float
    shape: str
    floor: float
    loss: float
    interval: tuple[float, float]
    share_interval: tuple[float, float]
    shares_G: Floats
    losses_G: Floats
    cost: dict[float, float]
    warnings: tuple[str, ...]


def plan_wsd(
    law: AnnealingLaw,
    total_tokens: float,
    tokens_per_step: float,
    peak_max: float,
    schedule: ScheduleFamily,
    shapes: Sequence[str] = ("linear", "cosine", "one_minus_sqrt"),
    floors: Sequence[float] = (0.0, 0.1),
    max_share: float = 0.9,
    num_shares: int = 46,
) -> WSDPlan:
    """The best schedule among shapes, floors and decay shares.

    Args:
        law: Fitted at the same tokens per step: its λ counts steps.
        total_tokens: Tokens to train on.
        tokens_per_step: Tokens of an optimizer step.
        peak_max: Largest learning rate that trains well.
        schedule: Makes schedules, warm-up included.
        shapes: Forms of decay to try, as `schedule` calls them.
        floors: Final factors to try.
        max_share: Largest decay share; leave room for the warm-up.
        num_shares: Shares to try from 0 to `max_share`, evenly.

    Raises:
        ValueError: If a number is out of range or nothing is left to choose from.
    """
    steps = round(total_tokens / tokens_per_step) if tokens_per_step > 0 else 0
    if steps < 2:
        raise ValueError(f"total_tokens={total_tokens} are not two steps of tokens_per_step={tokens_per_step}")
    if not peak_max > 0:
        raise ValueError(f"peak_max={peak_max} must be positive")
    if not (0 < max_share <= 1 and num_shares >= 2 and shapes and floors and min(floors) >= 0 and max(floors) <= 1):
        raise ValueError(
            f"max_share={max_share}, num_shares={num_shares}, shapes={shapes} and floors={floors} must leave a choice: "
            "a share in (0, 1], two shares or more, floors in [0, 1]"
        )

    def sums(shares: Floats, shape: str, floor: float) -> Floats:
        schedules = (schedule(float(share), shape, floor) for share in shares)
        return np.array([final_sums(f, steps, tokens_per_step, law.momentum) for f in schedules]).T * peak_max

    shares_G = np.linspace(0, max_share, num_shares)
    choices = [(shape, floor, sums(shares_G, shape, floor)) for shape, floor in itertools.product(shapes, floors)]
    shape, floor, sums_2G = min(choices, key=lambda choice: law.loss(*choice[2]).min())
    losses_G = law.loss(*sums_2G)
    best = int(losses_G.argmin())
    fine_F = np.linspace(shares_G[max(best - 1, 0)], shares_G[min(best + 1, num_shares - 1)], 41)
    fine_2F = sums(fine_F, shape, floor)
    fine = int(law.loss(*fine_2F).argmin())
    share, loss = float(fine_F[fine]), float(law.loss(*fine_2F)[fine])
    compared = np.array([s for s in SHARES_TO_COMPARE if s <= max_share])
    compared_C = law.loss(*sums(compared, shape, floor)) - loss
    irreducible, amplitude, exponent, annealing = law.samples_R4.T[..., None]
    samples_RG = irreducible + amplitude * sums_2G[0] ** -exponent - annealing * sums_2G[1]
    low, high = percentile_interval(shares_G[samples_RG.argmin(axis=1)])
    return WSDPlan(
        peak=peak_max,
        decay_share=share,
        decay_start=(1 - share) * total_tokens,
        shape=shape,
        floor=floor,
        loss=loss,
        interval=law.interval(*fine_2F[:, fine]),
        share_interval=(min(float(low), share), max(float(high), share)),
        shares_G=shares_G,
        losses_G=losses_G,
        cost=dict(zip(map(float, compared), map(float, compared_C))),
        warnings=tuple(_warnings(law, fine_2F[0, fine], peak_max, share, max_share)),
    )


def final_sums(
    factor: Callable[[float], float], steps: int, tokens_per_step: float, momentum: float, max_points: int = MAX_POINTS
) -> tuple[float, float]:
    """S_1 and S_2 after the last step of a schedule, per unit of its peak.

    The schedule is read at `max_points` steps and taken as straight in between: exact up to so many steps.
    A fall of the rate at step k weighs Σ_{t ≥ k} λ^{t−k} = (1 − λ^{T−k+1}) / (1 − λ) in S_2.
    """
    at_P = np.unique(np.rint(np.linspace(1, steps, min(steps, max_points))))
    rates_P = np.array([factor((step - 1) * tokens_per_step) for step in at_P])
    width, fall = np.diff(at_P), -np.diff(rates_P)
    s_1 = rates_P[0] + (width * (rates_P[:-1] + rates_P[1:]) / 2 - fall / 2).sum()
    rising = rates_P[1:] > np.maximum.accumulate(rates_P)[:-1]
    warm = int(np.argmin(rising)) if not rising.all() else rising.size
    decayed = momentum ** (steps - at_P[1:] + 1) * (1 - momentum**width) / (1 - momentum)
    weight = (1 - decayed / width) / (1 - momentum)
    return float(s_1), float((fall * weight)[warm:].sum())


def _warnings(law: AnnealingLaw, s_1: float, peak: float, share: float, max_share: float) -> list[str]:
    found = list(law.warnings)
    if s_1 > law.largest_sum * (1 + 1e-9):
        found.append(f"the sum of rates is {s_1 / law.largest_sum:.3g} times the largest that the law was fitted to")
    if not law.peak_range[0] / 1.01 <= peak <= law.peak_range[1] * 1.01:
        found.append(
            f"the peak {peak:.3g} is outside the peaks of the curves, "
            f"{law.peak_range[0]:.3g} … {law.peak_range[1]:.3g}: the law does not know which rates are too high"
        )
    if share >= max_share * (1 - 1e-9):
        found.append(f"the best decay share is the largest that was tried, {max_share:g}")
    return found

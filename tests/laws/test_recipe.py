"""Plans of batch sizes against a simulation of the trainer's rule, and intervals against closed forms and repeats."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest

from lit_interns1.laws.recipe import (
    BatchSizeBand,
    accumulations,
    batch_size_band,
    constant_batch_size,
    log_interval,
    measured_rate_std,
    plan_batch_sizes,
    slices,
    times_beyond,
)


def law(batch, tokens, q, seen=(1.0, 1e9)):
    """B = batch · (D / tokens)^q."""
    p = math.log(batch) - q * math.log(tokens)
    return BatchSizeBand(p, q, np.zeros((2, 2)), 0.0, 0.0, seen, (batch, batch))


def simulated(plan, tokens_per_pass, freeze):
    """What a trainer does with the table of a plan, pass by pass.

    An optimizer step ends where a divides the count; there a becomes a' if the table says so and a' divides it, too.
    """
    switches, steps, passes, accumulation = [], 0, 0, plan.steps[0].accumulation
    while passes * tokens_per_pass < plan.total_tokens:
        passes += 1
        if passes % accumulation:
            continue
        steps += 1
        tokens = passes * tokens_per_pass
        wanted = [step.accumulation for step in plan.steps if step.tokens <= tokens][-1]
        if wanted != accumulation and passes % wanted == 0 and tokens < freeze:
            accumulation = wanted
            switches.append(tokens)
    return switches, steps, passes * tokens_per_pass, passes % accumulation


@pytest.mark.parametrize("seed", range(12))
def test_a_trainer_that_follows_the_table_switches_where_the_plan_says(seed):
    random = np.random.default_rng(seed)
    tokens_per_pass = int(random.integers(1, 600))
    total = float(random.integers(200, 4000) * tokens_per_pass + random.integers(0, tokens_per_pass))
    freeze = total * random.uniform(0.4, 1.0)
    wanted = law(tokens_per_pass * random.uniform(0.5, 6), total / 30, random.uniform(0.05, 1.2))
    plan = plan_batch_sizes(wanted, total, freeze, tokens_per_pass)
    switches, steps, end, left = simulated(plan, tokens_per_pass, freeze)
    assert switches == [step.tokens for step in plan.steps[1:]]
    assert (steps, end, left) == (plan.optimizer_steps, plan.total_tokens, 0)
    assert total - plan.steps[-1].batch < plan.total_tokens <= total
    for before, after in itertools.pairwise(plan.steps):
        assert after.batch > before.batch
        assert after.batch == after.accumulation * tokens_per_pass
        crossing = math.sqrt(before.batch * after.batch)  # where the greater batch is as near as the smaller one
        assert wanted(after.tokens) >= crossing * (1 - 1e-9)
        late = after.tokens - max(wanted.tokens_for(crossing), before.tokens)
        assert late <= math.lcm(before.batch, after.batch)


def test_plan_of_round_numbers():
    # B = 64 √(D / 512): 90.5 at 1024, 156.8 at 3072, 221.7 at 6144
    plan = plan_batch_sizes(law(64, 512, 0.5, seen=(512, 2048)), 8200, 6560, 64)
    assert [(step.tokens, step.batch) for step in plan.steps] == [(0, 64), (1024, 128), (3072, 192), (6144, 256)]
    assert plan.total_tokens == 8192
    assert plan.optimizer_steps == 16 + 16 + 16 + 8
    assert plan.warnings == ()
    assert plan.batch_at(3071) == 128
    assert plan.batch_at(3072) == 192
    smaller = plan_batch_sizes(law(64, 512, 0.5, seen=(512, 2048)), 8200, 6560, 64, max_batch=130)
    assert [step.batch for step in smaller.steps] == [64, 128]
    assert "max_batch is 130" in smaller.warnings[0]


def test_steps_that_cannot_be_taken_are_said():
    wanted = law(64, 512, 0.5, seen=(512, 2048))
    late = plan_batch_sizes(wanted, 8192, 3050, 64)  # the switch to 192 is wanted at 3072
    assert [step.batch for step in late.steps] == [64, 128]
    crossed = plan_batch_sizes(law(64, 500, 0.5, seen=(512, 2048)), 8192, 3050, 64)  # wanted at 3000, possible at 3072
    assert [step.batch for step in crossed.steps] == [64, 128]
    assert "the step to 192 tokens is not reached" in crossed.warnings[0]
    coarse = plan_batch_sizes(wanted, 8192, 6554, 512)
    assert coarse.steps[0].batch == 512
    assert "a pass has 512" in coarse.warnings[0]
    with pytest.raises(ValueError, match="smaller"):
        plan_batch_sizes(wanted, 500, 400, 512)
    falling = plan_batch_sizes(law(64, 512, -0.5, seen=(512, 2048)), 8192, 6554, 64)
    assert len(falling.steps) == 1


def test_accumulations():
    numbers = list(accumulations(100))
    assert numbers == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96]
    assert all(math.lcm(a, b) <= 3 * b for a, b in itertools.pairwise(numbers))
    assert list(accumulations(5.9)) == [1, 2, 3, 4]
    assert list(accumulations(0.5)) == []


def test_constant_batch():
    plan = constant_batch_size(3, 100, 1000.0)
    assert (plan.total_tokens, plan.optimizer_steps, plan.steps[0].batch) == (900, 3, 300)
    with pytest.raises(ValueError, match="more than the total"):
        constant_batch_size(3, 100, 299.0)


def rows(log_std=0.1, noise=(0, 0, 0, 0)):
    z = 1.959963984540054
    made = []
    for tokens, error in zip((1e5, 2e5, 4e5, 8e5), noise, strict=True):
        batch = 3.0 * tokens**0.4 * math.exp(error)
        interval = (batch * math.exp(-z * log_std), batch * math.exp(z * log_std))
        made.append(SimpleNamespace(e_min=tokens, b_opt=batch, b_opt_bound="none", b_opt_interval=interval))
    return made


def test_band_of_a_table():
    bound = SimpleNamespace(e_min=1e3, b_opt=1e9, b_opt_bound="upper", b_opt_interval=(1, 1e9))
    band = batch_size_band(SimpleNamespace(rows=[bound, *rows()], batches=(100.0, 900.0)))
    assert (math.exp(band.p), band.q) == pytest.approx((3.0, 0.4))
    assert band.tokens == (1e5, 8e5)
    assert band(1e3) == band(1e5) == pytest.approx(3.0 * 1e5**0.4)  # no further down than what was seen
    low, high = band.interval(4e5)
    assert (low / band(4e5), high / band(4e5)) == pytest.approx((math.exp(-0.196), math.exp(0.196)), rel=1e-4)
    noisy = batch_size_band(SimpleNamespace(rows=rows(0.0, (0.2, -0.2, -0.2, 0.2)), batches=(100.0,)))
    x, y = np.log([1e5, 2e5, 4e5, 8e5]), np.log([row.b_opt for row in rows(0.0, (0.2, -0.2, -0.2, 0.2))])
    (slope, _), covariance = np.polyfit(x, y, 1, cov="unscaled")
    residual = y - np.polyval(np.polyfit(x, y, 1), x)
    variance = (residual**2).sum() / 2
    at = np.array([math.log(3e6), 1.0])
    spread = math.sqrt(variance * (1 + at @ covariance @ at))
    assert noisy.q == pytest.approx(slope)
    assert math.log(noisy.interval(3e6)[1] / noisy(3e6)) == pytest.approx(1.959964 * spread, rel=1e-6)
    one = batch_size_band(SimpleNamespace(rows=rows()[:1], batches=(100.0,)))
    assert one.q == 0
    assert one(1e9) == pytest.approx(3.0 * 1e5**0.4)
    with pytest.raises(ValueError, match="bracket B_opt"):
        batch_size_band(SimpleNamespace(rows=[bound], batches=(100.0,)))


def test_error_of_a_rate_law_is_that_of_repeats():
    sizes, horizons = np.repeat([3e5, 1e6, 4e6], 3), np.tile([1e5, 2e5, 4e5], 3)
    stds, groups = np.array([0.3, 0.4, 0.2, 0.1, 0.3, 0.2, 0.2, 0.2, 0.5]), np.repeat([0, 1, 2], 3)
    target = (2e7, 3e6)
    random = np.random.default_rng(0)
    shared = random.standard_normal((20000, 3))[:, groups] * stds  # all horizons of a search err together
    design = np.stack([np.ones(9), np.log(sizes), np.log(horizons)], axis=1)
    beta = np.linalg.lstsq(design, shared.T, rcond=None)[0]
    repeats = (np.array([1.0, *np.log(target)]) @ beta).std()
    assert measured_rate_std(sizes, horizons, stds, groups, target) == pytest.approx(repeats, rel=0.02)
    some = np.where(groups == 1, np.nan, 0.3)
    assert measured_rate_std(sizes, horizons, some, groups, target) == pytest.approx(
        measured_rate_std(sizes, horizons, np.full(9, 0.3), groups, target)
    )
    assert measured_rate_std(sizes, horizons, np.full(9, np.nan), groups, target) == 0.0


def test_small_parts():
    assert log_interval(2.0, 0.0) is None
    assert log_interval(2.0, math.nan) is None
    assert log_interval(2.0, 0.5) == pytest.approx((2 * math.exp(-0.979982), 2 * math.exp(0.979982)))
    assert times_beyond(30, (2, 10)) == 3
    assert times_beyond(0.5, (2, 10)) == 4
    assert times_beyond(5, (2, 10)) == 1


def test_slices_go_through_the_mixture_and_keep_ratios():
    best = np.array([0.5, 0.3, 0.2])
    lines = slices(lambda mixtures: mixtures @ [1.0, 2.0, 4.0], best, points=5)
    for own, (shares, losses) in zip(best, lines, strict=True):
        assert losses[list(shares).index(own)] == pytest.approx(best @ [1, 2, 4])
    shares, losses = lines[0]
    assert losses == pytest.approx(shares + (1 - shares) * (0.6 * 2 + 0.4 * 4))
    assert (shares[0], shares[-1]) == (1 / 16, 15 / 16)

"""E(S) and what follows from it: closed-form values, planted curves, synthetic runs with a known B_opt."""

import dataclasses
import functools
import json
import math

import numpy as np
import pytest

from lit_interns1.laws import (
    BatchSizeCurve,
    BatchSizeTable,
    NoiseScale,
    NoiseScaleAverage,
    branched_critical_batch,
    crossings,
    fit_batch_size_curve,
    fit_batch_size_schedule,
    fit_batch_size_table,
    fit_hyperbola,
    kaplan_critical_batch,
    noise_scale,
    smooth_loss,
    smoothed_final_loss,
)

PLANTED = BatchSizeCurve.smooth(s_min=1e4, s_1=1.2e4, s_opt=2e4, e_min=4e10, c=100, a_1=1.2e6)
STEPS = np.array([10500, 11000, 12000, 15000, 20000, 24000, 26000, 40000, 100000.0])
MANY_STEPS = np.array([10500, 11000, 11500, 13000, 15000, 18000, 20000, 24000, 30000, 40000, 60000, 100000.0])


# --- the curve ---


def test_derived_constants():
    assert PLANTED.s_2 == 26000
    assert (PLANTED.a_0, PLANTED.b_m1, PLANTED.b_0) == pytest.approx((1.24e10, 6.4e12, 4.32e10), rel=1e-12)
    assert (PLANTED.b_opt, PLANTED.b_min) == pytest.approx((2.0e6, 1.2e6), rel=1e-12)


def test_values_of_the_curve():
    expected_tokens = [5.60, 4.96, 4.64, 4.25, 4.00, 4.16, 4.36, 6.04, 13.24]
    expected_batch = [5.3333, 4.5091, 3.8667, 2.8333, 2.0000, 1.7333, 1.6769, 1.5100, 1.3240]
    np.testing.assert_allclose(PLANTED.tokens(STEPS) / 1e10, expected_tokens, rtol=1e-12)
    np.testing.assert_allclose(PLANTED.batch(STEPS) / 1e6, expected_batch, atol=5e-5)
    assert np.isinf(PLANTED.tokens([1e4, 5e3])).all()


def random_curve(rng):
    s_min = rng.uniform(1e3, 1e4)
    s_1 = s_min * rng.uniform(1.05, 2)
    s_opt = s_1 * rng.uniform(1.1, 3)
    e_min = rng.uniform(1e9, 1e11)
    a_1 = rng.uniform(0.2, 0.9) * e_min / s_opt
    c = a_1**2 / (4 * (e_min - a_1 * s_opt)) * rng.uniform(1.1, 20)
    return BatchSizeCurve.smooth(s_min, s_1, s_opt, e_min, c, a_1)


def test_batch_falls_with_steps_towards_b_min_and_branches_join():
    rng = np.random.default_rng(0)
    for _ in range(200):
        curve = random_curve(rng)
        steps = np.geomspace(curve.s_min * 1.001, curve.s_2 * 1e7, 400)
        assert (np.diff(curve.batch(steps)) < 0).all()
        assert curve.batch(steps[-1]) == pytest.approx(curve.b_min, rel=1e-5)
        assert curve.b_opt > curve.b_min
        assert curve.tokens(steps).min() >= curve.e_min * (1 - 1e-12)
        for join in (curve.s_1, curve.s_2):
            near = join * (1 + np.array([-2e-6, -1e-6, 1e-6, 2e-6]))
            value = curve.tokens(near)
            assert value[1] == pytest.approx(value[2], rel=1e-4)
            slopes = (value[1] - value[0]) / (near[1] - near[0]), (value[3] - value[2]) / (near[3] - near[2])
            assert slopes[0] == pytest.approx(slopes[1], rel=1e-2, abs=1e-3 * curve.b_opt)


def test_constraints_of_the_curve():
    with pytest.raises(ValueError, match=r"s_1=30000 < s_opt=20000"):
        BatchSizeCurve.smooth(1e4, 3e4, 2e4, 4e10, 100, 1.2e6)
    with pytest.raises(ValueError, match="a_0"):
        BatchSizeCurve.smooth(1e4, 1.2e4, 2e4, 4e10, 100, 1.95e6)


# --- the fit at one loss ---


def test_six_parameters_are_recovered():
    fit = fit_batch_size_curve(MANY_STEPS[::-1], PLANTED.tokens(MANY_STEPS)[::-1])
    assert fit.method == "piecewise"
    for name in ("s_min", "s_1", "s_opt", "e_min", "c", "a_1", "a_0", "b_m1", "b_0", "s_2"):
        assert getattr(fit.curve, name) == pytest.approx(getattr(PLANTED, name), rel=1e-5), name
    assert (fit.b_min, fit.b_opt) == pytest.approx((1.2e6, 2e6), rel=1e-6)


def test_random_curves_are_recovered():
    rng = np.random.default_rng(1)
    for _ in range(6):
        curve = random_curve(rng)
        early = np.linspace(curve.s_min, curve.s_1, 5)[1:-1]
        middle = np.linspace(curve.s_1, curve.s_2, 6)[1:-1]
        steps = np.concatenate([early, middle, curve.s_2 * np.array([1.2, 2, 4])])
        fit = fit_batch_size_curve(steps, curve.tokens(steps))
        assert (fit.b_min, fit.b_opt, fit.e_min) == pytest.approx((curve.b_min, curve.b_opt, curve.e_min), rel=1e-4)


@pytest.mark.parametrize("continuity", ["c0", "none"])
def test_curves_that_do_not_join_smoothly(continuity):
    kinked = BatchSizeCurve(
        s_min=9e3, s_1=1.25e4, s_2=2.7e4, s_opt=1.9e4, e_min=3.8e10, c=90, a_1=1.1e6,
        a_0=90 * 8e3**2 + 3.8e10 - 1.1e6 * 2.7e4 + (2e9 if continuity == "none" else 0),
        b_m1=2e13, b_0=90 * 6.5e3**2 + 3.8e10 - 2e13 / 3.5e3 + (3e9 if continuity == "none" else 0),
    )  # fmt: skip
    steps = np.array([1.0e4, 1.06e4, 1.12e4, 1.2e4, 1.4e4, 1.7e4, 2e4, 2.3e4, 2.6e4, 3.2e4, 4.5e4, 7e4, 1.1e5])
    fit = fit_batch_size_curve(steps, kinked.tokens(steps), continuity)
    assert fit.method == "piecewise"
    assert (fit.b_min, fit.b_opt, fit.e_min) == pytest.approx((1.1e6, 2e6, 3.8e10), rel=1e-4)
    if continuity == "c0":
        assert (fit.curve.s_min, fit.curve.s_1, fit.curve.s_2) == pytest.approx((9e3, 1.25e4, 2.7e4), rel=1e-3)


@pytest.mark.parametrize("continuity", ["c1", "c0", "none"])
def test_fits_of_anything_keep_the_constraints(continuity):
    rng = np.random.default_rng(3)
    for _ in range(6):
        steps, tokens = np.cumprod(rng.uniform(1.1, 2, 12)), np.exp(rng.normal(0, 0.6, 12))
        tokens[5] = 0.2
        curve = fit_batch_size_curve(steps, tokens, continuity).curve
        assert 0 < curve.s_min < curve.s_1 < curve.s_opt < curve.s_2
        assert min(curve.e_min, curve.c, curve.a_1, curve.a_0, curve.b_m1) > 0
        assert curve.b_opt > curve.b_min


def test_one_wrong_run_does_not_move_the_optimum_far():
    tokens = PLANTED.tokens(MANY_STEPS)
    tokens[9] *= 1.25
    assert fit_batch_size_curve(MANY_STEPS, tokens).b_opt == pytest.approx(2e6, rel=0.03)


def test_few_points_give_a_parabola():
    steps = np.array([1.5e4, 1.7e4, 2.1e4, 2.5e4])
    fit = fit_batch_size_curve(steps, PLANTED.tokens(steps))
    assert (fit.method, fit.b_min_bound, fit.b_opt_bound) == ("parabola", "upper", "none")
    assert (fit.s_opt, fit.e_min, fit.b_opt) == pytest.approx((2e4, 4e10, 2e6), rel=1e-9)
    assert fit.b_min == pytest.approx(PLANTED.batch(2.5e4))  # the smallest batch that reached the loss
    assert fit.b_min >= PLANTED.b_min


def test_failed_runs_bound_b_min_from_below():
    steps = np.array([1.5e4, 2.1e4, 4e4, 8e4])
    fit = fit_batch_size_curve(steps, PLANTED.tokens(steps), failed_batches=[0.9e6, 1.0e6])
    assert fit.b_min_bound == "none"
    assert fit.b_min == pytest.approx(1.2e6, rel=1e-9)  # two points of the last branch show its slope
    high = fit_batch_size_curve(steps, PLANTED.tokens(steps), failed_batches=[1.3e6])
    assert high.b_min == 1.3e6


@pytest.mark.parametrize(("steps", "bound"), [([1.1e4, 1.3e4, 1.6e4], "upper"), ([2.2e4, 3e4, 4e4], "lower")])
def test_an_optimum_beyond_the_runs_is_only_bounded(steps, bound):
    fit = fit_batch_size_curve(steps, PLANTED.tokens(np.array(steps)))
    assert (fit.method, fit.b_opt_bound) == ("edge", bound)
    assert fit.b_opt >= 2e6 if bound == "upper" else fit.b_opt <= 2e6


def test_bad_points_are_named():
    with pytest.raises(ValueError, match="three different runs"):
        fit_batch_size_curve([1e4, 1e4, 2e4], [1e10, 1e10, 2e10])
    with pytest.raises(ValueError, match="continuity='c2'"):
        fit_batch_size_curve(STEPS, PLANTED.tokens(STEPS), "c2")


# --- runs: loss curves, table, schedule ---

TOP, BOTTOM = 4.0, 2.8


def growth(loss):
    """What B and S of the planted curve are multiplied with at a loss: B_opt doubles from top to bottom."""
    return 2 ** ((TOP - loss) / (TOP - BOTTOM)), 8 ** ((TOP - loss) / (TOP - BOTTOM))


@functools.cache
def planted_run(batch, last_tokens, points):
    """Tokens and loss of the run whose E(S) at every loss is the planted curve, with B and S scaled by `growth`."""
    x = np.geomspace(PLANTED.s_min * (1 + 1e-6), PLANTED.s_2 * 1e3, 20000)
    batch_of_x = PLANTED.batch(x)
    losses = np.linspace(TOP + 0.4, BOTTOM - 0.3, 400)
    tokens = []
    for loss in losses:
        scale_b, scale_s = growth(loss)
        ratio = batch / scale_b
        steps = np.interp(-ratio, -batch_of_x, x) if ratio > PLANTED.b_min * 1.001 else np.inf
        tokens.append(batch * steps * scale_s)
    at = np.linspace(last_tokens / points, last_tokens, points)
    return at, np.interp(np.log(at), np.log(np.maximum.accumulate(tokens)), losses)


def synthetic_run(batch, noise, seed, last_tokens=1.3e12, points=3000):
    tokens, loss = planted_run(batch, last_tokens, points)
    return tokens, loss + np.random.default_rng(seed).normal(0, noise, points)


BATCHES = np.geomspace(1.7e6, 9e6, 8)


def synthetic_runs(noise, seed=0, batches=BATCHES):
    return [synthetic_run(batch, noise, seed * 100 + i) for i, batch in enumerate(batches)]


def test_table_finds_the_planted_batches_and_they_rise_as_the_loss_falls():
    runs = synthetic_runs(0.0)
    table = fit_batch_size_table(BATCHES, [t for t, _ in runs], [y for _, y in runs], num_targets=6, bootstrap=0)
    found = [row for row in table.rows if row.b_opt_bound == "none"]
    assert len(found) >= 4
    for row in found:
        scale_b, scale_s = growth(row.loss)
        assert row.b_opt == pytest.approx(2e6 * scale_b, rel=0.03)
        assert row.e_min == pytest.approx(4e10 * scale_b * scale_s, rel=0.02)
    assert (np.diff([row.b_opt for row in found]) > 0).all()
    assert (np.diff([row.e_min for row in found]) > 0).all()
    law = table.schedule_law()
    assert law.q == pytest.approx(math.log(2) / math.log(16), rel=0.1)
    middle = found[2]
    assert law(middle.e_min) == pytest.approx(middle.b_opt, rel=0.05)
    assert table.batch_for_loss(middle.loss) == pytest.approx(middle.b_opt)
    assert table.batch_for_loss(0.1) == pytest.approx(found[-1].b_opt)


def test_crossings_move_up_in_batch_as_the_loss_falls():
    curves = [smooth_loss(*synthetic_run(batch, 0.0, 0), width=0.05) for batch in (2e6, 3.2e6, 5e6)]
    small, large = crossings(curves[0], curves[1])[-1], crossings(curves[1], curves[2])[-1]
    assert small[0] < large[0]
    assert small[1] > large[1]
    # before they cross the smaller batch is ahead, after it the larger one
    assert curves[0](small[0] / 2) < curves[1](small[0] / 2)
    assert curves[0](small[0] * 2) > curves[1](small[0] * 2)
    assert crossings(curves[0], curves[0]) == []


def test_bootstrap_intervals_hold_the_planted_batch():
    inside = total = 0
    for seed in range(6):
        runs = synthetic_runs(0.03, seed)
        table = fit_batch_size_table(
            BATCHES, [t for t, _ in runs], [y for _, y in runs], targets=[3.5, 3.0], bootstrap=40, level=0.9
        )
        for row in table.rows:
            low, high = row.b_opt_interval
            assert low < high
            inside += low <= 2e6 * growth(row.loss)[0] <= high
            total += 1
    assert inside >= 0.7 * total


def test_bootstrap_intervals_hold_their_estimate_also_without_noise():
    runs = synthetic_runs(0.0)  # only the smoothing is wrong, and twice as wrong in every sample
    table = fit_batch_size_table(BATCHES, [t for t, _ in runs], [y for _, y in runs], num_targets=6, bootstrap=20)
    for row in table.rows:
        for name in ("b_min", "b_opt", "e_min"):
            low, high = getattr(row, name + "_interval")
            assert low <= getattr(row, name) <= high
    without = fit_batch_size_table(BATCHES, [t for t, _ in runs], [y for _, y in runs], num_targets=2, bootstrap=0)
    assert all(math.isnan(end) for row in without.rows for end in row.b_opt_interval)


def test_table_travels_through_json():
    batches = BATCHES[::2]
    runs = synthetic_runs(0.0, batches=batches)
    table = fit_batch_size_table(batches, [t for t, _ in runs], [y for _, y in runs], num_targets=3, bootstrap=4)
    assert BatchSizeTable.from_dict(json.loads(json.dumps(table.to_dict()))).to_dict() == table.to_dict()
    assert {row.method for row in table.rows} <= {"parabola", "edge"}
    with pytest.raises(ValueError, match="no table of batch sizes"):
        BatchSizeTable.from_dict({"rows": [{"loss": 1.0}]})


def test_a_mere_bound_is_no_optimum():
    runs = synthetic_runs(0.0)
    table = fit_batch_size_table(BATCHES, [t for t, _ in runs], [y for _, y in runs], targets=[3.6, 3.2], bootstrap=0)
    bounded = dataclasses.replace(table.rows[0], loss=3.9, b_opt=1.0, b_opt_bound="upper")
    more = dataclasses.replace(table, rows=(bounded, *table.rows))
    assert (more.schedule_law().p, more.schedule_law().q) == (table.schedule_law().p, table.schedule_law().q)
    assert more.batch_for_loss(3.9) == pytest.approx(table.rows[0].b_opt)
    with pytest.raises(ValueError, match="train smaller or larger ones"):
        dataclasses.replace(table, rows=(bounded,)).batch_for_loss(3.0)


def test_unsuitable_runs_are_named():
    tokens, losses = synthetic_run(2e6, 0.0, 0, last_tokens=1e12, points=200)
    with pytest.raises(ValueError, match="each at its own batch size"):
        fit_batch_size_table([1e6, 1e6, 2e6], [tokens] * 3, [losses] * 3)
    with pytest.raises(ValueError, match=r"target losses \[1.0\]"):
        fit_batch_size_table([1e6, 2e6, 3e6], [tokens] * 3, [losses] * 3, targets=[1.0])
    with pytest.raises(ValueError, match="no loss is common"):
        fit_batch_size_table([1e6, 2e6, 3e6], [tokens] * 3, [losses, losses, losses + 9], bootstrap=0)
    with pytest.raises(ValueError, match="ascend"):
        smooth_loss([1, 3, 2], [1, 1, 1])
    with pytest.raises(ValueError, match="too few to smooth"):
        smooth_loss(tokens, losses, skip_tokens=0.99e12)


def test_smoothing_has_no_lag_and_lowers_noise():
    tokens = np.linspace(1e6, 1e9, 4000)
    truth = 2 + 40 * tokens**-0.2
    noisy = truth + np.random.default_rng(0).normal(0, 0.05, tokens.size)
    curve = smooth_loss(tokens, noisy, width=0.1)
    late = tokens > 1e8
    error = curve(tokens[late]) - truth[late]
    assert np.abs(error).max() < 0.012
    assert abs(error.mean()) < 2e-3
    exact = smooth_loss(tokens, truth, width=0.1)
    loss = 2 + 40 * 5e8**-0.2
    assert exact.tokens_to_reach(loss) == pytest.approx(5e8, rel=5e-3)
    assert math.isnan(exact.tokens_to_reach(1.0))
    assert math.isnan(exact.tokens_to_reach(9.0))
    assert np.isnan(exact([1e5, 1e10])).all()


def test_spread_of_smoothed_samples_is_that_of_repeats():
    tokens = np.linspace(1e6, 1e8, 600)
    truth = 2 + 40 * tokens**-0.2

    def draw(seed, count):
        return smooth_loss(tokens, truth + np.random.default_rng(seed).normal(0, 0.1, 600), bootstrap=count)

    repeats = np.std([draw(seed, 0)(5e7) for seed in range(60)])
    samples = draw(1, 100)
    at = np.abs(samples.log_tokens_G - math.log(5e7)).argmin()
    assert samples.samples_RG[:, at].std() == pytest.approx(repeats, rel=0.4)


def test_schedule_law_over_sizes():
    tokens, sizes = (g.ravel() for g in np.meshgrid([1e9, 1e10, 1e11], [1e8, 1e9]))
    law = fit_batch_size_schedule(tokens, np.exp(2) * tokens**0.4 * sizes**0.1, sizes)
    assert (law.p, law.q, law.a) == pytest.approx((2, 0.4, 0.1), rel=1e-9)
    assert law(1e10, 1e9) == pytest.approx(np.exp(2) * 1e4 * 1e9**0.1)
    with pytest.raises(ValueError, match="give parameters"):
        law(1e10)
    with pytest.raises(ValueError, match="fix only"):
        fit_batch_size_schedule([1e9, 1e9], [1e6, 1e6])


# --- older accounts ---


def test_hyperbola_is_recovered_and_cannot_bend_upwards():
    steps = np.geomspace(1.2e4, 2e5, 6)
    fit = fit_hyperbola(steps, 4e10 * steps / (steps - 1e4))
    assert (fit.s_min, fit.e_min, fit.critical_batch) == pytest.approx((1e4, 4e10, 4e6), rel=1e-6)
    tokens = fit.tokens(steps)
    np.testing.assert_allclose((tokens / fit.e_min - 1) * (steps / fit.s_min - 1), 1, rtol=1e-9)
    worse = fit_hyperbola(STEPS, PLANTED.tokens(STEPS))
    assert worse.fit.residual_std > 0.2


def test_kaplan_critical_batch():
    np.testing.assert_allclose(kaplan_critical_batch([1.0, 2.0]), [2e8, 2e8 / 2 ** (1 / 0.21)], rtol=1e-12)


def test_noise_scale_is_exact_for_expected_norms():
    squared, noise, small, big = 0.3, 50.0, 8.0, 64.0
    value = noise_scale(squared + noise / small, squared + noise / big, small, big)
    assert (value.squared_gradient, value.noise, value.simple) == pytest.approx((squared, noise, noise / squared))
    assert math.isnan(NoiseScale(-1.0, 2.0).simple)
    with pytest.raises(ValueError, match="small_batch=8"):
        noise_scale(1, 1, 8, 8)


def test_averages_are_taken_before_the_ratio():
    rng = np.random.default_rng(0)
    average = NoiseScaleAverage(decay=0.999)
    assert math.isnan(average.value.simple)
    gradient = np.full(20, 0.1)
    for _ in range(4000):
        samples = gradient + rng.normal(0, 1, (8, 20))
        small = (samples.reshape(4, 2, 20).mean(axis=1) ** 2).sum(axis=1).mean()
        result = average.update(noise_scale(small, (samples.mean(axis=0) ** 2).sum(), 2, 8))
    assert result.noise == pytest.approx(20, rel=0.05)
    assert result.squared_gradient == pytest.approx(0.2, rel=0.25)
    first = NoiseScaleAverage(decay=0.9)
    assert first.update(NoiseScale(2.0, 6.0)).simple == pytest.approx(3)  # no bias towards zero at the start


# --- by branching ---


@pytest.mark.parametrize(
    ("losses", "batch", "is_bound"),
    [
        ([3.000, 2.995, 3.004, 3.006], 400, False),  # 3.006 is 0.011 above the second
        ([3.000, 3.009, 3.009, 3.009], 800, True),
        ([3.000, 3.009, 3.018, 3.009], 800, True),  # the third loses, the fourth is within ε of all before it
        ([3.000, 3.011, 3.020, float("nan")], 100, False),
        ([3.000, float("inf"), 2.999, 3.010], 400, False),
    ],
)
def test_the_branched_critical_batch_is_the_largest_that_loses_to_no_smaller_one(losses, batch, is_bound):
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        found = branched_critical_batch(np.array([100, 200, 400, 800])[order], np.array(losses)[order])
        assert (found.batch, found.is_bound) == (batch, is_bound)


def test_the_loss_of_a_branch_is_averaged_over_equal_tokens():
    # steps of 4 tokens from 100 on, windows of 8: means 3, 2, 4 -> 3, 2.5, 3.25; the last step is outside
    steps = [(104, 2.0), (108, 4.0), (112, 2.5), (116, 1.5), (120, 4.0), (124, 4.0), (128, 99.0)]
    tokens, losses = zip(*steps, strict=True)
    assert smoothed_final_loss(tokens, losses, 100, 128, 8) == pytest.approx(3.25)
    assert smoothed_final_loss(tokens, losses, 100, 128, 8, weight=1.0) == pytest.approx(4.0)
    # the same losses in steps of other sizes, one across the edge of a window
    tokens, losses = [106, 110, 124, 126], [3.0, 2.0, 4.0, 1.0]
    assert smoothed_final_loss(tokens, losses, 100, 124, 8, weight=1.0) == pytest.approx(4.0)
    assert smoothed_final_loss(tokens, losses, 100, 108, 8) == pytest.approx((6 * 3.0 + 2 * 2.0) / 8)


def test_unsuitable_branches_are_named():
    with pytest.raises(ValueError, match=r"need two batch sizes or more, all different.*\[1.0, 1.0\]"):
        branched_critical_batch([1, 1], [3, 3])
    with pytest.raises(ValueError, match="smallest batch, 1 tokens per step, has no finite loss"):
        branched_critical_batch([2, 1], [3, math.nan])
    with pytest.raises(ValueError, match="from 0 to 5 tokens there is no window of 6"):
        smoothed_final_loss([5], [1.0], 0, 5, 6)
    with pytest.raises(ValueError, match="do not reach from 0 to 9"):
        smoothed_final_loss([5], [1.0], 0, 9, 6)


def test_three_runs_far_apart_do_not_bend_below_zero():
    fit = fit_batch_size_curve(np.array([100.0, 1000.0, 3000.0]), np.array([9e5, 1e5, 9e5]))
    assert (fit.s_opt, fit.e_min, fit.b_opt) == (1000.0, 1e5, 100.0)

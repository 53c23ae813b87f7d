"""The learning-rate law and the power law of the loss: published numbers, closed forms, planted parameters."""

import math

import numpy as np
import pytest

from lit_interns1.laws import (
    extrapolate_best_rate,
    fit_power_law,
    fit_rate_law,
    fit_rate_parabola,
    percentile_interval,
    published_rate_law,
)


@pytest.mark.parametrize(
    ("parameters", "tokens", "rate"),
    [(1e8, 1e10, 1.998921e-4), (1e9, 1e11, 5.345591e-5), (1.3e9, 5e11, 2.867102e-5), (1.2e10, 5e11, 1.750882e-5)],
)
def test_published_law(parameters, tokens, rate):
    assert published_rate_law(absolute=True).predict(parameters, tokens).rate == pytest.approx(rate, rel=1e-6)


def test_published_ratios():
    law = published_rate_law()
    for parameters, tokens, ratio in [(1e8, 2e10, 0.784095), (2e8, 1e10, 0.857435), (1e8, 1e11, 0.445759)]:
        assert law.predict_ratio(1.0, 1e8, 1e10, parameters, tokens).rate == pytest.approx(ratio, abs=1e-6)
    with pytest.raises(ValueError, match="no constant K"):
        law.predict(1e8, 1e10)
    with pytest.raises(ValueError, match="reference_tokens=0"):
        law.predict_ratio(1.0, 1e8, 0, 1e8, 1e10)


def test_parabola_of_four_rates():
    rates = np.array([1e-4, 2e-4, 4e-4, 8e-4])
    losses = 2.5 + 0.03 * (np.log(rates) - math.log(3e-4)) ** 2
    fit = fit_rate_parabola(rates[::-1], losses[::-1])
    assert fit.best_rate == pytest.approx(3e-4, rel=1e-9)
    assert fit.best_loss == pytest.approx(2.5, abs=1e-9)
    assert fit.curvature == pytest.approx(0.03, abs=1e-9)
    # coefficients of c2 x² + c1 x + c0 in x = ln η
    assert -2 * fit.curvature * math.log(fit.best_rate) == pytest.approx(0.4867037, abs=1e-7)
    assert fit.best_loss + fit.curvature * math.log(fit.best_rate) ** 2 == pytest.approx(4.4740040, abs=1e-7)
    assert fit.extension == "none"
    assert fit.penalty(2) == pytest.approx(0.03 * math.log(2) ** 2)
    np.testing.assert_allclose(fit(rates), losses, rtol=1e-12)


@pytest.mark.parametrize(("best", "extension"), [(2e-5, "left"), (6e-5, "none"), (1.5e-3, "none"), (5e-3, "right")])
def test_extension_of_the_grid(best, extension):
    rates = np.array([1e-4, 2e-4, 4e-4, 8e-4])
    fit = fit_rate_parabola(rates, 2.5 + 0.03 * np.log(rates / best) ** 2)
    assert fit.extension == extension
    assert fit.best_rate == pytest.approx(best, rel=1e-6)


def test_extension_of_a_grid_that_bends_down():
    rates = np.array([1e-4, 2e-4, 4e-4])
    assert fit_rate_parabola(rates, [2.0, 2.5, 2.6]).extension == "left"
    falling = fit_rate_parabola(rates, [2.6, 2.5, 2.0])
    assert falling.extension == "right"
    assert math.isnan(falling.best_rate)


def test_diverged_rates_and_far_points_are_left_out():
    rates = np.array([1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3])
    losses = 2.5 + 0.03 * np.log(rates / 3e-4) ** 2
    losses[-2:] = [6.0, np.inf]
    assert fit_rate_parabola(rates, losses, num_points=4).best_rate == pytest.approx(3e-4, rel=1e-6)
    assert fit_rate_parabola(rates, losses).best_rate < 2.5e-4
    with pytest.raises(ValueError, match="add lower rates"):
        fit_rate_parabola(rates[-3:], [6.0, np.nan, np.inf])
    with pytest.raises(ValueError, match="num_points=2"):
        fit_rate_parabola(rates, losses, num_points=2)


def test_standard_error_of_the_best_rate_is_that_of_repeats():
    rates = np.geomspace(1e-4, 1.6e-3, 7)
    clean = 2.5 + 0.03 * np.log(rates / 3e-4) ** 2
    fits = [fit_rate_parabola(rates, clean + np.random.default_rng(s).normal(0, 2e-3, 7)) for s in range(200)]
    spread = np.std([math.log(fit.best_rate) for fit in fits])
    assert np.median([fit.log_rate_std for fit in fits]) == pytest.approx(spread, rel=0.2)


def test_power_law_is_recovered():
    tokens = np.geomspace(1e8, 1e10, 5)
    law = fit_power_law(tokens, 2.0 + 50 * tokens**-0.25)
    assert (law.irreducible, law.amplitude, law.exponent) == pytest.approx((2.0, 50.0, 0.25), rel=1e-6)
    assert law(1e11) == pytest.approx(2.0 + 50 * 1e11**-0.25)


def test_power_law_band_holds_the_truth():
    tokens, inside, within_bootstrap = np.geomspace(1e8, 1e10, 14), 0, 0
    truth = 2.0 + 50 * 1e11**-0.25
    for seed in range(40):
        noise = np.random.default_rng(seed).normal(0, 1e-3, tokens.size)
        law = fit_power_law(tokens, (2.0 + 50 * tokens**-0.25) * np.exp(noise), huber=None)
        loss, error = law.predict(1e11)
        inside += abs(loss[0] - truth) < 1.645 * error[0]
        if seed < 20:
            samples = law.fit.bootstrap(60, seed)
            irreducible, amplitude, exponent = samples.T
            low, high = percentile_interval(irreducible + amplitude * (1e11 / law.unit_tokens) ** -exponent, 0.9)
            within_bootstrap += low < truth < high
    # 36 of 40 and 18 of 20 expected, less for few points
    assert 30 <= inside <= 40
    assert 14 <= within_bootstrap <= 20


def test_power_law_shrugs_off_a_loss_spike():
    tokens = np.geomspace(1e8, 1e10, 12)
    losses = 2.0 + 50 * tokens**-0.25
    losses[6] += 0.4
    assert fit_power_law(tokens, losses)(1e11) == pytest.approx(2.0 + 50 * 1e11**-0.25, abs=2e-3)
    assert abs(fit_power_law(tokens, losses, huber=None)(1e11) - 2.0 - 50 * 1e11**-0.25) > 0.02


def test_power_law_refuses_too_little():
    with pytest.raises(ValueError, match="three token counts"):
        fit_power_law([1e8, 1e8, 1e9], [3, 3, 2])
    with pytest.raises(ValueError, match="positive and finite"):
        fit_power_law([1e8, 2e8, 1e9], [3, np.nan, 2])


def test_extrapolation_follows_each_rate_and_leaves_out_a_diverged_one():
    tokens, rates = np.geomspace(2e7, 2e8, 5), np.geomspace(2.5e-4, 8e-3, 6)
    exponent, curvature = 0.25, 0.02
    # each rate has its own exact power law; at every D the losses lie on a parabola
    amplitude = 60 * (1 + curvature * np.log(rates / 8e-4) ** 2)
    losses = 2.0 + amplitude[:, None] * tokens**-exponent
    losses[-1] = np.nan
    result = extrapolate_best_rate(tokens, rates, losses, 1e9)
    assert result.parabola.best_rate == pytest.approx(8e-4, rel=1e-4)
    assert result.parabola.curvature == pytest.approx(60 * curvature * 1e9**-exponent, rel=1e-4)
    assert len(result.power_laws) == 5
    with pytest.raises(ValueError, match="rates, probes"):
        extrapolate_best_rate(tokens, rates, losses.T, 1e9)


def grid_of_optima(noise, seed=0):
    sizes, tokens = (grid.ravel() for grid in np.meshgrid([1e6, 4e6, 1.6e7], [1e8, 4e8, 1.6e9], indexing="ij"))
    rates = 30 * sizes**-0.22 * tokens**-0.35
    return sizes, tokens, rates * np.exp(np.random.default_rng(seed).normal(0, noise, sizes.size))


def test_joint_law_is_recovered():
    law = fit_rate_law(*grid_of_optima(0.0))
    assert (law.constant, law.size_exponent, law.data_exponent) == pytest.approx((30, -0.22, -0.35), rel=1e-9)
    assert law.r_squared == pytest.approx(1)
    assert law.held_out_error == pytest.approx(0, abs=1e-9)
    assert law.predict(1e8, 1e10).rate == pytest.approx(30 * 1e8**-0.22 * 1e10**-0.35)


def test_joint_law_errors_are_those_of_repeats():
    laws = [fit_rate_law(*grid_of_optima(0.05, seed)) for seed in range(150)]
    spread = np.std([law.size_exponent for law in laws]), np.std([law.data_exponent for law in laws])
    stated = np.median([law.standard_errors for law in laws], axis=0)[1:]
    np.testing.assert_allclose(stated, spread, rtol=0.25)
    truth = 30 * 1e8**-0.22 * 1e10**-0.35
    band = [law.predict(1e8, 1e10) for law in laws]
    new = truth * np.exp(np.random.default_rng(999).normal(0, 0.05, 150))
    # one standard error, six degrees of freedom: 65 % of new optima
    assert 80 <= sum(b.low < rate < b.high for b, rate in zip(band, new)) <= 115
    # in the middle of the points the coefficients add a ninth of the variance to the scatter of one optimum
    middle = laws[0].predict(4e6, 4e8)
    assert math.log(middle.high / middle.rate) == pytest.approx(laws[0].residual_std * math.sqrt(1 + 1 / 9), rel=1e-6)
    ratio = [law.predict_ratio(1e-3, 4e6, 4e8, 4e6, 1.6e10) for law in laws]
    expected = 1e-3 * 40**-0.35
    assert 80 <= sum(r.low < expected < r.high for r in ratio) <= 115
    assert np.mean([law.held_out_error for law in laws]) > np.mean([law.residual_std for law in laws])


def test_reference_error_enters_the_band():
    band = published_rate_law().predict_ratio(1e-3, 1e6, 1e8, 1e6, 1e8, reference_log_std=0.1)
    assert (band.low, band.high) == pytest.approx((1e-3 * math.exp(-0.1), 1e-3 * math.exp(0.1)))


def test_joint_law_needs_both_axes():
    with pytest.raises(ValueError, match="1 sizes"):
        fit_rate_law([1e6, 1e6, 1e6], [1e8, 2e8, 4e8], [1e-3, 9e-4, 8e-4])
    two = fit_rate_law([1e6, 1e6, 4e6, 4e6], [1e8, 4e8, 1e8, 4e8], [1e-3, 8e-4, 7e-4, 6e-4])
    assert two.held_out_error is None
    with pytest.raises(ValueError, match="positive"):
        fit_rate_law([1e6, 2e6, -1], [1e8, 2e8, 4e8], [1e-3, 9e-4, 8e-4])

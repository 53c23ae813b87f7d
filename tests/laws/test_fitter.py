"""The fitter against closed forms, planted parameters and the coverage its intervals claim."""

import numpy as np
import pytest

from lit_interns1.laws.fitter import CurveFitter, percentile_interval
from lit_interns1.laws.linear import linear_fit
from lit_interns1.laws.transforms import Bounded, Increasing, Joint, Positive, Unbounded


def line(theta, x):
    intercept, slope = theta
    return intercept + slope * x


def decay(theta, x):
    amplitude, rate = theta
    return amplitude * np.exp(-rate * x)


@pytest.mark.parametrize(
    ("transform", "theta"),
    [
        (Unbounded("a", "b"), [-3.0, 2.0]),
        (Positive("a", "b"), [1e-9, 4e9]),
        (Bounded("a", low=-1.0, high=3.0), [2.9]),
        (Increasing("a", "b", "c"), [0.5, 0.7, 9.0]),
        (Joint(Increasing("a", "b"), Unbounded("c"), Positive("d")), [1.0, 2.0, -5.0, 3.0]),
    ],
)
def test_transforms_invert_and_keep_their_constraints(transform, theta):
    free = transform.free(np.array([theta]))
    np.testing.assert_allclose(transform.constrained(free)[0], theta, rtol=1e-12)
    assert len(transform.names) == len(theta)
    wild = transform.constrained(np.random.default_rng(0).normal(0, 3, (50, len(theta))))
    assert np.isfinite(transform.free(wild)).all()


def test_infeasible_values_have_no_free_form():
    with np.errstate(all="ignore"):
        assert not np.isfinite(Increasing("a", "b").free(np.array([[2.0, 1.0]]))).all()
    with pytest.raises(ValueError, match="no starting point keeps the constraints"):
        CurveFitter(decay, Positive("amplitude", "rate")).fit([0, 1, 2], [1, 1, 1], [-1.0, 1.0])


def test_least_squares_line_agrees_with_the_normal_equations():
    rng = np.random.default_rng(1)
    x = np.linspace(0, 5, 30)
    y, weights = 2 - 0.7 * x + rng.normal(0, 0.3, 30), rng.uniform(0.2, 3, 30)
    fit = CurveFitter(line, Unbounded("intercept", "slope")).fit(x, y, [0.0, 0.0], weights)
    design = np.stack([np.ones(30), x], axis=1)
    normal = design.T @ (design * weights[:, None])
    beta = np.linalg.solve(normal, design.T @ (weights * y))
    variance = (weights * (y - design @ beta) ** 2).sum() / 28
    np.testing.assert_allclose(fit.theta_P, beta, rtol=1e-9)
    np.testing.assert_allclose(fit.covariance(), variance * np.linalg.inv(normal), rtol=1e-6)
    closed = linear_fit(design, y, weights)
    np.testing.assert_allclose(closed.beta_P, beta, rtol=1e-12)
    np.testing.assert_allclose(closed.covariance_PP, fit.covariance(), rtol=1e-6)
    mean, error = fit.predict([7.0])
    expected_mean, expected_error = closed.predict([1.0, 7.0])
    np.testing.assert_allclose([*mean, *error], [*expected_mean, *expected_error], rtol=1e-6)


def test_huber_ignores_outliers_that_ruin_least_squares():
    x = np.linspace(0, 3, 25)
    y = decay((2.0, 0.8), x)
    y[[4, 11, 20]] += [3.0, -2.0, 5.0]
    parameters = Positive("amplitude", "rate")
    starts = [[1.0, 0.1], [1.0, 3.0]]
    robust = CurveFitter(decay, parameters, huber=1e-3).fit(x, y, starts)
    plain = CurveFitter(decay, parameters).fit(x, y, starts)
    np.testing.assert_allclose(robust.theta_P, [2.0, 0.8], rtol=5e-3)
    assert abs(plain.values["rate"] - 0.8) > 0.1
    # the minimum: Huber's influence, projected on the derivatives, vanishes
    influence = np.clip(robust.residuals_N, -1e-3, 1e-3)
    gradient = robust.fitter.jacobian(robust.u_P[None], x)[0]
    assert np.abs(gradient.T @ influence).max() < 1e-7


def test_several_starts_find_the_global_minimum():
    def wave(theta, x):
        (frequency,) = theta
        return np.sin(frequency * x)

    x = np.linspace(0, 6, 40)
    fitter = CurveFitter(wave, Positive("frequency"))
    assert fitter.fit(x, np.sin(3 * x), [[0.3]]).cost > 1
    fit = fitter.fit(x, np.sin(3 * x), [[start] for start in (0.3, 1.0, 2.8, 7.0)])
    assert fit.values["frequency"] == pytest.approx(3, rel=1e-9)
    assert fit.converged
    again, cost = fitter.refit(x, np.stack([np.sin(3 * x), np.sin(x)]), [[start] for start in (0.3, 1.0, 2.8, 7.0)])
    np.testing.assert_allclose(again[:, 0], [3, 1], rtol=1e-9)
    assert cost.max() < 1e-15


def test_refit_equals_fits_one_by_one():
    rng = np.random.default_rng(2)
    x = np.linspace(0, 3, 12)
    y = decay((1.5, 0.6), x) + rng.normal(0, 0.05, (5, 12))
    weights = rng.integers(0, 3, (5, 12)).astype(float)
    fitter = CurveFitter(decay, Positive("amplitude", "rate"))
    together, cost = fitter.refit(x, y, [[1.0, 1.0], [3.0, 0.2]], weights)
    for row in range(5):
        alone = fitter.fit(x, y[row], [[1.0, 1.0], [3.0, 0.2]], weights[row])
        np.testing.assert_allclose(together[row], alone.theta_P, rtol=1e-7)
        assert cost[row] == pytest.approx(alone.cost, rel=1e-9)


def test_bootstrap_interval_covers_as_often_as_it_says():
    x, truth = np.linspace(0, 3, 15), 0.8
    fitter = CurveFitter(decay, Positive("amplitude", "rate"))
    covered = []
    for seed in range(60):
        y = decay((2.0, truth), x) + np.random.default_rng(seed).normal(0, 0.05, x.size)
        samples = fitter.fit(x, y, [1.0, 1.0]).bootstrap(repeats=80, seed=seed)
        low, high = percentile_interval(samples[:, 1], level=0.8)
        covered.append(low <= truth <= high)
    # binomial: 48 ± 3.1 of 60 expected
    assert 39 <= sum(covered) <= 56


def test_bootstrap_is_seeded():
    x = np.linspace(0, 3, 8)
    y = decay((2.0, 0.8), x) + np.random.default_rng(0).normal(0, 0.05, 8)
    fit = CurveFitter(decay, Positive("amplitude", "rate")).fit(x, y, [1.0, 1.0])
    np.testing.assert_array_equal(fit.bootstrap(10, seed=3), fit.bootstrap(10, seed=3))
    assert (fit.bootstrap(10, seed=3) != fit.bootstrap(10, seed=4)).any()


def test_a_held_out_group_does_not_influence_its_prediction():
    x = np.tile(np.linspace(0, 3, 6), 3)
    groups = np.repeat(["a", "b", "c"], 6)
    y = decay((2.0, 0.8), x) + np.random.default_rng(5).normal(0, 0.02, 18)
    fitter = CurveFitter(decay, Positive("amplitude", "rate"))
    predicted = fitter.fit(x, y, [1.0, 1.0]).leave_one_group_out(groups)
    for group in "abc":
        alone = fitter.fit(x[groups != group], y[groups != group], [1.0, 1.0])
        expected = decay(alone.theta_P, x[groups == group])
        np.testing.assert_allclose(predicted[groups == group], expected, rtol=1e-7)
    design = np.stack([np.ones(18), x], axis=1)
    held = linear_fit(design, y).leave_one_group_out(groups)
    alone = linear_fit(design[groups != "b"], y[groups != "b"])
    np.testing.assert_allclose(held[groups == "b"], design[groups == "b"] @ alone.beta_P, rtol=1e-12)


def test_percentile_interval():
    samples = np.append(np.arange(101.0), np.nan)
    np.testing.assert_allclose(percentile_interval(samples, 0.9), [5, 95])
    assert np.isnan(percentile_interval([np.nan, np.nan])).all()
    with pytest.raises(ValueError, match="level=95"):
        percentile_interval(samples, 95)


def test_bad_input_is_named():
    fitter = CurveFitter(decay, Positive("amplitude", "rate"))
    with pytest.raises(ValueError, match="1 weighted points do not fix the 2 parameters"):
        fitter.fit([0, 1], [1, 2], [1.0, 1.0], [0, 1])
    with pytest.raises(ValueError, match="finite vectors"):
        fitter.fit([0, 1], [1, np.nan], [1.0, 1.0])
    with pytest.raises(ValueError, match="huber=0"):
        CurveFitter(decay, Positive("amplitude", "rate"), huber=0)
    with pytest.raises(ValueError, match="no residual to resample"):
        fitter.fit([0, 1], [2, 1], [1.0, 1.0]).bootstrap()
    with pytest.raises(ValueError, match="fix only 1 of 2"):
        linear_fit([[1, 2], [2, 4], [3, 6]], [1, 2, 3])

"""Mixing laws at sizes and tokens that were not trained, and power laws with a common exponent: planted curves."""

import numpy as np
import pytest

from lit_interns1.laws import fit_power_law
from lit_interns1.laws.mixing_nested import fit_nested_mixing_law
from lit_interns1.laws.power_law import fit_shared_power_laws

FLOOR, SLOPE = np.array([1.0, 2.0]), np.array([[-3.0, -0.5, 0.0], [-0.3, -2.0, -1.0]])
STEP_EXPONENT, SIZE_EXPONENT = 0.5, 0.3
MIXTURES = np.array(
    [[2, 2, 4], [4, 2, 2], [2, 4, 2], [3, 3, 2], [3, 2, 3], [2, 3, 3], [5, 2, 1], [1, 5, 2], [2, 1, 5]]
) / 8  # fmt: skip
SIZES, TOKENS = (1e7, 3e7, 1e8), (1e9, 2e9, 3e9)


def planted(size, tokens, mixtures, amplitude=1.0):
    """Floors of each law depend on the axes that it leaves alone: all three hold exactly."""
    over_size, over_tokens = 40 * size**-SIZE_EXPONENT, 2e4 * tokens**-STEP_EXPONENT
    return FLOOR + np.exp(mixtures @ SLOPE.T) + amplitude * np.array([1, 1.3]) * (over_size + over_tokens)


def table(sizes=SIZES, tokens=TOKENS):
    points = [(n, d, m) for n in sizes for d in tokens for m in MIXTURES]
    n, d, m = (np.array(column) for column in zip(*points))
    return n, d, m, np.stack([planted(*point) for point in points])


@pytest.mark.parametrize("share", ["all", "target"])
def test_extrapolates_over_both(share):
    points = table()
    order = np.random.default_rng(0).permutation(len(points[0]))
    found = fit_nested_mixing_law(
        *(column[order] for column in points), "abc", "vw", 1e9, 1e11, share, share, bootstrap=10
    )
    assert found.proportions_MK.shape == (9, 3)
    np.testing.assert_allclose(found.losses_MV, planted(1e9, 1e11, found.proportions_MK), atol=1e-5)
    elsewhere = np.array([[0.3, 0.3, 0.4], [0.6, 0.2, 0.2]])
    np.testing.assert_allclose(found.law.predict(elsewhere), planted(1e9, 1e11, elsewhere), atol=1e-3)
    assert found.size_exponents == pytest.approx([SIZE_EXPONENT] * 2, abs=1e-4)
    assert sorted(found.step_exponents) == list(SIZES)
    np.testing.assert_allclose(list(found.step_exponents.values()), STEP_EXPONENT, atol=1e-4)
    assert (found.size_factor, found.token_factor) == pytest.approx((10, 1e11 / 3e9))


def test_axis_that_is_there_is_not_extrapolated():
    n, d, m, losses = table(sizes=(1e8,))
    found = fit_nested_mixing_law(n, d, m, losses, "abc", "vw", 1e8, 1e10, bootstrap=0)
    assert found.size_exponents is None
    assert list(found.step_exponents) == [1e8]
    np.testing.assert_allclose(found.losses_MV, planted(1e8, 1e10, found.proportions_MK), atol=1e-6)
    n, d, m, losses = table(tokens=(1e9,))
    found = fit_nested_mixing_law(n, d, m, losses, "abc", "vw", 1e9, 1e9, bootstrap=0)
    assert found.step_exponents == {}
    assert found.size_exponents is not None
    np.testing.assert_allclose(found.losses_MV, planted(1e9, 1e9, found.proportions_MK), atol=1e-5)


def test_exponent_of_each_curve():
    n, d, m, losses = table(sizes=(1e8,), tokens=(1e9, 2e9, 3e9, 5e9))
    found = fit_nested_mixing_law(n, d, m, losses, "abc", "vw", 1e8, 1e10, share_steps="none", bootstrap=0)
    assert found.step_exponents[1e8].shape == (9, 2)
    np.testing.assert_allclose(found.step_exponents[1e8], STEP_EXPONENT, atol=1e-2)
    np.testing.assert_allclose(found.losses_MV, planted(1e8, 1e10, found.proportions_MK), atol=1e-3)


def test_bad_tables():
    n, d, m, losses = table()
    with pytest.raises(ValueError, match=r"was not trained at size 1e\+07: leave it out"):
        fit_nested_mixing_law(n[9 * 3 - 8 :], *(a[9 * 3 - 8 :] for a in (d, m, losses)), "abc", "vw", 1e9, 1e11)
    with pytest.raises(ValueError, match=r"losses at the tokens \[1e\+09\]|losses at the tokens \[1000000000.0\]"):
        fit_nested_mixing_law(*(a[d == 1e9] for a in (n, d, m, losses)), "abc", "vw", 1e9, 1e11)
    with pytest.raises(ValueError, match=r"losses at the sizes \[10000000.0\] only: to reach 1e\+09"):
        fit_nested_mixing_law(*(a[n == 1e7] for a in (n, d, m, losses)), "abc", "vw", 1e9, 1e11)
    with pytest.raises(ValueError, match="target_tokens=0"):
        fit_nested_mixing_law(n, d, m, losses, "abc", "vw", 1e9, 0)
    with pytest.raises(ValueError, match="one row per point"):
        fit_nested_mixing_law(n[1:], d, m, losses, "abc", "vw", 1e9, 1e11)


def test_shared_exponent_of_ragged_curves():
    xs = [np.array([1e6, 4e6, 1e7]), np.array([2e6, 9e6]), np.array([1e6, 2e6, 3e6, 8e6])]
    laws = [(2.0, 300.0), (1.0, 500.0), (0.0, 900.0)]
    fit = fit_shared_power_laws(xs, [c + a * x**-0.4 for x, (c, a) in zip(xs, laws)])
    assert fit.exponent == pytest.approx(0.4, abs=1e-5)
    np.testing.assert_allclose(fit.irreducible_C, [2, 1, 0], atol=1e-3)
    np.testing.assert_allclose(fit.amplitude_C, [300, 500, 900], rtol=1e-3)
    np.testing.assert_allclose(fit(1e8), [c + a * 1e8**-0.4 for c, a in laws], atol=1e-3)
    single = fit_power_law(xs[2], 1.5 + 300 * xs[2] ** -0.4)
    alone = fit_shared_power_laws(xs[2:], [1.5 + 300 * xs[2] ** -0.4])
    assert alone(1e8)[0] == pytest.approx(single(1e8), abs=1e-4)
    assert alone.residual_std < 1e-6


def test_shared_exponent_keeps_signs():
    x = np.array([1.0, 2.0, 4.0])
    # one that rises: the best that does not is flat; one that falls faster than any c ≥ 0 allows
    fit = fit_shared_power_laws([x, x], [2 + 0.1 * x, 5 - 1.2 * x], exponents=(0.1, 0.2))
    assert fit.amplitude_C[0] == 0
    assert fit.irreducible_C[0] == pytest.approx((2 + 0.1 * x).mean())
    assert fit.irreducible_C[1] == 0
    assert 0.1 <= fit.exponent <= 0.2 + 1e-9
    power = x**-fit.exponent
    assert fit.amplitude_C[1] == pytest.approx(power @ (5 - 1.2 * x) / (power @ power))
    rough = np.array([3.0, 2.4, 2.2, 2.0, 1.9])
    free = fit_shared_power_laws([np.arange(1.0, 6)] * 2, [rough, 2 * rough])
    design = np.stack([np.ones(5), np.arange(1.0, 6) ** -free.exponent], axis=1)
    residual = rough - design @ np.linalg.lstsq(design, rough, rcond=None)[0]
    assert free.residual_std == pytest.approx(np.sqrt((residual**2).sum() * 5 / (10 - 5)))


@pytest.mark.parametrize(
    ("xs", "losses", "message"),
    [
        ([[1.0, 1.0]], [[2.0, 2.0]], "at two x or more"),
        ([[1.0, 2.0]], [[2.0, 1.0]], "2 losses do not fix 1 curves"),
        ([[1.0, 2.0, 3.0]], [[2.0, 1.0, -1.0]], "positive and finite"),
        ([], [], "do not fix 0 curves"),
    ],
)
def test_bad_curves(xs, losses, message):
    with pytest.raises(ValueError, match=message):
        fit_shared_power_laws(xs, losses)
    with pytest.raises(ValueError, match=r"exponents=\(1, 0.5\)"):
        fit_shared_power_laws([[1.0, 2.0, 3.0]], [[3.0, 2.0, 1.5]], exponents=(1, 0.5))

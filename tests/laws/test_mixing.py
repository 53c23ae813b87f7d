"""The mixing law: published losses and coefficients, planted laws, and optima against brute force."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from lit_interns1.laws import CurveFitter, MixingLaw, caps_of_tokens, fit_mixing_law, linear_fit
from lit_interns1.laws.mixing_search import bounds, convex_search, grid_search
from lit_interns1.laws.transforms import Unbounded

PUBLISHED = json.loads((Path(__file__).parents[1] / "golden/mixing/published.json").read_text())
THREE = ("GitHub", "Books3", "Pile-CC")


def lattice(domains, parts, least=0):
    """All proportions that are multiples of 1/parts, at least least/parts each."""
    heads = np.array(list(itertools.product(range(least, parts + 1), repeat=domains - 1)))
    points = np.column_stack([heads, parts - heads.sum(axis=1)])
    return points[points[:, -1] >= least] / parts


def planted(num_targets, domains, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(1, 3, num_targets), rng.uniform(-3, 0.5, (num_targets, domains))


@pytest.fixture(scope="module")
def three():
    table = np.array(PUBLISHED["three"]["interior"])
    return table[:, :3], table[:, 3:]


@pytest.fixture(scope="module")
def three_law(three):
    return fit_mixing_law(*three, THREE, THREE)


def test_fitter_takes_vectors():
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(12, 2)), rng.uniform(0.5, 2, 12)
    y = x @ [1.5, -2] + 0.3 + rng.normal(0, 0.1, 12)
    fitter = CurveFitter(
        lambda theta, x: theta[0] * x[..., 0] + theta[1] * x[..., 1] + theta[2],
        Unbounded("a", "b", "c"),
        point_shape=(2,),
    )
    design = np.column_stack([x, np.ones(12)])
    exact, fit = linear_fit(design, y, weights), fitter.fit(x, y, [0, 0, 0], weights)
    np.testing.assert_allclose(fit.theta_P, exact.beta_P, atol=1e-8)
    np.testing.assert_allclose(fit.covariance(), exact.covariance_PP, rtol=1e-5)
    np.testing.assert_allclose(fit.predict(x[:3])[1], exact.predict(design[:3])[1], rtol=1e-5)
    np.testing.assert_allclose(
        fit.leave_one_group_out(np.arange(12)), exact.leave_one_group_out(np.arange(12)), atol=1e-8
    )
    ys = np.stack([y, 2 * y])  # problems with points of their own, and with common ones
    plain = linear_fit(design, y).beta_P
    own = fitter.refit(np.stack([x, 2 * x[::-1]]), np.stack([y, 2 * y[::-1]]), [0, 0, 0])[0]
    np.testing.assert_allclose(own, [plain, plain * [1, 1, 2]], atol=1e-7)
    np.testing.assert_allclose(fitter.refit(x, ys, [0, 0, 0])[0][1], 2 * plain, atol=1e-7)
    with pytest.raises(ValueError, match=r"x \(12,\) must be \(12, 2\)"):
        fitter.fit(x[:, 0], y, [0, 0, 0])


@pytest.mark.parametrize("domains", [2, 4])
def test_planted_law_is_found(domains):
    floor, slope = planted(2, domains)
    mixtures = lattice(domains, 8, least=1)
    law = fit_mixing_law(mixtures, floor + np.exp(mixtures @ slope.T), "abcd"[:domains], "vw", bootstrap=20)
    np.testing.assert_allclose(law.floor_V, floor, rtol=1e-4)
    np.testing.assert_allclose(law.slope_VK, slope, atol=1e-3)
    assert (law.r_squared_V > 1 - 1e-9).all()
    assert (law.leave_one_out_V < 1e-5).all()
    assert not law.warnings
    elsewhere = np.random.default_rng(1).dirichlet(np.ones(domains), 5)
    np.testing.assert_allclose(law.predict(elsewhere), floor + np.exp(elsewhere @ slope.T), atol=1e-4)
    assert law.predict(elsewhere[0]).shape == (1, 2)


@pytest.mark.parametrize("row", PUBLISHED["two"], ids=lambda row: f"{row['size']} {row['domain']} {row['step']}")
def test_two_domains_as_published(row):
    x, y = np.array(PUBLISHED["proportions_of_two"]), np.array(row["losses"])
    # the procedure of the paper's notebook: the floor on a grid that makes ln(L − c) straightest, then a line
    floors = np.linspace(0, y.min(), 1000)[:-1]
    floor = max(floors, key=lambda c: abs(np.corrcoef(x, np.log(y - c))[0, 1]))
    line = np.polyfit(x, np.log(y - floor), 1)
    assert floor == pytest.approx(row["floor"], abs=1.5e-3)
    assert line == pytest.approx(row["slope_intercept"], abs=1.5e-2)
    assert line == pytest.approx(row["published_slope_intercept"], abs=3e-2)
    # least squares in the losses themselves
    law = fit_mixing_law(np.stack([x, 1 - x], axis=1), y[:, None], ["own", "other"], [row["domain"]], bootstrap=0)
    residual = law.predict(np.stack([x, 1 - x], axis=1))[:, 0] - y
    by_notebook = floor + np.exp(np.polyval(line, x)) - y
    assert (residual**2).sum() <= (by_notebook**2).sum()
    assert law.max_error_V[0] == pytest.approx(np.abs(residual).max())
    assert law.max_error_V[0] < 6e-3
    assert law.floor_V[0] == pytest.approx(floor, abs=0.035)


def test_three_domains_as_published(three, three_law):
    np.testing.assert_allclose(three_law.floor_V, [0.9028, 2.8985, 2.9201], atol=3e-4)
    expected = [[-3.2413, -0.5751, -0.8420], [-0.7591, -3.4421, -2.3307], [-0.6251, -0.8633, -2.8042]]
    np.testing.assert_allclose(three_law.slope_VK, expected, atol=2e-3)
    np.testing.assert_allclose(three_law.r_squared_V, [0.9976, 0.9901, 0.9956], atol=1e-4)
    np.testing.assert_allclose(three_law.max_error_V, [0.008, 0.013, 0.015], atol=5e-4)
    assert (three_law.leave_one_out_V < 0.006).all()
    assert not three_law.warnings


def test_fourteen_predict_six(three):
    mixtures, losses = three
    errors = []
    for seed in range(4):
        order = np.random.default_rng(seed).permutation(20)
        law = fit_mixing_law(mixtures[order[:14]], losses[order[:14]], THREE, THREE, bootstrap=0)
        errors.append(np.abs(law.predict(mixtures[order[14:]]) - losses[order[14:]]).mean())
    assert np.mean(errors) < 0.0064


def test_corners_break_the_law(three, three_law):
    corners = np.array(PUBLISHED["three"]["corners_github"])
    assert np.abs(three_law.predict(corners[:, :3])[:, 0] - corners[:, 3]).min() > 0.8
    mixtures = np.concatenate([three[0], corners[:, :3]])
    law = fit_mixing_law(mixtures, np.append(three[1][:, 0], corners[:, 3])[:, None], THREE, THREE[:1], bootstrap=0)
    assert law.r_squared_V[0] < 0.97
    assert law.max_error_V[0] > 0.3
    github, books = law.warnings[:2]
    assert "3 of 23 runs have less than 1/16 of 'GitHub' (3 without any)" in github
    assert "'Books3' (1 with" in books


def test_leave_one_out_is_what_it_says(three, three_law):
    mixtures, losses = three[0], three[1][:, :1]
    rest = ~np.eye(20, dtype=bool)
    laws = [fit_mixing_law(mixtures[r], losses[r], THREE, THREE[:1], bootstrap=0) for r in rest]
    errors = [abs(law.predict(m)[0, 0] - y[0]) for law, m, y in zip(laws, mixtures, losses)]
    assert np.mean(errors) == pytest.approx(three_law.leave_one_out_V[0], rel=1e-4)
    # two seeds of one mixture are left out together
    doubled = fit_mixing_law(np.tile(mixtures, (2, 1)), np.tile(losses, (2, 1)), THREE, THREE[:1], bootstrap=0)
    assert doubled.leave_one_out_V[0] == pytest.approx(three_law.leave_one_out_V[0], rel=1e-3)
    assert doubled.num_runs == 40


def test_intervals_hold_the_truth():
    floor, slope = planted(3, 3, seed=3)
    mixtures, inside = lattice(3, 8, least=1), lattice(3, 10, least=1)
    truth = floor + np.exp(inside @ slope.T)
    shares = []
    for seed in range(3):
        noise = np.random.default_rng(seed).normal(0, 0.01, (len(mixtures), 3))
        law = fit_mixing_law(
            mixtures, floor + np.exp(mixtures @ slope.T) + noise, "abc", "uvw", bootstrap=100, seed=seed
        )
        low, high = law.interval(inside)
        shares.append(((low < truth) & (truth < high)).mean())
        narrow, wide = law.interval(inside, level=0.5)
        assert (wide - narrow < high - low).all()
    assert np.mean(shares) > 0.75  # 0.93 over 16 seeds, but the points of one fit miss together
    assert (high - low).mean() < 0.04


def test_huber_ignores_a_broken_run():
    floor, slope = planted(1, 3)
    mixtures = lattice(3, 8, least=1)
    losses = floor + np.exp(mixtures @ slope.T)
    losses[5] += 1.0
    plain, robust = (fit_mixing_law(mixtures, losses, "abc", "v", huber=h, bootstrap=0) for h in (None, 0.005))
    truth = floor + np.exp(mixtures @ slope.T)
    assert np.abs(robust.predict(mixtures) - truth).max() < 0.01 < np.abs(plain.predict(mixtures) - truth).max()


# --- the best mixture ------------------------------------------------------------------------------------------------


def law_of(floor, slope, domains, targets):
    """A law without runs: only what `optimise` reads."""
    floor, slope = np.asarray(floor, float), np.asarray(slope, float)
    none, (num_targets, size) = np.zeros(len(floor)), slope.shape
    samples = np.empty((0, num_targets)), np.empty((0, num_targets, size))
    return MixingLaw(tuple(domains), tuple(targets), floor, slope, none, none, none, *samples, np.zeros(size),
                     np.ones(size), 0, ())  # fmt: skip


def test_optimum_by_hand():
    # minimise e^{−a r} + e^{−b (1 − r)}: a e^{−a r} = b e^{−b (1 − r)}, r = (ln(a / b) + b) / (a + b)
    a, b = 3.0, 2.0
    law = law_of([1, 2], [[-a, 0], [0, -b]], "xy", "vw")
    best = law.optimise()
    r = (np.log(a / b) + b) / (a + b)
    assert best.proportions == pytest.approx({"x": r, "y": 1 - r}, abs=1e-8)
    assert best.losses == pytest.approx({"v": 1 + np.exp(-a * r), "w": 2 + np.exp(-b * (1 - r))})
    assert best.total == pytest.approx(sum(best.losses.values()) / 2)
    assert best.gap < 1e-9
    assert best.at_bound == ()
    assert np.isnan(best.interval).all()
    # weights count by their ratio: w a e^{−a r} = b e^{−b (1 − r)}
    weighted = law.optimise({"v": 30, "w": 10})
    assert weighted.proportions["x"] == pytest.approx((np.log(3 * a / b) + b) / (a + b), abs=1e-8)
    assert law.optimise({"v": 1}, caps={"x": 0.7}).proportions == pytest.approx({"x": 0.7, "y": 0.3})


@pytest.mark.parametrize("seed", range(4))
def test_optimum_beats_a_fine_grid(seed):
    floor, slope = planted(3, 3, seed)
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.ones(3))
    floors, caps = dict(zip("abc", rng.uniform(0, 0.2, 3))), dict(zip("abc", rng.uniform(0.45, 0.9, 3)))
    best = law_of(floor, slope, "abc", "uvw").optimise(dict(zip("uvw", weights)), floors, caps)
    found = np.array(list(best.proportions.values()))
    grid = lattice(3, 300)
    inside = ((grid >= list(floors.values())) & (grid <= list(caps.values()))).all(axis=1)
    totals = (floor + np.exp(grid @ slope.T)) @ weights
    assert best.total <= totals[inside].min() + 1e-9
    assert best.total > totals[inside].min() - 2e-3  # and not by being outside
    assert found.sum() == pytest.approx(1, abs=1e-9)
    assert (found >= np.array(list(floors.values())) - 1e-12).all()
    assert (found <= np.array(list(caps.values())) + 1e-12).all()
    assert best.gap < 1e-7


def test_gap_bounds_what_is_lost():
    rng = np.random.default_rng(0)
    for _ in range(20):
        floor, slope = rng.uniform(1, 3, 4), rng.uniform(-6, 3, (4, 5))
        weights, low = rng.dirichlet(np.ones(4)), rng.dirichlet(np.ones(5)) * rng.choice([0.0, 0.5])
        high = np.minimum(low + rng.uniform(0.3, 0.8, 5), 1)
        exact = convex_search(floor[None], slope[None], weights, low, high)
        assert exact.gap_R[0] < 1e-7 * exact.total_R[0]
        coarse = grid_search(floor, slope, weights, low, high)
        assert -1e-9 < coarse.total_R[0] - exact.total_R[0] <= coarse.gap_R[0] + 1e-9


def test_bounds_that_leave_no_choice():
    law = law_of([1, 1], [[-3, 0, 0], [0, -2, -1]], "abc", "vw")
    fixed = law.optimise(floors={"a": 0.2, "b": 0.3, "c": 0.5})
    assert fixed.proportions == pytest.approx({"a": 0.2, "b": 0.3, "c": 0.5})
    assert fixed.at_bound == ("a", "b", "c")
    full = law.optimise(caps={"a": 0.2, "b": 0.3, "c": 0.5})
    assert full.proportions == pytest.approx({"a": 0.2, "b": 0.3, "c": 0.5})
    one = law.optimise(floors={"a": 0.4}, caps={"a": 0.4, "c": 0.0})
    assert one.proportions == pytest.approx({"a": 0.4, "b": 0.6, "c": 0.0})
    assert one.gap < 1e-9
    part = law.optimise(floors={"a": 0.4}, caps={"a": 0.4})
    assert part.proportions["a"] == 0.4
    assert part.proportions["b"] == pytest.approx(0.6)
    assert part.gap < 1e-7


def test_a_fixed_domain_still_counts():
    floor, slope = np.array([1.0, 1.0]), np.array([[-2.0, -3.0, 0.0], [1.0, 0.0, -2.0]])
    best = law_of(floor, slope, "abc", "vw").optimise(floors={"a": 0.4}, caps={"a": 0.4})
    b = np.linspace(0, 0.6, 6001)
    totals = np.exp(np.stack([np.full_like(b, 0.4), b, 0.6 - b], axis=1) @ slope.T).sum(axis=1)
    assert 0 < b[totals.argmin()] < 0.6
    assert best.proportions["b"] == pytest.approx(b[totals.argmin()], abs=1e-4)
    assert best.gap < 1e-7


def test_grid_as_in_the_papers_code():
    floor, slope = planted(2, 3, seed=2)
    law, caps = law_of(floor, slope, "abc", "vw"), {"a": 0.6, "b": 0.3, "c": 0.9}
    # caps rounded down to sixteenths and halved down to 1/16, or nothing; the last takes what is left
    a, b = [9 / 16, 9 / 32, 9 / 64, 9 / 128, 0], [1 / 4, 1 / 8, 1 / 16, 0]
    points = np.array([(x, y, 1 - x - y) for x in a for y in b if 0 <= 1 - x - y <= 0.9])
    totals = (floor + np.exp(points @ slope.T)).mean(axis=1)
    found = law.optimise(caps=caps, search="grid")
    assert found.total == pytest.approx(totals.min())
    assert list(found.proportions.values()) == pytest.approx(points[totals.argmin()])
    assert found.total >= law.optimise(caps=caps).total
    with pytest.raises(ValueError, match=r"more than 2000000: use the convex search"):
        grid_search(np.ones(1), np.ones((1, 12)), np.ones(1), np.zeros(12), np.ones(12))
    with pytest.raises(ValueError, match="none of the 25 grid points keeps the bounds of the last domain"):
        law.optimise(floors={"c": 0.03}, caps={"a": 0.98, "b": 0.98, "c": 0.04}, search="grid")
    with pytest.raises(ValueError, match="search='random'"):
        law.optimise(search="random")


def test_optimum_of_published_losses(three_law):
    best = three_law.optimise(floors=dict.fromkeys(THREE, 0.125))
    low, high = best.interval
    assert low < best.total < high
    assert high - low < 0.02
    for domain, (low, high) in best.proportion_intervals.items():
        assert low - 1e-9 <= best.proportions[domain] <= high + 1e-9
    assert best.at_bound == ("Books3",)
    assert best.warnings == ()
    free = three_law.optimise()
    assert free.total < best.total
    assert any("the optimum has 0 of 'Books3', the runs had at least 0.125" in text for text in free.warnings)
    far = three_law.optimise({"GitHub": 1}, caps={"GitHub": 0.8}, floors={"Pile-CC": 0.07, "Books3": 0.07})
    assert any("outside the runs' 0.125 … 0.75" in text for text in far.warnings)


# --- input and files -------------------------------------------------------------------------------------------------


def test_json(three_law):
    again = MixingLaw.from_json(three_law.to_json())
    assert again.optimise() == three_law.optimise()
    np.testing.assert_array_equal(again.interval([0.2, 0.3, 0.5]), three_law.interval([0.2, 0.3, 0.5]))
    assert again.to_json() == three_law.to_json()
    bare = fit_mixing_law(*(a[:8] for a in (lattice(3, 8, 1), lattice(3, 8, 1))), "abc", "abc", bootstrap=0)
    assert MixingLaw.from_json(bare.to_json()).slope_samples_RVK.shape == (0, 3, 3)
    for text in ("nothing", "[]", "{}", three_law.to_json().replace('"Books3",', "", 1)):
        with pytest.raises(ValueError, match="no mixing law"):
            MixingLaw.from_json(text)


def test_too_little_to_fit(three):
    mixtures, losses = three
    with pytest.raises(ValueError, match=r"5 different mixtures of 3 domains are too few.*give 6 mixtures"):
        fit_mixing_law(np.tile(mixtures[:5], (2, 1)), np.tile(losses[:5], (2, 1)), THREE, THREE)
    fit_mixing_law(mixtures[:6], losses[:6], THREE, THREE, bootstrap=0)
    share = np.linspace(0.1, 0.7, 8)
    with pytest.raises(ValueError, match="some proportions move together"):
        fit_mixing_law(np.stack([share, 0.3 * (1 - share), 0.7 * (1 - share)], axis=1), losses[:8], THREE, THREE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, v: (m[:, :2], v), "must have 3 columns"),
        (lambda m, v: (m * 1.01, v), "row 0 must not be negative and sum to 1"),
        (lambda m, v: (m + np.array([0.2, -0.2, 0]), v), "row 0 must not be negative"),
        (lambda m, v: (m, v[:, :2]), r"losses \(20, 2\) must be \(20, 3\)"),
        (lambda m, v: (m, np.where(v > 3.3, np.nan, v)), "positive and finite"),
        (lambda m, v: (m, v - 2), "positive and finite"),
    ],
)
def test_bad_runs(three, change, message):
    with pytest.raises(ValueError, match=message):
        fit_mixing_law(*change(*three), THREE, THREE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": {"code": 1}}, "weights names 'code'"),
        ({"weights": {"GitHub": -1}}, "must be finite and not negative"),
        ({"weights": {"GitHub": 0}}, "all zero"),
        ({"floors": {"GitHub": 0.6, "Books3": 0.6}}, "floors sum to 1.2"),
        ({"caps": dict.fromkeys(THREE, 0.3)}, "caps sum to 0.9"),
        ({"caps": {"code": 0.3}}, "caps names 'code'"),
        ({"floors": {"GitHub": -0.1}}, "must lie between 0 and 1"),
        ({"floors": {"GitHub": 0.5}, "caps": {"GitHub": 0.4}}, "floor 0.5 of 'GitHub' is above its cap 0.4"),
    ],
)
def test_bad_bounds(three_law, options, message):
    with pytest.raises(ValueError, match=message):
        three_law.optimise(**options)


def test_names_and_collapsing_floors():
    mixtures = lattice(2, 8, least=1)
    with pytest.raises(ValueError, match="domains must be different names"):
        fit_mixing_law(mixtures, mixtures, "aa", "vw")
    straight = 3 + 0.5 * (1 - (mixtures[:, :1] - 0.3) ** 2)  # concave: no exponential with a positive floor
    law = fit_mixing_law(mixtures, straight, "ab", ["v"], bootstrap=0)
    assert any("floor of 'v' goes to zero" in text for text in law.warnings)
    assert any("the law of 'v' has R² 0.77" in text for text in law.warnings)


def test_caps_of_tokens():
    caps = caps_of_tokens({"web": 8e9, "code": 1e9}, total_tokens=4e9, epochs=2)
    assert caps == {"web": 1.0, "code": 0.5}
    low, high = bounds(("web", "code"), None, caps)
    assert low.tolist() == [0, 0]
    assert high.tolist() == [1, 0.5]
    with pytest.raises(
        ValueError, match="2 epochs of the available 3e\\+09 tokens are fewer than total_tokens=7e\\+09"
    ):
        caps_of_tokens({"web": 2e9, "code": 1e9}, 7e9, epochs=2)
    with pytest.raises(ValueError, match="must be positive"):
        caps_of_tokens({"web": 2e9}, 0)
    with pytest.raises(ValueError, match="'web' must not be negative"):
        caps_of_tokens({"web": -1.0}, 1e9)

"""The annealing law: double sums, planted laws, and schedules whose optimum is known by hand."""

from dataclasses import replace

import numpy as np
import pytest

from lit_interns1.laws import AnnealingCurve, AnnealingLaw, annealing_sums, fit_annealing_law, plan_wsd
from lit_interns1.laws.annealing_plan import final_sums
from lit_interns1.optim import WarmupStableDecay

TOKENS_PER_STEP = 1000.0
PLANTED = AnnealingLaw(2.0, 3.0, 0.5, 0.4, 0.995, np.empty((0, 4)), 0.0, 4.0, (1e-3, 1e-3), ())


def family(steps, warmup_steps=100):
    """Schedules as `plan_wsd` asks for."""
    total = steps * TOKENS_PER_STEP

    def schedule(decay_share, shape, floor):
        return WarmupStableDecay(total, warmup_steps * TOKENS_PER_STEP, decay_share * total, shape, floor)

    return schedule


def rates_of(factor, steps, peak=1.0):
    return peak * np.array([factor(i * TOKENS_PER_STEP) for i in range(steps)])


def brute_force(rates, momentum, warmup):
    falls = [0.0] + [rates[i - 1] - rates[i] if i >= warmup else 0.0 for i in range(1, len(rates))]
    return [sum(falls[k] * momentum ** (i - k) for i in range(t + 1) for k in range(i + 1)) for t in range(len(rates))]


def curve(factor, steps, peak, law=PLANTED, noise=0.0, seed=0, every=50):
    rates = rates_of(factor, steps, peak)
    measured = np.arange(every, steps + 1, every)
    losses = law.predict(rates)[measured - 1] * np.exp(np.random.default_rng(seed).normal(0, noise, measured.size))
    return AnnealingCurve(rates, measured, losses)


@pytest.fixture(scope="module")
def curves():
    plan = ((4000, 0.2, "linear", 1e-3), (4000, 0.0, "linear", 1e-3), (3000, 0.5, "cosine", 5e-4),
            (2000, 0.1, "one_minus_sqrt", 1e-3))  # fmt: skip
    return [
        curve(family(steps)(share, shape, 0.0), steps, peak, noise=3e-4, seed=i, every=100)
        for i, (steps, share, shape, peak) in enumerate(plan)
    ]


@pytest.fixture(scope="module")
def law(curves):
    return fit_annealing_law(curves)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.999])
def test_sums_are_the_double_sum(momentum):
    # warm-up of 20 steps, constant, a fall, a jump, and a rise later on, which counts against
    rates = np.concatenate([np.linspace(0.1, 1, 20), np.ones(30), np.linspace(1, 0.3, 40), [0.1, 0.1, 0.5, 0.4]])
    s_1, s_2 = annealing_sums(rates, momentum)
    np.testing.assert_allclose(s_1, [rates[: t + 1].sum() for t in range(rates.size)])
    np.testing.assert_allclose(s_2, brute_force(rates, momentum, 20), atol=1e-10)
    assert (s_2[:50] == 0).all()


def test_sums_of_simple_schedules():
    rising = annealing_sums([0.1, 0.2, 0.3], 0.9)
    assert rising[1].tolist() == [0, 0, 0]
    s_1, s_2 = annealing_sums([1.0, 1.0, 0.0, 0.0, 0.0], 0.5)  # one fall of 1: 1, 1 + ½, 1 + ½ + ¼
    assert s_1.tolist() == [1, 2, 2, 2, 2]
    assert s_2.tolist() == [0, 0, 1, 1.5, 1.75]
    long = annealing_sums(np.concatenate([np.ones(10), np.zeros(100_000)]), 0.999)[1]
    assert long[-1] == pytest.approx(1000, rel=1e-9)  # 1 / (1 − λ)
    for rates, momentum in (([], 0.9), ([1, -1], 0.9), ([1, np.nan], 0.9), ([1.0], 1.0), ([1.0], -0.1)):
        with pytest.raises(ValueError, match=r"^(rates|momentum)"):
            annealing_sums(rates, momentum)


@pytest.mark.parametrize(
    ("share", "shape"), [(0.0, "linear"), (0.03, "one_minus_sqrt"), (0.3, "cosine"), (0.9, "square")]
)
def test_final_sums(share, shape):
    factor = family(6000)(share, shape, 0.1)
    exact = [sums[-1] for sums in annealing_sums(rates_of(factor, 6000), 0.995)]
    np.testing.assert_allclose(final_sums(factor, 6000, TOKENS_PER_STEP, 0.995, 6000), exact, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(final_sums(factor, 6000, TOKENS_PER_STEP, 0.995, 1000), exact, rtol=1e-3)


def test_planted_law_is_found(curves, law):
    assert law.momentum == pytest.approx(0.995, abs=1.5e-3)
    assert (law.irreducible, law.amplitude) == pytest.approx((2, 3), rel=0.02)
    assert law.exponent == pytest.approx(0.5, abs=0.02)
    # C and λ go together: a fall is worth C / (1 − λ) in the end
    assert law.annealing / (1 - law.momentum) == pytest.approx(0.4 / 0.005, rel=0.05)
    assert law.residual_std == pytest.approx(3e-4, rel=0.2)
    factor = family(6000)(0.3, "square", 0.05)  # no such schedule was fitted
    rates = rates_of(factor, 6000, 8e-4)
    assert law.predict(rates)[-1] == pytest.approx(PLANTED.predict(rates)[-1], abs=5e-3)
    known = fit_annealing_law(curves, momentum=0.995)
    assert known.annealing == pytest.approx(0.4, rel=0.03)
    assert known.momentum == 0.995
    low, high = np.percentile(known.samples_R4, [1, 99], axis=0)
    truth = np.array([2, 3, 0.5, 0.4])
    assert (low < truth).all()
    assert (truth < high).all()


def test_noiseless_law_is_found_exactly():
    exact = [curve(family(2000)(s, "linear", 0.0), 2000, p) for s, p in ((0.3, 1e-3), (0.0, 1e-3), (0.2, 3e-4))]
    law = fit_annealing_law(exact, bootstrap=0)
    assert law.momentum == pytest.approx(0.995, abs=1e-5)
    found = (law.irreducible, law.amplitude, law.exponent, law.annealing)
    assert found == pytest.approx((2, 3, 0.5, 0.4), rel=2e-3)
    assert law.largest_sum == pytest.approx(2000e-3 - 50e-3, rel=1e-2)
    assert law.peak_range == (3e-4, 1e-3)


def test_losses_of_the_warmup_are_left_out(curves):
    first = curves[0]
    steps, losses = np.append(first.steps_N, [10, 50, 100]), np.append(first.losses_N, [9.0, 8.0, 7.0])
    with_start = [AnnealingCurve(first.rates_T, steps, losses), *curves[1:]]
    same = fit_annealing_law(with_start, momentum=0.995, bootstrap=0)
    assert same.irreducible == fit_annealing_law(curves, momentum=0.995, bootstrap=0).irreducible


def test_curve_of_a_schedule():
    made = AnnealingCurve.of_schedule(
        lambda tokens: 1 - tokens / 5000, 2.0, 1000.0, [1000.0, 3000.0, 5000.0], [3, 2, 1]
    )
    np.testing.assert_allclose(made.rates_T, [2, 1.6, 1.2, 0.8, 0.4])  # a step has the factor of the tokens before it
    assert made.steps_N.tolist() == [1, 3, 5]


def test_plan_by_hand():
    # linear decay to zero over n steps, α = 1, λⁿ ≈ 0, no warm-up:  S_1 = η (T − n/2),  S_2 = η (1 − h/n) / (1 − λ),
    # h = λ / (1 − λ);  dL/dn = A / (2 η (T − n/2)²) − C η h / ((1 − λ) n²) = 0  →  n = q (T − n/2)
    steps, peak, momentum = 20_000, 0.5, 0.99
    law = AnnealingLaw(2.0, 400.0, 1.0, 1e-4, momentum, np.empty((0, 4)), 0.0, 1e9, (peak, peak), ())
    h = momentum / (1 - momentum)
    q = peak * np.sqrt(2 * law.annealing * h / ((1 - momentum) * law.amplitude))
    plan = plan_wsd(law, steps * 1000.0, 1000.0, peak, family(steps, 0), shapes=("linear",), floors=(0.0,))
    assert plan.decay_share == pytest.approx(q / (1 + q / 2), abs=1.5e-3)
    assert 0.02 < plan.decay_share < 0.5
    assert plan.decay_start == pytest.approx((1 - plan.decay_share) * steps * 1000)
    rates = rates_of(family(steps, 0)(plan.decay_share, "linear", 0.0), steps, peak)
    assert plan.loss == pytest.approx(law.predict(rates)[-1], rel=1e-5)
    assert plan.warnings == ()
    assert plan.peak == peak


def test_plan_takes_the_best_of_all(law):
    law = replace(law, annealing=3 * law.annealing, samples_R4=law.samples_R4 * [1, 1, 1, 3])
    steps, peak = 1500, 1e-3
    shapes, floors = ("linear", "square", "cosine"), (0.2, 0.0)
    plan = plan_wsd(law, steps * 1000.0, 1000.0, peak, family(steps), shapes, floors, num_shares=10)
    tried = {
        (shape, floor, share): law.predict(rates_of(family(steps)(share, shape, floor), steps, peak))[-1]
        for shape in shapes
        for floor in floors
        for share in np.linspace(0, 0.9, 10)
    }
    best = min(tried, key=tried.__getitem__)
    assert best[0] != shapes[0]
    assert best[1] != floors[0]
    assert 0 < best[2] < 0.9
    assert (plan.shape, plan.floor) == best[:2]
    assert plan.loss <= tried[best] + 1e-9
    assert abs(plan.decay_share - best[2]) <= 0.1 + 1e-9
    for share, loss in zip(plan.shares_G, plan.losses_G):
        assert loss == pytest.approx(tried[plan.shape, plan.floor, share], rel=1e-6)
    for share in (0, 0.05, 0.1, 0.2, 0.5):
        rates = rates_of(family(steps)(share, plan.shape, plan.floor), steps, peak)
        assert plan.cost[share] == pytest.approx(law.predict(rates)[-1] - plan.loss, abs=1e-6)
        assert plan.cost[share] >= -1e-9
    low, high = plan.interval
    assert low < plan.loss < high
    assert high - low < 0.05
    assert plan.share_interval[0] <= plan.decay_share <= plan.share_interval[1]
    lower = plan_wsd(law, steps * 1000.0, 1000.0, peak / 2, family(steps), shapes, floors, num_shares=10)
    assert lower.loss > plan.loss  # the law knows no rate that is too high


def test_plan_says_what_to_doubt(law):
    steps = 12_000
    plan = plan_wsd(law, steps * 1000.0, 1000.0, 2e-3, family(steps), max_share=0.02, num_shares=3)
    text = "\n".join(plan.warnings)
    s_1 = rates_of(family(steps)(0.02, plan.shape, plan.floor), steps, 2e-3).sum()
    assert f"the sum of rates is {s_1 / law.largest_sum:.3g} times the largest" in text
    assert "the peak 0.002 is outside the peaks of the curves, 0.0005 … 0.001" in text
    assert "the best decay share is the largest that was tried, 0.02" in text
    with pytest.raises(ValueError, match="not two steps"):
        plan_wsd(law, 1000.0, 1000.0, 1e-3, family(steps))
    with pytest.raises(ValueError, match="peak_max=0"):
        plan_wsd(law, 1e6, 1000.0, 0, family(steps))
    with pytest.raises(ValueError, match="must leave a choice"):
        plan_wsd(law, 1e6, 1000.0, 1e-3, family(steps), shapes=())


def test_what_no_law_can_be_fitted_to(curves):
    flat = curve(family(2000)(0.0, "linear", 0.0), 2000, 1e-3)
    with pytest.raises(ValueError, match="no curve has a falling rate"):
        fit_annealing_law([flat])
    with pytest.raises(ValueError, match="0 losses after the warm-up are too few"):
        fit_annealing_law([])
    with pytest.raises(ValueError, match=r"steps 1 … 9 must lie in 1 … 5"):
        AnnealingCurve(np.ones(5), [1, 9], [3.0, 2.0])
    with pytest.raises(ValueError, match="vectors of a length"):
        AnnealingCurve(np.ones(5), [1, 2, 3], [3.0, 2.0])
    with pytest.raises(ValueError, match="positive and finite"):
        AnnealingCurve(np.ones(5), [1, 2], [3.0, np.inf])


def test_momentum_that_the_curves_do_not_fix():
    # λ = 0.5 is below what is searched
    planted = AnnealingLaw(2.0, 3.0, 0.5, 40.0, 0.5, np.empty((0, 4)), 0.0, 4.0, (1e-3, 1e-3), ())
    made = [curve(family(1000)(share, "linear", 0.0), 1000, 1e-3, planted) for share in (0.0, 0.5)]
    law = fit_annealing_law(made, bootstrap=0)
    assert "the best λ is 0.9, an end of the search" in law.warnings[0]


def test_json(law):
    again = AnnealingLaw.from_json(law.to_json())
    np.testing.assert_array_equal(again.samples_R4, law.samples_R4)
    assert again.to_json() == law.to_json()
    assert again.predict([1e-3] * 5)[-1] == law.predict([1e-3] * 5)[-1]
    for text in ("nothing", "[]", "{}"):
        with pytest.raises(ValueError, match="no annealing law"):
            AnnealingLaw.from_json(text)

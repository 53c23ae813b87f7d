"""Advantages by loops, enumeration and textbook recursions; selections by sorting; corrections by hand."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_interns1.objectives import policy
from lit_interns1.objectives.policy.covariance import clip_cov_mask, top_k_mask

NAN = math.nan
GROUPS = torch.tensor([7, 3, 7, 3, 3, 9, 5, 5, 7, 5])
REWARDS = torch.tensor([1.0, 0.5, 0.0, 0.5, 0.5, 2.0, 1.0, NAN, -0.5, 3.0])
LENGTHS = torch.tensor([4, 1, 3, 9, 2, 5, 6, 8, 1, 2])


def members(i):
    return [j for j in range(10) if GROUPS[j] == GROUPS[i] and not math.isnan(REWARDS[j])]


def expected(name, i):
    if math.isnan(REWARDS[i]):
        return 0.0
    group, r = members(i), REWARDS.double()
    mean = sum(r[j] for j in group) / len(group)
    if name == "loo":
        others = [j for j in group if j != i]
        return r[i] - (sum(r[j] for j in others) / len(others) if others else 0.0)
    if len(group) == 1:
        return 0.0
    if name == "opo":
        return r[i] - sum(r[j] * LENGTHS[j] for j in group) / sum(LENGTHS[j] for j in group)
    if name == "none":
        return r[i] - mean
    over = group if name.startswith("group") else [j for j in range(10) if not math.isnan(REWARDS[j])]
    centre = sum(r[j] for j in over) / len(over)
    free = len(over) - (0 if name.endswith("biased") else 1)
    return (r[i] - mean) / (math.sqrt(sum((r[j] - centre) ** 2 for j in over) / free) + 1e-4)


@pytest.mark.parametrize(
    ("name", "estimator"),
    [
        ("group", policy.GroupNormalized()), ("group biased", policy.GroupNormalized(unbiased=False)),
        ("batch", policy.GroupNormalized("batch")), ("none", policy.GroupNormalized("none")),
        ("loo", policy.LeaveOneOut()), ("opo", policy.LengthWeightedBaseline()),
    ],
)  # fmt: skip
def test_group_advantages(name, estimator) -> None:
    result = estimator(REWARDS, GROUPS, lengths=LENGTHS)
    torch.testing.assert_close(result.advantages, torch.tensor([expected(name, i) for i in range(10)]).float())
    assert result.advantages.dtype == torch.float32
    assert result.zero_variance.tolist() == [False, True, False, True, True, True, False, False, False, False]
    assert result.advantages[1].item() == 0.0  # exactly
    assert result.valid.tolist() == [i != 7 for i in range(10)]
    assert result.metrics["zero_variance"].mean == pytest.approx(4 / 9)
    assert result.metrics["failed"].mean == pytest.approx(0.1)
    assert result.metrics["reward"].mean == pytest.approx(sum(r for r in REWARDS.tolist() if r == r) / 9)
    masked = estimator(torch.nan_to_num(REWARDS, nan=50.0), GROUPS, lengths=LENGTHS, valid=~REWARDS.isnan())
    assert torch.equal(masked.advantages, result.advantages)


def test_equal_rewards_give_exactly_nothing() -> None:
    rewards = torch.full((3,), 0.1)
    for estimator in (policy.GroupNormalized(std_epsilon=0.0), policy.LeaveOneOut(), policy.LengthWeightedBaseline()):
        assert estimator(rewards, torch.zeros(3), lengths=torch.tensor([1, 2, 4])).advantages.tolist() == [0.0] * 3


@pytest.mark.parametrize(("n", "k"), [(4, 1), (5, 2), (6, 4), (4, 4)])
def test_pass_at_k_by_enumeration(n: int, k: int) -> None:
    for right in range(n + 1):
        rewards = torch.tensor([1.0] * right + [-1.0] * (n - right))
        sets = list(itertools.combinations(range(n), k))
        score = {s: float(any(rewards[j] > 0 for j in s)) for s in sets}
        rho = sum(score.values()) / len(sets)
        result = policy.PassAtK(k)(rewards, torch.zeros(n)).advantages
        for i in range(n):
            mine = [score[s] for s in sets if i in s]
            spread = math.sqrt(rho * (1 - rho))
            wanted = (sum(mine) / len(mine) - rho) / spread if spread > 0 else 0.0
            assert result[i].item() == pytest.approx(wanted, abs=1e-6)
    with pytest.raises(ValueError, match="k = 5 of PassAtK must not exceed the group size, but a group has 4"):
        policy.PassAtK(5)(torch.tensor([1.0, 0, 0, 0]), torch.zeros(4))


def test_bad_groups_are_named() -> None:
    with pytest.raises(ValueError, match=r"must be vectors of one length, got \[\(3,\), \(2,\)\]"):
        policy.LeaveOneOut()(torch.zeros(3), torch.zeros(2))
    with pytest.raises(ValueError, match="needs lengths"):
        policy.LengthWeightedBaseline()(torch.zeros(3), torch.zeros(3))


def test_soft_overlong_penalty() -> None:
    lengths = torch.tensor([10, 80, 85, 90, 100, 101, 500])
    assert policy.soft_overlong_penalty(lengths, 100, 20).tolist() == pytest.approx([0, 0, -0.25, -0.5, -1, -1, -1])
    assert policy.soft_overlong_penalty(lengths, 100, 0).tolist() == [0, 0, 0, 0, 0, -1, -1]
    with pytest.raises(ValueError, match="soft_punish_cache = 200 must be finite and at least 0 and at most 100"):
        policy.soft_overlong_penalty(lengths, 100, 200)


def example() -> policy.PolicyInputs:
    mask = torch.tensor([0, 1, 1, 0, 1, 0, 1, 0, 1, 1, 0]).bool()
    ids = torch.tensor([4, 4, 4, 4, 4, 4, 2, -1, 0, 0, 0])  # one response of three tokens around a gap, one of one
    rewards = torch.tensor([2.0] * 6 + [-1.0] + [0.0] + [0.5] * 3)
    generator = torch.Generator().manual_seed(1)
    others = {n: torch.randn(11, generator=generator) for n in ("values", "old_logprobs", "ref_logprobs")}
    return policy.PolicyInputs(mask, ids, rewards=rewards, **others)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("lam", [1.0, 0.7, 0.0])
def test_gae_is_the_sum_of_deltas(gamma: float, lam: float) -> None:
    inputs = example()
    result = policy.GeneralizedAdvantages(gamma, lam, beta=0.3, whiten=False)(inputs)
    for places in ([1, 2, 4], [6], [8, 9]):
        v = [inputs.values[t].item() for t in places] + [0.0]
        r = [-0.3 * (inputs.old_logprobs[t] - inputs.ref_logprobs[t]).item() for t in places]
        r[-1] += inputs.rewards[places[0]].item()
        delta = [r[i] + gamma * v[i + 1] - v[i] for i in range(len(places))]
        for i, t in enumerate(places):
            wanted = sum((gamma * lam) ** (j - i) * delta[j] for j in range(i, len(places)))
            assert result.advantages[t].item() == pytest.approx(wanted, abs=1e-5)
            assert result.returns[t].item() == pytest.approx(wanted + v[i], abs=1e-5)
    assert not result.advantages[~inputs.response_mask].any()
    whitened = policy.GeneralizedAdvantages(gamma, lam, beta=0.3)(inputs).advantages[inputs.response_mask]
    assert whitened.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert whitened.std().item() == pytest.approx(1.0, abs=1e-4)


def test_without_a_critic_gae_gives_returns() -> None:
    inputs = replace(example(), values=None)
    returns = policy.DiscountedReturns(0.9)(inputs)
    result = policy.GeneralizedAdvantages(0.9, 1.0)(inputs)
    torch.testing.assert_close(result.returns, returns.returns)
    torch.testing.assert_close(result.advantages, returns.advantages)
    assert returns.returns[[1, 2, 4, 6]].tolist() == pytest.approx([2 * 0.81, 2 * 0.9, 2.0, -1.0])
    with pytest.raises(ValueError, match="requires"):
        policy.DiscountedReturns(beta=0.1)(replace(inputs, ref_logprobs=None))


def test_whitening_one_token_or_equal_ones_gives_zeros() -> None:
    value = torch.tensor([3.0, 3.0, 9.0])
    for mask in ([True, False, False], [True, True, False], [False, False, False]):
        assert policy.whiten(value, torch.tensor(mask)).tolist() == [0.0] * 3


def test_sequence_kl() -> None:
    inputs = example()
    result, difference = policy.sequence_kl(inputs), inputs.old_logprobs - inputs.ref_logprobs
    assert result[1].item() == result[4].item() == pytest.approx(difference[[1, 2, 4]].sum().item(), abs=1e-6)
    assert result[0].item() == 0.0


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from([-3.5, -1e-30, -0.0, 0.0, 1e-30, 0.25, 0.5, 7e20]), max_size=40),
    st.integers(0, 45),
    st.data(),
)
def test_top_k_equals_sorting(values, k: int, data) -> None:
    candidate = data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    wanted = sorted((t for t in range(len(values)) if candidate[t]), key=lambda t: (-values[t], t))[:k]
    result = top_k_mask(torch.tensor(values), torch.tensor(candidate, dtype=torch.bool), k)
    assert result.nonzero().squeeze(1).tolist() == sorted(wanted)


def test_clip_cov_takes_a_random_share_between_the_bounds() -> None:
    generator = torch.Generator().manual_seed(0)
    size = 4000
    inputs = policy.PolicyInputs(
        torch.ones(size).bool(), torch.arange(size) // 50, old_logprobs=-torch.rand(size, generator=generator) * 4,
        advantages=torch.randn(size, generator=generator),
    )  # fmt: skip
    logp, a = inputs.old_logprobs, inputs.advantages
    covariance = (logp - logp.mean()) * (a - a.mean())
    candidate = (covariance > 0.5) & (covariance < 2.0)
    masks = [clip_cov_mask(inputs, 0.02, 0.5, 2.0, seed) for seed in range(40)]
    assert all(int(mask.sum()) == 80 and not bool((mask & ~candidate).any()) for mask in masks)
    assert torch.equal(masks[0], clip_cov_mask(inputs, 0.02, 0.5, 2.0, 0))
    # each candidate is chosen 80·40/n times in the mean, with the variance of independent draws
    times = torch.stack(masks).float().sum(0)[candidate]
    p = 80 / int(candidate.sum())
    assert times.var().item() == pytest.approx(40 * p * (1 - p), rel=0.2)
    assert int(clip_cov_mask(inputs, 1.0, 0.5, 2.0).sum()) == int(candidate.sum())
    assert not clip_cov_mask(inputs, 1.0, 50.0, 60.0).any()


def test_rollout_correction_by_hand() -> None:
    rho = torch.tensor([1.0, 4.0, 0.25, 3.0, 1.5])
    old = torch.full((5,), -2.0)
    inputs = policy.PolicyInputs(
        torch.ones(5).bool(), torch.tensor([0, 0, 0, 1, 1]), old_logprobs=old, rollout_logprobs=old - rho.log()
    )

    def weights(*arguments, **options):
        return policy.RolloutCorrection(*arguments, **options)(inputs)[0].rollout_is_weights.tolist()

    assert weights() == pytest.approx([1, 2, 0.25, 2, 1.5])
    assert weights(low=0.5) == pytest.approx([1, 2, 0.5, 2, 1.5])
    assert weights(mode="mask", low=0.5, high=5.0) == pytest.approx([1, 4, 0, 3, 1.5])
    assert weights("sequence", high=4.0) == pytest.approx([1, 1, 1, 4, 4])
    assert weights("geometric", "mask", high=2.0) == pytest.approx([1, 1, 1, 0, 0])
    vetoed, metrics = policy.RolloutCorrection(veto_low=0.5)(inputs)
    assert vetoed.response_mask.tolist() == [False] * 3 + [True] * 2
    assert metrics["rollout_is/rejected"].mean == pytest.approx(0.6)
    assert metrics["mismatch/ratio"].mean == pytest.approx(rho.mean().item())
    assert metrics["mismatch/k1"].mean == pytest.approx(-rho.log().mean().item())
    assert metrics["mismatch/k3"].mean == pytest.approx((rho - rho.log() - 1).mean().item())
    assert metrics["mismatch/extreme"].mean == pytest.approx(3 / 5)  # 4, ¼ and 3 are beyond τ = 2
    assert policy.mismatch_metrics(inputs, 3.5)["mismatch/extreme"].mean == pytest.approx(2 / 5)
    _, metrics = policy.RolloutCorrection(mode="mask", low=0.5, high=3.5)(inputs)
    assert metrics["rollout_is/masked"].mean == pytest.approx(2 / 5)
    unknown = inputs.changed(rollout_logprobs=torch.where(rho > 3.5, NAN, inputs.rollout_logprobs))
    assert policy.RolloutCorrection()(unknown)[0].rollout_is_weights.tolist() == pytest.approx([1, 1, 0.25, 2, 1.5])


def test_rejected_tokens_leave_the_denominators_and_masked_ones_do_not() -> None:
    old = torch.full((4,), -2.0)
    rho = torch.tensor([1.0, 4.0, 1.0, 1.0])
    inputs = policy.PolicyInputs(
        torch.ones(4).bool(), torch.tensor([0, 0, 0, 0]), advantages=torch.ones(4), old_logprobs=old,
        rollout_logprobs=old - rho.log(),
    )  # fmt: skip
    masked, _ = policy.RolloutCorrection(mode="mask", high=2.0)(inputs)
    rejected, _ = policy.RolloutCorrection(mode="none", reject_level="token", reject_high=2.0)(inputs)
    objective = policy.GRPO()
    assert objective.prepare(masked).weights["policy"].tolist() == [1.0, 0, 1, 1]
    assert int(masked.response_mask.sum()) == 4
    assert objective.prepare(rejected).weights["policy"].tolist() == [1.0, 0, 1, 1]
    assert int(rejected.response_mask.sum()) == 3


def test_one_pair_per_group() -> None:
    rewards = torch.tensor([1.0, -1, 1, -1, 1, 1, -1, -1, NAN, 1, NAN, -1])
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 0, 3])
    counts = torch.zeros(12)
    for seed in range(200):
        chosen = policy.one_pair_per_group(rewards, groups, generator=torch.Generator().manual_seed(seed))
        assert int(chosen.sum()) == 4
        for group in (0, 3):
            assert sorted(rewards[chosen & (groups == group)].tolist()) == [-1.0, 1.0]
        counts += chosen
    assert counts[[4, 5, 6, 7, 8, 10]].tolist() == [0.0] * 6
    assert all(70 < n < 130 for n in counts[:4].tolist())
    assert counts[[9, 11]].tolist() == [200.0, 200.0]

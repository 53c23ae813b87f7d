"""A rollout batch from rewards to prepared steps, against plain loops over lists."""

import math
import statistics

import pytest
import torch

from lit_interns1.objectives.policy import (
    DAPO,
    GRPO,
    OREAL,
    DiscountedReturns,
    GroupNormalized,
    LeaveOneOut,
    PolicyInputs,
    RolloutCorrection,
    RolloutSettings,
    TokenRewardLoss,
    prepare_updates,
)

LENGTHS = [[3, 1, 4, 2], [5, 2, 1, 3]]  # response tokens: two steps of two groups of two samples
REWARDS = [[1.0, -1.0, -1.0, -1.0], [1.0, 1.0, -1.0, 1.0]]
GROUPS = [[0, 0, 1, 1], [2, 2, 3, 3]]


def step(update, failed=(), seed=0):
    """Inputs of one step: each sample has a prompt token in front; one padding token at the end."""
    generator = torch.Generator().manual_seed(seed + update)
    columns = {name: [] for name in ("response_mask", "rewards", "ids", "groups")}
    for place, length in enumerate(LENGTHS[update]):
        slot = 4 * update + place
        columns["response_mask"] += [False] + [slot not in failed] * length
        columns["rewards"] += [REWARDS[update][place]] * (length + 1)
        columns["ids"] += [slot] * (length + 1)
        columns["groups"] += [GROUPS[update][place]] * (length + 1)
    for name, value in (("response_mask", False), ("rewards", 0.0), ("ids", -1), ("groups", -1)):
        columns[name].append(value)
    count = len(columns["ids"])
    old = -torch.rand(count, generator=generator) - 0.1
    inputs = PolicyInputs(
        response_mask=torch.tensor(columns["response_mask"]), sample_ids=torch.tensor(columns["ids"]),
        rewards=torch.tensor(columns["rewards"]), old_logprobs=old,
        rollout_logprobs=old + 0.3 * torch.randn(count, generator=generator),
        ref_logprobs=old + 0.2 * torch.randn(count, generator=generator),
        token_rewards=torch.randn(count, generator=generator),
    )  # fmt: skip
    return inputs, torch.tensor(columns["groups"])


def batch(failed=()):
    inputs, groups = zip(*(step(u, failed) for u in (0, 1)), strict=True)
    return list(inputs), list(groups)


def of_sample(inputs, slot, name):
    chosen = inputs.response_mask & (inputs.sample_ids == slot)
    return getattr(inputs, name)[chosen]


def test_advantages_of_groups_are_those_of_lists():
    inputs, groups = batch()
    steps, metrics = prepare_updates(inputs, groups, [GRPO()], RolloutSettings(GroupNormalized()))
    for update in (0, 1):
        for place in range(4):
            mates = [r for r, g in zip(REWARDS[update], GROUPS[update], strict=True) if g == GROUPS[update][place]]
            spread = statistics.stdev(mates)
            want = (REWARDS[update][place] - statistics.mean(mates)) / (spread + 1e-4) if spread else 0.0
            values = of_sample(steps[update], 4 * update + place, "advantages")
            assert len(values) == LENGTHS[update][place]
            torch.testing.assert_close(values, torch.full_like(values, want))
    assert metrics["reward"].mean == pytest.approx(statistics.mean([r for row in REWARDS for r in row]))
    assert metrics["zero_variance"].mean == 0.5
    assert metrics["failed"].mean == 0.0


def test_a_failed_sample_is_in_no_statistic():
    inputs, groups = batch(failed=(1,))
    steps, metrics = prepare_updates(inputs, groups, [GRPO()], RolloutSettings(LeaveOneOut()))
    assert float(of_sample(steps[0], 0, "advantages")[0]) == 1.0  # alone in its group: its reward
    assert not steps[0].response_mask[steps[0].sample_ids == 1].any()
    assert metrics["failed"].mean == pytest.approx(1 / 8)


def test_the_penalty_of_the_reference_goes_into_the_reward():
    inputs, groups = batch()
    steps, _ = prepare_updates(inputs, groups, [GRPO()], RolloutSettings(LeaveOneOut(), reward_kl=0.5))
    shaped = {}
    for slot in (2, 3):
        old, ref = of_sample(inputs[0], slot, "old_logprobs"), of_sample(inputs[0], slot, "ref_logprobs")
        shaped[slot] = REWARDS[0][slot] - 0.5 * float((old - ref).sum())
    got = float(of_sample(steps[0], 2, "advantages")[0])
    assert got == pytest.approx(shaped[2] - shaped[3], abs=1e-5)
    # a large penalty makes no wrong response of a right one
    steps, _ = prepare_updates(inputs, groups, [GRPO()], RolloutSettings(LeaveOneOut(), reward_kl=1e4))
    for prepared, given in zip(steps, inputs, strict=True):
        assert torch.equal(prepared.rewards, given.rewards)


def test_estimators_per_token_see_the_whole_batch():
    inputs, groups = batch()
    steps, metrics = prepare_updates(inputs, groups, [GRPO()], RolloutSettings(DiscountedReturns()))
    values = torch.cat([s.advantages[s.response_mask] for s in steps])
    assert float(values.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(values.std()) == pytest.approx(1.0, abs=1e-4)
    assert metrics["reward"].mean == 0.0


def test_one_pair_per_group_leaves_a_right_and_a_wrong_sample():
    inputs, groups = batch()
    steps, metrics = prepare_updates(
        inputs, groups, [OREAL(), TokenRewardLoss()], RolloutSettings(LeaveOneOut(), one_pair_per_group=True), seed=3
    )
    kept = [
        [int(s) for s in torch.unique(prepared.sample_ids[prepared.response_mask])] for prepared in steps
    ]  # groups 1 and 2 have one kind only
    assert kept == [[0, 1], [6, 7]]
    assert metrics["chosen"].mean == 0.5
    assert {"behaviour_cloning", "policy_gradient", "kl", "token_reward"} <= steps[0].weights.keys()


def test_weights_belong_to_their_step():
    """Preparing steps together gives the weights of preparing each alone: denominators are those of a step."""
    inputs, groups = batch()
    settings = RolloutSettings(GroupNormalized("none"))
    together, _ = prepare_updates(inputs, groups, [DAPO(loss_agg_mode="seq-mean-token-mean")], settings)
    for update in (0, 1):
        alone, _ = prepare_updates(
            [inputs[update]], [groups[update]], [DAPO(loss_agg_mode="seq-mean-token-mean")], settings
        )
        for name, weight in alone[0].weights.items():
            torch.testing.assert_close(weight, together[update].weights[name])
    for slot, length in enumerate(LENGTHS[0]):
        weight = together[0].weights["policy"][(together[0].sample_ids == slot) & together[0].response_mask]
        torch.testing.assert_close(weight, torch.full((length,), sum(LENGTHS[0]) / 4 / length))


def test_the_correction_comes_before_the_weights():
    inputs, groups = batch()
    inputs[0] = inputs[0].changed(rollout_logprobs=inputs[0].old_logprobs - 3.0)  # every ratio is e³
    correction = RolloutCorrection(mode="none", reject_level="geometric", reject_high=2.0)
    settings = RolloutSettings(LeaveOneOut(), correction=correction)
    steps, metrics = prepare_updates(inputs, groups, [GRPO()], settings)
    assert not steps[0].response_mask.any()
    assert metrics["rollout_is/rejected"].sum >= sum(LENGTHS[0])
    assert math.isfinite(float(metrics["mismatch/k3"].mean))


def test_what_is_missing_is_named():
    inputs, groups = batch()
    bare = [PolicyInputs(i.response_mask, i.sample_ids, rewards=i.rewards) for i in inputs]
    with pytest.raises(ValueError, match=r"requires \['old_logprobs', 'ref_logprobs'\]"):
        prepare_updates(bare, groups, [GRPO()], RolloutSettings(LeaveOneOut(), reward_kl=0.1))

"""Losses, gradients and advantages equal what TRL 1.16.0, verl 0.9.1 and OREAL's own code gave (golden/policy)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import policy_batches as batches
from lit_interns1.objectives import policy

FIELDS = ("old_logprobs", "rollout_logprobs", "ref_logprobs", "values", "token_rewards", "rewards", "advantages")


def data(mask=None, recorded=None):
    recorded = recorded or batches.figures()["data"]
    rows = {name: torch.as_tensor(value) for name, value in recorded.items()}
    mask = torch.tensor(mask) if mask else rows["response_mask"]
    flat, back = batches.pack({name: rows[name] for name in (*FIELDS, "logp", "entropy", "new_values")}, mask)
    ids = flat.pop("sample_ids")
    return flat, ids, mask, back


def check(objective, figure, inputs, logp_T, entropy_T, back, prepared=None):
    logp_T = torch.nan_to_num(logp_T).requires_grad_()
    prepared = objective.prepare(inputs) if prepared is None else prepared
    loss, _ = objective(batches.scores_of(logp_T, torch.nan_to_num(entropy_T)), prepared)
    loss.mean.backward()
    assert loss.mean.item() == pytest.approx(figure["loss"], rel=2e-6, abs=1e-7)
    torch.testing.assert_close(back(logp_T.grad), torch.tensor(figure["gradient"]), rtol=1e-5, atol=1e-7)
    assert float(logp_T.grad.abs().sum()) > 0


TRL = {
    "grpo": policy.GRPO(),
    "grpo_kl": policy.GRPO(beta=0.04),
    "grpo_kl_corrected": policy.GRPO(beta=0.04, use_bias_correction_kl=True),
    "grpo_delta": policy.GRPO(delta=1.1),
    "grpo_entropy": policy.GRPO(entropy_coef=0.1),
    "grpo_opsm": policy.GRPO(off_policy_mask_threshold=0.01),
    "bnpo": policy.GRPO(loss_agg_mode="token-mean"),
    "dr_grpo": policy.DrGRPO(max_completion_length=8),
    "dapo": policy.DAPO(),
    "cispo": policy.CISPO(epsilon_high=0.3),
    "gspo": policy.GSPO(0.05, 0.06),
    "rloo": policy.RLOO(),
}
VERL = {
    "ppo": policy.PPO(),
    "ppo_c_1.05": policy.PPO(clip_ratio_c=1.05),
    "dapo": policy.DAPO(clip_ratio_c=3.0),
    "dapo_tis": policy.DAPO(clip_ratio_c=3.0),
    "grpo": policy.GRPO(clip_ratio_c=3.0),
    "seq_sum": policy.PPO(loss_agg_mode="seq-mean-token-sum"),
    "dr_grpo": policy.DrGRPO(max_completion_length=8, clip_ratio_c=3.0),
    "gspo": policy.GSPO(0.05, 0.06),
    "cispo": policy.CISPO(0.2, 0.3),
    "kl_cov": policy.KLCov(kl_cov_ratio=0.2, ppo_kl_coef=0.7),
}
OREAL = {
    "threshold": policy.OREAL(),
    "threshold_0.6": policy.OREAL(credit_threshold=0.6),
    "plain_positives": policy.OREAL(pos_mult_adv=False),
    "k2": policy.OREAL(kl_type="k2"),
    "without_token_rm": policy.OREAL(credit="none"),
    "topk": policy.OREAL(rescale="topk"),
}


@pytest.mark.parametrize("case", TRL)
def test_trl(case: str) -> None:
    flat, ids, _, back = data()
    inputs = policy.PolicyInputs.from_fields(flat, ids)
    check(TRL[case], batches.figures()["trl"][case], inputs, flat["logp"], flat["entropy"], back)


@pytest.mark.parametrize("case", VERL)
def test_verl(case: str) -> None:
    flat, ids, _, back = data()
    inputs, prepared = policy.PolicyInputs.from_fields(flat, ids), None
    if case == "dapo_tis":
        inputs, _ = policy.RolloutCorrection()(inputs)
    if case == "kl_cov":  # verl selects by the log-probabilities of the micro-batch, we by those of the rollout
        prepared = VERL[case].prepare(inputs.changed(old_logprobs=flat["logp"]))
        prepared = prepared.changed(old_logprobs=inputs.old_logprobs)
    figure = batches.figures()["verl"][case]
    check(VERL[case], figure, inputs, flat["logp"], flat["entropy"], back, prepared)


@pytest.mark.parametrize("case", OREAL)
def test_oreal(case: str) -> None:
    figures = batches.figures()
    flat, ids, _, back = data(figures["longer_mask"] if case == "topk" else None)
    figure = figures["oreal_longer"]["topk"] if case == "topk" else figures["oreal"][case]
    check(OREAL[case], figure, policy.PolicyInputs.from_fields(flat, ids), flat["logp"], flat["entropy"], back)


def test_token_reward_model_of_oreal() -> None:
    flat, ids, mask, back = data()
    inputs, objective = policy.PolicyInputs.from_fields(flat, ids), policy.TokenRewardLoss()
    scores = torch.nan_to_num(flat["token_rewards"]).requires_grad_()
    prepared = objective.prepare(inputs)
    loss, metrics = objective(scores, prepared)
    loss.mean.backward()
    assert loss.mean.item() == pytest.approx(batches.figures()["oreal"]["threshold"]["reward_model_loss"], rel=1e-6)
    w, right = (
        back(torch.nan_to_num(flat["token_rewards"])).double(),
        torch.tensor(batches.figures()["data"]["rewards"]) > 0,
    )
    mean = torch.where(mask, w, 0).sum(1) / mask.sum(1)
    expected = (mean.sigmoid() - right.double())[:, None] * mask / mask.sum(1, keepdim=True) / 6
    torch.testing.assert_close(back(scores.grad), expected.float(), rtol=1e-5, atol=1e-7)
    hits = ((mean > 0) == right).double() @ mask.sum(1).double() / mask.sum()
    assert metrics["token_reward_accuracy"].mean.item() == pytest.approx(hits.item())
    halves = [objective(w, part)[0] for w, part in zip(scores.split([18, 39]), prepared.split([18, 39]))]
    assert (halves[0].sum + halves[1].sum).item() == pytest.approx(loss.sum.item(), rel=1e-6)
    with pytest.raises(ValueError, match="TokenRewardLoss needs every sample whole"):
        objective(scores[:25], prepared.split([25, 32])[0])


@pytest.mark.parametrize("name", ["k1", "k2", "k3", "abs", "k1+", "k3+"])
def test_kl_estimators(name) -> None:
    rows = {key: torch.tensor(value) for key, value in batches.figures()["data"].items()}
    mask, logp = rows["response_mask"], rows["logp"].requires_grad_()
    total = (policy.kl_estimate(logp, rows["ref_logprobs"], name) * mask).sum()
    total.backward()
    figure = batches.figures()["verl"]["kl"][name]
    assert total.item() == pytest.approx(figure["loss"], rel=1e-5)
    torch.testing.assert_close(logp.grad, torch.tensor(figure["gradient"]), rtol=1e-5, atol=1e-6)


def test_values() -> None:
    flat, ids, _, back = data()
    figure = batches.figures()["verl"]
    returns, _ = batches.pack(
        {"returns": torch.tensor(figure["advantages"]["gae_returns"])},
        torch.tensor(batches.figures()["data"]["response_mask"]),
    )
    inputs = policy.PolicyInputs.from_fields(flat | {"returns": returns["returns"]}, ids)
    objective = policy.ValueLoss(cliprange_value=0.3)
    values = torch.nan_to_num(flat["new_values"]).requires_grad_()
    loss, metrics = objective(values, objective.prepare(inputs))
    loss.mean.backward()
    assert loss.mean.item() == pytest.approx(figure["value"]["loss"], rel=1e-5)
    torch.testing.assert_close(back(values.grad), torch.tensor(figure["value"]["gradient"]), rtol=1e-5, atol=1e-7)
    assert 0 < metrics["value_clip_fraction"].mean < 1


@pytest.mark.parametrize(
    ("case", "estimator"),
    [
        ("grpo", policy.GroupNormalized(std_epsilon=1e-6)), ("dr_grpo", policy.GroupNormalized("none")),
        ("rloo", policy.LeaveOneOut()), ("opo", policy.LengthWeightedBaseline()),
    ],
)  # fmt: skip
def test_group_advantages_of_verl(case: str, estimator) -> None:
    figures = batches.figures()
    rewards, mask = torch.tensor(figures["data"]["rewards"]), torch.tensor(figures["data"]["response_mask"])
    result = estimator(rewards, torch.tensor(figures["groups"]), lengths=mask.sum(1)).advantages
    expected = torch.tensor(figures["verl"]["advantages"][case])
    expected = torch.where(mask, expected, 0).sum(1) / mask.sum(1)
    if case != "rloo":
        expected[5] = 0.0  # a group of one: there verl keeps R itself
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_advantages_of_trl(scale) -> None:
    figures = batches.figures()["trl"]
    groups = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
    result = policy.GroupNormalized(scale)(torch.tensor(figures["rewards"]), groups)
    torch.testing.assert_close(result.advantages, torch.tensor(figures["advantages"][scale]))
    assert result.metrics["failed"].mean == pytest.approx(1 / 9)


def test_token_advantages_of_verl() -> None:
    flat, ids, mask, back = data()
    figures = batches.figures()["verl"]["advantages"]
    inputs = policy.PolicyInputs.from_fields(flat, ids)
    plus = policy.DiscountedReturns(gamma=0.97, beta=0.05)(inputs)
    gae = policy.GeneralizedAdvantages(gamma=0.97, lam=0.9, beta=0.05)(inputs)
    centred = policy.GroupNormalized("none")
    groups, rewards = torch.tensor(batches.figures()["groups"]), torch.tensor(batches.figures()["data"]["rewards"])
    a_S = centred(rewards, groups).advantages
    a_S[5] = rewards[5]  # a group of one: there verl keeps R itself
    a_T = torch.where(inputs.response_mask, a_S[ids.clamp(min=0)], 0)
    for name, result in {
        "reinforce_plus_plus": plus.advantages, "reinforce_plus_plus_returns": plus.returns, "gae": gae.advantages,
        "gae_returns": gae.returns, "reinforce_plus_plus_baseline": policy.whiten(a_T, inputs.response_mask),
    }.items():  # fmt: skip
        expected = torch.where(mask, torch.tensor(figures[name]), 0)
        torch.testing.assert_close(
            back(result), expected, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


CORRECTIONS = {
    ("verl", "token_2"): policy.RolloutCorrection(),
    ("verl", "sequence_2"): policy.RolloutCorrection("sequence"),
    ("verl", "token_0.7_1.4"): policy.RolloutCorrection(mode="mask", low=0.7, high=1.4),
    ("trl", "token_truncate"): policy.RolloutCorrection(high=1.4),
    ("trl", "token_mask"): policy.RolloutCorrection(mode="mask", low=0.7, high=1.4),
    ("trl", "sequence_truncate"): policy.RolloutCorrection("sequence", low=0.6, high=1.4),
    ("trl", "sequence_mask"): policy.RolloutCorrection("sequence", "mask", high=1.4),
}


@pytest.mark.parametrize(("library", "case"), CORRECTIONS)
def test_rollout_weights(library: str, case: str) -> None:
    flat, ids, mask, back = data()
    figure = batches.figures()[library]["correction" if library == "verl" else "importance"][case]
    result, _ = CORRECTIONS[library, case](policy.PolicyInputs.from_fields(flat, ids))
    expected = torch.where(mask, torch.tensor(figure), 0)
    torch.testing.assert_close(back(result.rollout_is_weights), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(back(result.response_mask), mask)


@pytest.mark.parametrize(
    ("case", "level", "high"),
    [("token_k1", "token", 1.25), ("seq_sum_k1", "sequence", 2.0), ("seq_mean_k1", "geometric", 1 / 0.9)],
)
def test_rejection(case: str, level, high: float) -> None:
    flat, ids, mask, back = data()
    correction = policy.RolloutCorrection(mode="none", reject_level=level, reject_low=1 / high, reject_high=high)
    result, metrics = correction(policy.PolicyInputs.from_fields(flat, ids))
    expected = torch.tensor(batches.figures()["verl"]["rejection"][case]).bool()
    assert torch.equal(back(result.response_mask), expected)
    rejected = float(1 - expected.sum() / mask.sum())
    assert 0 < rejected < 1
    assert metrics["rollout_is/rejected"].mean == pytest.approx(rejected)
    assert result.rollout_is_weights is None


@pytest.mark.slow
def test_trl_itself_on_other_tensors() -> None:
    pytest.importorskip("trl")
    path = Path(__file__).parents[2] / "golden" / "policy" / "generate.py"
    specification = importlib.util.spec_from_file_location("generate_policy_figures", path)
    generate = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(generate)
    for seed in range(5):
        recorded = generate.tensors(seed)
        figures = generate.trl_figures(recorded)
        flat, ids, _, back = data(recorded=recorded)
        for case, objective in TRL.items():
            inputs = policy.PolicyInputs.from_fields(flat, ids)
            check(objective, figures[case], inputs, flat["logp"], flat["entropy"], back)

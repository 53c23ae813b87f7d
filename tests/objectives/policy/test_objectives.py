"""Worked examples, formulas written out in float64 over ragged lists, and invariance to micro-batches and ranks."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import policy_batches as batches
from distributed_harness import run_ranks
from lit_interns1.data import PackedBatch
from lit_interns1.objectives import policy
from lit_interns1.objectives.policy.covariance import clip_cov_mask, kl_cov_mask
from lit_interns1.training.window_means import all_reduce_sum

LOG3 = math.log(3.0)


def one_row(lengths, **values) -> policy.PolicyInputs:
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return policy.PolicyInputs(torch.ones_like(ids), ids, **{k: torch.tensor(v) for k, v in values.items()})


# worked examples


def test_oreal_by_hand() -> None:
    # right response: running means ln 3, 0, −ln 3 → c = ¾, ½, ¼; wrong one: −ln 3, −ln 3 → ¼, ¼
    advantage = policy.LeaveOneOut()(torch.tensor([1.0, -1, -1]), torch.zeros(3)).advantages
    assert advantage.tolist() == [2.0, -1.0, -1.0]
    logp = torch.tensor([-1.0, -2, -3, -0.5, -4], requires_grad=True)
    inputs = one_row(
        [3, 2], advantages=[2.0] * 3 + [-1.0] * 2, rewards=[1.0] * 3 + [-1.0] * 2,
        token_rewards=[LOG3, -LOG3, -3 * LOG3, -LOG3, -LOG3], ref_logprobs=logp.tolist(),
    )  # fmt: skip
    right, wrong = policy.credit_weights(inputs)
    torch.testing.assert_close(right, torch.tensor([0.5, 0, 0, 0, 0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(wrong, torch.tensor([0, 0, 0.5, 0.5, 0.5]), atol=1e-6, rtol=0)
    objective = policy.OREAL()
    loss, metrics = objective(batches.scores_of(logp), objective.prepare(inputs))
    loss.mean.backward()
    assert metrics["loss/behaviour_cloning"].mean == pytest.approx(2 * 0.5 * 1 / 3)
    assert metrics["loss/policy_gradient"].mean == pytest.approx(0.5 * (0.5 + 0.5) / 2)
    assert metrics["loss/kl"].mean == 0.0
    assert metrics["positive_nll"].mean == pytest.approx(2.0)
    torch.testing.assert_close(logp.grad, torch.tensor([-1 / 3, 0, 0, 0.125, 0.125]), atol=1e-6, rtol=0)


def test_topk_credit_by_hand() -> None:
    inputs = one_row([8, 1], token_rewards=[0.0, LOG3, 0, 0, -LOG3, 0, 3 * LOG3, 0, 5.0])
    right, wrong = policy.credit_weights(inputs, "topk", topk_ratio=0.25, running_mean=False)
    # of 8 tokens 2: σ = 27/28 and ¾ scaled to 1 and 0 (wrong: ¾ and ½); a lone token has the weight 1
    torch.testing.assert_close(right, torch.tensor([0.0, 0, 0, 0, 0, 0, 1, 0, 1]))
    torch.testing.assert_close(wrong, torch.tensor([0.0, 0, 0, 0, 1, 0, 0, 0, 1]))
    right, _ = policy.credit_weights(inputs, "topk", topk_ratio=0.5, running_mean=False)
    torch.testing.assert_close(right[:8], torch.tensor([0.0, (3 / 4 - 1 / 2) / (27 / 28 - 1 / 2), 0, 0, 0, 0, 1, 0]))


def test_kl_cov_by_hand() -> None:
    # log π − mean = 2, 1, 0, −1, −2; A − mean = 2, 0, 0, −1, −1 → covariances 4, 0, 0, 1, 2
    inputs = one_row([2, 3], old_logprobs=[-1.0, -2, -3, -4, -5], advantages=[3.0, 1, 1, 0, 0])
    for share, chosen in ((0.001, [0]), (0.2, [0]), (0.4, [0, 4]), (0.6, [0, 3, 4]), (1.0, [0, 1, 2, 3, 4])):
        assert kl_cov_mask(inputs, share).nonzero().squeeze(1).tolist() == chosen
    inputs = replace(inputs, rewards=torch.tensor([1.0, 1, -1, -1, -1]))
    logp = torch.tensor([-1.0, -2, -3, -4, -5.5], requires_grad=True)
    objective = policy.InternS1(kl_cov_ratio=0.4, kl_cov_coef=0.1)
    loss, metrics = objective(batches.scores_of(logp), objective.prepare(inputs))
    loss.mean.backward()
    assert metrics["kl_cov_selected"].mean == pytest.approx(0.4)
    assert metrics["loss/kl_cov"].mean == pytest.approx(0.1 * 0.5 / 5)
    # right: −1/N₊ each; wrong: 0.5 · (−A)/N₋, here A = 1, 0, 0; the KL-Cov pulls the last one back up
    torch.testing.assert_close(logp.grad, torch.tensor([-0.5, -0.5, -0.5 / 3, 0, -0.1 / 5]), atol=1e-6, rtol=0)
    assert policy.InternS1.published().kl_cov_ratio == 0.2


def test_intern_s1_pro_by_hand() -> None:
    rho, staleness = torch.tensor([1.0, 4.0, 1.5, 0.25, 1.0]), torch.tensor([1.2, 1.0, 0.5, 1.0, 2.0])
    old = torch.full((5,), -2.0)
    inputs = one_row([4, 1], advantages=[0.5] * 4 + [-1.0], old_logprobs=old.tolist())
    inputs = inputs.changed(rollout_logprobs=old - rho.log())
    logp = (old + staleness.log()).requires_grad_()
    objective = policy.InternS1Pro(mismatch_low=0.5, mismatch_high=2.0)
    loss, metrics = objective(batches.scores_of(logp), objective.prepare(inputs))
    loss.mean.backward()
    # M(ρ) = 1, 0, 1.5, 0, 1; per sample −1/|y| Σ M r A log π, mean of the two samples
    expected = torch.tensor([1.0 * 1.2 * 0.5 / 4, 0, 1.5 * 0.5 * 0.5 / 4, 0, 1.0 * 2.0 * -1.0]) / -2
    torch.testing.assert_close(logp.grad, expected)
    assert loss.mean.item() == pytest.approx((expected * logp.detach()).sum().item())
    assert metrics["mismatch_masked"].mean == pytest.approx(2 / 5)
    clipped = policy.InternS1Pro(mismatch_low=0.5, mismatch_high=2.0, staleness_low=0.8, staleness_high=1.1)
    (held,) = torch.autograd.grad(clipped(batches.scores_of(logp), clipped.prepare(inputs))[0].mean, logp)
    expected = torch.tensor([1.0 * 1.1 * 0.5 / 4, 0, 1.5 * 0.8 * 0.5 / 4, 0, 1.0 * 1.1 * -1.0]) / -2
    torch.testing.assert_close(held, expected)
    same = inputs.changed(rollout_logprobs=old)  # ρ = 1 exactly: the inequalities are strict
    assert policy.InternS1Pro(1.0, 2.0).mismatch_weights(same).tolist() == [0.0] * 5
    assert policy.InternS1Pro(0.5, 1.0).mismatch_weights(same).tolist() == [0.0] * 5
    assert policy.InternS1Pro(0.99, 1.01).mismatch_weights(same).tolist() == [1.0] * 5


# formulas over ragged lists, in float64


def ragged(logp_T, inputs):
    """Per sample with response tokens: a dict of its (|y|,) vectors."""
    samples = []
    for sample in inputs.sample_ids.unique().tolist():
        keep = inputs.response_mask & (inputs.sample_ids == sample)
        if bool(keep.any()):
            samples.append({name: value[keep] for name, value in inputs.fields().items()} | {"logp": logp_T[keep]})
    return samples


def kl3(sample):
    difference = sample["ref_logprobs"] - sample["logp"]
    return difference.exp() - difference - 1


def ppo_min(r, a, low=0.2, high=0.2):
    return torch.stack([-torch.min(x * y, x.clamp(1 - low, 1 + high) * y) for x, y in zip(r, a)])


def reference(name, samples, inputs):
    tokens, count = sum(len(s["logp"]) for s in samples), len(samples)
    ratio = [(s["logp"] - s["old_logprobs"]).exp() for s in samples]
    advantage = [s["advantages"] for s in samples]
    if name == "GRPO":
        return sum((ppo_min(r, a) + 0.04 * kl3(s)).mean() for s, r, a in zip(samples, ratio, advantage)) / count
    if name == "GRPO OPSM":
        total = 0.0
        for s, r, a in zip(samples, ratio, advantage):
            moved = (s["rollout_logprobs"] - s["logp"].detach()).mean() > 0.05
            values = -torch.min(r.clamp(max=1.3) * a, r.clamp(0.8, 1.2) * a)
            total = total + (0.0 if a[0] < 0 and moved else 1.0) * values.mean()
        return total / count
    if name == "DrGRPO":
        return sum(ppo_min(r, a).sum() for r, a in zip(ratio, advantage)) / (count * 9)
    if name == "DAPO":
        return sum(ppo_min(r, a, 0.2, 0.28).sum() for r, a in zip(ratio, advantage)) / tokens
    if name in ("RLOO", "GSPO"):
        low, high = (0.2, 0.2) if name == "RLOO" else (0.03, 0.04)
        total = 0.0
        for s, a in zip(samples, advantage):
            difference = s["logp"] - s["old_logprobs"]
            r = (difference.sum() if name == "RLOO" else difference.mean()).exp()
            total = total - torch.min(r * a[0], r.clamp(1 - low, 1 + high) * a[0])
        return total / count
    if name == "RLOO reinforce":
        return sum((-a * s["logp"]).sum() for s, a in zip(samples, advantage)) / count
    if name == "ReinforcePlusPlus":
        return sum(ppo_min(r, a).sum() for r, a in zip(ratio, advantage)) / tokens
    if name == "PPO":
        values = [
            torch.where(a < 0, torch.min(ppo_min(r, a), -1.1 * a), ppo_min(r, a)) for r, a in zip(ratio, advantage)
        ]
        return sum(v.sum() for v in values) / tokens
    if name == "CISPO":
        weights = [r.clamp(max=1.2).detach() for r in ratio]
        return sum((-w * a * s["logp"]).sum() for s, w, a in zip(samples, weights, advantage)) / tokens
    if name == "InternS1Pro":
        total = 0.0
        for s, r, a in zip(samples, ratio, advantage):
            rho = (s["old_logprobs"] - s["rollout_logprobs"]).exp()
            mask = (rho > 0.5) & (rho < 2.0)
            total = total - (rho * mask * r.detach().clamp(max=1.2) * a * s["logp"]).mean()
        return total / count
    if name in ("KLCov", "ClipCov", "InternS1"):
        logp, a = torch.cat([s["old_logprobs"] for s in samples]), torch.cat(advantage)
        covariance = (logp - logp.mean()) * (a - a.mean())
        if name == "ClipCov":  # which of the candidates: see test_clip_cov
            chosen = torch.cat([s["chosen"] for s in samples])
            values = torch.cat([ppo_min(r, x) for r, x in zip(ratio, advantage)])
            return torch.where(chosen, 0, values).sum() / tokens
        chosen = torch.zeros(tokens).index_fill(0, covariance.topk(int(0.2 * tokens)).indices, 1.0)
        penalty = (torch.cat([s["logp"] for s in samples]) - logp).abs() * chosen
        if name == "KLCov":
            return (-torch.cat(ratio) * a + penalty).sum() / tokens
        return 0.3 * penalty.sum() / tokens + signed(samples, lambda s: (1.0, 1.0), False)
    if name.startswith("OREAL"):
        kl = sum(0.1 * kl3(s).sum() for s in samples) / tokens
        if name == "OREAL without token rewards":
            return signed(samples, lambda s: (1.0, 1.0), True) + 0.01 / 0.1 * kl
        return signed(samples, credit_topk if name == "OREAL topk" else credit_threshold, True) + kl
    raise AssertionError(name)


def credit_threshold(sample):
    w = sample["token_rewards"]
    c = torch.stack([w[: t + 1].mean() for t in range(len(w))]).sigmoid()
    return (2 * c - 1).clamp(min=0), (1 - 2 * c).clamp(min=0)


def credit_topk(sample):
    c, weights = sample["token_rewards"].sigmoid(), []
    for p in (c, 1 - c):
        best = sorted(range(len(p)), key=lambda t: -p[t].item())[: max(1, int(0.25 * len(p)))]
        low, high = min(p[t] for t in best), max(p[t] for t in best)
        weights.append(torch.zeros_like(p))
        for t in best:
            weights[-1][t] = 1.0 if high == low else (p[t] - low) / (high - low)
    return weights


def signed(samples, credit, multiply):
    right, wrong = [s for s in samples if s["rewards"][0] > 0], [s for s in samples if s["rewards"][0] <= 0]
    positive = sum(((s["advantages"] if multiply else 1.0) * credit(s)[0] * -s["logp"]).sum() for s in right)
    held = [(s["logp"] - s["logp"].detach()).exp() for s in wrong]
    negative = sum((h * s["advantages"] * credit(s)[1]).sum() for s, h in zip(wrong, held))
    return positive / sum(len(s["logp"]) for s in right) - 0.5 * negative / sum(len(s["logp"]) for s in wrong)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", [name for name in batches.objectives() if name != "GRPO corrected"])
def test_written_out(name: str, seed: int) -> None:
    logp, entropy, inputs, _ = batches.random_batch(seed, torch.float64)
    mean, gradient, metrics = batches.loss_and_gradient(batches.objectives()[name], logp, entropy, inputs)
    wide = logp.clone().requires_grad_()
    samples = ragged(wide, inputs)
    if name == "ClipCov":
        chosen = clip_cov_mask(inputs, 0.2, -1.0, 5.0)
        for s, keep in zip(samples, [i for i in range(8) if i != 4]):
            s["chosen"] = chosen[inputs.response_mask & (inputs.sample_ids == keep)]
        assert 0 < int(chosen.sum()) == int(0.2 * sum(len(s["logp"]) for s in samples))
    expected = reference(name, samples, inputs)
    expected.backward()
    torch.testing.assert_close(mean.double(), expected.detach(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradient, wide.grad, rtol=1e-5, atol=1e-7)
    assert not gradient[~inputs.response_mask].any()
    assert all(math.isfinite(value) for value in metrics.values())


def test_gradient_of_the_corrected_kl_is_that_of_the_kl() -> None:
    # over all tokens of a small vocabulary: Σ_v π(v) ∇k3(v) is not ∇KL, Σ_v π(v) ∇(r k3)(v) is, as is that of "k3+"
    torch.manual_seed(0)
    z, ref = torch.randn(7, dtype=torch.float64, requires_grad=True), torch.randn(7, dtype=torch.float64).log_softmax(0)
    logp = z.log_softmax(0)
    p = logp.exp().detach()
    (exact,) = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), z, retain_graph=True)
    corrected = policy.kl_estimate(logp, ref, "k3") * (logp - logp.detach()).exp()
    for estimate, right in (
        (corrected, True),
        (policy.kl_estimate(logp, ref, "k3+"), True),
        (policy.kl_estimate(logp, ref), False),
    ):
        (gradient,) = torch.autograd.grad((p * estimate).sum(), z, retain_graph=True)
        assert torch.allclose(gradient, exact) is right
        assert (p * estimate).sum().item() == pytest.approx((p * (logp - ref)).sum().item())


# invariance


@pytest.mark.parametrize("name", batches.objectives())
def test_micro_batches_leave_loss_and_gradient_unchanged(name: str) -> None:
    logp, entropy, inputs, _ = batches.random_batch()
    objective = batches.objectives()[name]
    mean, gradient, metrics = batches.loss_and_gradient(objective, logp, entropy, inputs)
    width = max(batches.LENGTHS) + 1
    # the fifth sample is masked: a micro-batch without a token; and one of no length at all
    sizes = [2 * width, 2 * width, width, 0, 3 * width, 3]
    split_mean, split_gradient, split_metrics = batches.loss_and_gradient(objective, logp, entropy, inputs, sizes)
    torch.testing.assert_close(split_mean, mean, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(split_gradient, gradient, rtol=1e-5, atol=1e-7)
    assert split_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6)
    assert float(gradient.abs().max()) > 1e-3


def shares(world, rank):
    width = max(batches.LENGTHS) + 1
    return slice(0, 5 * width) if rank == 0 and world == 2 else slice(5 * width, None) if world == 2 else slice(None)


def rank_results(rank, world):
    logp, entropy, inputs, _ = batches.random_batch()
    part = shares(world, rank)
    inputs = inputs.split([part.stop or 5 * 10, len(logp) - (part.stop or 5 * 10)])[rank] if world == 2 else inputs
    results = {}
    for name, objective in batches.objectives().items():
        leaf = logp[part].clone().requires_grad_()
        loss, _ = objective(batches.scores_of(leaf, entropy[part]), objective.prepare(inputs))
        loss.sum.backward()
        sums = all_reduce_sum(torch.stack([loss.sum.detach(), loss.count]))
        results[name] = sums[0] / sums[1], leaf.grad / sums[1]
    for name, estimator in {
        "plus": policy.DiscountedReturns(0.9),
        "gae": policy.GeneralizedAdvantages(0.9, 0.8),
    }.items():
        result = estimator(inputs)
        results[name] = result.returns.sum() * 0, result.advantages
    # groups 0 and 2 lie on both ranks
    groups, rewards = torch.tensor([0, 0, 1, 2, 2, 0, 2, 2]), torch.tensor([1.0, 0, 3, 1, 1, 0.5, -1, 2])
    rewards[1] = torch.nan
    mine = (slice(0, 5), slice(5, None))[rank] if world == 2 else slice(None)
    lengths = torch.arange(1, 9)
    for scale in ("group", "batch", "none"):
        value = policy.GroupNormalized(scale)(rewards[mine], groups[mine], across_ranks=True).advantages
        results[f"group {scale}"] = torch.zeros(()), value
    estimators = {"loo": policy.LeaveOneOut(), "opo": policy.LengthWeightedBaseline(), "pass": policy.PassAtK(k=1)}
    for name, estimator in estimators.items():
        value = estimator(rewards[mine], groups[mine], lengths=lengths[mine], across_ranks=True).advantages
        results[name] = torch.zeros(()), value
    return {name: (a.clone(), b.clone()) for name, (a, b) in results.items()}


def test_ranks_leave_loss_and_gradient_unchanged() -> None:
    alone = rank_results(0, 1)
    first, second = run_ranks(rank_results, 2)
    assert len(alone) == len(batches.objectives()) + 8
    for name, (loss, gradient) in alone.items():
        torch.testing.assert_close(first[name][0], loss, rtol=1e-5, atol=1e-6)
        both = torch.cat([first[name][1], second[name][1]])
        torch.testing.assert_close(both, gradient, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_through_a_packed_batch() -> None:
    generator = torch.Generator().manual_seed(3)
    rows = []
    for lengths in ((4, 6), (7, 3), (10,), (2, 2, 2)):
        documents = []
        for length in lengths:
            ids = torch.randint(0, 50, (length,), generator=generator)
            labels = torch.cat([ids[1:], torch.tensor([-100])])
            labels[0] = -100  # the prompt
            values = {"advantages": torch.randn(1, generator=generator).expand(length)}
            values["old_logprobs"] = -torch.rand(length, generator=generator)
            documents.append({"input_ids": ids, "labels": labels, **values})
        rows.append(PackedBatch.from_documents(documents, row_length=11))
    batch = PackedBatch.concatenate(rows)
    objective = policy.GSPO(0.03, 0.04)
    inputs = policy.PolicyInputs.from_fields(batch.token_fields, batch.sample_id_T, batch.labels)
    logp = -torch.rand(44, generator=generator)
    whole, gradient, _ = batches.loss_and_gradient(objective, logp, logp, inputs)
    batch.token_fields.update(objective.prepare(inputs).fields())
    leaf, total, count = logp.clone().requires_grad_(), 0.0, 0.0
    for part, scores in zip(batch.split(1), leaf.split(11)):
        loss, _ = objective(
            batches.scores_of(scores), policy.PolicyInputs.from_fields(part.token_fields, part.sample_id_T)
        )
        total, count = total + loss.sum, count + loss.count
    (total / count).backward()
    assert count == batch.num_loss_tokens
    torch.testing.assert_close((total / count).detach(), whole)
    torch.testing.assert_close(leaf.grad, gradient)


# edges


@pytest.mark.parametrize("name", batches.objectives())
@pytest.mark.parametrize("what", ["nothing", "no_positives", "no_negatives", "equal", "one_token"])
def test_edges_are_finite(name: str, what: str) -> None:
    logp, entropy, inputs, _ = batches.random_batch()
    if what == "nothing":
        inputs = inputs.changed(response_mask=torch.zeros_like(inputs.response_mask))
    elif what == "no_positives":
        inputs = inputs.changed(rewards=-torch.ones_like(logp))
    elif what == "no_negatives":
        inputs = inputs.changed(rewards=torch.ones_like(logp))
    elif what == "equal":
        inputs = inputs.changed(advantages=torch.zeros_like(logp))
    else:
        inputs = inputs.changed(response_mask=inputs.sample_ids == 1)
        inputs = inputs.changed(response_mask=inputs.response_mask.cumsum(0) == 1)
    mean, gradient, metrics = batches.loss_and_gradient(batches.objectives()[name], logp, entropy, inputs)
    assert math.isfinite(mean)
    assert bool(gradient.isfinite().all())
    assert all(math.isfinite(value) for value in metrics.values())
    if what == "nothing":
        assert not gradient.any()
    if what == "no_positives" and name == "OREAL":
        assert metrics["loss/behaviour_cloning"] == 0.0 != metrics["loss/policy_gradient"]
    if what == "no_negatives" and name == "OREAL":
        assert metrics["loss/policy_gradient"] == 0.0 != metrics["loss/behaviour_cloning"]


def test_extreme_ratios_are_clamped() -> None:
    inputs = one_row([2, 1], advantages=[1.0, 1.0, -1.0], old_logprobs=[-200.0, -1.0, -300.0], ref_logprobs=[0.0, 0, 0])
    logp = torch.tensor([-1.0, -200.0, -0.1])
    for objective in (policy.PPO(), policy.GSPO(), policy.CISPO(None, None), policy.GRPO(beta=0.1), policy.RLOO()):
        mean, gradient, _ = batches.loss_and_gradient(objective, logp, logp, inputs)
        assert math.isfinite(mean)
        assert bool(gradient.isfinite().all())


def test_errors_name_what_is_wrong() -> None:
    logp, entropy, inputs, _ = batches.random_batch()
    with pytest.raises(ValueError, match=r"GRPO requires \['old_logprobs', 'ref_logprobs'\]"):
        policy.GRPO(beta=0.1).prepare(replace(inputs, old_logprobs=None, ref_logprobs=None))
    assert policy.GRPO(on_policy=True).requires == {"advantages"}
    with pytest.raises(ValueError, match=r"DAPO finds no weights for \['policy'\]: call prepare"):
        policy.DAPO()(batches.scores_of(logp), inputs)
    with pytest.raises(ValueError, match="needs every sample whole in its micro-batch, but sample 2 has 5 of its 7"):
        batches.loss_and_gradient(policy.GSPO(), logp, entropy, inputs, [28, 55])
    with pytest.raises(ValueError, match=r"old_logprobs \(2,\) must be a vector like sample_ids \(3,\)"):
        policy.PolicyInputs(torch.ones(3), torch.zeros(3).long(), old_logprobs=torch.zeros(2))
    with pytest.raises(ValueError, match="needs entropies"):
        policy.GRPO(entropy_coef=0.1)(batches.scores_of(logp), policy.GRPO(entropy_coef=0.1).prepare(inputs))
    with pytest.raises(ValueError, match=r"scores of \(4,\) tokens for inputs of \(83,\)"):
        policy.DAPO()(batches.scores_of(logp[:4]), policy.DAPO().prepare(inputs))
    spoiled = inputs.changed(old_logprobs=torch.where(inputs.sample_ids == 2, torch.nan, inputs.old_logprobs))
    with pytest.raises(
        ValueError, match=r"DAPO: of 31 response tokens of this step, not finite are old_logprobs on 7:"
    ):
        policy.DAPO().prepare(spoiled)
    unknown = inputs.changed(rollout_logprobs=torch.where(inputs.sample_ids == 2, torch.nan, inputs.rollout_logprobs))
    assert bool(policy.InternS1Pro().prepare(unknown).weights["policy"].isfinite().all())
    with pytest.raises(ValueError, match="no 'response_mask'"):
        policy.PolicyInputs.from_fields({}, inputs.sample_ids)
    with pytest.raises(ValueError, match="add up to 4, not to the 83"):
        inputs.split([1, 3])
    for make, message in (
        (lambda: policy.PPO(clip_ratio_c=1.0), r"clip_ratio_c = 1\.0 must be finite and above 1"),
        (lambda: policy.PPO(epsilon_low=1.5), r"epsilon_low = 1\.5 must be finite and at least 0 and at most 1"),
        (lambda: policy.GRPO(kl_type="k4"), "kl_type = 'k4' must be one of"),
        (lambda: policy.GRPO(loss_agg_mode="mean"), "loss_agg_mode = 'mean' must be one of"),
        (lambda: policy.GRPO(loss_agg_mode="seq-mean-token-sum-norm"), "loss_scale_factor = None goes with"),
        (lambda: policy.GRPO(beta=float("nan")), "beta = nan must be finite"),
        (lambda: policy.KLCov(kl_cov_ratio=0.0), r"kl_cov_ratio = 0\.0 must be finite and above 0"),
        (lambda: policy.ClipCov(clip_cov_low=5.0), r"clip_cov_low = 5\.0 must be below clip_cov_high = 5\.0"),
        (lambda: policy.InternS1Pro(2.0, 0.5), r"mismatch_low = 2\.0 must be below mismatch_high = 0\.5"),
        (lambda: policy.InternS1Pro(staleness_low=2.0, staleness_high=1.0), r"staleness_low = 2\.0 must not be above"),
        (lambda: policy.OREAL(credit="rm"), "credit = 'rm' must be one of"),
        (lambda: policy.ValueLoss(loss_agg_mode="seq-mean-token-sum-norm"), "has no meaning for values"),
        (lambda: policy.RolloutCorrection(low=3.0), r"low = 3\.0 must not be above high = 2\.0"),
        (lambda: policy.RolloutCorrection(reject_high=3.0), "need a reject_level"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_presets_are_made_from_configurations() -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(policy.PolicyObjective, "objective")
    made = parser.instantiate(
        parser.parse_object(
            {
                "objective": {
                    "class_path": "lit_interns1.objectives.policy.DAPO",
                    "init_args": {
                        "epsilon_high": 0.3, "clip_ratio_c": 3.0,
                        "advantages": {"class_path": "lit_interns1.objectives.policy.LeaveOneOut"},
                    },
                }
            }
        )
    ).objective  # fmt: skip
    assert (made.epsilon_low, made.epsilon_high, made.clip_ratio_c) == (0.2, 0.3, 3.0)
    assert isinstance(made.advantages, policy.LeaveOneOut)

"""Formulas written out in float64 over ragged lists, worked examples, invariance to micro-batches and ranks, errors."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import policy_batches
import preference_batches as batches
from distributed_harness import run_ranks
from lit_interns1.objectives import preference
from lit_interns1.objectives.cross_entropy import NextTokenCrossEntropy
from lit_interns1.training.window_means import all_reduce_sum

DIVERGENCES = ["tv", "pearson", "hellinger", "js", "reverse_kl", "forward_kl"]


def ragged(logp_T, inputs):
    """Per response: a dict of its log-probabilities, those of the reference, and what is said of the response."""
    responses = []
    for sample in inputs.sample_ids.unique().tolist():
        keep = inputs.response_mask & (inputs.sample_ids == sample)
        if bool(keep.any()):
            first = int(keep.nonzero()[0])
            response = {name: value[first].item() for name, value in inputs.fields().items()}
            responses.append(response | {"logp": logp_T[keep], "ref": inputs.ref_logprobs[keep]})
    return responses


def ratio(response):
    return sum(response["logp"]) - sum(response["ref"])


def score(name, response):
    h = ratio(response)
    if name == "DPO forward_kl":
        return 1 - (-h).exp()
    if name == "DPO js":
        return math.log(2) - (1 + (-h).exp()).log()
    if name == "DPO alpha":
        return (1 - (-0.7 * h).exp()) / 0.7
    return h / len(response["logp"]) if name in ("IPO", "DPO normalized") else h


def pair_reference(name, responses):
    total, pairs = 0.0, sorted({response["pair_ids"] for response in responses})
    for pair in pairs:
        (chosen,) = (r for r in responses if r["pair_ids"] == pair and r["is_chosen"])
        (rejected,) = (r for r in responses if r["pair_ids"] == pair and not r["is_chosen"])
        difference = score(name, chosen) - score(name, rejected)
        x = batches.PAIRED[name].beta * difference
        right, flipped = (1 + (-x).exp()).log(), (1 + x.exp()).log()
        if name == "IPO":
            value = (difference - 1 / 0.6) ** 2
        elif name == "DPO hinge":
            value = torch.maximum(1 - x, torch.zeros_like(x))
        elif name == "DPO smoothed":
            value = 0.8 * right + 0.2 * flipped
        else:
            value = (0.8 * right - 0.2 * flipped) / 0.6 if name == "DPO robust" else right
        total = total + chosen["weights"] * value
    return total / len(pairs)


def utility(divergence, u):
    """φ as printed for inverse reinforcement learning, u shifted to where φ' = 1, without a bound on φ'."""
    return {
        "tv": lambda: u,
        "pearson": lambda: u - u**2 / 4,
        "hellinger": lambda: u / (1 + u),
        "js": lambda: (2 - (-u).exp()).log(),
        "reverse_kl": lambda: 1 - (-((u - 1) + 1)).exp(),
        "forward_kl": lambda: (1 + (u + 1).log()) - 1,
    }[divergence]()


def slope(divergence, u):
    v = u.detach().requires_grad_()
    return torch.autograd.grad(utility(divergence, v).sum(), v)[0]


def clipped_utility(divergence, u, clip=1.5):
    """φ, continued by tangents at the points where its slope is ±clip, which bisection finds."""
    if divergence == "tv":
        return u
    domain = {"hellinger": -1.0, "forward_kl": -1.0, "js": -math.log(2)}.get(divergence, -50.0)
    low, high = torch.tensor(domain, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(divergence, middle) < clip else (middle, high)
    ends = [high] if divergence != "pearson" else [high, 4 - high]  # the slope of Pearson's is odd about u = 2
    for end in ends:
        if (u < end) == (end < 1) and u != end:
            return utility(divergence, end) + slope(divergence, end) * (u - end)
    return utility(divergence, u)


def lone_reference(name, responses):
    if name.startswith("KTO"):
        others = [ratio(r).item() for r in responses if r["mismatched"]]
        z0 = max(0.0, sum(others) / len(others)) if name == "KTO" else 0.0
        own, total = [r for r in responses if not r["mismatched"]], 0.0
        desirable, undesirable = (1.3, 0.8) if name == "KTO" else (1.0, 1.0)
        for r in own:
            x = 0.4 * (ratio(r) - z0)
            value = desirable / (1 + x.exp()) if r["is_chosen"] else undesirable / (1 + (-x).exp())
            total = total + r["weights"] * value
        return total / len(own)
    _, divergence, level = name.split()
    own, total, count = [r for r in responses if r["is_chosen"] and not r["mismatched"]], 0.0, 0
    for r in own:
        h = [ratio(r)] if level == "sequence" else list(r["logp"] - r["ref"])
        if divergence == "tv":
            h = [sum(r["logp"])] if level == "sequence" else list(r["logp"])
        total = total - r["weights"] * sum(clipped_utility(divergence, 0.7 * x) for x in h) / 0.7
        count += len(h)
    return total / count


def check_formula(name, reference, objective, logp_T, inputs):
    x = logp_T.clone().requires_grad_()
    wanted = reference(name, ragged(x, inputs))
    wanted.backward()
    loss, gradient, metrics = batches.loss_and_gradient(objective, logp_T, inputs)
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gradient, x.grad, rtol=1e-6, atol=1e-9)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("name", batches.PAIRED)
def test_pair_formulas(name: str) -> None:
    check_formula(name, pair_reference, batches.PAIRED[name], *batches.random_batch()[:2])


@pytest.mark.parametrize("name", batches.LONE)
def test_formulas_without_pairs(name: str) -> None:
    logp_T, inputs, _ = batches.random_batch(lone=True)
    check_formula(name, lone_reference, batches.LONE[name], logp_T, inputs)
    # the KL estimate of this batch is negative; here it is not
    shifted = replace(inputs, ref_logprobs=inputs.ref_logprobs - 0.4)
    check_formula(name, lone_reference, batches.LONE[name], logp_T, shifted)


def test_at_the_reference() -> None:
    logp_T, inputs, back = batches.random_batch()
    inputs = replace(inputs, ref_logprobs=logp_T, weights=None)
    loss, gradient, metrics = batches.loss_and_gradient(preference.DPO(0.2), logp_T, inputs)
    assert loss.item() == pytest.approx(math.log(2))
    assert (metrics["accuracy"], metrics["margin"]) == (0.5, 0.0)
    side = torch.tensor([-1.0, 1] * 4, dtype=torch.float64)
    torch.testing.assert_close(back(gradient).sum(1), side * 0.2 / 2 / 4 * back(inputs.response_mask).sum(1))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_implicit_reward_starts_as_fine_tuning(divergence: str) -> None:
    logp_T, inputs, _ = batches.random_batch(dtype=torch.float32)
    labels_T = torch.where(inputs.response_mask & inputs.is_chosen, 1, -100)
    x = logp_T.clone().requires_grad_()
    NextTokenCrossEntropy()(policy_batches.scores_of(x), labels_T)[0].mean.backward()
    inputs = replace(inputs, weights=None)
    if divergence != "tv":
        inputs = replace(inputs, ref_logprobs=logp_T)
    for beta in (0.1, 3.0):
        objective = preference.ImplicitRewardSFT(divergence, beta)
        _, gradient, _ = batches.loss_and_gradient(objective, logp_T, inputs)
        torch.testing.assert_close(gradient, x.grad, rtol=0, atol=1e-6)
    assert preference.ImplicitRewardSFT("tv").requires == frozenset()


def test_implicit_reward_needs_no_fields_for_plain_data() -> None:
    logp_T, inputs, _ = batches.random_batch()
    plain = preference.PreferenceInputs.from_fields({}, inputs.sample_ids, torch.where(inputs.response_mask, 1, -100))
    loss, _, metrics = batches.loss_and_gradient(preference.ImplicitRewardSFT("tv"), logp_T, plain)
    assert loss.item() == pytest.approx(-logp_T[inputs.response_mask].mean().item())
    assert "chosen_rewards" not in metrics


@pytest.mark.parametrize("divergence", DIVERGENCES[1:])
def test_utilities_are_concave_and_clipped(divergence: str) -> None:
    u = torch.linspace(-30, 30, 60001, dtype=torch.float64, requires_grad=True)
    (slopes,) = torch.autograd.grad(preference.implicit_reward_utility(u, divergence, 4.0).sum(), u)
    assert bool((slopes.diff() <= 1e-12).all())
    assert slopes.max().item() == pytest.approx(4.0)
    assert slopes.min().item() >= (-4.0 if divergence == "pearson" else 0.0)
    assert slopes[30000].item() == pytest.approx(1.0)


# invariance


@pytest.mark.parametrize("name", [*batches.PAIRED, *batches.LONE])
def test_micro_batches_change_nothing(name: str) -> None:
    lone = name in batches.LONE
    logp_T, inputs, _ = batches.random_batch(lone=lone)
    objective = (batches.LONE if lone else batches.PAIRED)[name]
    whole = batches.loss_and_gradient(objective, logp_T, inputs)
    width = len(logp_T[:-3]) // 8  # the last three tokens are padding: a micro-batch with nothing in it
    sizes = [width, 2 * width, 5 * width, 3] if lone else [2 * width, 6 * width, 3]
    parts = batches.loss_and_gradient(objective, logp_T, inputs, sizes)
    torch.testing.assert_close(parts[:2], whole[:2], rtol=1e-9, atol=1e-12)
    assert parts[2] == pytest.approx(whole[2], rel=1e-5)


@pytest.mark.parametrize("name", batches.PAIRED)
def test_order_of_responses_changes_nothing(name: str) -> None:
    logp_T, inputs, _ = batches.random_batch()
    loss, gradient, metrics = batches.loss_and_gradient(batches.PAIRED[name], logp_T, inputs)
    order = torch.tensor([5, 0, 2, 7, 3, 1, 6, 4])  # rejected before chosen, pairs interleaved

    def shuffled(value_T):
        return torch.cat([value_T[:-3].view(8, -1)[order].flatten(), value_T[-3:]])

    columns = {field: shuffled(value) for field, value in inputs.fields().items()}
    mixed = preference.PreferenceInputs.from_fields(columns, inputs.sample_ids)  # numbered as they stand
    result = batches.loss_and_gradient(batches.PAIRED[name], shuffled(logp_T), mixed)
    torch.testing.assert_close(result[:2], (loss, shuffled(gradient)))
    assert result[2] == pytest.approx(metrics, rel=1e-5)


def rank_results(rank, world_size):
    results = {}
    for name, objective in {**batches.PAIRED, **batches.LONE}.items():
        logp_T, inputs, _ = batches.random_batch(lone=name in batches.LONE)
        half = len(logp_T[:-3]) // 4 * (1 if name in batches.LONE else 2)
        own = (logp_T.split([half, len(logp_T) - half])[rank], inputs.split([half, len(logp_T) - half])[rank])
        for prepare in (False, True):
            x = own[0].clone().requires_grad_()
            given = objective.prepare(policy_batches.scores_of(x), own[1]) if prepare else own[1]
            loss, _ = objective(policy_batches.scores_of(x), given)
            total = all_reduce_sum(torch.stack([loss.sum.detach(), loss.count.double()]))
            (gradient,) = torch.autograd.grad(loss.sum, x)
            results[name, prepare] = total[0] / total[1], gradient / total[1]
    return results


def test_two_ranks_change_nothing() -> None:
    ranks = run_ranks(rank_results, 2)
    for name, objective in {**batches.PAIRED, **batches.LONE}.items():
        logp_T, inputs, _ = batches.random_batch(lone=name in batches.LONE)
        loss, gradient, _ = batches.loss_and_gradient(objective, logp_T, inputs)
        for prepare in (False, True):
            torch.testing.assert_close(ranks[0][name, prepare][0], loss, msg=name)
            together = torch.cat([rank[name, prepare][1] for rank in ranks])
            torch.testing.assert_close(together, gradient, msg=name)


def test_baseline_of_one_micro_batch_and_of_the_step() -> None:
    logp_T, inputs, _ = batches.random_batch(lone=True)
    inputs = replace(inputs, ref_logprobs=inputs.ref_logprobs - 0.4)
    sizes = [60, 23]  # mismatched: sample 1 and 4 | 7
    z0 = []
    for prepare in (True, False):
        given = batches.LONE["KTO"].prepare(policy_batches.scores_of(logp_T), inputs) if prepare else inputs
        for part, logp in zip(given.split(sizes), logp_T.split(sizes), strict=True):
            metrics = batches.LONE["KTO"](policy_batches.scores_of(logp), part)[1]
            z0.append(metrics["kl"].mean.item())
    h = [float(ratio(r)) for r in ragged(logp_T, inputs) if r["mismatched"]]
    assert z0 == pytest.approx([sum(h) / 3, sum(h) / 3, (h[0] + h[1]) / 2, h[2]])


def test_extreme_log_ratios_stay_finite() -> None:
    ids = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7])
    for lone, objectives in ((False, batches.PAIRED), (True, batches.LONE)):
        for name, objective in objectives.items():
            logp = torch.tensor([0.0, 0, -1000, 0, 0, -1000, -1000, -1000], requires_grad=True)
            inputs = preference.PreferenceInputs(
                torch.ones(8).bool(), ids, ids // 2, ids % 2 == 0,
                torch.tensor([-1000.0, 0, 0, -1000, 0, 0, -1000, -1000]), mismatched=ids >= 6 if lone else None,
            )  # fmt: skip
            loss, _ = objective(policy_batches.scores_of(logp), inputs)
            loss.mean.backward()
            assert math.isfinite(loss.mean.item()), name
            assert bool(logp.grad.isfinite().all()), name
            assert name == "SFT tv token" or bool(logp.grad.any()), name
    # a pair that is as wrong as can be still learns, whatever the divergence
    for divergence in ("reverse_kl", "forward_kl", "js", "alpha"):
        h = torch.tensor([-1000.0, 1000.0], requires_grad=True)
        preference.DPO(f_divergence=divergence).pair_loss(h[:1], h[1:], torch.ones(2, 1)).sum().backward()
        assert h.grad[0] < 0, divergence


@pytest.mark.parametrize("name", [*batches.PAIRED, *batches.LONE])
def test_nothing_to_learn_from(name: str) -> None:
    logp_T, inputs, _ = batches.random_batch()
    empty = replace(inputs, response_mask=torch.zeros_like(inputs.response_mask))
    x = logp_T.clone().requires_grad_()
    loss, _ = ({**batches.PAIRED, **batches.LONE})[name](policy_batches.scores_of(x), empty)
    loss.sum.backward()
    assert (loss.sum.item(), loss.count.item()) == (0.0, 0.0)
    assert not x.grad.any()


# errors


def test_pairs_that_are_not_whole_are_named() -> None:
    logp_T, inputs, _ = batches.random_batch()  # pairs 40, 39, 38, 37 of 20 tokens each
    objective, scores = preference.DPO(), policy_batches.scores_of

    def fails(changed, message, x=logp_T):
        with pytest.raises(ValueError, match=message):
            objective(scores(x), changed)

    fails(inputs.split([50, 33])[0], "pair 38 has 1 chosen and 0 rejected .* whole into one micro-batch", logp_T[:50])
    masked = replace(inputs, response_mask=inputs.response_mask & (inputs.sample_ids != 2))
    fails(masked, "pair 39 has 0 chosen and 1 rejected .*at least one response token")
    same = replace(inputs, pair_ids=torch.where(inputs.pair_ids == 40, 39, inputs.pair_ids))
    fails(same, "pair 39 has 2 chosen and 2 rejected .*must be unique in a micro-batch")
    sides = replace(inputs, is_chosen=torch.ones_like(inputs.is_chosen))
    fails(sides, "pair 37 has 2 chosen and 0 rejected")
    lone = replace(inputs, pair_ids=torch.where(inputs.sample_ids == 3, -1, inputs.pair_ids))
    fails(lone, "sample 3 has response tokens but no pair id ≥ 0")
    uneven = replace(inputs, weights=torch.where(inputs.sample_ids == 5, 0.5, inputs.weights))
    fails(uneven, "weights of pair 38 must be the same on both responses, got 0.0 and 0.5")
    negative = replace(inputs, weights=-inputs.weights)
    fails(negative, r"weights of sample 0 = -0\.5 must be finite and at least 0")
    torn = inputs.pair_ids.clone()
    torn[inputs.response_mask.nonzero()[0]] = 7
    fails(replace(inputs, pair_ids=torn), "pair_ids must be the same on all response tokens .* differ in sample 0")
    fails(replace(inputs, ref_logprobs=None), r"DPO requires \['ref_logprobs'\]")
    spoiled = replace(inputs, ref_logprobs=torch.where(inputs.sample_ids == 2, torch.nan, inputs.ref_logprobs))
    fails(spoiled, "DPO: ref_logprobs is not finite on 7 response tokens, the first of sample 2")
    fails(inputs, r"scores of \(4,\) tokens for inputs of \(83,\)", logp_T[:4])
    kept = batches.random_batch(lone=True)[1]
    kept = replace(kept, response_mask=kept.response_mask & ~kept.mismatched)
    with pytest.raises(ValueError, match="none of 5 responses is marked in `mismatched`"):
        preference.KTO()(scores(logp_T), kept)
    with pytest.raises(ValueError, match=r"token_fields has no \['is_chosen'\]"):
        preference.PreferenceInputs.from_fields(
            {"pair_ids": inputs.pair_ids, "response_mask": inputs.response_mask}, inputs.sample_ids
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: preference.DPO(beta=0.0), r"beta = 0\.0 must be finite and above 0"),
        (lambda: preference.DPO(loss_type="exo"), "loss_type = 'exo' must be one of"),
        (lambda: preference.DPO(f_divergence="tv"), "f_divergence = 'tv' must be one of"),
        (lambda: preference.DPO(label_smoothing=0.5), r"label_smoothing = 0\.5 must be below 0\.5"),
        (lambda: preference.DPO(loss_type="hinge", label_smoothing=0.1), "goes with loss_type = 'sigmoid'"),
        (lambda: preference.DPO(robust=True), "robust = True needs label_smoothing > 0"),
        (lambda: preference.DPO(loss_type="ipo", length_normalized=False), "length_normalized = False does not go"),
        (lambda: preference.DPO(alpha=math.nan), "alpha = nan must be finite"),
        (lambda: preference.KTO(desirable_weight=-1.0), r"desirable_weight = -1\.0 must be finite and at least 0"),
        (lambda: preference.KTO(baseline="mean"), "baseline = 'mean' must be one of"),
        (lambda: preference.ImplicitRewardSFT("kl"), "divergence = 'kl' must be one of"),
        (lambda: preference.ImplicitRewardSFT(level="word"), "level = 'word' must be one of"),
        (lambda: preference.ImplicitRewardSFT(clip=1.0), r"clip = 1\.0 must be finite and above 1"),
    ],
)
def test_options_are_checked(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_objectives_are_made_from_configurations() -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(preference.PreferenceObjective, "objective")
    for name, options in (("DPO", {"label_smoothing": 0.1}), ("KTO", {"beta": 0.2}), ("ImplicitRewardSFT", {})):
        class_path = f"lit_interns1.objectives.preference.{name}"
        configuration = parser.parse_object({"objective": {"class_path": class_path, "init_args": options}})
        made = parser.instantiate(configuration).objective
        assert type(made).__name__ == name
        assert all(getattr(made, option) == value for option, value in options.items())

"""Losses of reward models: closed forms, pairs of rankings by loops, worked examples. Against TRL: see preference/."""

import itertools
import math

import pytest
import torch

from lit_interns1.objectives.reward import BradleyTerry, PolarPretrainLoss, PolarRankingLoss, ranking_pairs


def test_by_hand() -> None:
    # differences ln 3, 0, −ln 3, with margins 0, ln 2, ln 2: σ = ¾, 1/3, 1/7
    log3, log2 = math.log(3), math.log(2)
    chosen = torch.tensor([log3, 1.0, 0.0], dtype=torch.float64, requires_grad=True)
    rejected, margin = torch.tensor([0.0, 1.0, log3]), torch.tensor([0.0, log2, log2])
    weight = torch.tensor([1.0, 0.5, 2.0])
    loss, metrics = BradleyTerry(center_rewards_coefficient=0.1)(chosen, rejected, margin, weight)
    loss.mean.backward()
    wanted = [math.log(4 / 3), math.log(3), math.log(7)]
    centre = [0.1 * log3**2, 0.4, 0.1 * log3**2]
    assert loss.sum.item() == pytest.approx(sum(w * (a + b) for w, a, b in zip([1, 0.5, 2], wanted, centre)))
    assert loss.count.item() == 3
    slopes = [-1 / 4 + 0.2 * log3, 0.5 * (-2 / 3 + 0.4), 2 * (-6 / 7 + 0.2 * log3)]
    assert chosen.grad.tolist() == pytest.approx([s / 3 for s in slopes], rel=1e-6)
    values = {name: metric.mean.item() for name, metric in metrics.items()}
    assert values == pytest.approx(
        {"accuracy": 0.5, "margin": 0.0, "score": (2 * log3 + 2) / 6, "loss": loss.mean.item()}, abs=1e-6
    )  # the tie counts one half
    constant, _ = BradleyTerry(margin=log2)(chosen, rejected)
    same, _ = BradleyTerry()(chosen, rejected, torch.full((3,), log2))
    assert constant.sum.item() == pytest.approx(same.sum.item())


def test_gradient_by_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    objective = BradleyTerry(0.3, 0.2)
    assert torch.autograd.gradcheck(lambda x: objective(x[0], x[1])[0].sum, scores)


def test_parts_add_up() -> None:
    generator = torch.Generator().manual_seed(1)
    chosen, rejected = torch.randn(2, 7, generator=generator)
    whole, metrics = BradleyTerry(center_rewards_coefficient=0.1)(chosen, rejected)
    parts = [
        BradleyTerry(center_rewards_coefficient=0.1)(a, b)
        for a, b in zip(chosen.split([1, 6, 0]), rejected.split([1, 6, 0]))
    ]
    assert sum(loss.sum for loss, _ in parts).item() == pytest.approx(whole.sum.item(), rel=1e-6)
    assert sum(loss.count for loss, _ in parts).item() == 7
    for name, metric in metrics.items():
        assert sum(m[name].sum for _, m in parts).item() == pytest.approx(metric.sum.item(), abs=1e-5)
        assert sum(m[name].count for _, m in parts).item() == metric.count.item()


def test_extreme_scores_stay_finite() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        scores = torch.tensor([1e3, -1e3, 0.0, 0.0], dtype=dtype, requires_grad=True)
        loss, _ = BradleyTerry()(scores, scores.detach().flip(0))
        loss.mean.backward()
        assert loss.sum.dtype == torch.float32
        assert loss.sum.item() == pytest.approx(2000.0)
        assert bool(scores.grad.isfinite().all())


def test_polar_losses_are_those_of_the_paper() -> None:
    r_same, r_other = torch.tensor([0.5, -2.0]), torch.tensor([-0.5, 1.0])
    wanted = [math.log(1 + math.exp(-1)), math.log(1 + math.exp(3))]
    for objective in (PolarPretrainLoss(), PolarRankingLoss()):
        loss, metrics = objective(r_same, r_other)
        assert loss.mean.item() == pytest.approx(sum(wanted) / 2)
        assert metrics["accuracy"].mean.item() == 0.5


def test_rankings_are_all_pairs() -> None:
    # two rankings, mixed: four candidates (two of them tied) and two; and one candidate alone
    ranking = torch.tensor([5, 2, 5, 5, 2, 9, 5])
    place = torch.tensor([3, 2, 1, 2, 1, 1, 2])
    score = torch.tensor([0.1, 0.4, -1.0, 2.0, 0.3, 8.0, -0.2], dtype=torch.float64, requires_grad=True)
    pairs = [
        (i, j)
        for i, j in itertools.permutations(range(7), 2)
        if ranking[i] == ranking[j] and place[i] < place[j]
    ]  # fmt: skip
    assert len(pairs) == 6
    better, worse = ranking_pairs(ranking, place)
    assert sorted(zip(better.tolist(), worse.tolist(), strict=True)) == sorted(pairs)
    loss, _ = PolarRankingLoss().rankings(score, ranking, place)
    values = [math.log(1 + math.exp((score[j] - score[i]).item())) for i, j in pairs]
    assert loss.mean.item() == pytest.approx(sum(values) / 6)
    assert loss.count.item() == 6
    triple, _ = PolarRankingLoss().rankings(torch.tensor([1.0, 3.0]), torch.zeros(2), torch.tensor([2, 1]))
    assert triple.mean.item() == pytest.approx(math.log(1 + math.exp(-2)))


def test_errors() -> None:
    three, two = torch.zeros(3), torch.zeros(2)
    with pytest.raises(ValueError, match=r"rejected_P \(2,\) must be a vector like chosen_P \(3,\)"):
        BradleyTerry()(three, two)
    with pytest.raises(ValueError, match=r"margin_P \(2,\) must be a vector"):
        BradleyTerry()(three, three, two)
    with pytest.raises(ValueError, match=r"chosen_P \(3, 1\)"):
        BradleyTerry()(three[:, None], three[:, None])
    with pytest.raises(ValueError, match="center_rewards_coefficient = -1 must be finite and at least 0"):
        BradleyTerry(center_rewards_coefficient=-1)
    with pytest.raises(ValueError, match="margin = inf must be finite"):
        BradleyTerry(margin=math.inf)
    with pytest.raises(ValueError, match=r"score_N \(3,\) must be a vector like ranking_N \(2,\)"):
        PolarRankingLoss().rankings(three, two, two)
    with pytest.raises(ValueError, match=r"ranking_N \(2,\) and place_N \(3,\)"):
        PolarRankingLoss().rankings(three, two, three)

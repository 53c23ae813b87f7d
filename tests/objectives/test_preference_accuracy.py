"""Accuracy of pairs against NumPy, and over ranks that have unequal numbers of pairs."""

import math

import numpy as np
import pytest
import torch

from distributed_harness import run_ranks
from lit_interns1.objectives.preference_accuracy import PreferenceAccuracy


def pairs(count: int = 40) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    chosen = torch.randint(0, 4, (count,), generator=generator).float()
    rejected = torch.randint(0, 3, (count,), generator=generator).float()
    return chosen, rejected, torch.randint(0, 3, (count,), generator=generator).float()


def expected(chosen: torch.Tensor, rejected: torch.Tensor, weights: torch.Tensor) -> tuple[float, float]:
    right = [1.0 if c > r else 0.5 if c == r else 0.0 for c, r in zip(chosen.tolist(), rejected.tolist(), strict=True)]
    values, w = np.array(right), weights.double().numpy()
    mean = float((w * values).sum() / w.sum())
    count = int((w > 0).sum())
    variance = count / (count - 1) * float((w**2 * (values - mean) ** 2).sum()) / float(w.sum()) ** 2
    return mean, math.sqrt(variance)


def test_unweighted_is_the_mean_of_right_answers_and_its_standard_error() -> None:
    chosen, rejected, _ = pairs()
    metric = PreferenceAccuracy()
    metric.update(chosen[:7], rejected[:7])
    metric.update(chosen[7:], rejected[7:])
    accuracy = metric.compute()
    right = np.where(chosen > rejected, 1.0, np.where(chosen == rejected, 0.5, 0.0))
    assert float(accuracy) == pytest.approx(right.mean(), rel=1e-12)
    assert float(metric.standard_error) == pytest.approx(right.std(ddof=1) / math.sqrt(len(right)), rel=1e-9)


def test_scores_that_are_all_alike_are_worth_a_coin() -> None:
    metric = PreferenceAccuracy()
    metric.update(torch.zeros(5), torch.zeros(5))
    assert float(metric.compute()) == 0.5


def test_weights_and_pairs_without_weight() -> None:
    chosen, rejected, weights = pairs()
    metric = PreferenceAccuracy()
    chosen_with_padding = chosen.masked_fill(weights == 0, math.nan)
    metric.update(chosen_with_padding, rejected, weights)
    mean, error = expected(chosen, rejected, weights)
    assert float(metric.compute()) == pytest.approx(mean, rel=1e-12)
    assert float(metric.standard_error) == pytest.approx(error, rel=1e-9)


def test_a_score_that_is_no_number_is_not_a_wrong_answer() -> None:
    metric = PreferenceAccuracy()
    metric.update(torch.tensor([1.0, math.nan]), torch.tensor([0.0, 0.0]))
    assert math.isnan(float(metric.compute()))


@pytest.mark.parametrize("count", [0, 1])
def test_no_standard_error_of_fewer_than_two_pairs(count: int) -> None:
    metric = PreferenceAccuracy()
    metric.update(torch.ones(count), torch.zeros(count))
    assert float(metric.compute()) == 1.0 or count == 0
    assert math.isnan(float(metric.standard_error))


@pytest.mark.parametrize(
    ("shapes", "weight", "message"),
    [((3, 2, None), 1.0, r"\(3,\), \(2,\)"), ((3, 3, 2), 1.0, "vectors"), ((3, 3, 3), -1.0, "at least 0, got -1")],
)
def test_bad_pairs(shapes: tuple[int, int, int | None], weight: float, message: str) -> None:
    chosen, rejected, size = shapes
    weights = None if size is None else torch.full((size,), weight)
    with pytest.raises(ValueError, match=message):
        PreferenceAccuracy().update(torch.ones(chosen), torch.ones(rejected), weights)


def ranks(rank: int, world_size: int) -> tuple[float, float]:
    chosen, rejected, weights = pairs()
    part = slice(0, 33) if rank == 0 else slice(33, 40) if rank == 1 else slice(40, 40)
    metric = PreferenceAccuracy()
    metric.update(chosen[part], rejected[part], weights[part])
    return float(metric.compute()), float(metric.standard_error)


def test_ranks_agree_on_what_one_process_says() -> None:
    mean, error = expected(*pairs())
    for result in run_ranks(ranks, 3):
        assert result == (pytest.approx(mean, rel=1e-12), pytest.approx(error, rel=1e-9))

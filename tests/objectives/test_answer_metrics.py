"""pass@k by enumeration and exact fractions; votes by a plain loop; both over ranks."""

import itertools
import math
import random
from fractions import Fraction

import pytest
import torch

from distributed_harness import run_ranks
from lit_interns1.objectives.answer_metrics import (
    VOTE_RULES,
    AnswerMetrics,
    answer_ids,
    pass_at_k,
    vote,
    vote_correct,
)


def correct(right: int, samples: int) -> torch.Tensor:
    return torch.arange(samples) < right


@pytest.mark.parametrize("samples", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(samples: int) -> None:
    for right in range(samples + 1):
        for k in range(1, samples + 1):
            subsets = list(itertools.combinations(range(samples), k))
            hit = sum(min(subset) < right for subset in subsets)
            assert pass_at_k(correct(right, samples), k) == pytest.approx(hit / len(subsets), abs=1e-14)


def test_pass_at_k_of_many_samples_keeps_its_digits() -> None:
    for samples, right, k in ((20_000, 3, 1), (20_000, 19_000, 7), (5_000, 2_000, 900)):
        exact = 1 - Fraction(math.comb(samples - right, k), math.comb(samples, k))
        assert pass_at_k(correct(right, samples), k) == pytest.approx(float(exact), rel=1e-13)


def reference_vote(answers: list[str | None], lengths: list[int], rule: str) -> str | None:
    """The rules as their papers say them."""
    groups: dict[str, list[int]] = {}
    for answer, length in zip(answers, lengths, strict=True):
        if answer is not None:
            groups.setdefault(answer, []).append(length)
    if not groups:
        return None
    scores = {
        "majority": {a: Fraction(len(g)) for a, g in groups.items()},
        "shortest": {a: -Fraction(min(g)) for a, g in groups.items()},
        "shortest_majority": {a: len(g) / math.log(max(sum(g) / len(g), 2)) for a, g in groups.items()},
    }[rule]
    return max(scores, key=scores.__getitem__)  # the first of equals, in order of appearance


@pytest.mark.parametrize("rule", VOTE_RULES)
def test_votes_equal_a_plain_loop(rule) -> None:
    generator = random.Random(4)
    for _ in range(300):
        size = generator.randint(1, 12)
        answers = [generator.choice([None, "a", "b", "c", "d"]) for _ in range(size)]
        lengths = [generator.randint(1, 400) for _ in range(size)]
        winner = vote(answer_ids(answers), torch.tensor(lengths), rule)
        expected = reference_vote(answers, lengths, rule)
        assert winner == (-1 if expected is None else answer_ids(answers)[answers.index(expected)])


def test_three_short_beat_three_long_and_even_four_very_long() -> None:
    ids, lengths = torch.tensor([0] * 3 + [1] * 3), torch.tensor([1000] * 3 + [400] * 3)
    assert vote(ids, lengths, "shortest_majority") == 1  # 3 / ln 1000 = 0.434 < 3 / ln 400 = 0.501
    ids, lengths = torch.tensor([0] * 4 + [1] * 3), torch.tensor([10_000] * 4 + [400] * 3)
    assert vote(ids, lengths, "shortest_majority") == 1  # 4 / ln 10000 = 0.434
    assert vote(ids, lengths, "majority") == 0


def test_equal_lengths_make_it_a_majority_vote_even_where_it_is_a_tie() -> None:
    for seed in range(50):
        ids = torch.randint(-1, 3, (7,), generator=torch.Generator().manual_seed(seed))
        for length in (0, 1, 2, 600):
            assert vote(ids, torch.full((7,), length), "shortest_majority") == vote(ids)


def test_scores_that_are_equal_but_for_rounding_go_to_the_first() -> None:
    ids = torch.tensor([0, 1, 1, 1])  # 1 / ln 10 = 3 / ln 1000
    lengths = torch.tensor([10, 1000, 1000, 1000])
    assert vote(ids, lengths, "shortest_majority") == 0
    assert vote(ids.flip(0), lengths.flip(0), "shortest_majority") == 1


def test_lengths_below_two_count_as_two() -> None:
    ids = torch.tensor([0, 1, 1])
    assert vote(ids, torch.tensor([1, 3, 3]), "shortest_majority") == 1  # 1 / ln 2 = 1.44 < 2 / ln 3 = 1.82
    assert vote(ids, torch.tensor([0, 5, 5]), "shortest_majority") == 0  # 1.44 > 2 / ln 5 = 1.24


def test_answers_are_numbered_in_their_order_and_the_unreadable_do_not_vote() -> None:
    assert answer_ids(["7", None, "x", "7"]).tolist() == [0, -1, 1, 0]
    ids = answer_ids([None, None, None, "4"])
    assert vote(ids) == 0
    assert vote(ids, torch.tensor([1, 1, 1, 99]), "shortest") == 0
    assert vote(answer_ids([None, None])) == -1
    assert vote_correct(torch.zeros(2), answer_ids([None, None])) == 0.0


def test_a_vote_is_as_right_as_the_samples_that_gave_the_winner() -> None:
    ids = torch.tensor([3, 5, 3, 3, 5])
    assert vote_correct(torch.tensor([1, 0, 1, 1, 0]), ids) == 1.0
    assert vote_correct(torch.tensor([1, 0, 1, 0, 0]), ids) == pytest.approx(2 / 3)


def questions() -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(8)
    made = []
    for _ in range(11):
        ids = torch.randint(-1, 4, (6,), generator=generator)
        made.append((ids == 2, ids, torch.randint(1, 300, (6,), generator=generator)))
    return made


def expected_metrics() -> tuple[dict[str, float], dict[str, float]]:
    columns: dict[str, list[float]] = {name: [] for name in ("pass_at_1", "pass_at_4", *VOTE_RULES)}
    tokens: dict[bool, list[int]] = {True: [], False: []}
    for right, ids, lengths in questions():
        columns["pass_at_1"].append(float(right.double().mean()))
        columns["pass_at_4"].append(1 - math.comb(int((~right).sum()), 4) / math.comb(6, 4))
        answers = [None if i < 0 else str(i) for i in ids.tolist()]
        for rule in VOTE_RULES:
            columns[rule].append(float(reference_vote(answers, lengths.tolist(), rule) == "2"))
        for is_right, length in zip(right.tolist(), lengths.tolist(), strict=True):
            tokens[is_right].append(length)
    means = {name: sum(column) / len(column) for name, column in columns.items()}
    means |= {"length_right": sum(tokens[True]) / len(tokens[True])}
    means |= {"length_wrong": sum(tokens[False]) / len(tokens[False])}
    errors = {
        name: math.sqrt(sum((x - means[name]) ** 2 for x in column) / (len(column) - 1) / len(column))
        for name, column in columns.items()
    }
    return means, errors


def on_ranks(rank: int, world_size: int) -> tuple[dict[str, float], dict[str, float]]:
    metric = AnswerMetrics(ks=(1, 4), rules=VOTE_RULES)
    for question in questions()[:8] if rank == 0 else questions()[8:] if rank == 1 else []:
        metric.update(*question)
    return metric.compute(), metric.standard_errors


def test_means_and_standard_errors_over_questions_and_ranks() -> None:
    means, errors = expected_metrics()
    metric = AnswerMetrics(ks=(1, 4), rules=VOTE_RULES)
    for question in questions():
        metric.update(*question)
    for found in [(metric.compute(), metric.standard_errors), *run_ranks(on_ranks, 3)]:
        assert found[0] == pytest.approx(means, rel=1e-12)
        assert found[1] == pytest.approx(errors, rel=1e-9)


def test_without_answers_and_lengths_only_pass_at_k() -> None:
    metric = AnswerMetrics(ks=(2,))
    metric.update(torch.tensor([True, False, False]))
    result = metric.compute()
    assert result["pass_at_2"] == pytest.approx(2 / 3)
    assert math.isnan(result["length_right"])
    assert math.isnan(metric.standard_errors["pass_at_2"])


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: pass_at_k(torch.ones(3), 4), "k = 4 of 3 samples"),
        (lambda: pass_at_k(torch.ones(3), 0), "k = 0"),
        (lambda: pass_at_k(torch.tensor([0.5, 1.0]), 1), r"0 \(wrong\) and 1 \(right\)"),
        (lambda: vote(torch.tensor([0, 1]), None, "shortest"), "'shortest' needs the lengths"),
        (lambda: vote(torch.tensor([0, 1]), torch.tensor([1]), "shortest"), "one for each of 2"),
        (lambda: vote(torch.tensor([0]), torch.tensor([-1]), "shortest"), "at least 0"),
        (lambda: vote(torch.tensor([0]), None, "longest"), "'longest' must be one of majority"),
        (lambda: AnswerMetrics(ks=(0,)), "at least 1"),
        (lambda: AnswerMetrics(rules=("longest",)), "longest"),
        (lambda: AnswerMetrics(rules=("majority",)).update(torch.ones(2)), "need answer_ids_G"),
    ],
)
def test_refused(action, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        action()

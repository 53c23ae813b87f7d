"""Metrics of load balance against closed forms."""

import math

import pytest
import torch

from lit_interns1.nn.moe import load_metrics as m
from lit_interns1.nn.moe.statistics import LogitStats, RouterStats

COUNTS = torch.tensor([10.0, 20.0, 30.0, 40.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (m.max_violation, 0.6), (m.min_violation, 0.6), (m.coefficient_of_variation, math.sqrt(0.2)),
        (m.load_entropy, 1.2798542258336676), (m.normalized_entropy, 1.2798542258336676 / math.log(4)),
        (m.load_deviation, 0.4),
        (m.gini, 0.25), (m.effective_experts, math.exp(1.2798542258336676)), (m.dead_experts, 0),
        (m.starved_experts, 0),
    ],
)  # fmt: skip
def test_metrics_of_four_unequal_experts(metric, expected):
    assert float(metric(COUNTS)) == pytest.approx(expected, rel=1e-7)
    shuffled = COUNTS[[2, 0, 3, 1]].expand(2, 3, 4)
    torch.testing.assert_close(metric(shuffled), metric(COUNTS).expand(2, 3))


@pytest.mark.parametrize(
    ("metric", "one", "none"),
    [
        (m.max_violation, 3.0, 0), (m.min_violation, 1.0, 0), (m.coefficient_of_variation, math.sqrt(3), 0),
        (m.gini, 0.75, 0), (m.normalized_entropy, 0, 1), (m.effective_experts, 1, 4), (m.load_deviation, 1.5, 0),
        (m.dead_experts, 3, 4),
    ],
)  # fmt: skip
def test_one_expert_gets_all_and_nobody_gets_anything(metric, one, none):
    assert float(metric(torch.tensor([0.0, 7.0, 0.0, 0.0]))) == pytest.approx(one, abs=1e-6)
    assert float(metric(torch.zeros(4))) == pytest.approx(none, abs=1e-6)


def test_balance_loss_drops_groups_and_drift():
    uniform = torch.full((4,), 0.25, dtype=torch.float64)
    assert float(m.balance(COUNTS, uniform)) == pytest.approx(1.0)
    assert float(m.balance(COUNTS, COUNTS / 100)) == pytest.approx(1.2)
    assert float(m.drop_rate(COUNTS, 1.2)) == pytest.approx(0.1)  # capacity 30
    assert float(m.drop_rate(COUNTS, 1.0)) == pytest.approx(0.2)  # capacity 25: 5 + 15
    assert m.group_counts(COUNTS, 2).tolist() == [30, 70]
    with pytest.raises(ValueError, match="4 experts cannot be divided into 3 groups"):
        m.group_counts(COUNTS, 3)
    assert int(m.starved_experts(torch.tensor([1.0, 20.0, 20.0, 20.0]))) == 1
    before, after = torch.tensor([[0, 1], [0, 1], [0, 1]]), torch.tensor([[1, 0], [1, 2], [2, 3]])
    torch.testing.assert_close(m.routing_drift(before, after), torch.tensor([0.0, 2 / 3, 1.0]))


def test_statistics_of_logits_leave_padding_out():
    logits = torch.tensor([[1.0, 2.0], [3.0, -1.0], [50.0, torch.nan]])
    mask = torch.tensor([True, True, False])
    p = logits.softmax(-1)
    found = LogitStats.measure(logits, p, mask)
    assert float(found.maximum) == 3.0
    assert float(found.logit_sum) == pytest.approx(1.5 + 1.0)
    assert float(found.top_probability_sum) == pytest.approx(float(p[0, 1] + p[1, 0]))
    assert float(found.entropy_sum) == pytest.approx(float(-(p[:2] * p[:2].log()).sum()))
    ids = torch.zeros(3, 1, dtype=torch.long)
    assert RouterStats.measure(logits, p, ids, mask).logits is None
    assert float(LogitStats.measure(logits[:0], p[:0]).maximum) == -torch.inf

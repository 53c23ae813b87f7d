import pytest
import torch

from lit_interns1.training import (
    GlobalBatch,
    LossWindow,
    SummedLoss,
    TokenClockState,
    TokenCounts,
    WindowMeans,
    count_tokens,
)


@pytest.mark.parametrize(("rows", "micro", "ranks"), [(12, 4, 1), (12, 2, 2), (12, 3, 4), (12, 1, 1), (12, 12, 1)])
def test_every_step_reads_its_rows_once_whatever_the_ranks(rows, micro, ranks):
    batch = GlobalBatch(rows, micro, ranks)
    for step in range(3):
        read = [
            row
            for part in range(batch.accumulation)
            for rank in range(ranks)
            for row in batch.rows_of(step * batch.accumulation + part, rank)
        ]
        assert read == list(range(step * rows, (step + 1) * rows))


def test_batches_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"12 rows is not divisible by micro-batch × ranks = 5 × 1 = 5"):
        GlobalBatch(12, 5)
    with pytest.raises(ValueError, match="micro_batch_rows must be at least 1, got 0"):
        GlobalBatch(12, 0)


def test_summed_loss():
    loss = SummedLoss(torch.tensor(6.0, requires_grad=True), torch.tensor(4.0))
    assert loss.mean.item() == 1.5
    joined = loss.plus_mean(torch.tensor(0.25))
    assert (joined.sum.item(), joined.count.item(), joined.mean.item()) == (7.0, 4.0, 1.75)
    assert SummedLoss(torch.tensor(0.0), torch.tensor(0.0)).mean.item() == 0.0
    assert SummedLoss(torch.tensor(3.0), 2).mean.item() == 1.5
    with pytest.raises(ValueError, match=r"must be a scalar, got shape \(2,\)"):
        SummedLoss(torch.ones(2), torch.tensor(1.0))
    with pytest.raises(ValueError, match="must not require grad"):
        SummedLoss(torch.tensor(1.0), torch.tensor(1.0, requires_grad=True))


def test_loss_window():
    window = LossWindow()
    window.add(SummedLoss(torch.tensor(1.0), torch.tensor(3.0)))
    window.add(SummedLoss(torch.tensor(1.0), torch.tensor(5.0)))
    count = window.local_count(torch.device("cpu"))
    assert count.item() == 8
    assert window.local_count(torch.device("cpu")).item() == 0
    assert LossWindow.gradient_factor(count, 2).item() == 0.25
    assert LossWindow.gradient_factor(torch.tensor(0.0), 2).item() == 0.0
    gradients = [torch.ones(3), torch.ones(2, dtype=torch.float64), torch.ones(1, dtype=torch.bfloat16)]
    LossWindow.scale(gradients, torch.tensor(0.5, dtype=torch.float64))
    assert all((gradient == 0.5).all() for gradient in gradients)


def test_window_means_are_weighted():
    means = WindowMeans()
    means.add({"a": torch.tensor(1.0), "b": torch.tensor(2.0)}, 1)
    means.add({"a": torch.tensor(4.0), "b": torch.tensor(2.0)}, torch.tensor(3.0))
    assert {name: value.item() for name, value in means.reduce().items()} == {"a": 3.25, "b": 2.0}
    assert means.reduce() == {}


@pytest.mark.parametrize(
    ("batch", "counts"),
    [
        ({"num_tokens": 7, "num_loss_tokens": 5}, (7, 5)),
        ({"num_tokens": torch.tensor(7)}, (7, 7)),
        ({"attention_mask": torch.tensor([[1, 1, 0]]), "input_ids": torch.ones(1, 3)}, (2, 2)),
        ({"input_ids": torch.ones(2, 3), "labels": torch.tensor([[1, -100, 2], [-100, -100, 3]])}, (6, 3)),
        (torch.ones(4, 5), (20, 20)),
        ([torch.ones(4, 5), torch.ones(4)], (20, 20)),
    ],
)
def test_tokens_of_any_batch(batch, counts):
    assert tuple(count_tokens(batch)) == counts


def test_what_cannot_be_counted_asks_for_a_counter():
    with pytest.raises(TypeError, match=r"type str: .* pass TokenClock\(counter=...\)"):
        count_tokens("text")
    assert count_tokens("text", len) == (4, 4)


def test_clock_state_round_trip_forgets_the_step_in_progress():
    clock = TokenClockState()
    clock.add(TokenCounts(5, 4))
    clock.commit(TokenCounts(10, 8))
    clock.add(TokenCounts(1, 1))
    restored = TokenClockState()
    restored.load_state_dict(clock.state_dict())
    assert (restored.tokens, restored.loss_tokens, restored.steps) == (10, 8, 1)
    assert restored.pending == (0, 0)

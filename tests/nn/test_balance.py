import pytest
import torch

from lit_interns1.nn.moe import BalanceLoss, RouterStats


def stats(counts, probabilities=None, tokens=None, per_token=1):
    counts = torch.tensor(counts, dtype=torch.float32)
    tokens = counts.sum() / per_token if tokens is None else torch.tensor(float(tokens))
    share = counts / counts.sum() if probabilities is None else torch.tensor(probabilities)
    return RouterStats(counts, share * tokens, torch.tensor(9.0) * tokens, tokens)


def test_worked_values():
    uniform = [0.25] * 4
    assert BalanceLoss("layer", 1.0)([stats([10, 20, 30, 40], uniform)])[0].item() == pytest.approx(1.0)
    assert BalanceLoss("layer", 1.0)([stats([10, 20, 30, 40])])[0].item() == pytest.approx(1.2)
    # K = 2 balanced: 1 per layer in the per-layer form, K in the Hugging Face form
    balanced = [stats([20, 20, 20, 20], per_token=2)] * 3
    assert BalanceLoss("layer", 1.0)(balanced)[0].item() == pytest.approx(3.0)
    assert BalanceLoss("huggingface", 1.0)(balanced)[0].item() == pytest.approx(2.0)
    loss, parts = BalanceLoss("layer", 0.0, z_coefficient=0.5)(balanced)
    assert parts["router_z"].item() == pytest.approx(27.0)
    assert loss.item() == pytest.approx(13.5)


def test_imbalance_of_one_layer_hides_only_in_the_hugging_face_form():
    opposite = [stats([40, 0]), stats([0, 40])]
    assert BalanceLoss("layer", 1.0)(opposite)[0].item() == pytest.approx(4.0)
    assert BalanceLoss("huggingface", 1.0)(opposite)[0].item() == pytest.approx(1.0)


def test_global_form_uses_the_counts_of_the_whole_step():
    loss = BalanceLoss("global", 1.0)
    first, second = [stats([30, 10])], [stats([10, 30])]
    assert loss(first)[0].item() == pytest.approx(2 * (0.75 * 0.75 + 0.25 * 0.25))
    assert loss(second)[0].item() == pytest.approx(1.0)  # 40 : 40 over the window
    loss.start_step()
    assert loss(second)[0].item() == pytest.approx(1.25)


def test_gradient_reaches_probabilities_and_not_counts():
    probability_sum = torch.tensor([30.0, 10.0], requires_grad=True)
    layer = RouterStats(torch.tensor([30.0, 10.0]), probability_sum, torch.tensor(0.0), torch.tensor(40.0))
    BalanceLoss("layer", 1.0)([layer])[0].backward()
    torch.testing.assert_close(probability_sum.grad, torch.tensor([2 * 0.75 / 40, 2 * 0.25 / 40]))


def test_dense_models_have_no_balance_loss_and_options_are_checked():
    assert BalanceLoss()([]) == (None, {})
    with pytest.raises(ValueError, match="balance mode 'micro' is unknown"):
        BalanceLoss("micro")
    with pytest.raises(ValueError, match="coefficient must not be negative, got -1"):
        BalanceLoss(coefficient=-1)


def test_foreign_gate_logits_give_the_same_statistics():
    logits = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    foreign = RouterStats.from_logits(logits, 2)
    ids = logits.topk(2).indices
    assert torch.equal(foreign.counts_E, torch.bincount(ids.flatten(), minlength=6).float())
    torch.testing.assert_close(foreign.mean_probability_E, logits.softmax(-1).mean(0))
    torch.testing.assert_close(foreign.z_square_sum, logits.logsumexp(-1).square().sum())

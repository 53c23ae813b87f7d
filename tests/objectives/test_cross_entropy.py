from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from lit_interns1.nn.head import LanguageModelHead, TokenScores
from lit_interns1.objectives import NextTokenCrossEntropy

TOKENS, HIDDEN, VOCABULARY = 24, 8, 31


def example() -> tuple[torch.Tensor, LanguageModelHead, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    head = LanguageModelHead(HIDDEN, VOCABULARY, chunk_tokens=5, initializer_std=0.7)
    hidden = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    labels = torch.randint(0, VOCABULARY, (TOKENS,))
    sample = torch.tensor([0] * 4 + [1] * 10 + [2] * 7 + [-1] * 3)
    labels[[0, 4, 5, 14]] = -100
    labels[sample < 0] = -100
    return hidden, head, labels, sample


def test_token_weights_and_sum_equal_library_cross_entropy() -> None:
    hidden, head, labels, _ = example()
    objective = NextTokenCrossEntropy()
    loss, metrics = objective(head(hidden, labels), labels)
    expected = F.cross_entropy(hidden @ head.weight.T, labels, reduction="sum", ignore_index=-100)
    torch.testing.assert_close(loss.sum, expected)
    torch.testing.assert_close(loss.mean, F.cross_entropy(hidden @ head.weight.T, labels))
    assert loss.count.item() == int((labels != -100).sum()) == 17
    assert loss.sum.dtype == loss.count.dtype == torch.float32
    torch.testing.assert_close(metrics["cross_entropy"], expected.detach())
    assert not any(value.requires_grad for value in metrics.values())
    assert objective.requires == frozenset()


def test_square_root_weights_by_hand() -> None:
    _, _, labels, sample = example()
    weight = NextTokenCrossEntropy(sample_weighting="square_root").token_weights(labels, sample)
    expected = [0.0] * TOKENS
    for s in range(3):
        mine = [t for t in range(TOKENS) if sample[t] == s and labels[t] != -100]
        for t in mine:
            expected[t] = 1 / math.sqrt(len(mine))
    torch.testing.assert_close(weight, torch.tensor(expected))
    assert weight.dtype == torch.float32


def test_samples_weigh_by_the_root_of_their_length() -> None:
    labels, sample = torch.zeros(20, dtype=torch.int64), torch.tensor([0] * 4 + [1] * 16)
    weight = NextTokenCrossEntropy(sample_weighting="square_root").token_weights(labels, sample)
    assert weight[sample == 0].sum().item() == pytest.approx(2.0)
    assert weight[sample == 1].sum().item() == pytest.approx(4.0)


@pytest.mark.parametrize("weighting", ["token", "square_root"])
@pytest.mark.parametrize("z_loss", [0.0, 0.05])
@pytest.mark.parametrize("hinted", [False, True])
def test_loss_and_gradients_against_whole_logits(weighting, z_loss: float, hinted: bool) -> None:
    hidden, head, labels, sample = example()
    objective = NextTokenCrossEntropy(z_loss, weighting)
    hint = objective.gradient_hint(labels, sample) if hinted else None
    scores = head(hidden, labels, gradient_hint=hint)
    loss, metrics = objective(scores, labels, sample)
    node = scores.logp_T.grad_fn
    (loss.sum * 0.25).backward()

    wide_hidden = hidden.detach().double().requires_grad_()
    wide_weight = head.weight.detach().double().requires_grad_()
    logits = wide_hidden @ wide_weight.T
    nats = F.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
    log_z = logits.logsumexp(-1)
    counts = [int(((sample == s) & (labels >= 0)).sum()) for s in sample.tolist()]
    weight = torch.tensor(
        [0.0 if y < 0 else 1.0 if weighting == "token" else n**-0.5 for y, n in zip(labels.tolist(), counts)]
    ).double()
    expected = (weight * (nats + z_loss * log_z**2)).sum()
    (expected * 0.25).backward()
    torch.testing.assert_close(loss.sum.double(), expected.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(loss.count.double(), weight.sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(metrics["cross_entropy"].double(), (weight * nats).sum().detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(metrics["z"].double(), (weight * log_z**2).sum().detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(hidden.grad.double(), wide_hidden.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(head.weight.grad.double(), wide_weight.grad, rtol=1e-5, atol=1e-6)
    assert node.promised is None  # used up, or never made


@pytest.mark.parametrize("z_loss", [0.0, 1e-4])
@pytest.mark.parametrize("scale", [1.0, 1 / 7, 65536.0, 3e-9])
def test_hint_is_what_the_loss_asks_for(z_loss: float, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    from lit_interns1_kernels import linear_token_scores as kernel

    factors = []
    original = kernel._promise_factor
    monkeypatch.setattr(kernel, "_promise_factor", lambda *a: factors.append(original(*a)) or factors[-1])
    hidden, head, labels, sample = example()
    objective = NextTokenCrossEntropy(z_loss, "square_root")
    scores = head(hidden, labels, gradient_hint=objective.gradient_hint(labels, sample))
    (objective(scores, labels, sample)[0].sum / 3 * scale).backward()
    assert factors == [pytest.approx(scale / 3, rel=1e-6)]


def test_parts_of_a_batch_add_up_to_the_whole() -> None:
    hidden, head, labels, _ = example()
    objective = NextTokenCrossEntropy(z_loss=0.01)
    whole, _ = objective(head(hidden, labels), labels)
    parts = [objective(head(hidden[s], labels[s]), labels[s])[0] for s in (slice(0, 3), slice(3, 20), slice(20, None))]
    torch.testing.assert_close(sum(p.sum for p in parts), whole.sum)
    assert sum(p.count.item() for p in parts) == whole.count.item()


@pytest.mark.parametrize("weighting", ["token", "square_root"])
def test_nothing_to_learn_from(weighting) -> None:
    for tokens in (0, 4):
        labels, sample = torch.full((tokens,), -100), torch.full((tokens,), -1)
        head, hidden = LanguageModelHead(HIDDEN, VOCABULARY), torch.randn(tokens, HIDDEN, requires_grad=True)
        objective = NextTokenCrossEntropy(0.1, weighting)
        scores = head(hidden, labels, gradient_hint=objective.gradient_hint(labels, sample))
        loss, _ = objective(scores, labels, sample)
        loss.sum.backward()
        assert loss.sum.item() == loss.count.item() == loss.mean.item() == 0.0
        assert not head.weight.grad.any()


def test_bad_options_are_named() -> None:
    with pytest.raises(ValueError, match=r"z_loss = -0\.1 must be finite and at least 0"):
        NextTokenCrossEntropy(-0.1)
    with pytest.raises(ValueError, match="sample_weighting = 'sample' must be one of"):
        NextTokenCrossEntropy(sample_weighting="sample")
    labels = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="'square_root' needs sample_id_T"):
        NextTokenCrossEntropy(sample_weighting="square_root").token_weights(labels)
    with pytest.raises(ValueError, match=r"sample_id_T \(2,\) must match labels_T \(3,\)"):
        NextTokenCrossEntropy(sample_weighting="square_root").token_weights(labels, labels[:2])
    with pytest.raises(ValueError, match=r"scores of \(2,\) tokens for labels \(3,\)"):
        NextTokenCrossEntropy()(TokenScores(torch.zeros(2), torch.zeros(2)), labels)

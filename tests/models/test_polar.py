"""The judge of POLAR, and the laws of its pre-training."""

import math
from dataclasses import replace

import pytest
import torch

from huggingface_folders import CONFIG
from lit_interns1.data import PolarEncoder, PolarTemplate, load_tokenizer
from lit_interns1.laws.polar import (
    polar_batch_size,
    polar_learning_rate,
    polar_loss_of_compute,
    polar_loss_of_size,
)
from lit_interns1.models import RewardModel
from lit_interns1.models.polar import PolarScorer
from lit_interns1.nn.initialization import materialize

TEMPLATE = PolarTemplate(separator="<|im_start|>", end="<|im_end|>", max_length=64, max_response_length=20)


@pytest.fixture(scope="module")
def model():
    model = RewardModel(replace(CONFIG, vocab_size=4096), head_std=1.0)
    return materialize(model, seed=1)


@pytest.fixture(scope="module")
def encoder():
    return PolarEncoder(load_tokenizer(), TEMPLATE)


def test_scores_are_values_at_the_end_in_order_whatever_the_batches(model, encoder):
    prompts = [[{"role": "user", "content": f"question {i}"}] for i in range(7)]
    references = [f"answer {i}" for i in range(7)]
    candidates = [f"<think>{i}</think> guess {i}{'x' * i}" for i in range(7)]
    expected = []
    for prompt, reference, candidate in zip(prompts, references, candidates, strict=True):
        plain = candidate.split("</think> ")[1]
        (ids,) = encoder.ids(prompt, reference, [plain])
        with torch.no_grad():
            expected.append(float(model(torch.tensor(ids)).values_T[-1]))
    model.train()
    for batch_tokens in (1, 60, 10_000):
        scorer = PolarScorer(model, encoder, batch_tokens)
        scores = scorer.score(prompts, references, candidates)
        assert scores == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert scores == scorer.score(prompts, references, candidates)
    assert model.training  # as it was
    assert len(set(scores)) == 7
    assert PolarScorer(model, encoder).score([], [], []) == []


def test_batches_hold_as_many_tokens_as_allowed(model, encoder):
    scorer = PolarScorer(model, encoder, 10)
    assert scorer._batches([[0] * n for n in (3, 7, 1, 12, 2, 8)]) == [[0, 1], [2], [3], [4, 5]]


def test_what_does_not_fit_is_refused(model, encoder):
    with pytest.raises(ValueError, match="got 2 prompts, 1 references and 2 candidates"):
        PolarScorer(model, encoder).score(["a", "b"], ["c"], ["d", "e"])
    with pytest.raises(ValueError, match="batch_tokens = 0 must be at least 1"):
        PolarScorer(model, encoder, 0)
    with pytest.raises(ValueError, match="tokenizer has 4096 tokens, the reward model's vocabulary 64"):
        PolarScorer(RewardModel(CONFIG), encoder)


def test_laws_give_the_printed_values():
    """Final rates and batches of the two released models: 1.8 billion parameters, and 7."""
    assert polar_learning_rate(1.8e9, 2.5e12, 0.94e12) == pytest.approx(1.43e-5, rel=2e-3)
    assert polar_learning_rate(7e9, 4e12, 3.6e12) == pytest.approx(1.67e-5, rel=3e-3)
    assert round(polar_batch_size(1.8e9, 0.94e12)) == 1946
    assert round(polar_batch_size(7e9, 3.6e12)) == 4357
    # and not in millions throughout, as the text has it
    assert 31.9032 * 1800**0.06944 * (0.94e6) ** 0.52997 > 70_000
    # losses of the fitted range lie below that of a coin
    for size in (50e6, 1e9):
        assert 0.3 < polar_loss_of_size(size) < math.log(2)
    assert polar_loss_of_size(1e9) == pytest.approx(0.9 * math.exp(-0.0425 * math.log(1e9)))
    assert polar_loss_of_compute(1e20) == pytest.approx(2.4 * 10 ** (-0.0342 * 20))
    for law in (lambda x: polar_learning_rate(x, 1e12, 1e12), lambda x: polar_batch_size(1e9, x), polar_loss_of_size,
                polar_loss_of_compute):  # fmt: skip
        for wrong in (0.0, -1.0, math.inf, math.nan):
            with pytest.raises(ValueError, match="must be positive and finite"):
                law(wrong)

import pytest
import torch
from torch import nn

from lit_interns1.optim import WarmupStableDecay, weight_decay_groups


@pytest.mark.parametrize(
    ("shape", "middle"), [("linear", 0.55), ("cosine", 0.55), ("one_minus_sqrt", 0.363604), ("square", 0.775)]
)
def test_decay_shapes(shape, middle):
    schedule = WarmupStableDecay(1000, 100, 200, shape=shape, final_factor=0.1)
    assert schedule(900) == pytest.approx(middle, abs=1e-6)
    assert schedule(50) == pytest.approx(0.5)
    assert schedule(100) == schedule(500) == schedule(799) == 1.0
    assert schedule(800) == pytest.approx(1.0)
    assert schedule(1000) == schedule(5000) == pytest.approx(0.1)
    assert [schedule.phase(t) for t in (0, 99, 100, 799, 800)] == ["warmup", "warmup", "stable", "stable", "decay"]


def test_exponential_decay_halves_every_half_life():
    schedule = WarmupStableDecay(1000, 0, 200, shape="exponential", final_factor=0.0, half_life_tokens=50)
    assert [schedule(t) for t in (800, 850, 900)] == pytest.approx([1.0, 0.5, 0.25])


def test_shares_of_the_run():
    schedule = WarmupStableDecay(1e9, 0.02, 0.2)
    assert (schedule.warmup, schedule.decay, schedule.decay_start) == pytest.approx((2e7, 2e8, 8e8))


@pytest.mark.parametrize("shape", ["linear", "cosine", "one_minus_sqrt"])
def test_transformers_schedule_is_reproduced(shape):
    transformers = pytest.importorskip("transformers")
    names = {"linear": "linear", "cosine": "cosine", "one_minus_sqrt": "1-sqrt"}
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = transformers.get_wsd_schedule(
        optimizer, num_warmup_steps=100, num_decay_steps=200, num_training_steps=1000, decay_type=names[shape],
        min_lr_ratio=0.1,
    )  # fmt: skip
    ours = WarmupStableDecay(1000, 100, 200, shape=shape, final_factor=0.1, warmup_start_factor=0.1)
    for step in (0, 10, 99, 100, 500, 800, 850, 999, 1000, 1200):
        assert ours(step) == pytest.approx(reference.lr_lambdas[0](step), abs=1e-9), step


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_tokens": 0}, "total_tokens must be positive, got 0"),
        ({"total_tokens": 100, "warmup_tokens": 60, "decay_tokens": 60}, r"together exceed total_tokens \(100\)"),
        ({"total_tokens": 100, "shape": "1-sqrt"}, "schedule.shape '1-sqrt' is unknown"),
        ({"total_tokens": 100, "final_factor": 2}, r"final_factor must lie in \[0, 1\], got 2"),
        ({"total_tokens": 100, "warmup_tokens": -1}, "warmup_tokens must not be negative"),
    ],
)
def test_impossible_schedules_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        WarmupStableDecay(**options)


def test_vectors_are_not_decayed_and_frozen_parameters_left_out():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2).requires_grad_(False))
    decayed, free = weight_decay_groups(model)
    assert [tuple(p.shape) for p in decayed["params"]] == [(5, 4), (3, 4)]
    assert [tuple(p.shape) for p in free["params"]] == [(3,), (3,), (3,)]
    assert free["weight_decay"] == 0.0
    assert "weight_decay" not in decayed
    decayed, free = weight_decay_groups(model, decay_embeddings=False)
    assert [tuple(p.shape) for p in decayed["params"]] == [(3, 4)]

"""The noise scale of gradients whose mean and covariance are known."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from distributed_harness import run_ranks
from lit_interns1.callbacks import GradientNoiseScale, TokenClock, TokenExactLoss
from lit_interns1.training import SummedLoss

MEAN, NOISE = 0.5, 2.0
"""|G|² = dimensions · MEAN²; the noise of one row has variance NOISE² in each dimension."""
DIMENSIONS, MICRO = 64, 2
EXACT = NOISE**2 / MEAN**2


class Noisy(LightningModule):
    """Its gradient is the mean over rows of MEAN + NOISE · normal; the weight does not move."""

    def __init__(self, kind):
        super().__init__()
        self.layer = torch.nn.Linear(DIMENSIONS, 1, bias=False)
        self.kind = kind

    def training_step(self, batch, batch_idx):
        scores = self.layer(batch).squeeze(-1)
        return SummedLoss(scores.sum(), torch.tensor(float(len(batch)))) if self.kind == "sum" else scores.mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def estimate(kind, accumulate, steps, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    batches = [MEAN + NOISE * torch.randn(MICRO, DIMENSIONS, generator=generator) for _ in range(steps * accumulate)]
    scale = GradientNoiseScale(every_n_steps=1, decay=0.99)
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accumulate_grad_batches=accumulate,
        callbacks=[TokenClock(counter=len), TokenExactLoss(), scale], **options,
    )  # fmt: skip
    trainer.fit(Noisy(kind), torch.utils.data.DataLoader(batches, batch_size=None, shuffle=False))
    return scale, trainer


@pytest.mark.parametrize("kind", ["mean", "sum"])
def test_it_is_the_ratio_of_variance_and_squared_mean(kind):
    scale, trainer = estimate(kind, accumulate=8, steps=60, devices=1, log_every_n_steps=1)
    assert scale.average.value.simple == pytest.approx(EXACT, rel=0.15)
    assert float(trainer.callback_metrics["batch/noise_scale"]) == pytest.approx(scale.average.value.simple)


def test_a_single_micro_batch_says_nothing():
    scale, trainer = estimate("mean", accumulate=1, steps=5, devices=1)
    assert scale.average.weight == 0
    assert "batch/noise_scale" not in trainer.callback_metrics
    with pytest.raises(ValueError, match="every_n_steps must be at least 1, got 0"):
        GradientNoiseScale(every_n_steps=0)


def on_two_ranks(rank, world, kind):
    import os

    from lit_interns1.strategies import MoEParallelStrategy

    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), GROUP_RANK="0",
        TORCHELASTIC_RUN_ID="test", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500",
    )  # fmt: skip
    found = {}
    for name, strategy in (("replicated", lambda: "ddp"), ("sharded", MoEParallelStrategy)):
        options = {"devices": world, "strategy": strategy(), "use_distributed_sampler": False}
        average = estimate(kind, accumulate=4, steps=50, seed=rank, **options)[0].average
        found[name] = (average.squared_gradient_sum, average.noise_sum, average.value.simple)
    return found


@pytest.mark.parametrize("kind", ["sum", pytest.param("mean", marks=pytest.mark.slow)])
def test_two_ranks_agree_replicated_and_sharded(kind):
    first, second = run_ranks(on_two_ranks, 2, kind)
    for name in first:
        assert first[name] == pytest.approx(second[name])
        assert first[name][2] == pytest.approx(EXACT, rel=0.2), name

"""Skipped steps leave no mark: weights and Adam's moments are those of a run without the bad batch."""

import math
import warnings

import lightning.pytorch as L
import pytest
import torch
from torch.utils.data import DataLoader

from distributed_harness import run_ranks
from lit_interns1.callbacks import SkipBadSteps, TokenClock, TokenExactLoss, TokenLearningRate
from lit_interns1.models import LanguageModelConfig, MoEConfig
from lit_interns1.modules import LanguageModelModule
from lit_interns1.optim import WarmupStableDecay
from lit_interns1.training import SummedLoss
from sharded_training import batches, environment, whole


class Linear(L.LightningModule):
    """Least squares whose gradient of batch t has the size that the batch names."""

    def __init__(self, summed=False):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        self.summed = summed

    def training_step(self, batch, batch_idx):
        loss = (batch["input_ids"] * self.weight).sum()
        return SummedLoss(loss * 3, torch.tensor(3.0)) if self.summed else loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1, weight_decay=0.5)


def slopes(*sizes):
    return [{"input_ids": torch.tensor([size * 0.6, size * 0.8])} for size in sizes]


def fit(data, callbacks, module=None, **options):
    module = module or Linear()
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False, log_every_n_steps=1,
        enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks, **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, batch_size=None))
    return module, trainer


def same(a, b):
    (module, trainer), (other, other_trainer) = a, b
    torch.testing.assert_close(module.weight, other.weight, rtol=1e-6, atol=0)
    state, expected = (t.optimizers[0].state_dict()["state"] for t in (trainer, other_trainer))
    for name, value in expected[0].items():
        torch.testing.assert_close(state[0][name], value, rtol=1e-6, atol=0, msg=name)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e4])
@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.5}])
def test_a_skipped_step_moves_neither_weights_nor_moments(bad, options):
    callback = SkipBadSteps(threshold=100.0)
    with pytest.warns(UserWarning, match=r"optimizer step 2 is skipped: gradient norm (nan|inf|1e\+04), limit 100"):
        skipping = fit(slopes(1.0, 2.0, bad, 1.5), [TokenClock(), callback], **options)
    same(skipping, fit(slopes(1.0, 2.0, 1.5), [], **options))
    assert callback.skipped_steps == 1
    assert skipping[1].callback_metrics["stability/skipped_steps"] == 1
    assert skipping[1].global_step == 4
    assert TokenClock.of(skipping[1]).tokens == 8


def test_summed_losses_are_measured_as_the_means_that_they_become():
    callback = SkipBadSteps(threshold=2.5)
    with pytest.warns(UserWarning, match="gradient norm 4"):  # callbacks that come later scale before it looks
        skipping = fit(slopes(1.0, 4.0, 2.0), [callback, TokenExactLoss()], Linear(summed=True))
    same(skipping, fit(slopes(1.0, 2.0), []))
    assert float(skipping[1].callback_metrics["optim/grad_norm"]) == pytest.approx(2.0)


def test_the_learning_rate_goes_on():
    schedule = WarmupStableDecay(total_tokens=100, warmup_tokens=8)
    rates = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    callbacks = [TokenClock(), TokenLearningRate(schedule), SkipBadSteps(), Watch()]
    with pytest.warns(UserWarning, match="skipped"):
        fit(slopes(1.0, math.nan, 1.0), callbacks)
    assert rates == pytest.approx([0.025, 0.05, 0.075])


def test_spikes_are_measured_against_the_last_good_steps():
    callback = SkipBadSteps(sigma=3.0, window=4, min_history=4)
    norms = [1.0, 100.0, 1.2, 0.8, 5.0, 1.0, 1.1, 0.9, 1.0, 5.0, 1.05]
    with pytest.warns(UserWarning, match="skipped"):
        fit(slopes(*norms), [TokenClock(), callback])
    # 100 comes too early to be a spike and makes 5 none; both are out of the window when 5 comes again
    assert callback.skipped_steps == 1
    assert callback.limit() == pytest.approx(
        1.0125 + 3 * math.sqrt(sum((x - 1.0125) ** 2 for x in (1.1, 0.9, 1.0, 1.05)) / 4)
    )
    again = SkipBadSteps(sigma=3.0, window=4, min_history=4)
    again.load_state_dict(callback.state_dict())
    assert (again.limit(), again.skipped_steps) == (callback.limit(), 1)


def test_too_many_skips_in_a_row_are_an_error():
    callbacks = [TokenClock(), SkipBadSteps(threshold=2.0, max_skips_in_a_row=2)]
    with pytest.warns(UserWarning, match="skipped"):
        fit(slopes(1.0, 3.0, 4.0, 1.0, 3.0, 4.0), callbacks)
    callbacks = [TokenClock(), SkipBadSteps(threshold=2.0, max_skips_in_a_row=1)]
    message = "2 optimizer steps in a row were bad, max_skips_in_a_row is 1: gradient norms 3, 4 with limit 2 at step 2"
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(RuntimeError, match=message):
        fit(slopes(1.0, 3.0, 4.0, 1.0), callbacks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.0}, r"SkipBadSteps\.threshold must be positive or None, got 0"),
        ({"min_history": 10, "window": 5}, "min_history = 10 must lie between 2 and window = 5"),
        ({"max_skips_in_a_row": -1}, "must not be negative, got -1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        SkipBadSteps(**options)


class Poisoned(LanguageModelModule):
    """Rank 0 gets a NaN in the loss of the second step."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.poison and batch_idx == 1 and self.global_rank == 0:
            return SummedLoss(loss.sum * math.nan, loss.count)
        return loss


def train(rank, world, sharded, poison):
    torch.set_num_threads(1)
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment

    from lit_interns1.strategies import MoEParallelStrategy

    environment(rank, world)
    warnings.filterwarnings("ignore")
    moe = MoEConfig(num_experts=8, experts_per_token=2, intermediate_size=16, router="sigmoid")
    config = LanguageModelConfig(
        vocab_size=64, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, moe=moe
    )
    module = Poisoned(config, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2, eps=1e-3), seed=3)
    module.poison = poison
    callback = SkipBadSteps()
    trainer = L.Trainer(
        accelerator="cpu", devices=world, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, callbacks=[callback],
        gradient_clip_val=1.0, strategy=MoEParallelStrategy(expert_parallel_size=2) if sharded else "ddp",
        plugins=[TorchElasticEnvironment()], log_every_n_steps=1,
    )  # fmt: skip
    data = batches(rank, world, 1)
    trainer.fit(module, DataLoader(data if poison else [data[0], data[2]], batch_size=None))
    tensors = {name: whole(t) for name, t in module.state_dict().items()}
    return tensors, callback.skipped_steps, float(trainer.callback_metrics["optim/grad_norm"])


def train_all(rank, world, cases):
    return [train(rank, world, *case) for case in cases]


def test_all_ranks_skip_when_one_has_a_bad_gradient():
    results = run_ranks(train_all, 2, [(True, True), (True, False), (False, True), (False, False)])
    for sharded, plain in ((0, 1), (2, 3)):
        for rank in range(2):
            (tensors, skipped, norm), (expected, none, expected_norm) = results[rank][sharded], results[rank][plain]
            assert (skipped, none) == (1, 0)
            assert norm == pytest.approx(expected_norm, rel=1e-6)
            for name, tensor in expected.items():
                torch.testing.assert_close(tensors[name], tensor, rtol=1e-6, atol=1e-7, msg=name)

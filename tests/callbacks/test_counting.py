"""The clock, exact losses, schedules and checkpoints with a foreign LightningModule, under Lightning's own Trainer."""

import csv

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lit_interns1.callbacks import (
    ConsoleProgress,
    RunCheckpoint,
    ThroughputMonitor,
    TokenClock,
    TokenExactLoss,
    TokenLearningRate,
)
from lit_interns1.optim import WarmupStableDecay
from lit_interns1.training import SummedLoss, TokenCounts

LENGTHS = [3, 11, 1, 7, 2, 9, 5, 4, 8, 6, 10, 12]


class Ragged(LightningModule):
    """Least squares on batches of unequal length; returns what `loss` says."""

    def __init__(self, kind: str = "summed", rate: float = 0.1) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([0.5, -0.25]))
        self.kind, self.rate = kind, rate
        self.rates: list[float] = []

    def training_step(self, batch, batch_idx):
        x, y = batch["input_ids"], batch["y"]
        errors = (x @ self.weight - y).square()
        if self.kind == "mean":
            return errors.mean()
        loss = SummedLoss(errors.sum(), torch.tensor(float(len(errors))))
        return {"loss": loss} if self.kind == "dict" else loss

    def on_before_optimizer_step(self, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.rate)


def batches(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(0)
    made = []
    for n in lengths:
        x = torch.randn(n, 2, generator=generator)
        made.append(
            {"input_ids": x, "y": x @ torch.tensor([1.0, 2.0]) + 0.1, "num_tokens": n, "num_loss_tokens": n - 1}
        )
    return made


def loader(data):
    return DataLoader(data, batch_size=None)


def fit(module, callbacks, tmp_path, accumulate=1, data=None, ckpt_path=None, **options):
    trainer = Trainer(
        max_epochs=options.pop("max_epochs", 1), accelerator="cpu", devices=1, logger=options.pop("logger", False),
        enable_checkpointing=any(isinstance(c, RunCheckpoint) for c in callbacks),
        enable_progress_bar=any(isinstance(c, ConsoleProgress) for c in callbacks),
        enable_model_summary=False, accumulate_grad_batches=accumulate, callbacks=callbacks,
        default_root_dir=tmp_path, **options,
    )  # fmt: skip
    trainer.fit(module, loader(batches() if data is None else data), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("kind", ["summed", "dict"])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_accumulated_sums_equal_one_large_batch(tmp_path, kind, clip):
    module = Ragged(kind)
    fit(module, [TokenExactLoss()], tmp_path, accumulate=4, gradient_clip_val=clip)

    weight = torch.tensor([0.5, -0.25], requires_grad=True)
    data = batches()
    for window in (data[0:4], data[4:8], data[8:12]):
        x, y = (torch.cat([batch[name] for batch in window]) for name in ("input_ids", "y"))
        (gradient,) = torch.autograd.grad((x @ weight - y).square().mean(), weight)
        if clip is not None:
            gradient = gradient * min(1.0, clip / gradient.norm())
        weight = (weight - 0.1 * gradient).detach().requires_grad_()
    torch.testing.assert_close(module.weight.detach(), weight.detach())


def test_an_unfilled_last_window_is_exact_too(tmp_path):
    module = Ragged()
    fit(module, [TokenExactLoss()], tmp_path, accumulate=3, data=batches([3, 11]))
    weight = torch.tensor([0.5, -0.25], requires_grad=True)
    x, y = (torch.cat([batch[name] for batch in batches([3, 11])]) for name in ("input_ids", "y"))
    (gradient,) = torch.autograd.grad((x @ weight - y).square().mean(), weight)
    torch.testing.assert_close(module.weight.detach(), (weight - 0.1 * gradient).detach())


def test_plain_means_keep_lightnings_meaning(tmp_path):
    with_callback, without = Ragged("mean"), Ragged("mean")
    fit(with_callback, [TokenExactLoss()], tmp_path, accumulate=4)
    fit(without, [], tmp_path, accumulate=4)
    assert torch.equal(with_callback.weight, without.weight)


def test_nobody_to_handle_a_summed_loss_is_an_error_and_no_wrong_scale(tmp_path):
    with pytest.raises(Exception, match="must return a Tensor, a dict"):
        fit(Ragged(), [], tmp_path)


def test_a_window_without_anything_to_learn_moves_nothing(tmp_path):
    class Nothing(Ragged):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return SummedLoss(loss.sum * 0, torch.zeros(()))

    module = Nothing()
    fit(module, [TokenExactLoss()], tmp_path, accumulate=4)
    assert module.weight.tolist() == [0.5, -0.25]


class Watch(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.seen.append(TokenClock.of(trainer).tokens)


def test_clock_counts_whole_steps_and_ends_the_run(tmp_path):
    clock, watch = TokenClock(max_tokens=40), Watch()
    fit(Ragged(), [clock, TokenExactLoss(), watch], tmp_path, accumulate=3)
    sums = [sum(LENGTHS[:3]), sum(LENGTHS[:6]), sum(LENGTHS[:9])]
    assert watch.seen == [0, 0, sums[0], sums[0], sums[0], sums[1], sums[1], sums[1], sums[2]]
    assert (clock.state.tokens, clock.state.loss_tokens, clock.state.steps) == (sums[2], sums[2] - 9, 3)
    with pytest.raises(ValueError, match="max_tokens must be positive, got 0"):
        TokenClock(max_tokens=0)


def test_clock_takes_a_counter(tmp_path):
    clock = TokenClock(counter=lambda batch: TokenCounts(100, 10))
    fit(Ragged(), [clock, TokenExactLoss()], tmp_path)
    assert (clock.state.tokens, clock.state.loss_tokens) == (1200, 120)


def test_rate_follows_the_tokens_of_the_step(tmp_path):
    total = sum(LENGTHS)
    schedule = WarmupStableDecay(total, warmup_tokens=20, decay_tokens=30, shape="linear", final_factor=0.0)
    module = Ragged()
    fit(module, [TokenClock(), TokenExactLoss(), TokenLearningRate(schedule)], tmp_path, accumulate=2)
    reached = [sum(LENGTHS[: 2 * i]) for i in range(1, 7)]
    assert module.rates == pytest.approx([0.1 * schedule(tokens) for tokens in reached])
    assert module.rates[-1] == 0.0
    assert module.rates[1] == pytest.approx(0.1)


def test_schedule_without_a_clock_says_what_is_missing(tmp_path):
    with pytest.raises(RuntimeError, match=r"add lit_interns1\.callbacks\.TokenClock"):
        fit(Ragged(), [TokenExactLoss(), TokenLearningRate(WarmupStableDecay(100))], tmp_path)


class SaveAt(Callback):
    """Writes a checkpoint after the given micro-batch, as a signal or a time limit would."""

    def __init__(self, batch_idx, path):
        self.batch_idx, self.path = batch_idx, path

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == self.batch_idx:
            trainer.save_checkpoint(self.path)


class Positioned(DataLoader):
    """A foreign loader that keeps its place, in rows, as ours does."""

    def __init__(self, data):
        super().__init__(data, batch_size=None)
        self.rows = 0

    def __iter__(self):
        for batch in self.dataset[self.rows :]:
            self.rows += 1
            yield batch

    def state_dict(self):
        return {"rows": self.rows, "rows_per_micro_step": 1}

    def load_state_dict(self, state):
        self.rows = state["rows"]


@pytest.mark.parametrize("saved_after", range(8))
def test_a_checkpoint_inside_a_window_resumes_at_its_start(tmp_path, saved_after):
    def run(callbacks, ckpt_path=None):
        module = Ragged()
        trainer = Trainer(
            max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=3,
            callbacks=[TokenClock(), TokenExactLoss(), *callbacks],
        )  # fmt: skip
        trainer.fit(module, Positioned(batches()), ckpt_path=ckpt_path)
        return module, trainer

    module, trainer = run([SaveAt(saved_after, tmp_path / "inside.ckpt")])
    resumed, again = run([], tmp_path / "inside.ckpt")
    assert torch.equal(module.weight, resumed.weight)
    assert again.global_step == trainer.global_step == 4
    assert TokenClock.of(again).state.tokens == sum(LENGTHS)


def test_last_checkpoint_needs_no_metric_and_is_up_to_date_at_the_end(tmp_path):
    checkpoint = RunCheckpoint(str(tmp_path / "checkpoints"), every_n_train_steps=5)
    fit(Ragged(), [TokenClock(), TokenExactLoss(), checkpoint], tmp_path)
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 12
    assert saved["callbacks"]["TokenClock"]["tokens"] == sum(LENGTHS)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]
    with pytest.raises(ValueError, match="every_n_train_steps must be at least 1, got 0"):
        RunCheckpoint(every_n_train_steps=0)


def test_throughput_and_progress(tmp_path, capsys):
    logger = CSVLogger(tmp_path, name="", version="")
    callbacks = [
        TokenClock(max_tokens=1000),
        TokenExactLoss(),
        ThroughputMonitor(peak_flops=1e9, model_flops_per_token=5.0),
    ]
    fit(Ragged(), [*callbacks, ConsoleProgress(seconds=0.001)], tmp_path, logger=logger, log_every_n_steps=2)
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    rates = [float(row["throughput/tokens_per_second"]) for row in rows if row.get("throughput/tokens_per_second")]
    shares = [float(row["throughput/mfu"]) for row in rows if row.get("throughput/mfu")]
    assert len(rates) >= 5
    assert shares == pytest.approx([rate * 5e-9 for rate in rates])
    assert [float(row["train/tokens"]) for row in rows if row.get("train/tokens")][-1] == sum(LENGTHS)
    shown = capsys.readouterr().out
    assert "step 12 | 78/1 k tokens" in shown
    assert "took 0:0" in shown

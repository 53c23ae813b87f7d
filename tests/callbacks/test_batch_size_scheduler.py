"""Batch sizes that change during training: rows, tokens and gradients of every optimizer step, on 1 and 2 ranks."""

import csv
import random

import lightning
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, Dataset

from distributed_harness import run_ranks
from lit_interns1.callbacks import BatchSizeScheduler, TokenClock, TokenExactLoss, TokenLearningRate
from lit_interns1.data import TextDataModule
from lit_interns1.optim import (
    BatchForLoss,
    DoublingBatch,
    FittedBatch,
    LinearBatch,
    TabulatedBatch,
    WarmupStableDecay,
)
from lit_interns1.strategies import MoEParallelStrategy
from lit_interns1.training import SummedLoss
from sharded_training import whole

TOKENS_PER_ROW = 10


def number_of(row):
    """A different integer for every row, so that a sum tells which rows it has."""
    return (row * row * 31 + 7 * row) % 1009


class Rows(Dataset):
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, row):
        return torch.tensor([float(row), float(number_of(row))])


class Counting(LightningModule):
    """Its gradient is the mean of the rows' numbers."""

    def __init__(self, kind="mean"):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
        self.kind, self.steps, self.rates = kind, [], []
        self._rows = []

    def training_step(self, batch, batch_idx):
        rows_N, numbers_N = batch[:, 0], batch[:, 1].double()
        self._rows += rows_N.int().tolist()
        self.log("train/loss", numbers_N.mean())
        if self.kind == "sum":
            return SummedLoss(self.layer(numbers_N[:, None]).sum(), torch.tensor(float(len(batch))))
        return self.layer(numbers_N[:, None]).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Watch(Callback):
    """Behind all others: what the optimizer was given in every step, and where a checkpoint is asked for."""

    def __init__(self, save_after=None, path=None):
        self.steps, self.save_after, self.path, self.batches = [], save_after, path, 0

    def on_before_optimizer_step(self, trainer, module, optimizer):
        clock = TokenClock.of(trainer)
        self.steps.append((sorted(module._rows), float(whole(module.layer.weight.grad)), clock.commit(trainer).tokens))
        module._rows = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.batches += 1
        if self.batches == self.save_after:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


class KeepsPlace:
    """Rows in order over all ranks; knows how many are consumed. Lightning leaves its sampling alone."""

    def __init__(self, count, micro, ranks=1, rank=0):
        self.dataset, self.batch_size = Rows(count), micro
        self.micro, self.ranks, self.rank, self.rows, self.count = micro, ranks, rank, 0, count

    def __len__(self):
        return self.count // (self.micro * self.ranks)

    def __iter__(self):
        while self.rows % self.count + self.micro * self.ranks <= self.count:
            first = self.rows % self.count + self.rank * self.micro
            self.rows += self.micro * self.ranks
            yield torch.stack([self.dataset[row] for row in range(first, first + self.micro)])
            if self.rows % self.count == 0:
                return

    def state_dict(self):
        return {"rows": self.rows, "rows_per_micro_step": self.micro * self.ranks}

    def load_state_dict(self, state):
        self.rows = state["rows"]


def fit(
    schedule, loader, kind="mean", accumulate=1, save_after=None, path=None, ckpt_path=None, callbacks=(), **options
):
    scheduler = options.pop("scheduler", None) or BatchSizeScheduler(schedule, **options.pop("of_scheduler", {}))
    watch = Watch(save_after, path)
    clock = TokenClock(options.pop("max_tokens", None), counter=lambda batch: len(batch) * TOKENS_PER_ROW)
    trainer = Trainer(
        max_epochs=options.pop("max_epochs", 2), accelerator="cpu", devices=options.pop("devices", 1),
        logger=options.pop("logger", False), enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accumulate_grad_batches=accumulate,
        callbacks=[scheduler, clock, TokenExactLoss(), *callbacks, watch], **options,
    )  # fmt: skip
    module = Counting(kind)
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return watch.steps, scheduler, trainer, module


def expected_steps(table, count, micro_step, first, epochs):
    """The steps by the rule in rows: (rows, mean of their numbers, consumed tokens at the end)."""
    steps, tokens, batch = [], 0, first

    def wanted():
        reached = [rows for threshold, rows in table if tokens >= threshold]
        rows = max(1, round(reached[-1] / micro_step)) * micro_step if reached else batch
        return max(rows, batch)

    for _ in range(epochs):
        place = 0
        while place < count:
            if place % wanted() == 0:
                batch = wanted()
            rows = list(range(place, min(place + batch, count)))
            place, tokens = place + len(rows), tokens + len(rows) * TOKENS_PER_ROW
            steps.append((rows, sum(map(number_of, rows)) / len(rows), tokens))
    return steps


def random_table(generator, count):
    thresholds = sorted(generator.sample(range(1, 2 * count), 3))
    sizes = sorted(generator.sample(range(2, 25), 3))
    return [(threshold * TOKENS_PER_ROW, size) for threshold, size in zip(thresholds, sizes, strict=True)]


def check(steps, expected):
    assert [(rows, tokens) for rows, _, tokens in steps] == [(rows, tokens) for rows, _, tokens in expected]
    assert [gradient for _, gradient, _ in steps] == pytest.approx([gradient for _, gradient, _ in expected])


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 8))])
@pytest.mark.parametrize("kind", ["mean", "sum"])
def test_every_step_has_the_rows_that_it_should_and_their_mean(seed, kind):
    generator = random.Random(seed)
    micro, count, accumulate = generator.choice([1, 2, 3]), 6 * generator.randint(10, 16), generator.randint(1, 3)
    table = random_table(generator, count)
    loader = DataLoader(Rows(count), batch_size=micro)
    steps, *_ = fit(TabulatedBatch(table), loader, kind, accumulate, of_scheduler={"unit": "rows"})
    check(steps, expected_steps(table, count, micro, accumulate * micro, epochs=2))


TABLE = [(60, 3), (200, 4), (500, 6)]


INSIDE_A_STEP, AT_A_SWITCH, END_OF_EPOCH = 5, 24, 36
MORE_PLACES = (1, 2, 6, 11, 12, 13, 22, 29, 35, 37, 49, 50, 72)


@pytest.mark.parametrize(
    "save_after",
    [INSIDE_A_STEP, AT_A_SWITCH, END_OF_EPOCH, *(pytest.param(at, marks=pytest.mark.slow) for at in MORE_PLACES)],
)
def test_a_run_resumes_at_any_point(tmp_path, save_after):
    options = {"accumulate": 2, "of_scheduler": {"unit": "rows"}}
    expected = expected_steps(TABLE, 36, 1, 2, epochs=2)
    before, *_ = fit(
        TabulatedBatch(TABLE), KeepsPlace(36, 1), save_after=save_after, path=tmp_path / "a.ckpt", **options
    )
    after, scheduler, *_ = fit(TabulatedBatch(TABLE), KeepsPlace(36, 1), ckpt_path=tmp_path / "a.ckpt", **options)
    check([*before, *after], expected)
    whole = fit(TabulatedBatch(TABLE), KeepsPlace(36, 1), **options)[1]
    assert scheduler.state.switches == whole.state.switches
    assert [rows for _, rows in whole.state.switches] == [3, 4, 6]


def train_on_ranks(rank, world, table, micro, folder, strategy_name, kind, save_after, resume):
    import os

    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), GROUP_RANK="0",
        TORCHELASTIC_RUN_ID="test", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500",
    )  # fmt: skip
    strategy = MoEParallelStrategy() if strategy_name == "moe_parallel" else strategy_name
    path = f"{folder}/{strategy_name}-{kind}.ckpt"
    steps, scheduler, *_ = fit(
        TabulatedBatch(table), KeepsPlace(48, micro, world, rank), kind, strategy=strategy, devices=world,
        accumulate=4 // (micro * world), save_after=save_after, path=path, ckpt_path=path if resume else None,
        of_scheduler={"unit": "rows"},
    )  # fmt: skip
    return steps, scheduler.state.switches


def merged(results):
    """Steps with the rows of all ranks; gradients and tokens must agree."""
    steps = []
    for of_ranks in zip(*(steps for steps, _ in results), strict=True):
        rows, gradients, tokens = zip(*of_ranks, strict=True)
        assert len(set(tokens)) == 1
        assert gradients == pytest.approx([gradients[0]] * len(gradients))
        steps.append((sorted(row for part in rows for row in part), gradients[0], tokens[0]))
    return steps


def two_ranks(rank, world, folder):
    table = [(80, 8), (400, 12)]
    found = {}
    for kind in ("mean", "sum"):
        found[kind] = train_on_ranks(rank, world, table, 2, folder, "ddp", kind, None, False)
        found["sharded " + kind] = train_on_ranks(rank, world, table, 2, folder, "moe_parallel", kind, None, False)
    found["before"] = train_on_ranks(rank, world, table, 1, folder, "ddp", "mean", 19, False)
    return found


def test_two_ranks_see_the_same_steps_and_one_rank_goes_on_with_them(tmp_path):
    expected = expected_steps([(80, 8), (400, 12)], 48, 4, 4, epochs=2)
    results = run_ranks(two_ranks, 2, str(tmp_path))
    for kind in ("mean", "sum", "sharded mean", "sharded sum"):
        check(merged([result[kind] for result in results]), expected)
        assert results[0][kind][1] == results[1][kind][1] != []
    before = merged([result["before"] for result in results])
    after, *_ = fit(
        TabulatedBatch([(80, 8), (400, 12)]), KeepsPlace(48, 1), ckpt_path=tmp_path / "ddp-mean.ckpt", accumulate=4,
        of_scheduler={"unit": "rows"},
    )  # fmt: skip
    assert 0 < len(before) < len(expected)
    check([*before, *after], expected)


def test_the_rate_is_schedule_times_the_action_of_the_batch_size():
    table, total = TabulatedBatch([(80, 8), (400, 32)]), 4000
    schedule = WarmupStableDecay(total, warmup_tokens=0, decay_tokens=0.5, shape="linear", final_factor=0.0)

    class Rates(Callback):
        def __init__(self):
            self.seen = []

        def on_before_optimizer_step(self, trainer, module, optimizer):
            self.seen.append((TokenClock.of(trainer).tokens, optimizer.param_groups[0]["lr"]))

    for action, exponent in (("none", 0), ("sqrt", 0.5), ("linear", 1)):
        rates = Rates()
        _, scheduler, *_ = fit(
            table, DataLoader(Rows(96), batch_size=4), max_epochs=1, callbacks=[TokenLearningRate(schedule), rates],
            of_scheduler={"unit": "rows", "learning_rate": action},
        )  # fmt: skip
        assert scheduler.state.switches == [(80, 8), (640, 32)]

        def factor(tokens, exponent=exponent):
            return (1 if tokens <= 80 else 2 if tokens <= 640 else 8) ** exponent

        assert rates.seen == [(t, pytest.approx(schedule(t) * factor(t))) for t, _ in rates.seen]
    rates = Rates()  # without a schedule the optimizer's own rate is changed
    fit(
        table, DataLoader(Rows(96), batch_size=4), max_epochs=1, callbacks=[rates],
        of_scheduler={"unit": "rows", "learning_rate": "sqrt"},
    )  # fmt: skip
    assert [rate for _, rate in rates.seen] == pytest.approx([factor(t) ** 0.5 for t, _ in rates.seen])


def test_nothing_switches_once_the_rate_decays_or_from_the_option_on():
    table = TabulatedBatch([(100, 2), (300, 4)])
    decaying = WarmupStableDecay(480, warmup_tokens=0, decay_tokens=0.5, shape="linear")
    rate = TokenLearningRate(decaying)
    for callbacks, option in (([rate], {}), ([], {"freeze_after_tokens": 240.0})):
        steps, scheduler, *_ = fit(
            table, DataLoader(Rows(48), batch_size=1), callbacks=callbacks, of_scheduler={"unit": "rows", **option}
        )
        assert scheduler.state.switches == [(100, 2)]
        assert len(steps[-1][0]) == 2
    steps, *_ = fit(
        table,
        DataLoader(Rows(48), batch_size=1),
        callbacks=[rate],
        of_scheduler={"unit": "rows", "freeze_after_tokens": 1e9},
    )
    assert len(steps[-1][0]) == 4


def test_it_never_decreases_unless_allowed():
    table, loader = TabulatedBatch([(0, 4), (100, 2)]), DataLoader(Rows(24), batch_size=1)
    assert {len(rows) for rows, *_ in fit(table, loader, max_epochs=1, of_scheduler={"unit": "rows"})[0]} == {4}
    allowed = {"unit": "rows", "allow_decrease": True}
    steps, _, trainer, _ = fit(table, loader, max_epochs=1, accumulate=3, of_scheduler=allowed)
    assert [len(rows) for rows, *_ in steps] == [4, 4, 4, *[2] * 6]
    assert trainer.accumulate_grad_batches == 3  # as it was given


def test_tokens_are_rounded_to_micro_batches_and_asked_for_every_n_tokens(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    options = {"tokens_per_row": TOKENS_PER_ROW, "every_n_tokens": 200, "max_batch": 75}
    steps, scheduler, *_ = fit(
        LinearBatch(20, 110, end_tokens=900), DataLoader(Rows(120), batch_size=2), max_epochs=1, logger=logger,
        log_every_n_steps=1, of_scheduler=options,
    )  # fmt: skip
    # asked after 200, 400, 600 tokens: 40, 60 and 80 → at most 75 tokens = 4, 6 and 7.5 → 8 rows
    assert [rows for _, rows in scheduler.state.switches] == [4, 6, 8]
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    logged = [(row["batch/rows_per_step"], row["batch/tokens_per_step"], row["batch/accumulation"]) for row in rows]
    logged = [tuple(map(float, values)) for values in logged if values[0]]
    assert logged == [(len(rows), 10 * len(rows), len(rows) / 2) for rows, *_ in steps]
    assert [float(row["batch/switch"]) for row in rows if row["batch/switch"]] == [4, 6, 8]
    assert {float(row["batch/target"]) for row in rows if row["batch/target"]} == {20, 40, 60, 75}


def test_by_loss_it_follows_the_smoothed_loss_also_after_a_resume(tmp_path):
    class Falling(Counting):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("loss", 8.0 - 0.05 * batch[:, 0].max())
            return loss

    def run(save_after=None, ckpt_path=None):
        scheduler = BatchSizeScheduler(
            BatchForLoss([(8.0, 1.0), (6.0, 4.0)], loss_half_life_tokens=20.0), unit="rows", loss_metric="loss"
        )
        trainer = Trainer(
            max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
            callbacks=[scheduler, TokenClock(counter=lambda b: 10 * len(b)), Watch(save_after, tmp_path / "loss.ckpt")],
        )  # fmt: skip
        trainer.fit(Falling(), KeepsPlace(60, 1), ckpt_path=ckpt_path)
        return scheduler.state

    whole = run()
    place = smoothed = weight = tokens = 0
    batch, switches = 1, []
    while place < 60:
        place += batch
        kept = 0.5 ** ((10 * place - tokens) / 20)
        tokens = 10 * place
        smoothed, weight = kept * smoothed + 8.0 - 0.05 * (place - 1), kept * weight + 1
        target = 4 ** min((8.0 - smoothed / weight) / 2, 1)  # ln B is linear in the loss
        if round(target) > batch and place % round(target) == 0 and place < 60:
            batch = round(target)
            switches.append((tokens, batch))
    assert whole.switches == switches
    assert len(switches) == 3
    run(save_after=31)
    assert run(ckpt_path=tmp_path / "loss.ckpt") == whole


def test_schedules():
    table = TabulatedBatch([(0, 2e6), (125e9, 4e6)])
    assert [table(d) for d in (0, 124e9, 125e9)] == [2e6, 2e6, 4e6]
    assert TabulatedBatch([(5, 1)])(4) is None
    assert FittedBatch(p=1.0, q=0.5)(100) == pytest.approx(torch.e * 10)
    assert FittedBatch(p=1.0, q=0.5)(0) is None
    assert [LinearBatch(2, 6, end_tokens=40, start_tokens=20)(d) for d in (0, 30, 99)] == [2, 4, 6]
    assert [DoublingBatch(3, 10, last=20)(d) for d in (0, 9, 10, 25, 1e9)] == [3, 3, 6, 12, 20]
    by_loss = BatchForLoss([(4.0, 100.0), (3.0, 400.0)], loss_half_life_tokens=1.0)
    assert [by_loss(0, loss) for loss in (None, 5.0, 3.5, 1.0)] == [None, 100.0, pytest.approx(200.0), 400.0]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TabulatedBatch([]), "must have an entry"),
        (lambda: TabulatedBatch([(5, 1), (5, 2)]), r"must ascend strictly from 0 on, got \[5, 5\]"),
        (lambda: TabulatedBatch([(0, 0)]), "batch size must be positive and finite, got 0"),
        (lambda: FittedBatch(p=1.0), "either p and q or an artefact, got p=1.0, q=None"),
        (lambda: FittedBatch(artefact="nowhere.json"), "nowhere.json does not exist"),
        (lambda: BatchForLoss([(3.0, 1.0)]), "loss_half_life_tokens must be positive, got 0"),
        (lambda: BatchForLoss([(3.0, 1.0), (4.0, 1.0)], None, 1.0), "minus the loss must ascend"),
        (lambda: LinearBatch(1, 2, end_tokens=0), "start_tokens=0 < end_tokens=0"),
        (lambda: DoublingBatch(4, 10, last=2), "last=2 must not be below first=4"),
        (
            lambda: BatchSizeScheduler(LinearBatch(1, 2, 3), unit="samples"),
            "must be tokens or rows, got 'samples'",
        ),
        (lambda: BatchSizeScheduler(LinearBatch(1, 2, 3), learning_rate="log"), "none, sqrt or linear, got 'log'"),
        (lambda: BatchSizeScheduler(LinearBatch(1, 2, 3), max_batch=-1), "max_batch must be positive, got -1"),
    ],
)
def test_bad_options_are_named(make, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        make()


def test_what_cannot_work_is_said_before_training(tmp_path):
    table, loader = TabulatedBatch([(50, 2)]), DataLoader(Rows(12), batch_size=1)
    rows = {"of_scheduler": {"unit": "rows"}}
    with pytest.raises(ValueError, match="GradientAccumulationScheduler both set the accumulation"):
        fit(table, loader, callbacks=[GradientAccumulationScheduler({0: 2})], **rows)
    with pytest.raises(ValueError, match="needs the tokens of a row"):
        fit(table, loader)
    with pytest.raises(ValueError, match="does not know the rows of a micro-batch"):
        fit(table, DataLoader(Rows(12), batch_size=None), **rows)

    class Scheduled(Counting):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    for module, options, words in (
        (Scheduled(), {"learning_rate": "sqrt"}, "would set the rate back"),
        (Manual(), {}, "manual optimisation does by itself"),
    ):
        trainer = Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            callbacks=[BatchSizeScheduler(table, unit="rows", **options), TokenClock()],
        )  # fmt: skip
        with pytest.raises(ValueError, match=words):
            trainer.fit(module, loader)
    fit(table, KeepsPlace(12, 1), accumulate=3, save_after=4, path=tmp_path / "a.ckpt", **rows)
    with pytest.raises(ValueError, match=r"3 rows is not divisible by micro-batch × ranks = 2 × 1 = 2"):
        fit(table, KeepsPlace(12, 2), ckpt_path=tmp_path / "a.ckpt", **rows)
    with pytest.raises(RuntimeError, match=r"add lit_interns1\.callbacks\.TokenClock"):
        Trainer(logger=False, enable_checkpointing=False, callbacks=[BatchSizeScheduler(table)]).fit(Counting(), loader)


class Manual(Counting):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


def text_data(folder, global_batch_size=2, micro_batch_size=1):
    (folder / "text.txt").write_text("\n\n".join(f"Document {i} of the text, {i * i} words." for i in range(60)))
    return TextDataModule(
        [str(folder / "text.txt")], row_length=16, global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size, cache_dir=folder / "cache",
    )  # fmt: skip


class Texts(Counting):
    def training_step(self, batch, batch_idx):
        count = float(batch.num_loss_tokens)
        self._rows += [tuple(row.tolist()) for row in batch.input_ids.view(-1, 16)]
        return SummedLoss(self.layer(batch.input_ids.double().view(-1, 1)).sum(), torch.tensor(count))


def fit_text(folder, data, save_after=None, ckpt_path=None):
    watch = Watch(save_after, folder / "text.ckpt")
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[BatchSizeScheduler(TabulatedBatch([(96, 64), (300, 128)])), TokenClock(), TokenExactLoss(), watch],
    )  # fmt: skip
    trainer.fit(Texts(), datamodule=data, ckpt_path=ckpt_path)
    return watch.steps, data, trainer


def test_the_data_module_gives_its_rows_in_order_whatever_the_batch_size(tmp_path):
    steps, data, trainer = fit_text(tmp_path, text_data(tmp_path))
    rows_per_epoch = trainer.num_training_batches
    order = [tuple(row.tolist()) for row in data.iter_training_rows(2 * rows_per_epoch)]
    place, expected = 0, []
    for epoch in range(2):
        inside, batch = 0, (2, 8)[epoch]
        while inside < rows_per_epoch:
            tokens = 16 * (place + inside)
            wanted = 8 if tokens >= 300 else 4 if tokens >= 96 else 2
            batch = wanted if inside % wanted == 0 else batch
            expected.append(min(batch, rows_per_epoch - inside))
            inside += expected[-1]
        place += rows_per_epoch
    assert [len(rows) for rows, *_ in steps] == expected
    assert {2, 4, 8} <= set(expected)
    first = 0
    for rows, _, tokens in steps:
        read = order[first : first + len(rows)]
        assert rows == sorted(row + (0,) * (16 - len(row)) for row in read)
        first += len(rows)
        assert tokens == sum(map(len, order[:first]))
    # a resume with another micro-batch, in the middle of a step, has the same steps
    before, *_ = fit_text(tmp_path, text_data(tmp_path), save_after=23)
    after, *_ = fit_text(tmp_path, text_data(tmp_path, micro_batch_size=2), ckpt_path=tmp_path / "text.ckpt")
    assert [*before, *after] == [(rows, pytest.approx(gradient), tokens) for rows, gradient, tokens in steps]


class ChangesAccumulation(Callback):
    """The naive way: sets the accumulation as soon as it is due."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == 5:
            trainer.accumulate_grad_batches = 4


def test_where_lightnings_own_ways_fail():
    """Steps by rows: its scheduler changes at epochs only, and a bare change leaves a window short and a mean wrong."""

    def lightning_only(callbacks, accumulate):
        watch = Watch()
        trainer = Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, accumulate_grad_batches=accumulate,
            callbacks=[TokenClock(counter=lambda b: 10 * len(b)), *callbacks, watch],
        )  # fmt: skip
        trainer.fit(Counting(), DataLoader(Rows(16), batch_size=1))
        return [len(rows) for rows, *_ in watch.steps], watch.steps

    assert lightning_only([GradientAccumulationScheduler({0: 2, 1: 4})], 1)[0] == [2] * 8
    sizes, steps = lightning_only([ChangesAccumulation()], 2)
    if sizes == [2, 2, 2, 4, 4, 2]:
        pytest.skip(f"Lightning {lightning.__version__} changes the accumulation at once and right")
    assert sizes == [2, 2, 2, 2, 4, 4]  # Lightning 2.6: the fourth is divided by 4, and on top of the third
    wrong = steps[3]
    assert wrong[1] != pytest.approx(sum(map(number_of, wrong[0])) / 2)
    ours, *_ = fit(TabulatedBatch([(60, 4)]), DataLoader(Rows(16), batch_size=1), accumulate=2, max_epochs=1,
                   of_scheduler={"unit": "rows"})  # fmt: skip
    assert [len(rows) for rows, *_ in ours] == [2, 2, 2, 2, 4, 4]
    check(ours, expected_steps([(60, 4)], 16, 1, 2, epochs=1))

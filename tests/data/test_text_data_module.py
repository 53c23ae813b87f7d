"""The DataModule alone and inside Lightning."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from lit_interns1.data import PackedBatch, TextDataModule, TextSource

MODULE_OPTIONS = {"row_length": 16, "global_batch_size": 6, "micro_batch_size": 2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two sources; some lines are in both."""
    generator = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "CCO", "c1ccccc1", "return x", "42"]

    def line() -> str:
        return " ".join(generator.choice(words, size=generator.integers(1, 12)))

    shared = [line() for _ in range(40)]
    (tmp_path / "a.txt").write_text("\n".join([line() for _ in range(250)] + shared) + "\n")
    (tmp_path / "b.txt").write_text("\n".join([line() for _ in range(60)] + shared) + "\n")
    return tmp_path


def make(folder: Path, ranks: int = 1, rank: int = 0, sources: Any = None, **options: Any) -> TextDataModule:
    if sources is None:
        sources = [TextSource(str(folder / f"{name}.txt"), lines=True) for name in "ab"]
    module = TextDataModule(sources, cache_dir=folder / "cache", **{**MODULE_OPTIONS, **options})
    if ranks > 1:
        strategy = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": ranks, "rank": rank})
        module.trainer = SimpleNamespace(strategy=strategy, accumulate_grad_batches=1)  # type: ignore[assignment]
    return module


def ready(folder: Path, *arguments: Any, **options: Any) -> TextDataModule:
    module = make(folder, *arguments, **options)
    module.prepare_data()
    module.setup("fit")
    return module


def rows_of(batch: PackedBatch) -> list[tuple[int, ...]]:
    return [tuple(row) for row in batch.input_ids.view(batch.num_rows, -1).tolist()]


def texts(module: TextDataModule, tokens: list[np.ndarray]) -> list[str]:
    end = module.tokenizer.end_of_text_id
    stream = np.concatenate(tokens)
    return [module.tokenizer.decode(part[part != end]) for part in np.split(stream, np.flatnonzero(stream == end) + 1)]


def test_documents_are_split_by_content(folder: Path):
    # rows of one document each, so that the documents can be read off
    module = ready(folder, validation_fraction=0.3, row_length=128, packing="whole", global_batch_size=2)
    training = set(texts(module, list(module.iter_training_rows(module.row_order.num_rows))))
    validation = [module.tokenizer.decode(segment.tokens_N[:-1]) for segment in module.iter_validation_documents()]
    lines = [line for name in "ab" for line in (folder / f"{name}.txt").read_text().splitlines()]
    assert not (training - {""}) & set(validation)
    assert (training - {""}) | set(validation) == set(lines)
    assert 0.2 < len(validation) / len(lines) < 0.4
    assert len(validation) == sum(line in set(validation) for line in lines)  # copies are on the same side
    other = ready(folder, validation_fraction=0.3, seed=1)
    assert {segment.first_token_id for segment in other.iter_validation_documents()} != set()
    assert [segment.tokens_N.tolist() for segment in other.iter_validation_documents()] != [
        segment.tokens_N.tolist() for segment in module.iter_validation_documents()
    ]


def losses_by_token_id(module: TextDataModule) -> dict[int, tuple[int, int, int]]:
    """validation_token_id -> (token, label, source)."""
    found: dict[int, tuple[int, int, int]] = {}
    loader = module.val_dataloader()
    for batch in loader:
        ids, source = batch.token_fields["validation_token_id"], batch.token_fields["source_id"]
        real = batch.sample_id_T >= 0
        assert bool(ids[~real].eq(-1).all())
        assert bool(source[~real].eq(-1).all())
        for key, *value in zip(*(x[real].tolist() for x in (ids, batch.input_ids, batch.labels, source)), strict=True):
            assert key not in found, "a token came twice"
            found[key] = tuple(value)
    return found


def test_validation_token_ids_are_stable(folder: Path):
    reference = losses_by_token_id(ready(folder, validation_fraction=0.2))
    assert sorted(reference) == list(range(len(reference)))
    for options in (
        {"micro_batch_size": 3},
        {"row_length": 7},
        {"row_length": 128, "packing": "whole"},
        {"row_length": 7, "packing": "whole", "overlong": "split"},
        {"num_workers": 1},
    ):
        assert losses_by_token_id(ready(folder, validation_fraction=0.2, **options)) == reference, options
    over_ranks: dict[int, tuple[int, int, int]] = {}
    modules = [ready(folder, 3, rank, validation_fraction=0.2) for rank in range(3)]
    assert len({len(module.val_dataloader()) for module in modules}) == 1
    for module in modules:
        part = losses_by_token_id(module)
        assert not part.keys() & over_ranks.keys()
        over_ranks |= part
    assert over_ranks == reference
    capped = ready(folder, validation_fraction=0.2, validation_rows=5)
    some = losses_by_token_id(capped)
    assert len(some) == 5 * 16
    assert some.items() <= reference.items()
    assert {source for _, _, source in some.values()} == {0, 1}
    listed = {
        segment.first_token_id + n: token
        for segment in capped.iter_validation_documents()
        for n, token in enumerate(segment.tokens_N.tolist())
    }
    assert listed == {key: value[0] for key, value in some.items()}


def test_separate_validation_sources(folder: Path):
    (folder / "v.txt").write_text("one\ntwo words\n")
    module = ready(folder, validation_sources=[TextSource(str(folder / "v.txt"), lines=True)])
    assert module.validation_source_names == ["v"]
    assert module.source_names == ["a", "b"]
    assert {key[2] for key in losses_by_token_id(module).values()} == {0}
    assert module.num_validation_tokens == len(losses_by_token_id(module))
    b_only = [TextSource(str(folder / "b.txt"), lines=True)]
    with pytest.warns(UserWarning, match="100 documents of the training source 'b' are also in validation_sources"):
        ready(folder, sources=b_only, validation_sources=b_only)
    assert ready(folder).val_dataloader() == []


def test_rows_for_reports_are_the_rows_of_training(folder: Path):
    module = ready(folder, global_batch_size=8)
    consumed = []
    for batch in module.train_dataloader():
        consumed += [
            row[row >= 0].tolist() for row in batch.input_ids.masked_fill(batch.sample_id_T < 0, -1).view(2, -1)
        ]
        if len(consumed) == 30:
            break
    assert module.rows_consumed == 30
    assert [row.tolist() for row in module.iter_training_rows()] == consumed
    assert [row.tolist() for row in module.iter_training_rows(20, first=11)] == consumed[11:20]


def test_two_ranks_read_what_one_reads(folder: Path):
    one = [row for batch in ready(folder).train_dataloader() for row in rows_of(batch)]
    loaders = [ready(folder, 2, rank, micro_batch_size=3).train_dataloader() for rank in range(2)]
    two = [row for batches in zip(*loaders, strict=True) for batch in batches for row in rows_of(batch)]
    assert one == two


def test_vocabulary(folder: Path):
    module = make(folder)
    assert module.vocab_size == 4096
    module.check_vocabulary(4096)
    with pytest.raises(ValueError, match="the model's vocabulary has 4000 entries, the tokenizer 4096"):
        module.check_vocabulary(4000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"row_length": 1}, "row_length must be at least 2, got 1"),
        ({"global_batch_size": 7}, r"global batch of 7 rows is not divisible by .* 2 × 1"),
        ({"micro_batch_size": 0}, "micro_batch_size must be at least 1"),
        ({"validation_fraction": 1.0}, r"validation_fraction must be in \[0, 1\), got 1.0"),
        ({"validation_fraction": 0.1, "validation_sources": "v.txt"}, "either validation_fraction"),
        ({"validation_rows": 0}, "validation_rows must be at least 1, got 0"),
        ({"packing": "dense"}, "packing='dense' is unknown"),
        ({"num_workers": -1}, "num_workers must be at least 0"),
    ],
)
def test_options_are_checked_at_once(folder: Path, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        make(folder, **options)


def test_data_are_checked_before_training(folder: Path):
    with pytest.raises(ValueError, match=r"none\.txt: no such file"):
        make(folder, sources=["none.txt"]).prepare_data()
    with pytest.raises(ValueError, match="selects none of the 1 documents; raise it"):
        ready(folder, sources=[str(folder / "a.txt")], validation_fraction=0.01)
    with pytest.raises(ValueError, match="rows, fewer than global_batch_size=100000"):
        ready(folder, global_batch_size=100_000)
    with pytest.raises(ValueError, match=r"source 'a': document 0 has [0-9]+ tokens, more than row_length=16"):
        ready(folder, sources=[str(folder / "a.txt")], packing="whole")
    with pytest.raises(RuntimeError, match="call prepare_data"):
        make(folder).val_dataloader()


class Recorder(pl.LightningModule):
    """Remembers the rows of every micro-batch, and the micro-batches at each optimizer step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.rows: list[tuple[int, ...]] = []
        self.rows_at_step: list[int] = []
        self.validated = 0

    def training_step(self, batch: PackedBatch, _: int) -> torch.Tensor:
        self.rows += rows_of(batch)
        return self.weight * 1.0

    def validation_step(self, batch: PackedBatch, _: int) -> None:
        self.validated += batch.num_tokens

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        super().optimizer_step(*arguments, **options)
        self.rows_at_step.append(len(self.rows))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_trainer(folder: Path, **options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return pl.Trainer(default_root_dir=folder, **{**quiet, "enable_checkpointing": False, **options})


class SaveAt(pl.Callback):
    """Saves a checkpoint in `on_train_batch_end` of one micro-batch, the way a checkpoint callback does."""

    def __init__(self, micro_batch: int, path: Path) -> None:
        self.micro_batch, self.path, self.seen = micro_batch, path, 0

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.seen += 1
        if self.seen == self.micro_batch:
            trainer.save_checkpoint(self.path)


def test_lightning_accumulates_and_validates(folder: Path):
    module, recorder = make(folder, validation_fraction=0.1), Recorder()
    trainer = make_trainer(folder, max_steps=4, limit_train_batches=6, num_sanity_val_steps=0)
    trainer.fit(recorder, datamodule=module)
    assert trainer.accumulate_grad_batches == 3
    assert recorder.rows_at_step == [6, 12, 18, 24]
    assert module.rows_consumed == 24
    assert recorder.validated == 2 * module.num_validation_tokens


@pytest.mark.parametrize("stop", [3, 6, 7])
def test_lightning_resumes_with_the_next_row(folder: Path, stop: int):
    whole = Recorder()
    make_trainer(folder, max_steps=5, callbacks=[SaveAt(stop, folder / "x.ckpt")]).fit(whole, datamodule=make(folder))
    resumed, module = Recorder(), make(folder)
    make_trainer(folder, max_steps=5).fit(resumed, datamodule=module, ckpt_path=folder / "x.ckpt", weights_only=False)
    assert len(whole.rows) == 30
    assert resumed.rows == whole.rows[2 * stop :]
    # with another micro-batch size, from the end of an optimizer step: the same rows in every step
    if stop % 3 == 0:
        other = Recorder()
        trainer = make_trainer(folder, max_steps=5)
        trainer.fit(other, datamodule=make(folder, micro_batch_size=6), ckpt_path=folder / "x.ckpt", weights_only=False)
        assert other.rows == whole.rows[2 * stop :]
        assert other.rows_at_step == [6 * n for n in range(1, 6 - stop // 3)]


def test_epochs_end_where_they_should_after_a_change_of_micro_batch(folder: Path):
    module, recorder = make(folder), Recorder()
    make_trainer(folder, max_epochs=1, callbacks=[SaveAt(9, folder / "x.ckpt")]).fit(recorder, datamodule=module)
    epoch = len(recorder.rows)
    other = Recorder()
    trainer = make_trainer(folder, max_epochs=2)
    trainer.fit(other, datamodule=make(folder, micro_batch_size=3), ckpt_path=folder / "x.ckpt", weights_only=False)
    assert len(other.rows) == 2 * epoch - 18
    assert trainer.current_epoch == 2
    assert other.rows_at_step[-1] == len(other.rows)
    assert len(other.rows_at_step) == (2 * epoch - 18) // 6


def test_lightning_refuses_what_contradicts(folder: Path):
    with pytest.raises(ValueError, match=r"accumulate_grad_batches=2\) contradicts global_batch_size=6.*takes 3"):
        make_trainer(folder, max_steps=1, accumulate_grad_batches=2).fit(Recorder(), datamodule=make(folder))
    with pytest.raises(ValueError, match=r"limit_train_batches=4\) is not a multiple of the 3 micro-batches"):
        make_trainer(folder, max_steps=1, limit_train_batches=4).fit(Recorder(), datamodule=make(folder))
    with pytest.raises(ValueError, match=r"overfit_batches=2\) is not possible"):
        make_trainer(folder, max_steps=1, overfit_batches=2).fit(Recorder(), datamodule=make(folder))
    trainer = make_trainer(folder, max_steps=1, callbacks=[SaveAt(1, folder / "x.ckpt")])
    trainer.fit(Recorder(), datamodule=make(folder))
    with pytest.raises(ValueError, match="row_length: 16 in the checkpoint, 8 now"):
        make_trainer(folder, max_steps=2).fit(
            Recorder(), datamodule=make(folder, row_length=8), ckpt_path=folder / "x.ckpt", weights_only=False
        )


def test_development_run_and_other_loops(folder: Path):
    recorder, module = Recorder(), make(folder, validation_fraction=0.1)
    make_trainer(folder, fast_dev_run=True).fit(recorder, datamodule=module)
    assert len(recorder.rows) == 2
    alone = Recorder()
    make_trainer(folder).validate(alone, datamodule=make(folder, validation_fraction=0.1), verbose=False)
    assert alone.validated == module.num_validation_tokens


class RankRecorder(Recorder):
    """Writes what each rank saw."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_train_end(self) -> None:
        torch.save((self.rows, self.validated), self.folder / f"rank{self.global_rank}.pt")


def test_two_processes_share_the_rows(folder: Path):
    """Real data-parallel training: Lightning leaves the loader's sampling alone."""
    trainer = make_trainer(folder, max_steps=3, devices=2, strategy="ddp_fork", limit_train_batches=9)
    trainer.fit(RankRecorder(folder), datamodule=make(folder, validation_fraction=0.1, micro_batch_size=1))
    parts = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]
    module = ready(folder, validation_fraction=0.1)
    rows = [row for batch, _ in zip(module.train_dataloader(), range(9)) for row in rows_of(batch)]
    together = [row for pair in zip(parts[0][0], parts[1][0], strict=True) for row in pair]
    assert together == rows

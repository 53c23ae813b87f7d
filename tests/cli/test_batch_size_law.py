"""`batch-size-law` on made-up run directories whose law is known."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from lit_interns1.cli import main
from lit_interns1.optim import BatchForLoss, FittedBatch
from lit_interns1.reports import RunDirectory

BATCHES = (1000, 1500, 2200, 3200, 4600, 6800)
RUN_TOKENS = 2_000_000


def loss_of(batch, tokens):
    """Curves that cross: a small batch falls faster at first, and ends higher."""
    return 2.0 + 0.35 * (1000 / batch) + (1 + tokens / (40 * batch)) ** -0.5


def write_run(folder, batch, rate=0.01, change=None, warmup=0, noise=0.0, columns=("train/loss", "optim/lr")):
    (folder / "metrics").mkdir(parents=True)
    steps = np.arange(RUN_TOKENS // batch)
    tokens = (steps + 1.0) * batch
    if change:
        tokens[len(steps) // 2 :] += np.arange(len(steps) - len(steps) // 2) * change
    losses = loss_of(batch, tokens) + noise * np.random.default_rng(batch).standard_normal(len(steps))
    rates = rate * np.minimum(tokens / warmup, 1.0) if warmup else np.full(len(steps), rate)
    values = {"train/loss": losses, "optim/lr": rates}
    rows = [",".join(["step", "train/tokens", *columns])]
    rows += [
        ",".join(map(repr, [int(s), float(t), *(float(values[c][s]) for c in columns)]))
        for s, t in zip(steps, tokens, strict=True)
    ]
    (folder / "metrics" / "metrics.csv").write_text("\n".join(rows) + "\n")
    return str(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [write_run(folder / f"b{batch}", batch, warmup=20_000, noise=0.005) for batch in BATCHES]


def test_the_law_is_that_of_the_curves_and_the_schedules_read_it(tmp_path, runs, capsys):
    out = tmp_path / "law"
    main(["batch-size-law", *runs, "--out", str(out), "--num_targets", "5", "--bootstrap", "20"])
    assert {path.name for path in out.iterdir()} == {
        "law.json", "law.md", "loss.png", "tokens_over_steps.png", "batch_size.png",
    }  # fmt: skip
    artefact = json.loads((out / "law.json").read_text())
    rows = artefact["table"]["rows"]
    bracketed = [row for row in rows if row["b_opt_bound"] == "none"]
    assert len(bracketed) >= 3
    for row in bracketed:  # the true optimum; E(S) of these curves is not quite of the fitted form
        batches = np.geomspace(900, 7500, 400)
        floors = 2.0 + 350 / batches
        with np.errstate(all="ignore"):
            tokens = np.where(row["loss"] > floors, 40 * batches * ((1 / (row["loss"] - floors)) ** 2 - 1), np.inf)
        assert row["b_opt"] == pytest.approx(batches[tokens.argmin()], rel=0.3)
        assert row["e_min"] == pytest.approx(tokens.min(), rel=0.1)
    by_loss = BatchForLoss(artefact=str(out / "law.json"), loss_half_life_tokens=1e4)
    assert by_loss(0, bracketed[1]["loss"]) == pytest.approx(bracketed[1]["b_opt"])
    fitted, law = FittedBatch(artefact=str(out / "law.json")), artefact["law"]
    assert law["q"] > 0
    assert fitted(1e6) == pytest.approx(np.exp(law["p"] + law["q"] * np.log(1e6)))
    printed = capsys.readouterr().out
    assert "| loss | B_min | B_opt |" in printed
    assert f"ln B = {law['p']:.3f} + {law['q']:.3f} ln D" in printed


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"change": 1000}, "batch size of the run .*bad is not constant: 1,000 to 2,000 tokens per step"),
        ({"rate": 0.02}, "the law holds at one learning rate, and the runs have several .*bad: 0.02.*--any_rate"),
        ({"warmup": 1_999_000}, "bad has 2 points with the learning rate at its peak, and the fit needs 8"),
        ({"columns": ("optim/lr",)}, "bad logged no 'train/loss'; it logged optim/lr, train/tokens"),
    ],
)
def test_unsuitable_runs_are_named(tmp_path, runs, capsys, options, words):
    bad = write_run(tmp_path / "bad", 1000, **options)
    with pytest.raises(SystemExit) as end:
        main(["batch-size-law", bad, *runs[1:], "--out", str(tmp_path / "law"), "--bootstrap", "0"])
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert re.search(words, message), message
    assert not (tmp_path / "law").exists()


def test_two_runs_are_too_few(tmp_path, runs, capsys):
    with pytest.raises(SystemExit):
        main(["batch-size-law", *runs[:2], "--out", str(tmp_path / "law")])
    assert "need three runs or more" in capsys.readouterr().err


def test_a_schedule_is_added_to_a_run_by_a_second_config(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    root = Path(__file__).parents[2]
    small = [
        "--model.config.hidden_size=32", "--model.config.num_layers=1", "--model.config.num_heads=2",
        "--model.config.num_kv_heads=1", "--model.config.head_dim=16", "--model.config.moe.num_experts=8",
        "--model.config.moe.intermediate_size=16", "--data.row_length=48", "--data.validation_rows=4",
        "--data.sources=[{path: 'bundled:molecules', prefix: '<SMILES>', suffix: '</SMILES>'}]",
        f"--data.cache_dir={root / '.cache' / 'tests'}", "--trainer.log_every_n_steps=1", "--clock.max_tokens=3840",
        "--trainer.callbacks.schedule.table=[[0, 384], [768, 768]]",
    ]  # fmt: skip
    configs = [f"--config={root / 'configs' / 'pretrain' / name}" for name in ("tiny.yaml", "tiny-batch-schedule.yaml")]
    main(["fit", *configs, f"--run_dir={tmp_path / 'run'}", *small])
    run = RunDirectory(tmp_path / "run")
    assert run.metric("batch/rows_per_step").values.tolist() == [8, 8, 16, 16, 16, 16]
    assert run.metric("batch/tokens_per_step").values.tolist() == [384, 384, 768, 768, 768, 768]
    assert run.metric("batch/switch").values.tolist() == [16]
    assert np.isfinite(run.metric("train/loss").values).all()


def test_runs_of_different_models_are_refused(tmp_path, capsys):
    paths = [write_run(tmp_path / f"b{batch}", batch) for batch in BATCHES[:3]]
    for path, rows, width in zip(paths, (8, 16, 32), (64, 64, 96), strict=True):
        data = f"data: {{init_args: {{global_batch_size: {rows}, row_length: 64}}}}"
        (Path(path) / "config.yaml").write_text(f"model: {{init_args: {{config: {{hidden_size: {width}}}}}}}\n{data}\n")
    with pytest.raises(SystemExit):
        main(["batch-size-law", *paths, "--out", str(tmp_path / "law")])
    message = "model.init_args.config.hidden_size is 64 in b1000 and 96 in b2200"
    assert message in capsys.readouterr().err
    assert not (tmp_path / "law").exists()

"""`batch-size-branch` on a tiny run: batches, rates and losses of the branches, and that the run stays as it is."""

import hashlib
import json

import pytest

from lit_interns1.cli import main
from lit_interns1.laws import smoothed_final_loss
from lit_interns1.reports import RunDirectory

CONFIG = """
seed_everything: 1
model:
  class_path: LanguageModelModule
  init_args:
    config:
      vocab_size: 4096
      hidden_size: 16
      num_layers: 1
      num_heads: 2
      num_kv_heads: 1
      head_dim: 8
      intermediate_size: 32
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.004}}
    schedule:
      class_path: WarmupStableDecay
      init_args: {total_tokens: 4096, warmup_tokens: 0, decay_tokens: 1024}
data:
  class_path: TextDataModule
  init_args:
    sources: [FILE]
    row_length: 32
    global_batch_size: 2
    micro_batch_size: 2
clock: {max_tokens: 640}
trainer:
  max_epochs: -1
  accelerator: cpu
  devices: 1
  enable_progress_bar: false
  log_every_n_steps: 1
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {dirpath: run/checkpoints, filename: "{step}", every_n_train_steps: 1, save_top_k: -1}
"""
SCHEDULER = """
    - class_path: BatchSizeScheduler
      init_args:
        schedule: {class_path: TabulatedBatch, init_args: {table: [[0, 2], [256, 4]]}}
        unit: rows
        learning_rate: linear
"""


def contents(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("callbacks", "rows", "rate", "checkpoint", "late"),
    [("", 2, 0.004, "step=10.ckpt", {1: 0, 2: 0, 4: 2}), (SCHEDULER, 4, 0.008, "last.ckpt", {1: 0, 2: 0, 4: 0})],
)
def test_branches_of_a_run(tmp_path, monkeypatch, capsys, callbacks, rows, rate, checkpoint, late):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    (tmp_path / "text.txt").write_text("salt and water and a field of stars " * 3000)
    (tmp_path / "config.yaml").write_text(CONFIG.replace("FILE", str(tmp_path / "text.txt")) + callbacks)
    main(["fit", "--config", "config.yaml", "--run_dir", "run"])
    before = contents(tmp_path / "run")
    command = ["batch-size-branch", "run", "--out", "out", "--tokens", "1536", "--checkpoint", checkpoint, "--factors"]
    main([*command, "1", "4"])
    main([*command, "1", "2", "4"])
    assert contents(tmp_path / "run") == before
    printed = capsys.readouterr().out
    assert "| 2 | " in printed

    result = json.loads((tmp_path / "out/branches.json").read_text())
    assert result["start_tokens"] == 640
    assert [one["batch"] for one in result["branches"]] == [32 * rows, 64 * rows, 128 * rows]
    for factor, one in zip((1, 2, 4), result["branches"], strict=True):
        metrics = RunDirectory(f"out/k{factor}").metrics()
        per_step, rates = metrics["batch/rows_per_step"].values, metrics["optim/lr"].values
        # inside an epoch the batch changes where its rows, 20 so far, divide by it; behind the end of a run at once
        assert set(per_step[: late[factor]]) <= {rows}
        assert set(per_step[late[factor] :]) == {factor * rows}
        assert rates == pytest.approx([rate * (value / rows) ** 0.5 for value in per_step])
        loss = metrics["train/loss"]
        assert 2176 <= loss.tokens[-1] < 2176 + 32 * factor * rows
        expected = smoothed_final_loss(loss.tokens, loss.values, 640, 2176, 128 * rows)
        assert one["loss"] == pytest.approx(expected)
        assert not list((tmp_path / f"out/k{factor}").rglob("*.ckpt"))
    assert (tmp_path / "out/branches.png").stat().st_size > 0

    unfinished = tmp_path / "out/k2"
    (unfinished / "finished").unlink()
    kept = contents(tmp_path / "out/k4")
    main([*command, "1", "2", "4"])
    assert contents(tmp_path / "out/k4") == kept
    assert (unfinished / "finished").exists()
    assert json.loads((tmp_path / "out/branches.json").read_text()) == result

    for options, words in (
        (["--out", "out", "--tokens", "2560", "--checkpoint", checkpoint], "have other settings (tokens 1536 → 2560)"),
        (
            ["--out", "new", "--tokens", "1000"],
            f"must be two steps of the largest batch, {2 * 8 * 32 * rows:,}, or more",
        ),
        (["--out", "run", "--tokens", "2048"], "run exists and holds no branches"),
        (["--out", "new", "--factors", "2"], "two different whole numbers or more, from 1 on; got [2]"),
        (["--out", "new", "--checkpoint", "none.ckpt"], "none.ckpt does not exist"),
        (["--out", "new", "--tokens", "3000"], "decays from 3,072 tokens on, and the branches would end at 3,640"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["batch-size-branch", "run", *options])
        assert end.value.code == 2
        assert words in capsys.readouterr().err
    # nothing was finished in `new`, so other settings are welcome
    more = ["--model.schedule.total_tokens", "8192"]
    main(["batch-size-branch", "run", "--out", "new", "--tokens", "3000", "--factors", "1", "2", *more])
    assert contents(tmp_path / "run") == before

"""The command line on several ranks: started by itself or by torchrun, stopped by SIGTERM, and continued elsewhere."""

import csv
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEPS = 10
CONFIGS = ["--config", str(ROOT / "configs/pretrain/tiny.yaml"), "--config", str(ROOT / "configs/strategy/ep2.yaml")]
SMALLER = [
    "--model.config.hidden_size=32", "--model.config.num_layers=2", "--model.config.head_dim=16",
    "--model.config.moe.intermediate_size=16", "--data.row_length=64", "--trainer.log_every_n_steps=1",
    "--trainer.val_check_interval=1000", "--data.sources=[{path: 'bundled:shakespeare', name: english}]",
    f"--clock.max_tokens={STEPS * 8 * 64}", "--trainer.num_sanity_val_steps=0",
]  # fmt: skip
LAUNCHER = [sys.executable, "-m", "lit_interns1.cli"]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(run, *options, launcher=None):
    command = [*(launcher or LAUNCHER), "fit", *CONFIGS, *SMALLER, f"--run_dir={run}", *options]
    command += [f"--data.cache_dir={run.parent / 'cache'}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "MASTER_PORT": str(free_port())}
    with open(f"{run}.log", "a") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, cwd=run.parent, start_new_session=True
        )


def finish(process, run, seconds=300):
    try:
        status = process.wait(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert status == 0, Path(f"{run}.log").read_text()[-4000:]


def losses(run, part="metrics.csv"):
    with (run / "metrics" / part).open() as file:
        return {
            float(row["train/tokens"]): float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]
        }


@pytest.mark.slow
def test_one_process_two_ranks_torchrun_and_a_run_that_was_stopped_agree(tmp_path):
    one = ["--trainer.devices=1", "--data.micro_batch_size=8"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    torchrun += ["-m", "lit_interns1.cli"]
    for name, options, launcher in [
        ("one", [*one, "--trainer.strategy=auto"], None), ("two", [], None), ("torchrun", [], torchrun),
    ]:  # fmt: skip
        finish(start(tmp_path / name, *options, launcher=launcher), tmp_path / name)
    expected = losses(tmp_path / "two")
    assert len(expected) == STEPS
    assert losses(tmp_path / "torchrun") == expected
    single = losses(tmp_path / "one")
    assert list(single) == list(expected)
    assert list(single.values()) == pytest.approx(list(expected.values()), rel=2e-5)

    generate = ["generate", f"--ckpt={tmp_path / 'two/checkpoints/last.ckpt'}", "--prompt=ROMEO.", "--max_new_tokens=4"]
    assert subprocess.run([*LAUNCHER, *generate], capture_output=True, text=True, check=True).stdout.startswith(
        "ROMEO."
    )
    refused = start(tmp_path / "two", *one, "--trainer.strategy=auto", "--ckpt_path=last")
    assert refused.wait(timeout=300) == 2
    assert "is sharded: add --trainer.strategy moe_parallel" in (tmp_path / "two.log").read_text()

    stopped = tmp_path / "stopped"
    process = start(stopped, "--checkpoint.every_n_train_steps=3")
    deadline = time.monotonic() + 300
    while not (stopped / "checkpoints" / "last.ckpt").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, Path(f"{stopped}.log").read_text()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    finish(process, stopped)
    done = losses(stopped)
    assert 3 <= len(done) < STEPS
    assert "SIGTERM: step" in Path(f"{stopped}.log").read_text()
    for name, options in [
        ("on-1", ["--trainer.strategy.expert_parallel_size=1", *one]),
        ("on-4", ["--trainer.strategy.expert_parallel_size=4", "--trainer.devices=4", "--data.micro_batch_size=2"]),
    ]:
        run = tmp_path / name
        shutil.copytree(stopped, run, symlinks=True)
        finish(start(run, "--ckpt_path=last", *options), run)
        both = done | losses(run, "resumed-1/metrics.csv")
        assert list(both) == list(expected), name
        assert list(both.values()) == pytest.approx(list(expected.values()), rel=2e-5), name

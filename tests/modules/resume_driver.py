"""Trains, kills, resumes. Run as a script: heavy imports once, then every attempt is a forked process.

resume_driver.py DIRECTORY reference | killed | ranks
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", WANDB_MODE="disabled")

import torch
from lightning.pytorch import Callback

from lit_interns1.commands import trainer as command

CONFIG = Path(__file__).parents[2] / "configs" / "pretrain" / "tiny.yaml"
STEPS = 36


class Recorder(Callback):
    """One line per micro-batch with what it was made of, one per optimizer step with its loss; may end itself."""

    def __init__(self, file: Path, kill_at: tuple[int, int] | None = None, delay: float = 0.0) -> None:
        self.file, self.kill_at, self.delay = file, kill_at, delay
        self.micro = 0
        self.attempt = f"{time.monotonic():.6f}"

    def write(self, trainer, entry: dict) -> None:
        with self.file.open("a") as stream:
            stream.write(
                json.dumps({"step": trainer.global_step, "rank": trainer.global_rank, "attempt": self.attempt, **entry})
                + "\n"
            )

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        time.sleep(self.delay)
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.micro = 0
        if self.kill_at == (trainer.global_step, self.micro):
            os.kill(os.getpid(), signal.SIGKILL)
        rows = batch.input_ids.view(batch.num_rows, -1)
        digests = [hashlib.sha1(row.numpy().tobytes()).hexdigest()[:12] for row in rows]
        self.write(trainer, {"micro": self.micro, "rows": digests})
        self.micro += 1

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.write(trainer, {"loss": trainer.callback_metrics["train/loss"].item().hex()})


def arguments(directory: Path, resume: bool, *extra: str) -> list[str]:
    shape = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16}
    options = [f"--model.config.{name}={value}" for name, value in shape.items()]
    options += ["--model.config.moe.intermediate_size=16", "--model.config.moe.num_experts=8"]
    options += ["--data.sources=[{path: 'bundled:molecules', name: molecules}]", "--data.row_length=48"]
    options += ["--data.global_batch_size=12", "--data.micro_batch_size=4", "--data.num_workers=2"]
    options += [f"--data.cache_dir={directory.parent / 'cache'}", "--data.validation_rows=4"]
    options += [
        f"--clock.max_tokens={STEPS * 12 * 48}",
        "--trainer.log_every_n_steps=1",
        "--trainer.val_check_interval=1000",
    ]
    options += ["--checkpoint.every_n_train_steps=3", "--trainer.enable_progress_bar=false"]
    resumed = ["--ckpt_path=last"] if resume else []
    return ["fit", f"--config={CONFIG}", f"--run_dir={directory}", *options, *resumed, *extra]


def attempt(log: Path, args: list[str], recorder: Recorder, kill_after: tuple[int, float] | None = None) -> int:
    """Runs the command in a forked process, kills it some records and seconds later if asked; returns its status."""
    before = recorder.file.read_text().count("\n") if recorder.file.exists() else 0
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
            os.dup2(1, 2)
            command.run(args, callbacks=[recorder])
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    if kill_after is not None:
        records, seconds = kill_after
        while recorder.file.read_text().count("\n") < before + records:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return status
            time.sleep(0.002)
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def main() -> None:
    directory, mode = Path(sys.argv[1]), sys.argv[2]
    run, file, log = directory / "run", directory / "record.jsonl", directory / "log.txt"
    directory.mkdir(parents=True, exist_ok=True)
    if mode == "reference":
        assert attempt(log, arguments(run, False), Recorder(file)) == 0, log.read_text()
    elif mode == "killed":
        # once between two micro-batches of a window, four times at random moments
        assert attempt(log, arguments(run, False), Recorder(file, kill_at=(10, 1))) == signal.SIGKILL, log.read_text()
        dice = random.Random(int(sys.argv[3]))
        for _ in range(4):
            moment = (dice.randint(2, 20), dice.uniform(0.0, 0.05))
            status = attempt(log, arguments(run, True), Recorder(file, delay=0.01), moment)
            assert status == signal.SIGKILL, log.read_text()
        assert attempt(log, arguments(run, True), Recorder(file)) == 0, log.read_text()
    elif mode == "ranks":
        assert attempt(log, arguments(run, False), Recorder(file, kill_at=(16, 2))) == signal.SIGKILL, log.read_text()
        two = ["--data.micro_batch_size=2", "--trainer.devices=2", "--trainer.strategy=ddp_fork"]
        two += ["--trainer.enable_progress_bar=true"]
        assert attempt(log, arguments(run, True, *two), Recorder(file)) == 0, log.read_text()
    weights = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    digest = hashlib.sha1()
    for name, value in sorted(weights["state_dict"].items()):
        digest.update(name.encode() + value.numpy().tobytes())
    print(json.dumps({"steps": weights["global_step"], "weights": digest.hexdigest()}))


if __name__ == "__main__":
    main()

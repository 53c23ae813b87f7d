"""A training step of our language model beside transformers' Qwen3-MoE, and what Lightning adds to a step.

    python benchmarks/train_step.py [--quick] [--part model lightning] [--untied]

Model: 15.4 M parameters (4 layers, 32 experts, 4 per token), float32, 8 × 256 tokens, in a plain loop: zero_grad,
forward with the loss, backward, fused AdamW. Every contender has a process of its own with the same weights, batches
and allocator setting; they take turns. Both allocator settings are reported: glibc's default, and thresholds raised so
that freed memory is kept. Memory is the peak above weights and optimizer state.
Lightning: CPU time per step of a fit with every callback and logger that the command line adds, minus the same module
in a bare loop, for a module with next to no work.

Goals on a CPU: 1.3 times the tokens/s and 0.6 times the memory of the fastest transformers variant; first losses equal
within 1e-5; at most 3 ms of CPU time per step from Lightning and the callbacks.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measure import ALLOCATORS, MEBIBYTE, environment, peak_anonymous, start_peak, started, verdict
from torch import Tensor, nn

from lit_interns1.models import LanguageModel, LanguageModelConfig, MoEConfig, PositionConfig
from lit_interns1.objectives import NextTokenCrossEntropy

OURS = "ours"
IMPLEMENTATIONS = ("grouped_mm", "eager", "batched_mm")
GATHER_LIMIT = 2 << 30  # bytes of expert weights that "batched_mm" may copy per step: it gathers them for every token
LOSS_GOAL = 1e-5
SPEED_GOAL, PEAK_GOAL = 1.3, 0.6
LIGHTNING_GOAL = 3.0  # ms


@dataclass(frozen=True)
class Job:
    """Sizes of the model part."""

    rows: int = 8
    length: int = 256
    rounds: int = 7
    steps: int = 2
    tied: bool = True

    @property
    def config(self) -> LanguageModelConfig:
        return LanguageModelConfig(
            vocab_size=8192, hidden_size=256, num_layers=4, num_heads=8, num_kv_heads=2, head_dim=32,
            moe=MoEConfig(32, 4, 128), positions=PositionConfig(theta=1e4, max_position_embeddings=512),
            tie_word_embeddings=self.tied,
        )  # fmt: skip

    def rows_of(self, name: str) -> int:
        """Rows per step: all, but for the variant that copies its experts' weights for every token as many as fit."""
        if name != "batched_mm":
            return self.rows
        config, moe = self.config, self.config.moe
        assert moe is not None
        expert_bytes = 3 * config.hidden_size * moe.intermediate_size * 4
        copied_per_row = self.length * moe.experts_per_token * config.num_layers * expert_bytes
        return max(1, min(self.rows, GATHER_LIMIT // copied_per_row))


class Start(NamedTuple):
    """What all contenders must agree on before the first step."""

    parameters: int
    loss: float
    gradient_norm: float


Step = Callable[[Tensor], Tensor]


def build_ours(job: Job) -> tuple[nn.Module, Step]:
    """Our model and its loss."""
    model = LanguageModel.create(job.config, seed=0)
    objective = NextTokenCrossEntropy()

    def loss(ids: Tensor) -> Tensor:
        labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], dim=1).flatten()
        output = model(ids, targets=labels, gradient_hint=objective.gradient_hint(labels))
        assert output.scores is not None
        return objective(output.scores, labels)[0].mean

    return model, loss


def build_transformers(job: Job, experts_implementation: str) -> tuple[nn.Module, Step]:
    """The same model in transformers, with our initial weights, and its loss."""
    import transformers

    config, moe = job.config, job.config.moe
    assert moe is not None
    model = transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            vocab_size=config.vocab_size, hidden_size=config.hidden_size, num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads, num_key_value_heads=config.num_kv_heads, head_dim=config.head_dim,
            num_experts=moe.num_experts, num_experts_per_tok=moe.experts_per_token,
            moe_intermediate_size=moe.intermediate_size, norm_topk_prob=moe.normalize_weights, decoder_sparse_step=1,
            mlp_only_layers=[], rms_norm_eps=config.rms_norm_eps, tie_word_embeddings=config.tie_word_embeddings,
            max_position_embeddings=config.positions.max_position_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": config.positions.theta},
            attn_implementation="sdpa", use_cache=False,
        )
    )  # fmt: skip
    model.set_experts_implementation(experts_implementation)
    ours = LanguageModel.create(config, seed=0).state_dict()
    state = {n if n.startswith("lm_head.") else f"model.{n.replace('.router.', '.gate.')}": w for n, w in ours.items()}
    model.load_state_dict(state)
    return model.train(), lambda ids: model(input_ids=ids, labels=ids).loss


def contender(name: str, job: Job, connection: Connection) -> None:
    """One process: sends what must be equal, then (wall, CPU) seconds per step for every request, then its memory."""
    model, loss_of = build_ours(job) if name == OURS else build_transformers(job, name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, job.config.vocab_size, (4, job.rows, job.length), generator=generator)
    batches = ids[:, : job.rows_of(name)]
    first_loss = loss_of(ids[0, :1])  # one row: every variant can hold it
    first_loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item()
    start = Start(sum(p.numel() for p in model.parameters()), first_loss.item(), norm)

    def step(number: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss_of(batches[number % len(batches)]).backward()
        optimizer.step()

    step(0)
    optimizer.zero_grad(set_to_none=True)
    level = start_peak()
    connection.send(start)
    done = 1
    while (steps := connection.recv()) > 0:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            step(done)
            done += 1
        connection.send(((time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps))
    connection.send(peak_anonymous() - level)


def compare_models(job: Job) -> None:
    """Prints the first table, once per allocator setting."""
    names = [OURS, *IMPLEMENTATIONS]
    for title, setting in ALLOCATORS.items():
        seconds: dict[str, list[float]] = {name: [] for name in names}
        cpu: dict[str, list[float]] = {name: [] for name in names}
        with environment({"OMP_WAIT_POLICY": "PASSIVE", **setting}), contextlib.ExitStack() as stack:
            processes = {name: stack.enter_context(started(contender, name, job)) for name in names}
            first: dict[str, Start] = {name: process.recv() for name, process in processes.items()}
            for turn in range(job.rounds + 1):
                for name, process in processes.items():
                    process.send(job.steps)
                    wall_seconds, cpu_seconds = process.recv()
                    if turn:  # the first is a warm-up
                        seconds[name].append(wall_seconds)
                        cpu[name].append(cpu_seconds)
            peak = {}
            for name, process in processes.items():
                process.send(0)
                peak[name] = process.recv()

        def difference(name: str, field: str, first: dict[str, Start] = first) -> float:
            mine, theirs = getattr(first[OURS], field), getattr(first[name], field)
            return abs(theirs - mine) / mine

        tokens = {name: job.rows_of(name) * job.length for name in names}
        speed = {name: tokens[name] / statistics.median(seconds[name]) for name in names}
        cpu_per_token = {name: statistics.median(cpu[name]) / tokens[name] for name in names}
        best = max((n for n in IMPLEMENTATIONS if tokens[n] == tokens[OURS]), key=speed.__getitem__)
        head = "tied" if job.tied else "untied"
        print(
            f"\n{title}: {job.rows} × {job.length} tokens, {head} head, float32, {torch.get_num_threads()} threads, "
            f"torch {torch.__version__}, median and best of {job.rounds} rounds of {job.steps} steps"
        )
        print(
            f"{'':32}{'tokens/s':>9}{'best':>8}{'ratio':>7}{'s/step':>8}{'CPU s':>7}{'CPU ratio':>10}"
            f"{'peak MiB':>9}{'parameters':>12}{'loss diff':>11}{'gradient diff':>15}"
        )
        for name in names:
            label = name if name == OURS else f"transformers, {name}"
            if tokens[name] != tokens[OURS]:
                label += f", {job.rows_of(name)} row"
            loss, gradient = difference(name, "loss"), difference(name, "gradient_norm")
            print(
                f"{label:32}{speed[name]:9.0f}{tokens[name] / min(seconds[name]):8.0f}{speed[name] / speed[best]:7.2f}"
                f"{statistics.median(seconds[name]):8.3f}{statistics.median(cpu[name]):7.2f}"
                f"{cpu_per_token[name] / cpu_per_token[best]:10.2f}{peak[name] / MEBIBYTE:9.0f}"
                f"{first[name].parameters:12,}{loss:11.1e}{gradient:15.1e}"
            )
        worst = max(difference(name, "loss") for name in names)
        print(f"goal: first losses equal within {LOSS_GOAL:.0e}: {verdict(worst <= LOSS_GOAL)}")
        faster, smaller = speed[OURS] / speed[best], peak[OURS] / peak[best]
        print(f"goal: {SPEED_GOAL} × the tokens/s of {best}: {faster:.2f}, {verdict(faster >= SPEED_GOAL)}")
        print(f"goal: {PEAK_GOAL} × the peak of {best}: {smaller:.2f}, {verdict(smaller <= PEAK_GOAL)}")


# -- Lightning ---------------------------------------------------------------------------------------------------------

LADDER = (
    "bare loop",
    "Trainer alone",
    "+ clock, exact loss, learning rate",
    "+ throughput, expert load, checkpoint, console",
    "+ CSV log",
    "+ W&B log",
    "+ three means logged by the module",
)
FULL = "+ W&B log"  # everything that the command line adds


def fit_or_loop(rung: int, warmup: int, steps: int, log_every: int, directory: Path) -> float:
    """CPU milliseconds per step on one rung of the ladder."""
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    from lit_interns1.callbacks import (
        ConsoleProgress,
        RouterLoadMonitor,
        ThroughputMonitor,
        TokenClock,
        TokenExactLoss,
        TokenLearningRate,
    )
    from lit_interns1.commands.trainer import default_loggers
    from lit_interns1.data.packed_batch import PackedBatch
    from lit_interns1.optim import WarmupStableDecay
    from lit_interns1.training import SummedLoss, WindowMeans

    class NearEmpty(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)
            self.means = WindowMeans()

        def training_step(self, batch: PackedBatch, batch_idx: int) -> SummedLoss | Tensor:
            loss = self.layer(batch.input_ids[:8].float()).square().sum()
            summed = SummedLoss(loss, torch.tensor(float(batch.num_loss_tokens)))
            if rung >= 6:
                self.means.add({"train/loss": loss, "train/balance": loss, "train/router_z": loss}, summed.count)
            return summed if rung >= 2 else summed.mean

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            for name, value in self.means.reduce().items():
                self.log(name, value, prog_bar=name == "train/loss")

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3, fused=True)

    class Batches:
        def __init__(self) -> None:
            ids = torch.arange(256)
            self.batch = PackedBatch.concatenate([PackedBatch.from_documents([{"input_ids": ids}]) for _ in range(8)])

        def __iter__(self) -> Iterator[PackedBatch]:
            return (self.batch for _ in range(len(self)))

        def __len__(self) -> int:
            return warmup + steps + 1

    class Window(Callback):
        started = ended = 0.0

        def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
            if batch_idx == warmup:
                self.started = time.process_time()
            elif batch_idx == warmup + steps:
                self.ended = time.process_time()

    module, batches, window = NearEmpty(), Batches(), Window()
    if rung == 0:
        optimizer = module.configure_optimizers()
        for number, batch in enumerate(batches):
            window.on_train_batch_start(None, module, batch, number)  # type: ignore[arg-type]
            optimizer.zero_grad()
            loss = module.training_step(batch, number)
            assert isinstance(loss, Tensor)
            loss.backward()
            optimizer.step()
        return (window.ended - window.started) / steps * 1e3

    callbacks: list[Callback] = [window]
    if rung >= 2:
        schedule = WarmupStableDecay(total_tokens=2048 * len(batches))
        callbacks += [TokenClock(), TokenExactLoss(), TokenLearningRate(schedule)]
    if rung >= 3:
        checkpoint = ModelCheckpoint(
            directory / "checkpoints", every_n_train_steps=1 << 40, save_top_k=0, auto_insert_metric_name=False
        )
        callbacks += [ThroughputMonitor(), RouterLoadMonitor(), checkpoint, ConsoleProgress()]
    with environment({"WANDB_MODE": "offline" if rung >= 5 else "disabled", "WANDB_SILENT": "true"}):
        trainer = Trainer(
            accelerator="cpu", devices=1, max_epochs=1, log_every_n_steps=log_every, default_root_dir=str(directory),
            logger=default_loggers(directory) if rung >= 4 else False, callbacks=callbacks,
            enable_checkpointing=rung >= 3, enable_progress_bar=rung >= 3, enable_model_summary=False,
        )  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.fit(module, batches)
        if rung >= 5:
            import wandb

            wandb.finish()
    return (window.ended - window.started) / steps * 1e3


def measure_lightning(rounds: int, warmup: int, steps: int, log_every: int, connection: Connection) -> None:
    """Sends the milliseconds of every round, by rung."""
    import lightning.pytorch  # noqa: F401  (sets the levels that are changed here)

    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "wandb"):
        logging.getLogger(name).setLevel(logging.ERROR)
    results: dict[str, list[float]] = {name: [] for name in LADDER}
    for _ in range(rounds):
        for rung, name in enumerate(LADDER):
            with tempfile.TemporaryDirectory() as directory:
                results[name].append(fit_or_loop(rung, warmup, steps, log_every, Path(directory)))
    connection.send(results)


def compare_lightning(rounds: int, warmup: int, steps: int, log_every: int) -> None:
    """Prints the second table."""
    with (
        environment({"OMP_WAIT_POLICY": "PASSIVE"}),
        started(measure_lightning, rounds, warmup, steps, log_every) as process,
    ):
        results = process.recv()
    milliseconds = {name: statistics.median(values) for name, values in results.items()}
    print(
        f"\nCPU time per step of a module with one small layer, logging every {log_every} steps, "
        f"median of {rounds} fits of {steps} steps"
    )
    print(f"{'':48}{'ms/step':>8}{'over bare':>10}{'added':>8}{'least':>8}")
    before = 0.0
    for name in LADDER:
        value = milliseconds[name]
        print(
            f"{name:48}{value:8.3f}{value - milliseconds[LADDER[0]]:10.3f}{value - before:8.3f}"
            f"{min(results[name]):8.3f}"
        )
        before = value
    overhead = milliseconds[FULL] - milliseconds[LADDER[0]]
    print(f"goal: at most {LIGHTNING_GOAL:g} ms over the bare loop: {overhead:.2f} ms, ", end="")
    print(verdict(overhead <= LIGHTNING_GOAL))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["model", "lightning"], nargs="+", default=["model", "lightning"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="training steps of one turn")
    parser.add_argument("--untied", action="store_true", help="a head with a weight of its own (17.5 M parameters)")
    parser.add_argument("--log-every", type=int, default=10, help="log_every_n_steps of the fits")
    parser.add_argument("--quick", action="store_true", help="small and short: shows that it runs, says nothing")
    arguments = parser.parse_args()
    job = Job(rounds=arguments.rounds, steps=arguments.steps, tied=not arguments.untied)
    if arguments.quick:
        job = Job(rows=2, length=64, rounds=2, steps=1, tied=job.tied)
    if "model" in arguments.part:
        compare_models(job)
    if "lightning" in arguments.part:
        rounds, warmup, steps = (1, 5, 20) if arguments.quick else (5, 50, 400)
        compare_lightning(rounds, warmup, steps, arguments.log_every)


if __name__ == "__main__":
    main()

"""One step of Muon and Mousse beside AdamW's and other packages' Muon, on one process and on two ranks.

    python benchmarks/optimisers.py [--part steps training ranks] [--sets tiny large] [--layers 12] [--repeats 5]

Steps: parameters of the tiny model (configs/pretrain/tiny.yaml) and of a model of about 100 M (12 layers of width
768, two of them with experts; `--layers` takes fewer of the dense ones), float32, random gradients. Every contender
has its own optimizer over the same tensors, AdamW updates embeddings and vectors everywhere, and all take turns.
Mousse pays for its bases every tenth step: steps with and without are timed apart and given as the mean over ten.
Other packages take no stacks of experts, or take one for one matrix: they get the matrices of a stack one by one, as
views. The other packages compute in bfloat16 whatever the parameters are; ours is shown with both, since processors
differ in what they are fast at. Floor: the operations of the products in five Newton–Schulz iterations, at the rate
of one square product of 512. Memory is the peak of one step above parameters, gradients and state, in a fresh
process.

Training: CPU time of the optimizer beside that of the whole step, for the two models of configs/studies/optimizers.

Ranks: two gloo ranks with one thread each, the matrices of a dense model divided by FSDP2: collectives per step as
CommDebugMode counts them, and the time. Ours beside torch.optim.Muon, which computes through DTensor.

Goals: Muon's step on one process no slower than any peer's in the same number format, and on two ranks with fewer
collectives than torch's and no slower.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from measure import MEBIBYTE, environment, interleaved_medians, interleaved_times, peak_extra_memory, started, verdict
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.optim import Optimizer

from lit_interns1.models import LanguageModel, LanguageModelConfig, MoEConfig, PositionConfig
from lit_interns1.objectives import NextTokenCrossEntropy
from lit_interns1.optim import Mousse, Muon, matrix_groups, weight_decay_groups

TINY = LanguageModelConfig(
    4096, 128, 4, 4, 2, 32, moe=MoEConfig(32, 4, 64, router="grouped", num_groups=4),
    positions=PositionConfig("fope", 1e4, 512),
)  # fmt: skip
STUDY = {
    "0.44 M": LanguageModelConfig(
        4096, 48, 3, 3, 1, 16, moe=MoEConfig(16, 4, 32, router="grouped", num_groups=4, router_gradient="ste"),
        positions=PositionConfig("fope", 1e4, 512), tie_word_embeddings=True,
    ),
    "1.68 M": LanguageModelConfig(
        4096, 96, 4, 6, 2, 16, moe=MoEConfig(16, 4, 64, router="grouped", num_groups=4, router_gradient="ste"),
        positions=PositionConfig("fope", 1e4, 512), tie_word_embeddings=True,
    ),
}  # fmt: skip
DENSE = LanguageModelConfig(4096, 96, 4, 4, 2, 24, intermediate_size=256)
PLAIN, REFRESH = "without new bases", "with new bases"
PATIENCE = 30.0  # seconds for one step of a contender
PERIOD = 10  # steps from one refresh of Mousse's bases to the next


def large(layers: int) -> LanguageModelConfig:
    """About 100 M parameters with 12 layers, of which the last two have experts."""
    return LanguageModelConfig(
        16384, 768, layers, 12, 4, 64, intermediate_size=2048, moe=MoEConfig(8, 2, 512),
        dense_layers=tuple(range(layers - min(2, layers - 1))), tie_word_embeddings=True,
    )  # fmt: skip


# -- contenders --------------------------------------------------------------------------------------------------------


class Pair:
    """Two optimizers that step together: one for matrices, AdamW for the rest."""

    def __init__(self, matrices: Optimizer, rest: Optimizer) -> None:
        self.optimizers = (matrices, rest)

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


def split_matrices(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """All matrices one by one, views of fused and stacked ones included, with their gradients; and everything else."""
    matrices, rest = [], []
    for group in matrix_groups(model):
        for parameter in group["params"]:
            if group["kind"] == "elementwise":
                rest.append(parameter)
                continue
            assert parameter.grad is not None
            shape = (-1, parameter.shape[-2] // group["row_blocks"], parameter.shape[-1])
            for weight, gradient in zip(parameter.detach().view(shape), parameter.grad.view(shape), strict=True):
                matrices.append(nn.Parameter(weight))
                matrices[-1].grad = gradient
    return matrices, rest


def adamw(parameters: Iterable[Any], fused: bool = True) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-6, betas=(0.9, 0.95), weight_decay=0.1, fused=fused, foreach=False)


def torch_muon(model: nn.Module) -> Pair:
    matrices, rest = split_matrices(model)
    return Pair(torch.optim.Muon(matrices, lr=1e-6, adjust_lr_fn="match_rms_adamw"), adamw(rest))


def package_muon(model: nn.Module) -> Pair:
    from pytorch_optimizer import Muon as PackageMuon

    matrices, rest = split_matrices(model)
    groups = [{"params": matrices, "use_muon": True, "lr": 1e-6, "weight_decay": 0.1, "use_adjusted_lr": True}]
    return Pair(PackageMuon(groups), adamw(rest))


def ours(model: nn.Module, dtype: str | None = None) -> Optimizer:
    return Muon(matrix_groups(model), lr=1e-6, compute_dtype=dtype)


def mousse(model: nn.Module, side: Any) -> Optimizer:
    return Mousse(matrix_groups(model), lr=1e-6, side=side)


ADAMW, FLOOR = "AdamW, torch, fused", "floor"
TORCH, PACKAGE = "Muon, torch, bf16", "Muon, pytorch-opt., bf16"
OURS, OURS_16 = "Muon, ours", "Muon, ours, bf16"
CONTENDERS: dict[str, Callable[[nn.Module], Any]] = {
    ADAMW: lambda model: adamw(weight_decay_groups(model)),
    "AdamW, torch, plain": lambda model: adamw(weight_decay_groups(model), fused=False),
    TORCH: torch_muon,
    PACKAGE: package_muon,
    OURS: ours,
    OURS_16: lambda model: ours(model, "bfloat16"),
    "Mousse, ours, both": lambda model: mousse(model, "both"),
    "Mousse, ours, auto": lambda model: mousse(model, "auto"),
    "Mousse, ours, smaller": lambda model: mousse(model, "smaller"),
}


def product_rate(dtype: torch.dtype) -> float:
    """Operations per second in a square product of 512."""
    square = torch.randn(512, 512).to(dtype)
    product = torch.empty_like(square)
    return 2 * 512**3 / interleaved_medians({"": lambda: torch.mm(square, square, out=product)})[""]


def why_not(name: str, seconds: float) -> str | None:
    """Why a contender cannot run, or None; `seconds` is what bfloat16 products alone would take."""
    if name == PACKAGE and importlib.util.find_spec("pytorch_optimizer") is None:
        return "not installed"
    if name in (TORCH, PACKAGE, OURS_16) and seconds > PATIENCE:
        return f"not run: its bfloat16 products alone would take {seconds:.0f} s on this processor"
    return None


def with_gradients(config: LanguageModelConfig) -> nn.Module:
    """The model's parameters with random gradients."""
    model = LanguageModel.create(config, seed=0)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


def state_bytes(optimizer: Any) -> int:
    """Of all tensors that are kept from step to step."""
    optimizers = optimizer.optimizers if isinstance(optimizer, Pair) else (optimizer,)
    states = [state for each in optimizers for state in each.state.values()]
    return sum(value.nbytes for state in states for value in state.values() if isinstance(value, Tensor))


def turns(name: str, optimizer: Any) -> dict[str, Callable[[], Any]]:
    """What is timed: the step, and for Mousse one without and one with new bases."""
    if not isinstance(optimizer, Mousse):
        return {name: optimizer.step}

    def step(period: int) -> None:
        optimizer.refresh_every = period
        optimizer.step()

    return {f"{name}, {PLAIN}": lambda: step(1 << 40), f"{name}, {REFRESH}": lambda: step(1)}


# -- steps on one process ----------------------------------------------------------------------------------------------


def iteration_operations(model: nn.Module) -> float:
    """Of the products in five Newton–Schulz iterations over all matrices."""
    total = 0.0
    for matrix in split_matrices(model)[0]:
        small, wide = sorted(matrix.shape)
        total += 5 * (4 * small * small * wide + 2 * small**3)
    return total


def build_step(config: LanguageModelConfig, name: str) -> Callable[[], Any]:
    """For the memory of one step that computes no bases; the state is there before."""
    optimizer = CONTENDERS[name](with_gradients(config))
    steps = list(turns(name, optimizer).values())
    steps[-1]()
    return steps[0]


def measure_steps(config: LanguageModelConfig, names: list[str], repeats: int, connection: Connection) -> None:
    """One process: sends what a table needs."""
    model = with_gradients(config)
    optimizers = {name: CONTENDERS[name](model) for name in names}
    square = torch.randn(512, 512)
    product = torch.empty_like(square)
    candidates: dict[str, Callable[[], Any]] = {FLOOR: lambda: torch.mm(square, square, out=product)}
    for name, optimizer in optimizers.items():
        candidates |= turns(name, optimizer)
    seconds = interleaved_medians(candidates, repeats)
    for name, optimizer in optimizers.items():
        if isinstance(optimizer, Mousse):
            plain, refresh = (seconds.pop(f"{name}, {kind}") for kind in (PLAIN, REFRESH))
            seconds[name] = plain + (refresh - plain) / PERIOD
            seconds[f"{name}, {REFRESH}"] = refresh
    sizes = {name: state_bytes(optimizer) for name, optimizer in optimizers.items()}
    rate = 2 * 512**3 / seconds.pop(FLOOR)
    parameters = [p.numel() for p in model.parameters()]
    connection.send((seconds, sizes, rate, iteration_operations(model), sum(parameters), len(split_matrices(model)[0])))


def compare_steps(title: str, config: LanguageModelConfig, skipped: list[str], repeats: int) -> None:
    """Prints one table."""
    slow_rate = product_rate(torch.bfloat16)
    slow = iteration_operations(with_gradients(config)) / slow_rate
    reasons = {name: why_not(name, slow) for name in CONTENDERS if name not in skipped}
    names = [name for name, reason in reasons.items() if reason is None]
    with started(measure_steps, config, names, repeats) as process:
        seconds, sizes, rate, operations, parameters, matrices = process.recv()
    peaks = {name: peak_extra_memory(build_step, config, name) for name in names}
    floor = operations / rate
    print(
        f"\n{title}: {parameters / 1e6:.1f} M parameters, {matrices} matrices, float32, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, median of {repeats}\n"
        f"floor: {operations / 1e9:.1f} GFLOP of Newton–Schulz at {rate / 1e9:.0f} GFLOP/s = {floor * 1e3:.1f} ms; "
        f"bfloat16 products run at {slow_rate / 1e9:.1f} GFLOP/s here"
    )
    columns = {"ms": 10, "/ AdamW": 9, "/ floor": 9, "refresh ms": 12, "state MiB": 11, "/ param.": 9, "peak MiB": 10}
    print(" " * 28 + "".join(f"{name:>{width}}" for name, width in columns.items()))
    for name in names:
        line = f"{name:28}{seconds[name] * 1e3:10.2f}{seconds[name] / seconds[ADAMW]:9.1f}"
        line += " " * 9 if name.startswith("AdamW") else f"{seconds[name] / floor:9.2f}"
        refresh = seconds.get(f"{name}, {REFRESH}")
        line += " " * 12 if refresh is None else f"{refresh * 1e3:12.2f}"
        print(line + f"{sizes[name] / MEBIBYTE:11.1f}{sizes[name] / 4 / parameters:9.2f}{peaks[name] / MEBIBYTE:10.1f}")
    for name, reason in reasons.items():
        if reason is not None:
            print(f"{name:28}{reason}")
    for mine, theirs in ((OURS_16, PACKAGE), (OURS_16, TORCH)):
        if mine in seconds and theirs in seconds:
            ratio = seconds[mine] / seconds[theirs]
            print(f"goal: {mine} no slower than {theirs}: {ratio:.2f}, {verdict(ratio <= 1.0)}")


# -- a part of training ------------------------------------------------------------------------------------------------


def measure_training(config: LanguageModelConfig, repeats: int, connection: Connection) -> None:
    """One process: sends CPU seconds by optimizer, and those of forward and backward."""
    model = LanguageModel.create(config, seed=0)
    objective = NextTokenCrossEntropy()
    ids = torch.randint(0, config.vocab_size, (8, 128), generator=torch.Generator().manual_seed(1))
    labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], dim=1).flatten()

    def forward_backward() -> None:
        model.zero_grad()
        output = model(ids, targets=labels, gradient_hint=objective.gradient_hint(labels))
        assert output.scores is not None
        objective(output.scores, labels)[0].mean.backward()

    forward_backward()
    candidates: dict[str, Callable[[], Any]] = {"": forward_backward}
    for name in (ADAMW, OURS, "Mousse, ours, both", "Mousse, ours, smaller"):
        candidates |= turns(name, CONTENDERS[name](model))
    connection.send(
        {name: statistics.median(times) for name, times in interleaved_times(
            candidates, repeats, warmup=2, clock=time.process_time).items()}
    )  # fmt: skip


def compare_training(repeats: int) -> None:
    """Prints one table for both models of the study."""
    print(f"\nCPU ms of the optimizer beside forward and backward of 8 × 128 tokens, one thread, median of {repeats}")
    print(f"{'model':10}{'optimizer':26}{'model ms':>10}{'step ms':>10}{'refresh ms':>12}{'of all':>8}{'/ AdamW':>9}")
    with environment({"OMP_NUM_THREADS": "1"}):
        for title, config in STUDY.items():
            with started(measure_training, config, repeats) as process:
                seconds = process.recv()
            rest = seconds.pop("")
            for name in (ADAMW, OURS, "Mousse, ours, both", "Mousse, ours, smaller"):
                refresh = seconds.get(f"{name}, {REFRESH}")
                plain = seconds[name if refresh is None else f"{name}, {PLAIN}"]
                mean = plain if refresh is None else plain + (refresh - plain) / PERIOD
                last = "" if refresh is None else f"{refresh * 1e3:.1f}"
                whole = (rest + mean) / (rest + seconds[ADAMW])
                print(
                    f"{title:10}{name:26}{rest * 1e3:10.1f}{mean * 1e3:10.1f}{last:>12}{mean / (rest + mean):8.0%}"
                    f"{whole:9.2f}"
                )


# -- two ranks ---------------------------------------------------------------------------------------------------------


class Counts(NamedTuple):
    """Of one step."""

    collectives: dict[str, int]
    milliseconds: float


def measure_ranks(rank: int, store: str, repeats: int, connection: Connection) -> None:
    """One rank; sends counts and times by contender."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    model = LanguageModel.create(DENSE, seed=0)
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()  # random enough, and divided
    matrices = [p for group in matrix_groups(model) if group["kind"] == "matrix" for p in group["params"]]
    optimizers: dict[str, Optimizer] = {
        TORCH: torch.optim.Muon(matrices, lr=1e-6),
        OURS: Muon(matrices, lr=1e-6),
        OURS_16: Muon(matrices, lr=1e-6, compute_dtype="bfloat16"),
        "Mousse, ours, both": Mousse(matrices, lr=1e-6, side="both", refresh_every=1 << 40),
    }
    counted = {}
    for name, optimizer in optimizers.items():
        optimizer.step()
        with CommDebugMode() as mode:
            optimizer.step()
        counted[name] = {str(kind).rsplit(".", 1)[-1]: count for kind, count in mode.get_comm_counts().items() if count}
    times = interleaved_medians({name: optimizer.step for name, optimizer in optimizers.items()}, repeats)
    connection.send((len(matrices), {name: Counts(counted[name], times[name] * 1e3) for name in optimizers}))
    dist.barrier()
    dist.destroy_process_group()


def compare_ranks(repeats: int) -> None:
    """Prints one table."""
    with (
        tempfile.TemporaryDirectory() as folder,
        environment({"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}),
        contextlib.ExitStack() as stack,
    ):
        store = str(Path(folder) / "store")
        ranks = [stack.enter_context(started(measure_ranks, rank, store, repeats)) for rank in range(2)]
        matrices, found = [process.recv() for process in ranks][0]  # noqa: RUF015 (all must send)
    print(f"\n{matrices} matrices divided over 2 gloo ranks, one thread each, one step, median of {repeats}")
    print(f"{'':28}{'ms':>9}{'collectives':>13}  of which")
    for name, (collectives, milliseconds) in found.items():
        kinds = ", ".join(f"{count} {kind}" for kind, count in collectives.items())
        print(f"{name:28}{milliseconds:9.1f}{sum(collectives.values()):13}  {kinds}")
    fewer = sum(found[OURS].collectives.values()) < sum(found[TORCH].collectives.values())
    ratio = found[OURS_16].milliseconds / found[TORCH].milliseconds
    print(f"goal: fewer collectives than {TORCH}: {verdict(fewer)}")
    print(f"goal: {OURS_16} no slower than {TORCH}: {ratio:.2f}, {verdict(ratio <= 1.0)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--part", nargs="+", choices=["steps", "training", "ranks"], default=["steps", "training", "ranks"]
    )
    parser.add_argument("--sets", nargs="+", choices=["tiny", "large"], default=["tiny", "large"])
    parser.add_argument("--layers", type=int, default=12, help="layers of the large set")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--skip", nargs="*", default=[], choices=[n for n in CONTENDERS if n != ADAMW])
    parser.add_argument("--quick", action="store_true", help="small and short: shows that it runs, says nothing")
    arguments = parser.parse_args()
    if arguments.layers < 2:
        parser.error(f"--layers {arguments.layers} must be at least 2")
    repeats = 1 if arguments.quick else arguments.repeats
    if "steps" in arguments.part:
        sets = {"tiny": ("tiny", TINY), "large": (f"width 768, {arguments.layers} layers", large(arguments.layers))}
        for name in ["tiny"] if arguments.quick else arguments.sets:
            compare_steps(*sets[name], arguments.skip, repeats)
    if "training" in arguments.part:
        compare_training(repeats)
    if "ranks" in arguments.part:
        compare_ranks(repeats)


if __name__ == "__main__":
    main()

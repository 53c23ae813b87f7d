"""Bytes that expert parallelism hands to collectives beside the fewest possible, and a step with and without it.

    python benchmarks/expert_parallel.py [--quick] [--part bytes steps] [--ranks 2 4] [--repeats 9]

Starts gloo ranks on this machine. Bytes: one sparse layer in bfloat16, forward and backward, for a grouped router and
for a plain top-k one; three dispatchers:

- static: no sizes, for the grouped router;
- exact: sizes first, each token once to every rank that owns any of its experts;
- duplicated: a row for every (token, choice), as all-to-alls over rows sorted by expert send; written here.

Every collective of the layer is counted where torch runs it: what this rank hands over for the others, i.e. without the
part for itself (an all-gather hands its input to each of the others). Rows are tensors (·, D); all else is metadata:
sizes, ids, weights and their gradients, the ranks' agreement. The minimum: each token's row once to every remote rank
that owns any of its experts and one row back, and the same for gradients. Goal for rows of static and exact: 1.00.

Step: a small model with grouped routers on 2 ranks with one thread each, experts sharded by FSDP2 alone (1 rank per
expert axis) or divided (2 ranks, static and exact); they take turns in the same processes. Medians of wall time, and of
the CPU time of rank 0, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from measure import environment, interleaved_times, started, verdict
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives
from torch.utils._python_dispatch import TorchDispatchMode

from lit_interns1.models import LanguageModel, LanguageModelConfig, MoEConfig, PositionConfig
from lit_interns1.nn.initialization import initialize_parameters, materialize
from lit_interns1.nn.moe import LocalDispatcher, MoEFeedForward, RoutedExperts, RoutedRows, TokenDispatcher, TopKRouter
from lit_interns1.nn.moe.agreement import RowAgreement
from lit_interns1.nn.moe.all_to_all import AllToAllDispatcher, exchange_rows
from lit_interns1.nn.moe.static_split import StaticSplitDispatcher
from lit_interns1.objectives import NextTokenCrossEntropy
from lit_interns1.strategies import ParallelDims
from lit_interns1.strategies.parallelize import DispatcherName, parallelize
from lit_interns1_kernels.permute import group_by_expert

GOAL = 1.005  # prints as 1.00
NO_COLLECTIVES = ("::wait_tensor", "::_wrap_tensor_autograd", "::_wrap_tensor_autograd_backward")


class Layer(NamedTuple):
    """Sizes of the layer whose bytes are counted."""

    tokens: int = 256
    hidden: int = 2048
    inner: int = 64
    experts: int = 64
    per_token: int = 8
    groups: int = 8


class DuplicatingDispatcher:
    """Rows sorted by expert and sent to its rank, one for each choice; weights stay at home."""

    def __init__(self, num_experts: int, group: dist.ProcessGroup) -> None:
        self.num_experts, self.group, self.ranks = num_experts, group, dist.get_world_size(group)
        self.local_experts = num_experts // self.ranks

    def _send(self, rows: Tensor, received: list[int], sent: list[int]) -> Tensor:
        moved = collectives.all_to_all_single_autograd(rows.contiguous(), received, sent, self.group)
        return collectives.wait_tensor(moved)

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> RoutedRows:
        order_R, token_R, ends_E = group_by_expert(ids_TK, self.num_experts)
        counts_PE = ends_E.long().diff(prepend=ends_E.new_zeros(1).long()).view(self.ranks, -1)
        theirs_PE = exchange_rows(counts_PE, None, None, self.group)
        sent, received = counts_PE.sum(1).tolist(), theirs_PE.sum(1).tolist()
        x_SD = self._send(x_TD.index_select(0, token_R), received, sent)
        ids_S = torch.arange(self.local_experts).repeat(self.ranks).repeat_interleave(theirs_PE.flatten())
        rows = LocalDispatcher(self.local_experts).dispatch(x_SD, ids_S[:, None], torch.ones(len(ids_S), 1))
        rows.context = (order_R, weights_TK, sent, received)
        return rows

    def combine(self, y_SD: Tensor, context: Any) -> Tensor:
        order_R, weights_TK, sent, received = context
        y_RD = self._send(y_SD, sent, received)
        y_TKD = torch.zeros_like(y_RD).index_copy(0, order_R, y_RD).unflatten(0, weights_TK.shape)
        return (y_TKD * weights_TK[..., None]).sum(1)


class Payload(TorchDispatchMode):
    """Counts bytes for other ranks, of rows and of all else."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.hidden, self.rank, self.ranks = hidden, dist.get_rank(), dist.get_world_size()
        self.rows = self.rest = self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func.name().split(".")[0]
        if name == "_c10d_functional::all_to_all_single":
            sent = args[2]
            self._add(args[0], (sum(sent) - sent[self.rank]) / max(sum(sent), 1))
        elif name == "_c10d_functional::all_gather_into_tensor":
            self._add(args[0], self.ranks - 1)
        elif name == "c10d::allreduce_":
            self._add(args[0][0], 1)
        elif name.startswith(("_c10d_functional::", "c10d::")) and not name.endswith(NO_COLLECTIVES):
            raise RuntimeError(f"collective {name} is not counted")
        return func(*args, **(kwargs or {}))

    def _add(self, tensor: Tensor, share: float) -> None:
        size = round(tensor.numel() * tensor.element_size() * share)
        is_row = tensor.ndim == 2 and tensor.shape[1] == self.hidden
        self.rows, self.rest, self.calls = self.rows + size * is_row, self.rest + size * (not is_row), self.calls + 1


class Counted(NamedTuple):
    """One dispatcher's bytes per token, the mean of all ranks."""

    rows: float
    rest: float
    calls: int
    minimum: float
    output: Tensor


def count(sizes: Layer, groups: int, kind: str) -> Counted:
    """Bytes per token of forward and backward."""
    rank, ranks, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    assert group is not None
    make: dict[str, Callable[[], TokenDispatcher]] = {
        "static": lambda: StaticSplitDispatcher(sizes.experts, group, RowAgreement(group)),
        "exact": lambda: AllToAllDispatcher(sizes.experts, group),
        "duplicated": lambda: DuplicatingDispatcher(sizes.experts, group),
    }
    router = TopKRouter(sizes.hidden, sizes.experts, sizes.per_token, num_groups=groups)
    layer = MoEFeedForward(router, RoutedExperts(sizes.experts, sizes.hidden, sizes.inner))
    initialize_parameters(layer, std=0.02)
    for name, parameter in list(layer.experts.named_parameters()):
        layer.experts.register_parameter(name, nn.Parameter(parameter.detach().chunk(ranks)[rank].clone()))
    layer.to(torch.bfloat16).dispatcher = make[kind]()
    generator = torch.Generator().manual_seed(rank)
    x_TD = torch.randn(sizes.tokens, sizes.hidden, generator=generator).to(torch.bfloat16).requires_grad_()
    with Payload(sizes.hidden) as payload:
        y_TD, routing = layer(x_TD)
        y_TD.square().sum().backward()
    owner_TK = routing.ids_TK // (sizes.experts // ranks)
    visits = sum(int((owner_TK == peer).any(1).sum()) for peer in range(ranks) if peer != rank)
    minimum = 4 * visits * sizes.hidden * x_TD.element_size()  # out and back, of values and of gradients
    totals = torch.tensor([payload.rows, payload.rest, minimum], dtype=torch.float64)
    dist.all_reduce(totals)
    rows, rest, fewest = (totals / (ranks * sizes.tokens)).tolist()
    return Counted(rows, rest, payload.calls, fewest, y_TD.detach().float())


def print_bytes(sizes: Layer) -> None:
    """The first table; rank 0 prints."""
    for name, groups in (("grouped", sizes.groups), ("top-k", 1)):
        kinds = ["static", "exact", "duplicated"] if groups > 1 else ["exact", "duplicated"]
        counted = {kind: count(sizes, groups, kind) for kind in kinds}
        if dist.get_rank():
            continue
        print(
            f"\n{dist.get_world_size()} ranks, {name} router: bytes per token for other ranks, forward and backward; "
            f"the fewest possible: {counted['exact'].minimum:,.0f}"
        )
        print(f"{'':12}{'rows':>10}{'ratio':>8}{'metadata':>10}{'all':>10}{'ratio':>8}{'collectives':>13}{'diff':>9}")
        for kind, own in counted.items():
            difference = (own.output - counted["exact"].output).norm() / own.output.norm()
            everything = own.rows + own.rest
            print(
                f"{kind:12}{own.rows:10,.0f}{own.rows / own.minimum:8.2f}{own.rest:10,.0f}{everything:10,.0f}"
                f"{everything / own.minimum:8.3f}{own.calls:13}{difference:9.0e}"
            )
        for kind in kinds[:-1]:
            ratio = counted[kind].rows / counted[kind].minimum
            print(f"goal: rows of {kind} are the fewest possible: {ratio:.2f}, {verdict(ratio <= GOAL)}")


def training_step(expert_ranks: int, dispatcher: DispatcherName, rows: int, length: int) -> Callable[[], None]:
    """One optimizer step of a model divided over all ranks."""
    config = LanguageModelConfig(
        vocab_size=4096, hidden_size=256, num_layers=4, num_heads=8, num_kv_heads=2, head_dim=32,
        moe=MoEConfig(32, 4, 128, router="grouped", num_groups=4),
        positions=PositionConfig(theta=1e4, max_position_embeddings=512),
    )  # fmt: skip
    dims = ParallelDims(dist.get_world_size(), expert_parallel_size=expert_ranks)
    with torch.device("meta"):
        model = LanguageModel(config)
    parallelize(model, model.parallel_plan(), dims.build_meshes("cpu"), dims, dispatcher=dispatcher)
    materialize(model, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    objective = NextTokenCrossEntropy()
    generator = torch.Generator().manual_seed(dist.get_rank())
    ids = torch.randint(0, config.vocab_size, (rows, length), generator=generator)
    labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], dim=1).flatten()

    def step() -> None:
        optimizer.zero_grad()
        output = model(ids, targets=labels, gradient_hint=objective.gradient_hint(labels))
        assert output.scores is not None
        objective(output.scores, labels)[0].mean.backward()
        optimizer.step()
        dist.barrier()

    return step


def print_steps(rows: int, length: int, repeats: int) -> None:
    """The second table; rank 0 prints."""
    candidates = {
        "FSDP2 alone": training_step(1, "auto", rows, length),
        "experts divided, static": training_step(2, "static", rows, length),
        "experts divided, exact": training_step(2, "exact", rows, length),
    }
    cpu: dict[str, list[float]] = {name: [] for name in candidates}

    def timed(name: str) -> None:
        start = time.process_time()
        candidates[name]()
        cpu[name].append(time.process_time() - start)

    warmup = 2
    times = interleaved_times({name: partial(timed, name) for name in candidates}, repeats, warmup)
    if dist.get_rank():
        return
    wall = {name: statistics.median(seconds) for name, seconds in times.items()}
    spent = {name: statistics.median(seconds[warmup:]) for name, seconds in cpu.items()}
    print(
        f"\noptimizer step on 2 ranks, {rows} × {length} tokens on each, 4 layers, 32 experts, float32, "
        f"1 thread per rank, torch {torch.__version__}, median and best of {repeats}"
    )
    print(f"{'':26}{'ms':>8}{'best':>8}{'ratio':>8}{'CPU ms':>9}{'ratio':>8}")
    for name, own in wall.items():
        print(
            f"{name:26}{own * 1e3:8.1f}{min(times[name]) * 1e3:8.1f}{own / wall['FSDP2 alone']:8.2f}"
            f"{spent[name] * 1e3:9.1f}{spent[name] / spent['FSDP2 alone']:8.2f}"
        )


def rank_main(work: Callable[[], None], rank: int, ranks: int, store: str, connection: Connection) -> None:
    """One process."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    file = dist.FileStore(store, ranks)
    dist.init_process_group("gloo", store=file, rank=rank, world_size=ranks, timeout=timedelta(seconds=300))
    work()
    dist.barrier()
    connection.send("done")
    dist.destroy_process_group()


@contextlib.contextmanager
def processes(work: Callable[[], None], ranks: int) -> Iterator[list[Connection]]:
    """All ranks, each with a pipe."""
    settings = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with tempfile.TemporaryDirectory() as folder, environment(settings), contextlib.ExitStack() as stack:
        store = str(Path(folder) / "store")
        yield [stack.enter_context(started(rank_main, work, rank, ranks, store)) for rank in range(ranks)]


def run(work: Callable[[], None], ranks: int) -> None:
    """Runs `work` on that many ranks and waits; a rank that fails raises here."""
    with processes(work, ranks) as connections:
        try:
            for connection in connections:
                connection.recv()
        except EOFError:
            raise RuntimeError("a rank failed; see its output above") from None


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--part", nargs="+", choices=("bytes", "steps"), default=["bytes", "steps"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="ranks whose bytes are counted")
    parser.add_argument("--repeats", type=int, default=9, help="timed steps of each contender")
    arguments = parser.parse_args()
    sizes = Layer(tokens=32, hidden=256) if arguments.quick else Layer()
    for ranks in arguments.ranks if "bytes" in arguments.part else []:
        run(partial(print_bytes, sizes), ranks)
    rows, repeats = (1, 2) if arguments.quick else (8, arguments.repeats)
    if "steps" in arguments.part:
        run(partial(print_steps, rows, 256, repeats), 2)


if __name__ == "__main__":
    main()

"""Routed SwiGLU experts, forward and backward, beside every other way to compute them and beside bare matrix products.

    python benchmarks/experts.py [--shapes A B C s1 s2] [--skew 0.4] [--allocator raised default] [--repeats 5]

All contenders take tokens, chosen experts and weights, and give the output and the gradients of the tokens, both
weight stacks and the routing weights; the work of grouping tokens by expert is theirs. Floors only multiply matrices:

- floor: one product per expert and matrix (six in all), outputs and gradients allocated beforehand;
- floor, side by side: the same with one expert per core at a time;
- dense floor: the six products of the dense network with the same number of operations, on all tokens at once.

Per shape and allocator setting there is one process, in which the contenders take turns; memory is measured in a fresh
process for each, as the peak above the inputs, and without the gradients, which everyone must give. `--skew 0.4` sends
that share of the routed rows to one expert, and the balanced times of the same contenders are printed beside it.
Contenders marked "once" are too slow to repeat.

Goals: time against the floor at most 1.10 (32 experts and fewer), 1.20 (128), 1.30 (512); with 32 experts no slower
than the dense network; never slower than another routed form; at most half of the extra memory of transformers'
grouped_mm; with skew at most 1.15 times the balanced time.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
from measure import ALLOCATORS, MEBIBYTE, environment, interleaved_times, peak_extra_memory, started, verdict
from torch import Tensor
from torch.nn import functional as F

from lit_interns1.nn.moe.dispatch import LocalDispatcher
from lit_interns1_kernels.cpu_workers import run_parts, worker_count
from lit_interns1_kernels.routed_swiglu import routed_swiglu


class Shape(NamedTuple):
    """Tokens, hidden size, intermediate size, experts, experts per token, groups of experts."""

    tokens: int
    hidden: int
    inner: int
    experts: int
    per_token: int
    groups: int = 1


SHAPES = {
    "A": Shape(4096, 512, 256, 32, 4),
    "B": Shape(4096, 768, 192, 128, 8),
    "C": Shape(2048, 1024, 256, 512, 8, groups=8),
    "s1": Shape(512, 512, 256, 16, 4),
    "s2": Shape(256, 512, 256, 32, 4),
}
QUICK = Shape(64, 64, 32, 8, 2)
WARM_UP = Shape(32, 64, 32, 4, 2)
FLOOR, SIDE_BY_SIDE, DENSE_FLOOR = "floor", "floor, side by side", "dense floor"
OURS, GROUPED, EAGER = "ours", "torch's grouped_mm", "transformers, eager"
TRANSFORMERS, PADDED, DENSE = "transformers, grouped_mm", "padded bmm", "dense network"
NAMES = (FLOOR, SIDE_BY_SIDE, DENSE_FLOOR, OURS, GROUPED, TRANSFORMERS, EAGER, PADDED, DENSE)
ROUTED = (OURS, GROUPED, TRANSFORMERS, EAGER, PADDED)
PADDING_LIMIT = 4 << 30  # bytes of padded rows that still make sense on a small machine
DENSE_EXPERTS = 32  # up to here the dense network is a goal
SKEW_GOAL = 1.15


def time_goal(shape: Shape) -> float:
    """Allowed time in units of the floor."""
    return 1.10 if shape.experts <= 32 else 1.20 if shape.experts <= 128 else 1.30


class Problem:
    """Inputs, and the contenders on them."""

    def __init__(self, shape: Shape, skew: float | None, with_dense: bool = True) -> None:
        self.shape = shape
        generator = torch.Generator().manual_seed(0)
        tokens, hidden, inner, experts, per_token, groups = shape
        self.x = torch.randn(tokens, hidden, generator=generator).requires_grad_()
        self.gate_up = (torch.randn(experts, 2 * inner, hidden, generator=generator) * hidden**-0.5).requires_grad_()
        self.down = (torch.randn(experts, hidden, inner, generator=generator) * inner**-0.5).requires_grad_()
        self.weights = torch.rand(tokens, per_token, generator=generator).requires_grad_()
        draws = torch.rand(tokens, groups, experts // groups, generator=generator)
        inside = draws.topk(per_token // groups).indices
        first = torch.arange(groups)[:, None] * (experts // groups)
        self.ids = (inside + first).view(tokens, per_token)
        if skew is not None:  # more than 1 / per_token of the rows: a token may visit the expert more than once
            hot = torch.rand(self.ids.shape, generator=generator) < (skew - 1 / experts) / (1 - 1 / experts)
            self.ids = self.ids.masked_fill(hot, experts // 2)
        self.direction = torch.randn(tokens, hidden, generator=generator)
        self.counts = torch.bincount(self.ids.flatten(), minlength=experts).tolist()
        self.leaves = [self.x, self.gate_up, self.down, self.weights]
        self.dense_weights = [
            (torch.randn(rows, columns, generator=generator) * columns**-0.5).requires_grad_()
            for rows, columns in ((2 * per_token * inner, hidden), (hidden, per_token * inner))
            if with_dense
        ]

    def why_not(self, name: str) -> str | None:
        """Why a contender cannot run, or None."""
        if name == PADDED:
            rows = self.shape.experts * max(self.counts)
            size = rows * (3 * self.shape.hidden + 6 * self.shape.inner) * 4
            if size > PADDING_LIMIT:
                return f"would hold {size / (1 << 30):.0f} GiB of padded rows"
        return None

    def is_slow(self, name: str) -> bool:
        """Whether one call must do: every expert's backward writes zeros for all experts."""
        return name == EAGER and self.shape.experts * self.gate_up.nbytes > 4 << 30

    def step(self, name: str) -> Callable[[], Tensor | None]:
        """One forward and backward; returns the output of a routed form."""
        if name in (FLOOR, SIDE_BY_SIDE, DENSE_FLOOR):
            return self._floor(name)
        forward: Callable[[], Tensor] = {
            OURS: partial(self._local, "auto"), GROUPED: partial(self._local, "grouped_mm"),
            EAGER: self._transformers("eager"), TRANSFORMERS: self._transformers("grouped_mm"),
            PADDED: self._padded, DENSE: self._dense,
        }[name]  # fmt: skip

        def run() -> Tensor:
            for leaf in (*self.leaves, *self.dense_weights):
                leaf.grad = None
            y = forward()
            y.backward(self.direction)
            return y.detach()

        return run

    def gradient_bytes(self, name: str) -> int:
        """What everyone must give back: the output and the gradients."""
        if name in (FLOOR, SIDE_BY_SIDE, DENSE_FLOOR):
            return 0
        leaves = [self.x, *self.dense_weights] if name == DENSE else self.leaves
        return self.x.nbytes + sum(leaf.nbytes for leaf in leaves)

    def _local(self, backend: Any) -> Tensor:
        rows = LocalDispatcher(self.shape.experts).dispatch(self.x, self.ids, self.weights)
        return routed_swiglu(
            rows.x_SD, self.gate_up, self.down, rows.row_index_R, rows.offsets_E, rows.row_weight_R, backend=backend
        )

    def _transformers(self, implementation: str) -> Callable[[], Tensor]:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        config = Qwen3MoeConfig(
            hidden_size=self.shape.hidden, moe_intermediate_size=self.shape.inner, num_experts=self.shape.experts,
            num_experts_per_tok=self.shape.per_token, experts_implementation=implementation,
        )  # fmt: skip
        with torch.device("meta"):
            experts = Qwen3MoeExperts(config)
        experts.gate_up_proj, experts.down_proj = map(torch.nn.Parameter, (self.gate_up, self.down))

        def run() -> Tensor:
            y: Tensor = torch.func.functional_call(
                experts, {"gate_up_proj": self.gate_up, "down_proj": self.down}, (self.x, self.ids, self.weights)
            )
            return y

        return run

    def _padded(self) -> Tensor:
        rows = LocalDispatcher(self.shape.experts).dispatch(self.x, self.ids, self.weights)
        starts_E = F.pad(rows.offsets_E[:-1], (1, 0)).long()
        expert_R = torch.repeat_interleave(torch.tensor(self.counts))
        slot_R = torch.arange(len(expert_R)) - starts_E[expert_R]
        padded = self.x.new_zeros(self.shape.experts, max(self.counts), self.shape.hidden)
        padded = padded.index_put((expert_R, slot_R), rows.x_SD.index_select(0, rows.row_index_R))
        gate, up = torch.bmm(padded, self.gate_up.transpose(1, 2)).chunk(2, dim=-1)
        outputs = torch.bmm(F.silu(gate) * up, self.down.transpose(1, 2))[expert_R, slot_R]
        return torch.zeros_like(self.x).index_add(0, rows.row_index_R, outputs * rows.row_weight_R[:, None])

    def _dense(self) -> Tensor:
        gate_up, down = self.dense_weights
        gate, up = F.linear(self.x, gate_up).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, down)

    def _floor(self, name: str) -> Callable[[], None]:
        tokens, hidden, inner, experts, per_token, _ = self.shape
        if name == DENSE_FLOOR:
            counts, inner = [tokens], inner * per_token
            gate_ups, downs = ([w.detach()] for w in self.dense_weights)
        else:
            counts = self.counts
            gate_ups, downs = list(self.gate_up.detach().unbind(0)), list(self.down.detach().unbind(0))
        starts = [sum(counts[:i]) for i in range(len(counts))]
        generator = torch.Generator().manual_seed(1)
        rows, d_rows = (torch.randn(sum(counts), hidden, generator=generator) for _ in range(2))
        wide, d_wide = (torch.randn(sum(counts), 2 * inner, generator=generator) for _ in range(2))
        narrow, d_narrow = (torch.randn(sum(counts), inner, generator=generator) for _ in range(2))
        out, d_x = torch.empty_like(rows), torch.empty_like(rows)
        d_gate_ups, d_downs = ([torch.empty_like(w) for w in weights] for weights in (gate_ups, downs))

        def multiply(experts: range) -> None:
            for e in experts:
                part = slice(starts[e], starts[e] + counts[e])
                torch.mm(rows[part], gate_ups[e].t(), out=wide[part])
                torch.mm(narrow[part], downs[e].t(), out=out[part])
            for e in experts:
                part = slice(starts[e], starts[e] + counts[e])
                torch.mm(d_rows[part], downs[e], out=d_narrow[part])
                torch.mm(d_rows[part].t(), narrow[part], out=d_downs[e])
                torch.mm(d_wide[part].t(), rows[part], out=d_gate_ups[e])
                torch.mm(d_wide[part], gate_ups[e], out=d_x[part])

        def run() -> None:
            if name == SIDE_BY_SIDE:
                workers = worker_count()
                run_parts(lambda part: multiply(range(part, experts, workers)), workers)
            else:
                multiply(range(len(counts)))

        return run


def build(name: str, shape: Shape, skew: float | None) -> Callable[[], Any]:
    """For the memory of one call."""
    Problem(WARM_UP, None).step(name)()  # wakes up thread pools and libraries
    return Problem(shape, skew, with_dense=name in (DENSE, DENSE_FLOOR)).step(name)


def relative_difference(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


def contend(shape: Shape, skew: float | None, names: list[str], repeats: int, connection: Connection) -> None:
    """One process: sends seconds by contender, and by routed form the largest relative difference from the loop."""
    problem = Problem(shape, skew)
    reference = [problem.step(GROUPED)(), *(leaf.grad for leaf in problem.leaves)]
    differences = {}
    for name in names:
        if name in ROUTED and not problem.is_slow(name):
            results = [problem.step(name)(), *(leaf.grad for leaf in problem.leaves)]
            differences[name] = max(map(relative_difference, results, reference))
    del reference
    steps = {name: problem.step(name) for name in names}
    times = interleaved_times({n: s for n, s in steps.items() if not problem.is_slow(n)}, repeats)
    times |= interleaved_times({n: s for n, s in steps.items() if problem.is_slow(n)}, 1, warmup=0)
    connection.send((times, differences))


def measure_times(
    shape: Shape, skew: float | None, names: list[str], repeats: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    with started(contend, shape, skew, names, repeats) as process:
        result: tuple[dict[str, list[float]], dict[str, float]] = process.recv()
    return result


def compare(label: str, shape: Shape, skew: float | None, repeats: int, skipped: list[str]) -> None:
    """Prints one table."""
    problem = Problem(shape, skew)
    reasons = {name: problem.why_not(name) for name in NAMES if name not in skipped}
    names = [name for name, reason in reasons.items() if reason is None]
    gradients = {name: problem.gradient_bytes(name) for name in names}
    slow = {name for name in names if problem.is_slow(name)}
    largest = max(problem.counts) / sum(problem.counts)
    del problem
    times, differences = measure_times(shape, skew, names, repeats)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    balanced = {}
    if skew is not None:
        names_again = [name for name in names if name not in slow]
        again = measure_times(shape, None, names_again, repeats)[0]
        balanced = {name: statistics.median(values) for name, values in again.items()}
    peak = {name: peak_extra_memory(build, name, shape, skew) for name in names if name not in (FLOOR, SIDE_BY_SIDE)}

    print(
        f"\n{label}: {shape.tokens} tokens, hidden {shape.hidden}, inner {shape.inner}, {shape.experts} experts, "
        f"{shape.per_token} per token; the largest expert has {largest:.1%} of the rows"
    )
    columns = {"ms": 9, "best": 9, "/ floor": 9, "balanced": 10, "/ bal.": 8, "peak MiB": 10, "- grads": 9, "diff": 9}
    print(" " * 28 + "".join(f"{title:>{width}}" for title, width in columns.items()))
    for name in names:
        line = f"{name + (' (once)' if name in slow else ''):28}{seconds[name] * 1e3:9.1f}{min(times[name]) * 1e3:9.1f}"
        line += f"{seconds[name] / seconds[FLOOR]:9.2f}"
        line += f"{balanced[name] * 1e3:10.1f}{seconds[name] / balanced[name]:8.2f}" if name in balanced else " " * 18
        if name in peak:
            line += f"{peak[name] / MEBIBYTE:10.0f}{max(peak[name] - gradients[name], 0) / MEBIBYTE:9.0f}"
        else:
            line += " " * 19
        print(line + (f"{differences[name]:9.0e}" if name in differences else ""))
    for name, reason in reasons.items():
        if reason is not None:
            print(f"{name:28} not run: {reason}")

    ratio = seconds[OURS] / seconds[FLOOR]
    print(f"goal: at most {time_goal(shape):.2f} × the floor: {ratio:.2f}, {verdict(ratio <= time_goal(shape))}")
    if shape.experts <= DENSE_EXPERTS and DENSE in seconds:
        ratio = seconds[OURS] / seconds[DENSE]
        print(f"goal: no slower than the dense network: {ratio:.2f}, {verdict(ratio <= 1.0)}")
    peers = [name for name in ROUTED if name != OURS and name in seconds]
    if peers:
        fastest = min(peers, key=seconds.__getitem__)
        ratio = seconds[OURS] / seconds[fastest]
        print(f"goal: no slower than {fastest}: {ratio:.2f}, {verdict(ratio <= 1.0)}")
    if TRANSFORMERS in peak:
        whole = peak[OURS] / peak[TRANSFORMERS]
        beyond = (peak[OURS] - gradients[OURS]) / (peak[TRANSFORMERS] - gradients[TRANSFORMERS])
        print(f"goal: half the peak of {TRANSFORMERS}: {whole:.2f}, without gradients {beyond:.2f}, ", end="")
        print(verdict(beyond <= 0.5))
    if skew is not None:
        ratio = seconds[OURS] / balanced[OURS]
        print(f"goal: at most {SKEW_GOAL:.2f} × the balanced time: {ratio:.2f}, {verdict(ratio <= SKEW_GOAL)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--skew", type=float, help="share of the routed rows that one expert gets, for example 0.4")
    parser.add_argument("--allocator", nargs="+", choices=["raised", "default"], default=["raised"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--skip", nargs="*", default=[], choices=NAMES[1:], help="contenders to leave out")
    parser.add_argument("--quick", action="store_true", help="one small shape: shows that it runs, says nothing")
    arguments = parser.parse_args()
    if arguments.skew is not None and not 0 < arguments.skew < 1:
        parser.error(f"--skew {arguments.skew} must lie between 0 and 1")
    if arguments.repeats < 3:
        parser.error(f"--repeats {arguments.repeats} must be at least 3")
    shapes = {"quick": QUICK} if arguments.quick else {name: SHAPES[name] for name in arguments.shapes}
    default, raised = ALLOCATORS.items()
    for title, setting in [{"default": default, "raised": raised}[name] for name in arguments.allocator]:
        settings = f"float32, {torch.get_num_threads()} threads, torch {torch.__version__}"
        print(f"\n== {title}; {settings}, {arguments.repeats} rounds")
        with contextlib.ExitStack() as stack:
            stack.enter_context(environment({"GOMP_SPINCOUNT": "4000", **setting}))
            for label, shape in shapes.items():
                compare(label, shape, arguments.skew, arguments.repeats, arguments.skip)


if __name__ == "__main__":
    main()

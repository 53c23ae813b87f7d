"""`lit-interns1 plan`: what a run with this config costs each of N ranks: memory, communication, bounds of its speed.

Takes the options of `fit`. Starts no process, reads no data, needs no GPU and no run directory.
"""

from __future__ import annotations

import json
import resource
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.strategies import StrategyRegistry
from rich.console import Console
from rich.table import Table

from lit_interns1.commands.trainer import KitArgumentParser, KitCLI, fail, innermost
from lit_interns1.strategies import MoEParallelStrategy, ParallelDims
from lit_interns1.strategies.planning import Plan, Workload, load_hardware, make_plan
from lit_interns1.strategies.planning.search import Candidate, Layout, search, with_layout
from lit_interns1.training.units import with_unit

_USAGE = """lit-interns1 plan --config FILE [--config FILE ...] --world-size N [--hardware NAME|FILE] [--search]
                         [--json FILE] [options of fit ...]

  lit-interns1 plan --config configs/pretrain/intern-s1-pro-1t.yaml --world-size 4096
  lit-interns1 plan --config configs/pretrain/tiny.yaml --model.config intern-s1-241b --world-size 512 \\
      --data.global_batch_size 4096 --data.row_length 4096 --data.micro_batch_size 1 --hardware h200 --search
"""

SHOWN = 10
"""Layouts in the table of a search."""


class PlanCLI(KitCLI):
    """Parses what `fit` parses, and makes the module, the data module and the strategy, but no Trainer."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The options of `fit`, and those of the plan."""
        super().add_arguments_to_parser(parser)
        add = parser.add_argument
        add("--world-size", type=int, required=True, metavar="N", help="Ranks of the run.")
        add(
            "--hardware", type=str, default="h100", metavar="NAME|FILE",
            help="h100, h200, b200, or a YAML file with name, memory, flops, memory_bandwidth, devices_per_node, "
            "node_bandwidth and network_bandwidth (bytes, FLOP/s, bytes/s).",
        )  # fmt: skip
        add(
            "--search", action="store_true",
            help="Try all sizes of the strategy, reshard_after_forward, activation checkpointing and micro-batch rows.",
        )  # fmt: skip
        add("--json", type=str, default=None, metavar="FILE", help="Also write the plan here; never over a file.")
        for name in ("ckpt_path", "weights_only"):  # configs of finished runs hold them
            add(f"--{name}", default=None, help="Of fit; ignored.")

    def _parse_ckpt_path(self) -> None:
        """There is no checkpoint to look at."""

    def before_instantiate_classes(self) -> None:
        """Leaves out what a plan does not need: it might open files or connections."""
        trainer = self.config.trainer
        trainer.callbacks = trainer.logger = trainer.profiler = trainer.plugins = None

    def instantiate_classes(self) -> None:
        """Makes module, data module and strategy."""
        try:
            self.config_init = self.parser.instantiate_classes(self.config)
        except (ValueError, OSError) as error:
            fail(str(innermost(error)))
        self.model = self._get(self.config_init, "model")
        self.datamodule = self._get(self.config_init, "data")


def run(args: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        args: What stands behind "plan"; None: the arguments of the process.
    """
    started, worked = time.monotonic(), time.process_time()
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
    cli = PlanCLI(
        LightningModule, LightningDataModule, subclass_mode_model=True, subclass_mode_data=True, run=False,
        save_config_callback=None, parser_class=KitArgumentParser,
        parser_kwargs={"parser_mode": "omegaconf+", "usage": _USAGE, "description": __doc__},
        args=list(args) if args is not None else None,
    )  # fmt: skip
    console = Console(width=max(Console().width, 110), highlight=False)
    config = cli.config
    try:
        if config.json is not None and Path(config.json).exists():
            raise ValueError(f"--json: {config.json} exists already")
        result = _plan(cli, console)
    except (ValueError, ImportError, OSError, NotImplementedError) as error:
        fail(str(innermost(error)).strip().splitlines()[0])
    if config.json is not None:
        Path(config.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    console.print(
        f"\nThis plan took {time.monotonic() - started:.0f} s ({time.process_time() - worked:.0f} s of computing) and "
        f"{peak / 1e9:.2f} GB of memory."
    )


def _plan(cli: PlanCLI, console: Console) -> dict[str, Any]:
    config, trainer = cli.config, cli.config_init.trainer
    hardware = load_hardware(config.hardware)
    strategy, assumptions = _strategy(trainer.strategy)
    workload = _workload(cli.datamodule, trainer)
    if trainer.precision not in (None, "32-true", 32, "32"):
        raise ValueError(
            f"trainer.precision = {trainer.precision!r} cannot be planned: set the strategy's compute_dtype instead"
        )
    if config.world_size < 1:
        raise ValueError(f"--world-size = {config.world_size} must be at least 1")
    if not config.search:
        dims = ParallelDims(config.world_size, *strategy.sizes)
        plan = make_plan(cli.model, strategy, dims, workload, hardware)
        report(plan, console, assumptions)
        return plan.to_dict()
    found = search(cli.model, strategy, config.world_size, workload, hardware)
    _print_search(found, console)
    best: Plan | None = None
    for candidate in found[:3]:
        module, other, work = with_layout(cli.model, strategy, workload, candidate.layout)
        plan = make_plan(module, other, candidate.layout.dims, work, hardware)
        if plan.fits:
            best = plan
            break
    if best is None:
        raise ValueError("the best three layouts fit by formula but not when counted: give the strategy by hand")
    console.print(f"\nBest of those that fit when counted:\n\n{fragment(candidate.layout)}", markup=False)
    report(best, console, assumptions)
    return {"layouts": [_as_dict(c) for c in found[:SHOWN]], "best": best.to_dict()}


def _strategy(given: Any) -> tuple[MoEParallelStrategy, list[str]]:
    if isinstance(given, MoEParallelStrategy):
        return given, []
    if isinstance(given, str) and given in StrategyRegistry:
        made = StrategyRegistry.get(given)
        if isinstance(made, MoEParallelStrategy):
            return made, []
    if given in (None, "auto"):
        return MoEParallelStrategy(), ["The config names no strategy: planned with MoEParallelStrategy()."]
    raise ValueError(f"trainer.strategy = {given!r} cannot be planned: it must be MoEParallelStrategy")


def _workload(data: Any, trainer: Any) -> Workload:
    names = ("row_length", "micro_batch_size", "global_batch_size")
    missing = [name for name in names if not isinstance(getattr(data, name, None), int)]
    if missing:
        raise ValueError(f"a plan reads the sizes of a batch from the data module; {type(data).__name__} has no "
                         f"{', '.join(missing)}")  # fmt: skip
    clip = trainer.gradient_clip_val
    row_length, micro_batch_rows, rows_per_step = (getattr(data, name) for name in names)
    return Workload(row_length, micro_batch_rows, rows_per_step, float(clip) if clip else None)


# -- printing ----------------------------------------------------------------------------------------------------------


def _bytes(size: float) -> str:
    return f"{with_unit(size)}B" if size >= 1e3 else f"{size:.0f} B"


def report(plan: Plan, console: Console, assumptions: Sequence[str] = ()) -> None:
    """Prints a plan."""
    dims, work, cost, bounds = plan.dims, plan.workload, plan.cost, plan.bounds
    console.print(
        f"\n{dims.world_size} ranks of {plan.hardware.name} = {dims.replicate_size} replicas × {dims.shards} shards; "
        f"experts over {dims.expert_parallel_size} ranks\n"
        f"{with_unit(cost.parameters)} parameters, {with_unit(cost.local_parameters)} on a rank\n"
        f"{work.rows_per_step} rows of {work.row_length} tokens per optimizer step: {plan.accumulation} micro-batches "
        f"of {work.micro_batch_rows} rows on each rank\n"
    )
    memory = Table("memory of a rank", "bytes")
    memory.columns[1].justify = "right"
    for name in ("parameters", "buffers", "gradients", "optimizer state", "activations", "kept units",
                 "accumulated gradients", "working memory"):  # fmt: skip
        memory.add_row(name, _bytes(cost.memory[name]))
    verdict = "fits in" if plan.fits else "DOES NOT FIT in"
    memory.add_row(f"together ({verdict} {plan.hardware.memory / 1e9:g} GB)", _bytes(plan.peak))
    console.print(memory)
    traffic = Table("collectives of an optimizer step", "for", "ranks", "calls", "payload", "how")
    for column in traffic.columns[2:5]:
        column.justify = "right"
    for kind, calls in sorted(cost.calls.items(), key=lambda item: -cost.payload[item[0]]):
        apart = f"{kind.ranks}" + (f", every {kind.stride}th" if kind.stride > 1 else "")
        traffic.add_row(kind.operation, kind.purpose, apart, str(calls), _bytes(cost.payload[kind]), plan.how(kind))
    console.print(traffic)
    times = Table("least time of an optimizer step", "s")
    times.columns[1].justify = "right"
    for name, text in (
        ("compute", f"compute ({cost.flops:.3g} FLOP, counted)"),
        ("node", "links inside nodes"),
        ("network", "links between nodes"),
        ("memory", "optimizer's memory traffic"),
    ):
        mark = "  ← limits" if bounds.limit == name else ""
        times.add_row(text + mark, f"{getattr(bounds, name):.4g}")
    console.print(times)
    console.print(f"At most {plan.tokens_per_second:,.0f} tokens/s on a rank (a bound, not an estimate).\n")
    for line in [*assumptions, *assumed(plan)]:
        console.print(f"- {line}", markup=False)


def assumed(plan: Plan) -> list[str]:
    """What the numbers rest on."""
    lines = [
        f"Memory, collectives and FLOPs: {plan.basis}, by running the model, the strategy and the optimizer on shapes.",
        "Every row is one document and every position has a loss, the most that attention and head can cost.",
        "Memory adds up parts that need not be largest at the same time, and leaves out the CUDA context, "
        "communication libraries and the allocator's fragments (often 2 to 6 GB).",
        "Attention is torch's flash attention; the head works in chunks of 512 MiB of logits.",
        "Times take peak FLOP/s and full bandwidth, and everything overlaps: nothing real is as fast.",
        "Callbacks, checkpoints, validation and data loading are left out.",
    ]
    if not plan.dispatch_is_counted:
        lines.append("Routing is uniform: sizes of the token dispatch are expected ones (formula).")
    if plan.cost.memory["accumulated gradients"]:
        lines.append("While micro-batches are added up, each rank holds whole gradients of all that it gathers.")
    return lines


def _print_search(found: Sequence[Candidate], console: Console) -> None:
    names = ("replicas", "shards", "experts over", "reshard", "recompute", "rows × micro-batches", "GB", "step s ≥",
             "limit")  # fmt: skip
    table = Table(*names, title=f"{len(found)} layouts fit (by formula); the best by the bound on a step")
    for one in found[:SHOWN]:
        layout = one.layout
        table.add_row(
            str(layout.dims.replicate_size), str(layout.dims.shards), str(layout.dims.expert_parallel_size),
            "yes" if layout.reshard_after_forward else "no", layout.activation_checkpointing,
            f"{layout.micro_batch_rows} × {one.accumulation}", f"{one.peak / 1e9:.1f}", f"{one.bounds.step:.3g}",
            one.bounds.limit,
        )  # fmt: skip
    console.print(table)


def fragment(layout: Layout) -> str:
    """The YAML of a layout, to be put on top of a config."""
    return (
        "trainer:\n  strategy:\n    class_path: MoEParallelStrategy\n    init_args:\n"
        f"      shard_size: {layout.dims.shards}\n      replicate_size: {layout.dims.replicate_size}\n"
        f"      expert_parallel_size: {layout.dims.expert_parallel_size}\n"
        f"      reshard_after_forward: {str(layout.reshard_after_forward).lower()}\n"
        "data:\n  init_args:\n"
        f"    micro_batch_size: {layout.micro_batch_rows}\n"
        "model:\n  init_args:\n    changes:  # with a preset; else activation_checkpointing of the config itself\n"
        f"      activation_checkpointing: {layout.activation_checkpointing}\n"
    )


def _as_dict(candidate: Candidate) -> dict[str, Any]:
    layout = candidate.layout
    return {
        "replicate_size": layout.dims.replicate_size,
        "shard_size": layout.dims.shards,
        "expert_parallel_size": layout.dims.expert_parallel_size,
        "reshard_after_forward": layout.reshard_after_forward,
        "activation_checkpointing": layout.activation_checkpointing,
        "micro_batch_rows": layout.micro_batch_rows,
        "accumulation": candidate.accumulation,
        "peak_bytes": candidate.peak,
        "bound_seconds": {**vars(candidate.bounds), "step": candidate.bounds.step},
        "how": "formula",
    }

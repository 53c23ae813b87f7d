"""`lit-interns1 recipe`: batch sizes, peak rate, schedule and mixture of a run from small runs, as a config and a page.

    lit-interns1 recipe --config BASE --tokens D --rates SEARCH … --batch_sizes LAW --mixture LAW --annealing RUN …

Takes the options of `fit` for the base. Trains nothing. What no small run speaks for is a marked default.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console
from rich.table import Table

from lit_interns1.commands.arguments import without_nan
from lit_interns1.commands.recipe_config import (
    batch_schedulers,
    changed_config,
    check_config,
    config_text,
    schedule_factors,
)
from lit_interns1.commands.recipe_inputs import (
    AnnealingRuns,
    MixingRuns,
    SmallRuns,
    annealing_warnings,
    rate_warnings,
    read_annealing,
    read_batch_sizes,
    read_mixing_law,
    read_searches,
    search_warnings,
    sizes_of,
    tokens_of_sources,
)
from lit_interns1.commands.trainer import KitArgumentParser, KitCLI, fail, innermost
from lit_interns1.laws.recipe import (
    BatchPlan,
    BatchSizeBand,
    Quantity,
    batch_size_band,
    constant_batch_size,
    plan_batch_sizes,
)
from lit_interns1.optim import WarmupStableDecay
from lit_interns1.reports.recipe_page import recipe_page
from lit_interns1.reports.recipe_parts import (
    EPOCHS,
    DecayPlan,
    MixturePlan,
    RatePlan,
    beyond,
    default_decay,
    kept_mixture,
    plan_decay,
    plan_mixture,
    plan_rate,
    published_rate,
)
from lit_interns1.reports.recipe_plan import Recipe
from lit_interns1.training import GlobalBatch

_USAGE = """lit-interns1 recipe --config FILE [--config FILE ...] [--out DIR] [--tokens D] [--rates RUN ...]
                           [--batch_sizes LAW_OR_RUN ...] [--mixture LAW] [--annealing RUN ...] [options of fit ...]

  lit-interns1 recipe --config configs/pretrain/tiny.yaml --tokens 2800000 --out recipes/tiny \\
      --rates runs/learning_rate/small runs/learning_rate/large --batch_sizes runs/batch_size/law
"""
TOKENS_PER_PARAMETER = 20
"""Of the active parameters, where neither --tokens nor the config names a budget (arXiv 2203.15556)."""
DEFAULT_WARMUP = 0.01


class RecipeCLI(KitCLI):
    """Parses what `fit` parses, and makes module and data module of the base, but no Trainer."""

    base_name = ""
    """Of the configs that were given."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The options of `fit`, and those of the recipe."""
        super().add_arguments_to_parser(parser)
        before = {action.dest for action in parser._actions}
        add = parser.add_argument
        add("--out", type=str, default="recipe", metavar="DIR", help="New directory for the config and the page.")
        add("--tokens", type=float, default=None, metavar="D", help="Tokens of the run; default: clock.max_tokens.")
        add("--rates", type=str, nargs="+", default=[], metavar="RUN", help="Learning-rate searches: run directories.")
        add(
            "--count", type=str, choices=["total", "active"], default="total",
            help="Which parameters the law of the rate counts.",
        )  # fmt: skip
        add(
            "--published_rate_law", action="store_true",
            help="Without --rates: take the published law with its constant, whose units are not known.",
        )  # fmt: skip
        add(
            "--batch_sizes", type=str, nargs="+", default=[], metavar="LAW",
            help="law.json of batch-size-law (or its directory), or run directories of constant batch size.",
        )  # fmt: skip
        add("--max_batch", type=float, default=math.inf, metavar="B", help="Most tokens per optimizer step.")
        add("--ranks", type=int, default=None, metavar="W", help="Data-parallel ranks; default: devices × nodes.")
        add("--mixture", type=str, default=None, metavar="LAW", help="mixing_law.json of mixing-law, or its directory.")
        for name, text in (
            ("weights", "Weights of the validation losses by name, as {english: 1, code: 2}; default: equal."),
            ("floors", "Lowest shares by source; default: 1/16, below which the mixing law does not hold."),
            ("caps", "Highest shares by source."),
            ("available", "Training tokens by source; default: with --mixture the sources are tokenised and counted."),
        ):
            add(f"--{name}", type=dict[str, float] | None, default=None, help=text)
        add("--epochs", type=float, default=EPOCHS, help="How often a token may be read at most.")
        add("--annealing", type=str, nargs="+", default=[], metavar="RUN", help="Runs that log loss and rate.")
        self.recipe_options = {action.dest for action in parser._actions} - before
        for name in ("ckpt_path", "weights_only"):  # configs of finished runs hold them
            add(f"--{name}", default=None, help="Of fit; ignored.")

    def _parse_ckpt_path(self) -> None:
        """There is no checkpoint to look at."""

    def before_instantiate_classes(self) -> None:
        """Nothing is named after a run directory."""

    def instantiate_classes(self) -> None:
        """Makes module and data module."""
        config = self.config.clone()
        trainer = config.trainer
        trainer.callbacks = trainer.logger = trainer.profiler = trainer.plugins = None  # might open files
        try:
            made = self.parser.instantiate_classes(config)
        except (ValueError, OSError) as error:
            fail(str(innermost(error)))
        self.model, self.datamodule = self._get(made, "model"), self._get(made, "data")

    def values(self, config: Any) -> dict[str, Any]:
        """A parsed config as plain values, without the recipe's own options."""
        text = self.parser.dump(config, skip_none=False, skip_validation=True)
        values: dict[str, Any] = yaml.safe_load(text)
        ours = {*self.recipe_options, "ckpt_path", "weights_only", "config"}
        return {key: value for key, value in values.items() if key not in ours}


def run(args: Sequence[str]) -> None:
    """Runs the command.

    Args:
        args: What stands behind "recipe".
    """
    cli = parse(args)
    try:
        write_recipe(cli)
    except (ValueError, OSError) as error:
        fail(str(innermost(error)))


def parse(args: Sequence[str]) -> RecipeCLI:
    """The options, and the module and the data module that they describe."""
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
    cli = RecipeCLI(
        LightningModule, LightningDataModule, subclass_mode_model=True, subclass_mode_data=True, run=False,
        save_config_callback=None, parser_class=KitArgumentParser,
        parser_kwargs={"parser_mode": "omegaconf+", "usage": _USAGE, "description": __doc__}, args=list(args),
    )  # fmt: skip
    cli.base_name = " + ".join(_configs(args)) or "options alone"
    return cli


def _configs(args: Sequence[str]) -> list[str]:
    pairs = zip(args, [*args[1:], ""], strict=True)
    return [name.partition("=")[2] or value for name, value in pairs if name.partition("=")[0] == "--config"]


def write_recipe(cli: RecipeCLI) -> Recipe:
    """Plans, checks and writes: all files or none.

    Raises:
        ValueError: If an input is unsuitable, or the directory exists.
    """
    out = Path(cli.config.out)
    if out.exists():
        raise ValueError(f"--out {out} exists already: name a new directory")
    base = cli.values(cli.config)
    inputs = read_small_runs(cli.config)
    recipe = make_recipe(cli, base, inputs)
    values = cli.values(cli.parser.parse_object(changed_config(base, recipe, out)))
    text = config_text(cli, values, recipe)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        (partial / "config.yaml").write_text(text, encoding="utf-8")
        check_config(cli, partial / "config.yaml", values, recipe)
        answer = json.dumps(without_nan(recipe.to_dict()), indent=1, allow_nan=False) + "\n"
        (partial / "recipe.json").write_text(answer, encoding="utf-8")
        table = inputs.batch_sizes.table if inputs.batch_sizes else None
        page = recipe_page(recipe, schedule_factors(recipe), text, list(inputs.searches.values()), table)
        (partial / "recipe.html").write_text(page, encoding="utf-8")
        os.rename(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _print(recipe, out)
    return recipe


def read_small_runs(options: Any) -> SmallRuns:
    """What the options name."""
    return SmallRuns(
        read_searches(options.rates), read_batch_sizes(options.batch_sizes), read_mixing_law(options.mixture),
        read_annealing(options.annealing),
    )  # fmt: skip


def make_recipe(cli: RecipeCLI, base: Mapping[str, Any], inputs: SmallRuns) -> Recipe:
    """All plans, and what is to be known about them."""
    options, data, found = cli.config, cli.datamodule, inputs.batch_sizes
    row_length, micro, rows = _batch_of(data)
    parameters, active = sizes_of(cli.model)
    ranks, noted = _ranks(options)
    tokens = _tokens(options, active)
    rate = _rate(options, base, inputs.searches, parameters if options.count == "total" else active, tokens.value)
    decay = _decay(base, tokens.value, rate.peak.value, inputs.annealing)
    tokens_per_pass = micro * ranks * row_length
    law: BatchSizeBand | None = None
    if found is None:
        batch = constant_batch_size(GlobalBatch(rows, micro, ranks).accumulation, tokens_per_pass, tokens.value)
        source = "default: the base config's global_batch_size"
        if batch_schedulers(base):
            noted.append("the base config's BatchSizeScheduler is kept, and not part of this plan")
    else:
        law = batch_size_band(found.table)
        freeze = tokens.value * (1 - decay.share.value)
        batch = plan_batch_sizes(law, tokens.value, freeze, tokens_per_pass, options.max_batch)
        source = f"batch-size law of {len(found.table.batches)} runs: ln B = {law.p:.3f} + {law.q:.3f} ln D"
        noted += _batch_warnings(law, batch, freeze)
    noted += search_warnings(inputs.searches, base, row_length, [step.batch for step in batch.steps])
    noted += rate_warnings(found, rate.peak.value)
    noted += annealing_warnings(inputs.annealing, [step.batch for step in batch.steps])
    mixture = _mixture(options, data, tokens.value, inputs.mixing)
    parts = [*noted, *batch.warnings, *rate.warnings, *decay.warnings, *(mixture.warnings if mixture else ())]
    return Recipe(
        base=cli.base_name, parameters=parameters, active_parameters=active, tokens=tokens, rate=rate, batch=batch,
        batch_source=source, batch_is_default=found is None, batch_law=law, decay=decay, mixture=mixture, ranks=ranks,
        warnings=tuple(parts),
    )  # fmt: skip


def _batch_of(data: Any) -> tuple[int, int, int]:
    names = ("row_length", "micro_batch_size", "global_batch_size")
    if missing := [name for name in names if not isinstance(getattr(data, name, None), int)]:
        raise ValueError(f"data: {type(data).__name__} has no {', '.join(missing)}, and a recipe needs them")
    return data.row_length, data.micro_batch_size, data.global_batch_size


# -- parts of the plan -------------------------------------------------------------------------------------------------


def _ranks(options: Any) -> tuple[int, list[str]]:
    if options.ranks is not None:
        if options.ranks < 1:
            raise ValueError(f"--ranks = {options.ranks} must be at least 1")
        return int(options.ranks), []
    devices, nodes = options.trainer.devices, options.trainer.num_nodes
    if isinstance(devices, list):
        devices = len(devices)
    if isinstance(devices, str) and devices.isdigit():
        devices = int(devices)
    if isinstance(devices, int) and devices > 0:
        return devices * nodes, []
    return nodes, [f"trainer.devices = {devices!r} says no number: one device a node is assumed; give --ranks"]


def _tokens(options: Any, active: int) -> Quantity:
    if options.tokens is not None:
        if not (options.tokens >= 1 and math.isfinite(options.tokens)):
            raise ValueError(f"--tokens = {options.tokens} must be at least 1")
        return Quantity(float(options.tokens), "--tokens, down to whole steps")
    if options.clock.max_tokens is not None:
        return Quantity(float(options.clock.max_tokens), "default: clock.max_tokens of the base", is_default=True)
    source = f"default: {TOKENS_PER_PARAMETER} per active parameter (arXiv 2203.15556)"
    return Quantity(float(TOKENS_PER_PARAMETER * active), source, is_default=True)


def _decay(base: Mapping[str, Any], tokens: float, peak: float, annealing: AnnealingRuns | None) -> DecayPlan:
    schedule = base["model"]["init_args"].get("schedule") or {}
    given = schedule.get("init_args", {})
    warmup = DEFAULT_WARMUP
    if schedule.get("class_path", "").endswith("WarmupStableDecay"):
        warmup = float(given["warmup_tokens"])
        warmup = warmup if warmup < 1 else warmup / given["total_tokens"]
    if annealing is None:
        return default_decay(warmup)

    def family(decay_share: float, shape: str, floor: float) -> WarmupStableDecay:
        return WarmupStableDecay(tokens, warmup, decay_share, shape, floor)  # type: ignore[arg-type]

    network = _without_none(base["model"]["init_args"].get("config"))
    return plan_decay(
        annealing.law, tokens, annealing.tokens_per_step, peak, warmup, family, annealing.runs,
        network is not None and _without_none(annealing.network) == network,
    )  # fmt: skip


def _without_none(value: Any) -> Any:
    """Saved configs of runs leave out what is null."""
    if isinstance(value, dict):
        return {key: _without_none(entry) for key, entry in value.items() if entry is not None}
    return value


def _batch_warnings(law: BatchSizeBand, batch: BatchPlan, freeze: float) -> list[str]:
    found = beyond("batch size: D", freeze, law.tokens)
    found += beyond("batch size: B", max(step.batch for step in batch.steps), law.batches)
    if law.q <= 0:
        found.append("the batch-size law does not rise with D: one batch size is planned")
    return found


def _rate(
    options: Any, base: Mapping[str, Any], searches: Mapping[str, Any], parameters: int, tokens: float
) -> RatePlan:
    if searches:
        return plan_rate(list(searches.values()), parameters, tokens, options.count)
    if options.published_rate_law:
        return published_rate(parameters, tokens)
    optimizer = base["model"]["init_args"].get("optimizer") or {}
    rate = optimizer.get("init_args", {}).get("lr", 3e-4)
    return RatePlan(Quantity(float(rate), "default: the base config's", is_default=True))


def _mixture(options: Any, data: Any, tokens: float, mixing: MixingRuns | None) -> MixturePlan | None:
    sources = getattr(data, "sources", None)
    if not sources:
        if mixing is not None:
            raise ValueError(f"--mixture: {type(data).__name__} has no sources")
        return None
    names = [source.display_name for source in sources]
    available = options.available
    if mixing is None:
        ignored = [name for name in ("weights", "floors", "caps") if options[name] is not None]
        if ignored:
            raise ValueError(f"--{ignored[0]} needs --mixture")
    elif available is None:
        available = tokens_of_sources(data)
    for option in ("floors", "caps", "available"):
        unknown = sorted(set(options[option] or {}) - set(names))
        if unknown:
            raise ValueError(f"--{option} names {unknown[0]!r}; the sources are {', '.join(names)}")
    shares = [source.weight for source in sources]
    if None in shares:  # every row is read once per epoch
        if available is None or set(available) != set(names):
            return None
        shares = [available[name] for name in names]
    before = {name: share / sum(shares) for name, share in zip(names, shares, strict=True)}
    if mixing is None:
        return kept_mixture(before, tokens, available)
    bounds = (options.weights, options.floors, options.caps, available, options.epochs)
    return plan_mixture(mixing.law, before, tokens, mixing.tokens, *bounds)


# -- printing ----------------------------------------------------------------------------------------------------------


def _print(recipe: Recipe, out: Path) -> None:
    console = Console(width=max(Console().width, 120), highlight=False)
    table = Table("", "proposed", "95 % interval", "from")
    for row in recipe.rows():
        table.add_row(*row)
    console.print(table)
    for warning in recipe.warnings:
        console.print(f"- {warning}", markup=False)
    console.print(f"\n{out}: config.yaml, recipe.json, recipe.html\nlit-interns1 fit --config {out}/config.yaml",
                  markup=False)  # fmt: skip

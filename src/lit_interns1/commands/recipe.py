"""`lit-interns1 recipe`: batch sizes, peak rate, schedule and mixture of a run from small runs, as a config and a page.

    lit-interns1 recipe --config BASE --tokens D --rates SEARCH … --batch_sizes LAW --mixture LAW --annealing RUN …

Takes the options of `fit` for the base. Trains nothing. What no small run speaks for is a marked default.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console
from rich.table import Table

from lit_interns1.commands.recipe_inputs import (
    mixing_law_of,
    rate_warnings,
    read_batch_sizes,
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
from lit_interns1.reports.recipe_plan import (
    EPOCHS,
    DecayPlan,
    MixturePlan,
    RatePlan,
    Recipe,
    beyond,
    default_decay,
    kept_mixture,
    plan_mixture,
    plan_rate,
    published_rate,
)
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


def run(args: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        args: What stands behind "recipe"; None: the arguments of the process.
    """
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
    given = sys.argv[2:] if args is None else list(args)
    cli = RecipeCLI(
        LightningModule, LightningDataModule, subclass_mode_model=True, subclass_mode_data=True, run=False,
        save_config_callback=None, parser_class=KitArgumentParser,
        parser_kwargs={"parser_mode": "omegaconf+", "usage": _USAGE, "description": __doc__},
        args=given,
    )  # fmt: skip
    cli.base_name = " + ".join(_configs(given)) or "options alone"
    try:
        write_recipe(cli)
    except (ValueError, OSError) as error:
        fail(str(innermost(error)))


def _configs(args: Sequence[str]) -> list[str]:
    pairs = zip(args, [*args[1:], ""], strict=True)
    given = [
        argument.partition("=")[2] or value for argument, value in pairs if argument.partition("=")[0] == "--config"
    ]
    return [Path(name).stem for name in given]


def write_recipe(cli: RecipeCLI) -> Recipe:
    """Plans, checks and writes: all files or none.

    Raises:
        ValueError: If an input is unsuitable, or the directory exists.
    """
    options, out = cli.config, Path(cli.config.out)
    if out.exists():
        raise ValueError(f"--out {out} exists already: name a new directory")
    base = cli.values(cli.config)
    searches = read_searches(options.rates)
    found = read_batch_sizes(options.batch_sizes)
    recipe = make_recipe(cli, base, searches, found)
    values = cli.values(cli.parser.parse_object(changed_config(base, recipe, out)))
    text = config_text(cli, values, recipe)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        (partial / "config.yaml").write_text(text, encoding="utf-8")
        check_config(cli, partial / "config.yaml", values, recipe)
        answer = json.dumps(_plain(recipe.to_dict()), indent=1, allow_nan=False) + "\n"
        (partial / "recipe.json").write_text(answer, encoding="utf-8")
        page = recipe_page(recipe, _factors(recipe), text, list(searches.values()), found.table if found else None)
        (partial / "recipe.html").write_text(page, encoding="utf-8")
        os.rename(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _print(recipe, out)
    return recipe


def make_recipe(cli: RecipeCLI, base: Mapping[str, Any], searches: Mapping[str, Any], found: Any) -> Recipe:
    """All plans, and what is to be known about them."""
    options, data = cli.config, cli.datamodule
    names = ("row_length", "micro_batch_size", "global_batch_size")
    row_length, micro, rows = (getattr(data, name, None) for name in names)
    if not all(isinstance(value, int) for value in (row_length, micro, rows)):
        raise ValueError(f"data: {type(data).__name__} has no {', '.join(names)}, and a recipe needs them")
    parameters, active = sizes_of(cli.model)
    ranks, noted = _ranks(options)
    tokens = _tokens(options, active)
    decay = _decay(options, base, tokens.value)
    tokens_per_pass = micro * ranks * row_length
    law: BatchSizeBand | None = None
    if found is None:
        batch = constant_batch_size(GlobalBatch(rows, micro, ranks).accumulation, tokens_per_pass, tokens.value)
        source = "default: the base config's global_batch_size"
        if _batch_schedulers(base):
            noted.append("the base config's BatchSizeScheduler is kept, and not part of this plan")
    else:
        law = batch_size_band(found.table)
        freeze = tokens.value * (1 - decay.share.value)
        batch = plan_batch_sizes(law, tokens.value, freeze, tokens_per_pass, options.max_batch)
        source = f"batch-size law of {len(found.table.batches)} runs: ln B = {law.p:.3f} + {law.q:.3f} ln D"
        noted += _batch_warnings(law, batch, freeze)
    rate = _rate(options, base, searches, parameters if options.count == "total" else active, tokens.value)
    noted += search_warnings(searches, base, row_length, [step.batch for step in batch.steps])
    noted += rate_warnings(found, rate.peak.value)
    mixture = _mixture(options, data, tokens.value)
    parts = [*noted, *batch.warnings, *rate.warnings, *decay.warnings, *(mixture.warnings if mixture else ())]
    return Recipe(
        base=cli.base_name, parameters=parameters, active_parameters=active, tokens=tokens, rate=rate, batch=batch,
        batch_source=source, batch_is_default=found is None, batch_law=law, decay=decay, mixture=mixture, ranks=ranks,
        warnings=tuple(parts),
    )  # fmt: skip


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


def _decay(options: Any, base: Mapping[str, Any], tokens: float) -> DecayPlan:
    schedule = base["model"]["init_args"].get("schedule") or {}
    given = schedule.get("init_args", {})
    warmup = DEFAULT_WARMUP
    if schedule.get("class_path", "").endswith("WarmupStableDecay"):
        warmup = float(given["warmup_tokens"])
        warmup = warmup if warmup < 1 else warmup / given["total_tokens"]
    return default_decay(warmup)


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


def _mixture(options: Any, data: Any, tokens: float) -> MixturePlan | None:
    sources = getattr(data, "sources", None)
    if not sources:
        if options.mixture is not None:
            raise ValueError(f"--mixture: {type(data).__name__} has no sources")
        return None
    names = [source.display_name for source in sources]
    available = options.available
    if options.mixture is None:
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
    if options.mixture is None:
        return kept_mixture(before, tokens, available)
    law = mixing_law_of(options.mixture)
    return plan_mixture(
        law, before, tokens, options.weights, options.floors, options.caps, available, options.epochs
    )  # fmt: skip


# -- the config --------------------------------------------------------------------------------------------------------


def changed_config(base: Mapping[str, Any], recipe: Recipe, out: Path) -> dict[str, Any]:
    """The base config with what the recipe says."""
    values: dict[str, Any] = json.loads(json.dumps(base))
    arguments = values["model"]["init_args"]
    if "schedule" not in arguments:
        raise ValueError(f"model: {values['model']['class_path']} takes no schedule")
    optimizer = arguments.get("optimizer") or {
        "class_path": "torch.optim.AdamW", "init_args": {"betas": [0.9, 0.95], "weight_decay": 0.1},
    }  # fmt: skip
    optimizer.setdefault("init_args", {})["lr"] = float(f"{recipe.rate.peak.value:.6g}")
    arguments["optimizer"] = optimizer
    arguments["schedule"] = {"class_path": "lit_interns1.optim.WarmupStableDecay", "init_args": _schedule(recipe)}
    values["data"]["init_args"]["global_batch_size"] = (
        recipe.batch.steps[0].batch // values["data"]["init_args"]["row_length"]
    )
    if recipe.mixture is not None and not recipe.mixture.sources[0].share.is_default:
        for source, planned in zip(values["data"]["init_args"]["sources"], recipe.mixture.sources, strict=True):
            source["weight"] = round(planned.share.value, 6)
    trainer = values["trainer"]
    if not recipe.batch_is_default:
        others = [callback for callback in trainer.get("callbacks") or [] if callback not in _batch_schedulers(values)]
        trainer["callbacks"] = [*others, *_batch_callback(recipe)] or None
    trainer["max_epochs"] = trainer["max_steps"] = -1  # the clock ends the run
    values["clock"]["max_tokens"] = recipe.total_tokens
    for section in ("checkpoint", "best_checkpoint"):  # of a run whose config this is
        if values[section].get("dirpath") == str(Path(values["run_dir"]) / "checkpoints"):
            values[section]["dirpath"] = None
    values["run_dir"] = str(out / "run")
    return values


def _schedule(recipe: Recipe) -> dict[str, Any]:
    return {
        "total_tokens": float(recipe.total_tokens),
        "warmup_tokens": float(round(recipe.warmup_tokens)),
        "decay_tokens": float(round(recipe.decay_tokens)),
        "shape": recipe.decay.shape,
        "final_factor": recipe.decay.final_factor,
    }


def _factors(recipe: Recipe) -> list[tuple[float, float]]:
    schedule = WarmupStableDecay(**_schedule(recipe))
    places = [recipe.total_tokens * step / 400 for step in range(401)]
    return [(tokens, schedule(tokens)) for tokens in places]


def _batch_schedulers(values: Mapping[str, Any]) -> list[Any]:
    callbacks = values["trainer"].get("callbacks") or []
    return [callback for callback in callbacks if callback["class_path"].endswith("BatchSizeScheduler")]


def _batch_callback(recipe: Recipe) -> list[dict[str, Any]]:
    if len(recipe.batch.steps) == 1:
        return []
    table = [[step.tokens, step.batch] for step in recipe.batch.steps]
    schedule = {"class_path": "lit_interns1.optim.TabulatedBatch", "init_args": {"table": table}}
    return [{"class_path": "lit_interns1.callbacks.BatchSizeScheduler", "init_args": {"schedule": schedule}}]


def config_text(cli: RecipeCLI, values: Mapping[str, Any], recipe: Recipe) -> str:
    """The config as YAML, without what is a default anyway."""
    kept = _without_defaults(values, cli.values(cli.parser.get_defaults()))
    lines = [f"# Proposed by `lit-interns1 recipe` from {recipe.base}; recipe.html beside it has the reasons."]
    lines += [f"# WARNING: {warning}" for warning in recipe.warnings]
    return "\n".join(lines) + "\n" + yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=120)


def _without_defaults(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in values.items():
        default = defaults.get(key, _without_defaults)  # equal to nothing
        if isinstance(value, dict) and isinstance(default, dict):
            if inner := _without_defaults(value, default):
                kept[key] = inner
        elif value != default or isinstance(value, bool) != isinstance(default, bool):  # 1 is not True
            kept[key] = value
    return kept


def check_config(cli: RecipeCLI, file: Path, values: Mapping[str, Any], recipe: Recipe) -> None:
    """Raises ValueError if the file does not say what was planned, or something in it cannot be made."""
    parsed = cli.parser.parse_path(str(file))
    read = cli.values(parsed)
    if json.dumps(read, sort_keys=True) != json.dumps(values, sort_keys=True):
        different = [key for key in values if json.dumps(read.get(key)) != json.dumps(values[key])]
        raise ValueError(f"the config cannot be written: {', '.join(different)} would read otherwise; this is a bug")
    parsed.trainer.logger = parsed.trainer.profiler = None
    cli.parser.instantiate_classes(parsed)
    arguments = values["data"]["init_args"]
    for step in recipe.batch.steps:
        GlobalBatch(step.batch // arguments["row_length"], arguments["micro_batch_size"], recipe.ranks)


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


def _plain(value: Any) -> Any:
    """JSON has no NaN: None."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""The config of a recipe: the base with what is proposed, written without defaults and read again as a check."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lit_interns1.optim import WarmupStableDecay
from lit_interns1.reports.recipe_plan import Recipe
from lit_interns1.training import GlobalBatch

if TYPE_CHECKING:
    from lit_interns1.commands.recipe import RecipeCLI


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
        others = [callback for callback in trainer.get("callbacks") or [] if callback not in batch_schedulers(values)]
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


def schedule_factors(recipe: Recipe) -> list[tuple[float, float]]:
    """The factor on the peak rate over the run: (consumed tokens, factor)."""
    schedule = WarmupStableDecay(**_schedule(recipe))
    places = [recipe.total_tokens * step / 400 for step in range(401)]
    return [(tokens, schedule(tokens)) for tokens in places]


def batch_schedulers(values: Mapping[str, Any]) -> list[Any]:
    """The callbacks of a config that change the batch size."""
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

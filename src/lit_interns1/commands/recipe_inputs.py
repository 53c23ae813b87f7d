"""What a recipe reads: searches, runs and laws of batch size, mixture and decay; sizes of the model and the sources."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lit_interns1.commands.batch_size_law import check_rates, check_settings, read_run
from lit_interns1.commands.lr_search import RESULT_FILE
from lit_interns1.laws import (
    AnnealingCurve,
    AnnealingLaw,
    BatchSizeTable,
    MixingLaw,
    fit_annealing_law,
    fit_batch_size_table,
)
from lit_interns1.models.decoder import Decoder, count_parameters
from lit_interns1.modules.counted_module import CountedModule
from lit_interns1.optim.batch_schedules import read_artefact
from lit_interns1.reports import RunDirectory
from lit_interns1.reports.learning_rate_search import RateSearchResult

_BOOTSTRAP = 100
_SAME_RATE = 1.01
_LEAST_VALIDATIONS, _MOST_LOSSES = 8, 100


class BatchSizes(NamedTuple):
    """What is known of batch sizes.

    Attributes:
        table: B_opt over the loss.
        rates: Learning rates of the runs, where they are known.
    """

    table: BatchSizeTable
    rates: tuple[float, ...]


def read_searches(paths: Sequence[str]) -> dict[str, RateSearchResult]:
    """Searches by path.

    Raises:
        ValueError: If one holds no result, or is named twice.
    """
    if len({Path(path).resolve() for path in paths}) < len(paths):
        raise ValueError(f"--rates: a search is named twice among {', '.join(paths)}")
    return {path: RateSearchResult.load(Path(path) / RESULT_FILE if Path(path).is_dir() else path) for path in paths}


def read_batch_sizes(paths: Sequence[str]) -> BatchSizes | None:
    """The table of a law's file (or its directory), or that of several runs; None for no path.

    Raises:
        ValueError: For files and runs that are unsuitable.
    """
    if not paths:
        return None
    first = Path(paths[0])
    file = first / "law.json" if (first / "law.json").is_file() else first
    if len(paths) == 1 and not file.is_dir():
        artefact = read_artefact(file)
        rates = tuple(float(run["rate"]) for run in artefact["runs"] if run["rate"] is not None)
        return BatchSizes(BatchSizeTable.from_dict(_numbers(artefact["table"])), rates)
    runs = [read_run(path) for path in paths]
    check_settings(paths)
    check_rates(runs)
    table = fit_batch_size_table(
        [round(run.batch) for run in runs], [run.tokens_N for run in runs], [run.loss_N for run in runs],
        bootstrap=_BOOTSTRAP,
    )  # fmt: skip
    return BatchSizes(table, tuple(run.rate for run in runs if run.rate is not None))


def _numbers(value: Any) -> Any:
    """NaN where the file has null."""
    if isinstance(value, dict):
        return {key: _numbers(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_numbers(entry) for entry in value]
    return float("nan") if value is None else value


class MixingRuns(NamedTuple):
    """A mixing law and its runs.

    Attributes:
        law: The law.
        tokens: Of the runs, where they are known.
    """

    law: MixingLaw
    tokens: tuple[float, ...]


def read_mixing_law(path: str | None) -> MixingRuns | None:
    """The law in a file of `mixing-law`, or in `mixing_law.json` of a directory; None for no path.

    Raises:
        ValueError: If there is none.
    """
    if path is None:
        return None
    file = Path(path) / "mixing_law.json" if Path(path).is_dir() else Path(path)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        runs = found.get("runs", []) if isinstance(found, dict) else []
        law = MixingLaw.from_json(json.dumps(found["law"] if isinstance(found, dict) and "law" in found else found))
    except (OSError, ValueError) as error:
        raise ValueError(f"--mixture {file}: {error}") from None
    return MixingRuns(law, tuple(float(run["tokens"]) for run in runs if run.get("tokens")))


class AnnealingRuns(NamedTuple):
    """An annealing law and its runs.

    Attributes:
        law: The law.
        tokens_per_step: Of the runs; its λ counts steps.
        runs: How many.
        network: Config of their model; None where it is not known.
    """

    law: AnnealingLaw
    tokens_per_step: float
    runs: int
    network: Any


def read_annealing(paths: Sequence[str]) -> AnnealingRuns | None:
    """The law of the logged losses and rates of runs; None for no path.

    Validation losses count where a run has eight or more of them; else training losses, averaged over neighbours.

    Raises:
        ValueError: If a run logs no loss, tokens or rate, or the runs have different batch sizes.
    """
    if not paths:
        return None
    _check_alike(paths)
    curves, batches, network = [], [], None
    for path in paths:
        run = RunDirectory(path)
        rate, clock = run.metric("optim/lr"), run.metric("train/tokens")
        if rate.tokens is None or len(clock.steps) < 2:
            raise ValueError(f"--annealing: the run {path} logged no train/tokens: add a TokenClock")
        batches.append((clock.values[-1] - clock.values[0]) / (clock.steps[-1] - clock.steps[0]))
        batch = batches[0]
        losses = run.metrics().get("val/loss")
        if losses is None or len(losses.values) < _LEAST_VALIDATIONS:
            losses = run.metric("train/loss")
        assert losses.tokens is not None
        kept = np.isfinite(losses.values)
        groups = np.array_split(np.flatnonzero(kept), min(int(kept.sum()), _MOST_LOSSES))
        steps_N = np.array([max(round(losses.tokens[group].mean() / batch), 1) for group in groups])
        at_T = batch * (np.arange(steps_N.max()) + 1)
        rates_T = np.interp(at_T, rate.tokens, rate.values)
        curves.append(AnnealingCurve(rates_T, steps_N, np.array([losses.values[group].mean() for group in groups])))
        if run.config_file.is_file():
            network = run.config().get("model", {}).get("init_args", {}).get("config")
    if max(batches) > min(batches) * _SAME_RATE:
        listed = ", ".join(f"{batch:,.0f}" for batch in batches)
        raise ValueError(f"--annealing: the runs have different batch sizes ({listed} tokens per step)")
    return AnnealingRuns(fit_annealing_law(curves, bootstrap=_BOOTSTRAP), float(batches[0]), len(paths), network)


_MAY_DIFFER = (
    "model.init_args.schedule", "model.init_args.optimizer.init_args.lr", "model.init_args.seed", "data.init_args.seed",
    "data.init_args.micro_batch_size", "data.init_args.num_workers", "data.init_args.pin_memory",
    "data.init_args.cache_dir",
)  # fmt: skip


def _check_alike(paths: Sequence[str]) -> None:
    """Raises ValueError if runs that have a `config.yaml` differ in more than their rates, tokens and seeds."""
    settings = {path: RunDirectory(path).settings() for path in paths if RunDirectory(path).config_file.is_file()}
    for path, found in settings.items():
        first, expected = next(iter(settings.items()))
        for key in sorted(found.keys() | expected.keys()):
            if not key.startswith(_MAY_DIFFER) and found.get(key) != expected.get(key):
                raise ValueError(
                    f"--annealing: the runs differ in more than their rates: {key} is {expected.get(key)!r} in {first} "
                    f"and {found.get(key)!r} in {path}"
                )


class SmallRuns(NamedTuple):
    """All that small runs say.

    Attributes:
        searches: Of the learning rate, by path.
        batch_sizes: Of the batch size.
        mixing: Of the mixture.
        annealing: Of the decay.
    """

    searches: dict[str, RateSearchResult]
    batch_sizes: BatchSizes | None
    mixing: MixingRuns | None
    annealing: AnnealingRuns | None


def sizes_of(module: Any) -> tuple[int, int]:
    """All parameters of a module, and those that act on a token; without memory where the module allows it.

    Raises:
        ValueError: If it has none before training.
    """
    network = module
    if isinstance(module, CountedModule):
        with torch.device("meta"):
            network = module.build_model()
    total = sum(parameter.numel() for parameter in network.parameters())
    if not total:
        raise ValueError(f"model: {type(module).__name__} has no parameters before training: N is not known")
    decoders = [part for part in network.modules() if isinstance(part, Decoder)]
    return total, total - sum(count.total - count.active for count in map(count_parameters, decoders))


def tokens_of_sources(data: Any) -> dict[str, float]:
    """Training tokens by source: of whole rows, without what is held back for validation. Tokenises what is new."""
    data.prepare_data()
    data.setup("validate")
    rows = data.row_order.rows_per_source
    names = [source.display_name for source in data.sources]
    return {name: float(count * data.row_length) for name, count in zip(names, rows, strict=True)}


# -- warnings ----------------------------------------------------------------------------------------------------------


def search_warnings(
    searches: Mapping[str, RateSearchResult], base: Mapping[str, Any], row_length: int, batches: Sequence[int]
) -> list[str]:
    """How the searches were made otherwise than the run will be: another optimizer, clipping or batch size.

    Args:
        searches: By path.
        base: The config of the run.
        row_length: Tokens of its rows.
        batches: Planned tokens per step.
    """
    found = []
    wanted = base["model"]["init_args"].get("optimizer") or {}
    clip = base["trainer"].get("gradient_clip_val")
    for path in searches:
        if not (Path(path).is_dir() and RunDirectory(path).config_file.is_file()):
            found.append(f"rates: how {path} was trained is not known (no config.yaml beside it)")
            continue
        run = RunDirectory(path)
        settings, config = run.settings(), run.config()
        optimizer = (config.get("model") or {}).get("init_args", {}).get("optimizer") or {}
        different = _different(wanted, optimizer)
        if different:
            found.append(f"rates: {path} was searched with another optimizer: {different}")
        if (config.get("trainer") or {}).get("gradient_clip_val") != clip:
            found.append(f"rates: {path} was searched with another trainer.gradient_clip_val than {clip}")
        sources = base["data"]["init_args"].get("sources")
        if _paths(settings.get("data.init_args.sources")) != _paths(sources):
            found.append(f"rates: {path} was searched on other sources")
        rows = settings.get("data.init_args.global_batch_size")
        length = settings.get("data.init_args.row_length", row_length)
        if isinstance(rows, int) and not min(batches) <= rows * length <= max(batches):
            found.append(
                f"rates: {path} was searched with {rows * length:,} tokens per step, planned are "
                + " … ".join(f"{batch:,}" for batch in sorted({min(batches), max(batches)}))
            )
    return found


def _paths(sources: Any) -> list[str]:
    listed = [sources] if isinstance(sources, str) else sources or []
    return sorted(source if isinstance(source, str) else str(source.get("path")) for source in listed)


def _different(wanted: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """In words, the learning rate and what only one of them names aside."""
    ours, theirs = (str(x.get("class_path", "AdamW")).rsplit(".", 1)[-1] for x in (wanted, other))
    if ours != theirs:
        return f"{theirs} instead of {ours}"
    first, second = wanted.get("init_args", {}), other.get("init_args", {})
    keys = [key for key in first.keys() & second.keys() if key not in ("lr", "fused", "foreach")]
    return ", ".join(f"{key} {second.get(key)} instead of {first.get(key)}" for key in sorted(keys)
                     if json.dumps(first.get(key)) != json.dumps(second.get(key)))  # fmt: skip


def rate_warnings(found: BatchSizes | None, peak: float) -> list[str]:
    """The batch-size law holds at one learning rate: says so if that is not the planned one."""
    if found is None:
        return []
    if not found.rates:
        return ["batch size: the learning rate of its runs is not known, and the law holds at one rate"]
    rate = max(found.rates)
    if max(rate / peak, peak / rate) > _SAME_RATE:
        return [f"batch size: its runs had the learning rate {rate:.3g}, planned is {peak:.3g}; the law holds at one"]
    return []


def annealing_warnings(annealing: AnnealingRuns | None, batches: Sequence[int]) -> list[str]:
    """The annealing law holds at one batch size: says so if that is not the planned one."""
    if annealing is None:
        return []
    apart = max(max(batch / annealing.tokens_per_step, annealing.tokens_per_step / batch) for batch in batches)
    if apart <= _SAME_RATE:
        return []
    return [
        f"decay: the runs of the annealing law had {annealing.tokens_per_step:,.0f} tokens per step, planned are "
        + " … ".join(f"{batch:,}" for batch in sorted({min(batches), max(batches)}))
    ]

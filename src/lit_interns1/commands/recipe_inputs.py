"""What a recipe reads: searches, batch-size runs and laws, mixing laws, the sizes of the model and of the sources."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lit_interns1.commands.batch_size_law import check_rates, check_settings, read_run
from lit_interns1.commands.lr_search import RESULT_FILE
from lit_interns1.laws import BatchSizeTable, fit_batch_size_table
from lit_interns1.laws.mixing import MixingLaw
from lit_interns1.models.decoder import Decoder, count_parameters
from lit_interns1.modules.counted_module import CountedModule
from lit_interns1.optim.batch_schedules import read_artefact
from lit_interns1.reports import RunDirectory
from lit_interns1.reports.learning_rate_search import RateSearchResult

_BOOTSTRAP = 100
_SAME_RATE = 1.01


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


def mixing_law_of(path: str) -> MixingLaw:
    """The law in a file, or in `mixing_law.json` of a directory.

    Raises:
        ValueError: If there is none.
    """
    file = Path(path) / "mixing_law.json" if Path(path).is_dir() else Path(path)
    try:
        return MixingLaw.from_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--mixture {file}: {error}") from None


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
    """In words, the learning rate aside."""
    ours, theirs = (str(x.get("class_path", "AdamW")).rsplit(".", 1)[-1] for x in (wanted, other))
    if ours != theirs:
        return f"{theirs} instead of {ours}"
    first, second = wanted.get("init_args", {}), other.get("init_args", {})
    keys = [key for key in first.keys() | second.keys() if key not in ("lr", "fused", "foreach")]
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

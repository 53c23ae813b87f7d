"""`lit-interns1 salience`: which validation tokens tell what a model can do (arXiv 2506.13216).

record     losses of every validation token, for each checkpoint of a run
score      small downstream scores of the same checkpoints, on held-out documents that `record` leaves out
fit        token weights for each score, judged on data recipes that the fit has not seen
predict    scores of recorded checkpoints from fitted weights
"""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lit_interns1.commands.summarize import MOLECULE_TAGS, data_module_of

if TYPE_CHECKING:
    from lit_interns1.data import TextDataModule, TextTokenizer
    from lit_interns1.laws import SalienceFit
    from lit_interns1.modules import LanguageModelModule

FOLDER = "salience"
"""Where a run directory keeps recorded losses and scores."""
SCORES_FILE = "scores.json"
CLOSING_BRACKETS = frozenset(")]}")


# -- checkpoints of a run --------------------------------------------------------------------------------------------


def checkpoints_of(run_dir: Path, pattern: str) -> list[Path]:
    """Checkpoints of a run, oldest first; `last.ckpt` and `best.ckpt` repeat others, so they count only if alone.

    Raises:
        ValueError: If there is none.
    """
    from lit_interns1.reports import RunDirectory

    found = sorted(RunDirectory(run_dir).checkpoints.glob(pattern), key=lambda path: (path.stat().st_mtime, path.name))
    single = [path for path in found if path.stem not in ("last", "best")]
    found = single or [path for path in found if path.stem == "last"] or found
    if not found:
        raise ValueError(f"{run_dir} has no checkpoint {pattern!r} in {RunDirectory(run_dir).checkpoints}")
    return found


def language_model_module(checkpoint: Path, device: str) -> LanguageModelModule:
    """The module around the model of a checkpoint, in eval mode; it gives scores of the tokens of a batch."""
    from lit_interns1.modules.language_model_module import LanguageModelModule, load_language_model

    model = load_language_model(checkpoint, device)
    module = LanguageModelModule(model.config)
    module.model = model
    return module.eval()


def consumed_tokens(checkpoint: Path) -> int:
    """Training tokens that the run had consumed when it wrote the checkpoint; 0 if its clock is not in it."""
    from lit_interns1.modules.language_model_module import read_checkpoint

    callbacks = read_checkpoint(checkpoint).get("callbacks", {})
    return int(next((state["tokens"] for key, state in callbacks.items() if key.startswith("TokenClock")), 0))


def prepared(config: dict[str, Any], **changes: Any) -> TextDataModule:
    """The data of a config, ready to be read, with some options changed."""
    data = {**(config.get("data") or {})}
    data["init_args"] = {**(data.get("init_args") or {}), **changes}
    module = data_module_of({"data": data})
    module.prepare_data()
    module.setup()
    return module


def run_config(run_dir: Path, config: str | None) -> dict[str, Any]:
    """The config that describes the validation data: the one named, else the run's own."""
    from omegaconf import OmegaConf

    from lit_interns1.reports import RunDirectory

    if config is None:
        return RunDirectory(run_dir).config()
    loaded = OmegaConf.to_container(OmegaConf.load(config), resolve=False)
    if not isinstance(loaded, dict):
        raise ValueError(f"--config {config} holds no mapping")
    return {str(key): value for key, value in loaded.items()}


def reports_errors(action: Callable[..., None]) -> Callable[..., None]:
    """Makes a complaint one line on standard error, and the status 2."""
    from functools import wraps

    @wraps(action)
    def wrapped(*args: Any, **options: Any) -> None:
        try:
            action(*args, **options)
        except (OSError, ValueError) as error:
            print(f"lit-interns1 salience {action.__name__}: {error}", file=sys.stderr)
            raise SystemExit(2) from None

    return wrapped


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


# -- record ----------------------------------------------------------------------------------------------------------


def token_losses(module: LanguageModelModule, data: TextDataModule) -> tuple[Any, Any, str]:
    """(W,) ascending `validation_token_id`, (W,) losses in nats, and the data hash of what was read.

    Raises:
        ValueError: If the loader gives a token twice.
    """
    import numpy as np
    import torch

    from lit_interns1.data.validation_tokens import data_hash, hash_lanes, loss_positions

    ids, losses, lanes = [], [], np.zeros(2, dtype=np.uint64)
    device = next(module.parameters()).device
    with torch.no_grad():
        for batch in data.val_dataloader():
            batch = batch.to(device)
            positions = loss_positions(batch)
            index_N = positions.index_N
            losses.append((-module.token_scores(batch).logp_T[index_N]).float().cpu().numpy())
            ids.append(positions.token_id_N.cpu().numpy())
            columns = (batch.position_ids[index_N].cpu().numpy(), batch.input_ids[index_N].cpu().numpy())
            lanes += hash_lanes(ids[-1], *columns)
    if not ids:
        raise ValueError("the config holds no validation data back: set validation_fraction or validation_sources")
    token_ids, losses_W = np.concatenate(ids), np.concatenate(losses)
    order = np.argsort(token_ids, kind="stable")
    if (np.diff(token_ids[order]) == 0).any():
        raise ValueError("the validation loader gives a token twice")
    return token_ids[order], losses_W[order], data_hash(lanes)


@reports_errors
def record(
    run_dir: str,
    ckpt: str = "*.ckpt",
    recipe: str | None = None,
    config: str | None = None,
    output: str | None = None,
    device: str = "cpu",
    overwrite: bool = False,
) -> None:
    """Records the loss of every validation token for the checkpoints of a run.

    Args:
        run_dir: Directory of the run.
        ckpt: Which files or folders in its `checkpoints`, as a pattern.
        recipe: Name of the training data distribution; default: the name of the run directory. Runs on the same data
            must have the same recipe, or the fit is judged on data it has seen.
        config: YAML with a `data` section that holds the validation data; default: the run's own.
        output: Folder of the records; default: `salience` in the run directory.
        device: Where to compute.
        overwrite: Record again what is recorded already.
    """
    from lit_interns1.data.recorded_losses import RecordedLosses
    from lit_interns1.data.validation_tokens import tokenizer_hash

    run = Path(run_dir)
    folder = Path(output) if output else run / FOLDER
    waiting = [path for path in checkpoints_of(run, ckpt) if overwrite or not _record_of(folder, path).exists()]
    data = prepared(run_config(run, config)) if waiting else None
    for path in waiting:
        assert data is not None
        token_ids, losses, data_hash = token_losses(language_model_module(path, device), data)
        recorded = RecordedLosses(
            f"{run.name}/{path.stem}", recipe or run.name, consumed_tokens(path), tokenizer_hash(data.tokenizer),
            data_hash, token_ids, losses,
        )  # fmt: skip
        target = recorded.save(_record_of(folder, path))
        print(f"{recorded.name}: {len(losses):,} tokens, mean loss {losses.mean():.4f} → {target}", flush=True)
    if not waiting:
        print(f"{run}: everything is recorded in {folder} (--overwrite records again)")


def _record_of(folder: Path, checkpoint: Path) -> Path:
    return folder / f"{checkpoint.stem}.safetensors"


# -- score -----------------------------------------------------------------------------------------------------------


def accuracies(
    module: LanguageModelModule, data: TextDataModule, left_out: Any, tokenizer: TextTokenizer
) -> dict[str, float]:
    """`smiles_accuracy` and `bracket_accuracy` on validation tokens whose number is not in `left_out`."""
    import numpy as np
    import torch

    from lit_interns1.data.validation_tokens import loss_positions
    from lit_interns1.objectives.token_accuracy import TokenAccuracy, inside_tags

    opening, closing = (tokenizer.encode(tag) for tag in MOLECULE_TAGS)
    if len(opening) != 1 or len(closing) != 1:
        raise ValueError(f"the tokenizer has no tokens {MOLECULE_TAGS}: molecules cannot be told from other text")
    brackets_V = torch.tensor([bool(CLOSING_BRACKETS & set(tokenizer.token(i))) for i in range(tokenizer.vocab_size)])
    metric = TokenAccuracy(("smiles_accuracy", "bracket_accuracy"))
    device = next(module.parameters()).device
    with torch.no_grad():
        for batch in data.val_dataloader():
            positions = loss_positions(batch)
            fresh_N = torch.from_numpy(~np.isin(positions.token_id_N.numpy(), left_out))
            counts_T = torch.zeros(len(batch.labels), dtype=torch.bool)
            counts_T[positions.index_N[fresh_N]] = True
            molecule_T = inside_tags(batch.input_ids, batch.cu_seqlens, opening[0], closing[0])
            bracket_T = brackets_V[batch.labels.clamp(min=0)] & ~molecule_T
            ranks = module.token_scores(batch.to(device), rank=True).rank_T
            assert ranks is not None
            metric.update(ranks.cpu(), torch.stack([molecule_T, bracket_T]) & counts_T)
    for name, count in zip(metric.names, metric.count_C.tolist(), strict=True):
        if not count:
            raise ValueError(f"{name}: no such token among the held-out documents; raise --rows")
    return metric.compute()


@reports_errors
def score(
    run_dir: str,
    ckpt: str = "*.ckpt",
    rows: int = 256,
    config: str | None = None,
    output: str | None = None,
    device: str = "cpu",
    overwrite: bool = False,
) -> None:
    """Scores the checkpoints of a run: next-token accuracy in molecules, and on closing brackets elsewhere.

    Scores are taken on held-out documents that `record` does not see: the config must cap them by `validation_rows`.

    Args:
        run_dir: Directory of the run.
        ckpt: Which files or folders in its `checkpoints`, as a pattern.
        rows: Rows of held-out text to score on, beyond those that are recorded.
        config: YAML with a `data` section that holds the validation data; default: the run's own.
        output: The file of the scores; default: `salience/scores.json` in the run directory.
        device: Where to compute.
        overwrite: Score again what is scored already.
    """
    import numpy as np

    from lit_interns1.data.validation_tokens import seen_tokens

    if rows < 1:
        raise ValueError(f"--rows must be at least 1, got {rows}")
    run = Path(run_dir)
    target = Path(output) if output else run / FOLDER / SCORES_FILE
    scores: dict[str, dict[str, float]] = json.loads(target.read_text("utf-8")) if target.is_file() else {}
    waiting = [p for p in checkpoints_of(run, ckpt) if overwrite or f"{run.name}/{p.stem}" not in scores]
    if not waiting:
        print(f"{run}: everything is scored in {target} (--overwrite scores again)")
        return
    recorded = prepared(run_config(run, config))
    if recorded.validation_rows is None:
        raise ValueError("data.validation_rows is not set: all held-out text is recorded, none is left to score on")
    data = prepared(run_config(run, config), validation_rows=recorded.validation_rows + rows)
    left_out = np.unique(seen_tokens(recorded.val_dataloader()).token_id_N)
    for path in waiting:
        name = f"{run.name}/{path.stem}"
        scores[name] = accuracies(language_model_module(path, device), data, left_out, data.tokenizer)
        write_json(target, scores)
        print(f"{name}: " + ", ".join(f"{key} {value:.4f}" for key, value in scores[name].items()), flush=True)


def load_scores(files: list[Path]) -> dict[str, dict[str, float]]:
    """Scores by checkpoint and capability, of JSON files `{name: {capability: score}}` or CSV files with a column
    `name` and one for each capability.

    Raises:
        ValueError: If a file is malformed or a value is no number.
    """
    merged: dict[str, dict[str, float]] = {}
    for file in files:
        rows: dict[str, Any]
        try:
            if file.suffix == ".csv":
                with file.open(newline="", encoding="utf-8") as stream:
                    rows = {row.pop("name"): row for row in csv.DictReader(stream)}
            else:
                rows = json.loads(file.read_text("utf-8"))
            for name, row in rows.items():
                merged.setdefault(name, {}).update({key: float(value) for key, value in row.items()})
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"scores: {file} is neither {{name: {{capability: score}}}} as JSON nor CSV with a column 'name' "
                f"({type(error).__name__}: {error})"
            ) from None
    return merged


# -- fit and predict -------------------------------------------------------------------------------------------------


@reports_errors
def fit(
    losses: str,
    output: str,
    scores: list[str] | None = None,
    capabilities: list[str] | None = None,
    y_lo: float = 0.0,
    y_hi: float = 1.0,
    prior: Literal["zero", "uniform"] = "zero",
    nonneg: bool = False,
    normalise: Literal["abs1", "sum1"] = "abs1",
    polish: bool = False,
) -> None:
    """Fits token weights for each score, judged with whole data recipes held out, beside the mean loss.

    Args:
        losses: Recorded losses: a file pattern, or a directory of runs.
        output: Directory for `weights.safetensors`, `evaluation.json`, `evaluation.md` and pictures.
        scores: JSON or CSV files of scores by checkpoint; default: every `salience/scores.json` below `losses`.
        capabilities: Scores to fit; default: all that every checkpoint has.
        y_lo: Score of chance.
        y_hi: Highest score.
        prior: What a large ridge pulls the weights to: zero, or uniform weights.
        nonneg: Keep weights at zero or above.
        normalise: Σ|w| = 1 (abs1) or Σw = 1 (sum1).
        polish: Try Levenberg–Marquardt on the scores, and keep it if it does better on held-out recipes.
    """
    import numpy as np

    from lit_interns1.data.recorded_losses import load_recorded, stacked
    from lit_interns1.laws import SalienceFile, fit_salience
    from lit_interns1.reports import save_figure
    from lit_interns1.reports.salience_figures import prediction_figure

    recorded = load_recorded(losses)
    found = [Path(file) for file in scores or []] or sorted(Path(losses).glob(f"**/{FOLDER}/{SCORES_FILE}"))
    if not found:
        raise ValueError(f"scores: none named and no {FOLDER}/{SCORES_FILE} below {losses}; see `salience score`")
    known = load_scores(found)
    names = [entry.name for entry in recorded]
    absent = [name for name in names if name not in known]
    if absent:
        raise ValueError(f"scores: {len(absent)} of {len(names)} recorded checkpoints have none, as {absent[0]!r}")
    wanted = capabilities or [key for key in known[names[0]] if all(key in known[name] for name in names)]
    lacking = [key for key in wanted if any(key not in known[name] for name in names)]
    if lacking or not wanted:
        raise ValueError(f"capabilities: not every checkpoint has a score for {lacking or 'any one capability'}")

    losses_MW, recipes = stacked(recorded), [entry.recipe for entry in recorded]
    target, fits = Path(output), {}
    for key in wanted:
        score_M = np.array([known[name][key] for name in names])
        print(f"fitting {key} on {len(names)} checkpoints of {len(set(recipes))} recipes …", flush=True)
        fits[key] = fit_salience(
            losses_MW, score_M, recipes, y_lo, y_hi, prior=prior, nonneg=nonneg, normalise=normalise, polish=polish
        )
        held_out = {"token weights": fits[key].held_out_M, "mean loss": fits[key].baseline_M}
        save_figure(prediction_figure(score_M, held_out, recipes, key), target / f"{key}.png")
    file = SalienceFile(
        recorded[0].tokenizer_hash, recorded[0].data_hash, recorded[0].token_ids,
        {key: result.salience for key, result in fits.items()},
    )  # fmt: skip
    file.save(target / "weights.safetensors")
    write_json(target / "evaluation.json", {key: evaluation(result, names) for key, result in fits.items()})
    lines = list(evaluation_lines(fits, recipes))
    (target / "evaluation.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def evaluation(result: SalienceFit, names: list[str]) -> dict[str, Any]:
    """The numbers of one fit, as plain values."""
    from dataclasses import asdict

    return {
        "rho": result.salience.rho,
        "held_out": asdict(result.salience.held_out_metrics),
        "mean_loss": asdict(result.baseline_metrics),
        "in_sample": asdict(result.salience.fit_metrics),
        "recipes": {recipe: asdict(metrics) for recipe, metrics in result.recipe_metrics.items()},
        "predictions": {
            name: {"token_weights": float(weighted), "mean_loss": float(plain)}
            for name, weighted, plain in zip(names, result.held_out_M, result.baseline_M, strict=True)
        },
    }


def evaluation_lines(fits: dict[str, SalienceFit], recipes: list[str]) -> Iterator[str]:
    """The table of a fit as Markdown."""
    yield f"Predictions of {len(recipes)} checkpoints of {len(set(recipes))} data recipes, each without its recipe.\n"
    yield "| capability | predictor | R² | MSE | MAE | Spearman |\n|---|---|---|---|---|---|"
    for key, result in fits.items():
        for name, m in (("token weights", result.salience.held_out_metrics), ("mean loss", result.baseline_metrics)):
            yield f"| {key} | {name} | {m.r_squared:.4f} | {m.mse:.3g} | {m.mae:.4f} | {m.spearman:.4f} |"


@reports_errors
def predict(weights: str, losses: str) -> None:
    """Predicts the scores of recorded checkpoints.

    Args:
        weights: `weights.safetensors` that `fit` wrote.
        losses: Recorded losses: a file pattern, or a directory of runs.
    """
    import numpy as np

    from lit_interns1.data.recorded_losses import load_recorded
    from lit_interns1.laws import load_salience

    file, recorded = load_salience(weights), load_recorded(losses)
    file.check(recorded[0].tokenizer_hash, recorded[0].data_hash)
    print("| checkpoint | tokens | capability | loss | predicted score | ± |\n|---|---|---|---|---|---|")
    for entry in recorded:
        if not np.array_equal(entry.token_ids, file.token_ids_T):
            raise ValueError(f"{entry.name} holds losses of other tokens than {weights} has weights for")
        for key, capability in file.capabilities.items():
            loss = float(capability.capability_loss(entry.losses))
            value, std = capability.predict(loss)
            cells = (entry.name, f"{entry.tokens:,}", key, f"{loss:.4f}", f"{float(value):.4f}", f"{float(std):.4f}")
            print(f"| {' | '.join(cells)} |")


SUBCOMMANDS: dict[str, Callable[..., None]] = {"record": record, "score": score, "fit": fit, "predict": predict}

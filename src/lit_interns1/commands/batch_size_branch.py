"""`lit-interns1 batch-size-branch`: the critical batch size at a checkpoint of a run (arXiv 2505.23971).

    for each k:  resume with batch k·B and rate √k·η, train Δ tokens → L_k
    critical:    the largest k·B with L_k ≤ L_j + ε for all j < k

Branches are runs of their own below --out, one after the other on the same rows. The run itself is only read. Finished
branches are kept when the command is repeated.

How the loss is averaged (exponentially over windows of the largest batch) and the default of Δ are reconstructions.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from lit_interns1.reports import RunDirectory

SETTINGS_FILE, RESULT_FILE, FINISHED = "settings.json", "branches.json", "finished"
STEPS_OF_LARGEST = 64
"""Δ in steps of the largest batch, where it is not given."""


@dataclass(frozen=True)
class BranchSettings:
    """What all branches below a directory have in common.

    Attributes:
        checkpoint: Path of the checkpoint.
        start_tokens: Consumed tokens of the checkpoint.
        tokens: Δ.
        learning_rate: `none`, `sqrt` or `linear`.
        options: Further options of `fit`.
    """

    checkpoint: str
    start_tokens: int
    tokens: int
    learning_rate: Literal["none", "sqrt", "linear"]
    options: tuple[str, ...]

    @property
    def end_tokens(self) -> int:
        """Where the branches end."""
        return self.start_tokens + self.tokens

    def claim(self, folder: Path) -> None:
        """Makes the directory, or checks that its branches have these settings.

        Raises:
            ValueError: If they have others, or the directory holds something else.
        """
        settings = json.loads(json.dumps(asdict(self)))
        file = folder / SETTINGS_FILE
        if file.is_file():
            found = json.loads(file.read_text(encoding="utf-8"))
            changed = [
                f"{name} {found.get(name)} → {value}" for name, value in settings.items() if found.get(name) != value
            ]
            if changed and any(folder.glob(f"k*/{FINISHED}")):
                raise ValueError(
                    f"the branches in {folder} have other settings ({'; '.join(changed)}): name a new --out"
                )
        elif folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} exists and holds no branches: name a new --out")
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def tokens_per_step(run: RunDirectory, step: int) -> float:
    """B of a run before an optimizer step, from its logs.

    Raises:
        ValueError: If it logged `train/tokens` at fewer than two steps up to there.
    """
    import numpy as np

    clock = run.metric("train/tokens")
    before = clock.steps < step
    if before.sum() < 2:
        raise ValueError(
            f"the run {run.path} logged train/tokens at {before.sum()} steps before its step {step}, not two"
        )
    each = np.diff(clock.values[before]) / np.diff(clock.steps[before])
    return float(each[-9:].max())  # not the last: it may be the short step at the end of an epoch


def train_branch(run: RunDirectory, folder: Path, factor: int, settings: BranchSettings) -> None:
    """Trains one branch in a new run directory."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import Checkpoint
    from lightning.pytorch.loggers import CSVLogger

    from lit_interns1.callbacks import BatchSizeScheduler
    from lit_interns1.callbacks.branch_batch_size import BranchBatchSize
    from lit_interns1.commands import trainer as trainer_commands
    from lit_interns1.modules.language_model_module import read_checkpoint

    class BranchCLI(trainer_commands.KitCLI):
        """`fit` with k times the batch size and without checkpoints."""

        def instantiate_trainer(self, **kwargs: Any) -> Trainer:
            """Puts the branch's batch size in the place of the run's scheduler."""
            trainer = super().instantiate_trainer(**kwargs)
            kept, replaced = [], None
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, BatchSizeScheduler):
                    replaced = callback
                    state = read_checkpoint(settings.checkpoint)["callbacks"].get(callback.state_key)
                    if state is not None:
                        replaced.load_state_dict(state)
                elif not isinstance(callback, Checkpoint):
                    kept.append(callback)
            branch = BranchBatchSize(factor, settings.end_tokens, settings.learning_rate, replaced)
            trainer.callbacks = [branch, *kept]  # type: ignore[attr-defined]
            trainer.loggers = [CSVLogger(str(folder), name="metrics", version="")]
            environment = getattr(trainer.strategy, "cluster_environment", None)
            if trainer.world_size > 1 and not getattr(environment, "creates_processes_externally", False):
                raise ValueError("several devices in one command need torchrun: start batch-size-branch with it")
            return trainer

    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
    warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
    trainer_commands.run(
        [
            "fit", f"--config={run.config_file}", f"--run_dir={folder}", f"--ckpt_path={settings.checkpoint}",
            f"--clock.max_tokens={settings.end_tokens}", "--trainer.max_epochs=-1", "--trainer.max_steps=-1",
            "--trainer.log_every_n_steps=1", "--trainer.limit_val_batches=0", *settings.options,
        ],
        cli_class=BranchCLI,
    )  # fmt: skip


def compare_branches(
    folders: dict[int, Path], settings: BranchSettings, metric: str, tolerance: float, weight: float
) -> dict[str, Any]:
    """The losses of finished branches and the critical batch size, as written to the result file.

    Args:
        folders: Run directory of each k.
        settings: Of the branches.
        metric: Name of the loss.
        tolerance: ε, nats per token.
        weight: α of the average.
    """
    import numpy as np

    from lit_interns1.laws import branched_critical_batch, smoothed_final_loss
    from lit_interns1.reports import RunDirectory

    runs = {factor: RunDirectory(folder) for factor, folder in sorted(folders.items())}
    batches = [float(run.metric("batch/tokens_per_step").values.max()) for run in runs.values()]
    series = [run.metric(metric) for run in runs.values()]
    tokens = [np.asarray(one.tokens, dtype=np.float64) for one in series]
    end = min(float(one[-1]) for one in tokens)
    losses = [
        smoothed_final_loss(at, one.values, settings.start_tokens, end, max(batches), weight)
        for at, one in zip(tokens, series, strict=True)
    ]
    critical = branched_critical_batch(batches, losses, tolerance)
    rows = zip(runs, batches, losses, series, strict=True)
    return {
        "format": "lit-interns1 batch-size branches 1",
        "unit": "tokens per optimizer step",
        **asdict(settings),
        "metric": metric,
        "tolerance": tolerance,
        "weight": weight,
        "window_tokens": max(batches),
        "branches": [
            {
                "factor": k,
                "batch": batch,
                "loss": loss if math.isfinite(loss) else None,
                "steps": int(one.steps[-1] - one.steps[0]) + 1,
            }
            for k, batch, loss, one in rows
        ],
        "critical_batch": critical.batch,
        "is_bound": critical.is_bound,
    }


def branch(
    run: str | Path,
    out: str | Path,
    checkpoint: str = "last.ckpt",
    factors: Sequence[int] = (1, 2, 4, 8),
    tokens: int | None = None,
    learning_rate: Literal["none", "sqrt", "linear"] = "sqrt",
    metric: str = "train/loss",
    tolerance: float = 0.01,
    weight: float = 0.5,
    options: Sequence[str] = (),
) -> dict[str, Any]:
    """Trains the branches that are missing, and writes `branches.json`, `branches.md` and `branches.png` into `out`.

    Args:
        run: Run directory; only read.
        out: Directory of the branches.
        checkpoint: A file (or sharded folder) in the run's `checkpoints`, or a path.
        factors: k of each branch.
        tokens: Δ; None: 64 steps of the largest batch.
        learning_rate: What a branch does to the rate: `sqrt` (Adam) √k, `linear` k, `none`.
        metric: Name of the loss.
        tolerance: ε, nats per token.
        weight: α of the average of losses.
        options: Further options of `fit`.

    Raises:
        ValueError: For unsuitable options or runs.
    """
    from lightning.pytorch.utilities import rank_zero_only

    from lit_interns1.modules.language_model_module import read_checkpoint
    from lit_interns1.reports import RunDirectory, save_figure
    from lit_interns1.reports.batch_size_figures import branch_figure

    if len(set(factors)) < 2 or min(factors) < 1:
        raise ValueError(f"--factors takes two different whole numbers or more, from 1 on; got {list(factors)}")
    directory, folder = RunDirectory(run), Path(out)
    directory.config()  # missing: say it now
    path = directory.checkpoints / checkpoint
    path = (path if path.exists() else Path(checkpoint)).resolve()
    saved = read_checkpoint(path)
    clock = saved.get("callbacks", {}).get("TokenClock")
    if clock is None:
        raise ValueError(f"the checkpoint {path} has no TokenClock, so nobody knows where its tokens stand")
    largest = max(factors) * tokens_per_step(directory, saved["global_step"])
    tokens = round(STEPS_OF_LARGEST * largest) if tokens is None else tokens
    if tokens < 2 * largest:  # it may begin with almost a step's worth of smaller ones
        raise ValueError(f"--tokens {tokens:,} must be two steps of the largest batch, {2 * largest:,.0f}, or more")
    settings = BranchSettings(str(path), int(clock["tokens"]), tokens, learning_rate, tuple(options))
    folders = {factor: folder / f"k{factor}" for factor in sorted(set(factors))}
    is_first_rank = getattr(rank_zero_only, "rank", 0) == 0
    if is_first_rank:
        settings.claim(folder)
    missing = [factor for factor, place in folders.items() if not (place / FINISHED).is_file()]
    for factor in missing:
        if is_first_rank:
            shutil.rmtree(folders[factor], ignore_errors=True)
        train_branch(directory, folders[factor], factor, settings)
        (folders[factor] / FINISHED).touch()
    result = compare_branches(folders, settings, metric, tolerance, weight)
    if is_first_rank:
        (folder / RESULT_FILE).write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        (folder / "branches.md").write_text("\n".join(table_lines(result)) + "\n", encoding="utf-8")
        save_figure(branch_figure(result), folder / "branches.png")
    return result


def table_lines(result: dict[str, Any]) -> list[str]:
    """The result as Markdown."""
    lines = ["| k | tokens per step | steps | loss |", "|---|---|---|---|"]
    for one in result["branches"]:
        loss = "diverged" if one["loss"] is None else f"{one['loss']:.4f}"
        lines.append(f"| {one['factor']} | {one['batch']:,.0f} | {one['steps']:,} | {loss} |")
    mark = "at least " if result["is_bound"] else ""
    lines += [
        "",
        f"critical batch size after {result['start_tokens']:,} tokens: {mark}{result['critical_batch']:,.0f} tokens "
        f"per step (within {result['tolerance']:g} nats over {result['tokens']:,} tokens)",
    ]
    return lines


def run(arguments: Sequence[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        "lit-interns1 batch-size-branch",
        description="The critical batch size at a checkpoint, by branches of the run. Further options go to fit.",
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", help="run directory; it is only read")
    parser.add_argument("--out", required=True, help="directory of the branches; repeat the command to continue")
    parser.add_argument("--checkpoint", default="last.ckpt", help="in the run's checkpoints, or a path (%(default)s)")
    parser.add_argument("--factors", type=int, nargs="+", default=[1, 2, 4, 8], help="k of each branch (1 2 4 8)")
    parser.add_argument("--tokens", type=int, help="of each branch (default: 64 steps of the largest batch)")
    parser.add_argument(
        "--learning_rate", choices=("sqrt", "linear", "none"), default="sqrt", help="× √k (for Adam), × k, or as it is"
    )
    parser.add_argument("--metric", default="train/loss", help="name of the loss (default: %(default)s)")
    parser.add_argument("--tolerance", type=float, default=0.01, help="nats per token (default: %(default)s)")
    parser.add_argument("--weight", type=float, default=0.5, help="of the latest loss in the average (%(default)s)")
    options, rest = parser.parse_known_args(list(arguments))
    try:
        result = branch(**vars(options), options=rest)
    except (OSError, ValueError) as error:
        print(f"lit-interns1 batch-size-branch: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print("\n".join(table_lines(result)))
    print(f"\nwritten to {options.out}: {RESULT_FILE}, branches.md, branches.png")

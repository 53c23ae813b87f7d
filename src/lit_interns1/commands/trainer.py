"""`fit`, `validate`, `test` and `predict`: LightningCLI with a run directory, local and W&B logs, and short errors.

A run directory is named once (`--run_dir`) and holds everything that a run leaves:
    config.yaml   checkpoints/   metrics/   pictures/   wandb/   tokenizer.json
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import wandb
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only

# short class names in configs resolve to classes that are imported
import lit_interns1.callbacks
import lit_interns1.data.caption_data_module
import lit_interns1.data.conversation_data_module
import lit_interns1.data.polar_data_module
import lit_interns1.data.preference_data_module
import lit_interns1.data.text_data_module
import lit_interns1.modules
import lit_interns1.optim
import lit_interns1.rollout.rollout_data_module
import lit_interns1.strategies
from lit_interns1.callbacks import ConsoleProgress, RouterLoadMonitor, RunCheckpoint, ThroughputMonitor, TokenClock
from lit_interns1.data.tokenizer import TextTokenizer
from lit_interns1.modules.language_model_module import LanguageModelModule, read_checkpoint


def known_option_names(parser: LightningArgumentParser) -> set[str]:
    """Names that may stand in a config: the parser's own, and the parameters of the kit's classes."""
    import inspect
    from dataclasses import fields, is_dataclass

    names = {part for action in parser._actions for part in action.dest.split(".") if part.isidentifier()}
    rooms = [
        lit_interns1.callbacks,
        lit_interns1.data,
        lit_interns1.modules,
        lit_interns1.optim,
        lit_interns1.strategies,
    ]
    rooms += [import_room(name) for name in ("lit_interns1.models", "lit_interns1.objectives", "lit_interns1.nn.moe")]
    for room in rooms:
        for value in vars(room).values():
            if is_dataclass(value):
                names |= {f.name for f in fields(value)}
            elif inspect.isclass(value) and value.__module__.startswith("lit_interns1"):
                names |= set(inspect.signature(value).parameters)
    return names | set(inspect.signature(Trainer).parameters)


def import_room(name: str) -> Any:
    """A package of the kit by name."""
    from importlib import import_module

    return import_module(name)


class KitArgumentParser(LightningArgumentParser):
    """A parser whose complaint about an unknown option is one line that names the nearest right one."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Prints the complaint and ends with status 2."""
        text = str(message)
        unknown = re.search(r"[Oo]ption '([\w.]+)'|unrecognized arguments: -*([\w.]+)|Key '([\w.]+)' is not", text)
        if unknown:
            key = next(name for name in unknown.groups() if name)
            names = known_option_names(self)
            part = next((part for part in key.split(".") if part not in names), key)
            sections = {action.dest.split(".")[0] for action in self._actions} if part == key.split(".")[0] else set()
            near = get_close_matches(part, sorted(sections), n=1, cutoff=0.7)
            near = near or get_close_matches(part, sorted(names), n=1, cutoff=0.6)
            text = f"unknown option {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")
        fail(text)


def fail(text: str) -> NoReturn:
    """Ends the program with one line on standard error and status 2."""
    print(f"lit-interns1: error: {text}", file=sys.stderr)
    raise SystemExit(2)


def innermost(error: BaseException) -> BaseException:
    """The first error of a chain: what went wrong, not who noticed."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


class SaveRunConfig(SaveConfigCallback):
    """Writes the full config and the tokenizer into the run directory; a resumed run writes a numbered config more."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes `tokenizer.json` and `config.yaml`, or `config-resumed-N.yaml` where one is there already."""
        if stage != "fit" or not trainer.is_global_zero:
            return
        directory = Path(trainer.default_root_dir)
        directory.mkdir(parents=True, exist_ok=True)
        target, number = directory / "config.yaml", 0
        while target.exists():
            number += 1
            target = directory / f"config-resumed-{number}.yaml"
        self.parser.save(self.config, target, skip_validation=True, multifile=False)
        tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
        if isinstance(tokenizer, TextTokenizer) and not (directory / "tokenizer.json").exists():
            tokenizer.save(directory / "tokenizer.json")


def logged_in_to_wandb() -> bool:
    """Whether W&B knows an API key (environment or netrc), without asking anyone."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    import netrc

    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def default_loggers(run_dir: Path) -> list[Logger]:
    """A CSV log and a W&B log (offline unless the user is logged in or WANDB_MODE says otherwise), side by side."""
    attempts = len(list((run_dir / "metrics").glob("**/metrics.csv")))
    version = "" if attempts == 0 else f"resumed-{attempts}"
    loggers: list[Logger] = [CSVLogger(str(run_dir), name="metrics", version=version, flush_logs_every_n_steps=20)]
    mode = os.environ.get("WANDB_MODE")
    if mode != "disabled":
        offline = mode == "offline" or (mode is None and not logged_in_to_wandb())
        if offline:
            os.environ.setdefault("WANDB_SILENT", "true")
        run_dir.mkdir(parents=True, exist_ok=True)
        loggers.append(
            WandbLogger(
                project="lit-interns1",
                name=run_dir.name,
                save_dir=str(run_dir),
                offline=offline,
                settings=wandb.Settings(silent=offline),
            )
        )
    return loggers


class KitCLI(LightningCLI):
    """LightningCLI with the kit's defaults: run directory, clock, checkpoints, throughput, router load, logs."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The run directory and the callbacks that are always on, each with its own section."""
        parser.add_argument(
            "--run_dir",
            type=str,
            default="runs/default",
            help="Directory of the run: config, checkpoints, metrics, pictures. A new run never writes into one that "
            "exists; `--ckpt_path last` continues the run in it.",
        )
        parser.add_lightning_class_args(TokenClock, "clock")
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(ModelCheckpoint, "best_checkpoint")
        parser.set_defaults(
            {
                "best_checkpoint.monitor": "val/loss",
                "best_checkpoint.filename": "best",
                "best_checkpoint.save_top_k": 1,
                "best_checkpoint.enable_version_counter": False,
            }
        )
        parser.add_lightning_class_args(ThroughputMonitor, "throughput")
        parser.add_lightning_class_args(RouterLoadMonitor, "router_monitor")

    def _parse_ckpt_path(self) -> None:
        """Looks at the checkpoint before anything else; hyper-parameters are taken from it only if it has some."""
        path = self.config[self.config.subcommand].get("ckpt_path")
        if path is None or path in ("last", "best", "hpc"):
            return
        try:
            checkpoint = read_checkpoint(path)
        except (OSError, ValueError) as error:
            fail(f"--ckpt_path: {error}")
        if "hyper_parameters" in checkpoint and Path(path).is_file():
            super()._parse_ckpt_path()

    def before_instantiate_classes(self) -> None:
        """Names everything after the run directory, and refuses one that is in use."""
        config = self.config[self.subcommand]
        self._run_dir = Path(config.run_dir)
        self._run_dir_is_new = not self._run_dir.exists()
        config.trainer.default_root_dir = str(self._run_dir)
        for section in (config.checkpoint, config.best_checkpoint):
            section.dirpath = section.dirpath or str(self._run_dir / "checkpoints")
        path = config.get("ckpt_path")
        in_use = self._run_dir.exists() and any(self._run_dir.iterdir())
        # other ranks may start when rank 0 has begun to write
        if self.subcommand == "fit" and path is None and in_use and getattr(rank_zero_only, "rank", 0) == 0:
            fail(
                f"run directory {self._run_dir} exists already: continue it with --ckpt_path last, "
                "or name a new one with --run_dir"
            )

    def instantiate_classes(self) -> None:
        """Builds trainer, model and data; a value that they refuse is one line, not a traceback."""
        try:
            super().instantiate_classes()
        except (ValueError, OSError) as error:
            fail(str(innermost(error)))
        path = self.config[self.subcommand].get("ckpt_path")
        checkpoint = self._run_dir / "checkpoints" / "last.ckpt" if path == "last" else Path(path or "")
        if path and checkpoint.is_dir() and not isinstance(self.trainer.strategy, ModelParallelStrategy):
            fail(f"checkpoint {checkpoint} is sharded: add --trainer.strategy moe_parallel, on any number of devices")
        if self.config[self.subcommand].get("ckpt_path") and isinstance(self.model, LanguageModelModule):
            self.model.checkpoint_follows = True

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs; what goes wrong before the first batch is one line, and leaves no half-made run directory."""
        try:
            super()._run_subcommand(subcommand)
        except (ValueError, OSError) as error:
            started = self.trainer.fit_loop.epoch_loop.total_batch_idx >= 0
            if started or "LIT_INTERNS1_TRACEBACK" in os.environ:
                raise
            if self.trainer.global_rank != 0:
                fail(f"rank {self.trainer.global_rank}: {innermost(error)}")
            if wandb.run is not None:
                wandb.finish(exit_code=1)
            if subcommand == "fit" and self._run_dir_is_new:
                shutil.rmtree(self._run_dir, ignore_errors=True)
            fail(f"{innermost(error)}\n(LIT_INTERNS1_TRACEBACK=1 shows where)")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Adds the default loggers to `fit`, unless the config names some."""
        config = self.config[self.subcommand]
        if self.subcommand == "fit" and config.trainer.logger in (None, True):
            kwargs["logger"] = default_loggers(self._run_dir)
        elif self.subcommand != "fit" and config.trainer.logger is None:
            kwargs["logger"] = False
        named = self._get(self.config_init, "trainer").callbacks or []
        callbacks = list(named) if isinstance(named, (list, tuple)) else [named]
        if config.trainer.enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            kwargs["callbacks"] = [*callbacks, ConsoleProgress()]
        if config.trainer.enable_model_summary is None:
            kwargs["enable_model_summary"] = False
        return super().instantiate_trainer(**kwargs)


def run(
    args: Sequence[str] | None = None, callbacks: Sequence[Callback] = (), cli_class: type[KitCLI] | None = None
) -> KitCLI:
    """Runs one of the Trainer's commands.

    Args:
        args: Begins with the command's name; None = the arguments of the process.
        callbacks: More callbacks for the Trainer, for runs from Python.
        cli_class: For commands that do more than Lightning's; None: `KitCLI`.
    """
    # resuming into the run's own directory is what is asked for; the other comes from Lightning with new torch releases
    warnings.filterwarnings("ignore", message=r"Checkpoint directory .* exists and is not empty")
    # a frozen reference is in eval mode, as it should be
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    return (cli_class or KitCLI)(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=SaveRunConfig,
        trainer_defaults={"callbacks": list(callbacks)},
        parser_class=KitArgumentParser,
        parser_kwargs={"parser_mode": "omegaconf+"},
        args=list(args) if args is not None else None,
    )

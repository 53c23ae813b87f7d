"""`fit`, `validate`, `test` and `predict`: LightningCLI with a run directory, local and W&B logs, and short errors.

A run directory is named once (`--run_dir`) and holds everything that a run leaves:
    config.yaml   checkpoints/   metrics/   pictures/   wandb/   tokenizer.json
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

# short class names in configs resolve to classes that are imported
import lit_interns1.callbacks
import lit_interns1.data.text_data_module
import lit_interns1.modules
import lit_interns1.optim
from lit_interns1.callbacks import ConsoleProgress, ExpertLoadRecorder, RunCheckpoint, ThroughputMonitor, TokenClock
from lit_interns1.modules.language_model_module import read_checkpoint


def known_option_names(parser: LightningArgumentParser) -> set[str]:
    """Names that may stand in a config: the parser's own, and the parameters of the kit's classes."""
    import inspect
    from dataclasses import fields, is_dataclass

    names = {part for action in parser._actions for part in action.dest.split(".") if part.isidentifier()}
    rooms = [lit_interns1.callbacks, lit_interns1.data, lit_interns1.modules, lit_interns1.optim]
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
        found = re.findall(
            r"(?:[Kk]ey|option|Option|arguments?:?|Unrecognized arguments:)\s+[\"'`]?(-{0,2}[\w.]+)", text
        )
        unknown = re.search(
            r"not expected|[Uu]nrecognized|not accepted|does not exist|Unknown|unexpected keyword", text
        )
        if unknown:
            names = known_option_names(self)
            for key in [*re.findall(r"Key [\"']([\w.]+)[\"'] is not expected", text), *reversed(found)]:
                leaf = key.lstrip("-").split(".")[-1]
                if leaf in names:
                    continue
                near = get_close_matches(leaf, sorted(names), n=1, cutoff=0.6)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                print(f"lit-interns1: unknown option {key!r}{hint}", file=sys.stderr)
                break
        print(f"lit-interns1: error: {text}", file=sys.stderr)
        raise SystemExit(2)


class SaveRunConfig(SaveConfigCallback):
    """Writes the full config into the run directory; a resumed run writes a numbered one beside the first."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes `config.yaml`, or `config-resumed-N.yaml` where one is there already."""
        if stage != "fit" or not trainer.is_global_zero:
            return
        directory = Path(trainer.default_root_dir)
        directory.mkdir(parents=True, exist_ok=True)
        target, number = directory / "config.yaml", 0
        while target.exists():
            number += 1
            target = directory / f"config-resumed-{number}.yaml"
        self.parser.save(self.config, target, skip_none=False, skip_check=True, multifile=False)


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
        loggers.append(WandbLogger(project="lit-interns1", name=run_dir.name, save_dir=str(run_dir), offline=offline))
    return loggers


class KitCLI(LightningCLI):
    """LightningCLI with the kit's defaults: run directory, clock, checkpoints, throughput, expert load, logs."""

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
        parser.add_lightning_class_args(ExpertLoadRecorder, "expert_load")

    def before_instantiate_classes(self) -> None:
        """Names everything after the run directory, and refuses one that is in use."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        self._run_dir = Path(config.run_dir)
        config.trainer.default_root_dir = str(self._run_dir)
        for section in (config.checkpoint, config.best_checkpoint):
            section.dirpath = section.dirpath or str(self._run_dir / "checkpoints")
        path = config.get("ckpt_path")
        if self.subcommand == "fit" and path is None and self._run_dir.exists() and any(self._run_dir.iterdir()):
            self.parser.error(
                f"run directory {self._run_dir} exists already: continue it with --ckpt_path last, "
                "or name a new one with --run_dir"
            )
        if path is not None and path not in ("last", "best", "hpc", "registry") and Path(path).suffix == ".ckpt":
            try:
                read_checkpoint(path)
            except (OSError, ValueError) as error:
                self.parser.error(f"--ckpt_path: {error}")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Adds the default loggers to `fit`, unless the config names some."""
        config = self.config[self.subcommand] if self.subcommand else self.config
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


def run(args: Sequence[str] | None = None, callbacks: Sequence[Callback] = ()) -> KitCLI:
    """Runs one of the Trainer's commands.

    Args:
        args: Begins with the command's name; None = the arguments of the process.
        callbacks: More callbacks for the Trainer, for runs from Python.
    """
    return KitCLI(
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

"""`lit-interns1 lr-search`: the best learning rate for a config of `fit`; with --law, for sizes that were not tried.

    lit-interns1 lr-search --config CONFIG --run_dir RUN --lr_min 1e-3 --lr_max 2e-2 --tokens [250000,500000,1000000]
    lit-interns1 lr-search --law RUN_A RUN_B … --target_parameters N --target_tokens D   (or --target RUN_C)

A search writes `lr_search.json` and `pictures/lr_search.png` into a new run directory, and trains nothing else.
"""

from __future__ import annotations

import argparse
import inspect
import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from lit_interns1.laws import RateLaw, published_rate_law
from lit_interns1.reports.learning_rate_search import RateSearchResult, SizeCount, joint_law, nearest_optimum, size_of
from lit_interns1.training.units import with_unit

RESULT_FILE = "lr_search.json"


def run(args: Sequence[str]) -> None:
    """Runs a search, or fits the law of several.

    Args:
        args: What stands behind the command's name.
    """
    if "--law" in args:
        try:
            print(law_report(_parse_law(args)))
        except ValueError as error:
            print(f"lit-interns1: error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        return
    _search(args)


# -- a search ----------------------------------------------------------------------------------------------------------


def _search(args: Sequence[str]) -> None:
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import Checkpoint, ProgressBar
    from lightning.pytorch.cli import LightningArgumentParser

    from lit_interns1.callbacks import LearningRateSearch
    from lit_interns1.commands import trainer as trainer_commands
    from lit_interns1.modules import LanguageModelModule

    decided_here = {"apply", "stop_after", "write"}
    options = [name for name in inspect.signature(LearningRateSearch).parameters if name not in decided_here]

    class SearchCLI(trainer_commands.KitCLI):
        """`fit` that ends after the search."""

        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            """What is parsed as `fit`."""
            return {"fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"}}

        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            """The options of `fit`, and those of the search."""
            super().add_arguments_to_parser(parser)
            parser.add_class_arguments(LearningRateSearch, skip=decided_here)

        def instantiate_trainer(self, **kwargs: object) -> Trainer:
            """Adds the search, and takes away what would leave files of a training."""
            chosen = {name: self._get(self.config_init, name) for name in options}
            if chosen["monitor"] is None and chosen["validation_metric"] is None:
                chosen["monitor"] = "train/loss" if isinstance(self.model, LanguageModelModule) else None
            self.search = LearningRateSearch(**chosen, stop_after=True, write=True)
            trainer = super().instantiate_trainer(**kwargs)
            present = trainer.callbacks  # type: ignore[attr-defined]
            kept = [callback for callback in present if not isinstance(callback, (Checkpoint, ProgressBar))]
            trainer.callbacks = [*kept, self.search]  # type: ignore[attr-defined]
            return trainer

    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
    cli = trainer_commands.run(["fit", *args], cli_class=SearchCLI)
    assert isinstance(cli, SearchCLI)
    if cli.trainer.is_global_zero:
        print(f"results are in {cli._run_dir / RESULT_FILE} and {cli._run_dir / 'pictures' / 'lr_search.png'}")


# -- the law of several ------------------------------------------------------------------------------------------------


def _parse_law(args: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="lit-interns1 lr-search", description="The law η*(N, D) = K N^a D^b of several searches."
    )
    parser.add_argument(
        "--law", nargs="+", required=True, metavar="RESULT", help="lr_search.json files or run directories"
    )
    parser.add_argument("--target_parameters", type=float, metavar="N", help="parameters of the run to predict for")
    parser.add_argument("--target_tokens", type=float, metavar="D", help="tokens of the run to predict for")
    parser.add_argument(
        "--target", metavar="RESULT", help="a search that is not in the law, to predict and to compare with"
    )
    parser.add_argument("--count", choices=["total", "active"], default="total", help="what N counts")
    return parser.parse_args(list(args))


def law_report(options: argparse.Namespace) -> str:
    """The fitted law, and the prediction for a target.

    Args:
        options: `law` (paths), `target_parameters`, `target_tokens`, `target` (a path), `count`.

    Raises:
        ValueError: If a file is no result, the results do not fix the law, or only one part of the target is given.
    """
    if (options.target_parameters is None) != (options.target_tokens is None):
        raise ValueError(
            f"give both parts of the target, got target_parameters={options.target_parameters} and "
            f"target_tokens={options.target_tokens}"
        )
    if options.target is not None and options.target_tokens is not None:
        raise ValueError(f"give either target={options.target} or target_parameters and target_tokens, not both")
    results = [_load(path) for path in options.law]
    lines = [f"{'N':>10}{'D':>10}{'best rate':>12}  bracketed"]
    for result in results:
        for probe, tokens in enumerate(result.tokens):
            size = with_unit(size_of(result, options.count))
            mark = "yes" if result.is_bracketed(probe) else "no, left out"
            lines.append(f"{size:>10}{with_unit(tokens):>10}{result.best_rate(probe):12.4g}  {mark}")
    law = joint_law(results, options.count)
    errors = law.standard_errors
    held_out = "" if law.held_out_error is None else f", held-out sizes: {math.exp(law.held_out_error):.3g}×"
    lines.append(
        f"ln η* = ln K + a ln N + b ln D:  K {law.constant:.4g}, a {law.size_exponent:.4f} ± {errors[1]:.4f}, "
        f"b {law.data_exponent:.4f} ± {errors[2]:.4f}, R² {law.r_squared:.4f}{held_out}"
    )
    if options.target_parameters is not None:
        lines += _prediction(law, results, (options.target_parameters, options.target_tokens), options.count)
    if options.target is not None:
        held_out_search = _load(options.target)
        target = (size_of(held_out_search, options.count), held_out_search.tokens[-1])
        lines += _prediction(law, results, target, options.count)
        lines.append(f"found by {options.target}: {held_out_search.verdict(-1)}")
    return "\n".join(lines)


def _load(path: str) -> RateSearchResult:
    return RateSearchResult.load(Path(path) / RESULT_FILE if Path(path).is_dir() else path)


def _prediction(
    law: RateLaw, results: Sequence[RateSearchResult], target: tuple[float, float], count: SizeCount
) -> list[str]:
    """By the law, and by ratios from the bracketed optimum that is nearest to the target (N, D)."""
    near, probe = nearest_optimum(results, target, count)
    parabola = near.parabola(probe)
    assert parabola is not None
    std = parabola.log_rate_std if math.isfinite(parabola.log_rate_std) else 0.0
    reference = (parabola.best_rate, size_of(near, count), near.tokens[probe])
    absolute = law.predict(*target)
    ratio = law.predict_ratio(*reference, *target, std)
    published = published_rate_law().predict_ratio(*reference, *target, std)
    where = f"N = {with_unit(target[0])}, D = {with_unit(target[1])}"
    start = f"from {reference[0]:.3g} at N = {with_unit(reference[1])}, D = {with_unit(reference[2])}"
    return [
        f"{where}: {absolute.rate:.4g}, one sigma {absolute.low:.4g} … {absolute.high:.4g}",
        f"by ratios {start}: {ratio.rate:.4g}, one sigma {ratio.low:.4g} … {ratio.high:.4g}",
        f"by the published exponents {start}: {published.rate:.4g}",
        f"a factor of 2 off costs about {parabola.penalty():.4f} nats per token",
    ]

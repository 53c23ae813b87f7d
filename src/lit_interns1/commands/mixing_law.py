"""`lit-interns1 mixing-law`: which mixture of sources to train on, from runs on several (arXiv 2403.16952).

    runs → (proportions r, validation losses L) → L_v(r) = c_v + exp(t_v · r) → argmin_r Σ_v w_v L_v(r)

Writes `mixing_law.json`, `mixing_law.md` and two pictures into a new directory; one of each for every group of runs
that are alike but for their mixture. The runs of a `mixing_law.json` can be read again.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lit_interns1.commands.arguments import check_new, errors_in_one_line, without_nan, write_new

if TYPE_CHECKING:
    from lit_interns1.commands.mixing_runs import MixtureRun, RunGroup
    from lit_interns1.laws import MixingLaw, OptimalMixture
    from lit_interns1.laws.transforms import Floats

RESULT, PAGE, PREDICTED, MIXTURE = "mixing_law.json", "mixing_law.md", "predicted.png", "mixture.png"


class Question(NamedTuple):
    """What is asked of a law.

    Attributes:
        weights: Weight of each validation set; None = all equal.
        floors: Lowest proportions.
        caps: Highest proportions.
        reference: A mixture to compare with.
    """

    weights: dict[str, float] | None = None
    floors: dict[str, float] | None = None
    caps: dict[str, float] | None = None
    reference: dict[str, float] | None = None


class FittedGroup(NamedTuple):
    """The law of a group, and what it says.

    Attributes:
        group: The runs.
        law: Their law.
        best: The best mixture.
        reference: Predicted losses of the reference, and how much less the weighted loss of the best mixture is, with
            its interval.
    """

    group: RunGroup
    law: MixingLaw
    best: OptimalMixture
    reference: dict[str, Any] | None


def run(arguments: Sequence[str]) -> None:
    """The command."""
    options = _parse(arguments)
    with errors_in_one_line("mixing-law"):
        out = Path(options.out)
        check_new("--out", str(out))
        question = Question(
            _named("--weights", options.weights),
            _named("--floors", options.floors),
            _caps(options),
            _named("--reference", options.reference),
        )
        fitted = fit_groups(options.runs, options.held_out, question, options.huber, options.bootstrap, options.seed)
        for number, one in enumerate(fitted, start=1):
            folder = out if len(fitted) == 1 else out / f"group-{number}"
            print(("" if number == 1 else "\n") + write_result(one, question, folder), end="")
            print(f"\nwritten to {folder}: {RESULT}, {PAGE}, {PREDICTED}, {MIXTURE}")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "lit-interns1 mixing-law",
        description="The law of validation losses over mixtures, and the best mixture.",
        epilog="example: lit-interns1 mixing-law runs/mix-* --weights english=2 code=1 --floors english=0.1 --out law",
    )
    share: dict[str, Any] = {"nargs": "+", "metavar": "NAME=SHARE", "default": []}
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="run directories, each at its own mixture; or .json and .csv files",
    )
    parser.add_argument("--out", default="mixing-law", help="new directory to write to (default: %(default)s)")
    parser.add_argument("--held_out", nargs="+", default=[], metavar="RUN", help="runs to predict, not to fit")
    parser.add_argument(
        "--weights", nargs="+", metavar="NAME=WEIGHT", default=[], help="of the validation sets (default: all equal)"
    )
    parser.add_argument("--floors", **share, help="lowest proportions of the best mixture")
    parser.add_argument("--caps", **share, help="highest proportions of the best mixture")
    parser.add_argument(
        "--available", nargs="+", metavar="NAME=TOKENS", default=[], help="tokens that there are, which also cap it"
    )
    parser.add_argument("--total_tokens", type=float, help="budget that --available is for")
    parser.add_argument("--epochs", type=float, default=1.0, help="how often a token may be seen (default: 1)")
    parser.add_argument("--reference", **share, help="a mixture to compare the best one with")
    parser.add_argument("--huber", type=float, help="δ of Huber's loss, nats per token (default: least squares)")
    parser.add_argument("--bootstrap", type=int, default=200, help="samples for the intervals (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples")
    return parser.parse_args(list(arguments))


def _named(option: str, entries: Sequence[str]) -> dict[str, float] | None:
    """`english=0.5 code=0.5` as a dictionary; None if nothing was given."""
    found: dict[str, float] = {}
    for entry in entries:
        name, _, text = entry.rpartition("=")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not name or not math.isfinite(value):
            raise ValueError(f"{option} {entry}: expected NAME=NUMBER")
        if name in found:
            raise ValueError(f"{option} names {name!r} twice")
        found[name] = value
    return found or None


def _caps(options: argparse.Namespace) -> dict[str, float] | None:
    """The lower of --caps and what --available allows."""
    from lit_interns1.laws import caps_of_tokens

    caps, available = _named("--caps", options.caps), _named("--available", options.available)
    if (available is None) != (options.total_tokens is None):
        raise ValueError("--available and --total_tokens go together: give both or neither")
    if available is None:
        return caps
    allowed = caps_of_tokens(available, options.total_tokens, options.epochs)
    return {name: min(allowed.get(name, 1.0), (caps or {}).get(name, 1.0)) for name in allowed | (caps or {})}


# -- fitting -----------------------------------------------------------------------------------------------------------


def fit_groups(
    runs: Sequence[str | Path],
    held_out: Sequence[str | Path],
    question: Question,
    huber: float | None = None,
    bootstrap: int = 200,
    seed: int = 0,
) -> list[FittedGroup]:
    """Reads runs, and fits a law to each group of them.

    Args:
        runs: Run directories or files; see `mixing_runs.read_runs`.
        held_out: The same, of runs that are predicted.
        question: What is asked of the laws.
        huber: As `fit_mixing_law` takes it.
        bootstrap: As `fit_mixing_law` takes it.
        seed: As `fit_mixing_law` takes it.

    Raises:
        ValueError: For unsuitable runs; the message names them.
    """
    from lit_interns1.commands.mixing_runs import group_runs, read_runs
    from lit_interns1.laws import fit_mixing_law

    found = []
    for group in group_runs(read_runs(runs), read_runs(held_out)):
        domains, targets = tuple(group.runs[0].proportions), tuple(group.runs[0].losses)
        try:
            law = fit_mixing_law(*arrays(group.runs, domains, targets), domains, targets, huber, bootstrap, seed)
        except ValueError as error:
            names = ", ".join(run.name for run in group.runs)
            raise ValueError(f"{error} (the group {names}; {group.label})" if group.label else str(error)) from error
        best = law.optimise(question.weights, question.floors, question.caps)
        found.append(FittedGroup(group, law, best, compared(law, best, question)))
    return found


def arrays(runs: Sequence[MixtureRun], domains: Sequence[str], targets: Sequence[str]) -> tuple[Floats, Floats]:
    """Proportions (M, K) and losses (M, V), in the order of the names; runs may have them in another."""
    import numpy as np

    proportions = [[run.proportions[name] for name in domains] for run in runs]
    return np.array(proportions), np.array([[run.losses[name] for name in targets] for run in runs])


def compared(law: MixingLaw, best: OptimalMixture, question: Question) -> dict[str, Any] | None:
    """The reference mixture beside the best one; None if there is no reference."""
    from lit_interns1.laws.fitter import percentile_interval
    from lit_interns1.reports.mixing_figures import weighted_loss

    if question.reference is None:
        return None
    if question.reference.keys() != set(law.domains):
        given = ", ".join(question.reference)
        raise ValueError(f"--reference must give a share to each of {', '.join(law.domains)}, and gives it to {given}")
    place_K = [question.reference[name] for name in law.domains]
    total_2, samples_R2 = weighted_loss(law, [place_K, list(best.proportions.values())], question.weights)
    return {
        "proportions": question.reference,
        "losses": dict(zip(law.targets, law.predict(place_K)[0].tolist(), strict=True)),
        "total": float(total_2[0]),
        "gain": float(total_2[0] - total_2[1]),
        "gain_interval": percentile_interval(samples_R2[:, 0] - samples_R2[:, 1]).tolist(),
    }


def repeat_std(runs: Sequence[MixtureRun]) -> dict[str, float] | None:
    """Standard deviation of the losses of runs on one mixture, over the mixtures that were repeated, if any."""
    import numpy as np

    targets = tuple(runs[0].losses)
    proportions_MK, losses_MV = arrays(runs, tuple(runs[0].proportions), targets)
    _, group_M = np.unique(proportions_MK.round(9), axis=0, return_inverse=True)
    sizes = np.bincount(group_M.reshape(-1))
    freedom = int((sizes - 1).sum())
    if not freedom:
        return None
    squares_V = sum(
        ((losses_MV[group_M.reshape(-1) == group] - losses_MV[group_M.reshape(-1) == group].mean(0)) ** 2).sum(0)
        for group in np.flatnonzero(sizes > 1)
    )
    return dict(zip(targets, np.sqrt(squares_V / freedom).tolist(), strict=True))


# -- writing -----------------------------------------------------------------------------------------------------------


def write_result(fitted: FittedGroup, question: Question, folder: Path) -> str:
    """Writes the files of a group into a new folder.

    Returns:
        What stands in `mixing_law.md`.
    """
    from lit_interns1.reports import save_figure
    from lit_interns1.reports.mixing_figures import mixture_figure, predicted_figure

    group, law, best, reference = fitted
    page = "\n".join(page_lines(fitted, question)) + "\n"
    fitted_MK, fitted_MV = arrays(group.runs, law.domains, law.targets)
    held_out = arrays(group.held_out, law.domains, law.targets) if group.held_out else None
    predicted = predicted_figure(law, fitted_MK, fitted_MV, held_out)
    reference_K = None if reference is None else [reference["proportions"][name] for name in law.domains]
    mixture = mixture_figure(law, best, fitted_MK, question.weights, reference_K)
    folder.mkdir(parents=True)
    save_figure(predicted, folder / PREDICTED)
    save_figure(mixture, folder / MIXTURE)
    write_new(folder / PAGE, page)
    write_new(folder / RESULT, json.dumps(without_nan(artefact(fitted, question)), indent=1, allow_nan=False) + "\n")
    return page


def artefact(fitted: FittedGroup, question: Question) -> dict[str, Any]:
    """What stands in `mixing_law.json`; `MixingLaw.from_json(json.dumps(…["law"]))` is the law."""
    rows = [
        [{"name": run.name, "tokens": run.tokens, "proportions": run.proportions, "losses": run.losses} for run in runs]
        for runs in (fitted.group.runs, fitted.group.held_out)
    ]
    return {
        "question": question._asdict(), "best": asdict(fitted.best), "reference": fitted.reference,
        "law": json.loads(fitted.law.to_json()), "runs": rows[0], "held_out": rows[1],
    }  # fmt: skip


# -- the page ----------------------------------------------------------------------------------------------------------


def page_lines(fitted: FittedGroup, question: Question) -> Iterator[str]:
    """The law, how well it predicts, and the best mixture, as Markdown."""
    from lit_interns1.training.units import with_unit

    group, law = fitted.group, fitted.law
    tokens = group.runs[0].tokens
    budget = "" if tokens is None else f", {with_unit(tokens)} tokens each"
    if group.label:
        yield f"## {group.label}\n"
    yield f"{len(group.runs)} runs{budget}: L = c + exp(Σ t · r)\n"
    yield from _law_table(law, group.runs)
    repeats = repeat_std([*group.runs, *group.held_out])
    if repeats:
        listed = ", ".join(f"{name} {value:.4f}" for name, value in repeats.items())
        yield f"\nruns on one mixture differ by (standard deviation): {listed}"
    if group.held_out:
        yield ""
        yield from _held_out_table(law, group.held_out, question.weights)
    yield ""
    yield from _best_tables(fitted, question)
    late = max(group.runs, key=lambda run: run.steps_after)
    if late.steps_after:
        yield f"\nwarning: the last validation of {late.name} was {late.steps_after} steps before its end"
    for warning in fitted.best.warnings:
        yield f"\nwarning: {warning}"


def _law_table(law: MixingLaw, runs: Sequence[MixtureRun]) -> Iterator[str]:
    """Coefficients and errors; `spread` is the standard deviation of the losses over the mixtures."""
    spread_V = arrays(runs, law.domains, law.targets)[1].std(axis=0)
    yield _row("validation", "c", *(f"t {domain}" for domain in law.domains), "R²", "largest error", "leave one out",
               "spread")  # fmt: skip
    yield "|" + "---|" * (len(law.domains) + 6)
    for v, target in enumerate(law.targets):
        slopes = (f"{slope:.3f}" for slope in law.slope_VK[v])
        errors = (law.max_error_V[v], law.leave_one_out_V[v], spread_V[v])
        yield _row(target, f"{law.floor_V[v]:.4f}", *slopes, f"{law.r_squared_V[v]:.4f}", *(f"{e:.4f}" for e in errors))


def _held_out_table(law: MixingLaw, held_out: Sequence[MixtureRun], weights: dict[str, float] | None) -> Iterator[str]:
    """Measured and predicted losses of runs that were not fitted, and the mean absolute errors."""
    import numpy as np

    from lit_interns1.reports.mixing_figures import weight_vector

    proportions_MK, losses_MV = arrays(held_out, law.domains, law.targets)
    weight_V = weight_vector(law, weights)
    pairs_M2W = np.stack([np.column_stack([x, x @ weight_V]) for x in (losses_MV, law.predict(proportions_MK))], axis=1)
    names = (*law.targets, "weighted mean")
    yield _row("held out", *law.domains, *(f"{name}: measured, predicted" for name in names))
    yield "|" + "---|" * (1 + len(law.domains) + len(names))
    for run, place_K, pair_2W in zip(held_out, proportions_MK, pairs_M2W, strict=True):
        cells = (f"{measured:.4f}, {predicted:.4f}" for measured, predicted in pair_2W.T)
        yield _row(run.name, *(f"{share:.3f}" for share in place_K), *cells)
    errors = np.abs(pairs_M2W[:, 0] - pairs_M2W[:, 1]).mean(axis=0)
    yield _row("mean absolute error", *("" for _ in law.domains), *(f"{error:.4f}" for error in errors))


def _best_tables(fitted: FittedGroup, question: Question) -> Iterator[str]:
    from lit_interns1.reports.mixing_figures import weight_vector

    law, best, reference = fitted.law, fitted.best, fitted.reference
    ends_2V = law.interval(list(best.proportions.values()))[:, 0]
    yield _row("domain", "best mixture", "95 % of the samples", *(["reference"] if reference else []))
    yield "|---|---|---|" + ("---|" if reference else "")
    for domain, share in best.proportions.items():
        mark = " (at its bound)" if domain in best.at_bound else ""
        other = [f"{reference['proportions'][domain]:.4f}"] if reference else []
        yield _row(domain, f"{share:.4f}{mark}", _interval(best.proportion_intervals[domain]), *other)
    yield ""
    yield _row("validation", "weight", "predicted", "95 %", *(["reference"] if reference else []))
    yield "|---|---|---|---|" + ("---|" if reference else "")
    weight_V = weight_vector(law, question.weights)
    for v, (target, loss) in enumerate(best.losses.items()):
        other = [f"{reference['losses'][target]:.4f}"] if reference else []
        yield _row(target, f"{weight_V[v]:.3f}", f"{loss:.4f}", _interval(ends_2V[:, v]), *other)
    other = [f"{reference['total']:.4f}"] if reference else []
    yield _row("weighted mean", "1", f"{best.total:.4f}", _interval(best.interval), *other)
    if reference:
        gain, interval = reference["gain"], _interval(reference["gain_interval"])
        yield f"\nthe best mixture is predicted to be {gain:.4f} nats per token {interval} below the reference"


def _interval(ends: Sequence[float] | Floats) -> str:
    low, high = ends
    return f"[{low:.4f}, {high:.4f}]" if math.isfinite(low) and math.isfinite(high) else ""


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"

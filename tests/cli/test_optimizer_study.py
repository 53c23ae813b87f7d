"""The optimizer study: what its script asks for is what the command line understands, and what its tables count."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lit_interns1.commands import trainer
from lit_interns1.modules import LanguageModelModule
from lit_interns1.optim import Mousse, Muon

STUDY = Path(__file__).parents[2] / "configs" / "studies" / "optimizers"
FAKE = """#!{python}
import json, pathlib, sys
arguments = sys.argv[1:]
run = pathlib.Path(arguments[arguments.index("--run_dir") + 1])
run.mkdir(parents=True)
(run / "arguments.json").write_text(json.dumps(arguments))
if arguments[0] == "lr-search":
    rate = 0.0001 * len(run.name) + (0.01 if "small" in run.name else 0.02)
    (run / "lr_search.json").write_text(json.dumps({{"best": [{{"rate": rate}}]}}))
"""


def found(size, arm):
    """What the stand-in for the search finds."""
    return 0.0001 * len(f"search-{size}-{arm}") + (0.01 if size == "small" else 0.02)


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """What the script asked for, by run directory."""
    folder = tmp_path_factory.mktemp("study")
    command = folder / "lit-interns1"
    command.write_text(FAKE.format(python=sys.executable))
    command.chmod(0o755)
    environment = {**os.environ, "LIT_INTERNS1": str(command), "PYTHON": sys.executable}
    script = ["sh", str(STUDY / "run.sh"), str(folder / "runs"), "small large", "2"]
    for _ in range(2):  # the second time everything is there: `mkdir` would fail
        subprocess.run(script, env=environment, check=True, timeout=50)
    return {file.parent.name: json.loads(file.read_text()) for file in folder.glob("runs/*/arguments.json")}


def option(arguments, name):
    return arguments[arguments.index(name) + 1]


def parsed(arguments, tmp_path):
    """The command line's own objects for a `fit` of the study; nothing is trained."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        patch.setattr(trainer.KitCLI, "_run_subcommand", lambda self, subcommand: None)
        arguments = [*arguments[: arguments.index("--run_dir") + 1], str(tmp_path / "run")]
        return trainer.run(arguments)


def test_every_run_has_its_own_search_and_takes_its_rate(calls):
    arms = ("adamw", "muon", "mousse", "mousse-one-sided")
    wanted = {f"search-{size}-{arm}" for size in ("small", "large") for arm in arms}
    wanted |= {f"{size}-{arm}-2" for size in ("small", "large") for arm in arms}
    assert calls.keys() == wanted
    for name, arguments in calls.items():
        assert sum("large.yaml" in argument for argument in arguments) == ("large" in name)
        size, _, arm = name.removeprefix("search-").removesuffix("-2").partition("-")
        if name.startswith("search-large"):  # around what was best for the small model
            around = found("small", arm)
            assert json.loads(option(arguments, "--rates")) == pytest.approx([around / 2, around, 2 * around], rel=1e-2)
            assert option(arguments, "--tokens") == option(arguments, "--clock.max_tokens")
        elif not name.startswith("search"):
            assert f"lr: {found(size, arm):.3g}," in option(arguments, "--model.optimizer")
            assert option(arguments, "--model.seed") == option(arguments, "--data.seed") == "2"


@pytest.mark.parametrize(
    ("arm", "kind", "options"),
    [
        ("muon", Muon, {"elementwise_clip": 1.0}),
        ("mousse", Mousse, {"side": "both", "elementwise_clip": 1.0}),
        ("mousse-one-sided", Mousse, {"side": "smaller", "elementwise_clip": 1.0}),
    ],
)
def test_the_command_line_builds_the_optimizers(calls, tmp_path, arm, kind, options):
    cli = parsed(calls[f"small-{arm}-2"], tmp_path)
    assert isinstance(cli.model, LanguageModelModule)
    assert cli.trainer.gradient_clip_val is None  # the optimizer clips what AdamW updates
    cli.model.configure_model()
    optimizer = cli.model.configure_optimizers()
    assert type(optimizer) is kind
    assert {name: getattr(optimizer, name) for name in options} == options
    assert {group["lr"] for group in optimizer.param_groups} == {round(found("small", arm), 4)}
    matrices = {id(p) for group in optimizer.param_groups if group["kind"] == "matrix" for p in group["params"]}
    assert id(cli.model.model.embed_tokens.weight) not in matrices


def test_the_models_differ_by_about_four_in_parameters(calls, tmp_path):
    sizes = []
    for size in ("small", "large"):
        cli = parsed(calls[f"{size}-adamw-2"], tmp_path / size)
        assert cli.trainer.gradient_clip_val == 1.0
        cli.model.configure_model()
        sizes.append(sum(parameter.numel() for parameter in cli.model.parameters()))
        assert sizes[-1] == {"small": 438_960, "large": 1_678_304}[size]
    assert 3.5 < sizes[1] / sizes[0] < 4.5


def test_a_loss_is_passed_where_the_curve_stays_below():
    specification = importlib.util.spec_from_file_location("optimizer_figure", STUDY / "figure.py")
    figure = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(figure)
    steps, loss = np.array([10, 20, 30, 40]), np.array([3.0, 1.8, 2.2, 1.0])
    assert figure.passed(steps, loss, 2.0) == pytest.approx(30 + 10 / 6)  # not at the dip
    assert figure.passed(steps, loss, 2.2) == pytest.approx(10 + 10 * 0.8 / 1.2)
    assert math.isnan(figure.passed(steps, loss, 0.5))
    np.testing.assert_allclose(figure.smoothed(loss), [2.4, 7 / 3, 5 / 3, 1.6])

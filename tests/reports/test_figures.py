"""The pictures hold the lines, labels and limits that they should; how they look is not tested."""

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest

from lit_interns1.reports import (
    RunDirectory,
    RunDirectoryError,
    draw_pictures,
    expert_load_figure,
    learning_rate_figure,
    loss_figure,
    save_figure,
    throughput_figure,
)
from lit_interns1.reports.figures import max_violation, moving_average

TOKENS = np.linspace(1e5, 2e7, 200)
LOSS = 2.5 + 6 * np.exp(-np.arange(200) / 10) + 0.05 * np.sin(np.arange(200))


def lines(axes):
    return {line.get_label(): line for line in axes.get_lines()}


def texts(axes):
    return [text.get_text() for text in axes.texts]


def tick_labels(axes, figure):
    figure.canvas.draw()
    return [label.get_text() for label in axes.get_xticklabels()]


def test_loss_figure():
    figure = loss_figure(TOKENS, LOSS, TOKENS[19::20], LOSS[19::20] + 0.1, {"bigram": 3.6, "3-gram": 3.1})
    (axes,) = figure.axes
    drawn = lines(axes)
    assert set(drawn) == {"_train, each point", "train", "validation", "_bigram", "_3-gram"}
    np.testing.assert_array_equal(drawn["_train, each point"].get_ydata(), LOSS)
    assert len(drawn["validation"].get_xdata()) == 10
    assert set(drawn["_bigram"].get_ydata()) == {3.6}
    assert texts(axes) == ["3-gram  3.10", "bigram  3.60"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["train", "validation"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Consumed tokens", "Loss (nats per token)")
    assert {"0", "10M", "20M"} <= set(tick_labels(axes, figure))
    left, right = axes.get_xlim()
    assert left == 0
    assert 2e7 <= right < 2.1e7
    bottom, top = axes.get_ylim()
    assert bottom < LOSS.min()
    assert 3.6 < LOSS[8] <= top < LOSS[0]  # the steep beginning is left out


def test_labels_of_close_references_do_not_overlap():
    figure = loss_figure(TOKENS, LOSS, references={"bigram": 3.10, "3-gram": 3.09, "unigram": 3.4})
    (axes,) = figure.axes
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert texts(axes) == ["3-gram  3.09", "bigram  3.10", "unigram  3.40"]
    assert all(lower.y1 <= upper.y0 + 1 for lower, upper in itertools.pairwise(boxes))


def test_loss_figure_leaves_out_what_is_not_finite():
    loss = LOSS.copy()
    loss[50] = np.nan
    (axes,) = loss_figure(TOKENS, loss).axes
    assert len(lines(axes)["train"].get_xdata()) == 199
    assert np.isfinite(axes.get_ylim()).all()
    (axes,) = loss_figure((), (), [1e6], [3.0]).axes  # validation only
    assert "validation" in lines(axes)


def test_learning_rate_figure():
    figure = learning_rate_figure(TOKENS, np.linspace(3e-4, 0, 200))
    (axes,) = figure.axes
    assert len(lines(axes)) == 1
    assert axes.get_ylim() == (0, pytest.approx(3.18e-4))
    assert "10M" in tick_labels(axes, figure)


def test_throughput_figure():
    (axes,) = throughput_figure(TOKENS, np.full(200, 21_500.0)).axes
    assert set(lines(axes)) == {"_each point", "throughput", "_median"}
    assert texts(axes) == ["median\n21.5k"]
    assert axes.get_ylim()[0] == 0


@pytest.mark.parametrize(("layers", "experts", "number"), [(1, 4, 1), (3, 8, 5), (6, 16, 600)])
def test_expert_load_figure(layers, experts, number):
    load = np.random.default_rng(1).dirichlet(np.ones(experts), size=(number, layers))
    figure = expert_load_figure(TOKENS[0] * np.arange(1, number + 1), load)
    maps, (violation,) = figure.axes[:layers], figure.axes[layers + 1 :]  # the colour bar lies between
    assert [axes.get_title(loc="left") for axes in maps] == [f"Layer {layer}" for layer in range(layers)]
    for axes in maps:
        (mesh,) = axes.collections
        assert (mesh.norm.vmin, mesh.norm.vmax) == (0, 2)  # white = 1 = uniform
        assert mesh.get_array().shape == (experts, min(number, 240))
        assert np.asarray(mesh.get_array()).mean() == pytest.approx(1)
    assert len(violation.get_lines()) == (layers + 1 if layers > 1 else 1)
    mean = violation.get_lines()[-1].get_ydata()
    assert mean[0] == pytest.approx((experts * load[0].max(-1) - 1).mean())
    assert violation.get_ylabel() == "MaxVio"
    figure.canvas.draw()


def test_max_violation():
    np.testing.assert_allclose(max_violation([[0.25] * 4, [1, 0, 0, 0], [0.5, 0.5, 0, 0]]), [0, 3, 1])
    np.testing.assert_allclose(max_violation([30, 10, 20]), 0.5)


def test_moving_average():
    np.testing.assert_allclose(moving_average(np.ones(50)), 1)
    ramp = np.arange(100.0)
    smooth = moving_average(ramp)
    np.testing.assert_allclose(smooth[:98], ramp[:98])  # neither lags nor bends where it has both sides
    assert moving_average([]).size == 0
    noise = np.random.default_rng(2).normal(size=1000)
    assert moving_average(noise).std() < 0.35


def test_errors_name_the_shapes():
    with pytest.raises(ValueError, match=r"train: \(3,\) tokens and \(2,\) values"):
        loss_figure([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="neither a training nor a validation"):
        loss_figure([], [])
    with pytest.raises(ValueError, match="no finite point"):
        learning_rate_figure([1.0], [np.nan])
    with pytest.raises(ValueError, match="no finite point"):
        throughput_figure([], [])
    with pytest.raises(ValueError, match=r"\(2,\) and \(3, 1, 4\)"):
        expert_load_figure([1, 2], np.full((3, 1, 4), 0.25))


def test_save_figure_is_all_or_nothing(tmp_path, monkeypatch):
    figure = learning_rate_figure([1e6], [1e-3])
    target = save_figure(figure, tmp_path / "pictures/one.png")
    assert target.read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in target.parent.iterdir()] == ["one.png"]
    before = target.read_bytes()

    def half_written(path, **_):
        path.write_bytes(b"\x89PNG half")
        raise OSError("disk full")

    monkeypatch.setattr(figure, "savefig", half_written)
    with pytest.raises(OSError, match="disk full"):
        save_figure(figure, target)
    assert target.read_bytes() == before
    assert [file.name for file in target.parent.iterdir()] == ["one.png"]


def test_draw_pictures(tmp_path):
    (tmp_path / "metrics").mkdir()
    rows = ["step,train/loss,val/loss,optim/lr,train/tokens,throughput/tokens_per_second"]
    rows += [f"{i},{LOSS[i]},{LOSS[i] if i % 9 == 8 else ''},{1e-4},{1000 * (i + 1)},{2e4 + i}" for i in range(30)]
    csv = tmp_path / "metrics/metrics.csv"
    csv.write_text("\n".join(rows) + "\n")
    drawn = draw_pictures(RunDirectory(tmp_path), {"bigram": 3.0})
    assert set(drawn) == {"loss", "learning_rate", "throughput"}
    np.savez(tmp_path / "metrics/expert_load.npz", tokens=np.arange(1, 4), load=np.full((3, 2, 4), 0.25))
    drawn = draw_pictures(RunDirectory(tmp_path))
    assert set(drawn) == {"loss", "learning_rate", "throughput", "expert_load"}
    assert sorted(file.name for file in (tmp_path / "pictures").iterdir()) == sorted(f"{name}.png" for name in drawn)

    csv.write_text("step,train/loss\n0,3.0\n")
    with pytest.raises(RunDirectoryError, match="train/tokens"):
        draw_pictures(RunDirectory(tmp_path))


def test_nothing_to_draw(tmp_path):
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics/metrics.csv").write_text("step,epoch\n0,0\n")
    with pytest.raises(RunDirectoryError, match="nothing to draw; it logged epoch"):
        draw_pictures(RunDirectory(tmp_path))


def test_needs_no_home_and_leaves_global_state_alone(tmp_path):
    """A fresh interpreter: nothing is written to HOME, no pyplot, no torch; caches lie in the working directory."""
    program = (
        "import os, sys\n"
        "from lit_interns1.reports import learning_rate_figure, save_figure\n"
        "assert 'matplotlib' not in sys.modules\n"
        "save_figure(learning_rate_figure([1e6, 2e6], [1e-3, 1e-4]), 'out.png')\n"
        "import matplotlib\n"
        "assert 'matplotlib.pyplot' not in sys.modules and 'torch' not in sys.modules\n"
        "assert 'MPLCONFIGDIR' not in os.environ\n"
        "assert dict(matplotlib.rcParams)['font.size'] == matplotlib.rcParamsDefault['font.size']\n"
        "print(matplotlib.get_cachedir())\n"
    )
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir(), work.mkdir()
    environment = {k: v for k, v in os.environ.items() if k not in ("MPLCONFIGDIR", "XDG_CACHE_HOME")}
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=work,
        env={**environment, "HOME": str(home)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(work / ".cache" / "matplotlib")
    assert (work / "out.png").exists()
    assert list(home.iterdir()) == []

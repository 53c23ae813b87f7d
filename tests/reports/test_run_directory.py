"""Reading a run directory: what Lightning's CSV logger wrote comes back, and faults are named."""

import numpy as np
import pytest

from lit_interns1.reports import RunDirectory, RunDirectoryError


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_sparse_columns_and_tokens(tmp_path):
    """Validation rows lie beside training rows; between the steps that logged tokens, tokens are interpolated."""
    write(
        tmp_path / "metrics/metrics.csv",
        "epoch,step,train/loss,train/tokens,val/loss\n"
        "0,9,4.5,1000,\n"
        "0,19,4.0,2000,\n"
        "0,24,,,4.2\n"
        "0,29,nan,3000,\n"
        "0,29,,,4.1\n",
    )
    metrics = RunDirectory(tmp_path).metrics()
    assert set(metrics) == {"epoch", "train/loss", "train/tokens", "val/loss"}
    steps, tokens, values = metrics["train/loss"]
    assert steps.tolist() == [9, 19, 29]
    assert steps.dtype == np.int64
    assert tokens.tolist() == [1000, 2000, 3000]
    np.testing.assert_array_equal(values, [4.5, 4.0, np.nan])
    assert [part.tolist() for part in metrics["val/loss"]] == [[24, 29], [2500, 3000], [4.2, 4.1]]
    assert RunDirectory(tmp_path).metric("val/loss").values.tolist() == [4.2, 4.1]


def test_resumed_attempts_replace_what_they_repeat(tmp_path):
    """Attempts in the order of their numbers (2 before 10), whatever the layout and the order of columns."""
    write(tmp_path / "metrics/metrics.csv", "step,train/loss\n1,5.0\n2,4.0\n3,3.0\n3,2.9\n")
    write(tmp_path / "metrics/resumed-2/metrics.csv", "train/loss,step,val/loss\n2.0,3,\n1.9,4,\n1.8,5,7.0\n")
    write(tmp_path / "metrics/resumed-10/metrics.csv", "step,train/loss\n5,1.0\n")
    write(tmp_path / "metrics/resumed-11/metrics.csv", "")
    run = RunDirectory(tmp_path)
    assert [file.parent.name for file in run.metrics_files] == ["metrics", "resumed-2", "resumed-10", "resumed-11"]
    steps, tokens, values = run.metrics()["train/loss"]
    assert steps.tolist() == [1, 2, 3, 4, 5]
    assert tokens is None
    assert values.tolist() == [5.0, 4.0, 2.0, 1.9, 1.0]


def test_files_beside_each_other_are_sorted_by_number(tmp_path):
    for name in ("metrics_10", "metrics", "metrics_2"):
        write(tmp_path / f"metrics/{name}.csv", "step,train/loss\n1,5.0\n")
    assert [file.stem for file in RunDirectory(tmp_path).metrics_files] == ["metrics", "metrics_2", "metrics_10"]


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path):
    write(tmp_path / "metrics/metrics.csv", "step,train/loss\n1,5.0\n2,4.\n3,3.1")
    assert RunDirectory(tmp_path).metrics()["train/loss"].values.tolist() == [5.0, 4.0]


def test_reads_what_lightning_writes(tmp_path):
    loggers = pytest.importorskip("lightning.pytorch.loggers")
    logger = loggers.CSVLogger(str(tmp_path), name="metrics", version="")
    logger.log_metrics({"train/loss": 3.5, "train/tokens": 100.0}, step=0)
    logger.log_metrics({"train/loss": 3.25, "train/tokens": 200.0}, step=1)
    logger.save()
    logger.log_metrics({"val/loss": 3.0}, step=1)  # a new column: the logger rewrites the file
    logger.save()
    metrics = RunDirectory(tmp_path).metrics()
    assert metrics["train/loss"].values.tolist() == [3.5, 3.25]
    assert metrics["val/loss"].tokens.tolist() == [200.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no metric has a value"),
        ("step,train/loss\n", "no metric has a value"),
        ("epoch,train/loss\n0,1.0\n", "no column 'step'"),
        ("step,a,a\n0,1.0,2.0\n", "names a column twice"),
        ("step,a\n0,1.0\n1\n2,1.0\n", "line 3: 1 cells under 2 columns"),
        ("step,a\n0,1.0\nx,1.0\n", "line 3: step 'x' is no whole number"),
        ("step,a\n0,1.0\n1,low\n", "line 3: a 'low' is no number"),
    ],
)
def test_malformed_metrics(tmp_path, text, message):
    write(tmp_path / "metrics/metrics.csv", text)
    with pytest.raises(RunDirectoryError, match=message) as caught:
        RunDirectory(tmp_path).metrics()
    assert "metrics.csv" in str(caught.value)


def test_missing_things_are_named(tmp_path):
    with pytest.raises(RunDirectoryError, match="no run directory"):
        RunDirectory(tmp_path / "nowhere")
    run = RunDirectory(tmp_path)
    with pytest.raises(RunDirectoryError, match=r"no metrics\.csv"):
        run.metrics()
    with pytest.raises(RunDirectoryError, match=r"expert_load\.npz"):
        run.expert_load()
    with pytest.raises(RunDirectoryError, match=r"config\.yaml"):
        run.config()
    write(tmp_path / "metrics/metrics.csv", "step,train/loss\n1,5.0\n")
    with pytest.raises(RunDirectoryError, match="logged no 'val/loss'; it logged train/loss"):
        run.metric("val/loss")


def test_config(tmp_path):
    write(tmp_path / "config.yaml", "seed: 3\nmodel:\n  width: ${seed}\n")
    assert RunDirectory(tmp_path).config() == {"seed": 3, "model": {"width": "${seed}"}}
    write(tmp_path / "config.yaml", "- 1\n")
    with pytest.raises(RunDirectoryError, match="no mapping"):
        RunDirectory(tmp_path).config()
    write(tmp_path / "config.yaml", "a: [\n")
    with pytest.raises(RunDirectoryError, match="cannot be read"):
        RunDirectory(tmp_path).config()


def test_expert_load(tmp_path):
    (tmp_path / "metrics").mkdir()
    load = np.random.default_rng(0).dirichlet(np.ones(4), size=(5, 2)).astype(np.float32)
    np.savez(tmp_path / "metrics/expert_load.npz", tokens=np.arange(5), load=load)
    found = RunDirectory(tmp_path).expert_load()
    assert found.tokens.tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(found.load, load.astype(np.float64))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"tokens": np.arange(2)}, "no array 'load'"),
        ({"tokens": np.arange(3), "load": np.full((2, 1, 4), 0.25)}, "are not"),
        ({"tokens": np.arange(2), "load": np.full((2, 4), 0.25)}, "are not"),
        ({"tokens": np.arange(0), "load": np.zeros((0, 1, 4))}, "is empty"),
        ({"tokens": np.array([2, 1]), "load": np.full((2, 1, 4), 0.25)}, "tokens decrease"),
        ({"tokens": np.arange(2), "load": np.full((2, 1, 4), 0.5)}, "sum to 1"),
        ({"tokens": np.arange(2), "load": np.full((2, 1, 4), np.nan)}, "sum to 1"),
    ],
)
def test_malformed_expert_load(tmp_path, arrays, message):
    (tmp_path / "metrics").mkdir()
    np.savez(tmp_path / "metrics/expert_load.npz", **arrays)
    with pytest.raises(RunDirectoryError, match=message):
        RunDirectory(tmp_path).expert_load()


def test_an_expert_load_file_that_is_none(tmp_path):
    write(tmp_path / "metrics/expert_load.npz", "PK\x03\x04 cut off")
    with pytest.raises(RunDirectoryError, match="cannot be read"):
        RunDirectory(tmp_path).expert_load()

"""The page of a run: what the logs hold is on it, nothing is loaded from anywhere, foreign files are safe."""

import base64
import json
import math
import re
import struct
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest

from lit_interns1.cli import main
from lit_interns1.reports import RunDirectoryError, write_report
from lit_interns1.reports.svg_charts import Line, heat_map, line_chart, short_number

VOID = {"meta", "link", "img", "br", "input", "base", "source"}


class Page(HTMLParser):
    """Elements with attributes, texts by element, and whether everything is closed."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag, **wanted):
        return [a for t, a in self.elements if t == tag and all(a.get(k) == v for k, v in wanted.items())]

    def text(self, tag):
        return [data for t, data in self.texts if t == tag]


def write_run(path, columns, steps=None):
    length = max(len(values) for values in columns.values())
    rows = [",".join(["step", *columns])]
    for row in range(length):
        cells = (values[row] if row < len(values) else "" for values in columns.values())
        rows.append(",".join(map(str, [row if steps is None else steps[row], *cells])))
    (path / "metrics").mkdir(parents=True, exist_ok=True)
    (path / "metrics" / "metrics.csv").write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture
def run_dir(tmp_path):
    """A run with everything."""
    rng, tokens = np.random.default_rng(0), np.arange(1, 101) * 1000
    path = write_run(
        tmp_path / "first <run>",
        {
            "train/tokens": tokens,
            "train/loss": 4 + 3 * np.exp(-tokens / 3e4) + 0.1 * rng.normal(size=100),
            "val/loss": ["" if i % 10 != 9 else f"{4.5 - i / 1000}" for i in range(100)],
            "val/loss/code": ["" if i % 10 != 9 else "3.5" for i in range(100)],
            "optim/lr": np.linspace(1e-3, 1e-4, 100),
            "optim/grad_norm": [*([1.0] * 50), math.nan, *([1.0] * 49)],
            "router/layer_0/load_std": rng.random(100),
            "router/layer_1/load_std": rng.random(100),
            "salience/chemistry/predicted_score": ["" if i % 10 != 9 else f"{i / 100}" for i in range(100)],
            "stability/skipped_steps": [0.0] * 40 + [1.0] * 60,
            "batch/switch": ["" if i != 30 else "16" for i in range(100)],
            "throughput/tokens_per_second": np.full(100, 2000.0),
            "my_callback/number": rng.random(100),
            "lr_search/rate": ["1e-4", "1e-3", "1e-2"],
            "lr_search/loss": ["5.0", "4.0", "4.5"],
            "lr_search/best_rate": ["", "", "", "0.002"],
        },
    )
    load = rng.dirichlet(np.ones(8), size=(20, 2))
    np.savez(path / "metrics" / "expert_load.npz", tokens=tokens[4::5], load=load)
    (path / "config.yaml").write_text("seed_everything: 1\nnote: '<script src=\"https://example.org/x.js\">'\n")
    (path / "config-resumed-1.yaml").write_text("seed_everything: 2\n")
    resumed = path / "metrics" / "resumed-1"
    resumed.mkdir()
    (resumed / "metrics.csv").write_text("step,train/tokens,train/loss\n100,101000,3.9\n")
    summary = {
        "losses": {"model": 4.4, "bigram": 4.2},
        "text": "ROMEO.\n<b>But soft</b>",
        "molecules": [
            {"smiles": "C1CC1", "valid": True, "reason": None},
            {"smiles": "C(", "valid": False, "reason": "open"},
        ],
    }
    (path / "summary.json").write_text(json.dumps(summary))
    files = path / "wandb" / "offline-run-1" / "files"
    files.mkdir(parents=True)
    (files / "requirements.txt").write_text("torch==2.13.0\nsomething==1\n")
    (files / "wandb-metadata.json").write_text(json.dumps({"python": "3.11", "host": "secret-host", "gpu": "H200"}))
    return path


def test_everything_that_was_logged_is_on_the_page(run_dir):
    text = write_report(run_dir).read_text()
    page = Page(text)
    assert page.text("h1") == ["first <run>"]
    assert page.text("h2") == [
        "Loss", "Capability salience", "Optimizer", "Learning-rate search", "Router", "Stability", "Throughput",
        "my_callback", "Events", "Samples", "Configuration", "Environment",
    ]  # fmt: skip
    titles = page.text("h3")
    assert len(titles) == len(set(titles))
    assert {
        "Loss", "Validation loss by source", "Learning rate", "Gradient norm", "Load std by layer", "Number",
        "Predicted score", "Skipped steps", "Loss of the trials", "Expert load, layer 1",
    } <= set(titles)  # fmt: skip
    curves = {curve["data-name"] for curve in page.all("path")}
    assert {"train, each point", "train, smoothed", "validation", "layer_0", "layer_1"} <= curves
    figures = dict(zip(page.text("span"), page.text("b")))
    assert figures["consumed tokens"] == "101,000"
    assert figures["optimizer steps"] == "101"
    assert figures["best validation loss"] == "4.4010"
    assert figures["skipped steps"] == "1"
    assert figures["valid molecules"] == "1 of 2"
    cells = page.text("td")
    assert "continuation 1 begins at step 100" in cells
    assert "16 rows per optimizer step from here" in cells
    assert "optim/grad_norm is not finite at 1 of 100 points, first at step 50" in cells
    assert {"torch", "2.13.0", "python", "gpu", "H200"} <= set(cells)
    assert "secret-host" not in text
    assert "<script src" not in text  # of the config, escaped
    assert any("+seed_everything: 2" in block for block in page.text("pre"))
    assert any("<b>But soft</b>" in block for block in page.text("pre"))
    assert any("bigram" in label for label in page.text("text"))
    marks = {title.split(" at ")[0] for title in page.text("title")}
    assert {"resumed", "batch size"} <= marks


def test_nothing_is_loaded_from_anywhere(run_dir, tmp_path):
    other = write_run(tmp_path / "other", {"train/tokens": [10, 20], "train/loss": [5, 4]})
    text = write_report(run_dir, tmp_path / "page.html", [other]).read_text()
    page = Page(text)
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "img", "source"), tag
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:image/png;base64,")), f"{tag} {name}={value}"
        assert not any(name.startswith("on") for name in attributes)
    code = "".join(page.text("style") + page.text("script"))
    assert not re.search(r"https?:|//\w|@import|url\(|\bfetch\b|XMLHttpRequest|\bimport\b|WebSocket", code)
    assert len(text) < 3_000_000


def test_a_run_with_one_key_has_a_page(tmp_path):
    run = write_run(tmp_path / "run", {"train/loss": [5.0, 4.5, 4.0]})
    page = Page(write_report(run).read_text())
    assert page.text("h2") == ["Loss"]
    assert "steps" in page.text("text")  # there is no token axis
    assert len(page.all("path")) == 1


def test_a_metric_with_one_point_is_a_number(tmp_path):
    run = write_run(tmp_path / "run", {"train/tokens": [10, 20], "train/loss": [5, 4], "optim/lr": ["0.25"]})
    page = Page(write_report(run).read_text())
    assert page.text("h3") == ["Loss", "Logged once"]
    assert page.text("td") == ["optim/lr", "0.25"]


def test_compared_runs_have_a_colour_each(run_dir, tmp_path):
    other = write_run(
        tmp_path / "other", {"train/tokens": [10_000, 20_000], "train/loss": [5, 4], "optim/lr": [0.1, 0.2]}
    )
    page = Page(write_report(run_dir, tmp_path / "page.html", [other]).read_text())
    colour = {curve["data-name"]: curve["class"].split()[1] for curve in page.all("path")}
    assert colour["first <run>"] == colour["first <run> validation"] == "c0"
    assert colour["other"] == colour["other train"] == "c1"
    assert page.text("th")[:2] == ["first <run>", "other"]
    with pytest.raises(RunDirectoryError, match="named twice"):
        write_report(run_dir, tmp_path / "page.html", [other, other])


def test_large_models_have_a_small_page(tmp_path):
    rng = np.random.default_rng(0)
    columns = {f"router/layer_{layer}/load_std": rng.random(1000) for layer in range(94)}
    run = write_run(tmp_path / "run", {"train/tokens": np.arange(1, 1001), **columns})
    load = rng.dirichlet(np.ones(512), size=(100, 94)).astype(np.float32)
    np.savez(run / "metrics" / "expert_load.npz", tokens=np.arange(1, 101), load=load)
    page = write_report(run)
    assert page.stat().st_size < 3_000_000
    shown = [title for title in Page(page.read_text()).text("h3") if title.startswith("Expert load")]
    assert len(shown) == 24
    assert (shown[0], shown[-1]) == ("Expert load, layer 0", "Expert load, layer 93")


def test_own_pages_are_renewed_and_foreign_files_are_kept(run_dir, tmp_path, capsys):
    main(["report", str(run_dir)])
    first = (run_dir / "report.html").read_text()
    main(["report", str(run_dir)])
    assert (run_dir / "report.html").read_text() == first
    foreign = tmp_path / "index.html"
    foreign.write_text("<html>mine</html>")
    capsys.readouterr()
    for output, words in ((foreign, "is no report of lit-interns1"), (tmp_path, "is no file")):
        with pytest.raises(SystemExit) as end:
            main(["report", str(run_dir), "--output", str(output)])
        assert end.value.code == 2
        error = capsys.readouterr().err
        assert words in error
        assert str(output) in error
        assert error.count("\n") == 1
    assert foreign.read_text() == "<html>mine</html>"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("summary.json", "{", "summary.json is no JSON"),
        ("summary.json", "[]", "summary.json holds no mapping"),
        ("metrics/expert_load.npz", "x", "expert_load.npz cannot be read"),
        ("metrics/metrics.csv", "a\n1\n", "metrics.csv has no column 'step'"),
    ],
)
def test_malformed_files_are_named_and_leave_the_old_page(run_dir, file, content, message):
    before = write_report(run_dir).read_text()
    (run_dir / file).write_text(content)
    with pytest.raises(RunDirectoryError, match=message):
        write_report(run_dir)
    assert (run_dir / "report.html").read_text() == before
    assert not list(run_dir.glob("*.partial"))


def test_no_run(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path / "nothing")])
    assert "there is no run directory" in capsys.readouterr().err


# --- charts --------------------------------------------------------------------------------------------------------


def values_of(svg, name):
    """(x, y) of a curve, read back as the page's script does."""
    page = Page(svg)
    (frame,) = (svg for svg in page.all("svg") if "data-frame" in svg)
    left, right, bottom, top = map(float, frame["data-frame"].split())
    x0, x1, y0, y1 = map(float, frame["data-range"].split())
    (path,) = page.all("path", **{"data-name": name})
    points = np.array([list(map(float, pair.split(","))) for pair in path["d"][1:].split("L")])
    return x0 + (points[:, 0] - left) / (right - left) * (x1 - x0), y0 + (bottom - points[:, 1]) / (bottom - top) * (
        y1 - y0
    )


def test_values_are_read_back_from_the_picture():
    x, y = np.arange(1, 50) * 1000.0, 3 + np.sin(np.arange(1, 50))
    x_read, y_read = values_of(line_chart([Line("a", x, y)], "chart", "tokens"), "a")
    np.testing.assert_allclose(x_read, x, atol=5e-3 * 1e4)
    np.testing.assert_allclose(y_read, y, atol=1e-3)


def test_thinning_keeps_spikes_and_the_last_point():
    y = np.ones(10_000)
    y[5003], y[7777], y[-1] = 50.0, -3.0, 2.0
    x_read, y_read = values_of(line_chart([Line("a", np.arange(10_000), y)], "chart", "tokens"), "a")
    assert len(x_read) < 400
    assert y_read.max() == pytest.approx(50, abs=0.01)
    assert y_read.min() == pytest.approx(-3, abs=0.01)
    assert (x_read[-1], y_read[-1]) == pytest.approx((9999, 2), abs=2)


def test_what_is_not_finite_is_left_out():
    assert line_chart([Line("a", [1, 2], [math.nan, math.inf])], "chart", "tokens") == ""
    x_read, _ = values_of(line_chart([Line("a", [1, 2, 3], [1, math.nan, 2])], "chart", "tokens"), "a")
    assert len(x_read) == 2


def decode_png(data):
    """(H, W, 4) pixels of an RGBA PNG without filters; checks every check sum."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, {}
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        name, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(name + body)
        chunks[name], at = body, at + 12 + length
    width, height, depth, kind = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    assert (depth, kind) == (8, 6)
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, 1 + 4 * width)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(height, width, 4)


def heat_pixels(tokens, load):
    (image,) = Page(heat_map(tokens, np.array(load), "load", 200)).all("image")
    return decode_png(base64.b64decode(image["href"].partition(",")[2]))


def test_heat_map_pixels():
    """Expert 0 at the bottom; time in equal columns, a point stands for the tokens before it."""
    uniform, uneven = [0.25, 0.25, 0.25, 0.25], [0.5, 0.0, 0.25, 0.25]
    pixels = heat_pixels([100, 200], [uniform, uneven])
    assert pixels.shape == (4, 2, 4)
    assert pixels[:, 0, 3].tolist() == [0, 0, 0, 0]
    assert pixels[:, 1, 3].tolist() == [0, 0, 255, 255]
    red, blue = pixels[3, 1], pixels[2, 1]
    assert red[0] > red[2]
    assert blue[2] > blue[0]
    # columns end at 200 and 400 tokens: the first lies inside the stretch of the first point, the second holds both
    assert heat_pixels([300, 400], [uniform, uneven])[3, :, 3].tolist() == [0, 130]


def test_short_numbers():
    given = [0, 1, 0.05, 3e-5, 1234, 250_000, 1.5e6, 2e9, 6e12, -1500]
    expected = ["0", "1", "0.05", "3e-5", "1.234k", "250k", "1.5M", "2B", "6T", "-1.5k"]
    assert [short_number(value) for value in given] == expected

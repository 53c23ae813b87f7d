"""One HTML page about a run, from its local logs alone: everything is inline, nothing is loaded from anywhere.

Charts are SVG in the text of the page; style and script are the files in `assets/`, copied into it. With other runs to
compare with, each chart has one colour a run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

import numpy as np

from lit_interns1.reports.figures import max_violation, moving_average
from lit_interns1.reports.layout import Curves, arrange
from lit_interns1.reports.run_directory import RunDirectoryError
from lit_interns1.reports.run_record import RunRecord
from lit_interns1.reports.svg_charts import COLOURS, Line, heat_map, line_chart, short_number

GENERATOR = '<meta name="generator" content="lit-interns1 report">'
"""Stands near the top of every page: a file with it may be written again."""
_MOST_CURVES, _MOST_CARDS, _MOST_LAYERS = 12, 6, 24
_HEAT_CELLS = 400_000
_SMOOTHED = {"train/loss", "throughput/tokens_per_second", "throughput/step_seconds", "optim/grad_norm"}


def write_report(
    run_dir: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    compare: Sequence[str | os.PathLike[str]] = (),
) -> Path:
    """Writes the page about a run: all of it or, if anything fails, nothing.

    Args:
        run_dir: The run directory.
        output: The file; default `report.html` in the run directory.
        compare: Other run directories, whose curves are drawn beside.

    Returns:
        The path of the file.

    Raises:
        RunDirectoryError: If a run has no metrics, a file of one is malformed, or a run is named twice.
        FileExistsError: If the file exists and is not a page of this kind.
    """
    target = Path(output) if output is not None else Path(run_dir) / "report.html"
    _refuse_foreign(target)
    paths = [Path(run_dir).resolve(), *(Path(path).resolve() for path in compare)]
    if len(set(paths)) < len(paths):
        raise RunDirectoryError(f"compare: a run is named twice among {', '.join(map(str, [run_dir, *compare]))}")
    text = page([RunRecord(run_dir), *(RunRecord(path) for path in compare)])
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def page(runs: Sequence[RunRecord]) -> str:
    """The page as text.

    Args:
        runs: The run that it is about, then those that it is compared with.
    """
    run = runs[0]
    sections = [*_chart_sections(runs), *_closing_sections(run)]
    return document(" · ".join(run.name for run in runs), run.name, _headline(runs), sections)


def document(title: str, heading: str, headline: str, sections: Sequence[tuple[str, str]]) -> str:
    """A self-contained page with this module's style and tooltips.

    Args:
        title: Of the window.
        heading: Above the links to the sections.
        headline: HTML in front of the sections.
        sections: Name and HTML of each.
    """
    assets = files("lit_interns1.reports") / "assets"
    style, script = ((assets / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    links = "".join(f'<a href="#s{i}">{escape(name)}</a>' for i, (name, _) in enumerate(sections))
    body = "\n".join(f'<section id="s{i}"><h2>{escape(n)}</h2>{c}</section>' for i, (n, c) in enumerate(sections))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{GENERATOR}\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(heading)}</h1><nav>{links}</nav></header>\n<main>\n{headline}\n{body}\n</main>\n"
        f'<div id="tip" hidden></div>\n<script>\n{script}</script>\n</body>\n</html>\n'
    )


def chart_card(chart: str, lines: Sequence[Line], title: str, note: str = "", always_legend: bool = False) -> str:
    """A titled card around a chart, with a legend where there are several lines; nothing without a chart."""
    if not chart:
        return ""
    named = [line for line in lines if line.kind != "faint"]
    legend = "".join(
        f'<span><i class="swatch c{line.colour % COLOURS}"></i>{escape(line.name)}</span>' for line in named
    )
    legend = f'<p class="legend">{legend}</p>' if len(named) > 1 or always_legend else ""
    return f'<div class="card"><h3>{escape(title)}<small>{escape(note)}</small></h3>{legend}{chart}</div>'


def _refuse_foreign(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_file():
        raise FileExistsError(f"output {target} exists and is no file")
    with target.open("rb") as file:
        if GENERATOR.encode() not in file.read(1000):
            raise FileExistsError(f"output {target} exists and is no report of lit-interns1; name another file")


def _headline(runs: Sequence[RunRecord]) -> str:
    """Tiles for one run, a table for several."""
    figures = [run.headline() for run in runs]
    if len(runs) == 1:
        tiles = (f"<div><b>{escape(v)}</b><span>{escape(k)}</span></div>" for k, v in figures[0].items())
        return f'<div class="tiles">{"".join(tiles)}</div>'
    names = list(dict.fromkeys(name for found in figures for name in found))
    head = "".join(f'<th><i class="swatch c{i % COLOURS}"></i>{escape(run.name)}</th>' for i, run in enumerate(runs))
    rows = "".join(
        f"<tr><td>{escape(name)}</td>" + "".join(f"<td>{escape(f.get(name, '–'))}</td>" for f in figures) + "</tr>"
        for name in names
    )
    return f'<div class="card wide"><table class="figures"><tr><th></th>{head}</tr>{rows}</table></div>'


# --- charts --------------------------------------------------------------------------------------------------------


def _chart_sections(runs: Sequence[RunRecord]) -> Iterator[tuple[str, str]]:
    run = runs[0]
    found = dict(arrange(name for each in runs for name in each.metrics))
    if run.load is not None:
        found.setdefault("Router", [])
    for title, charts in found.items():
        single = [curves for curves in charts if all(_is_single(runs, key) for key in curves.keys.values())]
        cards = [card for curves in charts if curves not in single for card in _cards(runs, curves)]
        if title == "Router":
            cards += _load_cards(run)
        if title == "Learning-rate search":
            cards = [_rate_search_card(runs), *cards]
        cards.append(_single_values(runs, [key for curves in single for key in curves.keys.values()]))
        if any(cards):
            yield title, f'<div class="grid">{"".join(cards)}</div>'


def _is_single(runs: Sequence[RunRecord], key: str) -> bool:
    """Whether no run has two points of this metric: a number, not a curve."""
    return all(np.isfinite(run.metrics[key].values).sum() < 2 for run in runs if key in run.metrics)


def _single_values(runs: Sequence[RunRecord], keys: list[str]) -> str:
    def value(run: RunRecord, key: str) -> str:
        return f"{run.metrics[key].values[-1]:.5g}" if key in run.metrics else "–"

    if not keys:
        return ""
    head = "<tr><th></th>" + "".join(f"<th>{escape(run.name)}</th>" for run in runs) + "</tr>" if runs[1:] else ""
    rows = "".join(
        f"<tr><td>{escape(key)}</td>" + "".join(f"<td>{value(run, key)}</td>" for run in runs) + "</tr>" for key in keys
    )
    return f'<div class="card scroll"><h3>Logged once</h3><table class="figures">{head}{rows}</table></div>'


def _rate_search_card(runs: Sequence[RunRecord]) -> str:
    """The losses of the trials of a learning-rate search over the logarithm of their rates."""
    lines = []
    for number, run in enumerate(runs):
        if {"lr_search/rate", "lr_search/loss"} <= run.metrics.keys():
            rate, loss = run.metrics["lr_search/rate"], run.metrics["lr_search/loss"]
            _, at_rate, at_loss = np.intersect1d(rate.steps, loss.steps, return_indices=True)
            x, y = np.log10(rate.values[at_rate]), loss.values[at_loss]
            order = np.argsort(x)
            lines.append(Line(run.name, x[order], y[order], number, "points"))
    return _card(runs, "Loss of the trials", "nats per token", lines, x_label="log₁₀ rate")


def _cards(runs: Sequence[RunRecord], curves: Curves) -> Iterator[str]:
    """One card for all curves of a run; of several runs, one card for every curve, losses of a module aside."""
    is_loss = "train/loss" in curves.keys.values() or "val/loss" in curves.keys.values()
    references = runs[0].references if is_loss else {}
    if len(runs) == 1:
        lines, note = _lines_of_run(runs[0], curves)
        yield _card(runs, curves.title, curves.unit, lines, references, note)
        return
    together = [curves.keys] if is_loss else [{name: key} for name, key in curves.keys.items()]
    shown = _evenly(together, _MOST_CARDS)
    note = f"{len(shown)} of {len(together)} charts" if len(shown) < len(together) else ""
    for keys in shown:
        title = curves.title if len(curves.keys) == 1 or is_loss else f"{curves.title}: {next(iter(keys))}"
        lines = [
            line
            for number, run in enumerate(runs)
            for name, key in keys.items()
            for line in _lines(run, key, f"{run.name} {name}" if is_loss else run.name, number, faint=False)
        ]
        yield _card(runs, title, curves.unit, lines, references, note)


def _lines_of_run(run: RunRecord, curves: Curves) -> tuple[list[Line], str]:
    names, note = list(curves.keys), ""
    if len(names) > _MOST_CURVES:
        names = _evenly(names, _MOST_CURVES)
        note = f"{_MOST_CURVES} of {len(curves.keys)} curves"
    lines = [
        line for number, name in enumerate(names) for line in _lines(run, curves.keys[name], name, number, faint=True)
    ]
    return sorted(lines, key=lambda line: line.kind != "faint"), note


def _lines(run: RunRecord, key: str, name: str, colour: int, faint: bool) -> list[Line]:
    """What is drawn for one key: points for validations, each point faintly and their average for noisy keys."""
    if key not in run.metrics:
        return []
    series = run.metrics[key]
    finite = np.isfinite(series.values)
    x, y = run.places(series)[finite], series.values[finite]
    if key.startswith(("val/", "test/", "salience/")):
        return [Line(name, x, y, colour, "points")]
    if key not in _SMOOTHED or len(y) < 12:
        return [Line(name, x, y, colour)]
    smooth = Line(name if not faint else f"{name}, smoothed", x, moving_average(y), colour)
    return [Line(f"{name}, each point", x, y, colour, "faint"), smooth] if faint else [smooth]


def _card(
    runs: Sequence[RunRecord],
    title: str,
    unit: str,
    lines: list[Line],
    references: dict[str, float] | None = None,
    note: str = "",
    x_label: str = "",
) -> str:
    """A titled chart; over tokens or steps, with a vertical line where a single run was continued or switched."""
    marks: dict[str, list[float]] = {}
    for event in runs[0].events() if len(runs) == 1 and not x_label else ():
        if event.kind in ("resumed", "batch size"):
            marks.setdefault(event.kind, []).append(event.place)
    axis = x_label or ("tokens" if all(run.counts_tokens for run in runs) else "steps")
    chart = line_chart(lines, f"{title} over {axis}", axis, references, marks)
    extra = " · ".join(part for part in (unit, note) if part)
    return chart_card(chart, lines, title, extra, always_legend=len(runs) > 1)


def _load_cards(run: RunRecord) -> list[str]:
    """The imbalance of each layer over tokens, and a heat-map of its experts."""
    if run.load is None:
        return []
    tokens_N, load_NLE = run.load
    layers, experts = load_NLE.shape[1:]
    shown = _evenly(list(range(layers)), _MOST_LAYERS)
    violation_NL = max_violation(load_NLE)
    lines = [
        Line(f"layer {layer}", tokens_N, moving_average(violation_NL[:, layer]), number)
        for number, layer in enumerate(_evenly(list(range(layers)), COLOURS))
    ]
    note = f"{len(lines)} of {layers} layers" if len(lines) < layers else ""
    cards = [_card([run], "Imbalance by layer (MaxVio)", "smoothed", lines, note=note)]
    columns = max(1, min(200, _HEAT_CELLS // (len(shown) * experts)))
    for layer in shown:
        label = f"Expert load of layer {layer} over consumed tokens"
        last = f"MaxVio {violation_NL[-1, layer]:.2f} at the end"
        cards.append(
            f'<div class="card"><h3>Expert load, layer {layer}<small>{last}</small></h3>'
            f'<p class="legend"><span><i class="swatch less"></i>less than its share</span>'
            f'<span><i class="swatch more"></i>more (full: twice)</span></p>'
            f"{heat_map(tokens_N, load_NLE[:, layer], label, columns)}</div>"
        )
    return cards


def _evenly(items: list, most: int) -> list:
    """At most `most` of the items, evenly chosen, with the first and the last."""
    if len(items) <= most:
        return items
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]


# --- texts ---------------------------------------------------------------------------------------------------------


def _closing_sections(run: RunRecord) -> Iterator[tuple[str, str]]:
    if events := run.events():
        rows = "".join(
            f"<tr><td>{short_number(e.place)}</td><td>{escape(e.kind)}</td><td>{escape(e.text)}</td></tr>"
            for e in events
        )
        axis = "tokens" if run.counts_tokens else "step"
        head = f"<tr><th>{axis}</th><th>event</th><th></th></tr>"
        yield "Events", f'<div class="card wide scroll"><table>{head}{rows}</table></div>'
    if samples := _samples(run):
        yield "Samples", samples
    if texts := run.config_texts():
        folds = "".join(
            f"<details><summary>{escape(name)}</summary><pre>{escape(text)}</pre></details>"
            for name, text in texts.items()
        )
        yield "Configuration", f'<div class="card wide">{folds}</div>'
    if found := run.environment():
        rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in found.items())
        yield "Environment", f'<div class="card wide"><table>{rows}</table></div>'


def _samples(run: RunRecord) -> str:
    cards = ""
    if text := run.summary.get("text"):
        cards += f'<div class="card"><h3>Text</h3><pre>{escape(str(text))}</pre></div>'
    if molecules := run.summary.get("molecules"):
        rows = "".join(
            f"<tr><td>{'✓' if m['valid'] else '✗'}</td><td><code>{escape(str(m['smiles']))}</code></td>"
            f"<td>{escape(str(m.get('reason') or ''))}</td></tr>"
            for m in molecules
        )
        cards += f'<div class="card scroll"><h3>Molecules</h3><table>{rows}</table></div>'
    return f'<div class="grid">{cards}</div>' if cards else ""

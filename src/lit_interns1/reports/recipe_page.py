"""The page of a recipe: what is proposed and why, with the laws and the small runs behind it, in one HTML file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape

import numpy as np

from lit_interns1.laws import BatchSizeTable
from lit_interns1.reports.html_report import chart_card, document
from lit_interns1.reports.learning_rate_search import RateSearchResult
from lit_interns1.reports.recipe_plan import Recipe
from lit_interns1.reports.svg_charts import Line, line_chart
from lit_interns1.training.units import with_unit

_POINTS = 200


def recipe_page(
    recipe: Recipe,
    schedule_factor: Sequence[tuple[float, float]],
    config_text: str,
    results: Sequence[RateSearchResult] = (),
    table: BatchSizeTable | None = None,
) -> str:
    """The page as text.

    Args:
        recipe: What it is about.
        schedule_factor: Consumed tokens, and the factor on the peak rate there.
        config_text: The config that is proposed.
        results: The searches behind the rate.
        table: Batch sizes behind the schedule.
    """
    cards = {
        "Schedule": [_rate_over_tokens(recipe, schedule_factor), _batch_over_tokens(recipe, table)],
        "Peak rate": [*_search_cards(recipe, results), _others(recipe)],
        "Mixture": [_mixture_lines(recipe), _mixture_losses(recipe)],
        "Decay": [_decay_cost(recipe)],
    }
    sections = [("Proposed", _proposal(recipe)), ("Warnings", _warnings(recipe))]
    sections += [(name, f'<div class="grid">{"".join(found)}</div>') for name, found in cards.items() if any(found)]
    fold = f"<details><summary>config.yaml</summary><pre>{escape(config_text)}</pre></details>"
    sections.append(("Config", f'<div class="card wide">{fold}</div>'))
    return document(f"Recipe: {recipe.base}", f"Recipe for {recipe.base}", _tiles(recipe), sections)


def _tiles(recipe: Recipe) -> str:
    tiles = {
        "parameters": with_unit(recipe.parameters),
        "active per token": with_unit(recipe.active_parameters),
        "tokens": with_unit(recipe.total_tokens),
        "optimizer steps": f"{recipe.batch.optimizer_steps:,}",
        "peak rate": f"{recipe.rate.peak.value:.3g}",
        "data-parallel ranks": str(recipe.ranks),
    }
    body = "".join(f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in tiles.items())
    return f'<div class="tiles">{body}</div>'


def _proposal(recipe: Recipe) -> str:
    head = "<tr><th></th><th>proposed</th><th>95 % interval</th><th>from</th></tr>"
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in recipe.rows())
    note = (
        "<p class='legend'>“Default” stands where no small run speaks for a number. An empty interval is not known.</p>"
    )
    return f'<div class="card wide">{note}<table>{head}{rows}</table></div>'


def _warnings(recipe: Recipe) -> str:
    if not recipe.warnings:
        return '<div class="card wide">None.</div>'
    items = "".join(f"<li>{escape(warning)}</li>" for warning in recipe.warnings)
    return f'<div class="card wide"><ul>{items}</ul></div>'


# -- schedule ----------------------------------------------------------------------------------------------------------


def _rate_over_tokens(recipe: Recipe, schedule_factor: Sequence[tuple[float, float]]) -> str:
    tokens, factors = zip(*schedule_factor, strict=True)
    lines = [Line("learning rate", tokens, recipe.rate.peak.value * np.array(factors))]
    marks = {"decay begins": [recipe.decay_start]}
    return chart_card(line_chart(lines, "Learning rate over tokens", "tokens", marks=marks), lines, "Learning rate")


def _batch_over_tokens(recipe: Recipe, table: BatchSizeTable | None) -> str:
    steps, end = recipe.batch.steps, float(recipe.total_tokens)
    until = [*(float(step.tokens) for step in steps[1:]), end]
    corners = [(place, step.batch) for step, last in zip(steps, until, strict=True) for place in (step.tokens, last)]
    lines = [Line("planned", [place for place, _ in corners], [batch for _, batch in corners])]
    law = recipe.batch_law
    if law is not None:
        at = np.linspace(0.0, end, _POINTS)
        lines.append(Line("law", at, [law(tokens) for tokens in at], 1))
        ends = [law.interval(tokens) for tokens in at]
        known = [pair for pair in ends if pair is not None]
        if len(known) == len(at):
            lines += [Line("95 % interval", at, [pair[side] for pair in known], 1, "faint") for side in (0, 1)]
    for row in table.rows if table is not None else ():
        if row.b_opt_bound == "none" and row.e_min <= end:
            lines.append(Line(f"B_opt at loss {row.loss:.3f}", [row.e_min], [row.b_opt], 2, "points"))
    named = [line for line in lines if line.kind != "points"]
    chart = line_chart(lines, "Tokens per step over tokens", "tokens", marks={"decay begins": [recipe.decay_start]})
    note = "points: small runs" if table is not None else ""
    return chart_card(chart, named, "Tokens per step", note)


# -- peak rate ---------------------------------------------------------------------------------------------------------


def _search_cards(recipe: Recipe, results: Sequence[RateSearchResult]) -> Iterator[str]:
    for result in results:
        lines = []
        for number, tokens in enumerate(result.tokens):
            losses, parabola = np.array(result.losses_at(number)), result.parabola(number)
            name = f"D = {with_unit(tokens)}"
            lines.append(Line(name, np.log10(result.rates), losses, number, "points"))
            if parabola is not None and result.is_bracketed(number):
                rates = np.geomspace(parabola.rates_R[0], parabola.rates_R[-1], 60)
                lines.append(Line(f"{name}, parabola", np.log10(rates), parabola(rates), number, "faint"))
        title = f"Search at N = {with_unit(result.parameters)}"
        marks = {"proposed": [math.log10(recipe.rate.peak.value)]}
        inside = result.rates[0] <= recipe.rate.peak.value <= result.rates[-1]
        chart = line_chart(lines, title, "log₁₀ rate", marks=marks if inside else None)
        yield chart_card(chart, lines, title, "nats per token" + ("; dashed: proposed" if inside else ""))


def _others(recipe: Recipe) -> str:
    rows = [(name, f"{rate:.3g}") for name, rate in recipe.rate.others.items()]
    if math.isfinite(recipe.rate.factor_two_cost):
        rows.append(("a factor of 2 off costs, nats per token", f"{recipe.rate.factor_two_cost:.4f}"))
    return _table("Other ways to the rate", [], rows)


# -- mixture and decay -------------------------------------------------------------------------------------------------


def _mixture_lines(recipe: Recipe) -> str:
    drawn = recipe.mixture.lines if recipe.mixture is not None else ()
    lines = [Line(name, shares, losses, number) for number, (name, shares, losses) in enumerate(drawn)]
    title = "Weighted loss over one share, the others in their ratios"
    return chart_card(line_chart(lines, title, "share"), lines, title, "nats per token")


def _mixture_losses(recipe: Recipe) -> str:
    losses = recipe.mixture.losses if recipe.mixture is not None else {}
    rows = [(name, f"{best:.4f}", f"{base:.4f}") for name, (best, base) in losses.items()]
    return _table("Predicted validation losses", ["", "proposed", "base"], rows)


def _decay_cost(recipe: Recipe) -> str:
    if not recipe.decay.shares:
        return ""
    lines = [Line("predicted loss", recipe.decay.shares, recipe.decay.losses)]
    chart = line_chart(lines, "Loss over the share of the decay", "share", marks={"chosen": [recipe.decay.share.value]})
    return chart_card(chart, lines, "Predicted loss over the share of the decay", "nats per token")


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    top = "<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>" if head else ""
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="card scroll"><h3>{escape(title)}</h3><table class="figures">{top}{body}</table></div>'

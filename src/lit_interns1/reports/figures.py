"""The pictures of a run: loss, learning rate, expert load and throughput over consumed tokens.

Each function takes plain arrays and returns a matplotlib `Figure`; none touches pyplot or global settings. Colours are
those of Okabe & Ito (jfly.uni-koeln.de/color, 2008), which readers with any colour vision can tell apart. The imbalance
of a layer is MaxVio = (max_e load_e − mean load) / mean load (Wang et al., arXiv 2408.15664, Eq. 4).
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]

BLUE, VERMILLION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
_REFERENCE_COLOURS = (GREEN, PURPLE, "#E69F00", "#56B4E9")
_INK, _GRID = "#333333", "#E4E4E4"
_TEXT_SIZE, _TITLE_SIZE = 11.0, 13.0


def loss_figure(
    train_tokens: ArrayLike,
    train_loss: ArrayLike,
    validation_tokens: ArrayLike = (),
    validation_loss: ArrayLike = (),
    references: Mapping[str, float] | None = None,
    title: str = "Loss",
) -> Figure:
    """The loss over consumed tokens: every training point faintly, their moving average, validation points on top.

    The vertical axis leaves out the steep beginning (the first 4 % of the points), as far as it lies above all else.

    Args:
        train_tokens: (N,) consumed tokens.
        train_loss: (N,) nats per token; points that are not finite are left out.
        validation_tokens: (M,) consumed tokens.
        validation_loss: (M,) nats per token.
        references: Losses to compare with, in nats per token, drawn as horizontal lines and named by their keys
            (`{"bigram": 4.1, "3-gram": 3.7}`).
        title: What stands above.

    Raises:
        ValueError: If tokens and losses differ in length, or there is nothing to draw.
    """
    train_x, train_y = _points("train", train_tokens, train_loss)
    validation_x, validation_y = _points("validation", validation_tokens, validation_loss)
    if not train_x.size and not validation_x.size:
        raise ValueError("loss_figure has neither a training nor a validation point to draw")
    figure, axes = _figure(title, "Loss (nats per token)")
    smooth = moving_average(train_y)
    axes.plot(train_x, train_y, color=BLUE, alpha=0.25, linewidth=0.8, label="_train, each point")
    axes.plot(
        train_x, smooth, color=BLUE, linewidth=2.0, label="train" if train_x.size else "_train", marker=_dot(train_x)
    )
    if validation_x.size:
        axes.plot(
            validation_x,
            validation_y,
            color=VERMILLION,
            linewidth=1.0,
            marker="o",
            markersize=5,
            markeredgecolor="white",
            markeredgewidth=0.8,
            label="validation",
            zorder=4,
        )
    lines = dict(references or {})
    for colour, (name, value) in zip(_cycle(_REFERENCE_COLOURS, len(lines)), lines.items()):
        axes.axhline(value, color=colour, linestyle=(0, (6, 3)), linewidth=1.4, label=f"_{name}", zorder=1.5)
    settled = slice(math.ceil(0.04 * train_y.size), None)
    shown = np.concatenate([train_y[settled], smooth[settled], validation_y[-1:], np.array(list(lines.values()))])
    bottom, top = float(shown.min()), float(shown.max())
    margin = 0.06 * (top - bottom) or 0.1
    axes.set_ylim(bottom - margin, top + margin)
    _token_axis(axes, np.concatenate([train_x, validation_x]))
    _label_lines(axes, lines)
    _legend(axes)
    return figure


def learning_rate_figure(tokens: ArrayLike, learning_rate: ArrayLike, title: str = "Learning rate") -> Figure:
    """The learning rate over consumed tokens.

    Args:
        tokens: (N,) consumed tokens.
        learning_rate: (N,).
        title: What stands above.

    Raises:
        ValueError: If the lengths differ, or there is nothing to draw.
    """
    x, y = _points("learning rate", tokens, learning_rate, required=True)
    figure, axes = _figure(title, "Learning rate")
    axes.plot(x, y, color=BLUE, linewidth=2.0, label="learning rate", marker=_dot(x))
    axes.set_ylim(0, 1.06 * float(y.max()) or 1)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    axes.yaxis.get_offset_text().set(fontsize=_TEXT_SIZE, color=_INK)
    _token_axis(axes, x)
    return figure


def throughput_figure(tokens: ArrayLike, tokens_per_second: ArrayLike, title: str = "Throughput") -> Figure:
    """Tokens per second over consumed tokens: every point faintly, their moving average, and the median as a line.

    Args:
        tokens: (N,) consumed tokens.
        tokens_per_second: (N,).
        title: What stands above.

    Raises:
        ValueError: If the lengths differ, or there is nothing to draw.
    """
    _load_matplotlib()
    from matplotlib.ticker import EngFormatter

    x, y = _points("throughput", tokens, tokens_per_second, required=True)
    figure, axes = _figure(title, "Tokens per second")
    median = float(np.median(y))
    axes.plot(x, y, color=BLUE, alpha=0.25, linewidth=0.8, label="_each point")
    axes.plot(x, moving_average(y), color=BLUE, linewidth=2.0, label="throughput", marker=_dot(x))
    axes.axhline(median, color=VERMILLION, linestyle=(0, (6, 3)), linewidth=1.4, label="_median", zorder=1.5)
    axes.set_ylim(0, 1.15 * float(np.quantile(y, 0.99)) or 1)
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    _token_axis(axes, x)
    _label_lines(axes, {f"median\n{EngFormatter(places=1, sep='')(median)}": median}, (VERMILLION,))
    return figure


def expert_load_figure(tokens: ArrayLike, load: ArrayLike, title: str = "Expert load") -> Figure:
    """Which experts work: one heat map a layer (experts over tokens), and MaxVio of all layers below.

    White is the uniform load 1 / experts, blue less, red more; red is full at twice the uniform load.

    Args:
        tokens: (N,) consumed tokens, not descending.
        load: (N, layers, experts), the share of routed slots of each expert; sums to 1 over the experts.
        title: What stands above.

    Raises:
        ValueError: If the shapes do not fit, or there is nothing to draw.
    """
    x_N, load_NLE = np.asarray(tokens, dtype=np.float64), np.asarray(load, dtype=np.float64)
    if x_N.ndim != 1 or load_NLE.ndim != 3 or len(x_N) != len(load_NLE) or not load_NLE.size:
        raise ValueError(f"expert_load_figure: {x_N.shape} and {load_NLE.shape} are not (N,), (N, layers, experts)")
    _load_matplotlib()
    from matplotlib.ticker import MaxNLocator

    _, layers, experts = load_NLE.shape
    violation_NL = max_violation(load_NLE)
    edges_B, load_BLE = _time_bins(x_N, load_NLE, 240)

    columns = min(layers, 4)
    rows = math.ceil(layers / columns)
    width, map_height = max(8.0, 2.5 * columns), (2.6 if columns < 4 else 1.9)
    figure = _empty_figure(width, map_height * rows + 3.2)
    figure.suptitle(title, fontsize=_TITLE_SIZE, color=_INK, fontweight="bold", x=0.02, ha="left")
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=[*[map_height] * rows, 2.3])
    maps: list[Axes] = []
    for layer in range(layers):
        axes = figure.add_subplot(grid[layer // columns, layer % columns])
        mesh = axes.pcolormesh(
            edges_B,
            np.arange(experts + 1) - 0.5,
            experts * load_BLE[:, layer].T,
            cmap="RdBu_r",
            vmin=0,
            vmax=2,
            rasterized=True,
        )
        _plain(axes, grid=False)
        axes.set_title(f"Layer {layer}", fontsize=_TEXT_SIZE, color=_INK, loc="left")
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.set_xlim(edges_B[0], edges_B[-1])
        _token_ticks(axes, 4)
        axes.label_outer() if layer + columns < layers else axes.tick_params(labelleft=layer % columns == 0)
        if layer % columns == 0:
            axes.set_ylabel("Expert", fontsize=_TEXT_SIZE, color=_INK)
        maps.append(axes)
    bar = figure.colorbar(mesh, ax=maps, extend="max", ticks=[0, 0.5, 1, 1.5, 2], aspect=12 * rows, pad=0.015)
    bar.set_label("Load / uniform load", fontsize=_TEXT_SIZE, color=_INK)
    bar.ax.tick_params(labelsize=_TEXT_SIZE - 1, colors=_INK, length=0)
    bar.outline.set_visible(False)

    axes = figure.add_subplot(grid[rows, :])
    _plain(axes)
    mean_label = "mean over layers" if layers > 1 else "_mean over layers"
    for layer in range(layers if layers > 1 else 0):
        label, smooth = "each layer" if layer == 0 else f"_layer {layer}", moving_average(violation_NL[:, layer])
        axes.plot(x_N, smooth, color=BLUE, alpha=0.35, linewidth=0.9, label=label, marker=_dot(x_N))
    smooth = moving_average(violation_NL.mean(1))
    axes.plot(x_N, smooth, color=VERMILLION, linewidth=2.2, label=mean_label, marker=_dot(x_N))
    axes.set_title("Imbalance (0: every expert has the same load)", fontsize=_TEXT_SIZE, color=_INK, loc="left")
    axes.set_ylabel("MaxVio", fontsize=_TEXT_SIZE, color=_INK)
    axes.set_ylim(0, 1.08 * float(violation_NL[math.ceil(0.02 * len(x_N)) - 1 :].max()) or 1)
    _token_axis(axes, x_N)
    if layers > 1:
        _legend(axes)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str], dpi: int = 150) -> Path:
    """Writes a PNG: all of it or, if anything fails, nothing. Parent directories are made.

    Args:
        figure: What to write.
        path: The file, `.png`.
        dpi: Pixels per inch.

    Returns:
        The path of the file.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        figure.savefig(temporary, format="png", dpi=dpi, facecolor="white")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def max_violation(load: ArrayLike) -> Floats:
    """MaxVio: how far the busiest expert is above the mean; 0 is perfect balance, experts − 1 the worst.

    Args:
        load: (..., experts) loads, in any unit.

    Returns:
        (...,) float64.
    """
    array = np.asarray(load, dtype=np.float64)
    mean = array.mean(-1)
    return (array.max(-1) - mean) / mean


def moving_average(values: ArrayLike, share: float = 0.04) -> Floats:
    """A centred moving average. At the start the window shrinks on both sides, so that steep descents stay steep.

    Args:
        values: (N,).
        share: Width of the window as a share of N.

    Returns:
        (N,) float64.
    """
    array = np.asarray(values, dtype=np.float64)
    index, half = np.arange(array.size), round(share * array.size / 2)
    before = np.minimum(index, half)
    after = np.minimum(before, index[::-1])
    total = np.concatenate([[0.0], np.cumsum(array)])
    return (total[index + after + 1] - total[index - before]) / (before + after + 1)


# --- style -------------------------------------------------------------------------------------------------------


def _load_matplotlib() -> None:
    """Imports matplotlib so that it keeps its font cache out of the home directory, unless MPLCONFIGDIR is set."""
    if "matplotlib" in sys.modules or os.environ.get("MPLCONFIGDIR"):
        return
    folder = Path.cwd() / ".cache" / "matplotlib"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        usable = os.access(folder, os.W_OK)
    except OSError:
        usable = False
    os.environ["MPLCONFIGDIR"] = str(folder) if usable else tempfile.mkdtemp(prefix="matplotlib-")
    try:
        import matplotlib

        matplotlib.get_configdir(), matplotlib.get_cachedir()  # both are remembered for the process
    finally:
        del os.environ["MPLCONFIGDIR"]


def _empty_figure(width: float, height: float) -> Figure:
    _load_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _figure(title: str, y_label: str) -> tuple[Figure, Axes]:
    figure = _empty_figure(8.0, 4.5)
    axes = figure.add_subplot()
    _plain(axes)
    axes.set_title(title, fontsize=_TITLE_SIZE, color=_INK, fontweight="bold", loc="left", pad=10)
    axes.set_ylabel(y_label, fontsize=_TEXT_SIZE, color=_INK)
    return figure, axes


def _plain(axes: Axes, grid: bool = True) -> None:
    """Two light spines, no tick marks, a grid behind the data."""
    axes.set_facecolor("white")
    for side, spine in axes.spines.items():
        spine.set_visible(grid and side in ("left", "bottom"))
        spine.set(color="#999999", linewidth=0.8)
    axes.tick_params(labelsize=_TEXT_SIZE - 1, colors=_INK, length=0, pad=5)
    axes.set_axisbelow(True)
    axes.grid(grid, color=_GRID, linewidth=0.8) if grid else axes.grid(False)


def _token_axis(axes: Axes, tokens: Floats) -> None:
    axes.set_xlim(0, 1.01 * float(tokens.max()) or 1)
    axes.set_xlabel("Consumed tokens", fontsize=_TEXT_SIZE, color=_INK)
    _token_ticks(axes, 8)


def _token_ticks(axes: Axes, number: int) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(number, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _legend(axes: Axes, loc: Literal["upper right", "best"] = "upper right") -> None:
    axes.legend(loc=loc, fontsize=_TEXT_SIZE - 1, labelcolor=_INK, frameon=True, framealpha=0.9, edgecolor="none")


def _label_lines(axes: Axes, lines: Mapping[str, float], colours: tuple[str, ...] = _REFERENCE_COLOURS) -> None:
    """Names horizontal lines at the right edge, moved apart where they would overlap."""
    bottom, top = axes.get_ylim()
    gap = 0.055 * (top - bottom)
    coloured = zip(lines.items(), _cycle(colours, len(lines)))
    height = -math.inf
    for (name, value), colour in sorted(coloured, key=lambda item: item[0][1]):
        height = max(value, height + gap)
        axes.annotate(
            name if "\n" in name else f"{name}  {value:.2f}",
            xy=(1.012, height),
            xycoords=("axes fraction", "data"),
            color=colour,
            fontsize=_TEXT_SIZE - 1,
            fontweight="bold",
            va="center",
            annotation_clip=False,
        )


def _dot(tokens: Floats) -> str:
    """The marker of a curve: a single point would be invisible without."""
    return "o" if len(tokens) == 1 else ""


def _cycle(colours: tuple[str, ...], number: int) -> list[str]:
    return [colours[index % len(colours)] for index in range(number)]


def _points(name: str, tokens: ArrayLike, values: ArrayLike, required: bool = False) -> tuple[Floats, Floats]:
    """Both as float64 (N,), without the points that are not finite."""
    x, y = np.asarray(tokens, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"{name}: {x.shape} tokens and {y.shape} values are not both (N,)")
    finite = np.isfinite(x) & np.isfinite(y)
    if required and not finite.any():
        raise ValueError(f"{name}: there is no finite point to draw")
    return x[finite], y[finite]


def _time_bins(tokens_N: Floats, load_NLE: Floats, most: int) -> tuple[Floats, Floats]:
    """At most `most` groups B of neighbouring points: edges (B + 1,), and load (B, layers, experts), averaged.

    A point stands for the tokens since the one before it.
    """
    groups = np.array_split(np.arange(len(tokens_N)), min(most, len(tokens_N)))
    load_BLE = np.stack([load_NLE[group].mean(0) for group in groups])
    last_B = np.array([tokens_N[group[-1]] for group in groups])
    return np.concatenate([[0.0 if last_B[0] > 0 else last_B[0] - 1], last_B]), load_BLE

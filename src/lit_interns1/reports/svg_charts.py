"""Line charts and heat-maps as inline SVG: no script, font or style is needed but the page's own.

Colours are CSS classes (`c0` ... `c7`), so that a page decides what they are in light and dark. Curves are drawn as
paths in the coordinates of the picture; `data-` attributes hold the ranges of both axes, from which the page's script
reads values back for its tooltips.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

COLOURS = 8
"""Number of colour classes."""
_WIDTH, _HEIGHT = 640, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 10, 32
_MOST_POINTS = 360
_BEGINNING = 0.04
"""Share of the points of a curve that may leave the chart: the steep beginning."""


@dataclass(frozen=True)
class Line:
    """One curve.

    Args:
        name: As the legend and the tooltip call it.
        x: (N,) ascending.
        y: (N,); points that are not finite are left out.
        colour: Number of the colour class.
        kind: A line, a faint line behind the others, or points joined by a thin line.
    """

    name: str
    x: ArrayLike
    y: ArrayLike
    colour: int = 0
    kind: Literal["line", "faint", "points"] = "line"


def line_chart(
    lines: Sequence[Line],
    label: str,
    x_label: str,
    references: Mapping[str, float] | None = None,
    marks: Mapping[str, Sequence[float]] | None = None,
) -> str:
    """One chart as an `<svg>`.

    The vertical axis begins at zero where that takes less than half of its height; the first 4 % of the points of a
    curve do not widen it.

    Args:
        lines: What is drawn, later ones on top.
        label: What the chart shows, for screen readers.
        x_label: Below the horizontal axis.
        references: Horizontal dashed lines by name.
        marks: Vertical dashed lines: places by name.

    Returns:
        The element; an empty text if no point is finite.
    """
    points = [(line, *_finite(line.x, line.y)) for line in lines]
    points = [(line, x, y) for line, x, y in points if x.size]
    if not points:
        return ""
    values = dict(references or {})
    right = max(float(x[-1]) for _, x, _ in points)
    left = min(0.0, min(float(x[0]) for _, x, _ in points))
    bottom, top = _range([y for _, _, y in points], list(values.values()))
    frame = _Frame(left, right if right > left else left + 1, bottom, top)
    body = [frame.axes(x_label)]
    for name, places in (marks or {}).items():
        for place in places:
            x_pixel = frame.x(np.array([place]))[0]
            body.append(
                f'<line class="mark" x1="{x_pixel:.1f}" x2="{x_pixel:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}">'
                f"<title>{escape(name)} at {short_number(place)}</title></line>"
            )
    body.append(
        f'<svg x="{_LEFT}" y="{_TOP - 4}" width="{_WIDTH - _LEFT - _RIGHT + 4}" height="{frame.height + 8}" '
        f'viewBox="{_LEFT} {_TOP - 4} {_WIDTH - _LEFT - _RIGHT + 4} {frame.height + 8}">'
    )
    body += [_curve(frame, line, x, y) for line, x, y in points]
    body.append("</svg>")
    for name, value in values.items():
        y_pixel = frame.y(np.array([value]))[0]
        body.append(
            f'<line class="reference" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y_pixel:.1f}" y2="{y_pixel:.1f}"/>'
            f'<text class="reference" x="{_LEFT + 6}" y="{y_pixel - 5:.1f}">'
            f"{escape(name)} {value:.3g}</text>"
        )
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}" '
        f'data-frame="{_LEFT} {_WIDTH - _RIGHT} {_HEIGHT - _BOTTOM} {_TOP}" '
        f'data-range="{frame.left!r} {frame.right!r} {frame.bottom!r} {frame.top!r}">' + "".join(body) + "</svg>"
    )


def heat_map(tokens: ArrayLike, load: ArrayLike, label: str, columns: int) -> str:
    """The load of the experts of one layer over tokens.

    load · experts = 1 is transparent, less is blue, more is red, 0 and ≥ 2 are opaque. So it stands on any background.

    Args:
        tokens: (N,) consumed tokens, not descending; a point stands for the tokens since the one before it.
        load: (N, experts), sums to 1 over the experts.
        label: What it shows, for screen readers.
        columns: Most columns of the picture.

    Returns:
        An `<svg>` with the picture as inline PNG.
    """
    x_N, load_NE = np.asarray(tokens, dtype=np.float64), np.asarray(load, dtype=np.float64)
    experts = load_NE.shape[1]
    right = float(x_N[-1]) or 1.0
    width = min(columns, len(x_N))
    edges_C = right * np.arange(width + 1) / width
    first_C = np.minimum(np.searchsorted(x_N, edges_C[:-1], side="right"), len(x_N) - 1)
    last_C = np.maximum(np.searchsorted(x_N, edges_C[1:], side="right"), first_C + 1)
    total_NE = np.concatenate([np.zeros((1, experts)), np.cumsum(load_NE, axis=0)])
    relative_EC = experts * ((total_NE[last_C] - total_NE[first_C]) / (last_C - first_C)[:, None]).T
    frame = _Frame(0.0, right, -0.5, experts - 0.5)
    ticks = sorted({0, experts // 2, experts - 1})
    labels = "".join(
        f'<text class="tick" x="{_LEFT - 7}" y="{frame.y(np.array([float(t)]))[0] + 5:.1f}" '
        f'text-anchor="end">{t}</text>'
        for t in ticks
    )
    picture = base64.b64encode(_png(_diverging(relative_EC[::-1]))).decode()
    return (
        f'<svg class="heat" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}" '
        f'data-frame="{_LEFT} {_WIDTH - _RIGHT} {_HEIGHT - _BOTTOM} {_TOP}" data-range="0 {right!r} 0 {experts}">'
        f"{frame.horizontal_ticks('tokens', grid=False)}{labels}"
        f'<rect class="outline" x="{_LEFT}" y="{_TOP}" width="{frame.width}" height="{frame.height}"/>'
        f'<image x="{_LEFT}" y="{_TOP}" width="{frame.width}" height="{frame.height}" preserveAspectRatio="none" '
        f'href="data:image/png;base64,{picture}"/></svg>'
    )


def short_number(value: float) -> str:
    """A number for an axis: `1.2M`, `250k`, `0.05`, `3e-5`."""
    size = abs(value)
    for factor, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size >= factor:
            return f"{value / factor:.4g}{suffix}"
    if 0 < size < 1e-3:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"


@dataclass(frozen=True)
class _Frame:
    """Where the data lie in the picture."""

    left: float
    right: float
    bottom: float
    top: float
    width: int = _WIDTH - _LEFT - _RIGHT
    height: int = _HEIGHT - _TOP - _BOTTOM

    def x(self, values: Floats) -> Floats:
        return _LEFT + self.width * (values - self.left) / (self.right - self.left)

    def y(self, values: Floats) -> Floats:
        return _TOP + self.height * (1 - (values - self.bottom) / (self.top - self.bottom))

    def axes(self, x_label: str) -> str:
        ticks = _ticks(self.bottom, self.top, 5)
        lines = [
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" x="{_LEFT - 7}" y="{y + 5:.1f}" text-anchor="end">{short_number(tick)}</text>'
            for tick, y in zip(ticks, self.y(np.array(ticks)))
        ]
        return "".join(lines) + self.horizontal_ticks(x_label)

    def horizontal_ticks(self, x_label: str, grid: bool = True) -> str:
        """Tick labels; the name of the axis takes the place of the last one."""
        base, end = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
        room = end - 7.5 * len(x_label) - 24
        parts = [f'<text class="tick" x="{end}" y="{base + 20}" text-anchor="end">{escape(x_label)}</text>']
        for tick in _ticks(self.left, self.right, 6):
            x = self.x(np.array([tick]))[0]
            if grid:
                parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{base}"/>')
            if x < room:
                parts.append(
                    f'<text class="tick" x="{x:.1f}" y="{base + 20}" text-anchor="middle">{short_number(tick)}</text>'
                )
        return "".join(parts)


def _curve(frame: _Frame, line: Line, x: Floats, y: Floats) -> str:
    x, y = _thin(x, y)
    pixels = np.stack([frame.x(x), np.clip(frame.y(y), -9e3, 9e3)], axis=1)
    path = "M" + "L".join(f"{a:.1f},{b:.2f}" for a, b in pixels)
    kind = "points" if len(x) == 1 else line.kind
    head = f'class="{kind} c{line.colour % COLOURS}" data-name="{escape(line.name)}"'
    drawn = f'<path {head} d="{path}"/>'
    if kind == "points" and len(x) <= 60:
        drawn += "".join(
            f'<circle class="c{line.colour % COLOURS}" cx="{a:.1f}" cy="{b:.1f}" r="3.2"/>' for a, b in pixels
        )
    return drawn


def _finite(x: ArrayLike, y: ArrayLike) -> tuple[Floats, Floats]:
    x_N, y_N = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    finite = np.isfinite(x_N) & np.isfinite(y_N)
    return x_N[finite], y_N[finite]


def _range(curves: Sequence[Floats], references: Sequence[float]) -> tuple[float, float]:
    settled = [y[math.floor(_BEGINNING * y.size) :] for y in curves]
    shown = np.concatenate([*settled, np.array(references)])
    bottom, top = float(shown.min()), float(shown.max())
    if 0 <= bottom <= 0.5 * top:
        return 0.0, 1.06 * top or 1.0
    margin = 0.06 * (top - bottom) or 0.1 * abs(top) or 1.0
    return bottom - margin, top + margin


def _thin(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """At most `_MOST_POINTS` points: the least and the greatest of each stretch, so that no spike is lost."""
    if len(x) <= _MOST_POINTS:
        return x, y
    groups = np.array_split(np.arange(len(x)), _MOST_POINTS // 2)
    keep = sorted({int(group[pick(y[group])]) for group in groups for pick in (np.argmin, np.argmax)} | {len(x) - 1})
    return x[keep], y[keep]


def _ticks(low: float, high: float, number: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) inside a range."""
    raw = (high - low) / number
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    return [index * step for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _diverging(relative: Floats) -> NDArray[np.uint8]:
    """(H, W, 4) RGBA of loads in units of the uniform load: blue below 1, red above, the distance as opacity."""
    distance = np.clip(relative - 1, -1, 1)
    pixels = np.empty((*relative.shape, 4), dtype=np.uint8)
    pixels[..., :3] = np.where(distance[..., None] < 0, (33, 113, 212), (222, 67, 44))
    pixels[..., 3] = np.round(np.abs(distance) * 51) * 5  # 52 levels compress well and are finer than the eye
    return pixels


def _png(pixels: NDArray[np.uint8]) -> bytes:
    """A PNG of (H, W, 4) RGBA pixels."""
    height, width, _ = pixels.shape
    rows = np.zeros((height, 1 + 4 * width), dtype=np.uint8)  # each row begins with filter 0
    rows[:, 1:] = pixels.reshape(height, -1)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)

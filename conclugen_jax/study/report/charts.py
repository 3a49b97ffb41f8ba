"""The charts of a report, drawn by matplotlib as SVG that stands in a page: lines with intervals, maps, layers.

A chart is 360 units wide, the width of a phone, so that its text keeps its size there. Dashes, markers and words say the
same as the colours, which are names that ``page.css`` gives a value, one on light and one on dark ground.
"""

import html
import io
import itertools
import math
import re
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

from conclugen_jax.study.report.tables import printable

WIDTH = 360
TALLEST_MAP = 340
NUM_STYLES = 10
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
_DASHES = (None, (7, 3), (2, 2.5), (9, 3, 2, 3), (4, 2), (12, 3), (1.5, 4), (9, 2, 2, 2, 2, 2), (6, 6), (3, 1))
_COLOURS = (*(f"k{i}" for i in range(NUM_STYLES)), "ink", "soft", "grid", "card", "layer-a", "layer-b")
"""Names in page.css."""


def _colour(name: str) -> str:
    """Return a colour that stands for a name until the figure is saved."""
    return f"#c0de{_COLOURS.index(name):02x}"


_STYLE = {
    "svg.fonttype": "none",
    "figure.dpi": 72,
    "lines.linewidth": 1.8,
    "axes.facecolor": "none",
    "axes.grid.axis": "y",
    "ytick.major.size": 0,
    "text.color": _colour("ink"),
    **dict.fromkeys(("font.size", "axes.labelsize"), 11),
    **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
    **dict.fromkeys(("axes.spines.left", "axes.spines.right", "axes.spines.top"), False),
    **dict.fromkeys(("lines.scale_dashes", "text.parse_math"), False),
    **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), _colour("grid")),
    **dict.fromkeys(("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), _colour("soft")),
}
_styled = matplotlib.rc_context(_STYLE)


class Series(NamedTuple):
    """One line of a figure, its name shown on hover."""

    name: str
    style: int  # number of its colour, dash and marker
    points: Sequence[tuple[float, float, float, float]]  # x, y, low, high from left to right; low and high may be NaN
    band: bool = False  # whether low to high is an area, else a bar at each point


@_styled
def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str = "",
    x_ticks: Sequence[tuple[float, str]] = (),
    y_bounds: tuple[float, float] = (-math.inf, math.inf),
    height: int = 236,
) -> str:
    """Draw lines, each with a point at least, over a common axis.

    ``title`` is for readers that do not see it; ``x_ticks`` are (position, label), by default round numbers; the y axis never
    goes beyond ``y_bounds``; ``height`` is in units, of which the width has 360.
    """
    figure, axes = _framed(height, x_label, y_label)
    xs = [x for x, _ in x_ticks] or [p[0] for s in series for p in s.points]
    pad = (0.05 * np.ptp(xs) if x_ticks else 0) or (1 if np.ptp(xs) == 0 else 0)
    axes.set(xlim=(min(xs) - pad, max(xs) + pad), ylim=_y_range(np.concatenate([s.points for s in series]), y_bounds))
    for i, one in enumerate(series):
        # Bars stand side by side, all those of a place within 20 units.
        shift = 0 if one.band else min(5, 20 / len(series)) * (i - (len(series) - 1) / 2)
        _line(axes, one, shift, f", {x_label} " if one.band and not x_ticks else "")
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter("{x:.4g}")
    if x_ticks:
        axes.set_xticks(*zip(*x_ticks, strict=True))
    return _svg(figure, title)


def _framed(height: float, x_label: str, y_label: str) -> tuple[Figure, Axes]:
    """Return a figure with room for labels around its axes."""
    figure, top = Figure(figsize=(WIDTH / 72, height / 72)), 24 if y_label else 14
    axes = figure.add_axes((44 / WIDTH, 38 / height, 1 - 56 / WIDTH, 1 - (38 + top) / height), xlabel=x_label)
    figure.text(4 / WIDTH, 1 - 13 / height, y_label, color=_colour("soft"))
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter("{x:,.10g}")
    return figure, axes


def _y_range(points: np.ndarray, bounds: tuple[float, float]) -> tuple[float, float]:
    low, high = points[:, 1].min(), points[:, 1].max()
    # Intervals of few seeds can be wider than everything else: they may widen the axis so far and no further.
    room = max(0.5 * (high - low), 0.02 * max(abs(low), abs(high)), 1e-3)
    low, high = max(np.nanmin(points[:, 1:]), low - room), min(np.nanmax(points[:, 1:]), high + room)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    return max(low - margin, bounds[0]), min(high + margin, bounds[1])


def _line(axes: Axes, one: Series, shift: float, place: str) -> None:
    """Draw one line with its intervals and markers; ``place`` comes before a point's x on hover; empty: no x."""
    stroke, (xs, ys, lows, highs) = _stroke(one.style), np.array(one.points, float).T
    shifted = axes.transData + ScaledTranslation(shift / 72, 0, axes.figure.dpi_scale_trans)
    if one.band:
        axes.fill_between(xs, lows, highs, color=stroke["color"], alpha=0.15, linewidth=0)
    else:
        axes.vlines(xs, lows, highs, color=stroke["color"], linewidth=1.2, alpha=0.7, transform=shifted)
    _hint(axes.plot(xs, ys, **stroke, transform=shifted)[0], one.name)
    every = max(1, math.ceil(len(xs) / 7)) if one.band else 1
    for x, y, low, high in one.points[every // 2 if len(xs) > 1 else 0 :: every]:
        shown = f"{place}{x:,.6g}" if place else ""
        between = "" if math.isnan(low) else f" [{low:.4g}, {high:.4g}]"
        mark = axes.plot(x, y, transform=shifted, **_marker(one.style))[0]
        _hint(mark, f"{one.name}{shown}: {y:.4g}{between}")


def _stroke(style: int) -> dict[str, Any]:
    """Return arguments of a plot of a line."""
    return {"color": _colour(f"k{style % NUM_STYLES}"), "linestyle": (0, _DASHES[style % NUM_STYLES])}


def _marker(style: int, size: float = 6.5) -> dict[str, Any]:
    """Return arguments of a plot of markers alone: another shape for each of ten styles, and again after ten."""
    return {
        "color": _colour(f"k{style % NUM_STYLES}"),
        "linestyle": "",
        "marker": _MARKERS[(style + style // NUM_STYLES) % NUM_STYLES],
        "markersize": size,
        "clip_on": False,
        "markeredgecolor": _colour("card"),
        "markeredgewidth": 0.8,
    }


@_styled
def swatch(style: int) -> str:
    """Draw a legend's sample of a style, 26 by 12 units."""
    figure = Figure(figsize=(26 / 72, 12 / 72))
    figure.add_artist(Line2D([0, 1], [0.5, 0.5], **_stroke(style)))
    figure.add_artist(Line2D([0.5], [0.5], **_marker(style)))
    return _svg(figure, "", kind="swatch")


@_styled
def scatter(title: str, points: np.ndarray, groups: np.ndarray, names: Sequence[str]) -> str:
    """Draw the points [n, 2] of a map in numbered groups [n], a colour and marker each, its name amid its points."""
    edge, low, high = 10, points.min(axis=0), points.max(axis=0)
    spread = np.where(high > low, high - low, 1)
    scale = min((np.array([WIDTH, TALLEST_MAP]) - 2 * edge) / spread)
    height = max(scale * spread[1] + 2 * edge, 120)
    places = (points - (low + high) / 2) * scale + (WIDTH / 2, height / 2)
    figure = Figure(figsize=(WIDTH / 72, height / 72))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0))
    axes.axis("off")
    members = {g: places[groups == g] for g in np.unique(groups)}
    for g, own in members.items():
        style = {**_marker(g, 5 if len(points) <= 600 else 3.8), "markeredgewidth": 0, "alpha": 0.8}
        _hint(axes.plot(*own.T, **style)[0], f"{names[g]}: {len(own)} points")
    for g, own in members.items():
        # At the point nearest to the medians: a mean may be between two clusters, where there is no point.
        x, y = own[np.square(own - np.median(own, axis=0)).sum(axis=1).argmin()]
        side = ("left", "center", "right")[int(3 * x / WIDTH)]
        name = printable(names[g])
        short = name if len(name) <= 16 else f"{name[:15]}…"
        _hint(axes.text(x, max(y - 6, 12), short, ha=side, weight="bold"), names[g])  # above the point, not upon it
    return _svg(figure, title)


@_styled
def stacked(title: str, xs: Sequence[float], shares: Sequence[Sequence[float]], *, x_label: str) -> str:
    """Draw shares of a whole, of each x from large to small, as layers, the largest at the bottom."""
    figure, axes = _framed(200, x_label, "share of the points")
    layers = list(itertools.zip_longest(*shares, fillvalue=0.0))
    colours = [_colour("layer-a"), _colour("layer-b")]
    drawn = axes.stackplot(xs, *layers, colors=colours, edgecolor=_colour("card"), linewidth=0.7)
    for k, (layer, area) in enumerate(zip(layers, drawn, strict=True), 1):
        _hint(area, f"number {k} by size: {100 * layer[-1]:.1f} % at the end")
    axes.margins(x=0)
    axes.set(ylim=(0, 1))
    axes.set_yticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
    return _svg(figure, title)


def _hint(artist: Artist, text: str) -> None:
    """Show a text while the pointer is over an artist."""
    artist.set_gid(f"hint {html.escape(text)}")


def _svg(figure: Figure, title: str, kind: str = "figure") -> str:
    """Return a figure as SVG that stands in a page: no ids but those it refers to, no style beyond itself."""
    file = io.StringIO()
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.hashsalt": f"{kind} {title}"}):
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a reader's fonts may have it
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    drawn = re.sub("<[^>]+>", _in_page, file.getvalue().split("</style>\n </defs>", 1)[1])
    drawn = re.sub(r"(<g[^>]*)>((?:\s*<use [^>]*/>)+)", _styled_together, drawn)
    role = f'role="img" aria-label="{html.escape(title)}"' if title else 'aria-hidden="true"'
    width, height = 72 * figure.get_size_inches()
    return f'<svg class="{kind}" viewBox="0 0 {width:.0f} {height:.0f}" {role}>{drawn}'


def _in_page(tag: re.Match) -> str:
    """Return a tag of matplotlib's with our colours and hints, without ids of its own and long numbers."""
    hint = re.fullmatch('<g id="hint ([^"]*)">', tag[0])
    if hint:
        return f'<g class="part"><title>{html.unescape(hint[1])}</title>'
    text = re.sub(r' id="[^"]*_\d{1,6}"', "", tag[0].replace("xlink:href", "href"))
    text = re.sub(r"(\d\.\d\d)\d+", r"\1", text)
    return re.sub("#c0de(..)", lambda colour: f"var(--{_COLOURS[int(colour[1], 16)]})", text)


def _styled_together(group: re.Match) -> str:
    """Give a group of markers the style that each of them has."""
    style = re.search(r' style="[^"]*"', group[2])[0]
    return f"{group[1]}{style}>{group[2].replace(style, '')}"

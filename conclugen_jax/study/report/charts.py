"""The charts of a report: lines with intervals, confusion matrices, maps, layers.

A chart is 360 units wide, the width of a phone, so that its text keeps its size there. Dashes, markers and words say the
same as the colours.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import ScaledTranslation

from conclugen_jax.study.report.drawing import (
    LETTER,
    NUM_STYLES,
    WIDTH,
    Drawing,
    colour,
    letters_of,
    shortened,
    styled,
)

TALLEST_MAP = 340
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
_DASHES = ("-", (7, 3), (2, 2.5), (9, 3, 2, 3), (4, 2), (12, 3), (1.5, 4), (9, 2, 2, 2, 2, 2), (6, 6), (3, 1))


class Series(NamedTuple):
    """One line of a figure.

    Attributes:
      name: shown on hover.
      style: number of its colour, dash and marker.
      points: (x, y, low, high) from left to right; low and high may be ``None``.
      band: whether low to high is an area, else a bar at each point.
    """

    name: str
    style: int
    points: Sequence[tuple[float, float, float | None, float | None]]
    band: bool = False


@styled
def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    x_ticks: Sequence[tuple[float, str]] = (),
    y_bounds: tuple[float, float] = (-math.inf, math.inf),
    height: int = 236,
) -> str:
    """Draw lines over a common axis.

    Args:
      title: what it shows, for readers that do not see it.
      series: the lines, each with a point at least.
      x_label: under the axis.
      y_label: above the axis.
      x_ticks: (position, label); round numbers by default.
      y_bounds: the axis never goes beyond.
      height: in units; the width is 360.
    """
    drawing = Drawing(height)
    axes = drawing.axes(44, 24 if y_label else 14, WIDTH - 12, height - 38)
    xs = [x for x, _ in x_ticks] or [p[0] for s in series for p in s.points]
    pad = (0.05 * (max(xs) - min(xs)) if x_ticks else 0) or (1 if max(xs) == min(xs) else 0)
    axes.set(xlabel=x_label, xlim=(min(xs) - pad, max(xs) + pad), ylim=_y_range(series, y_bounds))
    drawing.word(4, 13, y_label)
    for i, one in enumerate(series):
        # Bars stand side by side, all those of a place within 20 units.
        shift = 0 if one.band else min(5, 20 / len(series)) * (i - (len(series) - 1) / 2)
        _line(drawing, axes, one, shift, f", {x_label} " if one.band else "")
    if x_ticks:
        axes.set_xticks([x for x, _ in x_ticks], [label for _, label in x_ticks])
    else:
        _round_ticks(axes.xaxis, "{:,.10g}", 4, integer=True)
    _round_ticks(axes.yaxis, "{:.4g}", 6)
    return drawing.svg(title)


def _round_ticks(axis: Any, form: str, most: int, *, integer: bool = False) -> None:
    axis.set_major_locator(MaxNLocator(most, steps=[1, 2, 5, 10], integer=integer))
    axis.set_major_formatter(FuncFormatter(lambda x, _: form.format(round(x, 12))))


def _y_range(series: Sequence[Series], bounds: tuple[float, float]) -> tuple[float, float]:
    values = [p[1] for s in series for p in s.points]
    low, high = min(values), max(values)
    # Intervals of few seeds can be wider than everything else: they may widen the axis so far and no further.
    room = max(0.5 * (high - low), 0.02 * max(abs(low), abs(high)), 1e-3)
    ends = [x for s in series for p in s.points for x in p[2:] if x is not None]
    low, high = max(min([low, *ends]), low - room), min(max([high, *ends]), high + room)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    return max(low - margin, bounds[0]), min(high + margin, bounds[1])


def _line(drawing: "Drawing", axes: Axes, one: Series, shift: float, place: str) -> None:
    """Draw one line with its intervals and markers; ``place`` comes before a point's x on hover; empty: no x."""
    own = colour(f"k{one.style % NUM_STYLES}")
    shifted = axes.transData + ScaledTranslation(shift / 72, 0, axes.figure.dpi_scale_trans)
    x, y = [p[0] for p in one.points], [p[1] for p in one.points]
    ranged = [p for p in one.points if p[2] is not None and p[3] is not None]
    if ranged:
        at, _, low, high = zip(*ranged, strict=True)
        if one.band:
            axes.fill_between(at, low, high, color=own, alpha=0.15, linewidth=0)
        else:
            axes.vlines(at, low, high, color=own, linewidth=1.2, alpha=0.7, transform=shifted)
    style = {"color": own, "linewidth": 1.8, "linestyle": _dash(one.style), "transform": shifted}
    drawing.hint(axes.plot(x, y, **style)[0], one.name)
    every = max(1, math.ceil(len(x) / 7)) if one.band else 1
    for i in range(every // 2 if len(x) > 1 else 0, len(x), every):
        _, _, low, high = one.points[i]
        shown = f"{place}{x[i]:,.6g}" if place else ""
        between = "" if low is None or high is None else f" [{low:.4g}, {high:.4g}]"
        mark = axes.plot(x[i], y[i], transform=shifted, **_marker(one.style))[0]
        drawing.hint(mark, f"{one.name}{shown}: {y[i]:.4g}{between}")


def _dash(style: int) -> Any:
    dash = _DASHES[style % NUM_STYLES]
    return dash if dash == "-" else (0, dash)


def _marker(style: int, size: float = 6.5) -> dict[str, Any]:
    """Return arguments of a plot of markers alone: another shape for each of ten styles, and again after ten."""
    shape = _MARKERS[(style + style // NUM_STYLES) % NUM_STYLES]
    edge = {"markeredgecolor": colour("card"), "markeredgewidth": 0.8}
    return {
        "color": colour(f"k{style % NUM_STYLES}"),
        "linestyle": "",
        "marker": shape,
        "markersize": size,
        "clip_on": False,
        **edge,
    }


@styled
def swatch(style: int) -> str:
    """Draw a legend's sample of a style, 26 by 12 units."""
    drawing = Drawing(12, width=26)
    line = {"linewidth": 1.8, "linestyle": _dash(style), "color": colour(f"k{style % NUM_STYLES}")}
    drawing.figure.add_artist(Line2D([0, 1], [0.5, 0.5], **line))
    drawing.figure.add_artist(Line2D([0.5], [0.5], **_marker(style)))
    return drawing.svg("", kind="swatch")


@styled
def confusion(title: str, matrix: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """Draw rows of true classes as shares of their examples, in % in the cells, counts on hover."""
    n, letters = len(names), 13 if len(names) <= 12 else 9
    short = [shortened(name, letters) for name in names]
    upright = max(map(letters_of, short)) <= 3
    rows = [f"{name} ({sum(row)})" for name, row in zip(short, matrix, strict=True)]
    left = 14 + LETTER * max(map(letters_of, rows))
    slant = [0.72 * LETTER * letters_of(name) for name in short]
    right = 4 if upright else max(4, *(4 + width - 14 * (n - 1 - j) for j, width in enumerate(slant)))
    top = 40 if upright else 30 + max(slant)
    size = min((WIDTH - left - right) / n, 40)
    drawing = Drawing(top + size * n + 8)
    axes = drawing.axes(left, top, left + size * n, top + size * n)
    turned = {} if upright else {"rotation": 45, "ha": "left", "rotation_mode": "anchor"}
    _heat(drawing, axes, matrix, lambda i, j: f"true {names[i]}, predicted {names[j]}", numbers=size >= 17)
    places = [i + 0.5 for i in range(n)]
    axes.set_xticks(places, short, **turned)
    axes.set_yticks(places, rows)
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        for label, name, shown in zip(labels, names, short, strict=True):
            if shown != name:
                drawing.hint(label, name)
    drawing.word(4, 14, "true class (examples)")
    drawing.word(WIDTH - 4, 14, "predicted class", ha="right")
    return drawing.svg(title)


@styled
def confusion_pairs(title: str, matrices: Sequence[Sequence[Sequence[int]]], names: Sequence[str]) -> str:
    """Draw one 2 x 2 matrix per label: absent and present (rows) against not predicted and predicted."""
    width, height, size, columns = 118, 132, 76, 3
    drawing = Drawing(height * math.ceil(len(names) / columns))
    for k, (name, matrix) in enumerate(zip(names, matrices, strict=True)):
        left, top = 36 + width * (k % columns), 44 + height * (k // columns)
        axes = drawing.axes(left, top, left + size, top + size)
        heading = drawing.word(left + size / 2, top - 26, shortened(name, 14), "ink", ha="center", weight="bold")
        drawing.hint(heading, name)
        answers = [(name, a, p) for a in ("absent", "present") for p in ("not predicted", "predicted")]
        _heat(drawing, axes, matrix, lambda i, j, answers=answers: "{}: {}, {}".format(*answers[2 * i + j]))
        axes.set_xticks([0.5, 1.5], ["no", "yes"])
        axes.set_yticks([0.5, 1.5], ["no", "yes"])
    return drawing.svg(title)


def _heat(
    drawing: "Drawing",
    axes: Axes,
    matrix: Sequence[Sequence[int]],
    describe: Callable[[int, int], str],
    *,
    numbers: bool = True,
) -> None:
    """Draw a matrix of counts as shares of its rows; ``describe``: row and column -> their name on hover."""
    for i, row in enumerate(matrix):
        for j, count in enumerate(row):
            share = count / sum(row) if sum(row) else 0.0
            face = matplotlib.colors.to_rgba(colour("heat"), round(share, 3))
            cell = axes.add_patch(Rectangle((j, i), 1, 1, facecolor=face, edgecolor=colour("rule"), clip_on=False))
            drawing.hint(cell, f"{describe(i, j)}: {count} of {sum(row)} ({100 * share:.1f} %)")
            if numbers:
                ink = colour("deep" if share > 0.75 else "ink")
                axes.text(j + 0.5, i + 0.5, f"{100 * share:.0f}", size=10, color=ink, ha="center", va="center_baseline")
    axes.set(xlim=(0, len(matrix[0])), ylim=(len(matrix), 0))
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, bottom=False, top=True, labelbottom=False, labeltop=True)


@styled
def scatter(title: str, points: Sequence[tuple[float, float]], groups: Sequence[int], names: Sequence[str]) -> str:
    """Draw the points of a map, a colour and marker per group, its name at the middle of its points.

    Args:
      title: what it shows.
      points: positions.
      groups: number of the group of each point.
      names: of the groups.
    """
    edge = 10
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    wide, tall = max(xs) - min(xs) or 1, max(ys) - min(ys) or 1
    scale = min((WIDTH - 2 * edge) / wide, (TALLEST_MAP - 2 * edge) / tall)
    height = max(scale * tall + 2 * edge, 120)
    middle = (max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2
    drawing = Drawing(height)
    axes = drawing.axes(0, 0, WIDTH, height)
    axes.set(xlim=(0, WIDTH), ylim=(height, 0))
    axes.axis("off")
    members = {g: [] for g in sorted(set(groups))}
    for (x, y), g in zip(points, groups, strict=True):
        members[g].append((WIDTH / 2 + scale * (x - middle[0]), height / 2 + scale * (y - middle[1])))
    for g, places in members.items():
        style = {**_marker(g, 5 if len(points) <= 600 else 3.8), "markeredgewidth": 0, "alpha": 0.8}
        drawing.hint(axes.plot(*zip(*places, strict=True), **style)[0], f"{names[g]}: {len(places)} points")
    for g, places in members.items():
        x, y = _most_central(places)
        half = 0.65 * LETTER * letters_of(shortened(names[g], 16)) + 3
        x, y = min(max(x, half), WIDTH - half), max(y - 6, 12)  # above the point, which would be hidden
        word = drawing.word(x, y, shortened(names[g], 16), "ink", ha="center", weight="bold")
        drawing.hint(word, names[g], kind="word")
    return drawing.svg(title)


def _most_central(places: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the point nearest to the medians: a mean may lie between two heaps, where no point is."""
    x, y = (sorted(p[i] for p in places)[len(places) // 2] for i in (0, 1))
    return min(places, key=lambda p: (p[0] - x) ** 2 + (p[1] - y) ** 2)


@styled
def stacked(title: str, xs: Sequence[float], shares: Sequence[Sequence[float]], *, x_label: str) -> str:
    """Draw shares of a whole over time as layers, the largest at the bottom.

    Args:
      title: what it shows.
      xs: positions, ascending.
      shares: of each position, from large to small, adding up to 1.
      x_label: under the axis.
    """
    drawing = Drawing(200)
    axes = drawing.axes(44, 24, WIDTH - 12, 200 - 38)
    drawing.word(4, 13, "share of the points")
    layers = list(itertools.zip_longest(*shares, fillvalue=0.0))
    colours = [colour("layer-a"), colour("layer-b")]
    drawn = axes.stackplot(xs, *layers, colors=colours, edgecolor=colour("card"), linewidth=0.7)
    for k, (layer, area) in enumerate(zip(layers, drawn, strict=True), 1):
        drawing.hint(area, f"number {k} by size: {100 * layer[-1]:.1f} % at the end")
    axes.margins(x=0)
    axes.set(xlabel=x_label, ylim=(0, 1))
    axes.set_yticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
    _round_ticks(axes.xaxis, "{:,.10g}", 4, integer=True)
    return drawing.svg(title)

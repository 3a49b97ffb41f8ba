"""Figures as inline SVG: lines with intervals, confusion matrices, scattered points, stacked shares.

A figure is 360 units wide, the width of a phone, so that its text keeps its size there. Colours come from the page
(classes ``k0`` to ``k9``); dashes, markers and words say the same as the colours.
"""

import html
import itertools
import math
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

WIDTH = 360
NUM_STYLES = 10
TALLEST_MAP = 340
_DASHES = ("", "7 3", "2 2.5", "9 3 2 3", "4 2", "12 3", "1.5 4", "9 2 2 2 2 2", "6 6", "3 1")
_LETTER = 6.5  # mean width of a character at 11 units, generous


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


def text(value: Any) -> str:
    """Any text for HTML and SVG: escaped, and without characters that a page cannot hold."""
    kept = "".join(c if c in "\n\t" or (c >= " " and not "\x7f" <= c <= "\x9f") else "\ufffd" for c in str(value))
    return html.escape(kept.encode("utf-8", "replace").decode("utf-8"), quote=True)


def letters_of(name: str) -> int:
    """Width of a text in letters; Chinese, Japanese and Korean characters are two wide."""
    return sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in name)


def shortened(name: str, letters: int) -> str:
    """At most so many letters wide, the last one an ellipsis where some are left out."""
    if letters_of(name) <= letters:
        return name
    while name and letters_of(name) >= letters:
        name = name[:-1]
    return f"{name}…"


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from ``low`` to ``high``, about ``most`` of them."""
    span = high - low
    if not span > 0 or not math.isfinite(span):
        return [low]
    rough = span / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def marker(style: int, x: float, y: float, r: float = 3.2) -> str:
    """Path of a marker: another shape for each of ten styles, and again after ten."""
    shape = (style + style // NUM_STYLES) % NUM_STYLES
    outlines = {
        1: [(-1, -1), (1, -1), (1, 1), (-1, 1)],
        2: [(0, -1.25), (1.15, 0.85), (-1.15, 0.85)],
        3: [(0, -1.4), (1.4, 0), (0, 1.4), (-1.4, 0)],
        4: [(0, 1.25), (1.15, -0.85), (-1.15, -0.85)],
        5: [(-1.3, -0.45), (1.3, -0.45), (1.3, 0.45), (-1.3, 0.45)],
        6: [(-0.45, -1.3), (0.45, -1.3), (0.45, 1.3), (-0.45, 1.3)],
        7: [(-1.1, -1.1), (1.1, -1.1), (-1.1, 1.1), (1.1, 1.1)],
        8: [(-1.25, 0), (0.85, -1.15), (0.85, 1.15)],
        9: [(1.25, 0), (-0.85, -1.15), (-0.85, 1.15)],
    }
    if shape == 0:
        return f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r:.1f} 0a{r} {r} 0 1 0 {-2 * r:.1f} 0z"
    return "M" + "L".join(f"{x + r * dx:.1f} {y + r * dy:.1f}" for dx, dy in outlines[shape]) + "z"


def swatch(style: int, *, line: bool) -> str:
    """A legend's sample of a style, 26 by 12 units."""
    drawn = f'<path d="M0 6H26" class="line"{_dash(style)}/>' if line else ""
    return (
        f'<svg class="swatch k{style % NUM_STYLES}" viewBox="0 0 26 12" width="26" height="12" aria-hidden="true">{drawn}'
        f'<path d="{marker(style, 13, 6, 3.6)}" class="mark"/></svg>'
    )


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    x_ticks: Sequence[tuple[float, str]] = (),
    y_format: Callable[[float], str] = "{:g}".format,
    y_bounds: tuple[float, float] = (-math.inf, math.inf),
    height: int = 236,
) -> str:
    """Lines over a common axis.

    Args:
      title: what it shows, for readers that do not see it.
      series: the lines; at least one has a point.
      x_label: under the axis.
      y_label: above the axis.
      x_ticks: (position, label); round numbers by default.
      y_format: value -> text.
      y_bounds: the axis never goes beyond.
      height: in units; the width is 360.
    """
    left, right, top, bottom = 44, 12, 24 if y_label else 14, 38
    xs = [x for x, _ in x_ticks] or [p[0] for s in series for p in s.points]
    low, high = _y_range(series, y_bounds)
    x_low, x_high = min(xs), max(xs)
    pad = 0.05 * (x_high - x_low) if x_ticks else 0
    x_low, x_high = x_low - pad - (x_low == x_high), x_high + pad + (x_low == x_high)

    def at(x: float, y: float) -> tuple[float, float]:
        inside = min(max(y, low), high)  # a whisker that leaves the axis ends at its edge
        return (
            left + (WIDTH - left - right) * (x - x_low) / (x_high - x_low),
            height - bottom - (height - top - bottom) * (inside - low) / (high - low),
        )

    parts = [f'<text x="4" y="13" class="axis">{text(y_label)}</text>']
    for y in ticks(low, high):
        _, v = at(x_low, y)
        parts.append(f'<path d="M{left} {v:.1f}H{WIDTH - right}" class="grid"/>')
        parts.append(f'<text x="{left - 6}" y="{v + 4:.1f}" class="tick end">{text(y_format(y))}</text>')
    for x, label in x_ticks or [(x, f"{x:,.10g}") for x in ticks(x_low, x_high, 4)]:
        h, _ = at(x, low)
        parts.append(f'<path d="M{h:.1f} {height - bottom}v4" class="grid"/>')
        parts.append(f'<text x="{h:.1f}" y="{height - bottom + 16}" class="tick middle">{text(label)}</text>')
    parts.append(
        f'<text x="{(left + WIDTH - right) / 2:.0f}" y="{height - 5}" class="axis middle">{text(x_label)}</text>'
    )
    drawn = [s for s in series if s.points]
    for i, one in enumerate(drawn):
        # Bars stand side by side, all those of a place within 20 units.
        shift = 0 if one.band else min(5, 20 / len(drawn)) * (i - (len(drawn) - 1) / 2)
        parts.append(_line(one, at, shift, x_label, y_format))
    return _svg(height, title, parts)


def _y_range(series: Sequence[Series], bounds: tuple[float, float]) -> tuple[float, float]:
    values = [p[1] for s in series for p in s.points]
    low, high = min(values), max(values)
    # Intervals of few seeds can be wider than everything else: they may widen the axis so far and no further.
    room = max(0.5 * (high - low), 0.02 * max(abs(low), abs(high)), 1e-3)
    ends = [x for s in series for p in s.points for x in p[2:] if x is not None]
    low, high = max(min([low, *ends]), low - room), min(max([high, *ends]), high + room)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    return max(low - margin, bounds[0]), min(high + margin, bounds[1])


def _line(one: Series, at: Callable, shift: float, x_label: str, y_format: Callable[[float], str]) -> str:
    places = [at(x, y) for x, y, _, _ in one.points]
    path = "M" + "L".join(f"{h + shift:.1f} {v:.1f}" for h, v in places)
    ranged = [p for p in one.points if p[2] is not None and p[3] is not None]
    parts = []
    if one.band and len(ranged) > 1:
        edge = [at(x, high) for x, _, _, high in ranged] + [at(x, low) for x, _, low, _ in reversed(ranged)]
        parts.append('<path class="band" d="M' + "L".join(f"{h:.1f} {v:.1f}" for h, v in edge) + 'z"/>')
    elif not one.band:
        bars = [(at(x, low), at(x, high)) for x, _, low, high in ranged]
        parts += [f'<path class="bar" d="M{h + shift:.1f} {v:.1f}V{w:.1f}"/>' for (h, v), (_, w) in bars]
    parts.append(f'<path d="{path}" class="line"{_dash(one.style)}/>')
    every = max(1, math.ceil(len(places) / 7)) if one.band else 1
    chosen = list(range(every // 2 if len(places) > 1 else 0, len(places), every)) or [0]
    for i in chosen:
        x, y, low, high = one.points[i]
        between = "" if low is None or high is None else f" [{y_format(low)}, {y_format(high)}]"
        hint = f"<title>{text(one.name)}, {text(x_label)} {x:,.6g}: {text(y_format(y) + between)}</title>"
        if not one.band:
            hint = f"<title>{text(one.name)}: {text(y_format(y) + between)}</title>"
        parts.append(f'<path d="{marker(one.style, places[i][0] + shift, places[i][1])}" class="mark">{hint}</path>')
    return f'<g class="k{one.style % NUM_STYLES}"><title>{text(one.name)}</title>{"".join(parts)}</g>'


def confusion(title: str, matrix: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """Rows of true classes as shares of their examples, in % in the cells, counts on hover."""
    n, letters = len(names), 13 if len(names) <= 12 else 9
    short = [shortened(name, letters) for name in names]
    upright = max(map(letters_of, short)) <= 3
    rows = [f"{name} ({sum(row)})" for name, row in zip(short, matrix, strict=True)]
    left = 14 + _LETTER * max(map(letters_of, rows))
    right = (
        4 if upright else max(4 + 0.72 * _LETTER * letters_of(name) - 14 * (n - 1 - j) for j, name in enumerate(short))
    )
    top = 40 if upright else 30 + 0.72 * _LETTER * max(map(letters_of, short))
    size = min((WIDTH - left - right) / n, 40)
    parts = [
        '<text x="4" y="14" class="axis">true class (examples)</text>',
        f'<text x="{WIDTH - 4}" y="14" class="axis end">predicted class</text>',
    ]
    for i, (name, row) in enumerate(zip(names, matrix, strict=True)):
        x, y, total = left + size * (i + 0.5), top + size * (i + 0.5), sum(row)
        turned = f'x="{x:.1f}" y="{top - 6:.1f}" class="tick middle"'
        if not upright:
            turned = f'transform="translate({x + 3:.1f} {top - 6:.1f}) rotate(-45)" class="tick"'
        parts.append(
            f'<text x="{left - 6:.1f}" y="{y + 4:.1f}" class="tick end">{_named(name, letters)} ({total})</text>'
            f"<text {turned}>{_named(name, letters)}</text>"
        )
        for j, count in enumerate(row):
            share = count / total if total else 0
            hint = f"true {name}, predicted {names[j]}: {count} of {total} ({100 * share:.1f} %)"
            label = f"{100 * share:.0f}" if size >= 17 else ""
            parts.append(_shade(left + size * j, top + size * i, size, share, hint, label))
    return _svg(top + size * n + 8, title, parts)


def confusion_pairs(title: str, matrices: Sequence[Sequence[Sequence[int]]], names: Sequence[str]) -> str:
    """One 2 x 2 matrix per label: absent and present (rows) against not predicted and predicted."""
    width, height, size, columns = 118, 132, 38, 3
    parts = []
    for k, (name, matrix) in enumerate(zip(names, matrices, strict=True)):
        x, y = 2 + width * (k % columns) + 34, 44 + height * (k // columns)
        parts.append(f'<text x="{x + size}" y="{y - 26}" class="axis middle strong">{_named(name, 14)}</text>')
        for i, answer in enumerate(("no", "yes")):
            parts.append(f'<text x="{x + size * (i + 0.5)}" y="{y - 6}" class="tick middle">{answer}</text>')
            parts.append(f'<text x="{x - 5}" y="{y + size * (i + 0.5) + 4}" class="tick end">{answer}</text>')
            total = sum(matrix[i])
            for j, count in enumerate(matrix[i]):
                share = count / total if total else 0
                hint = (
                    f"{name}: {('absent', 'present')[i]}, {('not predicted', 'predicted')[j]}: {count} of {total} "
                    f"({100 * share:.1f} %)"
                )
                parts.append(_shade(x + size * j, y + size * i, size, share, hint, f"{100 * share:.0f}"))
    return _svg(height * math.ceil(len(names) / columns), title, parts)


def _shade(x: float, y: float, size: float, share: float, hint: str, label: str) -> str:
    cell = f'<rect x="{x:.1f}" y="{y:.1f}" width="{size:.1f}" height="{size:.1f}" class="cell"/>'
    fill = f'<rect x="{x:.1f}" y="{y:.1f}" width="{size:.1f}" height="{size:.1f}" class="heat" fill-opacity="{share:.3f}"/>'
    tone = "deep" if share > 0.75 else "pale"
    word = (
        f'<text x="{x + size / 2:.1f}" y="{y + size / 2 + 4:.1f}" class="count {tone}">{label}</text>' if label else ""
    )
    return f"<g><title>{text(hint)}</title>{cell}{fill}{word}</g>"


def scatter(title: str, points: Sequence[tuple[float, float]], groups: Sequence[int], names: Sequence[str]) -> str:
    """Points of a map, a colour and marker per group, its name at the middle of its points.

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
    radius = 2.5 if len(points) <= 600 else 1.9
    members = {g: [] for g in sorted(set(groups))}
    for (x, y), g in zip(points, groups, strict=True):
        members[g].append((WIDTH / 2 + scale * (x - middle[0]), height / 2 + scale * (y - middle[1])))
    parts, words = [], []
    for g, places in members.items():
        path = "".join(marker(g, x, y, radius) for x, y in places)
        hint = f"<title>{text(names[g])}: {len(places)} points</title>"
        parts.append(f'<path d="{path}" class="point k{g % NUM_STYLES}">{hint}</path>')
        h, v = _most_central(places)
        half = 0.65 * _LETTER * letters_of(shortened(names[g], 16)) + 3
        h, v = min(max(h, half), WIDTH - half), max(v - 6, 12)  # above the point, which would be hidden
        words.append(f'<text x="{h:.1f}" y="{v:.1f}" class="word middle">{_named(names[g], 16)}</text>')
    return _svg(height, title, parts + words)


def _most_central(places: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The point nearest to the medians: a mean may lie between two heaps, where no point is."""
    h, v = (sorted(p[i] for p in places)[len(places) // 2] for i in (0, 1))
    return min(places, key=lambda p: (p[0] - h) ** 2 + (p[1] - v) ** 2)


def stacked(title: str, xs: Sequence[float], shares: Sequence[Sequence[float]], *, x_label: str) -> str:
    """Shares of a whole over time as layers, the largest at the bottom.

    Args:
      title: what it shows.
      xs: positions, ascending.
      shares: of each position, from large to small, adding up to 1.
      x_label: under the axis.
    """
    height, left, right, top, bottom = 200, 44, 12, 24, 38
    span = (xs[-1] - xs[0]) or 1

    def at(x: float, y: float) -> str:
        v = height - bottom - (height - top - bottom) * y
        return f"{left + (WIDTH - left - right) * (x - xs[0]) / span:.1f} {v:.1f}"

    parts = ['<text x="4" y="13" class="axis">share of the points</text>']
    below = [0.0] * len(xs)
    for k in range(max(map(len, shares))):
        above = [b + (s[k] if k < len(s) else 0) for b, s in zip(below, shares, strict=True)]
        edge = [at(x, y) for x, y in zip(xs, above, strict=True)]
        edge += [at(x, y) for x, y in zip(reversed(xs), reversed(below), strict=True)]
        last = shares[-1][k] if k < len(shares[-1]) else 0
        hint = f"<title>number {k + 1} by size: {100 * last:.1f} % at the end</title>"
        parts.append(f'<path d="M{"L".join(edge)}z" class="layer {"even" if k % 2 else "odd"}">{hint}</path>')
        below = above
    for y in (0, 0.5, 1):
        v = at(xs[0], y).split()[1]
        parts.append(f'<text x="{left - 6}" y="{float(v) + 4:.1f}" class="tick end">{100 * y:.0f} %</text>')
    for x in ticks(xs[0], xs[-1], 4):
        h = at(x, 0).split()[0]
        parts.append(f'<text x="{h}" y="{height - bottom + 16}" class="tick middle">{x:,.10g}</text>')
    parts.append(
        f'<text x="{(left + WIDTH - right) / 2:.0f}" y="{height - 5}" class="axis middle">{text(x_label)}</text>'
    )
    return _svg(height, title, parts)


def _named(name: str, letters: int) -> str:
    short = shortened(name, letters)
    return text(short) if short == name else f"{text(short)}<title>{text(name)}</title>"


def _dash(style: int) -> str:
    dash = _DASHES[style % NUM_STYLES]
    return f' stroke-dasharray="{dash}"' if dash else ""


def _svg(height: float, title: str, parts: Sequence[str]) -> str:
    body = "\n".join(itertools.chain(parts))
    return (
        f'<svg class="figure" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{text(title)}">\n{body}\n</svg>'
    )

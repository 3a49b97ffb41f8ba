"""What the notebooks show: tables and pictures, by matplotlib (extra ``notebooks``)."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

MARKERS = "osD^vP*Xd<>ph"


class Table:
    """A table that a notebook shows as HTML and a terminal as text."""

    def __init__(self, columns: Sequence[str], rows: Sequence[Sequence[Any]]):
        self.columns = list(columns)
        self.rows = [[f"{x:.3f}" if isinstance(x, float) else str(x) for x in row] for row in rows]

    def _repr_markdown_(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)

    def __repr__(self) -> str:
        return "\n".join("\t".join(line) for line in [self.columns, *self.rows])


class Picture:
    """A figure of matplotlib that a notebook shows, whatever backend it has."""

    def __init__(self, figure: Any):
        self.figure = figure

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=110)
        return buffer.getvalue()


def curves(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x: str,
    y: str,
    spread: Mapping[str, Sequence[float]] | None = None,
) -> Picture:
    """A figure of lines, name -> (xs, ys), told apart by colour and marker; ``spread``: name -> half height of its bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for i, (name, (xs, ys)) in enumerate(lines.items()):
        bars = None if spread is None else spread[name]
        style = {"marker": MARKERS[i % len(MARKERS)], "markevery": max(1, len(xs) // 8), "capsize": 3}
        axes.errorbar(xs, ys, yerr=bars, label=name, **style)
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    axes.legend()
    return Picture(figure)


def map_of(positions: np.ndarray, groups: np.ndarray, names: Sequence[str], *, title: str) -> Picture:
    """A figure of points [n, 2], each group in a colour and marker of its own."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(names):
        own = positions[groups == i]
        axes.scatter(own[:, 0], own[:, 1], s=14, marker=MARKERS[i % len(MARKERS)], label=str(name))
    axes.set(title=title, xticks=[], yticks=[])
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return Picture(figure)


def bars(values: Mapping[str, Mapping[str, float]], *, y: str) -> Picture:
    """A figure of grouped bars: group -> name -> height."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    names = list(next(iter(values.values())))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        heights = [group[name] for group in values.values()]
        drawn = axes.bar(
            np.arange(len(values)) + i * width, heights, width * 0.95, label=name, hatch=["", "//", "xx"][i % 3]
        )
        axes.bar_label(drawn, fmt="%.2f", fontsize=8)
    axes.set(ylabel=y, xticks=np.arange(len(values)) + 0.4 - width / 2, xticklabels=list(values))
    axes.legend(loc="lower right")
    return Picture(figure)

"""What the notebooks show: tables and pictures, by matplotlib (extra ``notebooks``)."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from conclugen_jax.evaluate import probe
from conclugen_jax.evaluate.probe import LabelEfficiency

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
    ticks: Sequence[float] = (),
) -> Picture:
    """Draw lines, name -> (xs, ys), told apart by colour and marker.

    A line's look comes from its place in ``lines``: give an empty one where a name has no values, and it looks the same in
    every figure. ``spread``: name -> half height of its bars. ``ticks``: the marks of a logarithmic x axis.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for i, (name, (xs, ys)) in enumerate(lines.items()):
        if not len(xs):
            continue
        bars = None if spread is None else spread[name]
        look = {"color": f"C{i % 10}", "marker": MARKERS[i % len(MARKERS)], "markevery": max(1, len(xs) // 8)}
        axes.errorbar(xs, ys, yerr=bars, label=name, capsize=3, **look)
    axes.set(xlabel=x, ylabel=y)
    if len(ticks):
        axes.set_xscale("log")
        axes.set_xticks(ticks, labels=[str(t) for t in ticks])
        axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    return Picture(figure)


def efficiency_curves(results: Sequence[LabelEfficiency]) -> Picture:
    """Draw mean accuracy and its standard deviation over draws against labels per class, without "all labels"."""
    few = [r for r in results if r.num_labels]
    lines, spread = {}, {}
    for name in dict.fromkeys(r.name for r in few):
        own = [r for r in few if r.name == name]
        lines[name] = [r.num_labels for r in own], [float(np.mean(r.accuracy)) for r in own]
        spread[name] = [float(np.std(r.accuracy)) for r in own]
    ticks = list(dict.fromkeys(r.num_labels for r in few))
    return curves(lines, spread=spread, x="labels per class", y="accuracy", ticks=ticks)


def efficiency_table(results: Sequence[LabelEfficiency]) -> Table:
    """Tabulate mean accuracy ± its standard deviation over draws, a row for each kind of vectors."""
    return Table(*probe.table(results))


def maps(panels: Mapping[str, tuple[np.ndarray, np.ndarray]], names: Sequence[str]) -> Picture:
    """Draw maps side by side, title -> (points [n, 2], group of each [n]); a group looks the same in all."""
    from matplotlib.figure import Figure

    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.6 * columns + 1, 3.2 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (title, (positions, groups)) in zip(grid, panels.items(), strict=False):
        for i in range(len(names)):
            own = positions[groups == i]
            axes.scatter(own[:, 0], own[:, 1], s=10, color=f"C{i % 10}", marker=MARKERS[i % len(MARKERS)])
        axes.set(title=title, xticks=[], yticks=[])
    for axes in list(figure.axes)[len(panels) :]:
        axes.set_axis_off()
    figure.legend(figure.axes[0].collections, [str(n) for n in names], loc="outside right center", frameon=False)
    return Picture(figure)


def bars(values: Mapping[str, Mapping[str, float]], *, y: str) -> Picture:
    """Draw grouped bars: group -> name -> height."""
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
    figure.legend(loc="outside upper center", ncols=len(names), frameon=False)
    return Picture(figure)

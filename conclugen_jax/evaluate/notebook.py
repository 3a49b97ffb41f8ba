"""Tables and figures for notebooks; they need matplotlib (extra ``notebooks``)."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from conclugen_jax.evaluate import probe

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


class Picture(Figure):
    """A figure that a notebook shows with any matplotlib backend."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=110)
        return buffer.getvalue()


def curves(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x: str,
    y: str,
    spread: Mapping[str, Sequence[float]] | None = None,
    ticks: Sequence[float] = (),
) -> Picture:
    """Plot named lines, each with its own colour and marker.

    Args:
      lines: maps each name to (xs, ys). The position in the mapping sets colour and marker. To keep them the same across
        figures, pass empty sequences for a name without values.
      x: label of the x axis.
      y: label of the y axis.
      spread: maps each name to the half lengths of its error bars.
      ticks: positions of the ticks; makes the x axis logarithmic.

    Returns:
      The figure.
    """
    picture = Picture(figsize=(6.4, 3.6), layout="constrained")
    axes = picture.subplots()
    for i, (name, (xs, ys)) in enumerate(lines.items()):
        if len(xs):
            look = {**_look(i), "markevery": max(1, len(xs) // 8)}
            axes.errorbar(xs, ys, yerr=spread and spread[name], label=textwrap.fill(name, 40), capsize=3, **look)
    axes.set(xlabel=x, ylabel=y)
    if len(ticks):
        axes.set_xscale("log")
        axes.set_xticks(ticks, labels=[str(t) for t in ticks])
        axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    return picture


def _look(i: int) -> dict[str, str]:
    return {"color": f"C{i % 10}", "marker": MARKERS[i % len(MARKERS)]}


def efficiency_curves(results: Sequence[probe.LabelEfficiency]) -> Picture:
    """Plot the mean accuracy against the labels per class, with its standard deviation over draws; skip "all labels"."""
    lines, spread = {}, {}
    for r in results:
        if r.num_labels:
            xs, ys = lines.setdefault(r.name, ([], []))
            xs.append(r.num_labels)
            ys.append(float(np.mean(r.accuracy)))
            spread.setdefault(r.name, []).append(float(np.std(r.accuracy)))
    ticks = list(dict.fromkeys(r.num_labels for r in results if r.num_labels))
    return curves(lines, spread=spread, x="labels per class", y="accuracy", ticks=ticks)


def efficiency_table(results: Sequence[probe.LabelEfficiency]) -> Table:
    """Return a table of mean accuracy ± standard deviation over draws, with one row for each kind of vectors."""
    return Table(*probe.table(results))


def maps(panels: Mapping[str, tuple[np.ndarray, np.ndarray]], names: Sequence[str]) -> Picture:
    """Plot maps side by side: ``panels`` maps each title to points [n, 2] and their groups, indices of ``names`` [n]."""
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    picture = Picture(figsize=(3.6 * columns + 1, 3.2 * rows), layout="constrained")
    grid = picture.subplots(rows, columns, squeeze=False).flat
    for axes, (title, (positions, groups)) in zip(grid, panels.items(), strict=False):
        for i in range(len(names)):
            axes.scatter(*positions[groups == i].T, s=10, **_look(i))
        axes.set(title=title, xticks=[], yticks=[])
    for axes in picture.axes[len(panels) :]:
        axes.set_axis_off()
    picture.legend(picture.axes[0].collections, [str(n) for n in names], loc="outside right center", frameon=False)
    return picture


def bars(values: Mapping[str, Mapping[str, float]], *, y: str) -> Picture:
    """Plot grouped bars: ``values`` maps each group to the heights of its bars by name."""
    picture = Picture(figsize=(6.4, 3.6), layout="constrained")
    axes = picture.subplots()
    names = list(next(iter(values.values())))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        look = {"label": name, "hatch": ["", "//", "xx"][i % 3]}
        heights = [group[name] for group in values.values()]
        drawn = axes.bar(np.arange(len(values)) + i * width, heights, width * 0.95, **look)
        axes.bar_label(drawn, fmt="%.2f", fontsize=8)
    axes.set(ylabel=y, xticks=np.arange(len(values)) + 0.4 - width / 2, xticklabels=list(values))
    picture.legend(loc="outside upper center", ncols=len(names), frameon=False)
    return picture

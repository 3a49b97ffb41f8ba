"""Pictures drawn at each build: the method, and the table of the study on digits as curves."""

import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from sphinx.application import Sphinx

STYLE = {"svg.fonttype": "none", "svg.hashsalt": "docs", "font.family": "sans-serif", "font.size": 11}
MODALITIES = ("video", "audio", "text")
BLUE, GREEN, ORANGE, GREY = "#2b6cb0", "#2f855a", "#c05621", "#4a5568"


def write(app: Sphinx) -> None:
    """Write the pictures into ``_generated/``."""
    folder = Path(app.srcdir, "_generated")
    folder.mkdir(exist_ok=True)
    study = Path(app.srcdir, "understand", "digits.md").read_text(encoding="utf-8")
    with pyplot.rc_context(STYLE):
        for name, figure in {"method": method(), "digits": digits(study)}.items():
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
            pyplot.close(figure)


def method() -> pyplot.Figure:
    """Draw the networks from left to right, and the three losses on them."""
    figure, axes = pyplot.subplots(figsize=(10, 4.6))
    axes.set(xlim=(-0.15, 10), ylim=(0, 4.6))
    axes.axis("off")
    for i, modality in enumerate(MODALITIES):
        y = 3.5 - 1.15 * i
        box(axes, 0.65, y, f"{modality}\nfeatures $x$", GREY)
        box(axes, 2.7, y, "representation\nhead $F$", BLUE)
        box(axes, 4.95, y, "projection\nhead $J$", BLUE)
        arrow(axes, (1.42, y), (1.9, y))
        arrow(axes, (3.5, y), (4.15, y), "$D$")
        arrow(axes, (5.75, y), (6.5, 2.35 + 0.35 * (1 - i)), "$P$")
    box(axes, 7.3, 2.35, "pairs of\nmodalities", GREEN)
    label(axes, 9.15, 2.35, "$L_{MMS}$\ncontrast", GREEN)
    arrow(axes, (8.1, 2.35), (8.65, 2.35))
    box(axes, 7.3, 4.05, "clustering head $G$,\nmean, k-means", ORANGE, 1.0)
    label(axes, 9.3, 4.05, "$L_{Clu}$\nclustering", ORANGE)
    arrow(axes, (5.75, 3.65), (6.2, 3.95))
    arrow(axes, (8.35, 4.05), (8.8, 4.05))
    box(axes, 7.3, 0.5, "decoder $Q$:\n$x$ again", BLUE)
    label(axes, 9.15, 0.5, "$L_{Rec}$\nreconstruction", BLUE)
    arrow(axes, (2.7, 0.85), (2.7, 0.5), head=False)
    arrow(axes, (2.7, 0.5), (6.5, 0.5), "$D$ of each modality")
    arrow(axes, (8.1, 0.5), (8.4, 0.5))
    return figure


def box(axes: Axes, x: float, y: float, text: str, colour: str, half: float = 0.75) -> None:
    """Draw a text in a frame around its middle."""
    style = {"boxstyle": "round,pad=0.04", "facecolor": "white", "edgecolor": colour, "linewidth": 1.5}
    axes.add_patch(matplotlib.patches.FancyBboxPatch((x - half, y - 0.33), 2 * half, 0.66, **style))
    label(axes, x, y, text, "#1a202c")


def label(axes: Axes, x: float, y: float, text: str, colour: str) -> None:
    """Draw a text around its middle."""
    axes.text(x, y, text, ha="center", va="center", color=colour, linespacing=1.25)


def arrow(axes: Axes, start: Sequence[float], end: Sequence[float], text: str = "", *, head: bool = True) -> None:
    """Draw an arrow, with a text above its middle."""
    style = {"arrowstyle": "->" if head else "-", "color": GREY, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=style)
    axes.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.1, text, ha="center", va="bottom", color=GREY)


def digits(page: str) -> pyplot.Figure:
    """Draw the first table of the study: accuracy against labels per class, with its intervals."""
    shown = ("ConCluGen", "ConClu", "Multi-Cont", "Generative", "supervised", "raw features")
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name in shown:
        cells = re.search(rf"^\| {re.escape(name)} \| (.*)$", page, re.MULTILINE)[1].split(" | ")[:4]
        means, halves = zip(*(map(float, cell.split(" ± ")) for cell in cells), strict=True)
        dashed = "--" if name in ("supervised", "raw features") else "-"
        axes.errorbar(range(4), means, halves, label=name, linestyle=dashed, capsize=3)
    axes.set_xticks(range(4), ["2", "5", "20", "all"])
    axes.set(xlabel="labels per class", ylabel="accuracy in %")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def setup(app: Sphinx) -> dict[str, bool]:
    """Draw before Sphinx reads its sources."""
    app.connect("builder-inited", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

"""A picture of the expressions in clips: their curves over time, with frames above and the words below."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conclugen_jax.extract import timeline
from conclugen_jax.extract.expressions import ABOUT, NO_FACE, STEPS, Expressions
from conclugen_jax.extract.timeline import GREY, LINE, MARGIN, PALE, PLAIN, WIDTH

MOST = 100  # clips in a picture
HEADING = 60  # height of the heading in pixels
FRAMES, SIDE = 8, 104  # frames of a clip, and the side of each in pixels
LEFT, RIGHT = 56, 176  # pixels beside the time axis: percents, and names of the curves
CURVES = 190  # height of the curves in pixels
LISTED = 20  # lines of words that are listed
LETTER = 7.2  # pixels of a letter of the words, on average
POINTS = 240  # of a curve at most; those of longer clips are means
SPOKEN = "#f1e7d3"  # behind words

COLOURS = {
    "neutral": ("#6b7280", "-"),
    "happy": ("#e69f00", "-"),
    "sad": ("#0072b2", "-"),
    "angry": ("#d55e00", "--"),
    "fearful": ("#cc79a7", "-"),
    "disgusted": ("#009e73", "-"),
    "surprised": ("#56b4e9", "--"),
}
"""Colour and style of each line; the colours are those of Okabe and Ito (2008), which all people can distinguish."""


def draw(found: Sequence[Expressions], path: Path) -> None:
    """Write a PNG picture of clips, in their order; too many for one are a ConclugenError."""
    timeline.check_number(path, len(found), MOST, "clips")
    strips = []
    for clip in found:
        strips.append((HEADING, _heading, clip))
        if clip.moments:
            strips += [(SIDE + 8, _frames, clip), (CURVES + 2 * LINE, _curves, clip)]
        if clip.words:
            strips.append((LINE * (2 + len(_listed(clip))), _words, clip))
    timeline.write([*strips, (2 * LINE, _about)], path)


def _heading(figure: Any, clip: Expressions) -> None:
    """Draw the clip's name, and its overall expression or why there is none."""
    y = MARGIN / figure.bbox.height
    figure.text(
        MARGIN / WIDTH, 1 - y, timeline.short(Path(clip.clip).name, 90), va="top", weight="bold", size=10, **PLAIN
    )
    said = clip.failure or "; ".join(
        [f"{clip.end:.1f} s, mostly {clip.said} ({max(clip.probability):.0%})", *clip.notes]
    )
    figure.text(MARGIN / WIDTH, 1 - y - LINE / figure.bbox.height, timeline.short(said, 150), va="top", size=8, **PLAIN)


def _frames(figure: Any, clip: Expressions) -> None:
    """Draw frames side by side, each of the middle of its part of the time axis or, if no face is there, nearest to it."""
    part = (WIDTH - LEFT - RIGHT) / FRAMES
    for i in range(FRAMES):
        middle = clip.end * (i + 0.5) / FRAMES
        seen = [box for box in clip.boxes if abs(box[0] - middle) <= clip.end / FRAMES / 2]
        time, *box = min(seen, key=lambda box: abs(box[0] - middle), default=(middle,))
        frame = timeline.frame_at(clip.clip, time)
        left = LEFT + part * i + (part - SIDE) / 2
        axes = figure.add_axes([left / WIDTH, 0, SIDE / WIDTH, SIDE / figure.bbox.height])
        axes.set(xticks=[], yticks=[], facecolor=PALE)
        axes.spines[:].set_visible(False)
        if frame is not None:
            axes.imshow(_around(frame, box), aspect="equal")


def _around(frame: np.ndarray, box: Sequence[float]) -> np.ndarray:
    """Return the square around a face, or the whole frame where there is none."""
    if not box:
        return frame
    height, width = frame.shape[:2]
    x, y = (box[0] + box[2]) / 2 * width, (box[1] + box[3]) / 2 * height
    side = round(min(1.5 * max((box[2] - box[0]) * width, (box[3] - box[1]) * height), height, width))
    left, top = (round(min(max(0, at - side / 2), most - side)) for at, most in ((x, width), (y, height)))
    return frame[top : top + side, left : left + side]


def _axis(figure: Any, clip: Expressions, bottom: float, height: float) -> Any:
    """Return axes over the clip's time, at so many pixels from the bottom."""
    whole = figure.bbox.height
    axes = figure.add_axes([LEFT / WIDTH, bottom / whole, (WIDTH - LEFT - RIGHT) / WIDTH, height / whole])
    axes.set_xlim(0, clip.end)
    axes.spines[:].set_visible(False)
    axes.tick_params(labelsize=7, length=0)
    return axes


def _curves(figure: Any, clip: Expressions) -> None:
    """Draw the probability of each expression over time, and bands where no face was found."""
    axes = _axis(figure, clip, 1.4 * LINE, CURVES)
    axes.set(ylim=(-0.02, 1.02), yticks=[0, 0.5, 1])
    axes.grid(axis="y", color=PALE, lw=1)
    axes.yaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    ticks = np.arange(0, clip.end + 1e-6, next((s for s in (0.5, *STEPS) if clip.end <= 10 * s), STEPS[-1]))
    axes.set_xticks(ticks, [_at(x, clip) for x in ticks])
    for start, end in clip.without_face:
        axes.axvspan(start, end, color=PALE, lw=0)
    times, values = _points(clip)
    marker = {"marker": "o", "ms": 3} if len(times) <= 100 else {}
    order = np.argsort(clip.probability, kind="stable")  # the most probable on top
    beside = {"transform": axes.transAxes, "clip_on": False}
    for place, i in enumerate(order, 1):
        name, y = clip.classes[i], 0.07 + 0.86 * place / len(order)
        colour, style = COLOURS[name]
        axes.plot(times, values[:, i], color=colour, ls=style, lw=1.6, clip_on=False, **marker)
        axes.plot([1.02, 1.05], [y, y], color=colour, ls=style, lw=2, **beside)
        axes.text(1.06, y, f"{name} {clip.probability[i]:.0%}", va="center", size=8, **beside, **PLAIN)
    if clip.without_face:
        axes.plot([1.02, 1.05], [0.07, 0.07], color=PALE, lw=7, solid_capstyle="butt", **beside)
        axes.text(1.06, 0.07, NO_FACE, va="center", size=8, **beside, **PLAIN)


def _at(seconds: float, clip: Expressions) -> str:
    """Return a time in a clip as it is written on its axis."""
    return f"{round(seconds, 1):g} s" if clip.end < 120 else f"{seconds // 60:.0f}:{seconds % 60:02.0f}"


def _points(clip: Expressions) -> tuple[np.ndarray, np.ndarray]:
    """Return times [n] and probabilities [n, classes] of the curves, which NaN interrupts where no face was found."""
    times, values = np.array([time for time, _ in clip.moments]), np.array([p for _, p in clip.moments])
    parts = np.arange(len(times))
    if len(times) > POINTS:
        parts = (times * POINTS / clip.end).astype(int)
    _, parts, counts = np.unique(parts, return_inverse=True, return_counts=True)
    means = [np.bincount(parts, column) / counts for column in (times, *values.T)]
    times, values = means[0], np.stack(means[1:], axis=1)
    breaks = np.unique(np.searchsorted(times, [start for start, _ in clip.without_face]))
    return np.insert(times, breaks, np.nan), np.insert(values, breaks, np.nan, axis=0)


def _listed(clip: Expressions) -> list[str]:
    """Return lines of words that are listed below their intervals: those of all that are said, where some do not fit in."""
    if all(
        u.end is not None and len(u.text) * LETTER < (min(u.end, clip.end) - u.start) * _scale(clip) for u in clip.words
    ):
        return []
    lines = [f"{i} ({_at(u.start, clip)}) " * (u.end is not None) + u.text for i, u in enumerate(clip.words, 1)]
    return [*lines[:LISTED], f"... and {len(lines) - LISTED} lines more"] if len(lines) > LISTED else lines


def _words(figure: Any, clip: Expressions) -> None:
    """Draw intervals on the time axis in which something is said, with the words in them or, by number, below."""
    whole, lines = figure.bbox.height, _listed(clip)
    timed = [(i, u) for i, u in enumerate(clip.words, 1) if u.end is not None]
    if timed:
        axes = _axis(figure, clip, whole - LINE, LINE)
        axes.set(ylim=(0, 1), yticks=[], xticks=[])
    for i, u in timed:
        end = min(u.end, clip.end)
        axes.broken_barh([(u.start, end - u.start - 2 * clip.end / WIDTH)], (0, 1), color=SPOKEN, lw=0)
        said = str(i) if lines else u.text
        if len(said) * LETTER < (end - u.start) * _scale(clip):
            axes.text((u.start + end) / 2, 0.46, said, ha="center", va="center", size=7, **PLAIN)
    for i, line in enumerate(lines, bool(timed)):
        figure.text(LEFT / WIDTH, 1 - (i + 0.3) * LINE / whole, timeline.short(line, 140), va="top", size=8, **PLAIN)


def _scale(clip: Expressions) -> float:
    """Return pixels per second of the time axis."""
    return (WIDTH - LEFT - RIGHT) / clip.end


def _about(figure: Any) -> None:
    figure.text(MARGIN / WIDTH, 0.5, ABOUT, va="center", size=7, color=GREY)

"""A picture of predictions: the utterances of each clip on its time axis, and for each a frame, the words and probabilities."""

import io
import itertools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract.media import decoding as media
from conclugen_jax.extract.prediction import Prediction
from conclugen_jax.system import files

WIDTH, MARGIN, FRAME, LINE = 1100, 16, 200, 22
"""Width of the picture, its margin, and the least height of an utterance and of a line, in pixels."""

DPI = 128  # a power of two, so that sizes in inches are exact
MOST = 300  # utterances in a picture at most; each takes some hundred lines of pixels, in memory
PALE, MARK, GREY = "#d6dae2", "#2662b2", "#8c929e"
PLAIN = {"parse_math": False, "color": "#1e1e22"}


def check(path: Path) -> None:
    """Refuse another ending than ``.png``, no such folder, or no matplotlib, before anything is computed for a picture."""
    if path.suffix.lower() != ".png":
        raise ConclugenError(f"{path}: the picture is a PNG file; name it {path.with_suffix('.png').name}")
    if not path.parent.is_dir():
        raise ConclugenError(f"{path}: {path.parent} is no folder; make it, or name another")
    try:
        import matplotlib  # noqa: F401
    except ImportError as e:
        raise ConclugenError("--picture needs matplotlib: pip install 'conclugen_jax[extract]'") from e


def check_number(path: Path, number: int, most: int, unit: str) -> None:
    """Refuse more clips or utterances than a picture shows."""
    if number > most:
        raise ConclugenError(f"{path}: {number} {unit}, a picture shows {most} at most; name fewer clips")


def draw(predictions: Sequence[Prediction], path: Path) -> None:
    """Write a PNG picture of utterances, in their order; too many for one are a ConclugenError."""
    check_number(path, len(predictions), MOST, "utterances")
    strips: list[tuple] = []
    for _, group in itertools.groupby(predictions, key=lambda p: p.clip):
        clip = list(group)
        timed = [p for p in clip if p.end > p.start]
        strips.append((LINE * (5 if timed else 2), _heading, Path(clip[0].clip).name, timed))
        strips += [(max(FRAME, LINE * (len(p.classes) + 4)), _utterance, p) for p in clip]
    write(strips, path)


def write(strips: Sequence[tuple], path: Path) -> None:
    """Write a PNG picture of strips, one below the other: height, what draws it, and arguments of that after the figure."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # of a letter that the font lacks
        pixels = np.concatenate([_pixels(*strip) for strip in strips])
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    files.write_atomically(path, content.getvalue(), place="--picture")


def _pixels(height: int, paint: Callable, *arguments: Any) -> np.ndarray:
    """Return a strip as uint8 [height, width, 3]; ``paint(figure, *arguments)`` draws it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    canvas = FigureCanvasAgg(Figure((WIDTH / DPI, height / DPI), dpi=DPI))
    paint(canvas.figure, *arguments)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def _heading(figure: Any, name: str, timed: Sequence[Prediction]) -> None:
    """Draw the clip's name, and its utterances on the time axis with what is predicted of each."""
    figure.text(MARGIN / WIDTH, 0.85, short(name, 100), va="top", weight="bold", size=10, **PLAIN)
    if not timed:
        return
    length = max(p.end for p in timed)
    axes = figure.add_axes([MARGIN / WIDTH, 0.35, 1 - 2 * MARGIN / WIDTH, 0.22])
    _bare(axes, xlim=(0, length), ylim=(0, 1), yticks=[], facecolor=PALE)
    axes.tick_params(labelsize=7)
    axes.xaxis.set_major_formatter("{x:g} s")
    middle = {"va": "center", "ha": "center", "color": "white", "size": 7, "parse_math": False}
    for p in timed:
        width = p.end - p.start - 3 * length / WIDTH  # a gap to the next
        axes.broken_barh([(p.start, width)], (0, 1), color=GREY if p.failure else MARK, antialiased=False)
        said = short("failed" if p.failure else p.said, 100)
        if len(said) * 8 / WIDTH < width / length:
            axes.text(p.start + width / 2, 0.45, said, **middle)


def _utterance(figure: Any, p: Prediction) -> None:
    """Draw a frame with the face, what is said, and a bar for the probability of each class."""
    frame, box = _frame(p)
    if frame is not None:
        axes = figure.add_axes([MARGIN / WIDTH, 0.05, 0.21, 0.92], anchor="NW")
        axes.axis("off")
        axes.imshow(frame, extent=(0, frame.shape[1], frame.shape[0], 0))
        if box is not None:
            x, y = (np.clip(box, 0, 1) * np.tile(frame.shape[1::-1], 2)).reshape(2, 2).T
            axes.plot(x[[0, 1, 1, 0, 0]], y[[0, 0, 1, 1, 0]], color=MARK, lw=1.5)
    line = LINE / figure.bbox.height
    missing = f" (no {', '.join(p.missing)})" if p.missing else ""
    said = p.failure or (f'"{p.text}"' if p.text else "no words known") + missing
    figure.text(0.24, 0.97, f"{p.start:.1f} - {p.end:.1f} s", va="top", weight="bold", size=10, **PLAIN)
    figure.text(0.24, 0.97 - line, short(said, 100), va="top", size=8, **PLAIN)
    if not p.classes:
        predicted = "" if p.failure else short(p.said, 80)
        figure.text(0.24, 0.5, predicted, weight="bold", size=10, parse_math=False, color=MARK)
        return
    axes = figure.add_axes([0.36, 0.95 - (len(p.classes) + 2) * line, 0.57, len(p.classes) * line])
    rows = np.arange(len(p.classes))
    axes.barh(rows, 1, 0.6, color=PALE, antialiased=False)
    colours = [MARK if name in p.predicted else GREY for name in p.classes]
    axes.barh(rows, np.maximum(p.probability, 0.002), 0.6, color=colours, antialiased=False)
    _bare(axes, xlim=(0, 1), ylim=(len(rows) - 0.5, -0.5), xticks=[])
    axes.set_yticks(rows, [short(name, 16) for name in p.classes], size=8, parse_math=False)
    axes.tick_params(length=0)
    for row, value in enumerate(p.probability):
        axes.text(1.01, row, f"{value:.1%}", va="center", size=8)


def _bare(axes: Any, **properties: Any) -> None:
    axes.set(**properties)
    axes.spines[:].set_visible(False)


def short(text: str, most: int) -> str:
    """Return a text in one line of so many letters at most; bytes of a name that are no letters are written as escapes."""
    text = " ".join(text.encode(errors="backslashreplace").decode().split())
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _frame(p: Prediction) -> tuple[np.ndarray | None, tuple[float, ...] | None]:
    """Return the frame in the middle, or the one nearest to it in which the face was found, and the face's box."""
    middle = (p.end - p.start) / 2
    time, *box = min(p.boxes, key=lambda box: abs(box[0] - middle), default=(middle,))
    return frame_at(p.clip, p.start + time), tuple(box) or None


def frame_at(clip: str, time: float) -> np.ndarray | None:
    """Return the frame of a clip at a time in seconds, uint8 [height, width, 3]; ``None`` if there is none."""
    try:
        found = media.decode(Path(clip), rates=(1.0,), start=time + 1e-4, end=time + 0.5, sound=False)
    except ConclugenError:
        return None
    return found.frames[0] if found.frames else None

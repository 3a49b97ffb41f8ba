"""A picture of predictions over time: the utterances of a clip on its time axis, and for each of them a frame with the face,
what is said, and the probabilities."""

import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract.media import decoding as media
from conclugen_jax.extract.prediction import Prediction
from conclugen_jax.system import files

WIDTH, FRAME, MARGIN, LINE, AXIS = 1100, (240, 180), 16, 20, 22
MOST = 300
"""Utterances of a picture; each takes some hundred lines of it, in memory."""
INK, PALE, MARK, GROUND, GREY = (30, 30, 34), (214, 218, 226), (38, 98, 178), (255, 255, 255), (140, 146, 158)


def check(path: Path) -> None:
    """Whether a picture can be written there, before anything is computed for it.

    Raises:
      ConclugenError: another ending than ``.png``, or no such folder.
    """
    if path.suffix.lower() != ".png":
        raise ConclugenError(f"{path}: the picture is a PNG file; name it {path.with_suffix('.png').name}")
    if not path.parent.is_dir():
        raise ConclugenError(f"{path}: {path.parent} is no folder; make it, or name another")


def draw(predictions: Sequence[Prediction], path: Path) -> None:
    """Write a PNG picture.

    Args:
      predictions: utterances, in their order.
      path: of the picture.

    Raises:
      ConclugenError: it cannot be written, or there are too many utterances for a picture.
    """
    from PIL import Image, ImageDraw

    if len(predictions) > MOST:
        raise ConclugenError(
            f"{path}: {len(predictions):,} utterances, and a picture shows {MOST} at most; name fewer clips"
        )

    clips = [list(group) for _, group in itertools.groupby(predictions, key=lambda p: p.clip)]
    frames = [[_small(p) for p in clip] for clip in clips]
    heights = [
        [_height(p, frame) for p, (frame, _) in zip(*rows, strict=True)] for rows in zip(clips, frames, strict=True)
    ]
    total = sum(_heading_height(clip) + sum(each) for clip, each in zip(clips, heights, strict=True))
    image = Image.new("RGB", (WIDTH, total + MARGIN), GROUND)
    pen, top = ImageDraw.Draw(image), MARGIN
    for clip, pictures, each in zip(clips, frames, heights, strict=True):
        _heading(pen, clip, top)
        top += _heading_height(clip)
        for p, picture, height in zip(clip, pictures, each, strict=True):
            _utterance(image, pen, p, picture, top)
            top += height
    content = io.BytesIO()
    image.save(content, "PNG")
    files.write_atomically(path, content.getvalue(), place="--picture")


def _small(p: Prediction) -> tuple[Any, tuple[float, ...] | None]:
    """The frame of an utterance in the size in which it is drawn, and the face's box in it; ``None`` where there is none."""
    from PIL import Image

    frame, box = _frame(p)
    if frame is None:
        return None, None
    scale = min(FRAME[0] / frame.shape[1], FRAME[1] / frame.shape[0])
    size = max(1, round(frame.shape[1] * scale)), max(1, round(frame.shape[0] * scale))
    return Image.fromarray(frame).resize(size), box


def _height(p: Prediction, frame: Any) -> int:
    return max(frame.height if frame is not None else 0, LINE * (len(p.classes) + 3)) + 2 * MARGIN


def _drawn(clip: Sequence[Prediction]) -> list[Prediction]:
    """The utterances that have a place on the axis."""
    return [p for p in clip if p.end > p.start]


def _heading_height(clip: Sequence[Prediction]) -> int:
    return LINE + 10 + (2 * LINE + AXIS if _drawn(clip) else 0)


def _heading(pen: Any, clip: Sequence[Prediction], top: int) -> None:
    """The clip's name, and its utterances on the time axis with what is predicted of each."""
    from PIL import ImageFont

    font, bold = ImageFont.load_default(12), ImageFont.load_default(17)
    left, right = MARGIN, WIDTH - MARGIN
    pen.text((left, top), _fitting(pen, Path(clip[0].clip).name, bold, right - left), INK, bold)
    drawn = _drawn(clip)
    if not drawn:
        return
    length, y = max(p.end for p in drawn), top + LINE + 10

    def at(seconds: float) -> float:
        return left + (right - left) * min(max(seconds / length, 0.0), 1.0)

    pen.rectangle([left, y, right, y + AXIS], fill=PALE)
    for p in drawn:
        start, end = at(p.start), at(p.end)
        pen.rectangle([start, y, max(start + 1, end - 3), y + AXIS], fill=GREY if p.failure else MARK)
        said = " ".join(("failed" if p.failure else p.said).split())
        if pen.textlength(said, font) < end - start - 8:
            pen.text((start + 4, y + 4), said, GROUND, font)
    step = next(s for s in (0.5, 1, 2, 5, 10, 30, 60, 300, 1800, 7200, 1e9) if length / s <= 12)
    for k in range(int(length / step) + 1):
        x, text = at(k * step), f"{k * step:g} s"
        pen.line([x, y + AXIS, x, y + AXIS + 5], fill=INK)
        pen.text((min(x + 3, right - pen.textlength(text, font)), y + AXIS + 3), text, INK, font)


def _utterance(image: Any, pen: Any, p: Prediction, picture: tuple[Any, tuple[float, ...] | None], top: int) -> None:
    from PIL import ImageFont

    font, bold = ImageFont.load_default(14), ImageFont.load_default(17)
    frame, box = picture
    if frame is not None:
        image.paste(frame, (MARGIN, top))
        if box is not None:
            corners = [min(max(x, 0.0), 1.0) * (side - 1) for x, side in zip(box, frame.size * 2, strict=True)]
            pen.rectangle(
                [MARGIN + corners[0], top + corners[1], MARGIN + corners[2], top + corners[3]], outline=MARK, width=2
            )
    left, right = MARGIN * 2 + FRAME[0], WIDTH - MARGIN
    pen.text((left, top), f"{p.start:.1f} - {p.end:.1f} s", INK, bold)
    if p.failure:
        pen.text((left, top + LINE + 4), _fitting(pen, p.failure, font, right - left), INK, font)
        return
    said = f'"{p.text}"' if p.text else "no words known"
    missing = f"   (no {', '.join(p.missing)})" if p.missing else ""
    pen.text((left, top + LINE + 4), _fitting(pen, said + missing, font, right - left), INK, font)
    if not p.classes:
        pen.text((left, top + 2 * LINE + 8), _fitting(pen, p.said, bold, right - left), MARK, bold)
        return
    bars = left + 130
    for i, (name, value) in enumerate(zip(p.classes, p.probability, strict=True)):
        y = top + (i + 2) * LINE + 12
        chosen = name in p.predicted
        pen.text((left, y), _fitting(pen, name, font, 120), MARK if chosen else INK, font)
        pen.rectangle([bars, y + 3, right - 60, y + 15], fill=PALE)
        pen.rectangle([bars, y + 3, bars + max(1, value * (right - 60 - bars)), y + 15], fill=MARK if chosen else GREY)
        pen.text((right - 52, y), f"{value:.1%}", INK, font)


def _fitting(pen: Any, text: str, font: Any, width: float) -> str:
    """A text in one line, cut off where it would leave the picture."""
    text = " ".join(text.split())
    if pen.textlength(text, font) <= width:
        return text
    while text and pen.textlength(f"{text}...", font) > width:
        text = text[:-1]
    return f"{text}..."


def _frame(p: Prediction) -> tuple[np.ndarray | None, tuple[float, ...] | None]:
    """The frame in the middle, or the one nearest to it in which the face was found, and the face's box."""
    middle = (p.end - p.start) / 2
    nearest = min(p.boxes, key=lambda box: abs(box[0] - middle), default=None)
    at = p.start + (nearest[0] if nearest is not None else middle)
    try:
        clip = media.decode(Path(p.clip), rate=1.0, start=at + 1e-4, end=at + 0.5, sound=False)
    except ConclugenError:
        return None, None
    frame = clip.frames[0] if clip.frames else None
    return frame, nearest[1:] if nearest is not None else None

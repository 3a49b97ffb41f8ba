"""A picture of predictions over time: for each utterance a frame with the face, what is said, and the probabilities."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract import media
from conclugen_jax.extract.prediction import Prediction

WIDTH, FRAME, MARGIN, LINE = 1100, (240, 180), 16, 20
INK, PALE, MARK, GROUND = (30, 30, 34), (214, 218, 226), (38, 98, 178), (255, 255, 255)


def draw(predictions: Sequence[Prediction], path: Path) -> None:
    """Write a PNG picture.

    Args:
      predictions: utterances, in their order.
      path: of the picture.

    Raises:
      ConclugenError: it cannot be written.
    """
    from PIL import Image, ImageDraw

    heights = [_height(p) for p in predictions]
    image = Image.new("RGB", (WIDTH, sum(heights) + MARGIN), GROUND)
    pen, top = ImageDraw.Draw(image), MARGIN
    for p, height in zip(predictions, heights, strict=True):
        _utterance(image, pen, p, top)
        top += height
    try:
        image.save(path, "PNG")
    except OSError as e:
        raise ConclugenError(f"{path}: cannot be written ({e.strerror or e})") from e


def _height(p: Prediction) -> int:
    return max(FRAME[1], LINE * (len(p.classes) + 3)) + 2 * MARGIN


def _utterance(image: Any, pen: Any, p: Prediction, top: int) -> None:
    from PIL import Image, ImageFont

    font, bold = ImageFont.load_default(14), ImageFont.load_default(17)
    frame, box = _frame(p)
    if frame is not None:
        scale = min(FRAME[0] / frame.shape[1], FRAME[1] / frame.shape[0])
        size = max(1, round(frame.shape[1] * scale)), max(1, round(frame.shape[0] * scale))
        image.paste(Image.fromarray(frame).resize(size), (MARGIN, top))
        if box is not None:
            corners = [
                MARGIN + box[0] * size[0],
                top + box[1] * size[1],
                MARGIN + box[2] * size[0],
                top + box[3] * size[1],
            ]
            pen.rectangle(corners, outline=MARK, width=2)
    left, right = MARGIN * 2 + FRAME[0], WIDTH - MARGIN
    pen.text(
        (left, top), _fitting(pen, f"{Path(p.clip).name}  {p.start:.1f} - {p.end:.1f} s", bold, right - left), INK, bold
    )
    if p.failure:
        pen.text((left, top + LINE + 4), _fitting(pen, p.failure, font, right - left), INK, font)
        return
    said = f'"{p.text}"' if p.text else "no words known"
    missing = f"   (no {', '.join(p.missing)})" if p.missing else ""
    pen.text((left, top + LINE + 4), _fitting(pen, said + missing, font, right - left), INK, font)
    if not p.classes:
        pen.text((left, top + 2 * LINE + 8), f"{p.predicted:.2f}", MARK, bold)
        return
    bars = left + 130
    for i, (name, value) in enumerate(zip(p.classes, p.probability, strict=True)):
        y = top + (i + 2) * LINE + 12
        chosen = name in p.predicted
        pen.text((left, y), _fitting(pen, name, font, 120), MARK if chosen else INK, font)
        pen.rectangle([bars, y + 3, right - 60, y + 15], fill=PALE)
        pen.rectangle(
            [bars, y + 3, bars + max(1, value * (right - 60 - bars)), y + 15], fill=MARK if chosen else (140, 146, 158)
        )
        pen.text((right - 50, y), f"{value:.0%}", INK, font)


def _fitting(pen: Any, text: str, font: Any, width: float) -> str:
    """A text cut off where it would leave the picture."""
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

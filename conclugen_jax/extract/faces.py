"""Find the face in some frames of a clip, follow it over the clip, and crop it from all frames."""

import dataclasses
import functools
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from conclugen_jax.extract.media.clip import Clip
from conclugen_jax.extract.networks import mtcnn

MIN_PROBABILITY = 0.9  # least probability of a face that is followed
GAP = 1.0  # seconds from the nearest detection within which a frame counts as showing the face
MIN_OVERLAP = 0.1  # intersection over union at which two boxes, one after the other, are the same face
LEAST = 0.3  # part of the side of the face that is followed, below which other faces are not looked for
THUMBNAIL, MARGIN = 64, 1.2  # pixels a side, and the side of the square around a face in parts of the face's
DETECTION_SIDE = 640  # longer side of the frames that the detector sees, at most, in pixels

Track = list[tuple[float, np.ndarray]]
"""A face over some time: the time and box of each detection. A box is [4]: x, y of two corners, in parts of the frame."""


def follow(times: Sequence[float], boxes: Sequence[np.ndarray | None]) -> list[Track]:
    """Join boxes that overlap from one detection to the next into tracks; a face may be missed for twice :data:`GAP`.

    Each frame has a time in seconds, and a box or ``None``.
    """
    tracks: list[Track] = []
    for time, box in zip(times, boxes, strict=True):
        if box is None:
            continue
        before, last = tracks[-1][-1] if tracks else (-np.inf, box)
        if time - before > 2 * GAP or overlap(last, box) < MIN_OVERLAP:
            tracks.append([])
        tracks[-1].append((time, box))
    return tracks


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Return the intersection over union of two boxes [4]."""
    sides = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0)
    shared = float(np.prod(sides))
    whole = float(np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2])) - shared
    return shared / whole if whole > 0 else 0.0


def find(params: Mapping[str, Any], frames: Sequence[np.ndarray]) -> list[np.ndarray | None]:
    """Return the box of the most probable face of each frame, in parts of it, ``None`` where there is none.

    The frames, uint8 RGB [height, width, 3], are in the order of time. Where the last one has a face, a frame is searched for
    faces of :data:`LEAST` of its side or more, and for smaller ones only if none of these overlaps it. ``params`` are the
    variables of MTCNN.
    """
    found: list[np.ndarray | None] = []
    for frame in frames:
        shape = frame.shape[1::-1]
        scale = min(1.0, DETECTION_SIDE / max(shape))
        image = frame if scale == 1 else resize(frame, (round(shape[0] * scale), round(shape[1] * scale)))
        find_one = functools.partial(_most_probable, params, image, np.tile(shape, 2) * scale)
        last, box = found[-1] if found else None, None
        if last is not None:
            box = find_one(LEAST * max((last[2:] - last[:2]) * shape) * scale)
            box = box if box is not None and overlap(last, box) >= MIN_OVERLAP else None
        found.append(find_one() if box is None else box)
    return found


def _most_probable(params: Mapping[str, Any], image: np.ndarray, sides: np.ndarray, *least: float) -> np.ndarray | None:
    (faces,) = mtcnn.detect(params, image[None], *least)
    return faces[0, :4] / sides if len(faces) and faces[0, 4] >= MIN_PROBABILITY else None


def crop(clip: Clip, boxes: Sequence[np.ndarray | None], rows: Sequence[int], size: int) -> Clip:
    """Crop the clip's face to square frames, and drop frames further than :data:`GAP` from one in which it is seen.

    The boxes are of the face in the frames of ``rows``, whose sizes may differ; new frames have ``size`` pixels a side.
    """
    around = []  # times of a track, and the box that holds all of its boxes
    for track in follow([float(clip.times[i]) for i in rows], boxes):
        times, found = np.array([time for time, _ in track]), np.stack([box for _, box in track])
        around.append((times, np.concatenate([found[:, :2].min(axis=0), found[:, 2:].max(axis=0)])))
    frames, kept = [], []
    for frame, time in zip(clip.frames, clip.times, strict=True):
        distances = [np.abs(times - time).min() for times, _ in around] or [np.inf]
        if min(distances) > GAP + 1e-6:
            continue
        frames.append(cut(frame, around[np.argmin(distances)][1], size))
        kept.append(time)
    return dataclasses.replace(clip, frames=frames, times=np.array(kept))


def thumbnail(frame: np.ndarray, box: np.ndarray | None) -> bytes:
    """Return a square picture of :data:`THUMBNAIL` pixels a side as JPEG, around a face, or of the middle of a frame.

    The frame is uint8 [height, width, 3], the box in parts of it; ``None``: there is no face.
    """
    sides = np.array(frame.shape[1::-1], float)
    low, high = (np.zeros(2), sides) if box is None else (box[:2] * sides, box[2:] * sides)
    side = min(sides.min(), sides.min() if box is None else MARGIN * (high - low).max())
    corner = np.clip((low + high - side) / 2, 0, sides - side)
    picture = resize(frame, (THUMBNAIL, THUMBNAIL), (*corner, *(corner + side)))
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=75, optimize=True)
    return file.getvalue()


def cut(frame: np.ndarray, box: np.ndarray, size: int) -> np.ndarray:
    """Return the box of a frame, in parts of it, as a square of ``size`` pixels a side."""
    height, width = frame.shape[:2]
    box = box * (width, height, width, height)
    low = np.clip(box[:2], 0, (width - 1, height - 1))
    high = np.clip(box[2:], low + 1, (width, height))
    return resize(frame, (size, size), (*low, *high))


def resize(frame: np.ndarray, size: tuple[int, int], box: tuple[float, ...] | None = None) -> np.ndarray:
    """Resize a frame (uint8 [height, width, 3]) by bilinear interpolation, with averaging where it shrinks.

    ``size`` is the new width and height, ``box`` what to take of the frame: x, y of two corners; ``None``: all.
    """
    if box is not None:  # Pillow copies the whole frame otherwise
        corners, sides = np.reshape(box, (2, 2)), frame.shape[1::-1]
        margin = np.maximum((corners[1] - corners[0]) / size, 1) + 1  # pixels around the box that count
        left, top = low = np.maximum(np.floor(corners[0] - margin), 0).astype(int)
        right, bottom = np.minimum(np.ceil(corners[1] + margin), sides).astype(int)
        frame, box = np.ascontiguousarray(frame[top:bottom, left:right]), (*(corners[0] - low), *(corners[1] - low))
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR, box))

"""Find the face in some frames of a clip, follow it over the clip, and crop it from all frames."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from conclugen_jax.extract.media.clip import Clip
from conclugen_jax.extract.networks import mtcnn

MIN_PROBABILITY = 0.9
"""Least probability of a face that is followed."""

GAP = 1.0
"""Seconds from the nearest detection within which a frame counts as showing the face."""

MIN_OVERLAP = 0.1
"""Intersection over union at which two boxes, one after the other, are the same face."""

DETECTION_SIDE = 640
"""Longer side of the frames that the detector sees, at most, in pixels."""


@dataclasses.dataclass
class Track:
    """A face over some time.

    Attributes:
      times: of its detections, in seconds.
      box: that holds all of its boxes: x, y of two corners.
      last: the newest of its boxes.
    """

    times: list[float]
    box: np.ndarray
    last: np.ndarray


def follow(times: Sequence[float], boxes: Sequence[np.ndarray | None], gap: float = GAP) -> list[Track]:
    """Join boxes that overlap from one detection to the next into tracks.

    Args:
      times: of the frames.
      boxes: [4] of the face of each frame, ``None`` where there is none.
      gap: seconds over which a face may be missed.
    """
    tracks: list[Track] = []
    for time, box in zip(times, boxes, strict=True):
        if box is None:
            continue
        track = tracks[-1] if tracks else None
        if track is not None and time - track.times[-1] <= 2 * gap and overlap(track.last, box) >= MIN_OVERLAP:
            track.times.append(time)
            track.last = box
            track.box = np.concatenate([np.minimum(track.box[:2], box[:2]), np.maximum(track.box[2:], box[2:])])
        else:
            tracks.append(Track([time], np.array(box), box))
    return tracks


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Return the intersection over union of two boxes [4]."""
    sides = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0)
    shared = float(np.prod(sides))
    whole = float(np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2])) - shared
    return shared / whole if whole > 0 else 0.0


def find(params: Mapping[str, Any], frames: Sequence[np.ndarray]) -> list[np.ndarray | None]:
    """Return the box of the most probable face of each frame (corners in pixels), ``None`` where there is none.

    Args:
      params: variables of MTCNN.
      frames: uint8 RGB [height, width, 3].
    """
    found: list[np.ndarray | None] = [None] * len(frames)
    shapes = {frame.shape for frame in frames}
    for shape in sorted(shapes):
        rows = [i for i, frame in enumerate(frames) if frame.shape == shape]
        scale = min(1.0, DETECTION_SIDE / max(shape[:2]))
        size = round(shape[1] * scale), round(shape[0] * scale)
        if min(size) < mtcnn.MIN_SIZE:
            continue
        images = np.stack([frames[i] if scale == 1 else resize(frames[i], size) for i in rows])
        for i, faces in zip(rows, mtcnn.detect(params, images), strict=True):
            if faces and faces[0].probability >= MIN_PROBABILITY:
                found[i] = faces[0].box / scale
    return found


def crop(clip: Clip, boxes: Sequence[np.ndarray | None], rows: Sequence[int], size: int, gap: float = GAP) -> Clip:
    """Crop the clip's face to square frames, and drop frames in which it is not seen.

    Args:
      clip: whole frames.
      boxes: of the face in some of the frames.
      rows: which frames these are.
      size: side of the new frames, in pixels.
      gap: seconds from the nearest detection within which a frame still counts as showing the face.

    Returns:
      The clip with other frames; none where no face was found.
    """
    # In parts of the frame: its size may change within a clip.
    sides = [np.tile(clip.frames[i].shape[1::-1], 2) for i in rows]
    parts = [None if box is None else box / side for box, side in zip(boxes, sides, strict=True)]
    tracks = follow([float(clip.times[i]) for i in rows], parts, gap)
    frames, times = [], []
    for frame, time in zip(clip.frames, clip.times, strict=True):
        distances = [min(abs(time - t) for t in track.times) for track in tracks]
        if not distances or min(distances) > gap + 1e-6:
            continue
        height, width = frame.shape[:2]
        box = tracks[int(np.argmin(distances))].box * (width, height, width, height)
        low = np.clip(box[:2], 0, (width - 1, height - 1))
        high = np.clip(box[2:], low + 1, (width, height))
        frames.append(resize(frame, (size, size), (*low, *high)))
        times.append(time)
    return dataclasses.replace(clip, frames=frames, times=np.array(times))


def resize(frame: np.ndarray, size: tuple[int, int], box: tuple[float, ...] | None = None) -> np.ndarray:
    """Resize a frame by bilinear interpolation, with averaging where it shrinks.

    Args:
      frame: uint8 [height, width, 3].
      size: new width and height.
      box: what to take of the frame: x, y of two corners; ``None``: all.
    """
    from PIL import Image

    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR, box))

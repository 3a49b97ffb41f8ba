"""A decoded clip: frames at a constant rate with their times, and mono sound at 16 kHz; and how its frames are sampled."""

import dataclasses
import heapq
import itertools
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np

SAMPLE_RATE = 16_000  # samples of the sound per second
SILENCE = 1e-4  # greatest amplitude of sound that counts as none (-80 dB of full scale)
MAX_SECONDS = 300.0  # longest clip or interval; all of its frames are held in memory

MAX_SIDE = (
    1280  # longest side of a decoded frame, in pixels; larger frames are scaled down: faces in them are only cropped
)
MAX_BYTES = 2**30  # memory for the frames of a clip; those of a longer clip are scaled down to fit
USUAL_RATE = (
    16.0  # frames at lower rates are scaled down as at this one, so that their size does not depend on the rate
)
ROUNDING = Fraction(1, 500)  # seconds by which times of slow clips are off: in milliseconds, or at an estimated rate
Matrix = tuple[float, ...]  # a, b, c, d
IDENTITY = (1, 0, 0, 1)
HDR = (16, 18)  # FFmpeg's numbers of the transfer functions PQ and HLG


@dataclasses.dataclass(frozen=True)
class Clip:
    """What was decoded of a clip or of an interval of it.

    Frames are uint8 RGB [height, width, 3], upright and with square pixels, at ``rate`` and at the lower rates that were asked
    for. Samples that show the same picture share an array. Sound is float32 [samples] between -1 and 1 at 16 kHz.
    """

    frames: list[np.ndarray]
    times: np.ndarray  # of the frames, in seconds from the start of the interval
    rate: float  # frames per second that were asked for, or the clip's own rate where that is lower
    sound: np.ndarray | None  # None for a clip without sound, or with silence only
    text: str | None = None  # what is said, if known
    notes: tuple[str, ...] = ()  # remarks for the user, such as a broken end
    length: float = 0.0  # seconds from the start of the interval to the end of what was decoded
    resized: dict = dataclasses.field(
        default_factory=dict, init=False
    )  # (id of a frame, side) -> it resized, for all backbones

    def at_rate(self, rate: float) -> list[np.ndarray]:
        """Return the frames on the screen ``rate`` times per second; see :meth:`rows_at`."""
        return [self.frames[i] for i in self.rows_at(rate)]

    def rows_at(self, rate: float) -> list[int]:
        """Return the indices of the frames on the screen ``rate`` times per second, or all if there are fewer; at least one.

        Times at which frames were dropped, such as those without a face, have none.
        """
        if not len(self.frames):
            return []
        if rate >= self.rate:  # skip the frames between, which belong to lower rates
            samples = self.times * self.rate
            return np.flatnonzero(np.abs(samples - np.rint(samples)) < 1e-6).tolist() or [0]
        wanted = np.arange(0, self.times[-1] + 1 / self.rate - 1e-6, 1 / rate) + 1e-6
        rows = np.searchsorted(self.times, wanted, side="right") - 1
        shown = (rows >= 0) & (wanted - self.times[rows] < 1 / self.rate)
        return rows[shown].tolist() or [0]


class Sampler:
    """Samples a stream of PyAV at rates, the highest first, each on a grid of its own: what is on the screen at k / rate.

    Start and end are in seconds; an infinite end is that of the clip. ``seconds``: expected length of the interval; 0 if
    unknown, which is taken for a short one.
    """

    def __init__(self, stream: Any, rates: tuple[float, ...], start: float, end: float, seconds: float):
        own = stream.average_rate or stream.guessed_rate
        self.done = False  # whether the interval is complete
        self.notes: dict[str, None] = {}  # remarks for the user, in order, each once
        self._rates = [Fraction(r) for r in rates]
        self._own = Fraction(own) if own and own < rates[0] else None  # the stream's own rate, where it is the lower
        self._uneven = False  # whether samples at its own rate miss frames
        self._untimed = False  # whether there was a frame without a time
        self._start = Fraction(start).limit_denominator(10**6)  # as it was written, to the microsecond
        self._end = Fraction(end).limit_denominator(10**6) if end < math.inf else end
        self._origin = self._start + (ROUNDING if own and own < USUAL_RATE else Fraction(1, 10**6))  # of the grids
        self._wanted = heapq.merge(*(itertools.count(self._origin, 1 / r) for r in (*self._rates, self._own) if r))
        self._next = next(self._wanted)
        self._frame_length = 1 / Fraction(own) if own else Fraction(1, 25)
        self._shown, self._shown_at, self._until = None, Fraction(0), Fraction(0)
        # That of the container counts throughout; where it says none, that of the coded pictures, which may change.
        in_container = stream.sample_aspect_ratio != stream.codec_context.sample_aspect_ratio
        self._aspect_of = stream if in_container else stream.codec_context
        self._aspect, self._matrix = 0.0, IDENTITY
        usual = min(max(rates[0], USUAL_RATE), float(own or math.inf))
        self._pixels = MAX_BYTES / 3 / max(1.0, min(seconds, MAX_SECONDS) * usual)
        self._frames: list[np.ndarray] = []
        self._times: list[Fraction] = []
        self._bytes = 0

    def add(self, frame: Any, time: Fraction | None) -> None:
        """Add the next frame in the order of presentation, with its time in seconds if that is known."""
        self._untimed |= time is None
        if self._untimed and (time is None or abs(time - self._until) < 3 * self._frame_length):
            time = self._until  # in program streams with H.264 most frames have none, and some that of a neighbour
        if self._shown is None and self._next < time < 1:
            time = self._next  # pictures that begin a little after the sound
        if self._own and self._shown is not None and self._start <= self._shown_at < time <= self._end:
            first, last = ((t - self._origin) * self._own for t in (self._shown_at, time))
            self._uneven |= math.ceil(first) >= last  # no sample while it was on the screen
        self._take_until(time)
        self.done = time >= self._end
        length = frame.duration * frame.time_base if frame.duration and frame.time_base else self._frame_length
        self._shown, self._shown_at, self._until = frame, time, time + length
        aspect = float(self._aspect_of.sample_aspect_ratio or 1)
        if aspect != self._aspect != 0:
            self.notes["the aspect ratio of the pixels changes within the clip"] = None
        self._aspect = aspect
        try:
            self._matrix = _matrix(frame) or self._matrix  # that of coded pictures stands at key frames only
        except ValueError:  # a kind of metadata that PyAV does not know, such as EXIF in MJPEG
            turn = math.radians(frame.rotation)
            cos, sin = round(math.cos(turn), 6), round(math.sin(turn), 6)
            self._matrix = cos, -sin, sin, cos
            if turn:
                self.notes["the pictures are turned, and whether they are mirrored is unknown"] = None

    def _take_until(self, time: Fraction) -> None:
        """Take the frame on the screen for all samples before ``time``."""
        image = None
        time = min(time, self._end, self._start + Fraction(MAX_SECONDS))
        while self._next < time:
            passed = self._next
            if self._shown is not None and self._shown_at <= passed:
                image = self._image(self._shown) if image is None else image
                self._frames.append(image)
                self._times.append(passed - self._origin)
            while self._next == passed:  # which may be of several grids
                self._next = next(self._wanted)

    def _image(self, frame: Any) -> np.ndarray:
        """Return a frame as a player shows it: turned, with square pixels, and at most as many as fit into memory."""
        width, height = frame.width, frame.height
        self.notes |= dict.fromkeys(_remarks(frame, self._matrix))
        if width * height > self._pixels:
            self.notes["frames are smaller than they might be, since there are many"] = None
        if 0.1 < self._aspect < 10:
            width = max(1, round(width * self._aspect))
        else:
            self.notes["the aspect ratio of the pixels is ignored, as no camera has it"] = None
        scale = min(1.0, MAX_SIDE / max(width, height), math.sqrt(self._pixels / (width * height)))
        size = max(1, round(width * scale)), max(1, round(height * scale))
        if size != (frame.width, frame.height):
            frame = frame.reformat(*size, "rgb24", interpolation="AREA")
        image = np.ascontiguousarray(_upright(frame.to_ndarray(format="rgb24"), self._matrix))
        self._bytes += image.nbytes
        if self._bytes > 2 * MAX_BYTES:
            raise MemoryError("far more frames than expected")
        return image

    @property
    def seconds(self) -> float:
        """Time from the start of the interval to the end of the last frame."""
        return max(0.0, float(min(self._until, self._end) - self._start))

    def finish(self) -> tuple[list[np.ndarray], np.ndarray]:
        """Return the frames and their times in seconds; the last frame stays on the screen for its own length."""
        self._take_until(self._until)
        rates = self._rates
        if self._own and not self._uneven:
            rates = [self._own, *(r for r in rates if r <= self._own)]
        self.rate = float(rates[0])
        rows = [i for i, time in enumerate(self._times) if any((time * rate).denominator == 1 for rate in rates)]
        return [self._frames[i] for i in rows], np.array([float(self._times[i]) for i in rows])


def _matrix(frame: Any) -> Matrix | None:
    """Return a, b, c, d of a frame's display matrix, if it has one: the pixel at (x, y) is shown at (a x + c y, b x + d y)."""
    stored = frame.side_data.get("DISPLAYMATRIX")
    return None if stored is None else tuple(np.frombuffer(stored, np.int32)[[0, 1, 3, 4]].tolist())


def _upright(image: np.ndarray, matrix: Matrix) -> np.ndarray:
    """Return an image in that of the eight orientations to which a display matrix is nearest."""
    a, b, c, d = matrix
    if abs(b) > abs(a):
        image, a, d = image.swapaxes(0, 1), c, b
    return image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def _remarks(frame: Any, matrix: Matrix) -> Iterator[str]:
    """Yield what a player does to a frame and this module does not."""
    a, b, *_ = map(abs, matrix)
    if min(a, b) > 0.02 * max(a, b):  # about a degree
        yield "the pictures are to be turned by an angle that is no multiple of 90 degrees, which is rounded to one"
    if frame.color_trc in HDR:
        yield "the pictures are HDR, and their colours are paler than players show them"
    if any(component.is_alpha for component in frame.format.components):
        yield "the pictures have an alpha channel, which is ignored"
    if frame.interlaced_frame:
        yield "the pictures are interlaced (ffmpeg -i CLIP -vf bwdif deinterlaces them)"

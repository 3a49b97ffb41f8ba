"""A decoded clip: frames at a constant rate with their times, and mono sound at 16 kHz; and how its frames are sampled."""

import dataclasses
import heapq
import itertools
import math
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
        highest = min(Fraction(rates[0]), Fraction(own)) if own else Fraction(rates[0])
        self.rate = float(highest)  # of the first grid: that asked for, or the stream's own where that is lower
        self.done = False  # whether the interval is complete
        self.shrunk = False  # whether frames were scaled down for want of memory
        self._start = Fraction(start).limit_denominator(10**6)  # as it was written, to the microsecond
        self._end = Fraction(end).limit_denominator(10**6) if end < math.inf else end
        grids = [itertools.count(self._start, 1 / Fraction(r)) for r in (highest, *rates[1:]) if r <= highest]
        self._wanted = heapq.merge(*grids)
        self._next = next(self._wanted)
        self._frame_length = 1 / Fraction(own) if own else Fraction(1, 25)
        self._shown, self._shown_at, self._until = None, Fraction(0), Fraction(0)
        self._aspect = float(stream.sample_aspect_ratio or 1)
        usual = min(max(rates[0], USUAL_RATE), float(own or math.inf))
        self._pixels = MAX_BYTES / 3 / max(1.0, min(seconds, MAX_SECONDS) * usual)
        self._frames: list[np.ndarray] = []
        self._times: list[float] = []
        self._bytes = 0

    def add(self, frame: Any, time: Fraction | None) -> None:
        """Add the next frame in the order of presentation, with its time in seconds if that is known."""
        if time is None:
            time = self._until
        if self._shown is None and self._next < time < 1:
            time = self._next  # pictures that begin a little after the sound
        self._take_until(time)
        self.done = time >= self._end
        length = frame.duration * frame.time_base if frame.duration and frame.time_base else self._frame_length
        self._shown, self._shown_at, self._until = frame, time, time + length

    def _take_until(self, time: Fraction) -> None:
        """Take the frame on the screen for all samples before ``time``."""
        image = None
        time = min(time, self._end, self._start + Fraction(MAX_SECONDS))
        while self._next < time:
            passed = self._next
            if self._shown is not None and self._shown_at <= passed:
                image = self._image(self._shown) if image is None else image
                self._frames.append(image)
                self._times.append(float(passed - self._start))
            while self._next == passed:  # which may be of several grids
                self._next = next(self._wanted)

    def _image(self, frame: Any) -> np.ndarray:
        """Return a frame as a player shows it: turned, with square pixels, and at most as many as fit into memory."""
        width, height = frame.width, frame.height
        self.shrunk = self.shrunk or width * height > self._pixels
        width = max(1, round(width * self._aspect)) if 0.1 < self._aspect < 10 else width
        scale = min(1.0, MAX_SIDE / max(width, height), math.sqrt(self._pixels / (width * height)))
        size = max(1, round(width * scale)), max(1, round(height * scale))
        if size != (frame.width, frame.height):
            frame = frame.reformat(*size, "rgb24", interpolation="AREA")
        image = frame.to_ndarray(format="rgb24")
        turns = round(frame.rotation / 90) % 4
        image = np.ascontiguousarray(np.rot90(image, turns)) if turns else image
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
        return self._frames, np.array(self._times)

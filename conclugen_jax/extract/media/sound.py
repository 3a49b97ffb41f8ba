"""Record the sound of a clip: one channel at 16 kHz, with silence where there is none."""

from collections import deque
from fractions import Fraction
from typing import Any

import av
import numpy as np

from conclugen_jax.extract.media import clip as clip_lib
from conclugen_jax.extract.media.clip import SAMPLE_RATE

GAP = 0.1  # seconds without sound in the middle of a clip that become silence; shorter gaps are imprecise times
CANCELLED = 0.03  # amplitude of the mixture over that of the first channel, below which channels cancel each other
PARTS = {"FC": 2**0.5, "LFE": 0.0, "LFE2": 0.0}  # of channels in a mixture to mono, relative to the left and the right


class Recorder:
    """Collects the sound of an interval in seconds; an infinite ``end`` is that of the clip."""

    def __init__(self, start: float, end: float):
        self.done = False  # whether the interval is complete
        self.notes: dict[str, None] = {}  # remarks for the user, in order, each once
        self._start, self._end = start, end
        self._limit = min(end, start + 2 * clip_lib.MAX_SECONDS)
        self._resampler, self._format, self._parts = None, None, np.ones(1)
        self._pieces: deque[np.ndarray] = deque()
        self._begin: float | None = None
        self._length = 0.0

    @property
    def seconds(self) -> float:
        """Time from the start of the interval to the end of the last piece."""
        return max(0.0, min((self._begin or 0.0) + self._length, self._limit) - self._start)

    def add(self, frame: Any, time: Fraction | None) -> None:
        """Add the next piece of sound, a frame of PyAV, with its time in seconds if that is known."""
        if self._begin is None:
            self._begin = float(time or 0)
        elif time is not None and (gap := float(time) - self._begin - self._length) > GAP:
            if time > self._limit:
                self.done, self._length = True, self._limit - self._begin
                return
            self._pieces.append(np.zeros((2, round(gap * SAMPLE_RATE)), np.float32))
            self._length += gap
        form = frame.format.name, frame.layout.name, frame.sample_rate
        if form != self._format:  # that of the first frame, or a change in the middle
            self._keep(None)
            self._resampler, self._format = av.AudioResampler(format="flt", rate=SAMPLE_RATE), form
            names = [channel.name for channel in frame.layout.channels]
            self._parts = _parts(names)
            if len(names) > 2 and "NONE" in names:
                self.notes["the sound has channels without names, and their mean was taken"] = None
        frame.pts = None  # the resampler would fill gaps by its own rules
        self._keep(frame)
        self.done = self._begin + self._length > self._end

    def _keep(self, frame: Any | None) -> None:
        """Append a frame resampled, or what is left of the last one, and drop the pieces before the interval."""
        for piece in self._resampler.resample(frame) if self._resampler is not None else []:
            channels = piece.to_ndarray().reshape(-1, len(self._parts)).T  # planar sound of 9 channels makes PyAV crash
            with np.errstate(invalid="ignore"):  # in a damaged file numbers may be anything
                self._pieces.append(np.stack([self._parts @ channels, channels[0]]))
            self._length += self._pieces[-1].shape[1] / SAMPLE_RATE
            while len(self._pieces) > 1 and self._begin + self._pieces[0].shape[1] / SAMPLE_RATE <= self._start:
                passed = self._pieces.popleft().shape[1] / SAMPLE_RATE
                self._begin, self._length = self._begin + passed, self._length - passed

    def finish(self) -> np.ndarray | None:
        """Return the sound of the interval, float32 [samples], with zeros before its beginning; ``None`` if there is none."""
        self._keep(None)
        if not self._pieces or self._begin - self._start > clip_lib.MAX_SECONDS:
            return None
        samples, first = np.concatenate(self._pieces, axis=1)
        loud, first_loud = (np.abs(each).sum(dtype=np.float64) for each in (samples, first))
        if loud < CANCELLED * first_loud:
            self.notes["the channels of the sound cancel each other, and the first was taken"] = None
            samples = first
        offset = round((self._begin - self._start) * SAMPLE_RATE)
        samples = samples[-offset:] if offset < 0 else np.concatenate([np.zeros(offset, np.float32), samples])
        samples = samples[: round((self._limit - self._start) * SAMPLE_RATE)]
        return samples.astype(np.float32) if samples.size else None


def _parts(channels: list[str]) -> np.ndarray:
    """Return the part of each channel in a mixture to mono, in sum 1.

    The proportions are FFmpeg's and those of players: low-frequency effects (LFE) are dropped, the centre is louder than the
    left and the right, what is behind or above is quieter. Channels without names have equal parts.
    """
    parts = np.array([PARTS.get(c, 0.5**0.5 if c[0] in "SBT" else 1.0) for c in channels])
    parts = parts if parts.any() else np.ones(len(channels))
    return (parts / parts.sum()).astype(np.float32)

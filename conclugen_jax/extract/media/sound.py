"""Sound as one channel at 16 kHz, each piece at its place in time."""

from collections import deque
from fractions import Fraction
from typing import Any

import av
import numpy as np

from conclugen_jax.extract.media import clip as clip_lib
from conclugen_jax.extract.media.clip import SAMPLE_RATE

GAP = 0.1
"""Seconds without sound in the middle of a clip that are filled with silence; shorter gaps are imprecise times."""

SILENCE = 1e-4  # greatest amplitude of sound that counts as none (-80 dB of full scale)
LOUDEST = 1000.0  # greatest amplitude that is plausible; in a damaged file numbers may be anything


class Recorder:
    """Collects the sound of an interval in seconds; an infinite ``end`` is that of the clip."""

    def __init__(self, start: float, end: float):
        self.done = False  # whether the interval is complete
        self._start, self._end = start, end
        self._limit = min(end, start + 2 * clip_lib.MAX_SECONDS)
        self._resampler, self._format = None, None
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
            self._pieces.append(np.zeros(round(gap * SAMPLE_RATE), np.float32))
            self._length += gap
        form = frame.format.name, frame.layout.name, frame.sample_rate
        if form != self._format:  # that of the first frame, or a change in the middle
            self._keep(None)
            self._resampler, self._format = av.AudioResampler(format="fltp", rate=SAMPLE_RATE), form
        frame.pts = None  # the resampler would fill gaps by its own rules
        self._keep(frame)
        self.done = self._begin + self._length > self._end

    def _keep(self, frame: Any | None) -> None:
        """Append a frame resampled, or what is left of the last one, and drop the pieces before the interval."""
        for piece in self._resampler.resample(frame) if self._resampler is not None else []:
            self._pieces.append(piece.to_ndarray().mean(axis=0))  # FFmpeg's own mixture to mono is louder
            self._length += self._pieces[-1].size / SAMPLE_RATE
            while len(self._pieces) > 1 and self._begin + self._pieces[0].size / SAMPLE_RATE <= self._start:
                passed = self._pieces.popleft().size / SAMPLE_RATE
                self._begin, self._length = self._begin + passed, self._length - passed

    def finish(self) -> np.ndarray | None:
        """Return the sound of the interval, float32 [samples], with zeros before its beginning; ``None`` if there is none."""
        self._keep(None)
        if not self._pieces or self._begin - self._start > clip_lib.MAX_SECONDS:
            return None
        samples = np.concatenate(self._pieces)
        offset = round((self._begin - self._start) * SAMPLE_RATE)
        samples = samples[-offset:] if offset < 0 else np.concatenate([np.zeros(offset, np.float32), samples])
        samples = samples[: round((self._limit - self._start) * SAMPLE_RATE)]
        return samples.astype(np.float32) if samples.size else None

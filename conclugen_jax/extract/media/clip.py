"""A decoded clip: frames at a constant rate with their times, and mono sound at 16 kHz."""

import dataclasses

import numpy as np

SAMPLE_RATE = 16_000  # samples of the sound per second
SILENCE = 1e-4  # greatest amplitude of sound that counts as none (-80 dB of full scale)
MAX_SECONDS = 300.0  # longest clip or interval; all of its frames are held in memory


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
        """Return the frames on the screen ``rate`` times per second, or all if there are fewer; at least one.

        Times at which frames were dropped, such as those without a face, have none.
        """
        return [self.frames[i] for i in self.rows_at(rate)]

    def rows_at(self, rate: float) -> list[int]:
        """Return the indices of the frames that :meth:`at_rate` returns."""
        if not len(self.frames):
            return []
        if rate >= self.rate:  # skip the frames between, which belong to lower rates
            samples = self.times * self.rate
            return np.flatnonzero(np.abs(samples - np.rint(samples)) < 1e-6).tolist() or [0]
        wanted = np.arange(0, self.times[-1] + 1 / self.rate - 1e-6, 1 / rate) + 1e-6
        rows = np.searchsorted(self.times, wanted, side="right") - 1
        shown = (rows >= 0) & (wanted - self.times[rows] < 1 / self.rate)
        return rows[shown].tolist() or [0]

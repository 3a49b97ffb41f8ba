"""Decoding of clips with FFmpeg (PyAV): frames at a constant rate with their times, and mono sound at 16 kHz.

Times count in seconds from the start of the container, as players count them.
"""

import contextlib
import dataclasses
import math
from collections import deque
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from conclugen_jax.errors import ConclugenError

SAMPLE_RATE = 16_000
"""Of the sound, in Hz."""

MAX_SIDE = 1280
"""Larger frames are made so small on decoding: faces in them are cropped, not read."""

MAX_SECONDS = 300.0
"""Longest clip or interval; its frames are held in memory."""

MAX_BYTES = 2**30
"""Of the frames of a clip: those of a longer one are made smaller, so that all of them take no more."""

USUAL_RATE = 16.0
"""Frames at lower rates are made as small as they would be at this one, so that they are the same at any of them."""

GAP = 0.1
"""Seconds without sound in the middle of a clip from which on they are filled with silence; less is imprecise times."""

SILENCE = 1e-4
"""Greatest amplitude of sound that counts as none (-80 dB of full scale)."""


LOUDEST = 1000.0
"""Greatest amplitude of sound that can be meant; in a damaged file numbers may be anything."""


@dataclasses.dataclass(frozen=True)
class Clip:
    """What was decoded of a clip.

    Attributes:
      frames: uint8 RGB arrays [height, width, 3], upright and with square pixels, at ``rate`` and at lower rates asked for.
      times: of the frames, in seconds from the start of the interval.
      rate: frames per second that were asked for, or the clip's own rate where that is lower.
      sound: float32 [samples] between -1 and 1 at 16 kHz; ``None`` where there is none, or silence.
      text: what is said, if known.
      notes: what was odd, such as a broken end.
      length: seconds from the start of the interval to the end of what was decoded.
    """

    frames: list[np.ndarray]
    times: np.ndarray
    rate: float
    sound: np.ndarray | None
    text: str | None = None
    notes: tuple[str, ...] = ()
    length: float = 0.0

    def at_rate(self, rate: float) -> list[np.ndarray]:
        """The frames on the screen ``rate`` times per second (or all, where there are fewer), one at least.

        Where frames were left out, such as those without a face, the times in between have none.
        """
        return [self.frames[i] for i in self.rows_at(rate)]

    def rows_at(self, rate: float) -> list[int]:
        """Which frames :meth:`at_rate` gives."""
        if not len(self.frames):
            return []
        if rate >= self.rate:  # those between are of lower rates
            samples = self.times * self.rate
            return np.flatnonzero(np.abs(samples - np.rint(samples)) < 1e-6).tolist() or [0]
        wanted = np.arange(0, self.times[-1] + 1 / self.rate - 1e-6, 1 / rate) + 1e-6
        rows = np.searchsorted(self.times, wanted, side="right") - 1
        shown = (rows >= 0) & (wanted - self.times[rows] < 1 / self.rate)
        return rows[shown].tolist() or [0]


def decode(
    path: Path,
    *,
    rate: float = 16.0,
    also: Sequence[float] = (),
    start: float = 0.0,
    end: float | None = None,
    sound: bool = True,
    video: bool = True,
) -> Clip:
    """Decode a clip, or an interval of it, once.

    At each time k / rate after the start the frame is taken that is on the screen then. A broken end is cut off and noted.

    Args:
      path: of a file with pictures, sound or both.
      rate: frames per second at most.
      also: lower rates at which frames are wanted; those of clips with frames at odd times would not be among the others.
      start: of the interval, in seconds.
      end: of the interval; ``None``: the end of the clip.
      sound: whether to decode it.
      video: whether to decode pictures.

    Raises:
      ConclugenError: no such file, nothing in it that can be decoded, or an interval that it does not have.
    """
    av = library()
    path = Path(path)
    if not path.is_file():
        raise ConclugenError(f"{path}: no such file")
    if not path.stat().st_size:
        raise ConclugenError(f"{path}: an empty file (0 bytes); fetch it again")
    if not 0 <= start < math.inf or (end is not None and not start < end < math.inf):
        raise ConclugenError(f"{path}: no interval from {start} s to {end} s")
    try:
        for back in (*(seconds for seconds in SEEK_BACK if start > seconds + 1), None):
            with av.open(str(path), metadata_errors="replace") as container, contextlib.suppress(_TooLate):
                return _decode(container, str(path), (rate, *also), start, end, sound, video, back)
        raise AssertionError("the whole clip is never too late")
    except av.error.FFmpegError as e:
        raise ConclugenError(f"{path}: cannot be decoded ({e.strerror}); is it a video, and complete?") from e
    except MemoryError as e:
        raise ConclugenError(f"{path}: its frames do not fit into memory; cut it into intervals") from e


def library() -> Any:
    """PyAV. Its level of logging is left alone: with one set, threads of FFmpeg wait for Python, and Python for them.

    Raises:
      ConclugenError: it is not installed.
    """
    try:
        import av
    except ImportError as e:
        raise ConclugenError("decoding needs PyAV: pip install 'conclugen_jax[extract]'") from e
    return av


SEEK_BACK = (1.0, 16.0)
"""Seconds before an interval at which decoding begins; where no key frame lies between, it begins further back."""


class _TooLate(Exception):
    """Decoding began after the start of the interval."""


def _decode(
    container: Any,
    name: str,
    rates: tuple[float, ...],
    start: float,
    end: float | None,
    sound: bool,
    video: bool,
    back: float | None,
) -> Clip:
    pictures = next((s for s in container.streams.video if not _is_cover(s)), None) if video else None
    sounds = next(iter(container.streams.audio), None) if sound else None
    if pictures is None and sounds is None:
        raise ConclugenError(f"{name}: holds neither pictures nor sound that can be decoded")
    zero = Fraction(container.start_time or 0, 1_000_000)
    streams = [s for s in (pictures, sounds) if s is not None]
    for stream in streams:
        stream.codec_context.thread_count = 1  # clips are decoded side by side
    length = end if end is not None else (container.duration or 0) / 1_000_000
    sampler = _Sampler(pictures, rates, start, end, zero, length - start) if pictures is not None else None
    recorder = _Recorder(start, end, zero) if sounds is not None else None
    notes = []
    awaited = set()  # streams whose place in time is not known yet
    if back is not None and container.format.name not in WITHOUT_TIMES:
        container.seek(int((start - back) * 1_000_000) + (container.start_time or 0), backward=True)
        awaited = set(streams)
    for stream, frame in _frames(container, streams, notes):
        if stream in awaited:
            if stream is pictures and not frame.key_frame:
                continue  # what it is made of was passed over
            if frame.pts is None or float(frame.pts * frame.time_base - zero) > start + (stream is sounds) * GAP:
                raise _TooLate
            awaited.remove(stream)
        done = sampler is None or sampler.done
        if stream is pictures and not sampler.done:
            sampler.add(frame)
        elif stream is sounds and not recorder.done:
            recorder.add(frame)
        if done and (recorder is None or recorder.done):
            break
        if (sampler and sampler.too_long) or (recorder and recorder.seconds > MAX_SECONDS):
            raise ConclugenError(
                f"{name}: more than {MAX_SECONDS:g} s in one piece; cut it, by subtitles or a table of intervals"
            )
    if pictures in awaited:
        raise _TooLate
    frames, times = sampler.finish() if sampler is not None else ([], np.zeros(0))
    heard = recorder.finish() if recorder is not None else None
    if not frames and heard is None:
        raise ConclugenError(
            f"{name}: nothing could be decoded{_between(start, end)}; {' '.join(notes) or 'is it complete?'}"
        )
    if sampler is not None and sampler.shrunk:
        notes.append("frames are smaller than they might be, since there are many")
    if heard is not None and not np.abs(heard).max(initial=0) <= LOUDEST:
        notes.append("the sound is no sound")
        heard = None
    if heard is not None and np.abs(heard).max(initial=0) < SILENCE:
        notes.append("the sound is silence")
        heard = None
    decoded = max(sampler.seconds if sampler is not None else 0.0, recorder.seconds if recorder is not None else 0.0)
    declared = _declared(container, streams) - start
    if end is None and decoded < declared - LACKING:
        notes.append(f"the clip breaks off at {start + decoded:.1f} s of {start + declared:.1f} s")
    rate = sampler.rate if sampler is not None else rates[0]
    return Clip(frames, times, rate, heard, notes=tuple(notes), length=round(decoded, 6))


LACKING = 1.0
"""Seconds by which a clip may be shorter than its header says."""


def _declared(container: Any, streams: list[Any]) -> float:
    """Seconds that the header says streams last; those of a container that says nothing of each are of all that is in it."""
    each = [float(s.duration * s.time_base) if s.duration else 0.0 for s in streams]
    counted = [float(s.frames / s.average_rate) for s in streams if s.type == "video" and s.frames and s.average_rate]
    if counted:  # FFmpeg makes the duration of an AVI fit what is there, but not this number
        return max(*each, *counted)
    whole = (container.duration or 0) / 1_000_000
    return max(each) if all(each) else whole if len(streams) == len(container.streams) else 0.0


def _between(start: float, end: float | None) -> str:
    return "" if not start and end is None else f" from {start:g} s to {'the end' if end is None else f'{end:g} s'}"


def _is_cover(stream: Any) -> bool:
    """Whether a stream is a still picture attached to sound."""
    return bool(stream.disposition & type(stream.disposition).attached_pic)


WITHOUT_TIMES = ("avi",)
"""Containers that say when frames are to be decoded, not when they are to be shown; of them nothing is passed over."""


def _frames(container: Any, streams: list[Any], notes: list[str]) -> Iterator[tuple[Any, Any]]:
    """Decoded frames of streams; what is broken in the middle is passed over, a broken end ends them."""
    av, broken, damaged = library(), 0, 0
    slots: deque[int] | None = deque() if container.format.name in WITHOUT_TIMES else None
    packets = container.demux(streams)
    while True:
        try:
            packet = next(packets, None)
        except av.error.FFmpegError as e:
            notes.append(f"the file breaks off ({e.strerror})")
            packet = None
        if packet is None:
            break
        shows = slots is not None and packet.stream.type == "video"
        if shows and packet.size and packet.dts is not None:
            slots.append(packet.dts)
        try:
            for frame in packet.decode():
                if shows:  # the order of frames is known, and at which times one is shown
                    frame.pts = slots.popleft() if slots else None
                damaged += frame.is_corrupt
                yield packet.stream, frame
        except av.error.EOFError:
            continue
        except av.error.FFmpegError:
            broken += 1
    if broken:
        notes.append(f"{broken} packets could not be decoded")
    if damaged:
        notes.append(f"{damaged} frames are damaged")


class _Sampler:
    """Takes the frame on the screen at each multiple of 1 / rate, for one or several rates; the first is the highest."""

    def __init__(
        self, stream: Any, rates: tuple[float, ...], start: float, end: float | None, zero: Fraction, seconds: float
    ):
        own, rate = stream.average_rate or stream.guessed_rate, rates[0]
        self.rate = min(rate, float(own)) if own else rate
        highest = Fraction(rate) if not own or own > rate else Fraction(own)
        lower = [Fraction(r) for r in rates[1:] if r < highest]
        self._counts = {1 / r: 0 for r in (highest, *lower)}  # time from one sample to the next -> samples so far
        self._frame_length = 1 / Fraction(own) if own else Fraction(1, 25)
        self._start, self._end, self._zero = _exact(start), None if end is None else _exact(end), zero
        self._next, self._shown, self._shown_at, self._until = self._start, None, Fraction(-1), self._start
        self._aspect = stream.sample_aspect_ratio or 1
        self._frames: list[np.ndarray] = []
        self._times: list[float] = []
        self._bytes = 0
        # A container that does not tell its length is taken at its word: as if it were short.
        most = min(max(rate, USUAL_RATE), float(own)) if own else max(rate, USUAL_RATE)
        self._pixels = MAX_BYTES / 3 / max(1.0, min(seconds, MAX_SECONDS) * most)
        self.done = self.shrunk = self.too_long = False

    def add(self, frame: Any) -> None:
        """The next frame in the order of presentation."""
        if frame.pts is not None and frame.time_base is not None:
            at = frame.pts * frame.time_base - self._zero
        else:
            at = self._shown_at + self._frame_length if self._shown is not None else Fraction(0)
        if self._shown is None and self._next < at < 1 and not self._frames:
            at = self._next  # pictures that begin a little after the sound
        self._take_until(at)
        length = frame.duration * frame.time_base if frame.duration and frame.time_base else self._frame_length
        self._shown, self._shown_at, self._until = frame, at, at + (length or self._frame_length)

    def _take_until(self, time: Fraction) -> None:
        """All samples before a time show the frame that is on the screen."""
        image = None
        while not self.done and self._next < time:
            if self._end is not None and self._next >= self._end:
                self.done = True
            elif self._next - self._start > MAX_SECONDS:
                self.done = self.too_long = True
            elif self._shown is not None and self._shown_at <= self._next:
                image = self._image(self._shown) if image is None else image
                self._frames.append(image)
                self._times.append(float(self._next - self._start))
                self._advance()
            else:
                self._advance()

    def _advance(self) -> None:
        """To the next time of any of the rates."""
        passed = self._next - self._start
        self._counts = {step: n + (n * step == passed) for step, n in self._counts.items()}
        self._next = self._start + min(n * step for step, n in self._counts.items())

    @property
    def seconds(self) -> float:
        """From the start of the interval to the end of the last frame."""
        until = self._until if self._end is None else min(self._until, self._end)
        return max(0.0, float(until - self._start))

    def _image(self, frame: Any) -> np.ndarray:
        image = upright(frame, float(self._aspect), self._pixels)
        self.shrunk = self.shrunk or frame.width * frame.height > self._pixels
        self._bytes += image.nbytes
        if self._bytes > 2 * MAX_BYTES:
            raise MemoryError
        return image

    def finish(self) -> tuple[list[np.ndarray], np.ndarray]:
        """The frames and their times."""
        if self._shown is not None:
            self._take_until(self._until)
            self._shown = None
        return self._frames, np.array(self._times)


def _exact(seconds: float) -> Fraction:
    """Seconds as they were written, to the microsecond."""
    return Fraction(round(seconds * 1_000_000), 1_000_000)


def upright(frame: Any, aspect: float = 1.0, pixels: float = math.inf) -> np.ndarray:
    """uint8 RGB [height, width, 3] as a player shows it: square pixels, turned, at most :data:`MAX_SIDE` a side.

    Args:
      frame: of PyAV.
      aspect: width of a pixel by its height.
      pixels: at most, all in all.
    """
    width, height = frame.width, frame.height
    width = max(1, round(width * aspect)) if 0.1 < aspect < 10 else width
    scale = min(1.0, MAX_SIDE / max(width, height), math.sqrt(pixels / (width * height)))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    same = size == (frame.width, frame.height)
    image = (
        frame.to_ndarray(format="rgb24") if same else frame.reformat(*size, "rgb24", interpolation="AREA").to_ndarray()
    )
    turns = round(getattr(frame, "rotation", 0) / 90) % 4
    return np.ascontiguousarray(np.rot90(image, turns)) if turns else image


class _Recorder:
    """Collects sound at its place in time."""

    def __init__(self, start: float, end: float | None, zero: Fraction):
        self._resampler, self._format = None, None
        self._start, self._end, self._zero = start, end, zero
        self._pieces: deque[np.ndarray] = deque()
        self._begin: float | None = None
        self._length = 0.0
        self.done = False

    @property
    def seconds(self) -> float:
        """From the start of the interval to the end of the last piece."""
        until = (self._begin or 0.0) + self._length
        return max(0.0, (until if self._end is None else min(until, self._end)) - self._start)

    def add(self, frame: Any) -> None:
        """The next piece of sound."""
        at = float(frame.pts * frame.time_base - self._zero) if frame.pts is not None and frame.time_base else None
        if self._begin is None:
            self._begin = at or 0.0
        elif at is not None and (gap := at - self._begin - self._length) > GAP:
            end = self._end if self._end is not None else self._start + 2 * MAX_SECONDS
            if at > end:
                self.done, self._length = True, end - self._begin
                return
            self._pieces.append(np.zeros(round(gap * SAMPLE_RATE), np.float32))
            self._length += gap
        form = frame.format.name, frame.layout.name, frame.sample_rate
        if form != self._format:  # of the first frame, or in the middle
            self._finish_resampler()
            self._resampler, self._format = library().AudioResampler(format="fltp", rate=SAMPLE_RATE), form
        frame.pts = None  # the resampler would fill gaps by its own rules
        self._keep(self._resampler.resample(frame))
        if self._end is not None and self._begin + self._length > self._end:
            self.done = True

    def _finish_resampler(self) -> None:
        if self._resampler is not None:
            self._keep(self._resampler.resample(None))

    def _keep(self, frames: list[Any]) -> None:
        for frame in frames:
            self._pieces.append(frame.to_ndarray().mean(axis=0))  # FFmpeg's own mixture to mono is louder
            self._length += self._pieces[-1].size / SAMPLE_RATE
            while len(self._pieces) > 1 and self._begin + self._pieces[0].size / SAMPLE_RATE <= self._start:
                passed = self._pieces.popleft().size / SAMPLE_RATE  # sound before the interval is not kept
                self._begin, self._length = self._begin + passed, self._length - passed

    def finish(self) -> np.ndarray | None:
        """float32 [samples] of the interval; ``None`` if there was no sound in it."""
        self._finish_resampler()
        if not self._pieces:
            return None
        if self._begin - self._start > MAX_SECONDS:
            return None
        samples = np.concatenate(self._pieces)
        offset = round((self._begin - self._start) * SAMPLE_RATE)
        samples = samples[-offset:] if offset < 0 else np.concatenate([np.zeros(offset, np.float32), samples])
        if self._end is not None:
            samples = samples[: round((self._end - self._start) * SAMPLE_RATE)]
        return samples.astype(np.float32) if samples.size else None

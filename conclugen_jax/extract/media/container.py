"""Files of FFmpeg (PyAV): their streams, decoded in the order of presentation from some time on."""

from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from conclugen_jax.errors import ConclugenError

WITHOUT_TIMES = ("avi",)
"""Containers that store when frames are decoded, not when they are shown. Nothing in them is skipped by seeking."""

LATE_SOUND = 0.1
"""Seconds after the wanted time at which sound may begin after a seek."""


class TooLate(Exception):
    """Decoding began after the wanted time."""


def library() -> Any:
    """Return PyAV.

    Its level of logging stays as it is: with a level set, FFmpeg's threads wait for Python's lock while Python waits for them.

    Raises:
      ConclugenError: PyAV is not installed.
    """
    try:
        import av
    except ImportError as e:
        raise ConclugenError("decoding needs PyAV: pip install 'conclugen_jax[extract]'") from e
    return av


class Media:
    """The streams of an open container.

    Attributes:
      pictures: the first stream of pictures, ``None`` if there is none or it is not wanted.
      sounds: the first stream of sound, likewise.
      seconds: that the container says it lasts; 0 if it does not say.
      notes: what was wrong with the packets decoded so far.
    """

    def __init__(self, container: Any, *, video: bool, sound: bool):
        self._container = container
        self.pictures = next((s for s in container.streams.video if not is_cover(s)), None) if video else None
        self.sounds = next(iter(container.streams.audio), None) if sound else None
        self._zero = Fraction(container.start_time or 0, 1_000_000)
        self.seconds = (container.duration or 0) / 1_000_000
        self.notes: list[str] = []
        self.streams = [s for s in (self.pictures, self.sounds) if s is not None]
        for stream in self.streams:
            stream.codec_context.thread_count = 1  # clips are decoded side by side

    def frames(self, start: float, back: float | None) -> Iterator[tuple[Any, Any, Fraction | None]]:
        """Yield (stream, frame, time) of decoded frames, each stream in its order of presentation.

        A time is in seconds from the beginning of the container; ``None`` if it is not known.

        Args:
          start: of the interval, in seconds; frames before it may be yielded too.
          back: seconds before ``start`` at which decoding begins; ``None``: at the beginning of the file.

        Raises:
          TooLate: a stream's first frame that can be decoded is after ``start``.
        """
        awaited = set()  # streams of which nothing was yielded yet
        if back is not None and self._container.format.name not in WITHOUT_TIMES:
            self._container.seek(int((start - back) * 1_000_000) + int(self._zero * 1_000_000), backward=True)
            awaited = set(self.streams)
        for stream, frame in self._decoded():
            time = None
            if frame.pts is not None and frame.time_base is not None:
                time = frame.pts * frame.time_base - self._zero
            if stream in awaited:
                if stream is self.pictures and not frame.key_frame:
                    continue  # the frames that it depends on were skipped
                if time is None or float(time) > start + (LATE_SOUND if stream is self.sounds else 0):
                    raise TooLate
                awaited.remove(stream)
            yield stream, frame, time
        if self.pictures in awaited:
            raise TooLate

    def _decoded(self) -> Iterator[tuple[Any, Any]]:
        """Decode all packets; skip broken ones, and stop at a broken end."""
        av, broken, damaged = library(), 0, 0
        # Decoded frames come in the order of presentation, so that the k-th takes the k-th of the times that there are.
        times: deque[int] | None = deque() if self._container.format.name in WITHOUT_TIMES else None
        for packet in self._packets(av):
            timed = times is not None and packet.stream.type == "video"
            if timed and packet.size and packet.dts is not None:
                times.append(packet.dts)
            try:
                for frame in packet.decode():
                    if timed:
                        frame.pts = times.popleft() if times else None
                    damaged += frame.is_corrupt
                    yield packet.stream, frame
            except av.error.EOFError:
                continue
            except av.error.FFmpegError:
                broken += 1
        if broken:
            self.notes.append(f"{broken} packets could not be decoded")
        if damaged:
            self.notes.append(f"{damaged} frames are damaged")

    def _packets(self, av: Any) -> Iterator[Any]:
        try:
            yield from self._container.demux(self.streams)
        except av.error.FFmpegError as e:
            self.notes.append(f"the file breaks off ({e.strerror})")

    def declared(self) -> float:
        """Return how many seconds the streams last by the header; 0 if it does not say."""
        each = [float(s.duration * s.time_base) if s.duration else 0.0 for s in self.streams]
        s = self.pictures
        if s is not None and s.frames and s.average_rate:
            # FFmpeg adapts the duration of an AVI file to what is there, but not its number of frames.
            return max(*each, float(s.frames / s.average_rate))
        if all(each):
            return max(each)
        return self.seconds if len(self.streams) == len(self._container.streams) else 0.0


def is_cover(stream: Any) -> bool:
    """Return whether a stream is a still picture attached to sound."""
    return bool(stream.disposition & type(stream.disposition).attached_pic)

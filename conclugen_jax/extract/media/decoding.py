"""Decode clips with FFmpeg (PyAV). Times are in seconds from the start of the container, as players show them."""

import contextlib
import math
from collections import deque
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av  # its level of logging stays: with one set, FFmpeg's threads wait for Python's lock while Python waits for them
import numpy as np

from conclugen_jax.data.files import stand_in
from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract.media import clip as clip_lib
from conclugen_jax.extract.media.clip import SILENCE, Clip, Sampler
from conclugen_jax.extract.media.sound import Recorder

SEEK_BACK = (1.0, 16.0)  # seconds before an interval at which decoding begins; the next where no key frame is between
WITHOUT_TIMES = ("avi",)  # containers that store when frames are decoded, not when they are shown
NOT_SOUGHT = (*WITHOUT_TIMES, "mpeg")  # containers whose times are wrong after a seek
LATE_SOUND = 0.1  # seconds after the wanted time at which sound may begin after a seek
LACKING = 1.0  # seconds by which a clip may be shorter than its header says
LENIENT = {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}
"""How files with titles that are not UTF-8 are opened; PyAV 19 does it by itself, and has no such argument."""
LOUDEST = 1000.0  # greatest amplitude that is plausible; in a damaged file numbers may be anything


class TooLate(Exception):
    """Decoding began after the wanted time."""


class TooLong(Exception):
    """A clip lasts longer than :data:`clip.MAX_SECONDS`."""


def decode(
    path: Path,  # of a file with pictures, sound or both
    *,
    rates: tuple[float, ...] = (
        16.0,
    ),  # frames per second at most, the highest first, each from the start on; (): none
    start: float = 0.0,  # of the interval, in seconds
    end: float | None = None,  # of the interval; None: the end of the clip
    sound: bool = True,  # whether to decode it
) -> Clip:
    """Decode a clip, or an interval of it, once.

    The frame at k / rate after the start is the one that is on the screen then. A broken end is cut off and noted.

    Raises:
      ConclugenError: no such file, nothing in it that can be decoded, or an interval that it does not have.
    """
    path = Path(path)
    if not path.is_file() or not path.stat().st_size:
        raise ConclugenError(f"{path}: {'empty (0 bytes)' if path.is_file() else 'no such file'}; fetch it again")
    if found := stand_in(path):  # FFmpeg takes some text for sound
        raise ConclugenError(f"{path}: {found}")
    until = math.inf if end is None else end
    if not 0 <= start < until or end == math.inf:
        raise ConclugenError(f"{path}: no interval from {start} s to {end} s")
    try:
        for back in (*(seconds for seconds in SEEK_BACK if start > seconds + 1), None):
            with av.open(str(path), **LENIENT) as container, contextlib.suppress(TooLate):
                notes: list[str] = []
                pictures = _chosen(container.streams.video, "pictures", notes) if rates else None
                sounds = _chosen(container.streams.audio, "sound", notes) if sound else None
                return _decode(container, (pictures, sounds), path, rates, start, until, back, notes)
    except av.error.FFmpegError as e:
        raise ConclugenError(f"{path}: cannot be decoded ({e.strerror}); is it a video, and complete?") from e
    except MemoryError as e:
        raise ConclugenError(f"{path}: its frames do not fit into memory; cut it into intervals") from e


def seconds(path: Path) -> float:
    """Return when the last packet of a clip ends, in seconds; 0 for a file that cannot be read. Nothing is decoded."""
    last = 0.0
    with contextlib.suppress(av.error.FFmpegError), av.open(str(path), **LENIENT) as container:
        zero = (container.start_time or 0) / 1_000_000
        streams = [s for s in (*container.streams.video, *container.streams.audio) if not is_cover(s)]
        for packet in container.demux(streams):
            time = packet.dts if packet.pts is None else packet.pts
            if time is not None:
                end = float((time + (packet.duration or 0)) * packet.time_base) - zero
                last = max(last, end if end < last + clip_lib.MAX_SECONDS else 0.0)  # else the packet is damaged
    return last


def is_cover(stream: Any) -> bool:
    """Return whether a stream is a still picture attached to sound."""
    return bool(stream.disposition & type(stream.disposition).attached_pic)


def _chosen(streams: Sequence[Any], what: str, notes: list[str]) -> Any | None:
    """Return the stream that a player chooses: the default, else the first; ``None`` if there is none with a decoder."""
    found = [s for s in streams if not is_cover(s)]
    usable = [s for s in found if s.codec_context is not None]
    if found and not usable:
        notes.append(f"FFmpeg has no decoder for the {what}")
    return max(usable, key=lambda s: bool(s.disposition & type(s.disposition).default), default=None)


def _decode(
    container: Any,
    both: tuple,  # the streams of pictures and of sound; ``None`` for those that are not decoded
    path: Path,
    rates: tuple[float, ...],
    start: float,
    end: float,
    back: float | None,
    notes: list[str],
) -> Clip:
    """Decode the streams, and add remarks on faults."""
    (pictures, sounds), takers = both, {}
    if pictures is not None:
        expected = (end if end < math.inf else (container.duration or 0) / 1_000_000) - start
        takers[pictures] = Sampler(pictures, rates, start, end, expected)
    if sounds is not None:
        takers[sounds] = Recorder(start, end)
    if not takers:
        raise ConclugenError(f"{path}: holds neither pictures nor sound that can be decoded")
    every = list(takers)
    try:
        _fill(takers, _frames(container, every, start, back, notes), notes)
    except TooLong as e:
        way_out = "cut it, by subtitles or a table of intervals"
        raise ConclugenError(f"{path}: more than {clip_lib.MAX_SECONDS:g} s in one piece; {way_out}") from e
    sampler, recorder = takers.get(pictures), takers.get(sounds)
    frames, times = sampler.finish() if sampler else ([], np.zeros(0))
    sound = recorder.finish() if recorder else None
    if not frames and sound is None:
        span = f"from {start:g} s to {end:g} s" if end < math.inf else f"from {start:g} s on"
        raise ConclugenError(f"{path}: nothing could be decoded {span}; {' '.join(notes) or 'is it complete?'}")
    notes += [note for taker in takers.values() for note in taker.notes]
    peak = 1.0 if sound is None else np.abs(sound).max(initial=0)
    if not SILENCE <= peak <= LOUDEST:
        notes.append("the sound is silence" if peak < SILENCE else "the sound is no sound")
        sound = None
    decoded, declared = max(taker.seconds for taker in takers.values()), _declared(container, every) - start
    if end == math.inf and len(takers) == len(every) and decoded < declared - LACKING:
        notes.append(f"the clip breaks off at {start + decoded:.1f} s of {start + declared:.1f} s")
    rate = sampler.rate if sampler else 0.0
    return Clip(frames, times, rate, sound, notes=tuple(notes), length=round(decoded, 6))


def _fill(takers: dict[Any, Sampler | Recorder], frames: Iterator[tuple], notes: list[str]) -> None:
    """Give the frames to the takers of their streams until all are done. A taker that fails is removed, with a note."""
    for stream, frame, time in frames:
        if (taker := takers.get(stream)) is None or taker.done:
            continue
        wrong = ""
        try:
            taker.add(frame, time)
        except (av.error.FFmpegError, ValueError) as e:
            wrong = f"cannot be converted ({e})"
        if taker.seconds > clip_lib.MAX_SECONDS:
            if min(each.seconds for each in takers.values()) > clip_lib.MAX_SECONDS / 2:
                raise TooLong
            wrong = wrong or f"would last far longer than the rest of the clip ({taker.seconds:.0f} s)"
        if wrong:
            del takers[stream]
            notes.append(f"the {'pictures' if stream.type == 'video' else 'sound'} {wrong}")
        if all(taker.done for taker in takers.values()):
            break


def _frames(
    container: Any, streams: list[Any], start: float, back: float | None, notes: list[str]
) -> Iterator[tuple[Any, Any, Fraction | None]]:
    """Yield (stream, frame, time) of decoded frames, each stream in its order of presentation.

    Decoding begins ``back`` seconds before ``start``, or with ``None`` at the beginning of the file, and yields from there on.
    """
    zero, awaited = container.start_time or 0, set()  # in microseconds; streams of which nothing was yielded yet
    if back is not None and container.format.name not in NOT_SOUGHT:
        container.seek(int((start - back) * 1_000_000) + zero, backward=True)
        awaited = set(streams)
    for stream, frame in _decoded(container, streams, notes):
        timed = frame.pts is not None and frame.time_base is not None
        time = frame.pts * frame.time_base - Fraction(zero, 1_000_000) if timed else None
        if stream in awaited:
            if stream.type == "video" and not frame.key_frame:
                continue  # the frames that it depends on were skipped
            if not timed or float(time) > start + (LATE_SOUND if stream.type == "audio" else 0):
                raise TooLate
            awaited.remove(stream)
        yield stream, frame, time
    if any(stream.type == "video" for stream in awaited):
        raise TooLate


def _decoded(container: Any, streams: list[Any], notes: list[str]) -> Iterator[tuple[Any, Any]]:
    """Decode all packets; skip broken ones, and stop at a broken end."""
    broken = damaged = 0
    for stream in streams:
        stream.codec_context.thread_count = 1  # clips are decoded side by side
    # Decoded frames come in the order of presentation, so that the k-th takes the k-th of the times that there are.
    times: deque[int] | None = deque() if container.format.name in WITHOUT_TIMES else None
    try:
        for packet in container.demux(streams):
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
    except av.error.FFmpegError as e:
        notes.append(f"the file breaks off ({e.strerror})")
    notes += [f"{broken} packets could not be decoded"] if broken else []
    notes += [f"{damaged} frames are damaged"] if damaged else []


def _declared(container: Any, streams: list[Any]) -> float:
    """Return the length of the streams by the header, in seconds; 0 if unknown."""
    each = [float(s.duration * s.time_base) if s.duration else 0.0 for s in streams]
    for s in streams:
        if s.type == "video" and s.frames and s.average_rate:
            # FFmpeg adapts the duration of an AVI file to what is there, but not its number of frames.
            return max(*each, float(s.frames / s.average_rate))
    if all(each):
        return max(each)
    return (container.duration or 0) / 1_000_000 if len(streams) == len(container.streams) else 0.0

"""Decode clips with FFmpeg (PyAV). Times are in seconds from the start of the container, as players show them."""

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract.media import clip as clip_lib
from conclugen_jax.extract.media import container
from conclugen_jax.extract.media import sound as sound_lib
from conclugen_jax.extract.media.clip import Clip
from conclugen_jax.extract.media.sampler import Sampler

SEEK_BACK = (1.0, 16.0)
"""Seconds before an interval at which decoding begins, in turn; without a key frame between it begins further back."""

LACKING = 1.0
"""Seconds by which a clip may be shorter than its header says."""


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

    The frame at k / rate after the start is the one that is on the screen then. A broken end is cut off and noted.

    Args:
      path: of a file with pictures, sound or both.
      rate: frames per second at most.
      also: lower rates at which frames are wanted. If the clip's frames have odd times, they are not among the others.
      start: of the interval, in seconds.
      end: of the interval; ``None``: the end of the clip.
      sound: whether to decode it.
      video: whether to decode pictures.

    Raises:
      ConclugenError: no such file, nothing in it that can be decoded, or an interval that it does not have.
    """
    av, path = container.library(), Path(path)
    if not path.is_file():
        raise ConclugenError(f"{path}: no such file")
    if not path.stat().st_size:
        raise ConclugenError(f"{path}: an empty file (0 bytes); fetch it again")
    if not 0 <= start < math.inf or (end is not None and not start < end < math.inf):
        raise ConclugenError(f"{path}: no interval from {start} s to {end} s")
    try:
        for back in (*(seconds for seconds in SEEK_BACK if start > seconds + 1), None):
            with av.open(str(path), metadata_errors="replace") as opened, contextlib.suppress(container.TooLate):
                media = container.Media(opened, video=video, sound=sound)
                return _decode(media, path, (rate, *also), start, end, back)
        raise AssertionError("the whole clip is never too late")
    except av.error.FFmpegError as e:
        raise ConclugenError(f"{path}: cannot be decoded ({e.strerror}); is it a video, and complete?") from e
    except MemoryError as e:
        raise ConclugenError(f"{path}: its frames do not fit into memory; cut it into intervals") from e


def _decode(
    media: container.Media, path: Path, rates: tuple[float, ...], start: float, end: float | None, back: float | None
) -> Clip:
    takers: dict = {}
    if media.pictures is not None:
        seconds = (media.seconds if end is None else end) - start
        takers[media.pictures] = Sampler(media.pictures, rates, start, end, seconds)
    if media.sounds is not None:
        takers[media.sounds] = sound_lib.Recorder(start, end)
    if not takers:
        raise ConclugenError(f"{path}: holds neither pictures nor sound that can be decoded")
    for stream, frame, time in media.frames(start, back):
        if not takers[stream].done:
            takers[stream].add(frame, time)
        if any(taker.too_long for taker in takers.values()):
            raise ConclugenError(
                f"{path}: more than {clip_lib.MAX_SECONDS:g} s in one piece; cut it, by subtitles or a table of intervals"
            )
        if all(taker.done for taker in takers.values()):
            break
    return _finished(media, path, takers.get(media.pictures), takers.get(media.sounds), rates[0], start, end)


def _finished(
    media: container.Media,
    path: Path,
    sampler: Sampler | None,
    recorder: sound_lib.Recorder | None,
    rate: float,
    start: float,
    end: float | None,
) -> Clip:
    """Assemble what was decoded, and note what was odd."""
    frames, times = sampler.finish() if sampler is not None else ([], np.zeros(0))
    sound, notes = recorder.finish() if recorder is not None else None, media.notes
    if not frames and sound is None:
        interval = (
            "" if not start and end is None else f" from {start:g} s to {'the end' if end is None else f'{end:g} s'}"
        )
        raise ConclugenError(f"{path}: nothing could be decoded{interval}; {' '.join(notes) or 'is it complete?'}")
    if sampler is not None and sampler.shrunk:
        notes.append("frames are smaller than they might be, since there are many")
    if sound is not None and (fault := sound_lib.fault(sound)):
        notes.append(fault)
        sound = None
    decoded = max(taker.seconds for taker in (sampler, recorder) if taker is not None)
    declared = media.declared() - start
    if end is None and decoded < declared - LACKING:
        notes.append(f"the clip breaks off at {start + decoded:.1f} s of {start + declared:.1f} s")
    rate = sampler.rate if sampler is not None else rate
    return Clip(frames, times, rate, sound, notes=tuple(notes), length=round(decoded, 6))

"""Frames at the times at which they are shown: of a variable rate below the one asked for, and in program streams."""

import math
import types
from fractions import Fraction

import av
import numpy as np
import pytest

from conclugen_jax.extract.media import decoding as media
from conclugen_jax.extract.media.clip import Sampler
from tests import clips

SLOW = np.array([0, 0.1, 0.2, 0.3, 1.0, 1.1, 2.0, 2.1, 2.2, 3.0])  # of three a second on average


def numbers(clip):
    return [round(clips.number_of(frame) / 6) for frame in clip.frames]


def images(count):
    """Frames that differ so much that no encoder takes them for the same."""
    return [clips.image(6 * (i % 10)) for i in range(count)]


@pytest.mark.parametrize("rate", [5, 25])
@pytest.mark.parametrize(
    ("ending", "codec"),
    [
        (".mp4", "mpeg4"),
        (".mov", "mpeg4"),
        (".mkv", "ffv1"),
        (".webm", "libvpx-vp9"),
        (".flv", "flv1"),
    ],
)
def test_every_frame_of_a_slow_clip_of_a_variable_rate_is_seen_at_its_time(tmp_path, ending, codec, rate):
    path = clips.write(tmp_path / f"a{ending}", SLOW, codec=codec, rate=rate, images=images(10), b_frames=0)
    clip = media.decode(path, rates=(16.0, 1.0))
    assert clip.rate == 16
    assert numbers(clip)[:49] == [int(np.searchsorted(SLOW, k / 16 + 1e-9, "right")) - 1 for k in range(49)]
    assert [round(clips.number_of(frame) / 6) for frame in clip.at_rate(1.0)] == [0, 4, 6, 9]
    late = media.decode(path, start=0.95, end=1.2)
    assert numbers(late) == [3, 4, 4, 5]


@pytest.mark.parametrize("rate", [5, Fraction(15, 2), 12, 15, Fraction(15_000, 1001)])
@pytest.mark.parametrize(("ending", "codec"), [(".mp4", "mpeg4"), (".mkv", "ffv1")])
@pytest.mark.parametrize("start", [0.0, 0.733])
def test_every_frame_of_a_slow_clip_of_a_constant_rate_is_seen_once(tmp_path, ending, codec, rate, start):
    path = clips.write(
        tmp_path / f"a{ending}", clips.steady(3.0, float(rate)), codec=codec, rate=rate, images=images(45), b_frames=0
    )
    clip = media.decode(path, start=start)
    assert clip.rate == pytest.approx(float(rate), rel=1e-3)
    first = int(start * rate + 0.02)
    assert numbers(clip)[:-1] == [i % 10 for i in range(first, first + len(clip.frames) - 1)]
    assert len(clip.frames) == pytest.approx((3 - start) * rate, abs=1)


@pytest.mark.parametrize("b_frames", [0, 2])
@pytest.mark.parametrize("rate", [24, 25])
@pytest.mark.parametrize(("ending", "codec"), [(".mpg", "mpeg1video"), (".vob", "mpeg2video"), (".mpg", "libx264")])
def test_program_streams_have_the_right_times(tmp_path, ending, codec, rate, b_frames):
    path = tmp_path / f"a{ending}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size, stream.bit_rate = 64, 48, "yuv420p", 12, 4_000_000
        stream.codec_context.max_b_frames = b_frames
        for i, picture in enumerate(images(5 * rate)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = i, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    content, at, count = bytearray(path.read_bytes()), -1, 0
    while (at := content.find(b"\0\0\1\xe0", at + 1)) >= 0:  # most packets that have a time lose it, as on DVDs
        if content[at + 6] >> 6 == 2 and content[at + 7] >> 6:
            if count % 4:
                content[at + 7] &= 0x3F
                content[at + 9 : at + 9 + content[at + 8]] = b"\xff" * content[at + 8]
            count += 1
    path.write_bytes(content)
    assert numbers(media.decode(path, rates=(float(rate),))) == [i % 10 for i in range(5 * rate)]
    part = media.decode(path, rates=(float(rate),), start=3.0, end=4.0)
    assert numbers(part) == [i % 10 for i in range(3 * rate, 4 * rate)]


def test_frames_with_the_time_of_a_neighbour_follow_each_other():
    rate = Fraction(25)
    context = types.SimpleNamespace(sample_aspect_ratio=None)
    stream = types.SimpleNamespace(average_rate=rate, sample_aspect_ratio=None, codec_context=context)
    sampler = Sampler(stream, (25.0,), 0.0, math.inf, 1.0)
    for i, time in enumerate([0, None, 1, None, 5, 5, None, 20]):  # in frames; the last one is after a gap
        frame = av.VideoFrame.from_ndarray(clips.image(6 * i), format="rgb24")
        sampler.add(frame, None if time is None else time / rate)
    frames, times = sampler.finish()
    assert [round(clips.number_of(frame) / 6) for frame in frames] == [*range(7), *[6] * 13, 7]
    np.testing.assert_allclose(times, np.arange(21) / 25)

"""Decoded frames are those on the screen at exact times; sound is where it belongs; whatever is wrong is named."""

import io
import math
import types
from fractions import Fraction

import av
import numpy as np
import pytest

from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract.media import clip as clip_lib, decoding as media
from tests import clips


def numbers(clip):
    return [clips.number_of(frame) for frame in clip.frames]


def shown(times, wanted):
    """Index of the frame on the screen at each time."""
    return [max(i for i, t in enumerate(times) if t <= w + 1e-9) for w in wanted]


def test_frames_of_a_constant_rate(tmp_path):
    times = clips.steady(2.0)
    clip = media.decode(clips.write(tmp_path / "a.mkv", times))
    assert clip.rate == 16
    assert clip.times.tolist() == [k / 16 for k in range(32)]
    assert numbers(clip) == shown(times, clip.times)
    assert [clips.number_of(f) for f in clip.at_rate(1.0)] == [0, 25]
    assert clip.sound is None
    assert clip.notes == ()


def test_frames_of_a_variable_rate(tmp_path):
    times = np.array([0, 0.04, 0.5, 0.52, 0.54, 1.3, 1.31, 1.9])
    clip = media.decode(clips.write(tmp_path / "a.mkv", times), rates=(8.0,))
    assert numbers(clip)[:16] == shown(times, np.arange(16) / 8)


def test_each_rate_is_exact_where_frames_have_odd_times(tmp_path):
    times = np.unique(np.round(np.random.default_rng(3).uniform(0, 10, 73), 2))
    times[0] = 0
    path = clips.write(tmp_path / "a.mkv", times, rate=Fraction(73, 10))
    clip = media.decode(path, rates=(16.0, 2.0, 1.0))
    assert clip.rate == 16  # not the mean rate: on its grid, frames would be missing
    for rate in (1.0, 2.0):
        seen = [clips.number_of(f) for f in clip.at_rate(rate)]
        assert seen == [n % 60 for n in shown(times, np.arange(len(seen)) / rate)]
        assert seen == numbers(media.decode(path, rates=(rate,)))
    alone = media.decode(path, rates=(16.0,))
    assert [clips.number_of(f) for f in clip.at_rate(16.0)] == numbers(alone)
    assert clip.times[clip.rows_at(16.0)].tolist() == alone.times.tolist()


@pytest.mark.parametrize(("codec", "b_frames"), [("libx264", 3), ("libx264", 0), ("mpeg4", 2), ("mpeg4", 0)])
def test_frames_of_a_container_without_times_of_their_own(tmp_path, codec, b_frames):
    """AVI says when a frame is to be decoded; later frames may be decoded before earlier ones."""
    path = clips.write(tmp_path / "a.avi", clips.steady(2.0), codec=codec, gop=12, b_frames=b_frames)
    assert numbers(media.decode(path, rates=(25.0,))) == list(range(50))
    part = media.decode(path, rates=(25.0,), start=1.2, end=1.6)
    assert numbers(part) == list(range(30, 40))


def test_a_slow_clip_keeps_its_own_rate(tmp_path):
    clip = media.decode(clips.write(tmp_path / "a.mkv", clips.steady(3.0, 5), rate=5))
    assert clip.rate == 5
    assert numbers(clip) == list(range(15))
    assert [clips.number_of(f) for f in clip.at_rate(1.0)] == [0, 5, 10]


@pytest.mark.parametrize(("start", "end"), [(0.5, 1.5), (3.3, 4.0), (2.0, None), (0.0, 0.3)])
def test_an_interval(tmp_path, start, end):
    times, sound = clips.steady(5.0), np.linspace(-0.9, 0.9, 80_000).astype(np.float32)
    clip = media.decode(clips.write(tmp_path / "a.mkv", times, sound=sound), rates=(10.0,), start=start, end=end)
    length = (end or 5.0) - start
    wanted = [start + k / 10 for k in range(round(length * 10))]
    assert clip.times == pytest.approx([w - start for w in wanted])
    assert [n % 60 for n in numbers(clip)] == [i % 60 for i in shown(times, wanted)]
    assert len(clip.sound) == round(length * 16_000)
    first = round(start * 16_000)
    np.testing.assert_allclose(clip.sound, sound[first : first + len(clip.sound)], atol=1e-4)


@pytest.mark.parametrize(("ending", "codec"), [(".mpg", "mpeg1video"), (".ts", "mpeg2video"), (".mp4", "mpeg4")])
@pytest.mark.parametrize("gop", [12, 400])
def test_an_interval_far_from_a_key_frame_is_that_of_the_whole_clip(tmp_path, ending, codec, gop):
    path = clips.write(tmp_path / f"a{ending}", clips.steady(20.0), codec=codec, gop=gop)
    whole = media.decode(path, rates=(25.0,))
    assert whole.times[-1] == pytest.approx(20.0, abs=0.1)  # whatever time the container begins at
    for start in (2.4, 5.6, 17.2):
        part = media.decode(path, rates=(25.0,), start=start, end=start + 1)
        first = round(start * 25)
        np.testing.assert_array_equal(part.frames, whole.frames[first : first + 25])


def test_rates_end_where_the_clip_does(tmp_path):
    clip = media.decode(clips.write(tmp_path / "a.mkv", clips.steady(8 / 7.5, 7.5), rate=Fraction(15, 2)))
    assert clip.rate == 7.5
    assert [clips.number_of(f) for f in clip.at_rate(2.0)] == [0, 3, 7]


def test_times_that_leap_do_not_fill_the_memory(tmp_path):
    leaping = clips.write(tmp_path / "a.mkv", [0.0, 0.04, 86_400.0, 86_400.04])
    with pytest.raises(ConclugenError, match="more than 300 s in one piece; cut it"):
        media.decode(leaping)
    assert len(media.decode(leaping, end=2.0).frames) == 32
    late = clips.write(tmp_path / "b.mkv", clips.steady(2.0), sound=clips.tone(1.0), sound_start=20_000.0)
    assert media.decode(late, end=2.0).sound is None


def test_pixels_that_are_not_square_are_made_so(tmp_path):
    clip = media.decode(clips.write(tmp_path / "a.mp4", clips.steady(0.5), aspect=2, codec="mpeg4"))
    assert clip.frames[0].shape == (48, 128, 3)


def test_turned_clips_are_upright(tmp_path):
    picture = clips.image(20)
    path = clips.write(tmp_path / "a.mov", clips.steady(0.5), images=[picture] * 13, codec="mpeg4")
    content = bytearray(path.read_bytes())
    # The matrix of the track header: turned by 90 degrees. (FFmpeg's library here has no call that writes one.)
    matrix = content.index(b"tkhd") + 4 + 4 + 8 + 4 + 4 + 4 + 8 + 2 + 2 + 2 + 2
    one, none = (1 << 16).to_bytes(4, "big"), bytes(4)
    minus = (2**32 - (1 << 16)).to_bytes(4, "big")
    content[matrix : matrix + 36] = none + one + none + minus + none + none + none + none + (1 << 30).to_bytes(4, "big")
    path.write_bytes(content)
    frame = media.decode(path).frames[0]
    assert frame.shape == (64, 48, 3)
    # Turned clockwise, the left half is above.
    assert abs(float(frame[8:24, 8:40].mean()) - 80) < 4
    assert float(frame[40:60, 4:10, 0].mean()) > float(frame[40:60, -10:-4, 0].mean()) + 100


def test_large_frames_are_made_smaller(tmp_path):
    clip = media.decode(clips.write(tmp_path / "a.mkv", [0, 0.04], width=3840, height=2160, codec="mpeg4"))
    assert clip.frames[0].shape == (720, 1280, 3)


def test_frames_of_a_long_clip_are_made_smaller(tmp_path, monkeypatch):
    path = clips.write(tmp_path / "a.mkv", clips.steady(4.0))
    assert media.decode(path).frames[0].shape == (48, 64, 3)
    monkeypatch.setattr(clip_lib, "MAX_BYTES", 100_000)
    clip = media.decode(path)
    assert sum(frame.nbytes for frame in clip.frames) <= 100_000
    assert len(clip.frames) == 64
    assert clip.frames[0].shape == (20, 26, 3)
    assert clip.notes == ("frames are smaller than they might be, since there are many",)
    assert media.decode(path, end=0.5).frames[0].shape == (48, 64, 3)
    slow = media.decode(path, rates=(1.0,))
    np.testing.assert_array_equal(slow.frames, clip.at_rate(1.0))  # the size does not depend on the rate


def test_frames_are_averaged_where_they_are_made_smaller(tmp_path):
    stripes = np.zeros((480, 2560, 3), np.uint8)
    stripes[:, ::2] = 200
    clip = media.decode(clips.write(tmp_path / "a.mkv", [0.0], width=2560, height=480, images=[stripes]))
    assert clip.frames[0].shape == (240, 1280, 3)
    assert abs(clip.frames[0].astype(int) - 100).max() <= 6


@pytest.mark.parametrize(("ending", "codec"), [(".mkv", "ffv1"), (".mp4", "mpeg4")])
@pytest.mark.parametrize(("late", "expected"), [(0.5, 0.0), (0.9, 0.0), (1.5, 1.5)])
def test_pictures_that_begin_a_little_late_are_there_from_the_start(tmp_path, late, expected, ending, codec):
    path = clips.write(tmp_path / f"a{ending}", late + clips.steady(1.0), codec=codec, sound=clips.tone(late + 1.0))
    clip = media.decode(path)
    assert clip.times[0] == expected
    assert numbers(clip)[0] == 0
    assert clip.times[-1] == pytest.approx(late + 1, abs=1 / 16 + 1e-6)


def test_a_cover_is_no_picture_of_a_clip():
    stream = av.open(io.BytesIO(), "w", format="matroska").add_stream("mjpeg", rate=1)
    assert not media.is_cover(stream)
    stream.disposition = type(stream.disposition).attached_pic
    assert media.is_cover(stream)


def test_frames_without_times_follow_each_other():
    unknown = types.SimpleNamespace(sample_aspect_ratio=None)
    stream = types.SimpleNamespace(
        average_rate=Fraction(4), guessed_rate=None, sample_aspect_ratio=None, codec_context=unknown
    )
    taken = clip_lib.Sampler(stream, (4.0,), 0.0, math.inf, 1.0)
    for i in range(4):
        frame = av.VideoFrame.from_ndarray(clips.image(10 * i), format="rgb24")
        taken.add(frame, None)
    frames, times = taken.finish()
    assert times.tolist() == [0, 0.25, 0.5, 0.75]
    assert [clips.number_of(frame) for frame in frames] == [0, 10, 20, 30]


def test_one_frame(tmp_path):
    clip = media.decode(clips.write(tmp_path / "a.mkv", [0.0]))
    assert numbers(clip) == [0]


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9])
def test_a_clip_that_breaks_off_gives_what_is_there(tmp_path, keep):
    times = clips.steady(4.0)
    path = clips.write(tmp_path / "a.mkv", times, sound=clips.tone(4.0))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    clip = media.decode(path)
    assert 0 < len(clip.frames) < 64
    assert [n % 60 for n in numbers(clip)] == [i % 60 for i in shown(times, clip.times)]


def test_broken_packets_are_noted(tmp_path):
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (48, 64, 3), dtype=np.uint8) for _ in range(50)]
    path = clips.write(tmp_path / "a.avi", clips.steady(2.0), codec="mpeg4", images=pictures)
    content = bytearray(path.read_bytes())
    for at in rng.integers(len(content) // 3, len(content) * 2 // 3, 400):
        content[at] = rng.integers(256)
    path.write_bytes(content)
    clip = media.decode(path)
    assert 5 < len(clip.frames) <= 40
    assert all(frame.shape == (48, 64, 3) for frame in clip.frames)


def test_what_is_no_clip_is_named(tmp_path):
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("I am no video, whatever my ending says. " * 50)
    whole = clips.write(tmp_path / "whole.mp4", clips.steady(1.0), codec="mpeg4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])  # without its table at the end
    reasons = {
        "empty": "0 bytes",
        "text": r"is text \('I am no video",
        "cut": "cannot be decoded",
        "none": "no such file",
    }
    for name, message in reasons.items():
        with pytest.raises(ConclugenError, match=message) as e:
            media.decode(tmp_path / f"{name}.mp4")
        assert "\n" not in str(e.value)


def test_an_ending_that_is_wrong_does_not_matter(tmp_path):
    path = clips.write(tmp_path / "a.mkv", clips.steady(1.0))
    assert len(media.decode(path.rename(tmp_path / "a.mp4")).frames) == 16


def test_intervals_that_are_not_there(tmp_path):
    path = clips.write(tmp_path / "a.mkv", clips.steady(1.0), sound=clips.tone(1.0))
    with pytest.raises(ConclugenError, match="nothing could be decoded from 5 s to 6 s"):
        media.decode(path, start=5.0, end=6.0)
    for start, end in ((2.0, 1.0), (-1.0, 1.0), (float("nan"), None)):
        with pytest.raises(ConclugenError, match="no interval"):
            media.decode(path, start=start, end=end)


def test_too_long_in_one_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(clip_lib, "MAX_SECONDS", 1.0)
    with pytest.raises(ConclugenError, match="more than 1 s in one piece; cut it"):
        media.decode(clips.write(tmp_path / "a.mkv", clips.steady(3.0)))
    assert media.decode(tmp_path / "a.mkv", start=1.5, end=2.0).frames


def test_only_the_interval_counts_for_the_longest(tmp_path, monkeypatch):
    """Wherever decoding has to begin: at a key frame before, or at the start of the clip."""
    monkeypatch.setattr(clip_lib, "MAX_SECONDS", 3.0)
    sound = np.linspace(-0.5, 0.5, 128_000).astype(np.float32)
    for name, codec, gop in (("a.mkv", "mpeg4", 25), ("b.mkv", "mpeg4", 400), ("c.avi", "mpeg4", 25)):
        path = clips.write(tmp_path / name, clips.steady(8.0), codec=codec, gop=gop, b_frames=0, sound=sound)
        clip = media.decode(path, rates=(5.0,), start=4.4, end=7.3)
        assert len(clip.frames) == 15
        np.testing.assert_allclose(clip.sound, sound[70_400:116_800], atol=1e-4)
        with pytest.raises(ConclugenError, match="more than 3 s in one piece"):
            media.decode(path, start=4.0, end=7.2)


@pytest.mark.parametrize("rate", [1.0, 16.0])
def test_the_length_is_that_of_the_clip_whatever_the_rate(tmp_path, rate):
    path = clips.write(tmp_path / "a.mkv", clips.steady(2.32), sound=clips.tone(1.0))
    assert media.decode(path, rates=(rate,)).length == pytest.approx(2.32, abs=1e-3)
    assert media.decode(path, rates=(rate,), start=1.0, end=2.0).length == 1.0
    assert media.decode(path, rates=(rate,), start=2.0, end=4.0).length == pytest.approx(0.32, abs=1e-3)
    assert media.decode(path, rates=()).length == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("ending", [".mkv", ".avi"])
def test_a_clip_that_ends_before_its_header_says_is_told(tmp_path, ending):
    path = clips.write(tmp_path / f"a{ending}", clips.steady(10.0), sound=clips.tone(10.0))
    assert media.decode(path).notes == ()
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    clip = media.decode(path)
    assert 5 < clip.length < 9
    assert any(f"the clip breaks off at {clip.length:.1f} s of 10.0 s" in note for note in clip.notes), clip.notes


def test_frames_that_were_left_out_are_not_taken_for_others():
    frames = [np.full((2, 2, 3), i, np.uint8) for i in range(6)]
    times = np.array([0.5, 0.75, 1.0, 1.25, 3.0, 3.25])  # of 4 a second: none from 0 to 0.5 and from 1.5 to 3
    clip = clip_lib.Clip(frames, times, 4.0, None)
    assert [int(f[0, 0, 0]) for f in clip.at_rate(1.0)] == [2, 4]
    assert [int(f[0, 0, 0]) for f in clip.at_rate(2.0)] == [0, 2, 4]
    between = clip_lib.Clip(frames[:1], np.array([0.5]), 4.0, None)
    assert [int(f[0, 0, 0]) for f in between.at_rate(1.0)] == [0]

"""The sound of clips: its channels, its times, its gaps, and what is rejected."""

import math
import struct
from fractions import Fraction

import av
import numpy as np
import pytest

from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract.media import decoding as media
from tests import clips


def test_sound_that_leaps_is_too_long(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as opened:
        stream = opened.add_stream("pcm_s16le", rate=16_000)
        stream.layout = "mono"
        for start in (0, 320_000_000):
            frame = av.AudioFrame.from_ndarray(np.full((1, 16_000), 9000, np.int16), format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 16_000, start, Fraction(1, 16_000)
            opened.mux(stream.encode(frame))
        opened.mux(stream.encode(None))
    with pytest.raises(ConclugenError, match="more than 300 s in one piece; cut it"):
        media.decode(path)
    clip = media.decode(path, end=2.0)
    assert (len(clip.sound), clip.length) == (16_000, 2.0)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_sound_that_is_none_is_left_out(tmp_path, value):
    from scipy.io import wavfile

    sound = clips.tone(1.0)
    sound[5000] = value
    wavfile.write(tmp_path / "a.wav", 16_000, sound)
    clip = media.decode(tmp_path / "a.wav")
    assert (clip.sound, clip.notes) == (None, ("the sound is no sound",))


@pytest.mark.parametrize(("ending", "codec"), [(".mkv", "ffv1"), (".mp4", "mpeg4"), (".mov", "mpeg4")])
def test_sound_that_begins_later_stays_where_it_is(tmp_path, ending, codec):
    path = clips.write(tmp_path / f"a{ending}", clips.steady(2.0), codec=codec, sound=clips.tone(1.0), sound_start=0.5)
    sound = media.decode(path).sound
    assert len(sound) == pytest.approx(24_000, abs=0 if ending == ".mkv" else 1024)
    assert np.abs(sound[:7_900]).max() < 1e-2
    assert np.abs(sound[8_100:]).max() > 0.25


def test_sound_is_the_mean_of_its_channels_at_16_khz(tmp_path):
    import av

    stereo = np.stack([clips.tone(1.0), np.zeros(16_000, np.float32)])
    rate = 48_000
    stereo = np.repeat(stereo, 3, axis=1)
    with av.open(str(tmp_path / "a.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=rate)
        stream.layout = "stereo"
        samples = (stereo * 32767).astype(np.int16).T.reshape(1, -1).copy()
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="stereo")
        frame.sample_rate = rate
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    clip = media.decode(tmp_path / "a.wav")
    assert clip.frames == []
    assert abs(len(clip.sound) - 16_000) < 40
    assert np.abs(clip.sound[100:-100]).max() == pytest.approx(0.15, abs=0.01)


def wave(path, channels, mask=None, rate=16_000):
    """Write 16-bit sound [channels, samples]; ``mask`` says which channels they are, ``None``: nothing does."""
    count = len(channels)
    sizes = struct.pack("<HIIHH", count, rate, rate * 2 * count, 2 * count, 16)
    head = b"\1\0" + sizes
    if mask is not None:
        head = (
            b"\xfe\xff" + sizes + struct.pack("<HHIH", 22, 16, mask, 1) + bytes.fromhex("000000001000800000aa00389b71")
        )
    data = (np.asarray(channels).T * 32767).astype("<i2").tobytes()
    parts = b"fmt " + struct.pack("<I", len(head)) + head + b"data" + struct.pack("<I", len(data)) + data
    path.write_bytes(b"RIFF" + struct.pack("<I", 4 + len(parts)) + b"WAVE" + parts)
    return path


@pytest.mark.parametrize(
    ("mask", "parts"),
    [
        (None, [1]),
        (None, [0.5, 0.5]),
        (0x8, [1]),  # of low-frequency effects alone
        (0x9, [1, 0]),  # left, low-frequency effects
        (0xB, [0.5, 0.5, 0]),  # 2.1
        (0x7, [0.2929, 0.2929, 0.4142]),  # left, right, centre
        (0x33, [0.2929, 0.2929, 0.2071, 0.2071]),  # quad
        (0x3F, [0.2071, 0.2071, 0.2929, 0, 0.1464, 0.1464]),  # 5.1
        (0x60F, [0.2071, 0.2071, 0.2929, 0, 0.1464, 0.1464]),  # 5.1 with the sides
        (0x63F, [0.1602, 0.1602, 0.2265, 0, 0.1133, 0.1133, 0.1133, 0.1133]),  # 7.1
        (None, [1 / 3] * 3),
        (None, [1 / 12] * 12),
    ],
)
def test_channels_are_mixed_as_ffmpeg_mixes_them(tmp_path, mask, parts):
    times = np.arange(8000) / 16_000
    channels = np.stack([0.5 * np.sin(2 * np.pi * 100 * (3 + i) * times) for i in range(len(parts))])
    clip = media.decode(wave(tmp_path / "a.wav", channels, mask))
    np.testing.assert_allclose(clip.sound @ channels.T / (channels**2).sum(axis=1), parts, atol=1e-3)
    unnamed = "the sound has channels without names, and their mean was taken"
    assert clip.notes == ((unnamed,) if mask is None and len(parts) > 2 else ())


def test_channels_that_cancel_each_other_are_heard(tmp_path):
    left = clips.tone(1.0)
    clip = media.decode(wave(tmp_path / "a.wav", [left, 0.0001 - left], 3))
    np.testing.assert_allclose(clip.sound, left, atol=1e-3)
    assert clip.notes == ("the channels of the sound cancel each other, and the first was taken",)


@pytest.mark.parametrize(
    ("name", "codec", "rate"),
    [
        ("a.m4a", "aac", 44_100),
        ("a.mkv", "aac", 48_000),
        ("a.mp3", "libmp3lame", 44_100),
        ("b.mp4", "libmp3lame", 44_100),
        ("a.ogg", "libopus", 48_000),
        ("a.webm", "libopus", 48_000),
        ("a.flac", "flac", 22_050),
    ],
)
def test_the_delay_of_encoders_is_cut(tmp_path, name, codec, rate):
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.layout = "mono"
        samples = np.zeros(2 * rate, np.float32)
        for start in (0.2, 0.7, 1.45):
            burst = np.hanning(rate // 50) * np.sin(2 * np.pi * 1000 * np.arange(rate // 50) / rate)
            samples[round(start * rate) :][: len(burst)] = 0.8 * burst
        frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        size = stream.codec_context.frame_size or 1024
        resampler = av.AudioResampler(format=stream.format, layout="mono", rate=rate, frame_size=size)
        for piece in (*resampler.resample(frame), *resampler.resample(None), None):
            container.mux(stream.encode(piece))
    sound = media.decode(tmp_path / name).sound
    for start in (0.2, 0.7, 1.45):
        around = slice(round((start - 0.1) * 16_000), round((start + 0.15) * 16_000))
        centre = np.average(np.arange(16_000 * 2 + 800)[around], weights=sound[around] ** 2)
        assert centre == pytest.approx((start + 0.01) * 16_000, abs=4)


def test_the_default_stream_of_sound_is_taken(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        streams = [container.add_stream("pcm_s16le", rate=16_000, layout="mono") for _ in range(2)]
        streams[0].disposition, streams[1].disposition = 0, type(streams[1].disposition).default
        for stream, value in zip(streams, (3000, 9000), strict=True):
            frame = av.AudioFrame.from_ndarray(np.full((1, 16_000), value, np.int16), format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 16_000, 0, Fraction(1, 16_000)
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    np.testing.assert_allclose(media.decode(tmp_path / "a.mkv").sound, 9000 / 32768, atol=1e-3)


def test_a_stream_without_a_decoder_costs_its_modality_alone(tmp_path):
    path = clips.write(tmp_path / "a.mkv", clips.steady(1.0), sound=clips.tone(1.0))
    path.write_bytes(path.read_bytes().replace(b"A_PCM/INT/LIT", b"A_XXX/INT/LIT"))
    clip = media.decode(path)
    assert len(clip.frames) == 16
    assert (clip.sound, clip.notes) == (None, ("FFmpeg has no decoder for the sound",))
    with pytest.raises(ConclugenError, match="neither pictures nor sound that can be decoded"):
        media.decode(path, rates=())
    path = clips.write(tmp_path / "b.mkv", clips.steady(1.0), sound=clips.tone(1.0), codec="mpeg4")
    path.write_bytes(path.read_bytes().replace(b"V_MPEG4/ISO/ASP", b"V_XXXX4/ISO/ASP"))
    clip = media.decode(path)
    assert (clip.frames, len(clip.sound), clip.notes) == ([], 16_000, ("FFmpeg has no decoder for the pictures",))


def test_sound_that_cannot_be_converted_costs_the_sound_alone(tmp_path, monkeypatch):
    path = clips.write(tmp_path / "a.mkv", clips.steady(1.0), sound=clips.tone(1.0))

    def refuse(*_):
        raise ValueError("no such layout")

    monkeypatch.setattr(media.Recorder, "add", refuse)
    clip = media.decode(path)
    assert (len(clip.frames), clip.sound, clip.length) == (16, None, 1.0)
    assert clip.notes == ("the sound cannot be converted (no such layout)",)


@pytest.mark.parametrize("leaping", ["sound", "pictures"])
def test_times_that_leap_cost_their_stream_alone(tmp_path, leaping):
    times = clips.steady(1.0) if leaping == "sound" else [0.0, 0.04, 86_400.0]
    start = 20_000.0 if leaping == "sound" else 0.0
    clip = media.decode(clips.write(tmp_path / "a.mkv", times, sound=clips.tone(1.0), sound_start=start))
    assert (len(clip.frames), clip.sound is None) == ((16, True) if leaping == "sound" else (0, False))
    (note,) = clip.notes
    assert note.startswith(f"the {leaping} would last far longer than the rest of the clip (")


def test_silence_counts_as_no_sound(tmp_path):
    clip = media.decode(clips.write(tmp_path / "a.mkv", clips.steady(1.0), sound=np.zeros(16_000, np.float32)))
    assert clip.sound is None
    assert clip.notes == ("the sound is silence",)


@pytest.mark.parametrize(("peak", "heard"), [(0.9e-4, False), (1.3e-4, True)])
def test_where_silence_ends(tmp_path, peak, heard):
    from scipy.io import wavfile

    wavfile.write(tmp_path / "a.wav", 16_000, (peak * np.sin(np.arange(16_000) / 9)).astype(np.float32))
    assert (media.decode(tmp_path / "a.wav").sound is not None) is heard


def test_all_of_the_sound_is_heard(tmp_path):
    with av.open(str(tmp_path / "a.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=44_100)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.full((1, 44_100), 9000, np.int16), format="s16", layout="mono")
        frame.sample_rate = 44_100
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    assert abs(len(media.decode(tmp_path / "a.wav").sound) - 16_000) <= 2


def test_sound_whose_form_changes_is_heard_on(tmp_path):
    frames = []
    for rate, layout in ((16_000, "mono"), (48_000, "stereo")):
        count = rate // 2
        samples = np.full((1 if layout == "mono" else 2, count), 0.25, np.float32)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, len(frames) * count, Fraction(1, rate)
        frames.append(frame)
    recorder = media.Recorder(0.0, math.inf)
    for frame in frames:
        recorder.add(frame, frame.pts * frame.time_base)
    heard = recorder.finish()
    assert abs(len(heard) - 16_000) < 40
    np.testing.assert_allclose(np.delete(heard, np.s_[7900:8100])[:-100], 0.25, atol=1e-3)


def test_a_gap_in_the_sound_is_silence(tmp_path):
    import av

    whole, samples = tmp_path / "a.mkv", (clips.tone(1.0) * 32767).astype(np.int16)
    with av.open(str(whole), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=16_000)
        stream.layout = "mono"
        for start in (0, 32_000):  # the second second is missing
            for i in range(0, 16_000, 1000):
                frame = av.AudioFrame.from_ndarray(samples[None, i : i + 1000], format="s16", layout="mono")
                frame.sample_rate, frame.pts = 16_000, start + i
                for packet in stream.encode(frame):
                    packet.pts = packet.dts = (start + i) // 16
                    packet.time_base = Fraction(1, 1000)
                    container.mux(packet)
    sound = media.decode(whole).sound
    assert len(sound) == pytest.approx(48_000, abs=200)
    assert np.abs(sound[16_500:31_500]).max() < 1e-3
    assert np.abs(sound[:15_000]).max() > 0.25
    assert np.abs(sound[33_000:]).max() > 0.25

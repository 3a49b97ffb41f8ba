"""The sound of clips: its channels, its times, its gaps, and what is rejected."""

import math
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


def test_sound_that_begins_later_stays_where_it_is(tmp_path):
    path = clips.write(tmp_path / "a.mkv", clips.steady(2.0), sound=clips.tone(1.0), sound_start=0.5)
    sound = media.decode(path).sound
    assert len(sound) == 24_000
    assert np.abs(sound[:7_900]).max() < 1e-3
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

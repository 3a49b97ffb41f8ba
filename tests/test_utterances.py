"""Tables and subtitles cut clips into utterances."""

import struct

import numpy as np
import pytest

from conclugen_jax.data import manifest as manifest_lib
from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract import clips as clips_lib, preparation
from tests import clips, own_backbones
from tests.test_extract import extract, rows_of, table


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return clips.videos(tmp_path_factory.mktemp("videos"))


def test_intervals_of_a_table_are_utterances(tmp_path):
    source = tmp_path / "videos"
    source.mkdir()
    pictures = [clips.image(i // 25 * 10) for i in range(100)]
    clips.write(source / "long.mkv", clips.steady(4.0), images=pictures, sound=clips.tone(4.0))
    rows = [
        ("id", "split", "label", "video", "start", "end", "text"),
        ("a", "train", "happy", "long", 0, 1, "hello there"),
        ("b", "train", "sad", "long", 1, 2, ""),
        ("c", "test", "sad", "long", 3, 4, "bye"),
        ("d", "test", "sad", "gone", 3, 4, "bye"),
    ]
    labels = (table(source / "labels.csv", rows),)
    folder, tally = extract(source, tmp_path / "data", labels=labels)
    assert tally.done == 3
    ids, rows = rows_of(folder, "train")
    assert ids == ["a", "b"]
    np.testing.assert_allclose(rows["features"]["video"][:, 0], [0, 40], atol=1.5)
    np.testing.assert_allclose(rows["features"]["audio"][:, 1], [1, 1], atol=1e-3)
    assert rows["label"].tolist() == [0, 1]
    assert rows["features"]["text"].tolist() == [[2, 11], [0, 0]]
    assert manifest_lib.read(folder).splits["test"]["dropped"] == 1
    assert list(tally.failures) == ["d"]
    assert tally.failures["d"].endswith("labels.csv, line 5: video 'gone' is not there")


def test_labels_of_clips_that_are_not_there(videos, tmp_path):
    rows = [("id", "split", "label"), ("train0", "train", "a"), ("train1", "train", "b"), ("train9", "train", "b")]
    folder, tally = extract(videos, tmp_path, labels=(table(tmp_path / "some.csv", rows),))
    assert (tally.done, tally.unknown) == (2, ["train9"])
    assert rows_of(folder, "train")[0] == ["train0", "train1"]
    for wrong in (("gone", "test", "a"), ("train/train2", "train", "a")):  # a split without any; a path for an id
        labels = (table(tmp_path / "wrong.csv", [*rows, wrong]),)
        with pytest.raises(ConclugenError, match=rf"'{wrong[0]}' in {wrong[1]}, but no clip has this name"):
            extract(videos, tmp_path / "wrong", labels=labels)
        assert not (tmp_path / "wrong").exists()


def test_an_interval_that_ends_after_its_clip_is_told(tmp_path):
    clips.write(tmp_path / "a.mkv", clips.steady(2.0), sound=clips.tone(2.0))
    how = preparation.recipe([own_backbones.pictures()])
    for end, note in ((2.4, []), (3.0, ["the clip ends before the interval does"])):
        utterance = clips_lib.Utterance("a", "", str(tmp_path / "a.mkv"), start=1.0, end=end)
        assert preparation.prepare(utterance, how, 1).notes == tuple(note), end


def header_alone():
    sizes = struct.pack("<IHHIIHH", 16, 1, 1, 16_000, 32_000, 2, 16)
    return b"RIFF" + struct.pack("<I", 36) + b"WAVEfmt " + sizes + b"data" + bytes(4)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.wav", b"", "empty (0 bytes); fetch it again"),
        ("a.wav", header_alone(), "nothing could be decoded from 0 s on; is it complete?"),
        ("a.wav", header_alone()[:20], "cannot be decoded (Invalid data found when processing input)"),
        ("a.wav", b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer"),
        ("a.mp3", b"<html>not found</html>" * 99, "is an HTML page"),
        ("a.flac", b"fLaC" + bytes(200), "cannot be decoded"),
        ("gone.wav", None, "no such file; fetch it again"),
    ],
)
def test_a_file_of_sound_that_is_damaged_costs_the_sound_alone(tmp_path, name, content, reason):
    path, sound = clips.write(tmp_path / "a.mkv", clips.steady(2.0), sound=clips.tone(2.0)), tmp_path / name
    if content is not None:
        sound.write_bytes(content)
    utterance = clips_lib.Utterance("a", "", str(path), sound=str(sound), text="words")
    how = preparation.recipe([own_backbones.pictures(), own_backbones.loudness(), own_backbones.words()])
    made = preparation.prepare(utterance, how, 1)
    assert made.failure == ""
    assert made.views[0].keys() == {"pictures", "words"}
    note, lacks = made.notes
    assert note.startswith(f"the file of its sound cannot be used ({sound}: {reason}")
    assert lacks == "no audio"
    alone = preparation.prepare(utterance, preparation.recipe([own_backbones.loudness()]), 1)
    assert alone.failure == f"{path}: lacks audio; {note}"


def test_subtitles_cut_a_clip(tmp_path):
    source = tmp_path / "videos"
    source.mkdir()
    clips.write(source / "long.mkv", clips.steady(4.0), images=[clips.image(i // 25 * 10) for i in range(100)])
    first, second = "00:00:01,000 --> 00:00:02,000\nhello", "00:00:03,000 --> 00:00:04,000\nold friend"
    (source / "long.srt").write_text(f"1\n{first}\n\n2\n{second}\n")
    folder, _ = extract(source, tmp_path / "cut", cut=True)
    ids, rows = rows_of(folder, "train")
    assert ids == ["long_0000", "long_0001"]
    np.testing.assert_allclose(rows["features"]["video"][:, 0], [40, 120], atol=1.5)
    assert rows["features"]["text"].tolist() == [[1, 5], [2, 10]]
    folder, _ = extract(source, tmp_path / "whole")
    assert rows_of(folder, "train")[1]["features"]["text"].tolist() == [[3, 16]]

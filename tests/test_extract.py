"""Clips become data sets: exact vectors, every failure named, interruptions gone on from, views the same each time."""

import csv
import dataclasses
import io
import json
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from conclugen_jax.data import manifest as manifest_lib
from conclugen_jax.data import shards
from conclugen_jax.data.annotations import Layout
from conclugen_jax.data.requests import Request
from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract import clips as clips_lib
from conclugen_jax.extract import extraction, preparation, vectors, workers
from conclugen_jax.extract.backbones import Networks, Options
from conclugen_jax.extract.networks import mtcnn
from conclugen_jax.extract.store import State, Store
from tests import clips, own_backbones
from tests.helpers import run, start

ROOT = Path(__file__).parent.parent
OWN = tuple(f"tests.own_backbones:{name}" for name in ("pictures", "loudness", "words"))
FLAGS = [f"--backbone={name}" for name in OWN]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Clips in split folders: grey levels tell them apart; some lack sound or words."""
    folder = tmp_path_factory.mktemp("videos")
    for split, count in (("train", 4), ("validation", 2), ("test", 2)):
        (folder / split).mkdir()
        for i in range(count):
            path = folder / split / f"{split}{i}.mkv"
            pictures = [clips.image(10 * i + 5)] * 50
            sound = None if i == 1 else 0.5 * clips.tone(2.0)
            clips.write(path, clips.steady(2.0), images=pictures, sound=sound)
            if i != 2:
                path.with_suffix(".txt").write_text("one two three " * (i + 1))
    return folder


def extract(source, data_dir, *, own=OWN, labels=(), name="mine", cut=False, num_workers=0, **options):
    request = Request("features", source, name=name, labels=labels)
    found = clips_lib.find("clips", source, labels=labels, cut=cut)
    return extraction.extract(request, found, Networks((), own), data_dir, num_workers=num_workers, **options)


def rows_of(folder, split):
    dataset = shards.open_dataset(folder)
    stream = shards.ShardStream(dataset, split, list(dataset.manifest.modalities))
    indices = np.arange(stream.num_examples)
    return stream.names(indices)[0].tolist(), stream.rows(indices)


def test_vectors_are_those_of_the_clips(videos, tmp_path):
    folder, tally = extract(videos, tmp_path)
    assert (tally.done, tally.failures) == (8, {})
    assert tally.missing == {"audio": 3, "text": 1}
    ids, rows = rows_of(folder, "train")
    assert ids == ["train0", "train1", "train2", "train3"]
    np.testing.assert_allclose(rows["features"]["video"][:, 0], [20, 60, 100, 140], atol=1.5)
    np.testing.assert_array_equal(rows["present"]["audio"], [True, False, True, True])
    np.testing.assert_allclose(rows["features"]["audio"][0], [0.15, 2.0], atol=1e-3)
    np.testing.assert_array_equal(rows["present"]["text"], [True, True, False, True])
    np.testing.assert_array_equal(rows["features"]["text"], [[3, 13], [6, 27], [0, 0], [12, 55]])
    told = manifest_lib.read(folder).source["extraction"]
    assert told["backbones"]["pictures"] == {"modality": "video", "dim": 3, "version": 1}
    assert told["notes"] == {"no audio": 3, "no text": 1}
    assert not [p.name for p in tmp_path.iterdir() if p.name != "mine"]  # nothing is left beside it


def test_processes_give_the_same_bits(videos, tmp_path):
    one, _ = extract(videos, tmp_path / "one")
    two, _ = extract(videos, tmp_path / "two", num_workers=2)
    for split in ("train", "validation", "test"):
        a, b = rows_of(one, split), rows_of(two, split)
        assert a[0] == b[0]
        for modality in ("video", "audio", "text"):
            np.testing.assert_array_equal(a[1]["features"][modality], b[1]["features"][modality])


def test_repeated_it_does_nothing_and_other_settings_are_refused(videos, tmp_path):
    folder, _ = extract(videos, tmp_path)
    before = (folder / manifest_lib.FILE).stat().st_mtime_ns
    again, _ = extract(videos, tmp_path)
    assert (again, (folder / manifest_lib.FILE).stat().st_mtime_ns) == (folder, before)
    with pytest.raises(ConclugenError, match="made of other clips or in another way; pass --overwrite"):
        extract(videos, tmp_path, own=OWN[:2])
    folder, _ = extract(videos, tmp_path, own=OWN[:2], overwrite=True)
    assert list(manifest_lib.read(folder).modalities) == ["video", "audio"]


def test_bad_clips_are_failures_by_name(videos, tmp_path):
    source = shutil.copytree(videos, tmp_path / "videos")
    (source / "train" / "empty.mp4").write_bytes(b"")
    (source / "train" / "text.mp4").write_text("no video " * 100)
    whole = (source / "train" / "train0.mkv").read_bytes()
    (source / "train" / "stub.mkv").write_bytes(whole[:300])
    clips.write(source / "train" / "one_frame.mkv", [0.0])
    clips.write(source / "train" / "black.mkv", clips.steady(10.0), images=[np.zeros((48, 64, 3), np.uint8)] * 250)
    folder, tally = extract(source, tmp_path / "data")
    assert tally.done == 10
    assert sorted(tally.failures) == ["train/empty", "train/stub", "train/text"]
    text = (tmp_path / "data" / "failures-mine-1.0.0.csv").read_text()
    listed = list(csv.DictReader(io.StringIO(text)))
    assert [row["utterance"] for row in listed] == ["train/empty", "train/stub", "train/text"]
    assert "0 bytes" in listed[0]["reason"]
    assert "empty.mp4" in listed[0]["reason"]
    assert manifest_lib.read(folder).source["extraction"]["failed"] == 3
    ids, rows = rows_of(folder, "train")
    assert {"black", "one_frame"} < set(ids)
    assert np.isfinite(rows["features"]["video"]).all()


def test_failures_are_told_again_by_a_repeated_command(videos, tmp_path):
    source = shutil.copytree(videos, tmp_path / "videos")
    (source / "train" / "empty.mp4").write_bytes(b"")
    _, first = extract(source, tmp_path / "data")
    _, second = extract(source, tmp_path / "data")
    assert (second.done, second.failures, second.notes) == (first.done, first.failures, first.notes)
    (tmp_path / "data" / "failures-mine-1.0.0.csv").unlink()
    assert extract(source, tmp_path / "data")[1].failures == first.failures  # the manifest has the first hundred


def test_a_modality_needs_all_of_its_backbones(videos, tmp_path):
    source = shutil.copytree(videos, tmp_path / "videos")
    clips.write(source / "train" / "still.mkv", [0.0], sound=clips.tone(1.0))
    own = tuple(f"tests.own_backbones:{name}" for name in ("pictures", "movement"))
    folder, tally = extract(source, tmp_path / "data", own=own)
    assert list(tally.failures) == ["train/still"]
    assert "lacks video" in tally.failures["train/still"]
    assert tally.done == sum(len(rows_of(folder, split)[0]) for split in ("train", "validation", "test")) == 8
    folder, tally = extract(source, tmp_path / "more", own=(*own, OWN[1]))
    ids, rows = rows_of(folder, "train")
    assert (tally.done, tally.missing["video"]) == (9, 1)
    assert rows["present"]["video"].tolist() == [name != "still" for name in ids]


@pytest.mark.parametrize("words", ["empty", "uneven", "list"])
def test_items_that_are_none_fail_their_clip_alone(videos, tmp_path, words):
    source = shutil.copytree(videos, tmp_path / "videos")
    (source / "train" / "train3.txt").write_text(words)
    _, tally = extract(source, tmp_path / "data", own=("tests.own_backbones:odd_items",))
    assert sorted(tally.failures) == ["train/train2", "train/train3"]  # the first has no words
    message = "lacks text" if words == "empty" else "backbone words: prepare gave no tuple of arrays with a row"
    assert message in tally.failures["train/train3"]


def test_all_bad_is_refused(tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(b"")
    with pytest.raises(
        ConclugenError, match=r"each of 1 failed, such as: .*0 bytes.* in .*data/failures-mine-1.0.0.csv"
    ):
        extract(tmp_path / "videos", tmp_path / "data")
    listed = (tmp_path / "data" / "failures-mine-1.0.0.csv").read_text()
    assert listed.startswith("utterance,reason\na,")
    assert "0 bytes" in listed
    assert not (tmp_path / "data" / "mine").exists()


def test_a_crash_of_the_decoder_is_a_failure_of_its_clip(videos, tmp_path):
    source = shutil.copytree(videos, tmp_path / "videos")
    (source / "train" / "train3.txt").write_text("crash here")
    _, tally = extract(source, tmp_path / "data", own=(OWN[0], "tests.own_backbones:crashing"), num_workers=2)
    assert list(tally.failures) == ["train/train3"]
    assert "the process that decoded it died" in tally.failures["train/train3"]
    assert tally.done == 7


def test_a_decoder_that_never_ends_is_given_up(videos, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "TIMEOUT", 1e-3)
    found = clips_lib.find("clips", videos)[:1]
    from conclugen_jax.extract import backbones, preparation

    how = preparation.recipe(backbones.load(Networks((), OWN)))
    (only,) = workers.prepared([(found[0], 1)], how, 1)
    assert "not decoded within 0.001 s" in only.failure


@pytest.mark.parametrize(("name", "message"), [("not_finite", "not finite"), ("other_size", "vectors of shape")])
def test_vectors_that_are_wrong_are_refused(videos, tmp_path, name, message):
    with pytest.raises(ConclugenError, match=message):
        extract(videos, tmp_path, own=(f"tests.own_backbones:{name}",))


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_in_a_users_functions_are_told_with_their_line(videos, tmp_path, workers):
    source = shutil.copytree(videos, tmp_path / "videos")
    (source / "train" / "train3.txt").write_text("oops here")
    own = ("tests.own_backbones:failing_to_prepare",)
    _, tally = extract(source, tmp_path / "data", own=own, num_workers=workers)
    (reason,) = [tally.failures["train/train3"]]
    assert re.search(r"train3.mkv: KeyError: 'oops' \(.*own_backbones.py, line \d+\)", reason)
    with pytest.raises(
        ConclugenError, match=r"words: its function vectors failed on float32 \[8, 2\]: .*own_backbones.py, line"
    ):
        extract(source, tmp_path / "other", own=("tests.own_backbones:failing",), num_workers=workers)


def test_vectors_that_are_not_finite_are_failures_of_their_clips(videos, tmp_path):
    (tmp_path / "videos").mkdir()
    for name, text in (("a", "one"), ("b", "one two"), ("c", "one two three")):
        shutil.copy(videos / "train" / "train0.mkv", tmp_path / "videos" / f"{name}.mkv")
        (tmp_path / "videos" / f"{name}.txt").write_text(text)
    _, tally = extract(tmp_path / "videos", tmp_path, own=("tests.own_backbones:not_finite_for_one",))
    assert tally.failures == {"a": "a: words gave numbers that are not finite; is something odd about the clip?"}
    assert tally.done == 2


def test_backbones_of_modalities_of_their_own_are_given_pictures_and_sound(videos, tmp_path):
    own = ("tests.own_backbones:brightness", "tests.own_backbones:peak")
    folder, tally = extract(videos, tmp_path, own=own)
    assert (tally.done, tally.missing) == (8, {"noise": 3})
    ids, rows = rows_of(folder, "train")
    expected = [np.mean(clips.image(10 * int(name[-1]) + 5)) for name in ids]
    np.testing.assert_allclose(rows["features"]["light"][:, 0], expected, atol=3)
    np.testing.assert_allclose(rows["features"]["noise"][0], [0.15, 2.0], atol=1e-2)


def test_what_is_no_backbone(videos, tmp_path):
    for name, message in (
        ("nothing:here", "No module named 'nothing'; run the command in the folder of nothing.py"),
        ("nothing", "expected MODULE:FUNCTION, such as mine:colours"),
        ("tests.own_backbones:nothing", "tests.own_backbones has no function 'nothing'"),
        ("tests.clips:tone", "TypeError: .*missing 1 required.*; expected a function without arguments"),
        ("tests.own_backbones:raising", "RuntimeError: not today; expected a function without arguments"),
        ("tests.damaged_backbones:x", r"cannot be imported \(ZeroDivisionError: division by zero\)"),
        ("collections:OrderedDict", "gave a OrderedDict, expected a Backbone"),
    ):
        with pytest.raises(ConclugenError, match=message):
            extract(videos, tmp_path, own=(name,))
    with pytest.raises(ConclugenError, match="two backbones are called 'words'"):
        extract(videos, tmp_path, own=(OWN[2], "tests.own_backbones:crashing"))
    with pytest.raises(ConclugenError, match="no backbone"):
        extract(videos, tmp_path, own=())


def test_it_goes_on_at_the_clip(videos, tmp_path):
    done = []

    def stop(number, total):
        done.append((number, total))
        if number == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(videos, tmp_path, progress=stop)
    assert done[0] == (0, 8)
    done.clear()
    folder, _ = extract(videos, tmp_path, progress=lambda *numbers: done.append(numbers))
    assert done[0][0] >= 2
    assert done[-1] == (8, 8)
    whole, _ = extract(videos, tmp_path / "whole")
    same = [(f / "presence-train.npy").read_bytes() for f in (folder, whole)]
    assert same[0] == same[1]
    for split in ("train", "test"):
        a, b = rows_of(folder, split)[1], rows_of(whole, split)[1]
        np.testing.assert_array_equal(a["features"]["video"], b["features"]["video"])


def test_a_clip_that_changed_is_done_again(videos, tmp_path):
    source = shutil.copytree(videos, tmp_path / "videos")

    def stop(number, total):
        if number == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(source, tmp_path / "data", progress=stop)
    for path in source.rglob("*.mkv"):
        clips.write(path, clips.steady(1.0), images=[clips.image(40)] * 25)
    folder, _ = extract(source, tmp_path / "data")
    np.testing.assert_allclose(rows_of(folder, "train")[1]["features"]["video"][:, 0], 160, atol=1.5)


def test_what_an_earlier_try_left_does_not_count(videos, tmp_path):
    source = shutil.copytree(videos, tmp_path / "videos")
    extract(source, tmp_path / "data", keep=True)
    (source / "train" / "train0.mkv").write_bytes(b"broken")
    (source / "train" / "train2.mkv").write_bytes((videos / "train" / "train1.mkv").read_bytes())  # has no sound
    (source / "train" / "train3.mkv").unlink()
    again, told = extract(source, tmp_path / "data", overwrite=True, keep=True)
    fresh, expected = extract(source, tmp_path / "fresh")
    assert (told.failures, told.missing, told.done) == (expected.failures, expected.missing, expected.done)
    assert list(told.failures) == ["train/train0"]
    assert shard_bytes(again) == shard_bytes(fresh)


def test_a_clip_that_changes_meanwhile_is_done_again(videos, tmp_path):
    source = shutil.copytree(videos, tmp_path / "videos")

    def change(number, total):
        if number == 1:
            (source / "train" / "train3.txt").write_text("other words")
            shutil.copy(source / "train" / "train0.mkv", source / "test" / "test0.mkv")

    _, tally = extract(source, tmp_path / "data", keep=True, progress=change)
    assert tally.failures == {"test/test0": "was changed while it was extracted"}
    folder, tally = extract(source, tmp_path / "data", overwrite=True)
    assert not tally.failures
    ids, rows = rows_of(folder, "test")
    np.testing.assert_allclose(rows["features"]["video"][ids.index("test0"), 0], 20, atol=1.5)


@pytest.fixture
def store(tmp_path):
    (tmp_path / "a.mkv").write_bytes(b"clip")
    utterance = clips_lib.Utterance("a", "train", str(tmp_path / "a.mkv"), text="words")
    opened = Store(tmp_path / "store")
    opened.begin({"recipe": 1})
    done = State(stamp=utterance.stamp(), views=2, present=["video"], notes=["odd"])
    opened.put(utterance, {"video": np.ones((2, 3), np.float32)}, done)
    return opened, utterance


def test_what_is_done_is_known(store):
    opened, utterance = store
    found = opened.state(utterance, 2)
    assert (found.present, found.notes, found.failure) == (["video"], ["odd"], "")
    opened.begin({"recipe": 1})
    assert opened.state(utterance, 2)
    assert opened.state(utterance, 1) is None  # other views
    assert opened.state(dataclasses.replace(utterance, text="others"), 2) is None
    (opened.folder / "1" / "video" / "train" / "a.npy").unlink()
    assert opened.state(utterance, 2) is None


def test_what_a_try_stopped_at_its_very_end_has_left_is_removed(videos, tmp_path):
    folder, _ = extract(videos, tmp_path)
    left = tmp_path / ".extracting-mine-1.0.0"
    (left / "done").mkdir(parents=True)
    extract(videos, tmp_path)
    assert not left.exists()
    extract(videos, tmp_path, overwrite=True, keep=True)
    extract(videos, tmp_path)
    assert (left / "done").is_dir()  # it was asked for


def test_failures_are_listed_before_the_data_set_is_there(videos, tmp_path, monkeypatch):
    source = shutil.copytree(videos, tmp_path / "videos")
    (source / "train" / "empty.mp4").write_bytes(b"")
    monkeypatch.setattr(extraction.builders, "build", lambda *_, **__: pytest.fail("stopped here"))
    with pytest.raises(pytest.fail.Exception):
        extract(source, tmp_path / "data")
    assert "train/empty" in (tmp_path / "data" / "failures-mine-1.0.0.csv").read_text()


def test_the_same_clips_give_the_same_data_set_to_the_last_byte(videos, tmp_path):
    one, two = (extract(videos, tmp_path / name)[0] for name in ("one", "two"))
    assert {p.name for p in one.iterdir()} == {p.name for p in two.iterdir()}
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes(), path.name


def test_another_recipe_begins_anew_when_told_so(store):
    opened, utterance = store
    with pytest.raises(
        ConclugenError, match=r"1 utterances .* in another way \(recipe\); .*--overwrite to delete them"
    ):
        opened.begin({"recipe": 2})
    assert opened.state(utterance, 2)
    opened.begin({"recipe": 2}, overwrite=True)
    assert opened.state(utterance, 2) is None
    assert opened.features("video", 2, "train") is None


def test_a_sound_beside_is_watched_too(store, tmp_path):
    opened, utterance = store
    utterance = dataclasses.replace(utterance, sound=str(tmp_path / "a.wav"))
    (tmp_path / "a.wav").write_bytes(b"sound")
    before = utterance.stamp()
    (tmp_path / "a.wav").write_bytes(b"another sound")
    assert utterance.stamp() != before


def test_views_of_what_only_other_splits_have(videos, tmp_path):
    source = tmp_path / "videos"
    for split in ("train", "test"):
        (source / split).mkdir(parents=True)
        shutil.copy(videos / "train" / "train1.mkv", source / split / f"{split}.mkv")  # has no sound
    (source / "test" / "test.txt").write_text("one two")
    folder, _ = extract(source, tmp_path / "data", num_views=3)
    assert rows_of(folder, "test")[1]["features"]["text"].tolist() == [[2, 7]]
    assert not rows_of(folder, "train")[1]["present"]["text"].any()
    shutil.move(source / "train", source / "validation")
    folder, _ = extract(source, tmp_path / "without", num_views=3)
    assert manifest_lib.read(folder).splits.keys() == {"validation", "test"}


def test_subtitles_that_are_damaged_fail_their_clip_alone(videos, tmp_path):
    source = shutil.copytree(videos, tmp_path / "videos")
    for name, text in (("train0", "1\n00:00:xx --> 00:00:02,000\nhello\n"), ("train1", ""), ("train3", "1\n")):
        (source / "train" / f"{name}.txt").unlink(missing_ok=True)
        (source / "train" / f"{name}.srt").write_text(text)
    _, tally = extract(source, tmp_path / "data")
    assert sorted(tally.failures) == ["train/train0", "train/train3"]
    assert "'00:00:xx --> 00:00:02,000' is no interval" in tally.failures["train/train0"]
    assert tally.missing["text"] == 2


def test_what_cannot_be_is_refused_before_anything_is_done(videos, tmp_path):
    twice = table(
        tmp_path / "labels.csv", [("id", "split", "label"), ("train0", "train", "a"), ("train0", "train", "a")]
    )
    with pytest.raises(ConclugenError, match="the labels name 'train0' twice in train"):
        extract(videos, tmp_path / "data", labels=(twice,))
    for name in ("../y", "a/b", "A"):
        with pytest.raises(ConclugenError, match="the name takes lower case letters"):
            extract(videos, tmp_path / "data", name=name)
    weights_of = Path(__file__).parent
    with pytest.raises(
        ConclugenError, match=r"network\.json: cannot be read \(No such file.*; convert the weights anew"
    ):
        extract(videos, tmp_path / "data", faces=str(weights_of))
    assert not (tmp_path / "data").exists()


def test_a_damaged_recipe_is_another(store):
    opened, utterance = store
    (opened.folder / "recipe.json").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConclugenError, match="in another way; repeat"):
        opened.begin({"recipe": 1})
    opened.begin({"recipe": 1}, overwrite=True)
    assert opened.state(utterance, 2) is None


def test_words_in_a_table_beside_a_clip_are_no_labels(videos, tmp_path):
    shutil.copy(videos / "train" / "train0.mkv", tmp_path / "a.mkv")
    (tmp_path / "a.csv").write_text("start,end,text\n0,2,one two three four\n")
    common = ["--dataset=clips", "--name=mine", "--nocrop_faces", f"--source={tmp_path}", f"--data_dir={tmp_path}"]
    run("launch.extract", *common, *FLAGS)
    assert rows_of(tmp_path / "mine" / "1.0.0", "train")[1]["features"]["text"].tolist() == [[4, 18]]


def test_views_are_drawn_once_for_a_clip_and_the_first_is_the_clip(videos, tmp_path):
    plain, _ = extract(videos, tmp_path / "plain")
    one, _ = extract(videos, tmp_path / "one", num_views=3, seed=1)
    two, _ = extract(videos, tmp_path / "two", num_views=3, seed=1, num_workers=2)
    other, _ = extract(videos, tmp_path / "other", num_views=3, seed=2)

    assert manifest_lib.read(one).variants == {"video": 3, "audio": 3, "text": 3}
    first = rows_of(one, "train")[1]["features"]["video"]
    np.testing.assert_array_equal(first, rows_of(plain, "train")[1]["features"]["video"])
    a, b, c = (shard_bytes(f) for f in (one, two, other))
    assert a == b
    assert a != c
    np.testing.assert_array_equal(
        rows_of(one, "test")[1]["features"]["video"], rows_of(plain, "test")[1]["features"]["video"]
    )


def shard_bytes(folder):
    return {p.name: p.read_bytes() for p in folder.glob("*.array_record*")}


def table(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


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
        with pytest.raises(ConclugenError, match=rf"'{wrong[0]}' in {wrong[1]}, which is the name of no clip"):
            extract(videos, tmp_path / "wrong", labels=labels)
        assert not (tmp_path / "wrong").exists()


def test_an_interval_that_ends_after_its_clip_is_told(tmp_path):
    clips.write(tmp_path / "a.mkv", clips.steady(2.0), sound=clips.tone(2.0))
    how = preparation.recipe([own_backbones.pictures()])
    for end, note in ((2.4, []), (3.0, ["the clip ends before the interval does"])):
        utterance = clips_lib.Utterance("a", "", str(tmp_path / "a.mkv"), start=1.0, end=end)
        assert preparation.prepare(utterance, how, 1).notes == tuple(note), end


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


@pytest.mark.slow
def test_the_launcher_from_clips_to_a_prediction(videos, tmp_path):
    labels = [("id", "split", "label")]
    labels += [
        (p.stem, p.parent.name, "light" if p.stem[-1] in "23" else "dark") for p in sorted(videos.rglob("*.mkv"))
    ]
    table(tmp_path / "labels.csv", [*labels, ("train9", "train", "dark")])
    common = [f"--source={videos}", f"--labels={tmp_path / 'labels.csv'}", "--label=label", f"--data_dir={tmp_path}"]
    made = run("launch.extract", "--dataset=clips", "--name=mine", *common, *FLAGS, "--nocrop_faces", "--num_workers=1")
    assert made.returncode == 0, made.stderr
    assert "train 4, validation 2, test 2 examples" in made.stdout
    assert "audio is missing in train 1, validation 1, test 1\n" in made.stdout
    assert "no audio" not in made.stdout
    assert "1 ids of the labels are the name of no clip, such as 'train9'\n" in made.stdout
    assert f"{videos}: 8 utterances; opening the backbones, compiling their programs\n" in made.stderr
    data = tmp_path / "mine" / "1.0.0"
    options = [
        "--config=configs/linear_evaluation.py",
        f"--config.data.path={data}",
        "--config.downstream.protocol=raw_features",
        "--config.data.modalities=('video','audio','text')",
        "--config.train.batch_size=4",
        "--config.train.num_epochs=2",
    ]
    trained = start("launch.downstream", *options, f"--workdir={tmp_path / 'run'}")
    assert trained.returncode == 0, trained.stderr
    clip = videos / "test" / "test0.mkv"
    picture = tmp_path / "timeline.png"
    told = run(
        "launch.predict", f"--checkpoint={tmp_path / 'run'}", *FLAGS, "--json", f"--picture={picture}", str(clip)
    )
    assert told.returncode == 0, told.stderr
    (found,) = json.loads(told.stdout)
    assert found["probability"].keys() == {"light", "dark"}
    assert sum(found["probability"].values()) == pytest.approx(1, abs=1e-5)
    assert (found["start"], found["end"], found["text"]) == (0.0, 2.0, "one two three")
    from conclugen_jax.evaluate import embedding

    network = embedding.load(tmp_path / "run")
    _, rows = rows_of(data, "test")
    expected = embedding.predictor(network)(rows["features"], rows["present"])["probability"][0]
    np.testing.assert_allclose(list(found["probability"].values()), expected, atol=1e-6)
    from PIL import Image

    with Image.open(picture) as image:
        assert image.size[0] == 1100
    wrong = run("launch.predict", f"--checkpoint={tmp_path / 'run'}", *FLAGS[:2], str(clip), code=2)
    assert "its features need words" in wrong.stderr
    others = [*FLAGS[:2], "--backbone=tests.own_backbones:words_of_another_version"]
    wrong = run("launch.predict", f"--checkpoint={tmp_path / 'run'}", *others, str(clip), code=2)
    assert "words: its version is 2, that of the features of" in wrong.stderr
    for name, message in (("a.jpg", "the picture is a PNG file; name it a.png"), ("no/a.png", "/no is no folder")):
        options = [f"--checkpoint={tmp_path / 'run'}", *FLAGS, f"--picture={tmp_path / name}"]
        assert message in run("launch.predict", *options, str(clip), code=2).stderr
    wrong = run("launch.predict", f"--checkpoint={tmp_path / 'run'}", *FLAGS, str(clip.parent), code=2)
    assert f"{clip.parent}: a folder; name the clips in it" in wrong.stderr
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"")
    both = run("launch.predict", f"--checkpoint={tmp_path / 'run'}", *FLAGS, str(clip), str(broken), code=1)
    assert "test0.mkv" in both.stdout
    assert "failed: " in both.stderr
    assert "Traceback" not in both.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_or_killed_it_leaves_nothing_half_done(videos, tmp_path, sent, code):
    command = [sys.executable, "-m", "launch.extract", "--dataset=clips", "--name=mine", f"--source={videos}"]
    command += [f"--data_dir={tmp_path}", *FLAGS, "--nocrop_faces", "--num_workers=2"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".extracting-mine-1.0.0/done/*/*.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(sent)
    _, said = process.communicate(timeout=30)  # the pipe closes when the last worker is gone
    assert process.returncode == code
    assert "Traceback" not in said
    assert ("repeat the command" in said) is (sent != signal.SIGKILL)
    assert not (tmp_path / "mine").exists() or (tmp_path / "mine" / "1.0.0" / "manifest.json").exists()
    folder, _ = extract(videos, tmp_path)
    whole, _ = extract(videos, tmp_path / "whole")
    assert shard_bytes(folder) == shard_bytes(whole)


def test_commands_that_make_no_sense(videos, tmp_path):
    base = ["launch.extract", f"--source={videos}", f"--data_dir={tmp_path}", *FLAGS]
    for flags, message in (
        (["--dataset=clips"], "--name is missing"),
        (["--dataset=nothing", "--name=a"], "--dataset=nothing is unknown"),
        (["--dataset=clips", "--name=a", "--pool=max"], "--pool is for features in files"),
        (["--dataset=clips", "--name=a", "--weights=/nowhere"], "No such file"),
        (
            ["--dataset=clips", "--name=a", f"--weights={__file__}"],
            "convert it first with conclugen convert_weights",
        ),
        (["--dataset=clips", "--name=a", "--speech=siri"], "error: speech recogniser 'siri' is unknown"),
        (["--dataset=clips", "--name=a", "--label=a", "--label=b"], "--label is there 2 times; write it once"),
        (["--dataset=clips", "--name=a", "--num-views=0"], "num_views"),
        (["--dataset=caer"], "expected train|validation|test/CLASS/FILE.avi"),
    ):
        assert message in run(*base, *flags, code=2).stderr


def test_help_names_the_flags_of_building_too():
    shown = run("launch.extract", "--help").stdout
    for flag in ("--source  Folder of the clips", "--data_dir", "--label", "--overwrite", "--num_workers", "--weights"):
        assert flag in shown
    assert "--pool" not in shown


def test_the_documented_backbone_works(videos, tmp_path, monkeypatch):
    text = (ROOT / "docs" / "extraction.md").read_text()
    code = text.partition("In a file `mine.py`:\n\n```python\n")[2].partition("```")[0]
    (tmp_path / "mine_documented.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    folder, _ = extract(videos, tmp_path / "data", own=("mine_documented:colours",))
    found = rows_of(folder, "train")[1]["features"]["video"]
    assert found.shape == (4, 6)
    assert np.isfinite(found).all()


def test_freed_memory_is_kept_for_the_next_batch():
    code = """
import resource, sys
from conclugen_jax.extract import allocation
if sys.argv[1] == "keep":
    assert allocation.keep_freed_memory()
for i in range(20):
    bytes([i]) * 64_000_000
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("of glibc alone")
    faults = [
        int(subprocess.run([sys.executable, "-c", code, how], cwd=ROOT, capture_output=True, check=True).stdout)
        for how in ("keep", "leave")
    ]
    assert faults[0] < faults[1] - 10 * 64_000_000 / 4096


def test_items_of_rare_shapes_do_not_hold_up_their_clips(monkeypatch):
    from conclugen_jax.extract.backbones import Backbone
    from conclugen_jax.extract.preparation import Prepared

    mean = Backbone("b", "video", 1, None, lambda x: x.mean(axis=1, keepdims=True), batch_size=4)

    monkeypatch.setattr(vectors, "MOST_WAITING", 3)
    taken = []

    def prepared():
        for i in range(7):
            taken.append(i)
            items = {"b": (np.full((1, 2 + i % 3), i, np.float32),)}  # three shapes
            yield Prepared(f"clip{i}", (items,), times=(0.0, 1.0))

    found = []
    for each, rows in vectors.vectors(prepared(), [mean]):
        found.append(each.place)
        assert rows["video"].tolist() == [[float(each.place[-1])]]
        assert len(taken) - len(found) <= 3
    assert sorted(found) == [f"clip{i}" for i in range(7)]


def test_items_of_other_shapes_or_types_are_not_put_into_one_batch():
    from conclugen_jax.extract.backbones import Backbone
    from conclugen_jax.extract.preparation import Prepared

    taken = []

    def first(x):
        taken.append((x.shape, x.dtype.str))
        return np.asarray(x, np.float32).reshape(len(x), -1)[:, :1]

    backbone = Backbone("b", "video", 1, None, first, batch_size=2)
    arrays = [np.full((1, 3), 7, np.float32), np.full((1, 3), 300, np.int32), np.full((1, 1, 3), 5, np.float32)]
    items = (Prepared(str(i), ({"b": (x,)},)) for i, x in enumerate(arrays))
    found = {each.place: rows["video"].tolist() for each, rows in vectors.vectors(items, [backbone])}
    assert found == {"0": [[7.0]], "1": [[300.0]], "2": [[5.0]]}
    assert taken == [((2, 3), "<f4"), ((2, 3), "<i4"), ((2, 1, 3), "<f4")]


def test_words_that_were_heard_are_listed(videos, tmp_path, monkeypatch):
    pytest.importorskip("pocketsphinx")
    monkeypatch.setattr(preparation, "recogniser", lambda name: lambda sound: f"heard, {len(sound) / 16_000:g} s")
    folder, tally = extract(videos, tmp_path, recogniser="pocketsphinx")
    assert tally.heard == {"train/train2": "heard, 2 s"}
    rows = list(csv.reader(io.StringIO((tmp_path / "words-mine-1.0.0.csv").read_text())))
    assert rows == [["utterance", "words"], ["train/train2", "heard, 2 s"]]
    assert manifest_lib.read(folder).source["extraction"]["speech"]["name"] == "pocketsphinx"
    ids, found = rows_of(folder, "train")
    assert found["features"]["text"][ids.index("train2")].tolist() == [3, 10]
    extract(videos, tmp_path, overwrite=True)
    assert not (tmp_path / "words-mine-1.0.0.csv").exists()


@pytest.mark.parametrize("change", ["size", "labels", "clip", "faces"])
def test_what_a_data_set_depends_on_is_compared(videos, tmp_path, change):
    source = shutil.copytree(videos, tmp_path / "videos")
    rows = [("id", "split", "label"), *((p.stem, p.parent.name, "x") for p in sorted(source.rglob("*.mkv")))]
    rows[1] = (*rows[1][:2], "y")
    table(tmp_path / "labels.csv", rows)
    request = Request(
        "features", source, name="mine", labels=(tmp_path / "labels.csv",), layout=Layout(("label",), "", (), ())
    )

    def made(size=180, **options):
        found = clips_lib.find("clips", source)
        return extraction.extract(request, found, Networks((), OWN, Options(size=size)), tmp_path / "data", **options)

    folder, _ = made()
    assert made()[0] == folder
    options = {}
    if change == "size":
        options = {"size": 112}
    elif change == "labels":
        table(tmp_path / "labels.csv", [*rows[:-1], (*rows[-1][:2], "y")])
    elif change == "clip":
        shutil.copy(source / "train" / "train0.mkv", source / "train" / "train3.mkv")
    else:
        options = {"no_face": "missing", "faces": str(mtcnn.WEIGHTS)}
    with pytest.raises(ConclugenError, match="made of other clips or in another way"):
        made(**options)


def test_a_damaged_data_set_is_not_taken_for_done(videos, tmp_path):
    folder, _ = extract(videos, tmp_path)
    shard = next(folder.glob("*.array_record*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ConclugenError, match=shard.name):
        extract(videos, tmp_path)


def test_failures_are_tried_once_more(videos, tmp_path):
    source = shutil.copytree(videos, tmp_path / "videos")
    own = ("tests.own_backbones:failing_at_first",)
    (source / "train" / "train3.txt").write_text("oops here")
    first = extract(source, tmp_path / "data", own=own, keep=True)[1]
    assert list(first.failures) == ["train/train2", "train/train3"]  # the first has no words
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MENDED", "1")
        second = extract(source, tmp_path / "data", own=own, overwrite=True)[1]
    assert (list(second.failures), second.done) == (["train/train2"], first.done + 1)
    assert "train3" not in (tmp_path / "data" / "failures-mine-1.0.0.csv").read_text()


def test_beam_gives_the_same(videos, tmp_path):
    pytest.importorskip("apache_beam")
    one, _ = extract(videos, tmp_path / "one")
    two, tally = extract(videos, tmp_path / "two", beam=["--runner=DirectRunner"])
    assert tally.done == 8
    assert shard_bytes(one) == shard_bytes(two)

"""A repeated extraction resumes at the clip, and does again what has changed."""

import dataclasses
import shutil

import numpy as np
import pytest

from conclugen_jax.data.requests import Layout, Request
from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract import clips as clips_lib, extraction
from conclugen_jax.extract.backbones import Networks, Options
from conclugen_jax.extract.networks import mtcnn
from conclugen_jax.extract.store import State, Store
from tests import clips
from tests.test_extract import OWN, extract, rows_of, shard_bytes, table


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return clips.videos(tmp_path_factory.mktemp("videos"))


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
    opened.put(utterance.place, {"video": np.ones((2, 3), np.float32)}, done)
    return opened, utterance


def test_what_is_done_is_known(store):
    opened, utterance = store
    found = opened.state(utterance, 2)
    assert (found.present, found.notes, found.failure) == (["video"], ["odd"], "")
    opened.begin({"recipe": 1})
    assert opened.state(utterance, 2)
    assert opened.state(utterance, 1) is None  # other views
    assert opened.state(dataclasses.replace(utterance, text="others"), 2) is None
    (opened.folder / "vectors" / "train" / "a.npy").unlink()
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
        ConclugenError, match=r"1 utterances .* with other options \(recipe\); .*--overwrite to delete them"
    ):
        opened.begin({"recipe": 2})
    assert opened.state(utterance, 2)
    opened.begin({"recipe": 2}, overwrite=True)
    assert opened.state(utterance, 2) is None


def test_a_sound_beside_is_watched_too(store, tmp_path):
    opened, utterance = store
    utterance = dataclasses.replace(utterance, sound=str(tmp_path / "a.wav"))
    (tmp_path / "a.wav").write_bytes(b"sound")
    before = utterance.stamp()
    (tmp_path / "a.wav").write_bytes(b"another sound")
    assert utterance.stamp() != before


def test_a_damaged_recipe_is_another(store):
    opened, utterance = store
    (opened.folder / "recipe.json").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConclugenError, match="with other options; repeat"):
        opened.begin({"recipe": 1})
    opened.begin({"recipe": 1}, overwrite=True)
    assert opened.state(utterance, 2) is None


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

"""Clips become data sets: exact vectors, every failure named, interruptions gone on from, views the same each time."""

import csv
import io
import pickle
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conclugen_jax.data import manifest as manifest_lib, shards
from conclugen_jax.data.requests import Request
from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract import backbones, clips as clips_lib, extraction, preparation, vectors
from conclugen_jax.extract.backbones import Backbone, Networks
from conclugen_jax.extract.preparation import Prepared
from tests import clips

ROOT = Path(__file__).parent.parent
OWN = tuple(f"tests.own_backbones:{name}" for name in ("pictures", "loudness", "words"))
FLAGS = [f"--backbone={name}" for name in OWN]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return clips.videos(tmp_path_factory.mktemp("videos"))


def extract(source, data_dir, *, own=OWN, labels=(), name="mine", cut=False, num_workers=0, **options):
    request = Request("features", source, name=name, labels=labels)
    found = clips_lib.find("clips", source, labels=labels, cut=cut)
    return extraction.extract(request, found, Networks((), own), data_dir, num_workers=num_workers, **options)


def rows_of(folder, split):
    dataset = shards.open_dataset(folder)
    stream = shards.ShardStream(dataset, split, list(dataset.manifest.modalities))
    indices = np.arange(stream.num_examples)
    return stream.names(indices)[0].tolist(), stream.rows(indices)


def table(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


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
    monkeypatch.setattr(preparation, "TIMEOUT", 1e-3)
    found = clips_lib.find("clips", videos)[:1]
    how = preparation.recipe(backbones.load(Networks((), OWN)))
    (only,) = preparation.prepared([(found[0], 1)], how, 1)
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
        ("nothing:here", "ModuleNotFoundError: No module named 'nothing'"),
        ("tests.own_backbones:nothing", "AttributeError: module 'tests.own_backbones' has no attribute 'nothing'"),
        ("tests.clips:tone", "TypeError: .*missing 1 required"),
        ("tests.own_backbones:raising", "RuntimeError: not today"),
        ("tests.own_backbones:leaving", "SystemExit: 0"),
        ("tests.own_backbones:nested", ".*local object"),
        ("tests.damaged_backbones:x", "ZeroDivisionError: division by zero"),
        ("collections:OrderedDict", "TypeError: gave a OrderedDict"),
    ):
        message = (
            f"--backbone={name}: {message}.*; expected MODULE:FUNCTION, such as mine:colours for mine.py in this folder"
        )
        with pytest.raises(ConclugenError, match=message):
            extract(videos, tmp_path, own=(name,))
    with pytest.raises(ConclugenError, match="two backbones are called 'words'"):
        extract(videos, tmp_path, own=(OWN[2], "tests.own_backbones:crashing"))
    with pytest.raises(ConclugenError, match="no backbone"):
        extract(videos, tmp_path, own=())


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
        ConclugenError, match=r"network\.json: cannot be read \(No such file.*; convert the weights again"
    ):
        extract(videos, tmp_path / "data", faces=str(weights_of))
    assert not (tmp_path / "data").exists()


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


def test_the_documented_backbone_works(videos, tmp_path, monkeypatch):
    text = (ROOT / "docs" / "how-to" / "add_backbone.md").read_text()
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
from conclugen_jax.extract import vectors
if sys.argv[1] == "keep":
    assert vectors.keep_freed_memory()
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


def test_beam_gives_the_same(videos, tmp_path):
    pytest.importorskip("apache_beam")
    one, _ = extract(videos, tmp_path / "one")
    two, tally = extract(videos, tmp_path / "two", beam=["--runner=DirectRunner"])
    assert tally.done == 8
    assert shard_bytes(one) == shard_bytes(two)


def test_parts_can_be_sent_to_workers_of_beam(videos, tmp_path, monkeypatch):
    def run(elements, action, options):
        for element in elements:
            pickle.loads(pickle.dumps(action))(pickle.loads(pickle.dumps(element)))

    one, _ = extract(videos, tmp_path / "one")
    monkeypatch.setattr(extraction.builders, "run_beam", run)
    two, tally = extract(videos, tmp_path / "two", beam=[])
    assert tally.done == 8
    assert shard_bytes(one) == shard_bytes(two)

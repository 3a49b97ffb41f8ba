"""Clips as on Hugging Face: listed in metadata.csv, or in a folder for each class; with and without folders of splits."""

import shutil
from pathlib import PurePosixPath

import pytest

from conclugen_jax.data import formats, label_columns, manifest as manifest_lib
from conclugen_jax.data.requests import Layout, Request
from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract import clips as clips_lib, listings
from tests import clips
from tests.helpers import run
from tests.layouts import matrices
from tests.test_clips import touch
from tests.test_extract import FLAGS, rows_of


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return clips.write(tmp_path_factory.mktemp("clip") / "a.mkv", clips.steady(1.0), sound=clips.tone(1.0))


def placed(clip, folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, folder / name)
    return folder


def extracted(source, data, *flags, code=0):
    common = ["--dataset=clips", "--name=hub", "--nocrop_faces", "--num_workers=1", f"--source={source}"]
    return run("extract", *common, f"--data_dir={data}", *FLAGS, *flags, code=code)


def labels_of(data):
    """split -> id -> name of its class."""
    folder = data / "hub" / "1.0.0"
    made = manifest_lib.read(folder)
    found = {}
    for split in made.splits:
        ids, rows = rows_of(folder, split)
        found[split] = {i: made.label.names[y] for i, y in zip(ids, rows["label"], strict=True)}
    return found


def test_metadata_lists_clips_with_their_labels(clip, tmp_path):
    source = placed(clip, tmp_path / "hub", "train/joy/1.mkv", "train/2.mkv", "test/3.mkv", "test/4.mkv")
    rows = "train/joy/1.mkv,happy,anna\ntrain/2.mkv,sad,ben\ntest/3.mkv,sad,carl\ntest/gone.mkv,sad,carl\n"
    (source / "metadata.csv").write_text(f"file_name,mood,group\n{rows}")
    made = extracted(source, tmp_path / "data", "--label=mood")
    assert labels_of(tmp_path / "data") == {"train": {"joy_1": "happy", "2": "sad"}, "test": {"3": "sad"}}
    failures = (tmp_path / "data" / "failures-hub-1.0.0.csv").read_text()
    assert f"test/gone,\"{source / 'metadata.csv'}, line 5: file 'test/gone.mkv' is not there\"" in failures
    assert "not listed in metadata.csv and skipped: 1 clip, such as test/4.mkv\n" in made.stdout
    guess = "mood: 2 classes (happy, sad), since its cells are words; use --label_kind or --classes to change that\n"
    assert made.stdout.count(guess) == 1
    again = extracted(source, tmp_path / "data", "--label=mood")
    assert "utterances extracted" in made.stdout
    assert "utterances extracted" not in again.stdout  # nothing was done again
    (source / "metadata.csv").write_text(f"file_name,mood,group\n{rows.replace('happy', 'calm')}")
    changed = extracted(source, tmp_path / "data", "--label=mood", code=2)
    assert "holds a data set made of other clips or in another way" in changed.stderr


def test_metadata_in_each_split_with_ids(clip, tmp_path):
    source = placed(clip, tmp_path / "hub", "train/1.mkv", "validation/1.mkv")
    for split, name in (("train", "one"), ("validation", "")):  # an empty cell: the file's name
        (source / split / "metadata.csv").write_text(f"file_name,id,label\n1.mkv,{name},x\n")
    extracted(source, tmp_path / "data")
    assert labels_of(tmp_path / "data") == {"train": {"one": "x"}, "validation": {"1": "x"}}


@pytest.mark.parametrize("split", ["", "train/"])
def test_folders_of_clips_are_classes(clip, tmp_path, split):
    names = [f"{split}joy/1.mkv", f"{split}joy/2.mkv", f"{split}01/1.mkv"]
    source = placed(clip, tmp_path / "hub", *names, *(["test/joy/3.mkv"] if split else []))
    made = extracted(source, tmp_path / "data")
    assert labels_of(tmp_path / "data") == {"train": {"01_1": "01", "joy_1": "joy", "joy_2": "joy"}} | (
        {"test": {"joy_3": "joy"}} if split else {}
    )
    assert "labels: the names of the folders (01, joy); --label_kind=none leaves them out\n" in made.stdout
    assert "utterances extracted" not in extracted(source, tmp_path / "data").stdout
    extracted(source, tmp_path / "data", "--label_kind=none", "--overwrite")
    assert manifest_lib.read(tmp_path / "data" / "hub" / "1.0.0").label.kind == "none"
    extracted(source, tmp_path / "data", "--classes=joy,01", "--overwrite")
    assert manifest_lib.read(tmp_path / "data" / "hub" / "1.0.0").label.names == ("joy", "01")


FOLDERS = {  # clips -> classes
    ("joy/1.mp4", "sad/1.mp4"): ["joy", "sad"],
    ("train/joy/1.mp4", "test/sad/1.mp4"): ["joy", "sad"],
    ("train/Joy/1.mp4", "train/sad/1.mp4", "test/joy/1.mp4"): ["Joy", "sad"],
    ("joy/1.mp4", "joy/2.mp4"): [],  # a single folder
    ("joy/1.mp4", "2.mp4"): [],
    ("joy/a/1.mp4", "sad/a/1.mp4"): [],  # not at one level
    ("joy/1.mp4", "sad/a/1.mp4"): [],
    ("train/1.mp4", "test/2.mp4"): [],
}


def test_names_may_repeat_in_other_splits(tmp_path):
    touch(tmp_path, "train/1.mp4", "test/1.mp4")
    (tmp_path / "metadata.csv").write_text("file_name,label\ntrain/1.mp4,x\ntest/1.mp4,y\n")
    found = clips_lib.find("clips", tmp_path, listing=listings.metadata(tmp_path).table)
    assert [u.place for u in found] == ["test/1", "train/1"]


@pytest.mark.parametrize("names", FOLDERS)
def test_which_folders_are_classes(tmp_path, names):
    utterances = clips_lib.find("clips", touch(tmp_path, *names))
    for kind in ("", "none"):
        request = Request("features", tmp_path, name="t", layout=Layout(kind=kind))
        request, found = listings.classes(request, utterances)
        classes = [] if kind else FOLDERS[names]
        assert classes == [*request.layout.classes]
        if not classes:
            assert found.table is None
            continue
        read = label_columns.read_guessed(found.table, "label", request.layout.kind, request.layout.classes, way_out="")
        places = [PurePosixPath(u.path).parent.name.lower() for u in utterances]
        assert [read.spec.names[i].lower() for i in read.values] == places
        joined = ["label: 'joy' (1 row) as 'Joy', as names that differ in case or blanks only are one class"]
        assert list(read.notes) == joined * ("Joy" in classes)


def test_metadata_that_cannot_be_used(tmp_path):
    touch(tmp_path, "a.mp4", "a.wav")
    assert listings.metadata(tmp_path) is None
    for text, message in (
        ("file_name\n../a.mp4\n", "line 2: file name '../a.mp4' leads out of the folder"),
        ("video_file_name,audio_file_name\na.mp4,a.wav\n", "lists 2 files a row; clips take one"),
        ("file_name,label\n", r"metadata\.csv: no rows below the header"),
        ("name\na.mp4\n", "expected columns MODALITY_file_name, or file_name alone"),
        ("file_name\na.mp4\na.wav\n", r"line 3: 'a' is the id of .*metadata\.csv, line 2, too; leave one out"),
    ):
        (tmp_path / "metadata.csv").write_text(text)
        with pytest.raises(ConclugenError, match=message):
            clips_lib.find("clips", tmp_path, listing=listings.metadata(tmp_path).table)
    (tmp_path / "metadata.csv").write_text("file_name\nb.mp4\nc.mp4\n")
    with pytest.raises(
        ConclugenError, match=r"line 2: file 'b\.mp4' is not there, nor is any other of the 2 listed files"
    ):
        clips_lib.find("clips", tmp_path, listing=listings.metadata(tmp_path).table)
    (tmp_path / "metadata.csv").write_text(f"file_name\na.mp4\n{'x' * 300}.mp4\n")
    with pytest.raises(ConclugenError, match=r"its name 'x+' is not printable text of 1 to 240 bytes"):
        clips_lib.find("clips", tmp_path, listing=listings.metadata(tmp_path).table)
    (tmp_path / "metadata.csv").rename(tmp_path / "metadata.jsonl")
    with pytest.raises(ConclugenError, match=r"metadata\.jsonl: only metadata\.csv is read; write it so"):
        listings.metadata(tmp_path)
    (tmp_path / "labels.csv").write_text("id\na\n")
    assert listings.metadata(tmp_path) is None
    (tmp_path / "metadata.jsonl").rename(tmp_path / "metadata.csv")
    with pytest.raises(ConclugenError, match=r"labels\.csv: is next to metadata\.csv, which holds the labels"):
        listings.metadata(tmp_path)


@pytest.mark.parametrize("names", [("a.mp4", "b.mp4"), ("joy/a.mp4", "sad/b.mp4")])
def test_tables_that_are_not_read_are_noted(tmp_path, names):
    source = touch(tmp_path, *names, "labels.XLSX", "all.tsv", "a.json", "notes.txt", ".x.tsv")
    request, known = listings.classes(Request("features", source, name="t"), clips_lib.find("clips", source))
    (*others, note) = listings.unread(known, source).facts["notes"]
    tables = "all.tsv, labels.XLSX" if names[0] == "a.mp4" else "a.json, all.tsv, labels.XLSX"
    assert note == (
        f"found beside the clips and not used: {tables}; labels are read from labels.csv or --labels=FILE.csv"
    )
    assert len(others) == len(known.facts.get("notes", ()))


@pytest.mark.parametrize("name", ["metadata.csv", "labels.csv"])
def test_labels_in_a_column_that_is_not_named_are_asked_for(clip, tmp_path, name):
    source = placed(clip, tmp_path / "hub", "1.mkv")
    (source / name).write_text("file_name,id,mood\n1.mkv,1,joy\n")
    asked = "no column 'label' was found; if another has the labels, stop this and name it with --label=COLUMN\n"
    assert asked not in extracted(source, tmp_path / "a", "--label=mood").stderr
    assert asked not in extracted(source, tmp_path / "b", "--label_kind=none").stderr
    assert asked in extracted(source, tmp_path / "data").stderr
    assert asked not in extracted(source, tmp_path / "data").stderr  # it is there already
    (source / name).unlink()
    assert asked not in extracted(source, tmp_path / "c").stderr


def test_a_build_asks_for_a_column_of_labels(tmp_path):
    (matrices(tmp_path / "x", "v") / "labels.csv").write_text("id,mood\na,joy\nb,sad\n")
    flags = ["--dataset=features", "--name=t", f"--source={tmp_path / 'x'}", "--num_workers=1"]
    asked = "no column 'label' was found; if another has the labels, name it with --label=COLUMN and --overwrite\n"
    for i, (flag, said) in enumerate({"--pool=mean": True, "--label=mood": False, "--label_kind=none": False}.items()):
        assert (asked in run("build", *flags, f"--data_dir={tmp_path / str(i)}", flag).stdout) is said


def test_a_workbook_of_labels_is_reported(clip, tmp_path):
    source = placed(clip, tmp_path / "hub", "1.mkv")
    (source / "labels.xlsx").touch()
    note = "found beside the clips and not used: labels.xlsx; labels are read from labels.csv or --labels=FILE.csv\n"
    assert note in extracted(source, tmp_path / "data").stdout
    assert note in extracted(source, tmp_path / "data").stdout  # nor is it forgotten once the data set is there
    (source / "labels.xlsx").unlink()
    assert "utterances extracted" not in extracted(source, tmp_path / "data").stdout


def test_labels_are_left_out_of_features_too(tmp_path):
    (matrices(tmp_path, "x") / "labels.csv").write_text("id,label\na,joy\nb,sad\n")
    for kind, expected in (("", "single"), ("none", "none")):
        request = Request("features", tmp_path, name="t", layout=Layout(kind=kind))
        assert formats.open_source(request).spec.label.kind == expected


def test_flags_that_exclude_each_other(tmp_path):
    touch(tmp_path, "joy/a.mp4", "sad/a.mp4")
    told = extracted(tmp_path, tmp_path / "data", "--label_kind=none", "--label=mood", code=2)
    assert "--label_kind=none is for no label, and --label or --classes describes one; leave it out" in told.stderr

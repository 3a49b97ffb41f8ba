"""Folders, ids, cells and the names of files say the same split of an example, or the row is refused by name."""

import dataclasses

import numpy as np
import pytest

from conclugen_jax.data import formats
from conclugen_jax.data.cells import read_csv
from conclugen_jax.data.importers import csd
from conclugen_jax.data.requests import Found, Request
from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract import clips as clips_lib, listings
from conclugen_jax.extract.store import Vectors
from tests.layouts import matrices, refused, save
from tests.test_clips import touch


def labels(folder, text, name="labels.csv"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def splits(source, **options):
    """id -> split of the features in a folder."""
    annotations = formats.open_source(Request("features", source, name="t", **options)).annotations
    return {key: split for split, rows in annotations.items() for key in rows.ids}


def of_clips(source, *, table=(), listing=None):
    """id -> split of the clips in a folder, as extraction assembles them."""
    found = clips_lib.find("clips", source, labels=table, listing=listing and listing.table)
    known = dataclasses.replace(listing or Found({}), features={"x": Vectors(found, 2)})
    if listing is not None:
        known = dataclasses.replace(known, table=dataclasses.replace(listing.table, keys=None))
    annotations = formats.assemble(Request("features", source, name="t", labels=table), known, "clips").annotations
    return {key: split for split, rows in annotations.items() for key in rows.ids}


def folder_and_column(folder, a, b):
    save(folder / "x" / a / "a.npy", np.ones(2))
    labels(folder, f"id,split\na,{b}\n")
    return splits(folder)


def folder_and_file_name(folder, a, b):
    save(folder / "x" / a / "a.npy", np.ones(2))
    return splits(folder, labels=(labels(folder, "id\na\n", f"labels_{b}.csv"),))


def id_and_column(folder, a, b):
    labels(matrices(folder, "x", ids=[f"{a}/a"]), f"id,split\n{a}/a,{b}\n")
    return splits(folder)


def id_and_file_name(folder, a, b):
    table = labels(matrices(folder, "x", ids=[f"{a}/a"]), f"id\n{a}/a\n", f"{b}.csv")
    return splits(folder, labels=(table,))


def column_and_file_name(folder, a, b):
    table = labels(matrices(folder, "x", ids="a"), f"id,split\na,{a}\n", f"my_{b}_labels.csv")
    return splits(folder, labels=(table,))


def listing_and_column(folder, a, b):
    save(folder / a / "a.npy", np.ones(2))
    labels(folder, f"file_name,split\na.npy,{b}\n", f"{a}/metadata.csv")
    return splits(folder)


def listed_folders(folder, a, b):
    for split in {a, b}:
        save(folder / split / "a.npy", np.ones(2))
    labels(folder, f"x_file_name,y_file_name\n{a}/a.npy,{b}/a.npy\n", "metadata.csv")
    return splits(folder)


def clip_and_column(folder, a, b):
    touch(folder, f"{a}/a.mp4")
    return of_clips(folder, table=(labels(folder, f"id,split\na,{b}\n"),))


def clip_and_file_name(folder, a, b):
    touch(folder, f"{a}/a.mp4")
    return of_clips(folder, table=(labels(folder, "id\na\n", f"{b}.csv"),))


def interval_and_column(folder, a, b):
    touch(folder, f"{a}/talk.mp4")
    return of_clips(folder, table=(labels(folder, f"id,split,video,start,end\na,{b},talk,0,1\n"),))


def interval_and_file_name(folder, a, b):
    touch(folder, f"{a}/talk.mp4")
    return of_clips(folder, table=(labels(folder, "id,video,start,end\na,talk,0,1\n", f"{b}.csv"),))


def listed_clip_and_column(folder, a, b):
    touch(folder, f"{a}/a.mp4")
    labels(folder, f"file_name,split\n{a}/a.mp4,{b}\n", "metadata.csv")
    return of_clips(folder, listing=listings.metadata(folder))


def fold_and_column(folder, a, b):
    video = next(video for video, split in csd.read_folds("cmu_mosi").items() if split == a)
    text = f"video,start_time,end_time,sentiment,split\n{video},0,1,1,{b}\n"
    found, _ = csd.read_labels([read_csv(labels(folder, text))], "cmu_mosi")
    return dict.fromkeys("a", *found)


PAIRS = [folder_and_column, folder_and_file_name, id_and_column, id_and_file_name, column_and_file_name]
PAIRS += [listing_and_column, listed_folders, fold_and_column]
PAIRS += [clip_and_column, clip_and_file_name, interval_and_column, interval_and_file_name, listed_clip_and_column]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.__name__)
@pytest.mark.parametrize("split", ["train", "test"])
def test_two_places_that_say_the_split_agree(tmp_path, pair, split):
    assert [*pair(tmp_path, split, split).values()] == [split]
    other = "test" if split == "train" else "train"
    with pytest.raises(ConclugenError, match=r"\.csv, line 2: .*(correct|list files of one split)"):
        pair(tmp_path / "other", split, other)


def test_folders_say_the_split_where_the_table_does_not(tmp_path):
    for name in ("train/a", "dev/b", "Test/c"):
        touch(tmp_path / "clips", f"{name}.mp4")
        save(tmp_path / "x" / "x" / f"{name}.npy", np.ones(2))
        save(tmp_path / "listed" / f"{name}.npy", np.ones(2))
    expected = {"a": "train", "b": "validation", "c": "test"}
    table = labels(tmp_path, "id,label\na,x\nb,y\nc,x\n")
    assert of_clips(tmp_path / "clips", table=(table,)) == expected
    assert splits(tmp_path / "x", labels=(table,)) == expected
    rows = labels(tmp_path, "id,video,start,end\na,a,0,1\nb,b.mp4,0,1\nc,Test/c,0,1\nd,gone,0,1\n", "rows.csv")
    assert of_clips(tmp_path / "clips", table=(rows,)) == expected | {"d": "train"}
    for folder, ending in (("listed", "npy"), ("clips", "mp4")):
        listed = "".join(f"{name}.{ending},x\n" for name in ("train/a", "dev/b", "Test/c"))
        labels(tmp_path / folder, f"file_name,label\n{listed}", "metadata.csv")
    assert splits(tmp_path / "listed") == expected
    assert of_clips(tmp_path / "clips", listing=listings.metadata(tmp_path / "clips")) == expected


def test_a_name_in_two_splits_needs_a_column(tmp_path):
    for split in ("train", "test"):
        save(tmp_path / "x" / split / "a.npy", np.ones(2))
    labels(tmp_path, "id\na\n")
    refused(r"labels\.csv, line 2: 'a' is in test and train; add a column 'split'", tmp_path)
    labels(tmp_path, "id,split\na,train\na,test\n")
    assert splits(tmp_path) == {"a": "test"}
    (tmp_path / "x" / "train" / "a.npy").rename(tmp_path / "x" / "train" / "b.npy")
    assert splits(tmp_path) == {"a": "test"}  # the file of the other row, which says nothing of this one


def test_of_clips_of_one_name_the_one_in_the_split_of_the_row_is_taken(tmp_path):
    touch(tmp_path, "train/1.mp4", "test/1.mp4")
    table = labels(tmp_path, "id,split,video,start,end\na,test,1,0,1\nb,train,1.mp4,0,1\n")
    found = clips_lib.find("clips", tmp_path, labels=(table,))
    assert [(u.place, u.path) for u in found] == [
        ("test/a", f"{tmp_path}/test/1.mp4"),
        ("train/b", f"{tmp_path}/train/1.mp4"),
    ]
    table = labels(tmp_path, "id,video,start,end\na,1,0,1\n")
    with pytest.raises(ConclugenError, match=r"video '1' is .*1\.mp4 or .*1\.mp4; write its path in the row"):
        clips_lib.find("clips", tmp_path, labels=(table,))


def test_rows_of_one_id_are_not_exchanged(tmp_path):
    touch(tmp_path, "train/a.mp4", "test/b.mp4")
    table = labels(tmp_path, "id,split,video,start,end\nx,test,a,0,1\nx,train,b,0,1\n")
    with pytest.raises(ConclugenError, match=r"line 2: split 'test', but video 'a' is in the folder of train; correct"):
        clips_lib.find("clips", tmp_path, labels=(table,))


def test_a_clip_beside_those_in_folders_of_splits(tmp_path):
    save(tmp_path / "x" / "train" / "a.npy", np.ones(2))
    labels(matrices(tmp_path, "y", ids="ab"), "id\na\nb\n")
    refused(r"labels\.csv, line 3: 'b' is in no folder of a split, as others are in train; move it", tmp_path)
    labels(tmp_path, "file_name\ntrain/a.mp4\nb.mp4\n", "listed/metadata.csv")
    touch(tmp_path / "listed", "train/a.mp4", "b.mp4")
    with pytest.raises(ConclugenError, match=r"metadata\.csv, line 3: its file is in no folder of a split"):
        listings.metadata(tmp_path / "listed")
    with pytest.raises(ConclugenError, match=r"dia0_utt0\.mp4: its folders do not say whether .*, or say two of them"):
        clips_lib.find("meld", touch(tmp_path / "meld", "test/train_splits/dia0_utt0.mp4"))
    with pytest.raises(ConclugenError, match=r"Anger/1: its folders say test and train; rename"):
        clips_lib.find("caer", touch(tmp_path / "caer", "test/train/Anger/1.avi"))
    with pytest.raises(ConclugenError, match=r"both/train/b/test/c: its folders say test and train; rename"):
        clips_lib.find("clips", touch(tmp_path / "both", "train/b/test/c.mp4"))


def test_a_file_of_the_same_name_in_another_split_may_have_no_row(tmp_path):
    for name in ("train/a", "test/a", "test/b"):
        save(tmp_path / "x" / f"{name}.npy", np.ones(2))
    labels(tmp_path, "id,split\na,train\nb,test\n")
    assert splits(tmp_path) == {"a": "train", "b": "test"}


def test_a_file_whose_name_says_two_splits_has_rows_of_both(tmp_path):
    matrices(tmp_path, "x", ids="ab")
    table = labels(tmp_path, "id,split\na,train\nb,test\n", "train_test.csv")
    assert splits(tmp_path, labels=(table,)) == {"a": "train", "b": "test"}
    table.write_text("id\na\nb\n")
    with pytest.raises(ConclugenError, match=r"train_test\.csv: its name says test and train; add a column 'split'"):
        splits(tmp_path, labels=(table,))

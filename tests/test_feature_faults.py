"""Feature files that are broken, misplaced, hostile or huge, and what is said of those that are not used."""

import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conclugen_jax.data import formats
from conclugen_jax.data.features import FolderFeatures
from conclugen_jax.data.formats import open_features
from conclugen_jax.data.inspection_view import describe
from conclugen_jax.data.requests import Layout, Request
from conclugen_jax.errors import ConclugenError
from tests.layouts import build, matrices, refused, save, write_csv

# Passed over


def test_split_folders_in_capitals_are_used_and_unknown_ones_refused(tmp_path):
    for split in ("Train", "TEST"):
        save(tmp_path / "t" / "x" / split / f"{split}.npy", np.ones(2))
    _, found = build(Request("features", tmp_path / "t", name="t"), tmp_path / "data")
    assert {split: list(rows) for split, rows in found.items()} == {"train": ["Train"], "test": ["TEST"]}
    save(tmp_path / "t" / "x" / "holdout" / "c.npy", np.ones(2))
    refused(r"holdout: the .npy files below it would not be read; folders of splits are called", tmp_path / "t")


MISPLACED = {
    "loose": ("x/c.npy", r"x/c.npy: is next to folders of splits"),
    "capitals": ("x/train/c.NPY", r"c.NPY: files of features end in .npy"),
    "matrix in capitals": ("y.NPY", r"y.NPY: files of features end in .npy"),
    "nested": ("x/train/actor/c.npy", r"train/actor: the .npy files below it would not be read"),
    "deep": ("y/a/b/c.npy", r"y/a: the .npy files below it would not be read"),
    "metadata": ("x/train/metadata.csv", r"metadata.csv: is ignored there"),
    "labels": ("x/labels.csv", r"labels.csv: is ignored there; .*, or out and name it with --labels"),
    "folder and matrix": ("x.npy", r"x.npy: is next to other features called x"),
    "split for modality": ("train/a.npy", r"train: a split where a modality is expected"),
    "label array": ("labels.npy", r"'labels' is an array of several values a row, not a modality"),
}


@pytest.mark.parametrize("name", MISPLACED)
def test_files_where_none_are_looked_for_are_refused(tmp_path, name):
    save(tmp_path / "x" / "train" / "a.npy", np.ones(2))
    path, message = MISPLACED[name]
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_bytes((tmp_path / "x/train/a.npy").read_bytes())
    refused(message, tmp_path)


def test_hidden_files_are_no_features(tmp_path):
    save(tmp_path / "x" / "a.npy", np.ones(2))
    (tmp_path / "x" / "._a.npy").write_bytes(b"of the file system")
    save(tmp_path / "x" / ".cache" / "b.npy", np.ones(2))
    save(tmp_path / "__MACOSX" / "._b.npy", np.ones(2))
    assert formats.open_source(Request("features", tmp_path, name="t")).spec.modalities == {"x": 2}
    assert FolderFeatures(tmp_path / "x", how="mean").names() == {"": ["a"]}


def test_what_is_not_used_is_said(tmp_path):
    source = matrices(tmp_path / "t", "x")
    for name in ("more.npz", "notes.csv", "y_lengths.txt"):
        (source / name).write_text("")
    (source / "labels.csv").write_text("id,label\na,1\nb,0\n")
    dataset, _ = build(Request("features", source, name="t"), tmp_path / "data")
    assert dataset.manifest.source["passed_over"] == ["more.npz", "notes.csv", "y_lengths.txt"]
    said = "found beside the features and not used: more.npz, notes.csv, y_lengths.txt"
    assert said in describe(dataset.path)
    np.savez(source / "named.npz", ids=["a"], y=np.ones((1, 3)))
    modalities = {"y": f"{source}/named.npz:y"}
    other, _ = build(Request("features", source, name="u", modalities=modalities), tmp_path / "data")
    assert other.manifest.source["passed_over"] == ["more.npz", "notes.csv", "y_lengths.txt"]
    build(Request("features", source, name="t"), tmp_path / "data")  # is still the same data set


def test_arrays_of_an_npz_file_that_are_neither_features_nor_labels_are_named(tmp_path):
    path = tmp_path / "all.npz"
    others = {"wave": np.ones((2, 3), complex), "faces": np.ones((2, 1, 1, 3)), "config": np.array(3)}
    np.savez(path, ids=["a", "b"], x=np.ones((2, 2)), label=[0, 1], **others, none_lengths=[1, 1])
    source = formats.open_source(Request("features", path, name="t"))
    assert source.provenance()["passed_over"] == [
        "config (int64 of shape ())",
        "faces (float64 of shape (2, 1, 1, 3))",
        "none_lengths (int64 of shape (2,))",
        "wave (complex128 of shape (2, 3))",
    ]
    assert source.spec.modalities == {"x": 2}
    refused("no modality 'wave'; there are x", path, only=("wave",))
    np.savez(path, ids=["a", "b"], x=np.ones((2, 2)), labels=np.eye(2))
    refused("'labels' is an array of several values a row", path)
    np.savez(path, ids=["a", "b"], x=np.ones((2, 2)), Label=[0, 1], label=[1, 0])
    refused("two columns that differ in spaces or capitals only", path)


def test_labels_beside_a_file_that_has_its_own(tmp_path):
    source = tmp_path / "t"
    source.mkdir()
    (source / "labels.csv").write_text("id,label\na,yes\nb,no\n")
    lists = pa.array([[1.0, 2], [3, 4]])
    pq.write_table(pa.table({"id": ["a", "b"], "x": lists}), source / "all.parquet")
    dataset, _ = build(Request("features", source, name="t"), tmp_path / "data")
    assert dataset.manifest.label.names == ("no", "yes")
    pq.write_table(pa.table({"id": ["a", "b"], "x": lists, "label": [0, 1]}), source / "all.parquet")
    refused(r"labels.csv: is next to all.parquet.*choose with --labels=", source)
    labels = (source / "labels.csv",)
    assert formats.open_source(Request("features", source, name="t", labels=labels)).spec.label.names == ("no", "yes")
    assert formats.open_source(Request("features", source / "all.parquet", name="t")).spec.label.names == ("0", "1")
    save(tmp_path / "m" / "a.npy", np.ones(2))
    (tmp_path / "m/metadata.csv").write_text("file_name\na.npy\n")
    (tmp_path / "m/labels.csv").write_text("id,label\na,yes\n")
    refused("labels.csv: is next to metadata.csv", tmp_path / "m")


def test_labels_that_are_named_go_before_those_in_the_file(tmp_path):
    write_csv(tmp_path / "other.csv", [{"id": "b", "label": "late"}, {"id": "a", "label": "early"}])
    pq.write_table(pa.table({"id": ["a", "b"], "x": [[1.0], [2.0]], "label": [0, 1]}), tmp_path / "all.parquet")
    np.savez(tmp_path / "all.npz", ids=["a", "b"], x=np.array([[1.0], [2.0]]), label=[0, 1])
    for name in ("all.parquet", "all.npz"):
        request = Request("features", tmp_path / name, name="t", labels=(tmp_path / "other.csv",))
        dataset, found = build(request, tmp_path / "data", overwrite=True)
        assert dataset.manifest.label.names == ("early", "late")
        assert {i: (row[0]["x"].tolist(), row[1]) for i, row in found["train"].items()} == {
            "b": ([2], 1),
            "a": ([1], 0),
        }
        assert dataset.manifest.source["label_files"] == ["other.csv"]


def test_metadata_of_faulty_columns_and_folders(tmp_path):
    def metadata(text, folder=""):
        save(tmp_path / folder / "a.npy", np.ones(2))
        (tmp_path / folder / "metadata.csv").write_text(text)

    metadata("file_name,features_file_name\na.npy,a.npy\n")
    refused(
        r"metadata.csv: file_name, features_file_name; expected columns MODALITY_file_name, or file_name alone",
        tmp_path,
    )
    metadata("file_name,split\na.npy,\n")
    refused("metadata.csv, line 2: split ''", tmp_path)
    (tmp_path / "metadata.csv").unlink()
    metadata("file_name,split\na.npy,\n", "Test")
    metadata("file_name\na.npy\n", "train")
    assert formats.open_source(Request("features", tmp_path, name="t")).spec.splits == ("train", "test")
    metadata("file_name,split\na.npy,train\n", "Test")
    refused("line 2: split 'train' in the folder 'Test'", tmp_path)
    metadata("file_name,x_file_name\na.npy,a.npy\n", "Test")
    refused("train/metadata.csv: file_name; expected columns .* and the same in each split", tmp_path)
    metadata("file_name\na.npy\n", "holdout")
    refused("holdout is none of these", tmp_path)
    refused("add a column NAME_file_name instead of --modality", tmp_path, modalities={"y": str(tmp_path / "train")})


def test_ids_of_metadata_stand_in_a_column_or_are_the_names_of_files(tmp_path):
    save(tmp_path / "f" / "a.npy", np.ones(2))
    save(tmp_path / "f" / "b.npy", np.ones(2))
    (tmp_path / "metadata.csv").write_text("id,file_name\nfirst,f/a.npy\n,f/b.npy\n")
    _, found = build(Request("features", tmp_path, name="t"), tmp_path / "data")
    assert list(found["train"]) == ["first", "b"]


def test_a_split_called_all_would_be_all_splits(tmp_path):
    source = matrices(tmp_path / "t", "x")
    (source / "labels.csv").write_text("id,split,label\na,all,1\nb,train,0\n")
    refused("line 2: split 'all'", source)


def test_ids_with_their_split_in_front_say_where_they_are(tmp_path):
    source = matrices(tmp_path / "t", "x", "y", ids=["train/a", "dev/a", "Test/c"])
    dataset, found = build(Request("features", source, name="t"), tmp_path / "data")
    assert {s: list(rows) for s, rows in found.items()} == {"train": ["a"], "validation": ["a"], "test": ["c"]}
    assert all(set(row[0]) == {"x", "y"} for rows in found.values() for row in rows.values())
    assert dataset.manifest.source["unused"] == {}
    (source / "y.txt").write_text("a\nb\nc")
    refused("have ids such as train/ID, and some do not", source)


def test_accents_apart_or_composed_are_the_same_id(tmp_path):
    composed, apart = unicodedata.normalize("NFC", "José"), unicodedata.normalize("NFD", "José")
    assert composed != apart
    for label, stored in ((composed, apart), (apart, composed)):
        source = tmp_path / label / "t"
        save(source / "folder" / f"{stored}.npy", np.ones(2))
        matrices(source, "matrix", ids=[stored])
        (source / "labels.csv").write_text(f"id,label\n{label},1\n", encoding="utf-8")
        dataset, found = build(Request("features", source, name="t"), tmp_path / label / "data")
        assert set(found["train"][composed][0]) == {"folder", "matrix"}
        assert dataset.manifest.source["unused"] == {}
    matrices(tmp_path / "twice", "x", ids=[composed, apart])
    refused("id .* appears twice", tmp_path / "twice")


def test_empty_lines_among_ids(tmp_path):
    source = matrices(tmp_path, "x")
    (source / "x.txt").write_text("a\nb\n\n\n")
    assert formats.open_source(Request("features", source, name="t")).num_examples("train") == 2
    (source / "x.txt").write_text("a\n \nb\n")
    refused("x.txt, line 2: empty", source)
    np.savez(tmp_path / "all.npz", ids=["a", ""], x=np.ones((2, 2)))
    refused("id of row 1 is empty", tmp_path / "all.npz")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "authors", "dataset": "meld"}, r"features: cannot be read \(No such file"),
        ({"format": "metadata"}, r"expected one metadata.csv in it"),
        ({"format": "npz"}, r"not a regular file"),
        ({"format": "parquet"}, r"0 Parquet files"),
        ({"format": "table", "source": "x/a.npy"}, r"a.npy: cannot be read \(Not a directory"),
        ({"format": "metadata", "source": "x/a.npy"}, r"a.npy: cannot be read \(Not a directory"),
        ({"format": "authors", "dataset": "meld", "source": "x/a.npy"}, r"features: cannot be read \(Not a directory"),
        ({"format": "npz", "source": None, "modalities": {"x": "x"}}, r"format 'npz' is read from a source"),
        ({"format": "parquet", "source": "x/a.npy"}, r"a.npy: cannot be read as a Parquet file"),
    ],
)
def test_formats_at_the_wrong_kind_of_path(tmp_path, options, message):
    save(tmp_path / "x" / "a.npy", np.ones(2))
    source = options.get("source", ".")
    refused(
        message, None if source is None else tmp_path / source, **{k: v for k, v in options.items() if k != "source"}
    )


# What is asked for


def test_features_that_are_not_asked_for_are_not_opened(tmp_path):
    source = matrices(tmp_path / "t", "x")
    (source / "broken.npy").write_bytes(b"no array")
    refused("broken.npy: ", source)
    found = formats.open_source(Request("features", source, name="t", only=("x",)))
    assert found.spec.modalities == {"x": 2}
    found = formats.open_source(Request("features", source, name="t", modalities={"broken": str(source / "x.npy")}))
    assert found.spec.modalities == {"x": 2, "broken": 2}
    refused("no modality 'smell'; there are broken, x", source, only=("smell",))


def test_modalities_by_name_alone_need_no_labels(tmp_path):
    matrices(tmp_path, "x")
    _, found = build(Request("features", name="t", modalities={"m": str(tmp_path / "x.npy")}), tmp_path / "data")
    assert list(found["train"]) == ["a", "b"]


def test_paths_with_colons_and_commas(tmp_path):
    folder = matrices(tmp_path / "a:b,c", "x")
    save(folder / "f:g" / "a.npy", np.ones(2))
    np.savez(folder / "all.npz", ids=["a"], features=np.ones((1, 2)), other=np.ones((1, 3)))
    assert open_features(str(folder / "x.npy"), "mean").dim == 2
    assert open_features(str(folder / "f:g"), "mean").dim == 2
    assert open_features(str(folder / "all.npz"), "mean").dim == 2
    assert open_features(str(folder / "all.npz:other"), "mean").dim == 3
    with pytest.raises(ConclugenError, match=r"x.npy,y=y.npy: no such file or folder; .*once for each modality"):
        open_features(f"{folder}/x.npy,y=y.npy", "mean")


def test_targets_with_capitals(tmp_path):
    source = matrices(tmp_path / "t", "x")
    (source / "labels.csv").write_text("id,Label,Arousal,Group\na,1,0.5,p\nb,0,1.5,q\n")
    layout = Layout(label=("Label",), targets=("Arousal", "Group"))
    dataset, _ = build(Request("features", source, name="t", layout=layout), tmp_path / "data")
    assert set(dataset.manifest.targets) == {"Arousal", "group"}
    (source / "labels.csv").write_text("id,label,the mood\na,1,0.5\nb,0,1.5\n")
    with pytest.raises(ConclugenError, match=r"'the mood'.* letters, digits and '_'"):
        build(Request("features", source, name="t2", layout=Layout(targets=("the mood",))), tmp_path / "data")


def test_a_named_corpus_in_a_table_with_splits_of_its_own(tmp_path):
    """RAVDESS has none, so that folds are made; a column ``split`` says otherwise."""
    ids = [f"01-01-0{1 + i % 8}-01-01-01-{1 + i:02d}" for i in range(12)]
    columns = {"ids": np.array(ids), "x": np.arange(12.0)[:, None]}
    splits = ["train", "test", "val"] * 4
    np.savez(tmp_path / "all.npz", **columns, split=splits, label=[1 + i % 8 - 1 for i in range(12)], group=ids)
    request = Request("ravdess", tmp_path / "all.npz", name="r")
    with pytest.raises(ConclugenError, match=r"the data have splits \(train, validation, test\) already"):
        formats.open_source(request)
    caer = [f"Anger_{i}" for i in range(3)]
    np.savez(tmp_path / "caer.npz", ids=caer, x=np.ones((3, 1)), split=["test", "train", "val"], label=["Sad"] * 3)
    _, found = build(Request("caer", tmp_path / "caer.npz"), tmp_path / "data")
    assert {s: {i: row[1] for i, row in rows.items()} for s, rows in found.items()} == {
        "train": {"Anger_1": 5},
        "validation": {"Anger_2": 5},
        "test": {"Anger_0": 5},
    }


def test_ids_twice_in_a_matrix(tmp_path):
    refused("x.txt: id 'b' appears twice", matrices(tmp_path, "x", ids="abb"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "mosi"}, r"'mosi' is unknown; there are voxceleb2, caer"),
        ({"format": "zip"}, r"format 'zip' is unknown; there are auto, authors"),
        ({"pool": "sum"}, r"pooling 'sum' is unknown; there are mean, max, last"),
        ({"name": ""}, r"needs a name of its own; give it with --name"),
        ({"source": Path("nowhere")}, r"nowhere: no such file or folder"),
        ({"source": None}, r"no source"),
        ({"only": ("smell",)}, r"no modality 'smell'; there are x"),
        ({"modalities": {"y": "gone.npy"}}, r"gone.npy: no such file"),
        ({"dataset": "meld"}, r"no labels; add a labels.csv"),
        ({"dataset": "caer"}, r"nothing says which split"),
        ({"format": "csd"}, r"corpus 'features' has no standard folds here; there are cmu_mosei"),
        (
            {"folds": (3, 0)},
            r"no example has a group \(person\), but folds need one; .* with --fold_by=example \(a person",
        ),
        ({"layout": Layout(label=("emotion",))}, r"no column 'emotion'; it has id, label"),
    ],
)
def test_impossible_requests_say_the_way_out(tmp_path, changes, message):
    save(tmp_path / "t" / "x" / "a.npy", np.ones(2))
    if "layout" in changes:
        (tmp_path / "t" / "labels.csv").write_text("id,label\na,1\n")
    request = {"dataset": "features", "source": tmp_path / "t", "name": "mine"} | changes
    with pytest.raises(ConclugenError, match=message):
        formats.open_source(Request(**request))

"""Feature files that are broken, misplaced, hostile or huge, and what is said of those that are not used."""

import contextlib
import io
import os
import resource
import socket
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conclugen_jax.commands.build import describe
from conclugen_jax.data import features, files, formats, parquet
from conclugen_jax.data.annotations import Layout
from conclugen_jax.data.combined import ConcatFeatures, VariantFeatures
from conclugen_jax.data.features import MatrixFeatures, ParquetFeatures
from conclugen_jax.data.folders import FolderFeatures
from conclugen_jax.data.importers import authors
from conclugen_jax.data.pooling import pool
from conclugen_jax.data.requests import Request, open_features
from conclugen_jax.errors import ConclugenError
from tests.layouts import LAYOUT, assert_features, build, save, table_rows, write_csv


def refused(message, source, **options):
    """The request ends in one sentence that says so."""
    request = Request(**{"dataset": "features", "name": "mine", "source": source} | options)
    with pytest.raises(ConclugenError, match=message) as e:
        formats.open_source(request)
    assert "\n" not in str(e.value)


def table(folder, *modalities, ids="ab"):
    """A matrix for each modality."""
    for name in modalities:
        save(folder / f"{name}.npy", np.ones((len(ids), 2)))
        (folder / f"{name}.txt").write_text("\n".join(ids))
    return folder


@pytest.fixture
def little_memory():
    """A gigabyte beyond what is in use: what takes more ends in MemoryError, not in the death of the machine."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc to say how much memory is in use")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def sparse(path, size, header=b""):
    """A file that takes no room on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header)
    os.truncate(path, size)


def npy_header(shape):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file.getvalue()


# Passed over


def test_split_folders_in_capitals_are_used_and_unknown_ones_refused(tmp_path):
    for split in ("Train", "TEST"):
        save(tmp_path / "t" / "x" / split / f"{split}.npy", np.ones(2))
    _, found = build(Request("features", tmp_path / "t", name="t"), tmp_path / "data")
    assert {split: list(rows) for split, rows in found.items()} == {"train": ["Train"], "test": ["TEST"]}
    save(tmp_path / "t" / "x" / "holdout" / "c.npy", np.ones(2))
    refused(r"holdout: the .npy files below it would not be read; folders of splits are called", tmp_path / "t")


MISPLACED = {
    "loose": ("x/c.npy", r"x/c.npy: lies beside the folders of splits"),
    "capitals": ("x/train/c.NPY", r"c.NPY: files of features end in .npy"),
    "matrix in capitals": ("y.NPY", r"y.NPY: files of features end in .npy"),
    "nested": ("x/train/actor/c.npy", r"train/actor: the .npy files below it would not be read"),
    "deep": ("y/a/b/c.npy", r"y/a: the .npy files below it would not be read"),
    "metadata": ("x/train/metadata.csv", r"metadata.csv: is not read there"),
    "labels": ("x/labels.csv", r"labels.csv: is not read there"),
    "folder and matrix": ("x.npy", r"x.npy: lies beside a folder x of .npy files"),
    "split for modality": ("train/a.npy", r"train: a split where a modality is expected"),
    "label array": ("labels.npy", r"'labels' is an array of several values a row, taken for no modality"),
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
    source = table(tmp_path / "t", "x")
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
    refused(r"labels.csv: lies beside all.parquet.*choose with --labels=", source)
    labels = (source / "labels.csv",)
    assert formats.open_source(Request("features", source, name="t", labels=labels)).spec.label.names == ("no", "yes")
    assert formats.open_source(Request("features", source / "all.parquet", name="t")).spec.label.names == ("0", "1")
    save(tmp_path / "m" / "a.npy", np.ones(2))
    (tmp_path / "m/metadata.csv").write_text("file_name\na.npy\n")
    (tmp_path / "m/labels.csv").write_text("id,label\na,yes\n")
    refused("labels.csv: lies beside metadata.csv", tmp_path / "m")


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
    refused("file_name and features_file_name are the same modality", tmp_path)
    metadata("file_name,split\na.npy,\n")
    refused("metadata.csv, line 2: split ''", tmp_path)
    (tmp_path / "metadata.csv").unlink()
    metadata("file_name,split\na.npy,\n", "Test")
    metadata("file_name\na.npy\n", "train")
    assert formats.open_source(Request("features", tmp_path, name="t")).spec.splits == ("train", "test")
    metadata("file_name,split\na.npy,train\n", "Test")
    refused("line 2: split 'train' in the folder 'Test'", tmp_path)
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
    source = table(tmp_path / "t", "x")
    (source / "labels.csv").write_text("id,split,label\na,all,1\nb,train,0\n")
    refused("line 2: split 'all'", source)


def test_ids_with_their_split_in_front_say_where_they_are(tmp_path):
    source = table(tmp_path / "t", "x", "y", ids=["train/a", "dev/a", "Test/c"])
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
        table(source, "matrix", ids=[stored])
        (source / "labels.csv").write_text(f"id,label\n{label},1\n", encoding="utf-8")
        dataset, found = build(Request("features", source, name="t"), tmp_path / label / "data")
        assert set(found["train"][label][0]) == {"folder", "matrix"}
        assert dataset.manifest.source["unused"] == {}
    table(tmp_path / "twice", "x", ids=[composed, apart])
    refused("id .* is there twice", tmp_path / "twice")


def test_empty_lines_among_ids(tmp_path):
    source = table(tmp_path, "x")
    (source / "x.txt").write_text("a\nb\n\n\n")
    assert formats.open_source(Request("features", source, name="t")).num_examples("train") == 2
    (source / "x.txt").write_text("a\n \nb\n")
    refused("x.txt, line 2: empty", source)
    np.savez(tmp_path / "all.npz", ids=["a", ""], x=np.ones((2, 2)))
    refused("id of row 1 is empty", tmp_path / "all.npz")


def test_variants_only_where_they_do_not_count_are_noticed(tmp_path):
    for v, names in ((1, ("train/a",)), (2, ("train/a", "test/b"))):
        for name in names:
            save(tmp_path / f"aug{v}" / f"{name}.npy", np.full(2, v))
    both = VariantFeatures([FolderFeatures(tmp_path / f"aug{v}", how="") for v in (1, 2)], first_split="train")
    (place,) = both.locate("train", ["a"])
    np.testing.assert_array_equal(both.read(place), [[1, 1], [2, 2]])
    save(tmp_path / "aug1/test/c.npy", np.ones(2))
    both = VariantFeatures([FolderFeatures(tmp_path / f"aug{v}", how="") for v in (1, 2)], first_split="train")
    places = both.locate("test", ["c", "b", "none"])
    np.testing.assert_array_equal(both.read(places[0]), [[1, 1]])
    with pytest.raises(ConclugenError, match=r"aug1/test/b.npy: this variant is missing, another has 2"):
        both.read(places[1])
    assert both.read(places[2]) is None
    save(tmp_path / "aug2/train/a.npy", np.ones(3))
    with pytest.raises(ConclugenError, match=r"aug2/train/a.npy: this variant has 3 values, another has 2"):
        both.read(place)


# What is no file, or a huge one


def _fifo(path):
    os.mkfifo(path)


def _device(path):
    path.symlink_to("/dev/zero")


def _socket(path):
    here = os.getcwd()
    os.chdir(path.parent)  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(path.name)
    os.chdir(here)


@pytest.mark.parametrize("make", [_fifo, _device, _socket, lambda path: path.mkdir()])
@pytest.mark.parametrize("name", ["x.npy", "x.txt", "labels.csv", "x_lengths.npy", "f/c.npy"])
def test_only_regular_files_are_read(tmp_path, name, make):
    source = table(tmp_path / "t", "x")
    if name == "x_lengths.npy":
        np.save(source / "x.npy", np.ones((2, 3, 2)))
    (source / name).unlink(missing_ok=True)
    (source / name).parent.mkdir(exist_ok=True)
    make(source / name)
    if name == "f/c.npy" and (source / name).is_dir():
        assert formats.open_source(Request("features", source, name="t")).provenance()["passed_over"] == ["f"]
    elif name == "x.txt":
        refused(r"no ids; put one id a line in x.txt", source)
    elif name == "labels.csv":
        refused("labels.csv: no regular file", source, labels=(source / name,))
    else:
        refused(f"{name}: no regular file", source)


@pytest.mark.parametrize("name", ["all.npz", "all.parquet", "annotations.yaml"])
def test_pipes_in_place_of_whole_data_sets(tmp_path, name):
    os.mkfifo(tmp_path / name)
    if name == "annotations.yaml":
        with pytest.raises(ConclugenError, match=f"{name}: no regular file"):
            authors._load_yaml(tmp_path / name)
    else:
        refused(f"{name}: no regular file", tmp_path / name, format=name.split(".")[1])


def test_huge_files_that_take_no_room(tmp_path, little_memory):
    source = table(tmp_path / "t", "x")
    sparse(source / "x.txt", 2**40)
    refused(r"x.txt: 1024.0 GiB, expected at most 2 GiB", source)
    (source / "x.txt").write_text("a\nb")
    sparse(source / "labels.csv", 2**40, b"id,label\na,1\n")
    refused(r"labels.csv: 1024.0 GiB, expected at most 2 GiB", source)
    (source / "labels.csv").unlink()
    header = npy_header((2, 2**37))
    sparse(source / "x.npy", len(header) + 2**40, header)
    refused(r"x.npy: rows of shape \(137438953472,\), more than 1 GiB each", source)
    header = npy_header((2**30,))
    sparse(source / "y" / "c.npy", len(header) + 2**32, header)
    refused(r"c.npy: 4.0 GiB, expected at most 1 GiB", source, modalities={"x": str(source / "y")})


def test_parquet_files_that_are_small_on_disk_and_huge_in_memory(tmp_path, little_memory):
    path = tmp_path / "bomb.parquet"
    zeros = pa.array(np.zeros(2**25, np.float32))
    lists = pa.ListArray.from_arrays(pa.array([0, 2**25], pa.int32()), zeros)
    pq.write_table(pa.table({"id": ["a"], "x": lists}), path)
    assert path.stat().st_size < 2**20
    refused(r"bomb.parquet: column 'x' would unpack to 0.3 GiB, more than 200 times the file's size", path)
    # a long text once on disk and in many rows is once in memory
    word = pa.DictionaryArray.from_arrays(pa.array(np.zeros(10**5, np.int32)), ["w" * 20_000])
    pq.write_table(pa.table({"id": word}), path, store_schema=False)
    assert parquet.parquet_column(path, "id") == ["w" * 20_000] * 10**5


def test_deeply_nested_annotations(tmp_path):
    path = tmp_path / "annotations.yaml"
    for text in ("[" * 100_000, "{a: " * 100_000, "? " * 100_000):
        path.write_text(text)
        with pytest.raises(ConclugenError, match=r"annotations.yaml: cannot be read as YAML \(more than 20 levels"):
            authors._load_yaml(path)
    path.write_text("train: {a: &one {b: [1, 2.50]}, c: *one}")
    assert authors._load_yaml(path) == {"train": {"a": {"b": ["1", "2.50"]}, "c": {"b": ["1", "2.50"]}}}
    for text, fault in (
        ("&a [*a]", "alias 'a' of nothing"),
        ("? [a]\n: b", "a list as key"),
        ("a: 1\n---\nb: 2", "a second document"),
        ("a: [", "did not find expected node"),
        ("- a", "a list, expected splits"),
        ("", "a NoneType, expected splits"),
    ):
        path.write_text(text)
        with pytest.raises(ConclugenError, match=fault):
            authors._load_yaml(path)


def test_a_file_cut_short_while_it_is_read_is_an_error_and_no_signal(tmp_path):
    source = table(tmp_path, "x", ids=[f"c{i}" for i in range(5000)])
    matrix = MatrixFeatures(source / "x.npy", how="mean")
    matrix.read(4999)
    os.truncate(source / "x.npy", 1000)
    with pytest.raises(ConclugenError, match=r"x.npy: has become shorter while it was read"):
        matrix.read(4999)


# Damage


def test_matrices_of_another_size_than_they_declare(tmp_path):
    source = table(tmp_path, "x")
    good = (source / "x.npy").read_bytes()
    for data in (good + b"\0", good[:-1]):
        (source / "x.npy").write_bytes(data)
        refused("x.npy: holds fewer or more bytes than its header declares", source)
    (source / "x.npy").write_bytes(npy_header((-2, -2)) + bytes(16))
    refused("x.npy: holds fewer or more bytes than its header declares", source)


def test_npz_members_that_are_no_arrays_and_ids_that_are_no_text(tmp_path):
    path = tmp_path / "all.npz"
    for member, data, fault in (
        ("notes.txt", b"hello", "'notes.txt' in it is no array"),
        ("y.npy", b"hello", "'y' in it is no array"),
        ("ids.npy", b"x", "'ids' is there twice"),
    ):
        np.savez(path, ids=["a"], x=np.ones((1, 2)))
        with zipfile.ZipFile(path, "a") as archive, pytest.warns() if member == "ids.npy" else contextlib.nullcontext():
            archive.writestr(member, data)
        refused(rf"all.npz: cannot be read as an npz file of plain arrays \({fault}", path)
    for ids in (np.array([b"\xff\xfe"]), np.array(["\ud800"]), np.array([0x7FFFFFFF], np.uint32).view("U1")):
        np.savez(path, ids=ids, x=np.ones((1, 2)))
        refused("id, row 0: no Unicode text", path)
        refused("ids, row 0: no Unicode text", None, modalities={"x": f"{path}:x"})


def test_parquet_columns_of_all_kinds(tmp_path):
    path = tmp_path / "all.parquet"
    good = {"id": ["a", "b"], "x": pa.array([[1.0, 2.0], None]), "label": pa.array(["p", "q"]).dictionary_encode()}
    odd = {
        "took": pa.array([1, 2], pa.duration("ns")),
        "at": pa.array([1, 2], pa.timestamp("ns")),
        "words": [["a"], ["b"]],
        "deep": [[[[1.0]]], [[[2.0]]]],
        "struct": [{"a": 1}, {"a": 2}],
    }
    pq.write_table(pa.table(good | odd | {"y": [[1.0], [2.0]]}), path)
    dataset, found = build(Request("features", path, name="t"), tmp_path / "data")
    assert sorted(name.split(" ")[0] for name in dataset.manifest.source["passed_over"]) == sorted(odd)
    assert_features(found["train"]["a"][0], {"x": np.float32([1, 2]), "y": np.ones(1)})
    assert_features(found["train"]["b"][0], {"y": np.full(1, 2)})
    refused("column 'words' holds list<.*expected lists of numbers", None, modalities={"w": f"{path}:words"})
    pq.write_table(pa.table({"id": [["a"]], "x": [[1.0]]}), path)
    refused("column 'id' holds list<.*expected text or numbers", None, modalities={"x": f"{path}:x"})
    # one that is unusable only matters to who asks for it
    faulty = {
        "empty": (pa.array([None, None], pa.list_(pa.float32())), "column 'empty' is empty in every row"),
        "hole": ([[1.0, None], [1.0, 2.0]], "row 0, column 'hole': an empty value"),
        "ragged": ([[[1.0], [1.0, 2.0]], [[1.0]]], "row 0, column 'ragged': lists of different lengths"),
    }
    for name, (column, message) in faulty.items():
        pq.write_table(pa.table(good | {name: column}), path)
        refused(message, path)
        assert formats.open_source(Request("features", path, name="t", only=("x",))).spec.modalities == {"x": 2}


def test_damaged_parquet_files(tmp_path):
    path = tmp_path / "all.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["id", "id"]), path)
    refused("column 'id' is there twice", path)
    buffers = [None, pa.array([0, 2], pa.int32()).buffers()[1], pa.py_buffer(b"\xff\xfe")]
    bad = pa.Array.from_buffers(pa.string(), 1, buffers)
    pq.write_table(pa.table({"id": bad, "x": [[1.0]]}), path)
    refused(r"all.parquet.*(UTF8|utf-8)", path)
    n = 40
    pq.write_table(pa.table({"id": [f"c{i}" for i in range(n)], "x": [[float(i), 1.0] for i in range(n)]}), path)
    whole = path.read_bytes()
    faults = 0
    for seed in range(150):  # no kind of damage may end otherwise than in one sentence
        rng = np.random.default_rng(seed)
        data = bytearray(whole)
        for at in rng.integers(0, len(data) - 8 - int.from_bytes(data[-8:-4], "little"), 3):
            data[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        try:
            source = formats.open_source(Request("features", path, name="t"))
            list(source.examples("train"))
        except ConclugenError:
            faults += 1
    assert faults > 30


def test_names_of_files_that_are_not_utf8_and_links_to_nothing(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.npy").symlink_to(tmp_path / "gone.npy")
    refused("a.npy: cannot be read.*No such file", tmp_path)
    save(tmp_path / "x" / "b.npy", np.ones(2))
    with pytest.raises(ConclugenError, match=r"a.npy: cannot be read.*No such file"):
        build(Request("features", tmp_path, name="t"), tmp_path / "data")
    os.unlink(tmp_path / "x" / "a.npy")
    try:
        (tmp_path / os.fsdecode(b"\xff")).write_text("")
        (tmp_path / "x" / os.fsdecode(b"\xff.npy")).write_bytes((tmp_path / "x/b.npy").read_bytes())
    except OSError:
        pytest.skip("the file system takes UTF-8 only")
    source = Request("features", tmp_path, name="t", modalities={"x": str(tmp_path / "y")})
    save(tmp_path / "y" / "b.npy", np.ones(2))
    assert formats.open_source(source).provenance()["passed_over"] == ["\\udcff"]
    (tmp_path / "y" / "b.npy").unlink()
    refused(r"the name '\\udcff.npy' of a file is not UTF-8", tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "authors", "dataset": "meld"}, r"features: cannot be read \(No such file"),
        ({"format": "metadata"}, r"expected one metadata.csv in it"),
        ({"format": "npz"}, r"no regular file"),
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
    source = table(tmp_path / "t", "x")
    (source / "broken.npy").write_bytes(b"no array")
    refused("broken.npy: ", source)
    found = formats.open_source(Request("features", source, name="t", only=("x",)))
    assert found.spec.modalities == {"x": 2}
    found = formats.open_source(Request("features", source, name="t", modalities={"broken": str(source / "x.npy")}))
    assert found.spec.modalities == {"x": 2, "broken": 2}
    refused("no modality 'smell'; there are broken, x", source, only=("smell",))


def test_modalities_by_name_alone_need_no_labels(tmp_path):
    table(tmp_path, "x")
    _, found = build(Request("features", name="t", modalities={"m": str(tmp_path / "x.npy")}), tmp_path / "data")
    assert list(found["train"]) == ["a", "b"]


def test_paths_with_colons_and_commas(tmp_path):
    folder = table(tmp_path / "a:b,c", "x")
    save(folder / "f:g" / "a.npy", np.ones(2))
    np.savez(folder / "all.npz", ids=["a"], features=np.ones((1, 2)), other=np.ones((1, 3)))
    assert open_features(str(folder / "x.npy"), "mean").dim == 2
    assert open_features(str(folder / "f:g"), "mean").dim == 2
    assert open_features(str(folder / "all.npz"), "mean").dim == 2
    assert open_features(str(folder / "all.npz:other"), "mean").dim == 3
    with pytest.raises(ConclugenError, match=r"x.npy,y=y.npy: no such file or folder; .*once for each modality"):
        open_features(f"{folder}/x.npy,y=y.npy", "mean")


def test_targets_with_capitals(tmp_path):
    source = table(tmp_path / "t", "x")
    (source / "labels.csv").write_text("id,Label,Arousal,Group\na,1,0.5,p\nb,0,1.5,q\n")
    layout = Layout(label=("Label",), targets=("Arousal", "Group"))
    dataset, _ = build(Request("features", source, name="t", layout=layout), tmp_path / "data")
    assert set(dataset.manifest.targets) == {"Arousal", "group"}
    (source / "labels.csv").write_text("id,label,the mood\na,1,0.5\nb,0,1.5\n")
    with pytest.raises(ConclugenError, match=r"the mood .*targets are called by letters, digits and '_'"):
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


# Numbers


def test_means_of_long_sequences_are_rounded_once():
    x = np.full((2**20, 1), 0.1, np.float32)
    assert pool(x, "mean", "x").dtype == np.float32
    assert pool(x, "mean", "x")[0] == np.float32(0.1)
    steps = np.random.default_rng(0).normal(10, 1, (50_001, 3)).astype(np.float32)
    np.testing.assert_array_equal(pool(steps, "mean", "x"), steps.astype(np.float64).mean(axis=0).astype(np.float32))
    half = np.array([[1.0], [1 + 2**-10]], np.float16)
    assert pool(half, "mean", "x") == 1 + 2**-11  # which float16 does not hold


def test_sequences_of_float16_count_as_converted(tmp_path):
    save(tmp_path / "t" / "x" / "a.npy", np.ones((3, 2), np.float16))
    save(tmp_path / "t" / "y" / "a.npy", np.ones((3, 2), np.float32))
    dataset, _ = build(Request("features", tmp_path / "t", name="t"), tmp_path / "data")
    assert dataset.manifest.source["converted"] == {"x float64": 1}


@pytest.mark.parametrize("shape", [(5, 4), (5, 3, 4)])
def test_matrices_in_fortran_order_and_with_bytes_swapped(tmp_path, shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    (tmp_path / "x.txt").write_text("\n".join("abcde"))
    for stored in (np.asfortranarray(x), x.astype(">f4"), np.asfortranarray(x.astype(">f8"))):
        np.save(tmp_path / "x.npy", stored)
        matrix = MatrixFeatures(tmp_path / "x.npy", how="max")
        for i in range(5):
            np.testing.assert_array_equal(matrix.read(i), x[i] if x.ndim == 2 else x[i].max(axis=0))
    np.save(tmp_path / "y.npy", np.asfortranarray(x[0]))
    np.testing.assert_array_equal(files.read_npy(tmp_path / "y.npy"), x[0])


def test_lengths_in_an_npz_file(tmp_path):
    x = np.arange(12.0).reshape(2, 3, 2)
    np.savez(tmp_path / "all.npz", ids=["a", "b"], x=x, x_lengths=[1, 2])
    dataset, found = build(Request("features", tmp_path / "all.npz", name="t"), tmp_path / "data")
    assert_features(found["train"]["a"][0], {"x": x[0, 0]})
    assert_features(found["train"]["b"][0], {"x": x[1, :2].mean(axis=0)})
    assert dataset.manifest.modalities == {"x": 2}
    for lengths, message in (([1], "lengths of shape"), ([1.0, 2.0], "lengths of shape"), ([0, 4], "length [04] of a")):
        np.savez(tmp_path / "all.npz", ids=["a", "b"], x=x, x_lengths=lengths)
        with pytest.raises(ConclugenError, match=message):
            list(formats.open_source(Request("features", tmp_path / "all.npz", name="t")).examples("train"))


def test_pieces_side_by_side_are_absent_where_one_is(tmp_path):
    for name in ("a", "b"):
        save(tmp_path / "first" / f"{name}.npy", np.ones(2))
    save(tmp_path / "second" / "train" / "a.npy", np.zeros(3))
    both = ConcatFeatures([FolderFeatures(tmp_path / f, how="") for f in ("first", "second")])
    assert both.dim == 5
    places = both.locate("train", ["a", "b"])
    np.testing.assert_array_equal(both.read(places[0]), [1, 1, 0, 0, 0])
    assert both.read(places[1]) is None
    assert both.locate("test", ["a"]) == [None]


def test_an_id_too_long_for_a_file_is_no_missing_modality(tmp_path):
    save(tmp_path / "x" / "a.npy", np.ones(2))
    (tmp_path / "labels.csv").write_text(f"id,label\na,1\n{'b' * 300},0\n")
    with pytest.raises(ConclugenError, match=r"bbb.npy: cannot be read \(File name too long\)"):
        build(Request("features", tmp_path, name="t"), tmp_path / "data")


def test_ids_twice_in_a_matrix(tmp_path):
    refused("x.txt: id 'b' is there twice", table(tmp_path, "x", ids="abb"))


def test_sequences_among_the_authors_features_are_no_pooled_ones(tmp_path):
    save(tmp_path / "features" / "texts" / "train" / "Anger_1.npy", np.ones((3, 4)))
    refused(r"Anger_1.npy: shape \(3, 4\), expected one vector per clip", tmp_path, dataset="caer")


@pytest.mark.parametrize("cropped", [True, False])
def test_the_authors_annotations_go_with_their_features(tmp_path, cropped):
    """Cropped features have annotations of their own; the video, where there is one, is the group, else the speaker."""
    folder = "texts_cropped" if cropped else "texts"
    for i in range(2):
        save(tmp_path / "features" / folder / "train" / f"dia{i}_utt0.npy", np.ones(4))
    for name, label in (("annotations_cropped.yaml", 5), ("annotations.yaml", 2)):
        (tmp_path / name).write_text(
            f"train:\n  dia0_utt0: {{emotions: {label}, person_id: Joey, video: v7}}\n"
            f"  dia1_utt0: {{emotions: {label}, person_id: Ross}}\n"
        )
    _, found = build(Request("meld", tmp_path), tmp_path / "data")
    label = 5 if cropped else 2
    assert {i: row[1:] for i, row in found["train"].items()} == {
        "train_dia0_utt0": (label, "v7"),
        "train_dia1_utt0": (label, "Ross"),
    }


def test_parquet_rows_in_any_order_are_decoded_in_blocks(tmp_path, monkeypatch):
    n = 300
    path = tmp_path / "x.parquet"
    pq.write_table(
        pa.table({"id": [f"c{i}" for i in range(n)], "x": [[float(i)] * 4 for i in range(n)]}), path, row_group_size=20
    )
    monkeypatch.setattr(parquet, "BATCH_BYTES", 500)
    monkeypatch.setattr(features, "BLOCK_BYTES", 100 * 8 * 4)
    column = ParquetFeatures(path, how="mean", column="x")
    calls, sizes = [], []
    usual, decode = features.parquet_vectors, pq.ParquetFile.iter_batches

    def counted(path, column, rows):
        calls.append(len(rows))
        return usual(path, column, rows)

    def sized(self, batch_size, **options):
        sizes.append(batch_size)
        return decode(self, batch_size, **options)

    monkeypatch.setattr(features, "parquet_vectors", counted)
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", sized)
    order = np.random.default_rng(0).permutation(n)
    places = column.locate("train", [f"c{i}" for i in order] + ["none"])
    assert places[-1] is None
    assert [int(column.read(place)[0]) for place in places[:-1]] == order.tolist()
    assert calls == [100, 100, 100]  # three times through the file, not once a row
    assert set(sizes) == {15}  # of 20 in a row group: 15 rows of 4 values in 500 bytes
    assert column.read(places[0])[0] == order[0]


def test_numbers_of_a_parquet_column_keep_their_type(tmp_path):
    types = {"half": pa.float16(), "single": pa.float32(), "int": pa.int64()}
    arrays = {k: pa.array([np.arange(3).astype(t.to_pandas_dtype())], pa.list_(t)) for k, t in types.items()}
    nested = pa.array([[[1.0, 2.0], [3.0, 4.0]]], pa.list_(pa.list_(pa.float32(), 2)))
    pq.write_table(pa.table({"id": ["a"], **arrays, "nested": nested}), tmp_path / "all.parquet")
    dataset, found = build(Request("features", tmp_path / "all.parquet", name="t"), tmp_path / "data")
    assert dataset.manifest.source["converted"] == {"half float16": 1, "int int64": 1}
    assert_features(
        found["train"]["a"][0], dict.fromkeys(types, np.float32([0, 1, 2])) | {"nested": np.float32([2, 3])}
    )


def test_a_table_without_its_group_or_target_cells(tmp_path):
    """Null in a Parquet column is an empty cell, as in csv."""
    rows, stored = table_rows(6)
    columns = {k: [row[k] for row in rows] for k in rows[0]} | {"x": [stored["video"][r["id"]].tolist() for r in rows]}
    columns["arousal"][2] = None
    columns["group"][0] = None
    pq.write_table(pa.table(columns), tmp_path / "all.parquet")
    dataset, found = build(Request("features", tmp_path / "all.parquet", name="t", layout=LAYOUT), tmp_path / "data")
    assert found["train"]["clip0"][2] == ""
    columns["id"][1] = None
    pq.write_table(pa.table(columns), tmp_path / "all.parquet")
    refused("id of row 1 is empty", tmp_path / "all.parquet")

"""Feature files that are no files, huge, nested, damaged or named in bytes: each ends in one sentence."""

import contextlib
import io
import os
import socket
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conclugen_jax.data import formats
from conclugen_jax.data.features import MatrixFeatures
from conclugen_jax.data.importers import authors
from conclugen_jax.data.requests import Request
from conclugen_jax.errors import ConclugenError
from tests.layouts import build, little_memory, matrices, refused, save


def sparse(path, size, header=b""):
    """A file that takes no room on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header)
    os.truncate(path, size)


def npy_header(shape):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file.getvalue()


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
    source = matrices(tmp_path / "t", "x")
    if name == "x_lengths.npy":
        np.save(source / "x.npy", np.ones((2, 3, 2)))
    (source / name).unlink(missing_ok=True)
    (source / name).parent.mkdir(exist_ok=True)
    make(source / name)
    if name == "f/c.npy" and (source / name).is_dir():
        assert formats.open_source(Request("features", source, name="t")).provenance()["passed_over"] == ["f"]
    elif name == "x.txt":
        refused(r"no ids; put one id a line in x.txt", source)
    else:
        refused(f"{name}: not a regular file", source)


@pytest.mark.parametrize("name", ["all.npz", "all.parquet", "annotations.yaml"])
def test_pipes_in_place_of_whole_data_sets(tmp_path, name):
    os.mkfifo(tmp_path / name)
    if name == "annotations.yaml":
        with pytest.raises(ConclugenError, match=f"{name}: not a regular file"):
            authors._load_yaml(tmp_path / name)
    else:
        refused(f"{name}: not a regular file", tmp_path / name, format=name.split(".")[1])


def test_huge_files_that_take_no_room(tmp_path):
    with little_memory():
        source = matrices(tmp_path / "t", "x")
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
        ("", "is empty"),
        ("# nothing", "a NoneType, expected splits"),
    ):
        path.write_text(text)
        with pytest.raises(ConclugenError, match=fault):
            authors._load_yaml(path)


def test_a_file_cut_short_while_it_is_read_is_an_error_and_no_signal(tmp_path):
    source = matrices(tmp_path, "x", ids=[f"c{i}" for i in range(5000)])
    matrix = MatrixFeatures(source / "x.npy", how="mean")
    matrix.read(4999)
    os.truncate(source / "x.npy", 1000)
    with pytest.raises(ConclugenError, match=r"x.npy: became shorter during reading"):
        matrix.read(4999)


def test_matrices_of_another_size_than_they_declare(tmp_path):
    source = matrices(tmp_path, "x")
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
        ("ids.npy", b"x", "'ids' appears twice"),
    ):
        np.savez(path, ids=["a"], x=np.ones((1, 2)))
        with zipfile.ZipFile(path, "a") as archive, pytest.warns() if member == "ids.npy" else contextlib.nullcontext():
            archive.writestr(member, data)
        refused(rf"all.npz: cannot be read \({fault}", path)
    for ids in (np.array([b"\xff\xfe"]), np.array(["\ud800"]), np.array([0x7FFFFFFF], np.uint32).view("U1")):
        np.savez(path, ids=ids, x=np.ones((1, 2)))
        refused("ids, row 0: no Unicode text", path)
        refused("ids, row 0: no Unicode text", None, modalities={"x": f"{path}:x"})


@pytest.mark.parametrize("format", ["table", "parquet", "metadata"])
def test_labels_that_are_a_link_to_nothing_are_not_passed_over(tmp_path, format):
    source = matrices(tmp_path / "t", "x")
    (source / "labels.csv").unlink(missing_ok=True)
    (source / "labels.csv").symlink_to(tmp_path / "gone.csv")
    (source / "metadata.csv").write_text("id,x_file_name\na,x.npy\n")
    pq.write_table(pa.table({"id": ["a"], "x": [[1.0, 2.0]]}), source / "all.parquet")
    fault = "next to metadata.csv" if format == "metadata" else r"cannot be read \(No such file"
    refused(f"labels.csv: .*{fault}", source, format=format)


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

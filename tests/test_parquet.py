"""Parquet files: columns of all kinds, blocks of rows, damage, and files that are huge in memory."""

import subprocess

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conclugen_jax.data import formats, parquet
from conclugen_jax.data.parquet import ParquetFeatures
from conclugen_jax.data.requests import Request
from conclugen_jax.errors import ConclugenError
from tests.layouts import LAYOUT, assert_features, build, little_memory, refused, table_rows


def test_parquet_files_that_are_small_on_disk_and_huge_in_memory(tmp_path):
    with little_memory():
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


def test_a_footer_is_looked_at_once_by_another_process(tmp_path, monkeypatch):
    path, calls, run = tmp_path / "all.parquet", [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: calls.append(args) or run(*args, **options))
    table = pa.table({"id": ["a", "b"], "x": [[1.0], [2.0]], "y": [[3.0], [4.0]], "label": ["p", "q"]})
    pq.write_table(table, path)
    build(Request("features", path, name="t"), tmp_path / "data")
    assert len(calls) == 1
    monkeypatch.setattr(parquet, "FOOTER", "import os; os.abort()")  # as pyarrow does at some damage
    pq.write_table(table, path)
    refused(r"all.parquet: cannot be read as a Parquet file \(signal 6\); write it again", path)


@pytest.mark.slow  # a process for each file
def test_damaged_parquet_files(tmp_path):
    path = tmp_path / "all.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["id", "id"]), path)
    refused("column 'id' appears twice", path)
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


def test_parquet_rows_in_any_order_are_decoded_in_blocks(tmp_path, monkeypatch):
    n = 300
    path = tmp_path / "x.parquet"
    pq.write_table(
        pa.table({"id": [f"c{i}" for i in range(n)], "x": [[float(i)] * 4 for i in range(n)]}), path, row_group_size=20
    )
    monkeypatch.setattr(parquet, "BATCH_BYTES", 500)
    monkeypatch.setattr(parquet, "BLOCK_BYTES", 100 * 8 * 4)
    column = ParquetFeatures(path, how="mean", column="x")
    calls, sizes = [], []
    usual, decode = ParquetFeatures._vectors, pq.ParquetFile.iter_batches

    def counted(self, rows):
        calls.append(len(rows))
        return usual(self, rows)

    def sized(self, batch_size, **options):
        sizes.append(batch_size)
        return decode(self, batch_size, **options)

    monkeypatch.setattr(ParquetFeatures, "_vectors", counted)
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
    arrays = {
        k: pa.array([np.arange(3, dtype={"half": "f2", "single": "f4", "int": "i8"}[k])], pa.list_(t))
        for k, t in types.items()
    }
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

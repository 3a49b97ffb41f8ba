"""Labels and feature files, good and bad: every kind of label, pooling, refusals by line and file, rebuilding."""

import csv
import zipfile
from pathlib import Path

import numpy as np
import pytest

from conclugen_jax.data import assembly, builders, formats, joined
from conclugen_jax.data.requests import Layout, Request
from conclugen_jax.errors import ConclugenError
from tests.layouts import LAYOUT, NO_LAYOUT, assert_features, build, save, table_rows, target, write_csv


def test_labels_of_every_kind(tmp_path):
    ids = [f"c{i}" for i in range(6)]
    save(tmp_path / "t" / "x.npy", np.arange(12.0).reshape(6, 2))
    (tmp_path / "t" / "x.txt").write_text("\n".join(ids))
    base = [{"id": i, "split": "train"} for i in ids]

    def labels(name, layout=NO_LAYOUT, **columns):
        rows = [r | {k: v[i] for k, v in columns.items()} for i, r in enumerate(base)]
        write_csv(tmp_path / "t" / "labels.csv", rows)
        dataset, found = build(Request("features", tmp_path / "t", name=name, layout=layout), tmp_path / "data")
        return dataset.manifest.label, [row[1] for row in found["train"].values()]

    spec, values = labels("numbers", label=[0, 2, 1, 0, 0, 2])
    assert (spec.kind, spec.names, values) == ("single", ("0", "1", "2"), [0, 2, 1, 0, 0, 2])
    spec, values = labels("reals", label=[-3, 2.5, 1, 0, 0, 2])
    assert (spec.kind, spec.names, values) == ("value", (), [-3, 2.5, 1, 0, 0, 2])
    spec, values = labels("ordered", Layout(classes=("low", "high")), label=["high", "low"] * 3)
    assert (spec.names, values) == (("low", "high"), [1, 0] * 3)
    spec, values = labels("many", Layout(label=("a", "b")), a=[1, 0, 1, 0, 0, 0], b=[0, 0, 1, 1, 1, 0])
    assert (spec.kind, spec.names) == ("multi", ("a", "b"))
    assert values == [[1, 0], [0, 0], [1, 1], [0, 1], [0, 1], [0, 0]]
    spec, values = labels("nothing", other=["x"] * 6)
    assert (spec.kind, values) == ("none", [[]] * 6)


def test_spaces_around_ids_do_not_matter_and_ids_that_never_match_are_noticed(tmp_path):
    save(tmp_path / "t" / "x.npy", np.arange(4.0).reshape(2, 2))
    save(tmp_path / "t" / "y.npy", np.ones((2, 3)))
    (tmp_path / "t" / "x.txt").write_text("\ufeffa \r\n b\r\n", encoding="utf-8")
    (tmp_path / "t" / "y.txt").write_text("b\na\n")
    (tmp_path / "t" / "labels.csv").write_text("id,label\n a,0\nb ,1\n")
    _, found = build(Request("features", tmp_path / "t", name="t"), tmp_path / "data")
    assert_features(found["train"]["b"][0], {"x": np.float32([2, 3]), "y": np.ones(3)})
    (tmp_path / "t" / "y.txt").write_text("b.npy\na.npy\n")
    with pytest.raises(ConclugenError, match=r"modality 'y' is in none of the 2 examples; compare its ids"):
        build(Request("features", tmp_path / "t", name="t2"), tmp_path / "data")


def test_an_empty_cell_of_a_further_target_is_unknown(tmp_path):
    save(tmp_path / "t" / "x.npy", np.ones((4, 2)))
    (tmp_path / "t" / "x.txt").write_text("a\nb\nc\nd")
    (tmp_path / "t" / "labels.csv").write_text("id,label,age,mood\na,1,2.5,low\nb,0,,high\nc,1,-1,\nd,0,0.5,low\n")
    layout = Layout(label=("label",), targets=("age", "mood"))
    dataset, _ = build(Request("features", tmp_path / "t", name="t", layout=layout), tmp_path / "data")
    np.testing.assert_array_equal(target(dataset, "train", "age"), [2.5, np.nan, -1, 0.5])
    assert target(dataset, "train", "mood") == [1, 0, -1, 1]
    assert dataset.manifest.targets["mood"].names == ("high", "low")
    assert dataset.manifest.splits["train"]["target_counts"] == {"age": [], "mood": [1, 2]}


BAD_TABLES = {
    "no id": ("split,label\ntrain,1\n", r"no column 'id'; it has split, label; its first line must hold.* id,split"),
    "ragged": ("id,split,label\nc0,train,1\nc1,train\n", r"labels.csv, line 3: 2 cells, the header has 3"),
    "twice": ("id,id\na,b\n", r"must name the columns, each once"),
    "empty": ("", r"must name the columns"),
    "no rows": ("id,split,label\n", r"no rows below the header"),
    "label outside": (
        "id,split,label\nc0,train,joy\nc1,train,fun\n",
        r"line 3: label 'fun', expected one of the classes joy, sad",
    ),
    "label empty": (
        "id,split,label\nc0,train,joy\nc1,train,\n",
        r"line 3: label '', expected one of the classes joy, sad",
    ),
    "split": ("id,split,label\nc0,../x,joy\n", r"line 2: split '../x'"),
    "quote": ('id,split,label\nc0,train,"joy\n', r"not csv"),
    "duplicate": ("id,split,label\nc0,train,joy\nc0,train,joy\n", r"id 'c0': the same id as row 0"),
    "path as id": ("id,split,label\n../c0,train,joy\n", r"'../c0' is no name of a file"),
    "unknown": (
        "id,split,label\nc0,train,joy\nnone,train,joy\n",
        r"row 1, id 'none', no modality is present.*--drop_bad",
    ),
}


BAD_TABLES |= {
    "huge class": ("id,label\nc0,99999999999\nc1,0\n", r"class numbers up to 99999999999; name the classes"),
    "one bad number": ("id,label\nc0,0.5\nc1,n.a.\n", r"numbers such as '0.5' and 'n.a.', which is none"),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_label_files_are_refused_by_line(tmp_path, name):
    text, message = BAD_TABLES[name]
    save(tmp_path / "t" / "x" / "c0.npy", np.ones(2))
    save(tmp_path / "t" / "x" / "c1.npy", np.ones(2))
    (tmp_path / "t" / "labels.csv").write_text(text)
    classes = ("joy", "sad") if name.startswith("label") else ()
    with pytest.raises(ConclugenError, match=message):
        build(Request("features", tmp_path / "t", name="bad", layout=Layout(classes=classes)), tmp_path / "data")
    assert not (tmp_path / "data").exists() or not list((tmp_path / "data").iterdir())


# Feature files


def test_sequences_are_pooled_over_their_valid_steps(tmp_path):
    x = np.random.default_rng(0).normal(size=(3, 4, 2)).astype(np.float32)
    lengths = np.array([4, 1, 2])
    save(tmp_path / "t" / "padded.npy", x)
    np.save(tmp_path / "t" / "padded_lengths.npy", lengths)
    (tmp_path / "t" / "padded.txt").write_text("a\nb\nc\n")
    for i, name in enumerate("abc"):
        save(tmp_path / "t" / "clips" / f"{name}.npy", x[i, : lengths[i]])
    reduce = {"mean": lambda s: s.mean(axis=0), "max": lambda s: s.max(axis=0), "last": lambda s: s[-1]}
    for how, fn in reduce.items():
        _, found = build(Request("features", tmp_path / "t", name=how, pool=how), tmp_path / "data")
        for i, name in enumerate("abc"):
            expected = fn(x[i, : lengths[i]])
            for m in ("padded", "clips"):
                np.testing.assert_allclose(found["train"][name][0][m], expected, rtol=1e-6)


def test_float16_and_float64_are_converted_and_said(tmp_path):
    save(tmp_path / "t" / "x" / "a.npy", np.array([0.5, 1.5], np.float16))
    save(tmp_path / "t" / "x" / "b.npy", np.array([0.1, 1e-3]))
    save(tmp_path / "t" / "x" / "c.npy", np.array([1, 2], np.float32))
    dataset, found = build(Request("features", tmp_path / "t", name="mixed"), tmp_path / "data")
    assert dataset.manifest.source["converted"] == {"x float16": 1, "x float64": 1}
    assert_features(found["train"]["b"][0], {"x": np.array([0.1, 1e-3], np.float32)})


class Marker:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_objects_and_pickles_are_refused_and_not_executed(tmp_path):
    marker = tmp_path / "executed"
    evil = np.array([Marker(marker)], dtype=object)
    source = tmp_path / "t"
    source.mkdir()

    def refused(message, path=source):
        with pytest.raises(ConclugenError, match=message):
            build(Request("features", path, name="evil"), tmp_path / "data")
        assert not marker.exists()

    save(source / "x" / "a.npy", evil)
    refused("a.npy: holds Python objects")
    (source / "x" / "a.npy").unlink()
    np.save(source / "m.npy", evil)
    (source / "m.txt").write_text("a\n")
    refused("m.npy: holds Python objects")
    np.savez(tmp_path / "all.npz", ids=np.array(["a"]), x=evil)
    refused("all.npz: cannot be read .*; write plain arrays with numpy.savez", tmp_path / "all.npz")
    (tmp_path / "x.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    refused("a pickle can execute code.*convert_mmsa", tmp_path / "x.pkl")


def test_archives_neither_unpack_beyond_measure_nor_name_what_lies_outside(tmp_path):
    with (
        zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("x.npy", "w") as file,
    ):
        for _ in range(256):
            file.write(bytes(2**20))
    with pytest.raises(ConclugenError, match=r"bomb.npz: .*would unpack to 0.2 GiB, more than 200 times its size"):
        formats.open_source(Request("features", tmp_path / "bomb.npz", name="bomb"))
    np.savez(tmp_path / "outside.npz", **{"../x": np.ones((1, 2)), "ids": np.array(["a"])})
    with pytest.raises(ConclugenError, match=r"'\.\./x'"):
        build(Request("features", tmp_path / "outside.npz", name="outside"), tmp_path / "data")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bomb.npz", "outside.npz"]


def test_damaged_files_are_refused_by_name(tmp_path):
    def one(data, message):
        (tmp_path / "t" / "x").mkdir(parents=True, exist_ok=True)
        (tmp_path / "t" / "x" / "a.npy").write_bytes(data)
        with pytest.raises(ConclugenError, match=message):
            build(Request("features", tmp_path / "t", name="damaged"), tmp_path / "data")

    save(tmp_path / "good.npy", np.ones(7, np.float32))
    good = (tmp_path / "good.npy").read_bytes()
    one(good[:-1], "a.npy: holds fewer or more bytes than its header declares")
    one(good + b"\0", "a.npy: holds fewer or more bytes than its header declares")
    one(good[:40], "a.npy: cannot be read .*numpy.save")
    one(b"", r"a.npy: is empty \(0 bytes\); download or copy it again")
    one(good.replace(b"(7,)", b"(7000000000000000000,)".ljust(4))[:200], "a.npy: (cannot be read|holds fewer)")
    save(tmp_path / "t" / "x" / "a.npy", np.ones(7))
    save(tmp_path / "t" / "x" / "b.npy", np.ones(6))
    with pytest.raises(ConclugenError, match=r"x/b.npy: 6 values, but .*x/a.npy has 7; extract both"):
        build(Request("features", tmp_path / "t", name="damaged"), tmp_path / "data")


def test_bad_rows_are_refused_with_their_ids_or_dropped_and_listed(tmp_path):
    x = np.ones((9, 3))
    x[2, 1], x[5, 0], x[7, 2] = np.nan, np.inf, -np.inf
    save(tmp_path / "t" / "x.npy", x)
    (tmp_path / "t" / "x.txt").write_text("\n".join(f"c{i}" for i in range(9)))
    request = Request("features", tmp_path / "t", name="bad")
    with pytest.raises(ConclugenError, match=r"3 bad examples: .*'c2'.*'c5'.*'c7'.*--drop_bad"):
        build(request, tmp_path / "data")
    dataset, found = build(request, tmp_path / "data", drop_bad=True)
    assert list(found["train"]) == ["c0", "c1", "c3", "c4", "c6", "c8"]
    assert dataset.manifest.splits["train"]["dropped"] == 3
    listed = list(csv.reader((dataset.path / assembly.DROPPED).read_text().splitlines()))
    assert [row[:3] for row in listed] == [["split", "row", "id"], *(["train", str(i), f"c{i}"] for i in (2, 5, 7))]
    assert assembly.DROPPED in dataset.manifest.files
    with pytest.raises(ConclugenError, match="other examples"):
        build(request, tmp_path / "data")


def test_leaks_between_splits_are_warned_of_and_refused_if_strict(tmp_path):
    rows, stored = table_rows()
    rows[1]["group"] = "speaker0"  # of dev; speaker0 is one of train's
    rows[3]["id"] = rows[1]["id"]  # in train and dev
    source = tmp_path / "t"
    for name, x in stored["video"].items():
        save(source / "video" / f"{name}.npy", x)
    write_csv(source / "labels.csv", rows)
    request = Request("features", source, name="leaky", layout=LAYOUT)
    with pytest.raises(ConclugenError, match=r"have 1 id in common, such as 'clip1'.*without --strict"):
        build(request, tmp_path / "data", strict=True)
    assert not list((tmp_path / "data").iterdir())
    dataset, _ = build(request, tmp_path / "data")
    assert dataset.manifest.warnings == [
        "splits 'train' and 'validation' have 1 id in common, such as 'clip1'",
        "splits 'train' and 'validation' have 1 group in common, such as 'speaker0'",
    ]


def test_many_parts_by_several_processes_hold_each_row_in_its_place(tmp_path, monkeypatch):
    """Four rows a shard: folder, matrix and Parquet of the same vectors, read in parts, are as the labels say."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(builders, "SHARD_BYTES", 4 * 4 * 9)
    n, source = 42, tmp_path / "t"
    x = np.random.default_rng(0).normal(size=(n, 3)).astype(np.float32)
    order = np.random.default_rng(1).permutation(n)
    for i in range(n):
        save(source / "folder" / f"c{i}.npy", x[i])
    np.save(source / "matrix.npy", x[order])
    (source / "matrix.txt").write_text("\n".join(f"c{i}" for i in order))
    table = pa.table({"id": [f"c{i}" for i in order[::-1]], "v": x[order[::-1]].tolist()})
    pq.write_table(table, tmp_path / "v.parquet", row_group_size=10)
    rows = [{"id": f"c{i}", "split": ("train", "test")[i % 2], "label": i % 3, "group": f"g{i}"} for i in range(n)]
    write_csv(source / "labels.csv", rows)
    request = Request("features", source, name="many", modalities={"parquet": f"{tmp_path}/v.parquet:v"})
    dataset, found = build(request, tmp_path / "data", num_workers=2)
    assert len([name for name in dataset.manifest.files if "-train.array_record" in name]) == 6
    for i, row in enumerate(rows):
        vectors, label, group = found[row["split"]][f"c{i}"]
        assert_features(vectors, dict.fromkeys(("folder", "matrix", "parquet"), x[i]))
        assert (label, group) == (i % 3, f"g{i}")
    # what is found out about the whole is said with the right names and rows, also behind dropped ones
    rows[40]["group"], rows[41]["group"] = "both", "both"
    write_csv(source / "labels.csv", rows)
    dataset, _ = build(request, tmp_path / "data", overwrite=True)
    assert dataset.manifest.warnings == ["splits 'train' and 'test' have 1 group in common, such as 'both'"]
    save(source / "folder" / "c2.npy", np.full(3, np.nan))
    rows[40]["id"] = "c38"
    write_csv(source / "labels.csv", rows)
    with pytest.raises(ConclugenError, match="split 'train', row 20, id 'c38': the same id as row 19"):
        build(request, tmp_path / "data", overwrite=True, drop_bad=True)


# Rebuilding


def test_unchanged_files_are_not_built_again_and_changed_ones_are_noticed(tmp_path):
    rows, stored = table_rows()
    source = tmp_path / "t"
    for name, x in stored["video"].items():
        save(source / "video" / f"{name}.npy", x)
    write_csv(source / "labels.csv", rows)
    request = Request("features", source, name="mine", layout=LAYOUT)
    dataset, _ = build(request, tmp_path / "data")
    before = {p: p.stat().st_mtime_ns for p in dataset.path.iterdir()}
    build(request, tmp_path / "data")
    assert {p: p.stat().st_mtime_ns for p in dataset.path.iterdir()} == before
    for other in (
        Request("features", source, name="mine", layout=LAYOUT, pool="max"),
        Request("features", source, name="mine", layout=Layout(label=("arousal",))),
        Request("features", source, name="mine", layout=LAYOUT, labels=(tmp_path / "other.csv",)),
    ):
        write_csv(tmp_path / "other.csv", [row | {"emotion": "sad"} for row in rows])
        with pytest.raises(ConclugenError, match="other examples"):
            build(other, tmp_path / "data")
    save(source / "video" / "clip3.npy", np.zeros(5, np.float32))
    with pytest.raises(ConclugenError, match=r"other examples.*--overwrite"):
        build(request, tmp_path / "data")
    _, found = build(request, tmp_path / "data", overwrite=True)
    assert not found["train"]["clip3"][0]["video"].any()


def test_label_files_are_hashed_in_pieces(tmp_path, monkeypatch):
    save(tmp_path / "x" / "a.npy", np.ones(2))
    (tmp_path / "labels.csv").write_text("id,label\na,1\n")
    source = formats.open_source(Request("features", tmp_path, name="t"))
    whole = source.fingerprint()
    monkeypatch.setattr(joined, "HASHED_BYTES", 5)
    assert source.fingerprint() == whole


def test_headers_in_capitals_and_targets_named_like_other_columns(tmp_path):
    save(tmp_path / "t" / "x.npy", np.ones((2, 2)))
    (tmp_path / "t" / "x.txt").write_text("a\nb")
    (tmp_path / "t" / "labels.csv").write_text("id,Split,Label,Group\na,train,yes,p\nb,test,no,q\n")
    layout = Layout(label=("label",), targets=("label", "group"))
    dataset, found = build(Request("features", tmp_path / "t", name="t", layout=layout), tmp_path / "data")
    assert {s: {i: row[1:] for i, row in rows.items()} for s, rows in found.items()} == {
        "train": {"a": (1, "p")},
        "test": {"b": (0, "q")},
    }
    assert target(dataset, "test", "group") == [1]


def test_numbers_are_names_where_names_are_numbers(tmp_path):
    save(tmp_path / "t" / "x.npy", np.ones((2, 2)))
    (tmp_path / "t" / "x.txt").write_text("a\nb")
    (tmp_path / "t" / "labels.csv").write_text("id,label\na,1\nb,0\n")
    with pytest.raises(ConclugenError, match="label '0', expected one of the classes 1, 2, 3"):
        build(Request("features", tmp_path / "t", name="t", layout=Layout(classes=("1", "2", "3"))), tmp_path / "data")


def test_labels_in_an_array_of_two_axes_are_no_modality(tmp_path):
    np.savez(tmp_path / "all.npz", ids=np.array(["a", "b"]), x=np.ones((2, 3)), label=np.eye(2))
    with pytest.raises(ConclugenError, match=r"'label' is an array of several values a row, not a modality"):
        formats.open_source(Request("features", tmp_path / "all.npz", name="t"))


def test_another_label_column_or_a_file_in_another_split_is_noticed(tmp_path):
    for split, name in (("test", "a"), ("test", "b"), ("train", "c"), ("train", "d")):
        save(tmp_path / "t" / "x" / split / f"{name}.npy", np.ones(2))
    request = Request("features", tmp_path / "t", name="t")
    build(request, tmp_path / "data")
    (tmp_path / "t/x/test/b.npy").rename(tmp_path / "t/x/train/b.npy")
    with pytest.raises(ConclugenError, match="other examples"):
        build(request, tmp_path / "data")
    (tmp_path / "t/labels.csv").write_text("id,split,one,two\na,test,0.5,1.5\nc,train,2.5,0.5\n")
    one, two = (Request("features", tmp_path / "t", name="u", layout=Layout(label=(c,))) for c in ("one", "two"))
    build(one, tmp_path / "data")
    with pytest.raises(ConclugenError, match="other examples"):
        build(two, tmp_path / "data")


def test_moved_files_are_the_same_and_vectors_without_a_row_are_counted(tmp_path):
    rows, stored = table_rows()
    source = tmp_path / "t"
    for name, x in stored["video"].items():
        save(source / "video" / f"{name}.npy", x)
    np.save(source / "audio.npy", np.stack(list(stored["audio"].values())))
    (source / "audio.txt").write_text("\n".join(stored["audio"]))
    write_csv(source / "labels.csv", rows[:10])
    dataset, _ = build(Request("features", source, name="mine", layout=LAYOUT), tmp_path / "data")
    assert dataset.manifest.source["unused"] == {"video": 2, "audio": 2}
    moved = source.rename(tmp_path / "moved")
    again, _ = build(Request("features", moved, name="mine", layout=LAYOUT), tmp_path / "data")
    assert again.manifest == dataset.manifest


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path):
    save(tmp_path / "t" / "x" / "a.npy", np.ones(2))

    class Changing(joined.JoinedSource):
        def part(self, split, start, stop):
            save(tmp_path / "t" / "x" / "a.npy", np.zeros(3))
            save(tmp_path / "t" / "x" / "a.npy", np.zeros(2))
            return super().part(split, start, stop)

    source = formats.open_source(Request("features", tmp_path / "t", name="x"))
    source.__class__ = Changing
    with pytest.raises(ConclugenError, match="changed while it was read"):
        builders.build(source, tmp_path / "data")
    assert not list((tmp_path / "data").iterdir())

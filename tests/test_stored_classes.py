"""Classes that a Parquet or npz file itself says: ClassLabel of Hugging Face, categories, an array called y."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conclugen_jax.data import formats
from conclugen_jax.data.requests import Layout, Request
from tests.layouts import refused
from tests.test_label_columns import CHANGE, numbered


def stored(path, **columns):
    """Write a Parquet file with three clips and these columns."""
    table = pa.table({"id": ["a", "b", "c"], "x": [[1.0], [2.0], [3.0]], **columns})
    pq.write_table(table, path)
    return table


def parquet_label(path, **layout):
    source = formats.open_source(Request("features", path, name="t", layout=Layout(**layout)))
    return source.spec.label, source.annotations["train"].label.tolist(), source.facts["notes"]


CATEGORIES = pa.DictionaryArray.from_arrays(pa.array([2, 0, 2], pa.int8()), ["low", "medium", "high"], ordered=True)
UNORDERED = pa.DictionaryArray.from_arrays(pa.array([2, 0, 2], pa.int8()), ["low", "medium", "high"])


def test_categories_keep_their_order(tmp_path):
    path = tmp_path / "all.parquet"
    stored(path, label=CATEGORIES)
    label, values, notes = parquet_label(path)
    assert (label, values) == (numbered("low", "medium", "high"), [2, 0, 2])
    assert notes == [f"label: 3 classes (low, medium, high), as all.parquet names them{CHANGE}"]
    table = stored(path, label=UNORDERED)
    assert parquet_label(path)[0] == numbered("high", "low")
    pandas = {"columns": [{"name": "label", "pandas_type": "categorical"}, {"name": "x", "pandas_type": "object"}]}
    pq.write_table(table.replace_schema_metadata({"pandas": json.dumps(pandas)}), path)
    assert parquet_label(path)[:2] == (numbered("low", "medium", "high"), [2, 0, 2])
    label, values, notes = parquet_label(path, classes=("high", "low"))
    assert (label, values, notes) == (numbered("high", "low"), [0, 1, 0], [])


def hugging_face(names):
    feature = {"label": {"names": names, "_type": "ClassLabel"}, "id": {"dtype": "string", "_type": "Value"}}
    return {"huggingface": json.dumps({"info": {"features": feature}})}


def test_names_of_hugging_face_are_kept(tmp_path):
    path = tmp_path / "all.parquet"
    table = stored(path, label=[1, 0, 1], mood=[0, None, -1])
    pq.write_table(table.replace_schema_metadata(hugging_face(["sad", "happy", "angry"])), path)
    label, values, notes = parquet_label(path)
    assert (label, values) == (numbered("sad", "happy", "angry"), [1, 0, 1])
    assert notes == [f"label: 3 classes (sad, happy, angry), as all.parquet names them{CHANGE}"]
    pq.write_table(table.replace_schema_metadata(hugging_face(["3", "2"])), path)  # names that look like numbers
    assert parquet_label(path)[:2] == (numbered("3", "2"), [1, 0, 1])
    pq.write_table(table.replace_schema_metadata(hugging_face(["sad"])), path)
    refused("all.parquet, row 0: label 1, but its classes are sad; correct it", path)


@pytest.mark.parametrize("kind", ["Sequence", "List"])
def test_several_classes_a_row_are_no_modality(tmp_path, kind):
    table = stored(tmp_path / "all.parquet", mood=[[0], [1, 0], []])
    features = {"mood": {"feature": {"names": ["sad", "happy"], "_type": "ClassLabel"}, "_type": kind}}
    described = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(described), tmp_path / "all.parquet")
    refused(
        "'mood' is an array of several values a row, not a modality; write labels as columns", tmp_path / "all.parquet"
    )


@pytest.mark.parametrize("damaged", [b"", b"[]", b"{", b"\xff", b"[" * 5000, b'{"info": {"features": {"label": []}}}'])
def test_damaged_descriptions_of_columns_are_ignored(tmp_path, damaged):
    path = tmp_path / "all.parquet"
    table = stored(path, label=[1, 0, 1])
    pq.write_table(table.replace_schema_metadata({"huggingface": damaged, "pandas": damaged}), path)
    assert parquet_label(path)[0] == numbered("0", "1")


@pytest.mark.parametrize("name", ["y", "labels", "target"])
def test_the_label_of_an_npz_file(tmp_path, name):
    path, ids, x = tmp_path / "all.npz", ["a", "b"], np.ones((2, 3))
    np.savez(path, ids=ids, x=x, **{name: [1.0, 0.0]})
    source = formats.open_source(Request("features", path, name="t"))
    assert source.spec.label == numbered("0", "1")
    assert source.facts["notes"][0] == f"all.npz: the array {name!r} is taken for the label; use --label to change that"
    np.savez(path, ids=ids, x=x, label=["p", "q"], **{name: [1.0, 0.0]})
    assert formats.open_source(Request("features", path, name="t")).spec.label == numbered("p", "q")
    np.savez(path, ids=ids, x=x, mood=["p", "q"], **{name: [1.0, 0.0]})
    request = Request("features", path, name="t", layout=Layout(label=("mood",)))
    assert formats.open_source(request).spec.label == numbered("p", "q")
    np.savez(path, ids=ids, x=x, **{name: np.eye(2)})
    refused(f"{name!r} is an array of several values a row, not a modality", path)


def test_several_labels_in_parquet_and_npz_are_true_or_false(tmp_path):
    bits = {"happy": np.array([True, False, True]), "sad": np.array([False, True, True])}
    stored(tmp_path / "all.parquet", **bits)
    np.savez(tmp_path / "all.npz", ids=["a", "b", "c"], x=np.ones((3, 1)), **bits)
    for name in ("all.parquet", "all.npz"):
        _, values, _ = parquet_label(tmp_path / name, label=("happy", "sad"))
        assert values == [[1, 0], [0, 1], [1, 1]]

"""Values of features: pooling, types and orders of bytes, lengths, pieces and variants, the authors' vectors."""

import contextlib
import functools
import os

import numpy as np
import pytest

from conclugen_jax.data import files, formats
from conclugen_jax.data.features import Combined, FolderFeatures, MatrixFeatures, pool
from conclugen_jax.data.requests import Request
from conclugen_jax.errors import ConclugenError
from tests.layouts import assert_features, build, refused, save


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
    for lengths, message in (([1], "lengths of shape"), ([1.0, 2.0], "lengths of shape"), ([0, 4], "[04] steps of 3")):
        np.savez(tmp_path / "all.npz", ids=["a", "b"], x=x, x_lengths=lengths)
        with pytest.raises(ConclugenError, match=message):
            list(formats.open_source(Request("features", tmp_path / "all.npz", name="t")).examples("train"))


def test_pieces_side_by_side_are_absent_where_one_is(tmp_path):
    for name in ("a", "b"):
        save(tmp_path / "first" / f"{name}.npy", np.ones(2))
    save(tmp_path / "second" / "train" / "a.npy", np.zeros(3))
    both = Combined([[FolderFeatures(tmp_path / f, how="") for f in ("first", "second")]])
    assert both.dim == 5
    places = both.locate("train", ["a", "b"])
    np.testing.assert_array_equal(both.read(places[0]), [1, 1, 0, 0, 0])
    assert both.read(places[1]) is None
    assert both.locate("test", ["a"]) == [None]


def test_variants_only_where_they_do_not_count_are_noticed(tmp_path):
    for v, names in ((1, ("train/a",)), (2, ("train/a", "test/b"))):
        for name in names:
            save(tmp_path / f"aug{v}" / f"{name}.npy", np.full(2, v))
    both = Combined([[FolderFeatures(tmp_path / f"aug{v}", how="")] for v in (1, 2)])
    (place,) = both.locate("train", ["a"])
    np.testing.assert_array_equal(both.read(place), [[1, 1], [2, 2]])
    save(tmp_path / "aug1/test/c.npy", np.ones(2))
    both = Combined([[FolderFeatures(tmp_path / f"aug{v}", how="")] for v in (1, 2)])
    places = both.locate("test", ["c", "b", "none"])
    np.testing.assert_array_equal(both.read(places[0]), [[1, 1]])
    with pytest.raises(ConclugenError, match=r"aug1/test/b.npy: this variant is missing, another has 2"):
        both.read(places[1])
    assert both.read(places[2]) is None
    save(tmp_path / "aug2/train/a.npy", np.ones(3))
    with pytest.raises(ConclugenError, match=r"aug2/train/a.npy: 3 values, but .*aug2/test/b.npy has 2; extract both"):
        both.read(place)
    save(tmp_path / "aug2/test/b.npy", np.ones(3))
    both = Combined([[FolderFeatures(tmp_path / f"aug{v}", how="")] for v in (1, 2)])
    with pytest.raises(ConclugenError, match=r"aug2/train/a.npy: this variant has 3 values, another has 2"):
        both.read(place)


def test_the_first_file_by_name_decides_the_size(tmp_path, monkeypatch):
    for name, size in (("b", 3), ("a", 2)):
        save(tmp_path / f"x/{name}.npy", np.ones(size))
    scan = os.scandir
    for backwards in (False, True):
        in_order = functools.partial(sorted, key=lambda entry: entry.name, reverse=backwards)
        monkeypatch.setattr(os, "scandir", lambda path, order=in_order: contextlib.nullcontext(order(scan(path))))
        features = FolderFeatures(tmp_path / "x", how="mean")
        assert features.dim == 2
        with pytest.raises(ConclugenError, match=r"x/b.npy: 3 values, but .*x/a.npy has 2; extract both with the same"):
            features.read(tmp_path / "x/b.npy")


def test_an_id_too_long_for_a_file_is_no_missing_modality(tmp_path):
    save(tmp_path / "x" / "a.npy", np.ones(2))
    (tmp_path / "labels.csv").write_text(f"id,label\na,1\n{'b' * 300},0\n")
    with pytest.raises(ConclugenError, match=r"bbb.npy: cannot be read \(File name too long\)"):
        build(Request("features", tmp_path, name="t"), tmp_path / "data")


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

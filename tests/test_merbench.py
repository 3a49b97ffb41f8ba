"""Folders of MERBench: features by clip, labels in pickled dictionaries that are read without running anything."""

import os

import numpy as np
import pytest

from conclugen_jax.data import formats
from conclugen_jax.data.importers import merbench
from conclugen_jax.data.inspection_view import describe
from conclugen_jax.data.requests import Layout, Request
from conclugen_jax.errors import ConclugenError
from tests.layouts import build, refused, save, target


class Bomb:
    """Does something once it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("bomb",)


def corpus(**clips):
    return {name: {"emo": emo, "val": val} for name, (emo, val) in clips.items()}


MER2023 = {
    "train_corpus": corpus(a=("happy", 1.5), b=("sad", np.float64(-2.0)), c=("happy", 0)),
    "test1_corpus": corpus(d=("sad", -10)),
}


def merbench_folder(folder, labels, name="label-6way.npz"):
    """A source as MERTools prepares it: two features of one vector a clip and one of a vector a frame."""
    for i, clip in enumerate("abcd"):
        save(folder / "features" / "chinese-hubert-large-UTT" / f"{clip}.npy", np.full(3, i, np.float32))
        save(folder / "features" / "clip-vit-FRA" / f"{clip}.npy", np.array([[i, 1], [i, 3]], np.float32))
    np.savez_compressed(folder / name, **labels)
    return folder


def test_a_folder_of_merbench_is_built_as_it_is(tmp_path):
    source = merbench_folder(tmp_path / "mer2023-process", MER2023)
    layout = Layout(targets=("val",))
    dataset, rows = build(Request("features", source, name="t", layout=layout), tmp_path / "data")
    assert dict(dataset.manifest.modalities) == {"chinese_hubert_large_UTT": 3, "clip_vit_FRA": 2}
    assert dataset.manifest.label.names == ("happy", "sad")
    assert "clip_vit_FRA: the modality of 'clip-vit-FRA'; --modality NAME=PATH names it" in describe(dataset.path)
    assert {split: list(some) for split, some in rows.items()} == {"train": ["a", "b", "c"], "test1": ["d"]}
    features, label, _ = rows["train"]["b"]
    assert [x.tolist() for x in features.values()] == [[1, 1, 1], [1, 2]]
    assert label == 1
    assert target(dataset, "train", "val") == [1.5, -2.0, 0.0]
    assert np.isnan(target(dataset, "test1", "val"))  # -10 stands for unknown


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (MER2023, {"label": ("happy", "sad", "happy", "sad"), "split": ("train", "train", "train", "test1")}),
        (
            {"train_corpus": corpus(a=(0, 2.4)), "val_corpus": corpus(b=(0, -1.0)), "test_corpus": corpus(c=(0, 0.0))},
            {"label": ("2.4", "-1.0", "0.0"), "split": ("train", "val", "test")},  # of MOSI and SIMS
        ),
        (
            {"whole_corpus": corpus(a=(3, -10), b=(1, -10))},
            {"label": ("3", "1"), "split": ("train", "train")},
        ),  # IEMOCAP
        ({"train_corpus": {"a": {"emo": "joy"}}}, {"label": ("joy",), "val": ("",)}),  # without valence
        ({"train_corpus": {"a": {"emo": np.str_("joy"), "val": np.nan}}}, {"label": ("joy",), "val": ("",)}),
    ],
    ids=["mer2023", "sentiment", "iemocap", "no valence", "numpy"],
)
def test_labels_of_merbench(tmp_path, labels, expected):
    np.savez_compressed(tmp_path / "label.npz", **labels)
    table = merbench.read_labels(tmp_path / "label.npz")
    assert {name: tuple(table.columns[name]) for name in expected} == expected
    assert merbench.label_files(tmp_path) == [tmp_path / "label.npz"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"train_corpus": {"a": Bomb()}}, r"label.npz: asks for 'posix.mkdir'.*nothing in the file was executed"),
        ({"train_corpus": np.ones(2)}, r"label.npz: train_corpus.npy is no dictionary of clips"),
        ({"train_corpus": ["a"]}, r"label.npz: train_corpus.npy is no dictionary of clips"),
        (
            {"train_corpus": {"a": 3}},
            r"label.npz: train_corpus/a: a int, expected a dictionary|train_corpus/a: 3, expected",
        ),
        ({"train_corpus": {"a": {"emo": [1]}}}, r"train_corpus/a: emo is a list, expected text or a number"),
        ({"train_corpus": {}}, r"label.npz: no clips in arrays called train_corpus"),
        ({"train": np.ones(2)}, r"label.npz: no clips in arrays called train_corpus"),
    ],
)
def test_labels_that_cannot_be_read_are_refused(tmp_path, monkeypatch, labels, message):
    monkeypatch.chdir(tmp_path)
    arrays = {name: np.array(x, object) if isinstance(x, dict | list) else x for name, x in labels.items()}
    np.savez(tmp_path / "label.npz", **arrays)
    with pytest.raises(ConclugenError, match=message) as e:
        merbench.read_labels(tmp_path / "label.npz")
    assert "\n" not in str(e.value)
    assert not (tmp_path / "bomb").exists()


def test_splits_without_public_labels_are_said(tmp_path):
    hidden = corpus(d=("neutral", -10), e=("neutral", -10))
    source = merbench_folder(tmp_path / "t", MER2023 | {"test1_corpus": hidden})
    dataset, _ = build(Request("features", source, name="t"), tmp_path / "data", drop_bad=True)
    said = "all clips of 'test1' are 'neutral' without val, as where labels are not public; do not score it"
    assert f"label-6way.npz: {said}" in describe(dataset.path)


def test_which_labels_of_merbench_count(tmp_path):
    source = merbench_folder(tmp_path / "t", MER2023)
    merbench_folder(source, {"train_corpus": corpus(a=("x", 0), b=("y", 0))}, "label-4way.npz")
    refused("label-4way.npz, label-6way.npz all hold labels; name one with --labels=FILE.npz", source)
    named = Request("features", source, name="t", labels=(source / "label-4way.npz",))
    assert formats.open_source(named).spec.label.names == ("x", "y")
    (source / "labels.csv").write_text("id,label\na,yes\nb,no\n")
    assert formats.open_source(Request("features", source, name="t")).spec.label.names == ("no", "yes")
    refused("numbers of classes may differ from those of the corpus", source, dataset="meld", labels=named.labels)
    features = Request("features", source / "features", name="t", labels=(source / "label-6way.npz",))
    assert formats.open_source(features).spec.label.names == ("happy", "sad")


def test_a_damaged_file_of_labels_is_said_to_be_unused(tmp_path):
    source = merbench_folder(tmp_path / "t", MER2023)
    content = (source / "label-6way.npz").read_bytes()
    (source / "label-6way.npz").write_bytes(content[: len(content) // 2])
    opened = formats.open_source(Request("features", source, name="t"))
    assert (opened.spec.label.kind, opened.facts["passed_over"]) == ("none", ["label-6way.npz"])
    named = Request("features", source, name="t", labels=(source / "label-6way.npz",))
    with pytest.raises(ConclugenError, match=r"label-6way\.npz: .*write it again, or write a labels\.csv"):
        formats.open_source(named)

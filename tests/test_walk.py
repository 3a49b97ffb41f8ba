"""Maps to walk through: what the page holds of them, against NumPy and scikit-learn by hand, and how large it is."""

import base64
import re

import numpy as np
import pytest
from sklearn.preprocessing import StandardScaler

from conclugen_jax.evaluate import mislabelled
from conclugen_jax.study.report import charts, walk
from tests import walks
from tests.reports import unpacked


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("walk")
    dataset = walks.data_set(folder, (40, 12, 12), missing=0.3)
    return dataset, walks.map_of(dataset, folder)


def test_everything_of_an_utterance_is_there(small):
    dataset, found = small
    assert found["shown"] == "64 utterances are shown."
    assert found["ids"][:2] == ["train0", "train1"]
    assert found["ids"][-1] == "test11"
    assert found["words"][:3] == list(walks.WORDS)
    assert base64.b64decode(found["faces"][3]) == walks.picture(3)
    assert set(found["labels"]) <= {"calm", "happy", "sad", "angry"}
    assert list(found["colours"]) == ["class", "person", "split", "modalities"]
    of = {name: np.array(c["names"])[unpacked(c["of"])].tolist() for name, c in found["colours"].items()}
    assert of["class"] == found["labels"]
    assert of["person"] == found["persons"] == [f"speaker{int(re.sub('[a-z]', '', x)) % 5}" for x in found["ids"]]
    assert of["split"] == [re.sub("[0-9]", "", x) for x in found["ids"]]
    assert set(of["modalities"]) == {"video + audio + text", "video + audio"}


def test_neighbours_and_predictions_are_those_by_hand(small, monkeypatch):
    dataset, found = small
    modalities = list(dataset.manifest.modalities)
    rows = walk.draw(dataset, modalities)
    x = np.random.default_rng(1).normal(size=(64, 9)) * 5 + 3
    there = np.arange(64) != 7
    space = walk.Space("x", False, x[:, :2], x, there, np.zeros(0, int))
    label = np.array([dataset.manifest.label.names.index(name) for name in found["labels"]])
    made = walk.data("t", rows, label, (label, dataset.manifest.label.names), [space], small[0].path)["spaces"][0]
    scaled = StandardScaler().fit_transform(x[there])
    unit = scaled / np.linalg.norm(scaled, axis=1, keepdims=True)
    cosine = unit @ unit.T - 9 * np.eye(63)
    expected = np.flatnonzero(there)[np.argsort(-cosine, axis=1)[:, :10]]
    near = unpacked(made["near"]).reshape(64, 10)
    np.testing.assert_array_equal(near[there], expected)
    assert (near[7] == walk.NONE).all()
    folds = mislabelled.folds(label[there], rows.groups[there], np.arange(63))
    chances = mislabelled.out_of_fold(x[there], label[there], folds, 4)
    np.testing.assert_array_equal(unpacked(made["predicted"])[there], chances.argmax(axis=1))
    np.testing.assert_array_equal(unpacked(made["probability"])[there], np.round(100 * chances.max(axis=1)))
    places = unpacked(made["places"]).reshape(64, 2)
    assert (places[7] == walk.SIDE + 1).all()
    assert (places[there].min(), places[there].max()) == (0, walk.SIDE)
    spread = np.ptp(x[there][:, :2], axis=0)
    np.testing.assert_allclose(np.ptp(places[there].astype(int), axis=0), spread * walk.SIDE / spread.max(), atol=2)


def test_large_data_sets_are_sampled_and_the_page_says_so(tmp_path):
    dataset = walks.data_set(tmp_path, (2500, 40, 60), pictures=False)
    rows = walk.draw(dataset, ["video"])
    again = walk.draw(dataset, ["video"])
    assert (len(rows.ids), rows.total) == (2000, 2600)
    np.testing.assert_array_equal(rows.ids, again.ids)
    assert {split: len(at) for split, at in rows.indices.items()}["test"] == pytest.approx(46, abs=15)
    found = walks.map_of(dataset, tmp_path)
    assert found["shown"].startswith("2,000 of 2,600 utterances are shown, drawn at random")


def test_values_beyond_forty_are_one():
    found = walk._colouring([f"p{k:03d}" for k in range(100) for _ in range(k + 1)])
    assert found["names"][0] == "p099"
    assert found["names"][-1] == "61 others"
    assert np.bincount(unpacked(found["of"]))[-1] == sum(range(1, 62))


def test_of_one_class_nothing_is_predicted(small):
    dataset, found = small
    modalities = list(dataset.manifest.modalities)
    rows, label = walk.draw(dataset, modalities), np.zeros(64, int)
    space = walk.Space("x", False, np.eye(64)[:, :2], np.eye(64), np.ones(64, bool), np.zeros(0, int))
    made = walk.data("t", rows, label, (label, dataset.manifest.label.names), [space], dataset.path)
    assert "predicted" not in made["spaces"][0]
    assert set(made["labels"]) == {"calm"}


@pytest.mark.parametrize("kind", ["none", "multi"])
def test_without_classes_there_are_no_predictions(tmp_path, kind):
    dataset = walks.data_set(tmp_path, (30, 6, 6), kind=kind, pictures=False)
    found = walks.map_of(dataset, tmp_path, clusters=False)
    assert "predicted" not in found["spaces"][0]
    assert ("class" in found["colours"]) == (kind == "multi")
    assert found["faces"] == []
    assert found["clips"] == {}


def test_pages_are_small_enough(tmp_path):
    """A page with 2,000 pictures at most 10 MB; one of three data sets with three methods and raw features at most 5."""
    dataset = walks.data_set(tmp_path, (1600, 200, 200))
    found = walks.map_of(dataset, tmp_path)
    size = walks.page_of(tmp_path / "page.html", found).stat().st_size
    assert 2_500_000 < size < 10_000_000
    found = walks.map_of(dataset, tmp_path, methods=3) | {"faces": []}
    plain = walks.page_of(tmp_path / "page.html", *[found] * 3).stat().st_size
    points = np.random.default_rng(0).normal(size=(walk.POINTS, 2))
    svg = charts.scatter("t", points, np.arange(len(points)) % 7, "abcdefg")
    assert svg.count("<use") == len(points)
    assert plain + 12 * len(svg) < 4_000_000

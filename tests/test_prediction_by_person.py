"""Predictions of a run that standardises by person: whose statistics the clips have."""

import types

import numpy as np
import pytest

from conclugen_jax.data import builders, persons, shards
from conclugen_jax.extract import prediction
from conclugen_jax.extract.preparation import Prepared
from tests.test_persons import Talk, by_person, raw

SIZES = {"video": 24, "audio": 16, "text": 12}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = builders.build(Talk(missing=0.3), tmp_path_factory.mktemp("data"))
    stream = shards.ShardStream(shards.open_dataset(folder), "train", list(SIZES))
    return persons.fit(stream, by_person()), raw(shards.ShardStream(shards.open_dataset(folder), "test", list(SIZES)))[
        0
    ]


def found(rows, count):
    """Return what extraction finds of clips: the second lacks words, the last has failed."""
    made = {}
    for i in range(count):
        vectors = {m: rows["features"][m][i : i + 1] for m in SIZES if m != "text" or i != 1}
        made[f"clip{i}"] = Prepared(f"clip{i}"), vectors
    return made | {"broken": (Prepared("broken", failure="no such file"), {})}


def standardised(fitted, person, count=5, *, stored=True):
    network = types.SimpleNamespace(persons=fitted[0], modalities=list(SIZES))
    return prediction._by_person(found(fitted[1], count), network, person, SIZES, stored=stored)


def applied(fitted, groups, data, count=5):
    features = {m: x[:count].copy() for m, x in fitted[1]["features"].items()}
    present = {m: np.ones(count, bool) for m in SIZES}
    present["text"][1] = False
    return fitted[0].applied(features, present, groups, data=data)


@pytest.mark.parametrize(
    ("person", "stored", "data"),
    [("speaker1", True, "faces"), ("speaker1", False, ""), ("somebody", True, ""), ("", True, "")],
)
def test_clips_have_the_statistics_of_their_person(fitted, person, stored, data):
    made, expected = standardised(fitted, person, stored=stored), applied(fitted, [person] * 5, data)
    for i in range(5):
        each, rows = made[f"clip{i}"]
        assert rows.keys() == {m for m in SIZES if m != "text" or i != 1}
        for m, x in rows.items():
            np.testing.assert_array_equal(x[0], expected[m][i])
        said = "unknown person: standardised with the statistics of the split; name the person with --person"
        assert (said in each.notes) is (person == "")
    assert made["broken"][0].failure == "no such file"


def test_the_ways_differ(fitted):
    videos = [
        standardised(fitted, person, stored=stored)["clip0"][1]["video"]
        for person, stored in (("speaker1", True), ("speaker1", False), ("", True))
    ]
    assert len({x.tobytes() for x in videos}) == 3


def test_nothing_found_is_left_alone(fitted):
    assert standardised(fitted, "anna", 0).keys() == {"broken"}

"""What is odd in a data set, by its features and by runs: planted oddities are found, and what cannot be said is said."""

import csv
import dataclasses
import json

import jax
import numpy as np
import pytest

from conclugen_jax import pretrain
from conclugen_jax.data import builders, shards
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import bank, mislabelled, odd_rows, odd_tables, oddities, weights
from conclugen_jax.runs import workdir as workdir_lib
from tests.helpers import Faces, run, tiny_config


class Strange(Faces):
    """Faces of five speakers: a copy of train3 and a near one of train4 in the test split, train7 with a wrong label."""

    def examples(self, split):
        first = [e for _, e in zip(range(8), super().examples("train"), strict=False)]
        for e in super().examples(split):
            if e.id == "test0":
                e = dataclasses.replace(first[3], id=e.id, group="")
            if e.id == "test1":
                close = {m: x + np.float32(1e-3) for m, x in first[4].features.items()}
                e = dataclasses.replace(first[4], id=e.id, features=close, label=(first[4].label + 1) % 4)
            if e.id == "train7":
                e = dataclasses.replace(e, label=(e.label + 2) % 4)
            yield e


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("oddities")


@pytest.fixture(scope="module")
def data(folder):
    return builders.build(Strange((64, 24, 24), missing=0.3), folder / "data")


@pytest.fixture(scope="module")
def trained(folder, data):
    more = {"evaluation__smoothing_neighbours": 3, "data__modalities": ("video", "audio")}
    for name, person in (("one", "person"), ("two", "split")):
        config = tiny_config(data, train__num_epochs=1, clustering__start_epoch=0, data__standardize=person, **more)
        pretrain.pretrain(config, folder / name, devices=jax.devices()[:1])
    return folder / "one"


def test_pairs_that_are_counted_are_those_listed():
    pair = {"id": "a", "split": "train", "label": "calm", "cosine": 0.99, "exact": False}
    pair |= {f"other_{key}": value for key, value in pair.items()} | {"other_split": "test"}
    for near, said in (
        (1, "1. In two splits: 1; with"),
        (2000, "2,000. Of the 1 pairs that are listed in two splits: 1;"),
    ):
        found = odd_tables._duplicates({"threshold": 0.98, "exact": 0, "near": near, "pairs": [pair]}, 3)
        assert said in found.said


def test_what_is_planted_is_found(data):
    found = oddities.find(data)
    assert {line["id"] for line in found.table[:2]} == {"train7", "test1"}
    (swapped,) = (one for one in found.labels["likely"] if one["id"] == "train7")
    names = ["calm", "happy", "sad", "angry"]
    assert names.index(swapped["suggested"]) == (names.index(swapped["label"]) + 2) % 4
    assert found.labels["rows"] == found.data["rows"] == 112
    pairs = found.duplicates["pairs"]
    assert (found.duplicates["exact"], found.duplicates["near"]) == (1, 1)
    assert [(one["id"], one["other_id"], one["exact"]) for one in pairs] == [
        ("train3", "test0", True),
        ("train4", "test1", False),
    ]
    assert pairs[1]["label"] != pairs[1]["other_label"]
    assert 0.98 < pairs[1]["cosine"] < 1
    assert [one["name"] for one in found.persons["all"]] != []
    assert not any(one["is_cluster"] for one in found.persons["all"])
    assert [one["modality"] for one in found.modalities] == ["video", "audio", "text"]
    assert found.wrong is None
    assert any("name a pretraining run by --workdir" in note for note in found.notes)


def test_rows_are_those_of_all_splits_or_a_sample(data):
    dataset = shards.open_dataset(data)
    rows = odd_rows.read(dataset, ["video", "text"], [], 1000)
    assert rows.ids.tolist() == [
        f"{s}{i}" for s, n in (("train", 64), ("validation", 24), ("test", 24)) for i in range(n)
    ]
    stream = shards.ShardStream(dataset, "test", ["video", "text"])
    own = stream.rows(np.arange(24))
    np.testing.assert_array_equal(rows.features["text"][88:], own["features"]["text"])
    np.testing.assert_array_equal(rows.present["text"][88:], own["present"]["text"])
    np.testing.assert_array_equal(rows.label[88:], own["label"])
    some = odd_rows.read(dataset, ["video", "text"], ["validation", "test"], 20)
    at = [rows.ids.tolist().index(name) for name in some.ids]
    assert (len(at), some.total, at) == (20, 48, sorted(at))
    assert set(some.splits) == {"validation", "test"}
    np.testing.assert_array_equal(some.features["video"], rows.features["video"][at])
    assert "20 of 112 rows are looked at, drawn at random" in oddities.find(data, most_rows=20).notes


def test_vectors_of_a_run_are_those_of_its_probes(trained, folder):
    found = oddities.find(workdirs=[trained, folder / "two"])
    assert list(found.wrong["accuracy"]) == ["one", "two", "raw features", "untrained network"]
    config = workdir_lib.read_config(trained)
    rows = odd_rows.read(shards.open_dataset(config.data.path), ["video", "audio"], [], 1000)
    of = {
        "features": rows.features,
        "present": rows.present,
        "label": rows.label,
        "group": rows.groups,
        "data": "faces",
    }
    split = weights.represent_rows(trained, of, rows.names)
    folds = mislabelled.folds(rows.label, rows.groups, np.arange(112))
    right = {}
    for name, raw in (("one", False), ("raw features", True)):
        vectors = split.fused(raw=raw)
        vectors = bank.create(vectors, config.evaluation).smoothed(vectors, np.arange(112))
        right[name] = mislabelled.out_of_fold(vectors, rows.label, folds, 4).argmax(axis=1) == rows.label
        assert found.wrong["accuracy"][name] == pytest.approx(right[name].mean())
    wrong = {one["id"] for one in found.wrong["all"]}
    assert wrong <= set(rows.ids[~right["one"] & ~right["raw features"]])
    for one in found.wrong["all"]:
        assert one["label"] not in one["guesses"].values()
    assert "train7" in wrong
    assert found.vectors.startswith(f"representation of {trained}, each averaged with its 3 nearest")


@pytest.mark.parametrize("kind", ["none", "multi"])
def test_without_one_class_a_row_the_rest_is_found(tmp_path, kind):
    found = oddities.find(builders.build(Faces((30, 8, 8), kind=kind), tmp_path))
    assert found.labels is found.modalities is found.wrong is None
    assert found.duplicates["pairs"] == []
    assert found.persons["neighbours"]["same_class"] is None
    said = {"none": "the data set has no labels: likely", "multi": "the data set has labels of kind 'multi': likely"}
    assert found.notes[0].startswith(said[kind])
    assert found.notes[0].endswith("need one class for each row")
    json.dumps(found.as_json(), allow_nan=False)
    assert len(found.as_csv().splitlines()) == 47


class Few(Faces):
    """Rows of the given classes, of nobody."""

    def __init__(self, *classes):
        super().__init__((len(classes), 0, 0))
        self.spec = dataclasses.replace(self.spec, splits=("train",))
        self.classes = classes

    def examples(self, split):
        for e, label in zip(super().examples(split), self.classes, strict=True):
            yield dataclasses.replace(e, label=label, group="")


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        ((2,) * 6, "are not looked for: 6 rows of 1 class; cross-validation needs two classes"),
        ((0, 1), "are not looked for: 2 rows of 2 classes"),
        ((0,), "are not looked for: 1 rows of 1 class"),
        ((0, 0, 0, 0, 0, 1), "2 of 6 rows are not judged: the rows of other folds lack their class"),
        ((0, 1) * 5, "a probe is right on 10.0% of 10 rows, the largest class alone would be on 50.0%"),
    ],
)
def test_tiny_data_end_in_a_sentence(tmp_path, classes, said):
    found = oddities.find(builders.build(Few(*classes), tmp_path))
    assert any(said in note for note in found.notes), found.notes
    assert found.persons is None
    assert [one.title for one in odd_tables.shown(found, 5)] == ["Near duplicates"]


def test_the_command(trained, data, tmp_path):
    shown = run("oddities", f"--data={data}", f"--output={tmp_path}/all.csv", "--top=2")
    said = " ".join(shown.stdout.split())
    for text in (
        "Likely wrong labels: A cross-validated probe of raw features",
        "train3",
        "Persons as clusters",
        "adds",
    ):
        assert text in said
    assert "note: clips that every method gets wrong need several methods" in shown.stderr
    with (tmp_path / "all.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["rank"] for line in lines] == [str(i) for i in range(1, 113)]
    assert {lines[0]["id"], lines[1]["id"]} == {"train7", "test1"}
    assert [float(line["probability"]) for line in lines] == sorted(float(line["probability"]) for line in lines)
    copied = {line["id"]: line for line in lines if line["exact"]}
    assert copied["train3"]["copy_of"] == "test0"
    assert (copied["test0"]["copy_of"], copied["test0"]["copy_split"], copied["test0"]["exact"]) == (
        "train3",
        "train",
        "1",
    )
    assert copied["test1"]["exact"] == "0"
    found = json.loads(run("oddities", f"--workdir={trained}", "--json", "--splits=train", "--similar=0.9999").stdout)
    assert (found["data"]["splits"], found["data"]["rows"]) == (["train"], 64)
    assert found["duplicates"]["threshold"] == 0.9999
    assert "table" not in found
    assert list(found["wrong"]["accuracy"]) == ["pretrained", "raw features", "untrained network"]
    assert (trained / "oddities.csv").read_text().count("\n") == 65


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--data is missing, and so is --workdir; name a data set or a pretraining run, see --help"),
        (["--data=DATA", "--output=x.xlsx"], "--output=x.xlsx: expected a name that ends with .csv"),
        (["--data=DATA", "--splits=dev"], "no split 'dev'"),
        (["--data=DATA", "--output=/nowhere/x.csv"], "/nowhere/x.csv: cannot be written"),
        (["--workdir=/nowhere"], "/nowhere/config.json"),
        (["--data=DATA", "--similar=2"], "--similar"),
    ],
)
def test_mistakes_end_in_a_sentence(data, arguments, said):
    assert said in run("oddities", *(x.replace("DATA", str(data)) for x in arguments), code=2).stderr


def test_neither_data_nor_run_is_refused():
    with pytest.raises(ConclugenError, match="give --data or --workdir"):
        oddities.find()


def test_data_of_another_extractor_are_refused(trained, tmp_path):
    wide = Faces((20, 4, 4))
    wide.spec = dataclasses.replace(wide.spec, modalities={"video": 40, "text": 12})
    wide.examples = lambda split: (
        dataclasses.replace(e, features={"video": np.tile(e.features["video"], 2)[:40], "text": e.features["text"]})
        for e in Faces.examples(Faces((20, 4, 4)), split)
    )
    other = builders.build(wide, tmp_path)
    with pytest.raises(ConclugenError, match=r"no modality 'audio'|has 40 features of modality 'video'"):
        oddities.find(other, [trained])

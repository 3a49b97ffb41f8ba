"""Which rows a downstream run trains on and scores: few labels, folds by person, and what is said of them."""

import json

import jax
import numpy as np
import pytest

from conclugen_jax.data import builders, shards
from conclugen_jax.data.sources import LabelSpec
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import downstream, splits, task as task_lib
from conclugen_jax.runs import checkpoint
from tests.helpers import Faces, flat, tiny_config

ONE = jax.devices()[:1]
SINGLE = LabelSpec("single", ("calm", "happy", "sad", "angry"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return builders.build(Faces((64, 24, 23), missing=0.3), tmp_path_factory.mktemp("data"))


def settings(data, **changes):
    return tiny_config(
        data,
        **{"downstream__protocol": "raw_features", "data__standardize": "split", "train__num_epochs": 4, **changes},
    )


def rows_of(config, data, tier="auto"):
    config.data.tier = tier
    return splits.load(config, splits.open_streams(config, shards.open_dataset(data), ["video", "text"]))[0]


def test_few_labels_are_as_many_of_each_class_by_the_draw_alone(data, tmp_path):
    drawn = []
    for draw in (0, 0, 1):
        rows = rows_of(settings(data, downstream__labels_per_class=3, downstream__label_draw=draw), data)
        train = rows["train"]
        labels = task_lib.labels_of(train)[train.usable]
        np.testing.assert_array_equal(np.bincount(labels), [3, 3, 3, 3])
        assert rows["test"].num_examples == 23
        drawn.append(train.usable.tolist())
    assert drawn[0] == drawn[1] != drawn[2]
    config = settings(data, downstream__labels_per_class=3, optimizer__learning_rate=1e-2)
    result = downstream.downstream(config, tmp_path, devices=jax.devices()[:2])
    assert result["num_train_examples"] == 12  # the batch of 16 is lowered to what there is
    assert np.sum(result["test"]["confusion_matrix"]) == 23


@pytest.mark.parametrize("tier", ["device", "shards"])
def test_folds_put_every_person_into_the_test_once(data, tier):
    stream = shards.ShardStream(shards.open_dataset(data), "train", ["video"])
    _, groups = stream.names(np.arange(64))
    tested = []
    for fold in range(4):
        rows = rows_of(settings(data, downstream__num_folds=4, downstream__fold=fold), data, tier)
        train = set(groups[rows["train"].usable])
        held_out = {name: rows[name].members for name in ("validation", "test")}
        assert not train & set(groups[held_out["test"]]) | set(groups[held_out["validation"]]) & train
        tested += held_out["test"].tolist()
        np.testing.assert_array_equal(rows["test"].usable, np.arange(len(held_out["test"])))  # all have a modality
        expected = stream.rows(held_out["test"])
        found = rows["test"].rows(np.arange(len(held_out["test"])))
        np.testing.assert_array_equal(found["features"]["video"], expected["features"]["video"])
        np.testing.assert_array_equal(found["label"], expected["label"])
    assert sorted(tested) == list(range(64))


def test_a_class_with_fewer_labels_gives_all_and_is_named(data, tmp_path, capsys):
    labels = rows_of(settings(data), data)["train"]
    counts = np.bincount(task_lib.labels_of(labels)[labels.usable])
    asked = int(counts.max())
    result = downstream.downstream(settings(data, downstream__labels_per_class=asked), tmp_path, devices=ONE)
    assert result["num_train_examples"] == counts.sum()
    few = ", ".join(f"{n!r} {c}" for n, c in zip(SINGLE.names, counts, strict=True) if c < asked)
    (line,) = result["warnings"]
    fact = f"warning: fewer labelled training examples than the {asked} per class asked for: {few}"
    assert line == f"{fact}; all of these are used"
    assert capsys.readouterr().err.count(line) == 1


def test_classes_that_are_never_predicted_are_named(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(task_lib.Task, "predictions", lambda _, logits: logits.argmax(axis=1) % 2)
    config = settings(data, train__num_epochs=1)
    line = (
        "warning: never predicted on the test split: 'sad', 'angry'; weighted means hide the F1 of 0 of such a class\n"
    )
    for _ in range(2):  # the second time it is finished already
        result = downstream.downstream(config, tmp_path, devices=ONE)
        assert capsys.readouterr().err.count(line) == 1
    assert [c["f1"] for c in result["test"]["per_class"].values()][2:] == [0, 0]


def test_all_folds_are_run_and_averaged(data, tmp_path):
    config = settings(data, downstream__num_folds=3, train__batch_size=8)
    result = downstream.downstream(config, tmp_path, devices=ONE)
    each = [json.loads((tmp_path / f"fold_{i}" / "result.json").read_text()) for i in range(3)]
    assert sum(np.sum(r["test"]["confusion_matrix"]) for r in each) == 64
    for score in ("accuracy", "f1", "loss"):
        values = [r["test"][score] for r in each]
        assert result["test_folds"][score] == values
        assert result["test"][score] == pytest.approx(np.mean(values))
    np.testing.assert_array_equal(
        result["test"]["confusion_matrix"], sum(np.array(r["test"]["confusion_matrix"]) for r in each)
    )
    assert json.loads((tmp_path / "result.json").read_text()) == result


def test_a_class_that_no_training_example_has_is_named(capsys, tmp_path):
    class Faceless(Faces):
        def examples(self, split):
            for e in super().examples(split):
                if split != "train" or e.label != 2:
                    yield e

    data = builders.build(Faceless(), tmp_path / "data")
    result = downstream.downstream(settings(data, train__num_epochs=1), tmp_path / "run", devices=ONE)
    line = "warning: no training example is 'sad'; the classifier cannot learn to predict it"
    assert capsys.readouterr().err.count(line) == 1
    assert result["warnings"] == [line]
    (warning,) = task_lib.warnings(LabelSpec("multi", ("a", "b")), np.array([[1.0, 0.0], [0.0, 0.0]]))
    assert "no training example is 'b'" in warning
    assert task_lib.warnings(LabelSpec("value"), np.zeros(3)) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"downstream__num_folds": 2}, "must be at least 3 folds"),
        ({"downstream__num_folds": 3, "downstream__fold": 3}, "num_folds is 3, config.downstream.fold is 3"),
        ({"downstream__fold": 1}, "num_folds is 0, config.downstream.fold is 1"),
        (
            {"downstream__num_folds": 9, "downstream__fold": 0},
            r"of 9 over 5 groups \(people\); .* as groups, such as --config.downstream.num_folds=5,",
        ),
        ({"downstream__fusion": "mean"}, "raw features of different modalities have different sizes"),
    ],
)
def test_impossible_choices_are_refused(data, tmp_path, changes, message):
    with pytest.raises(ConclugenError, match=message):
        downstream.downstream(settings(data, **changes), tmp_path, devices=ONE)


def test_few_of_several_labels_are_refused():
    with pytest.raises(ConclugenError, match="only with one class per example"):
        splits.few(LabelSpec("multi", ("a", "b")), np.zeros((4, 2)), np.arange(4), 1, 0)
    np.testing.assert_array_equal(splits.few(SINGLE, np.zeros(4, int), np.arange(2), 0, 0), [0, 1])


def test_an_untrained_network_is_a_random_one_that_stays_so(data, tmp_path):
    results = {}
    for protocol in ("untrained", "supervised"):
        config = settings(data, downstream__protocol=protocol)
        results[protocol] = downstream.downstream(config, tmp_path / protocol, devices=ONE)
    untrained, supervised = results.values()
    assert untrained["encoder"]["sha256"] == supervised["encoder"]["sha256"]  # as random
    kept = {}
    for name in results:
        with checkpoint.Checkpoints(tmp_path / name, read_only=True) as saved:
            kept[name] = flat(saved.restore_tree(saved.steps()[-1])[0]["params"])
    classifiers = [{k for k in found if "classifier" in k} for found in kept.values()]
    assert set(kept["untrained"]) == classifiers[0] == classifiers[1] < set(kept["supervised"])

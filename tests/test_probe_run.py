"""The protocol 'probe' of studies: scikit-learn by one rule for methods and baselines, and what beats what."""

import json
import re

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from sklearn.linear_model import LogisticRegression

from conclugen_jax.commands import scores
from conclugen_jax.data import batches, builders, shards
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import baselines, probe, probe_run, weights
from conclugen_jax.method import model as model_lib
from conclugen_jax.runs import configuration_files
from conclugen_jax.study import definition as study_runs, results, study as study_lib
from conclugen_jax.study.report import reading, tables
from tests.helpers import Faces, tiny_config
from tests.studies import definition

SMOOTHED = {"evaluation__smoothing_neighbours": 3, "evaluation__c_times_dim": 30.0, "data__standardize": "split"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(builders.build(Faces((64, 8, 40), missing=0.2), tmp_path_factory.mktemp("data")))


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: one)


def settings(path, protocol, **changes):
    config = tiny_config(path, downstream__protocol=protocol, **(SMOOTHED | changes))
    config.sweep.labels_per_class, config.sweep.label_draws = (3, 0), (4, 5)
    return config


def standard(train, test):
    mean, scale = train.mean(axis=0), train.std(axis=0)
    scale = np.where(scale > 1e-6, scale, 1)
    return (train - mean) / scale, (test - mean) / scale


def raw_vectors(path):
    """Standardised features side by side in the order of their names, zeros where absent, and labels: train, test."""
    opened = shards.open_dataset(path)
    for name in ("train", "test"):
        table = batches.load(shards.ShardStream(opened, name, list(opened.manifest.modalities)), tier="host").table
        parts = []
        for m in sorted(table["features"]):
            mean, scale = opened.manifest.standardization(m)
            parts.append(np.where(table["present"][m][:, None], (table["features"][m] - mean) / scale, 0))
        yield np.concatenate(parts, axis=1), table["label"]


def smoothed(queries, bank, own):
    """Average each vector with its three nearest others by cosine, one at a time."""
    found = []
    for i, q in enumerate(queries):
        cosines = bank @ q / np.linalg.norm(bank, axis=1) / np.linalg.norm(q)
        if own:
            cosines[i] = -2
        found.append(0.5 * q + 0.5 * bank[np.argsort(-cosines)[:3]].mean(axis=0))
    return np.array(found)


@pytest.mark.parametrize("neighbours", [0, 3])
def test_scores_are_those_of_scikit_learn(data, tmp_path, neighbours):
    config = settings(data, "raw_features", evaluation__smoothing_neighbours=neighbours)
    found = probe_run.run(config, tmp_path)
    (train, labels), (test, truth) = raw_vectors(data)
    train, test = standard(train, test)
    if neighbours:
        train, test = smoothed(train, train, own=True), smoothed(test, train, own=False)
    train, test = standard(train, test)
    places = [(one["labels_per_class"], one["label_draw"]) for one in found["selected"]]
    assert places == [(3, 4), (3, 5), (0, 4)]  # all labels are fitted once
    for one in found["selected"]:
        rows = probe.draw_labels(labels, one["labels_per_class"], seed=one["label_draw"])
        expected = LogisticRegression(C=30 / 52, max_iter=2000).fit(train[rows], labels[rows]).predict(test)
        matrix = np.zeros((4, 4), int)
        np.add.at(matrix, (truth, expected), 1)
        assert np.abs(np.array(one["test"]["confusion_matrix"]) - matrix).sum() <= 2  # rounding may move one example
        assert one["num_train_examples"] == len(rows)
    assert probe_run.run(config, tmp_path) == found  # read again


def test_few_rows_are_classified_as_by_all_their_features():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 200)), np.arange(30) % 3
    x[:, :5] += 2 * y[:, None]
    test = rng.normal(size=(300, 200)) + np.repeat([0, 2, 4], 100)[:, None] * (np.arange(200) < 5)
    for strength in (0.0, 30.0):
        c = strength / 200 if strength else 1.0
        expected = LogisticRegression(C=c, max_iter=5000, tol=1e-8).fit(x, y).predict(test)
        assert (probe.classify(x, y, test, c_times_dim=strength) == expected).mean() > 0.99


def test_self_training_adds_the_surest_rows_of_each_predicted_class():
    rng = np.random.default_rng(1)
    centres = np.array([[3.0, 0], [0, 3.0], [-3.0, -3.0]])
    y = np.arange(90) % 3
    x = centres[y] + rng.normal(size=(90, 2)) * 1.5
    rows, others, test, truth = x[:6], x[6:60], x[60:], y[60:]
    plain = probe.self_trained(rows, y[:6], others, test, shares=())
    assert (plain == probe.classify(rows, y[:6], test)).all()
    model = LogisticRegression(max_iter=2000).fit(rows, y[:6])
    for share in (0.3, 0.9):
        sure, guess = model.predict_proba(others).max(axis=1), model.predict(others)
        kept = [
            i
            for c in range(3)
            for i in sorted(np.flatnonzero(guess == c), key=lambda i: -sure[i])[: round(share * (guess == c).sum())]
        ]
        model = LogisticRegression(max_iter=2000).fit(np.concatenate([rows, others[kept]]), [*y[:6], *guess[kept]])
    found = probe.self_trained(rows, y[:6], others, test, shares=(0.3, 0.9))
    assert (found == model.predict(test)).all()
    assert (found == truth).mean() >= (plain == truth).mean()
    assert (probe.self_trained(rows, y[:6], others[:0], test, shares=(0.3,)) == plain).all()


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    study = definition(data, ("probe",))
    study.datasets.faces.protocols.probe.update_from_flattened_dict(
        {key.replace("__", "."): value for key, value in SMOOTHED.items()}
    )
    study.methods.vision.evaluation = ConfigDict({"vectors": "with_raw", "smoothing_neighbours": 2})
    one = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: one)
        patch.setattr(study_lib, "work", lambda root, waiting, *_: [study_lib.work_through(root, c) for c in waiting])
        folder = tmp_path_factory.mktemp("study")
        return study_lib.run(study, folder), folder


def test_a_study_probes_methods_and_every_baseline_on_the_same_draws(whole):
    found, folder = whole
    assert {cell["status"] for cell in found["cells"]} == {"done"}
    assert {cell["method"] for cell in found["cells"]} == {"conclugen", "vision", *baselines.BASELINES}
    assert len({json.dumps(sorted(cell["draw_scores"])) for cell in found["cells"] if cell["seed"] == 0}) == 2

    def read(method):
        return json.loads((folder / f"probe/faces/{method}/seed_1/result.json").read_text())

    assert (read("vision")["evaluation"]["vectors"], read("vision")["evaluation"]["smoothing_neighbours"]) == (
        "with_raw",
        2,
    )
    assert read("conclugen")["evaluation"]["smoothing_neighbours"] == 0  # as its own run says
    assert (
        read("raw")["evaluation"]["smoothing_neighbours"],
        read("untrained")["evaluation"]["smoothing_neighbours"],
    ) == (0, 3)
    assert read("untrained")["encoder"]["workdir"] is None
    assert read("principal_components") != read("raw_smoothed") != read("canonical_correlations")


def test_the_best_baseline_is_compared_with_by_number_of_labels(whole):
    found, _ = whole
    by_hand = {
        name: np.mean(
            [c["scores"]["accuracy"] for c in study_lib.chosen(found["cells"], method=name, labels_per_class=3)]
        )
        for name in baselines.BASELINES
    }
    (row,) = study_lib.chosen(found["comparisons"], method="conclugen", baseline=results.BEST, labels_per_class=3)
    assert by_hand[row["best"]] == max(by_hand.values())
    own = study_lib.chosen(found["cells"], method="conclugen", labels_per_class=3)
    expected = np.mean([cell["scores"]["accuracy"] for cell in own]) - by_hand[row["best"]]
    assert row["difference"] == pytest.approx(expected)
    assert not [c for c in found["comparisons"] if c["method"] in baselines.BASELINES]


def test_a_row_says_what_it_does_not_beat():
    def compared(labels, difference, interval, best="untrained", baseline=results.BEST):
        place = {"dataset": "d", "method": "m", "labels_per_class": labels, "baseline": baseline, "best": best}
        return place | {"difference": difference, "interval": interval}

    rows = [
        compared(2, 0.1, [0.05, 0.15]),
        compared(5, 0.1, [-0.01, 0.21]),
        compared(20, -0.1, None, best="raw"),
        compared(0, 0.1, None),
        compared(5, -0.5, [-0.6, -0.4], baseline="conclugen"),
    ]
    titles = {"untrained": "untrained network", "raw": "raw features"}
    said = "does not beat untrained network (5 labels), raw features (20 labels)"
    assert results.not_ahead(rows, "d", "m", titles) == said
    assert results.not_ahead(rows, "d", "other", titles) == ""


def test_the_report_says_it_in_the_row(whole, capsys):
    found, folder = whole
    study = reading.read(folder)
    remarks = {method: study.not_ahead("faces", method) for method in ("conclugen", "vision", "raw")}
    table = tables.label_efficiency(study, "faces")
    rows = {row[0][0]: row[0][1:] for row in table.rows}
    assert rows["ConCluGen, probe"] == ((remarks["conclugen"],) if remarks["conclugen"] else ())
    assert rows["raw features, not smoothed, probe"] == ()
    assert any(remarks.values())  # two seeds: no interval of a difference this small excludes zero
    scores.show(found)
    shown = " ".join(capsys.readouterr().out.split())
    assert "does not beat" in shown


@pytest.mark.parametrize("kind", ["multi"])
def test_labels_of_another_kind_are_refused(tmp_path, kind):
    path = str(builders.build(Faces((40, 8, 16), kind=kind), tmp_path / "data"))
    with pytest.raises(
        ConclugenError, match="kind 'multi'; the protocol 'probe' needs one class per example, use linear"
    ):
        probe_run.run(settings(path, "raw_features"), tmp_path / "run")


def test_training_labels_of_one_class_are_refused(tmp_path):
    class Sad(Faces):
        def examples(self, split):
            return (e for e in super().examples(split) if e.label == 2)

    path = str(builders.build(Sad((40, 8, 16)), tmp_path / "data"))
    with pytest.raises(ConclugenError, match="all labelled examples are 'sad'; a classifier needs"):
        probe_run.run(settings(path, "raw_features"), tmp_path / "run")


def test_projections_of_a_run_without_are_refused(data, tmp_path, monkeypatch):
    without = {f"loss__{name}_weight": 0.0 for name in model_lib.PROJECTING}
    trained = tiny_config(data, loss__reconstruction_weight=1.0, **without)
    model = model_lib.from_config(trained, shards.open_dataset(data).manifest.modalities)
    monkeypatch.setattr(weights, "find_step", lambda *_: 4)
    monkeypatch.setattr(weights, "load", lambda *_: (model, {"params": {}}, trained))
    own = {"downstream__checkpoint": "runs/x", "downstream__evaluation": "own", "evaluation__vectors": "projection"}
    with pytest.raises(ConclugenError, match="'projection', but checkpoint runs/x has none; choose other vectors"):
        probe_run.run(settings(data, "linear_evaluation", **own), tmp_path / "run")


@pytest.mark.parametrize("which", ["nonsense", "digits_nonsense"])
def test_studies_of_the_recipe_are_named(which):
    with pytest.raises(ConclugenError, match=rf"study_recipe:{which}: there is no '{which}'; name one of digits, "):
        configuration_files.load(f"study_recipe:{which}", of_run=False)


def test_seeds_of_one_baseline_are_one_task(data):
    cohorts = study_runs.cohorts(study_runs.chains(definition(data, ("probe", "raw_features"))))
    # Nothing is smoothed here, so that raw features are there once.
    named = [(cohort[0][0].method, cohort[0][0].protocol, len(cohort)) for cohort in cohorts]
    assert [(name, "probe", 2) for name in baselines.BASELINES if name != "raw_smoothed"] == [
        one for one in named if one[1] == "probe"
    ]
    assert named.count(("raw_features", "raw_features", 1)) == 2  # tasks of their own
    assert named.count(("conclugen", "pretraining", 1)) == 2  # they save more than their last checkpoint


def test_closed_forms_and_self_training_are_of_training_rows(data, tmp_path):
    config = settings(data, "raw_features", evaluation__smoothing_neighbours=0, data__standardize="none")
    config.evaluation.self_training = (0.5,)
    found = probe_run.run(config, tmp_path, form="principal_components")
    opened, tables_of = shards.open_dataset(data), []
    for name in ("train", "test"):
        stream = shards.ShardStream(opened, name, list(opened.manifest.modalities))
        tables_of.append(batches.load(stream, tier="host").table)
    form = baselines.principal(tables_of[0]["features"], tables_of[0]["present"])
    train, test = standard(*(form.of(table["features"], table["present"]) for table in tables_of))
    labels, truth = (table["label"] for table in tables_of)
    for one in found["selected"]:
        rows = probe.draw_labels(labels, one["labels_per_class"], seed=one["label_draw"])
        others = np.delete(train, rows, axis=0)
        guess = probe.self_trained(train[rows], labels[rows], others, test, shares=(0.5,), c_times_dim=30.0)
        assert one["test"]["accuracy"] == pytest.approx((guess == truth).mean(), abs=0.026)  # one example of 40


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_folds": 3}, "num_folds is 3; expected 3 or more and {fold} and {shuffle} in all paths, or neither"),
        ({"pretraining_path": "x_{fold}"}, "num_folds is 0; expected 3 or more"),
    ],
)
def test_folds_and_paths_of_a_study_belong_together(data, changes, said):
    study = definition(data, ("probe",))
    for key, value in changes.items():
        study[key] = value
    with pytest.raises(ConclugenError, match=re.escape(said)):
        study_runs.check(study)


def test_one_rule_holds_for_all(data, tmp_path):
    study = definition(data, ("probe",))
    study.methods.vision.evaluation = ConfigDict({"c_times_dim": 1.0})
    with pytest.raises(ConclugenError, match=r"vision\.evaluation\.c_times_dim: all vectors are probed by one rule"):
        study_runs.check(study)
    config = settings(data, "raw_features", downstream__num_folds=3)
    with pytest.raises(
        ConclugenError, match="num_folds is 3: the protocol 'probe' takes data sets that are folds; build"
    ):
        probe_run.run(config, tmp_path)

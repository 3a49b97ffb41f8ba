"""Definitions that are impossible, damaged results, and the statistics of a study."""

import functools
import json

import numpy as np
import pytest
from ml_collections import ConfigDict
from scipy import stats

from conclugen_jax.commands import scores
from conclugen_jax.errors import ConclugenError
from conclugen_jax.study import definition as study_runs, results as study_results, study as study_lib
from conclugen_jax.system import engines
from tests.studies import definition, small


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("result.json", "{}", "damaged (KeyError); delete it"),
        ("result.json", "[]", "damaged"),
        ("result.json", '{"kind": "single", "selected": []}', "damaged (KeyError)"),
        ("result.json", "{", "damaged (JSONDecodeError)"),
        ("failed.json", "[]", "cannot be read (TypeError)"),
        ("failed.json", '{"error": ["x"]}', "['x']"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, text, message):
    study = small("nowhere")
    runs = [run for chain in study_runs.chains(study) for run in chain]
    folder = tmp_path / "raw_features/faces/raw_features/seed_1"
    folder.mkdir(parents=True)
    (folder / name).write_text(text)
    results = study_results.collect(study, runs, tmp_path)
    (cell,) = study_lib.chosen(results["cells"], method="raw_features")
    assert cell["status"] == "failed"
    assert message in cell["error"]
    assert {c["status"] for c in study_lib.chosen(results["cells"], method="vision")} == {"missing"}


def test_a_cell_without_one_of_its_draws_is_missing_and_has_no_confusion_matrix(tmp_path):
    (*_, (first, second)) = study_runs.chains(definition("nowhere", ("supervised",), seeds=(0,), training_draws=2))
    scores = dict.fromkeys(study_results.MEASURES, 0.5) | {"confusion_matrix": [[3, 1], [0, 2]]}
    result = json.dumps({"kind": "single", "classes": ["a", "b"], "test": scores, "validation": scores})

    def cell_of(run):
        (tmp_path / run.path).mkdir(parents=True)
        (tmp_path / run.path / "result.json").write_text(result)
        (cell,) = study_results.collect(definition("nowhere", ("supervised",)), [first, second], tmp_path)["cells"]
        return [cell[key] for key in ("status", "confusion_matrix", "scores", "draws")]

    assert cell_of(second) == ["missing", None, {}, 1]
    assert cell_of(first) == ["done", [[6, 2], [0, 4]], dict.fromkeys(study_results.MEASURES, 0.5), 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"order": ("conclugen",)}, "must name every method once"),
        ({"reference": "best"}, "config.reference is 'best'"),
        ({"training_draws": 3}, "at most label_draws"),
        ({"colour": 1}, "config.colour: unknown"),
        ({"seeds": ()}, r"config.seeds is \(\); name one or more"),
        ({"seeds": (1, 1)}, "each once"),
        ({"seeds": (-1,)}, r"config.seeds is \(-1,\)"),
        ({"job_gib": 0.0}, "config.job_gib is 0.0"),
        ({"jobs": -1}, "jobs -1"),
        ({"labels": ConfigDict({"linear_evaluation": (0,)})}, r"config.labels.raw_features is \(\); name"),
        ({"datasets.faces.protocols.supervised.downstream.target": "age"}, "predict different targets"),
        ({"methods.vision.colour": "red"}, "config.methods.vision has the keys colour, "),
        (
            {"datasets.faces.protocols.probing": ConfigDict({"downstream": {"target": ""}})},
            "config.datasets.faces.protocols has 'probing'",
        ),
        (
            {"methods.vision.evaluation": ConfigDict({"smoothing": 3})},
            "config.methods.vision.evaluation.smoothing is no key .* did you mean evaluation.smoothing_",
        ),
        (
            {"methods.vision.evaluation": ConfigDict({"smoothing_neighbours": 2.5})},
            "smoothing_neighbours is 2.5, expected",
        ),
        ({"methods.vision.evaluation": 3}, "config.methods.vision.evaluation is 3, expected a section"),
        ({"methods.vision.uses": "vision"}, "config.methods.vision.uses is 'vision'"),
        ({"datasets.faces.colour": "red"}, "config.datasets.faces has the keys colour, "),
    ],
)
def test_impossible_definitions_are_refused(changes, message, tmp_path):
    study = definition("data")
    for key, value in changes.items():
        *sections, last = key.split(".")
        functools.reduce(getattr, sections, study)[last] = value
    with pytest.raises(ConclugenError, match=message):
        study_lib.run(study, tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_interval_is_students():
    rng = np.random.default_rng(0)
    values = rng.normal(size=7)
    found = study_results.interval(list(values))
    expected = stats.t.interval(0.95, 6, loc=values.mean(), scale=stats.sem(values))
    np.testing.assert_allclose(found["interval"], expected)
    assert study_results.interval([0.5]) == {"mean": 0.5, "std": None, "interval": None}
    # By hand: 1, 2, 3: standard deviation 1, t(0.975, 2) = 4.3027.
    np.testing.assert_allclose(study_results.interval([1, 2, 3])["interval"], [2 - 2.4841, 2 + 2.4841], atol=1e-3)


SHARES = ("accuracy", "f1", "precision", "recall", "accuracy_2", "f1_2", "accuracy_7")
BOUNDS = dict.fromkeys(SHARES, (0, 1)) | {"correlation": (-1, 1), "mae": (0, np.inf)}


@pytest.mark.parametrize("measure", BOUNDS)
@pytest.mark.parametrize("n", [2, 3, 5])
def test_intervals_of_measures_stay_where_these_can_be(measure, n):
    low, high = BOUNDS[measure]
    assert study_results.bounds(measure) == (low, high)
    for end in (low, min(high, 5)):
        values = [
            abs(end - 0.02 * i) if measure == "mae" else end + (0.02 if end == low else -0.02) * i for i in range(n)
        ]
        whole, cut = study_results.interval(values), study_results.interval(values, (low, high))
        assert (cut["mean"], cut["std"]) == (whole["mean"], whole["std"])
        assert cut["interval"] == [max(whole["interval"][0], low), min(whole["interval"][1], high)]
        assert low <= cut["interval"][0] <= cut["mean"] <= cut["interval"][1] <= high
    # By hand: 0.98 and 1: half of the interval is 12.706 * 0.01414 / 1.4142.
    np.testing.assert_allclose(study_results.interval([0.98, 1.0], (0, 1))["interval"], [0.99 - 0.12706, 1], atol=1e-5)


def test_summaries_and_differences_are_cut_at_their_bounds():
    def cells(method, protocol, scores):
        place = {"dataset": "d", "method": method, "protocol": protocol, "labels_per_class": 0, "status": "done"}
        own = {"draws": 1, "never_predicted": {"sad": 1} if protocol == "supervised" else {}}
        return [
            {**place, **own, "seed": s, "scores": {"accuracy": x}, "draw_scores": {"0": {"accuracy": x}}}
            for s, x in enumerate(scores)
        ]

    found = [*cells("m", "linear_evaluation", (1.0, 0.9)), *cells("supervised", "supervised", (0.0, 0.4))]
    summary = study_results.summarize(found)
    assert [row["scores"]["accuracy"]["interval"][1] for row in summary] == [1, 1]
    assert [(row["never_predicted"], row["evaluations"]) for row in summary] == [({}, 2), ({"sad": 2}, 2)]
    (row,) = study_results.compare(found, "m")
    assert row["difference"] == pytest.approx(0.75)
    assert row["interval"] == [-1, 1]  # half of it is 12.7 * 0.25


def test_the_command_names_classes_that_are_never_predicted(capsys):
    row = {"dataset": "faces", "protocol": "raw_features", "method": "raw", "evaluations": 4}
    few, every = {"labels_per_class": 2, "never_predicted": {"sad": 3}}, {"labels_per_class": 0, "never_predicted": {}}
    scores._warn({"raw": {"title": "raw features"}}, [row | few, row | every])
    said = "never predicted on the test split: raw features, 2 labels: 'sad' (3 of 4 evaluations); weighted means"
    assert capsys.readouterr().err.startswith(f"warning: raw_features on faces: {said}")
    scores._warn({}, [row | every])
    assert capsys.readouterr().err == ""


def test_processors_are_shared(monkeypatch):
    monkeypatch.setattr(engines, "processors", lambda: [0, 1, 2, 3])
    assert 1 <= engines.automatic_jobs(1e-3) <= 4
    assert engines.automatic_jobs(1e6) == 1


def test_the_time_that_is_left_is_told_where_some_is():
    said = [study_lib.remaining(seconds) for seconds in (0.0, 20.0, 60.0, 600.0)]
    assert said == ["", "; less than a minute left", "; about 1 min left", "; about 10 min left"]

"""The matrix of corpora of a study: classifiers of each data set scored on the others, over seeds."""

import json

import jax
import numpy as np
import pytest

from conclugen_jax.commands import scores
from conclugen_jax.data import builders
from conclugen_jax.errors import ConclugenError
from conclugen_jax.study import definition as study_runs, results as study_results, study as study_lib
from conclugen_jax.study.report import reading, report
from tests.corpora import Corpus
from tests.studies import definition

NAMES = {"one": ("calm", "happy", "sad", "angry"), "other": ("SAD", "fear", "Happy"), "third": ("angry", "sad")}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    corpora = [Corpus(names, name=name, seed=i) for i, (name, names) in enumerate(NAMES.items())]
    return {corpus.spec.name: str(builders.build(corpus, folder)) for corpus in corpora}


def study_of(data, names=("one", "other"), **changes):
    study = definition(data["one"], ("linear_evaluation", "raw_features", "probe"), baselines=("raw",), **changes)
    settings = study.datasets.faces
    study.datasets = type(settings)()
    for name in names:
        study.datasets[name] = settings.copy_and_resolve_references()
        study.datasets[name].path = data[name]
    return study


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    folder, study = tmp_path_factory.mktemp("study"), study_of(data, test_data=("one", "other"))
    one = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: one)
        patch.setattr(study_lib, "work", lambda root, waiting, *_: [study_lib.work_through(root, c) for c in waiting])
        return study_lib.run(study, folder), folder


def test_every_classifier_is_scored_on_the_other_data_set(whole):
    results, folder = whole
    assert {cell["status"] for cell in results["cells"]} == {"done"}
    pairs = {(one["dataset"], one["test_data"]) for one in results["across"]}
    assert pairs == {("one", "other"), ("other", "one")}
    places = [(s["dataset"], s["method"], s["protocol"], s["labels_per_class"]) for s in results["summary"]]
    assert [(a["dataset"], a["method"], a["protocol"], a["labels_per_class"]) for a in results["across"]] == places
    (found,) = study_lib.chosen(
        results["across"], dataset="one", method="conclugen", protocol="linear_evaluation", labels_per_class=3
    )
    means, within = [], []
    for seed in (0, 1):
        run = json.loads((folder / f"linear_evaluation/one/conclugen/seed_{seed}/result.json").read_text())
        fits = [fit["across"][0] for fit in run["selected"] if fit["labels_per_class"] == 3]
        assert len(fits) == 2  # draws
        means.append(np.mean([fit["scores"]["accuracy"] for fit in fits]))
        within.append(np.mean([fit["within"]["scores"]["accuracy"] for fit in fits]))
    assert found["scores"]["accuracy"] == study_results.interval(means, (0, 1))
    assert found["within"]["accuracy"] == study_results.interval(within, (0, 1))
    assert (found["n"], found["rows"], found["rows_within"]) == (2, fits[0]["n"], fits[0]["within"]["n"])
    assert found["classes"] == {"happy": "Happy", "sad": "SAD"}
    assert (found["only_trained"], found["only_scored"]) == (["calm", "angry"], ["fear"])


def test_scores_within_are_those_of_a_study_without_it(whole, data):
    results, folder = whole
    alone = study_of(data)
    for run, other in zip(runs_of(alone), runs_of(study_of(data, test_data=("one", "other"))), strict=True):
        assert run.path == other.path
        if run.protocol != "pretraining":
            assert other.config.data.test_paths == (data["other" if run.dataset == "one" else "one"],)
            other.config.data.test_paths = ()
        assert run.config.to_json() == other.config.to_json()


def runs_of(study):
    return [run for chain in study_runs.chains(study) for run in chain]


def test_the_table_on_the_terminal(whole, capsys):
    results, _ = whole
    scores.show(results)
    shown = capsys.readouterr().out
    assert "probe across data sets: accuracy in %, classes that both have" in " ".join(shown.split())
    found = study_lib.chosen(results["across"], dataset="other", method="raw", protocol="probe", labels_per_class=0)[0]
    score = found["scores"]["accuracy"]
    assert f"{100 * score['mean']:.1f} [{100 * score['interval'][0]:.1f}, {100 * score['interval'][1]:.1f}]" in shown
    assert f"{found['rows_within']}, {found['rows']}" in shown


def test_the_report_has_the_matrix(whole, tmp_path):
    results, folder = whole
    report.write(folder, tmp_path, maps=())
    text = (tmp_path / "report.md").read_text()
    section = text.partition("## Across corpora")[2].partition("\n## ")[0]
    assert "| method | trained on | scored on one 1.0.0 | scored on other 1.0.0 |" in section
    (one,) = study_lib.chosen(results["across"], dataset="one", method="raw", protocol="probe", labels_per_class=0)
    (own,) = study_lib.chosen(results["summary"], dataset="one", method="raw", protocol="probe", labels_per_class=0)
    line = next(x for x in section.splitlines() if x.startswith("| raw features, not smoothed, probe | one 1.0.0"))
    cells = [cell.strip() for cell in line.split("|")[3:5]]
    assert cells[0].startswith(f"{100 * own['scores']['accuracy']['mean']:.1f} ± ")
    assert cells[1].startswith(f"{100 * one['scores']['accuracy']['mean']:.1f} ± ")
    assert f"· within {100 * one['within']['accuracy']['mean']:.1f}" in cells[1]
    assert "n = 2" in cells[1]
    classes = (
        f"| one | other | happy = Happy, sad = SAD | calm, angry | fear | {one['rows_within']} and {one['rows']} |"
    )
    assert classes in section
    assert "Acc in % on test rows, all labels: mean" in section
    alone = reading.read(folder)
    alone.across = []
    report.write(alone, tmp_path / "alone", maps=())
    assert "Across corpora" not in (tmp_path / "alone/report.html").read_text()


def test_one_column_of_the_matrix(data):
    study = study_of(data, ("one", "other", "third"), test_data=("third",))
    study_runs.check(study)
    paths = {run.dataset: run.config.data.test_paths for run in runs_of(study) if run.dataset}
    assert paths == {"one": (data["third"],), "other": (data["third"],), "third": ()}


def test_folds_are_those_of_the_seed(data):
    study = study_of(data, test_data=("other",))
    study.num_folds, study.seeds = 3, (4,)
    study.pretraining_path = study.datasets.one.path = "one_{fold}_{shuffle}"
    study.datasets.other.path = "other_{fold}_{shuffle}"
    study_runs.check(study)
    (paths,) = {run.config.data.test_paths for run in runs_of(study) if run.dataset == "one"}
    assert paths == ("other_1_2",)


@pytest.mark.parametrize(
    ("names", "asked", "wrong"),
    [
        (
            ("one", "other"),
            ("x",),
            "config.test_data has 'x'; name some of several data sets of the study (one, other)",
        ),
        (("one", "other"), ("one", "one"), "config.test_data has 'one'; name some of several"),
        (
            ("one",),
            ("one",),
            "config.test_data has 'one'; name some of several data sets of the study (one), each once",
        ),
    ],
)
def test_impossible_definitions(data, names, asked, wrong):
    with pytest.raises(ConclugenError) as caught:
        study_runs.check(study_of(data, names, test_data=asked))
    assert str(caught.value).startswith(wrong)


def test_paths_are_for_single_runs(data):
    study = study_of(data)
    study.datasets.one.protocols.probe.data.test_paths = (data["other"],)
    with pytest.raises(
        ConclugenError, match=r"one.protocols.probe.data.test_paths: name data sets of the study as config"
    ):
        study_runs.check(study)


def test_a_data_set_that_is_missing_is_refused_before_anything_is_run(data, tmp_path):
    study = study_of(data, test_data=("other",))
    study.datasets.other.path = "nowhere"
    with pytest.raises(ConclugenError, match="nowhere"):
        study_lib.run(study, tmp_path / "study")
    assert not (tmp_path / "study/study.json").exists()

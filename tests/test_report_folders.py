"""Pages of other folders than studies: a run of pretraining, with and without scores, a search, and folders without any."""

import json
import shutil

import numpy as np
import pytest

from conclugen_jax.data import builders
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import probe
from conclugen_jax.study.report import pages
from tests.helpers import Faces, run
from tests.reports import Page, make_study


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    data = builders.build(Faces((64, 24, 24)), tmp_path_factory.mktemp("folders") / "data")
    return make_study(tmp_path_factory.mktemp("folders") / "study", data)


def test_a_run_is_scored_beside_its_baselines(study, tmp_path):
    workdir = study / "pretraining/conclugen/seed_0"
    written = pages.write(workdir, tmp_path, maps=[])
    page, text = Page(written.files[0].read_text()), written.files[1].read_text()
    expected = {(r.name, r.num_labels): r.accuracy for r in probe.label_efficiency_of_run(workdir).results}
    table = next(t for t in page.tables if t[0][0] == ["method"] and t[0][1] == ["2 labels"])
    cells = {row[0][0]: row[1][0] for row in table[1:]}
    assert cells["raw features, probe"] == f"{100 * np.mean(expected['raw features', 2]):.1f}"
    assert cells["seed_0, probe"] == f"{100 * np.mean(expected['seed_0, pretrained', 2]):.1f}"
    assert "faces 1.0.0: with 5 labels a class seed\\_0 reaches " in text
    assert "✱" not in text.split("✱: the 95 %")[0]
    assert list(page.sections)[1:5] == ["label-efficiency", "pretraining", "health", "maps"]
    assert "5 draws of the labels" in page.sections["scores"]
    assert written.progress == ""
    assert not (workdir / "report.html").exists()


def test_a_run_without_scores_says_why(study, tmp_path):
    folder = shutil.copytree(study / "pretraining/conclugen/seed_0", tmp_path / "run/pretraining/whole/seed_0")
    config = json.loads((folder / "config.json").read_text())
    config["data"]["test_split"] = "elsewhere"
    (folder / "config.json").write_text(json.dumps(config))
    written = pages.write(tmp_path / "run", tmp_path / "out", maps=[])  # the folder of conclugen run
    page = Page(written.files[0].read_text())
    assert "The run was not scored: " in page.sections["scores"]
    assert "label-efficiency" not in page.sections


def search(folder, study):
    shutil.copytree(study / "pretraining/conclugen/seed_0", folder / "trials/0002")
    values = [3.0, 2.5, 1.5, 2.0]
    trials = [
        {
            "number": k,
            "state": "finished",
            "value": x,
            "overrides": {"optimizer.learning_rate": x / 1000},
            "error": None,
        }
        for k, x in enumerate(values)
    ]
    trials.append({"number": 4, "state": "failed", "value": None, "overrides": {}, "error": "out of memory"})
    objective = {"name": "pretraining_loss", "direction": "minimize", "meaning": "Loss without labels."}
    found = {"objective": objective, "best": trials[2], "command": "conclugen pretrain", "trials": trials}
    (folder / "result.json").write_text(json.dumps(found))
    return folder


def test_a_search_shows_trials_and_the_best_run(study, tmp_path):
    folder = search(tmp_path / "search", study)
    result = run("launch.report", str(folder), "--maps=")
    assert f"saved as {folder}/report.html" in result.stdout
    page = Page((folder / "report.html").read_text())
    assert list(page.sections)[1:4] == ["trials", "pretraining", "health"]
    assert "Of 5 trials (1 failed, 4 finished), trial 2 has the best pretraining loss: 1.5" in page.sections[""]
    table = next(t for t in page.tables if t[0][0] == ["trial"] and len(t[0]) == 3)
    assert [row[0] for row in table[1:]] == [["2"], ["3"], ["1"], ["0"]]
    assert table[1][1:] == [["1.5"], ["0.0015"]]
    assert page.row("4")[1] == ["out of memory"]
    assert "best so far, trial 3: 1.5" in page.figures["Value of each trial"]


def test_other_folders_are_refused(study, tmp_path):
    with pytest.raises(ConclugenError, match="no study, run or search is there; name its folder"):
        pages.write(tmp_path)
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(
        ConclugenError, match="a run of a classifier, which has no page of its own; name its pretraining"
    ):
        pages.write(tmp_path)
    folder = search(tmp_path / "search", study)
    found = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(found | {"best": None}))
    with pytest.raises(ConclugenError, match="no trial has finished yet"):
        pages.write(folder)
    assert "name one folder" in run("launch.report", code=2).stderr

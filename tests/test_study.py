"""Studies: every cell once, whatever interrupts it; failed cells marked; means, intervals and paired differences."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from scipy import stats

from conclugen_jax import study as study_lib
from conclugen_jax import study_results
from conclugen_jax.data import builders
from conclugen_jax.errors import ConclugenError
from tests.helpers import Faces, tiny_config

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Runs of a study are processes of their own: each has one device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", "")
        yield


def definition(path, **changes):
    """A method, also with video alone, on one data set by all protocols, two seeds."""

    pretraining = tiny_config(train__num_epochs=2, clustering__start_epoch=1, data__standardize=True)
    downstream = tiny_config(train__num_epochs=3, data__standardize=True, optimizer__learning_rate=1e-2)
    study = ConfigDict(
        {
            "name": "tiny",
            "pretraining_path": str(path),
            "seeds": (0, 1),
            "label_draws": 2,
            "training_draws": 1,
            "labels": {
                "linear_evaluation": (3, 0),
                "raw_features": (3,),
                "supervised": (3,),
                "fine_tuning": (0,),
            },
            "jobs": 2,
            "job_gib": 1.0,
            "reference": "conclugen",
            "order": ("conclugen", "vision"),
            "methods": {
                "conclugen": {"title": "ConCluGen", "modalities": (), "pretraining": pretraining},
                "vision": {"title": "ConCluGen/(vision)", "uses": "conclugen", "modalities": ("video",)},
            },
            "datasets": {
                "faces": {
                    "path": str(path),
                    "protocols": {
                        name: downstream.copy_and_resolve_references()
                        for name in ("linear_evaluation", "raw_features", "supervised", "fine_tuning")
                    },
                }
            },
        }
    )
    for key, value in changes.items():
        study[key] = value
    return study


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return builders.build(Faces((64, 24, 23), missing=0.3), tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    return study_lib.run(definition(data), folder), folder


def test_every_cell_is_done_and_its_scores_are_those_of_its_runs(whole):
    results, folder = whole
    assert {cell["status"] for cell in results["cells"]} == {"done"}
    found = {(c["method"], c["protocol"], c["labels_per_class"], c["seed"]) for c in results["cells"]}
    learned = ("conclugen", "vision")
    expected = {(m, "linear_evaluation", n, s) for m in learned for n in (3, 0) for s in (0, 1)}
    expected |= {(m, "fine_tuning", 0, s) for m in learned for s in (0, 1)}
    expected |= {(p, p, 3, s) for p in ("supervised", "raw_features") for s in (0, 1)}
    assert found == expected
    assert len(results["cells"]) == len(expected)
    (cell,) = study_lib.chosen(
        results["cells"], method="vision", protocol="linear_evaluation", labels_per_class=3, seed=1
    )
    run = json.loads((folder / "linear_evaluation/faces/vision/seed_1/result.json").read_text())
    assert run["modalities"] == ["video"]
    assert run["encoder"]["workdir"] == str(folder / "pretraining/conclugen/seed_1")
    own = [fit for fit in run["selected"] if fit["labels_per_class"] == 3]
    assert [fit["label_draw"] for fit in own] == [2, 3]  # the draws of the second seed
    assert cell["scores"]["accuracy"] == pytest.approx(np.mean([fit["test"]["accuracy"] for fit in own]))
    assert cell["draws"] == 2
    assert np.sum(cell["confusion_matrix"]) == 2 * 23
    (cell,) = study_lib.chosen(results["cells"], method="supervised", labels_per_class=3, seed=1)
    run = json.loads((folder / "supervised/faces/supervised/seed_1/labels_3_draw_2/result.json").read_text())
    assert (cell["scores"]["accuracy"], run["num_train_examples"]) == (run["test"]["accuracy"], 12)


def test_summary_and_comparisons_are_over_seeds(whole):
    results, _ = whole
    values = {}
    for cell in results["cells"]:
        key = (cell["method"], cell["protocol"], cell["labels_per_class"])
        values.setdefault(key, {})[cell["seed"]] = cell
    for row in results["summary"]:
        own = values[row["method"], row["protocol"], row["labels_per_class"]]
        assert row["n"] == 2
        assert row["scores"]["f1"]["mean"] == pytest.approx(np.mean([c["scores"]["f1"] for c in own.values()]))
    (row,) = study_lib.chosen(
        results["comparisons"],
        method="vision",
        baseline="supervised",
        protocol="linear_evaluation",
        labels_per_class=3,
    )
    own, other = values["vision", "linear_evaluation", 3], values["supervised", "supervised", 3]
    # The supervised baseline has seen one draw of each seed: on that the two are compared.
    by_hand = []
    for seed, draw in ((0, "0"), (1, "2")):
        a, b = own[seed]["draw_scores"][draw], other[seed]["draw_scores"][draw]
        by_hand.append(a["accuracy"] - b["accuracy"])
    assert row["difference"] == pytest.approx(np.mean(by_hand))
    assert row["n"] == 2
    assert not study_lib.chosen(results["comparisons"], method="conclugen", baseline="conclugen")


def test_a_finished_study_is_collected_without_running_anything(whole, data):
    results, folder = whole
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("result.json")}
    assert study_lib.run(definition(data), folder) == results
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("result.json")} == before


CODE = """
import sys, json
from conclugen_jax import study
from tests.test_study import definition
if __name__ == "__main__":
    study.run(definition(sys.argv[1], seeds=(1,)), sys.argv[2])
"""


def test_killed_and_repeated_it_equals_the_uninterrupted_study(whole, data, tmp_path):
    script = tmp_path / "main.py"
    script.write_text(CODE)
    command = [sys.executable, str(script), str(data), str(tmp_path / "study")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "study").glob("pretraining/*/seed_*/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while _processes_of(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _processes_of(process.pid)  # those it had started have ended with it
    assert not (tmp_path / "study" / "results.json").exists()
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
    results, folder = whole
    again = json.loads((tmp_path / "study" / "results.json").read_text())
    expected = [cell for cell in results["cells"] if cell["seed"] == 1]
    assert again["cells"] == json.loads(json.dumps(expected))


def _processes_of(session):
    """Processes of a session that are alive."""
    found = subprocess.run(["ps", "-s", str(session), "-o", "pid=,stat="], capture_output=True, text=True).stdout
    return [line for line in found.splitlines() if not line.split()[1].startswith("Z")]


def test_a_failed_cell_is_marked_and_the_others_go_on(data, tmp_path, capfd):
    study = definition(data, seeds=(0,), labels=ConfigDict({"linear_evaluation": (0,), "raw_features": (0,)}))
    study.methods.conclugen.pretraining.train.batch_size = 65
    protocols = study.datasets.faces.protocols
    del protocols["supervised"], protocols["fine_tuning"]
    results = study_lib.run(study, tmp_path)
    states = {(c["method"], c["labels_per_class"]): (c["status"], c["error"]) for c in results["cells"]}
    assert states["raw_features", 0] == ("done", None)
    status, error = states["vision", 0]
    assert status == "failed"
    assert error.startswith("its pretraining failed: config.train.batch_size is 65 but the split 'train' has only 64")
    assert {row["method"] for row in results["summary"]} == {"raw_features"}
    # Mended and repeated, only what had failed is run.
    path = tmp_path / "raw_features/faces/raw_features/seed_0/result.json"
    before = path.stat().st_mtime_ns
    study.methods.conclugen.pretraining.train.batch_size = 16
    results = study_lib.run(study, tmp_path)
    assert {c["status"] for c in results["cells"]} == {"done"}
    assert path.stat().st_mtime_ns == before
    assert not list(tmp_path.rglob("failed.json"))


def test_whatever_happens_in_a_run_the_next_is_tried(data, tmp_path):
    done = []

    def act(run, root):
        if run.protocol == "fine_tuning":
            raise MemoryError("no more")
        (root / run.path).mkdir(parents=True)
        (root / run.path / ("done.json" if run.protocol == "pretraining" else "result.json")).write_text("{}")
        done.append(run.protocol)

    chain = next(study_lib.chains(definition(data)))
    assert [run.protocol for run in chain].count("fine_tuning") == 2
    study_lib.work_through(tmp_path, chain, act)
    assert done == [run.protocol for run in chain if run.protocol != "fine_tuning"]
    failed = [json.loads(p.read_text())["error"] for p in tmp_path.rglob("failed.json")]
    assert failed == ["MemoryError: no more"] * 2
    # A process that was killed: the run it was at is marked.
    lost = tmp_path / "lost"
    study_lib._mark_lost(lost, chain, -signal.SIGKILL)
    (path,) = lost.rglob("failed.json")
    assert path.parent == lost / chain[0].path
    assert "killed by signal 9" in path.read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"order": ("conclugen",)}, "must name every method once"),
        ({"reference": "best"}, "config.reference is 'best'"),
        ({"training_draws": 3}, "at most label_draws"),
        ({"colour": 1}, "config.colour: unknown"),
    ],
)
def test_impossible_definitions_are_refused(changes, message, tmp_path):
    with pytest.raises(ConclugenError, match=message):
        study_lib.run(definition("data", **changes), tmp_path)


def test_interval_is_students():
    rng = np.random.default_rng(0)
    values = rng.normal(size=7)
    found = study_results.interval(list(values))
    expected = stats.t.interval(0.95, 6, loc=values.mean(), scale=stats.sem(values))
    np.testing.assert_allclose(found["interval"], expected)
    assert study_results.interval([0.5]) == {"mean": 0.5, "std": None, "interval": None}
    # By hand: 1, 2, 3: standard deviation 1, t(0.975, 2) = 4.3027.
    np.testing.assert_allclose(study_results.interval([1, 2, 3])["interval"], [2 - 2.4841, 2 + 2.4841], atol=1e-3)


def test_processors_are_shared(monkeypatch):
    monkeypatch.setattr(study_lib, "processors", lambda: [0, 1, 2, 3])
    assert 1 <= study_lib.automatic_jobs(1e-3) <= 4
    assert study_lib.automatic_jobs(1e6) == 1

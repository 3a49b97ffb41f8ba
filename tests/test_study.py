"""Studies: every cell once, whatever interrupts it; failed cells marked; means, intervals and paired differences."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from conclugen_jax.data import builders
from conclugen_jax.data.sources import LabelSpec
from conclugen_jax.errors import ConclugenError
from conclugen_jax.study import definition as study_runs, results as study_results, study as study_lib
from conclugen_jax.study.report import reading as report_study
from conclugen_jax.system import engines, signals
from tests.helpers import QUICK_COMPILATION, Faces, run
from tests.studies import definition

ROOT = Path(__file__).parents[1]
WORK = study_lib.work  # the real one, see below


@pytest.fixture(scope="module")
def here():
    """Runs are done in this process, on one device: what is the same in processes of their own, a test of its own tells."""
    with pytest.MonkeyPatch.context() as patch:
        one = jax.devices()[:1]
        patch.setattr(jax, "devices", lambda *_: one)
        patch.setattr(study_lib, "work", lambda root, waiting, *_: [study_lib.work_through(root, c) for c in waiting])
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return builders.build(Faces((64, 24, 23), missing=0.3), tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data, here, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    return study_lib.run(definition(data), folder), folder


def test_every_cell_is_done_and_its_scores_are_those_of_its_runs(whole):
    results, folder = whole
    assert {cell["status"] for cell in results["cells"]} == {"done"}
    found = {(c["method"], c["protocol"], c["labels_per_class"], c["seed"]) for c in results["cells"]}
    learned = ("conclugen", "vision")
    expected = {(m, "linear_evaluation", n, s) for m in learned for n in (3, 0) for s in (0, 1)}
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
from conclugen_jax.study import study
from tests.studies import small
if __name__ == "__main__":
    study.run(small(sys.argv[1]), sys.argv[2])
"""


@pytest.mark.slow
def test_killed_and_repeated_it_equals_the_uninterrupted_study(whole, data, tmp_path):
    script = tmp_path / "main.py"
    script.write_text(CODE)
    command = [sys.executable, str(script), str(data), str(tmp_path / "study")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": QUICK_COMPILATION}
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
    asked = {("linear_evaluation", 0), ("raw_features", 3)}
    same = [c for c in results["cells"] if c["seed"] == 1 and (c["protocol"], c["labels_per_class"]) in asked]
    assert again["cells"] == json.loads(json.dumps(same))
    assert not list((tmp_path / "study").rglob("failed.json"))


def _processes_of(session):
    """Processes of a session that are alive."""
    found = subprocess.run(["ps", "-s", str(session), "-o", "pid=,stat="], capture_output=True, text=True).stdout
    return [line for line in found.splitlines() if not line.split()[1].startswith("Z")]


def test_a_failed_cell_is_marked_and_the_others_go_on(data, here, tmp_path):
    labels = ConfigDict({"fine_tuning": (0,), "raw_features": (0,)})
    study = definition(data, ("fine_tuning", "raw_features"), seeds=(0,), labels=labels, order=("conclugen",))
    del study.methods["vision"]
    study.methods.conclugen.pretraining.train.batch_size = 65
    results = study_lib.run(study, tmp_path)
    states = {(c["method"], c["labels_per_class"]): (c["status"], c["error"]) for c in results["cells"]}
    assert states["raw_features", 0] == ("done", None)
    status, error = states["conclugen", 0]
    assert status == "failed"
    assert error.startswith("its pretraining failed: config.train.batch_size is 65, ")
    assert {row["method"] for row in results["summary"]} == {"raw_features"}
    # Corrected and repeated, only what had failed is run.
    path = tmp_path / "raw_features/faces/raw_features/seed_0/result.json"
    before = path.stat().st_mtime_ns
    study.methods.conclugen.pretraining.train.batch_size = 16
    results = study_lib.run(study, tmp_path)
    assert {c["status"] for c in results["cells"]} == {"done"}
    assert path.stat().st_mtime_ns == before
    assert not list(tmp_path.rglob("failed.json"))


def work_through(root, chain, act):
    """A chain whose runs are done by a function."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_lib, "perform", act)
        study_lib.work_through(root, [chain])


def test_whatever_happens_in_a_run_the_next_is_tried(data, tmp_path):
    done = []

    def act(run, root):
        if run.protocol == "fine_tuning":
            raise MemoryError("no more")
        (root / run.path / ("done.json" if run.protocol == "pretraining" else "result.json")).write_text("{}")
        done.append(run.protocol)

    chain = next(study_runs.chains(definition(data, ("linear_evaluation", "fine_tuning"))))
    assert [run.protocol for run in chain].count("fine_tuning") == 2
    work_through(tmp_path, chain, act)
    assert done == [run.protocol for run in chain if run.protocol != "fine_tuning"]
    failed = [json.loads(p.read_text())["error"] for p in tmp_path.rglob("failed.json")]
    assert failed == ["MemoryError: no more"] * 2
    # Repeated, a run that failed is done again and one that is done is not.
    done.clear()
    work_through(tmp_path, chain, lambda run, root: done.append(run.protocol))
    assert done == ["fine_tuning"] * 2


def test_a_process_that_is_killed_fails_its_run_and_what_depends_on_it(data, tmp_path):
    chain = next(study_runs.chains(definition(data)))
    done = []

    class Killed(BaseException):
        pass

    def act(run, root):
        (root / run.path / ("done.json" if run.protocol == "pretraining" else "result.json")).write_text("{}")
        if len(done) == killed_at:
            raise Killed
        done.append(run.path)

    killed_at = 2  # even a result that it had just left does not count as finished
    with pytest.raises(Killed):
        work_through(tmp_path, chain, act)
    assert "was begun and has not ended" in study_results.failure(tmp_path / chain[2].path)
    rest = study_lib.mark_lost(tmp_path, chain, -signal.SIGKILL)
    assert "killed by signal 9" in study_results.failure(tmp_path / chain[2].path)
    assert rest == chain[3:]
    assert [study_lib.is_done(tmp_path, run) for run in chain] == [True, True] + [False] * len(chain[2:])
    # Where it was pretraining, nothing that depends on it can be tried.
    assert study_lib.mark_lost(tmp_path / "early", chain, 1) == []
    errors = [study_results.failure(tmp_path / "early" / run.path) for run in chain]
    assert errors[0].startswith("the process that ran it ended with exit code 1")
    assert all(error.startswith("its pretraining failed: the process") for error in errors[1:])


def test_a_lost_process_is_replaced_for_the_runs_after_it(data, tmp_path, monkeypatch, capsys):
    """Processes that end at once, each; one that ends so can say nothing itself."""
    chain = next(study_runs.chains(definition(data)))
    work_through(tmp_path, chain[:1], lambda run, root: (root / run.path / "done.json").write_text("{}"))
    begun = []

    class Crashing:
        def __init__(self, *_, **__):
            pass

        def submit(self, function, cohort):
            begun.append([run.path for (chain,) in [cohort] for run in chain])
            future = Future()
            future.set_exception(engines.Died())
            return future

        def close(self):
            return [3]

    monkeypatch.setattr(engines, "Pool", Crashing)
    engine = engines.Engine()
    assert engine.plan(tmp_path, 1, 1, 1.0) == 1
    WORK(tmp_path, [[chain]], 1, signals.Stop(), engine)
    paths = [run.path for run in chain]
    assert begun == [paths, *(paths[i:] for i in range(2, len(paths)))]
    assert all("exit code 3" in study_results.failure(tmp_path / path) for path in paths[1:])
    assert f"1/1 {paths[-1]} failed\n" in capsys.readouterr().err
    done = Future()
    done.set_result(None)
    Crashing.submit = lambda *_: done
    WORK(tmp_path / "other", [[chain]], 1, signals.Stop(), engine)
    assert f"1/1 {paths[0]} finished\n" in capsys.readouterr().err


def test_what_was_made_with_another_configuration_is_not_passed_off(whole, data, tmp_path, here):
    _, folder = whole
    old, folder = folder, shutil.copytree(folder, tmp_path / "study")
    for path in (*folder.rglob("config.json"), *folder.rglob("result.json")):
        path.write_text(path.read_text().replace(str(old), str(folder)))
    study = definition(data, ("linear_evaluation", "raw_features"), seeds=(1,))
    cell = {"method": "raw_features", "seed": 1}
    study.datasets.faces.protocols.raw_features.optimizer.learning_rate = 0.5
    (found,) = study_lib.chosen(study_lib.run(study, folder)["cells"], **cell)
    assert found["status"] == "failed"
    assert "was made with another configuration (config.optimizer.learning_rate: 0.01 -> 0.5); delete" in found["error"]
    # Restored, it is what it was; nothing is trained.
    study.datasets.faces.protocols.raw_features.optimizer.learning_rate = 0.01
    result = folder / "raw_features/faces/raw_features/seed_1/result.json"
    before = result.read_bytes()
    (found,) = study_lib.chosen(study_lib.run(study, folder)["cells"], **cell)
    assert (found["status"], result.read_bytes()) == ("done", before)
    # Another pretraining: what was evaluated after the old one is no result of it, neither before nor after it is made.
    study.methods.conclugen.pretraining.train.num_epochs = 3
    cell = {"method": "vision", "seed": 1, "labels_per_class": 0}
    (found,) = study_lib.chosen(study_lib.run(study, folder)["cells"], **cell)
    assert found["error"].startswith("its pretraining failed: ")
    shutil.rmtree(folder / "pretraining/conclugen/seed_1")
    (found,) = study_lib.chosen(study_lib.run(study, folder)["cells"], **cell)
    assert "result.json: made with other weights (step 8 " in found["error"]


def test_runs_that_name_no_modalities_are_done_once(data, here, tmp_path):
    """Their workdirs name all that the data set has, which is no other configuration."""
    path = shutil.copytree(data, tmp_path / "data")
    study = definition(path, ("raw_features",), seeds=(1,), order=(), methods=ConfigDict(), reference="raw_features")
    study.datasets.faces.protocols.raw_features.data.modalities = ()
    first = study_lib.run(study, tmp_path)
    assert [c["status"] for c in first["cells"]] == ["done"]
    assert study_lib.run(study, tmp_path) == first
    # They are collected without their data too.
    shutil.rmtree(path)
    again = study_lib.run(study, tmp_path)
    assert again["cells"] == first["cells"]
    assert "manifest.json: cannot be read" in again["datasets"]["faces"]["error"]


@pytest.mark.parametrize("key", ["pretraining_path", "datasets.faces.path"])
def test_what_is_no_data_set_is_refused_before_anything_is_run(data, here, tmp_path, key):
    study = definition(data)
    study.update_from_flattened_dict({key: str(tmp_path)})
    with pytest.raises(ConclugenError, match=f"^{tmp_path}/manifest.json: cannot be read .*name the folder"):
        study_lib.run(study, tmp_path / "study")
    assert not list(tmp_path.rglob("*.json"))


class Targets(Faces):
    """Faces with several labels, and a number to predict that a third of the rows lack."""

    def __init__(self):
        super().__init__((64, 24, 23), kind="multi", name="targets")
        object.__setattr__(self.spec, "targets", {"arousal": LabelSpec("value")})

    def examples(self, split):
        for i, e in enumerate(super().examples(split)):
            yield dataclasses.replace(e, targets={"arousal": e.label[0] - 1.5} if i % 3 else {})


def test_several_labels_and_numbers(here, tmp_path):
    path = builders.build(Targets(), tmp_path / "data")
    protocols = "raw_features", "supervised"
    study = definition(path, protocols, seeds=(1,), order=(), methods=ConfigDict(), reference="supervised")
    study.labels = ConfigDict({"raw_features": (0,), "supervised": (0,)})
    study.datasets.number = study.datasets.faces.copy_and_resolve_references()
    for config in study.datasets.number.protocols.values():
        config.downstream.target = "arousal"
    del study.datasets.faces.protocols["supervised"]
    results = study_lib.run(study, tmp_path / "study")
    assert {(c["status"], c["error"]) for c in results["cells"]} == {("done", None)}
    described = {name: (d["target"], d["kind"], d["classes"]) for name, d in results["datasets"].items()}
    assert described == {"faces": ("", "multi", ["calm", "happy", "sad", "angry"]), "number": ("arousal", "value", [])}
    measures = {d: next(iter(row["scores"])) for row in results["summary"] for d in [row["dataset"]]}
    assert measures == {"faces": "accuracy", "number": "mae"}
    (cell,) = study_lib.chosen(results["cells"], dataset="number", method="raw_features", seed=1)
    run = json.loads((tmp_path / "study/raw_features/number/raw_features/seed_1/result.json").read_text())
    assert cell["scores"]["mae"] == run["selected"][0]["test"]["mae"]
    assert cell["confusion_matrix"] is None
    assert np.shape(study_lib.chosen(results["cells"], dataset="faces")[0]["confusion_matrix"]) == (4, 2, 2)
    # The report reads what there is of both.
    assert report_study.read(tmp_path / "study").datasets["number"].kind == "value"


def test_the_command_ends_with_1_and_names_each_cause_once(data, here, tmp_path):
    path = tmp_path / "definition.py"
    text = (
        "from tests.studies import definition\n\ndef get_config():\n"
        "    changes = {'methods': {}, 'order': (), 'reference': 'raw_features'}\n"
        f"    study = definition('{data}', protocols=('raw_features',), **changes)\n"
        "    study.labels.raw_features = (99,)\n    study.datasets.faces.protocols.raw_features.train.num_epochs = 1\n"
        "    study.datasets.faces.protocols.raw_features.downstream.modalities = ('smell',)\n    return study\n"
    )
    path.write_text(text)
    result = run("launch.study", f"--config={path}", f"--study={tmp_path / 'study'}", code=1)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("failed: ")]
    assert line.startswith("failed: raw_features/faces/raw_features/seed_0 and 1 more: ")
    assert "no modality 'smell'" in line
    assert "Traceback" not in result.stderr
    path.write_text(text.replace("smell", "video"))
    result = run("launch.study", f"--config={path}", f"--study={tmp_path / 'few'}")  # two seeds with all that there are
    lines = [line for line in result.stderr.splitlines() if line.startswith("warning: faces: ")]
    assert len(lines) == 1
    assert lines[0].startswith(
        "warning: faces: fewer labelled training examples than the 99 per class asked for: 'calm' "
    )
    assert re.search(r"raw features +│ +[\d.]+ \[[\d.]+, [\d.]+\]", result.stdout), result.stdout
    path.write_text(text.replace(str(data), "nowhere"))
    result = run("launch.study", f"--config={path}", f"--study={tmp_path / 'none'}", code=2)
    assert "nowhere/manifest.json: cannot be read" in result.stderr

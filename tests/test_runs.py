"""The table of runs: what their files say, whatever their state, without JAX, and quickly."""

import json
import os
import subprocess
import sys
import time

import pytest

from conclugen_jax.data import builders
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import downstream
from conclugen_jax.pretrain import pretrain
from conclugen_jax.runs import config as config_lib, layout, overview
from conclugen_jax.study import listing
from conclugen_jax.system import locks
from tests.helpers import ROOT, Faces, run, tiny_config

SPLIT = {"num_examples": 10, "present": {"video": 10}, "label_counts": [], "target_counts": {}, "dropped": 0}


def made(folder, *, saved=0, epochs=3, batch=4, lines=(), present=10, **files):
    """Write the files of a run: 10 rows, by default two steps an epoch; a checkpoint of step ``saved``."""
    given = {"data__modalities": ("video",), "train__num_epochs": epochs, "train__batch_size": batch}
    config = tiny_config("data", **given, **files.pop("config", {}))
    split = {**SPLIT, "present": {"video": present}}
    data = {"name": "faces", "version": "1.0.0", "splits": {"train": split}}
    folder.mkdir(parents=True)
    (folder / layout.CONFIG).write_text(config_lib.to_json(config))
    (folder / layout.DATA).write_text(json.dumps(data))
    (folder / layout.METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    if saved:
        (folder / layout.CHECKPOINTS / str(saved)).mkdir(parents=True)
        (folder / layout.CHECKPOINTS / f"{saved + 1}.orbax-checkpoint-tmp").mkdir()
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def table(*arguments, code=0):
    return run("runs", *arguments, code=code)


def as_json(*arguments):
    found = json.loads(table(*arguments, "--json").stdout)
    return {one["folder"]: one for one in found["runs"]}


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A finished pretraining and its linear evaluation, in the usual place inside of it."""
    folder = tmp_path_factory.mktemp("real")
    data = builders.build(Faces((64, 24, 23), missing=0.3), folder / "data")
    config = tiny_config(str(data), train__batch_size=16, train__num_epochs=3, online_probe__every_epochs=1)
    pretrain(config, folder / "runs/mine")
    config.downstream.checkpoint = str(folder / "runs/mine")
    downstream.downstream(config, folder / "runs/mine/linear_evaluation")
    return folder / "runs"


def test_real_runs(real):
    found = as_json(real)
    assert list(found) == ["mine/linear_evaluation", "mine"]  # the newest first
    one, other = found["mine"], found["mine/linear_evaluation"]
    assert (one["kind"], one["method"], one["data"], one["state"]) == (
        "pretraining",
        "conclugen",
        "faces 1.0.0",
        "done",
    )
    log = [json.loads(line) for line in (real / "mine/metrics.jsonl").read_text().splitlines()]
    assert (one["step"], one["steps"], one["loss"]) == (log[-1]["step"], log[-1]["step"], log[-1]["loss"])
    probes = [json.loads(line) for line in (real / "mine/probes.jsonl").read_text().splitlines()]
    best = max(max(line["knn/accuracy"], line["linear/accuracy"]) for line in probes)
    assert (one["score"]["value"], one["score"]["measure"]) == (best, "accuracy")
    result = json.loads((real / "mine/linear_evaluation/result.json").read_text())
    score = {"value": result["test"]["accuracy"], "measure": "accuracy", "of": "test, all labels"}
    assert (other["kind"], other["method"], other["score"]) == ("linear evaluation", "conclugen", score)
    assert (other["state"], other["step"]) == ("done", other["steps"])
    lines = table(real).stdout.splitlines()
    columns = ["kind", "method", "data", "step", "loss", "score", "state", "age", "folder"]
    assert lines[0].split() == columns
    assert lines[2].split()[:3] == ["pretraining", "conclugen", "faces"]
    assert f" {one['step']} / {one['step']} " in lines[2]
    assert f"{100 * best:.1f} %  done " in lines[2]
    assert lines[2].endswith(" s  mine")


def test_states(tmp_path):
    cut = made(tmp_path / "interrupted", saved=4, lines=[{"step": 5, "epoch": 2, "loss": 3.5}])
    with (cut / layout.METRICS).open("a") as file:
        file.write('not JSON\n{"step": 6, "epo')  # what a kill has left
    (cut / layout.LOCK).write_text("process 1 on x since then")
    made(tmp_path / "done", saved=6)
    made(tmp_path / "none_of_its_modalities", saved=3, present=7)  # one step an epoch: 3 rows have no modality
    made(tmp_path / "imported", saved=100, **{"import": {}})
    made(tmp_path / "begun", saved=6, failed={"error": layout.BEGUN})
    made(tmp_path / "failed", failed={"error": "the disk is full"})
    made(tmp_path / "early", failed={"error": "bad data"})
    (tmp_path / "early" / layout.CONFIG).unlink()
    running = made(tmp_path / "running", lines=[{"step": 1, "loss": float("nan")}])
    with locks.hold(running / layout.LOCK):
        found = as_json(tmp_path)
    states = {name: (one["state"], one["step"], one["steps"]) for name, one in found.items()}
    assert states == {
        "interrupted": ("interrupted", 5, 6),
        "done": ("done", 6, 6),
        "none_of_its_modalities": ("done", 3, 3),
        "imported": ("done", 100, None),
        "begun": ("interrupted", 6, 6),
        "failed": ("failed", 0, 6),
        "early": ("failed", None, None),
        "running": ("running", 1, 6),
    }
    assert (found["interrupted"]["loss"], found["running"]["loss"]) == (3.5, None)
    assert found["failed"]["note"] == "the disk is full"
    assert (cut / layout.LOCK).exists()
    printed = table(tmp_path).stdout.splitlines()
    assert f"failed: {tmp_path}/failed: the disk is full" in printed


def test_a_broken_run_has_a_line_and_a_reason(tmp_path):
    made(tmp_path / "good", saved=6)
    wrong = {layout.CONFIG: "{", layout.DATA: "[]", layout.RESULT: '{"kind": "single", "data": {}}'}
    for name, content in wrong.items():
        (made(tmp_path / f"no {name}") / name).write_text(content)
    (made(tmp_path / "no_config") / layout.CONFIG).unlink()
    (tmp_path / "of_another_program").mkdir()
    (tmp_path / "of_another_program" / layout.CONFIG).write_text('{"hidden_size": 1}')
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / layout.STUDY).write_text("{")
    found = as_json(tmp_path)
    assert {name: one["state"] for name, one in found.items()} == {
        **dict.fromkeys(("no_config", "study", *(f"no {name}" for name in wrong)), "broken"),
        "good": "done",
    }
    assert "not valid JSON" in found[f"no {layout.CONFIG}"]["note"]
    assert found[f"no {layout.CONFIG}"]["note"].endswith("restore it or delete the run")
    assert found[f"no {layout.RESULT}"]["note"].startswith("a file of the run is damaged (KeyError")
    assert f"broken: {tmp_path}/no {layout.CONFIG}/{layout.CONFIG}: not valid" in table(tmp_path).stdout


def test_links_and_data_sets_and_folders_that_cannot_be_read(tmp_path, monkeypatch):
    made(tmp_path / "runs/a", saved=6)
    (tmp_path / "runs/a/circle").symlink_to(tmp_path / "runs")
    (tmp_path / "runs/again").symlink_to(tmp_path / "runs/a")
    (tmp_path / "runs/nowhere").symlink_to(tmp_path / "missing")
    made(tmp_path / "elsewhere/b", saved=6)
    (tmp_path / "runs/linked").symlink_to(tmp_path / "elsewhere")
    made(tmp_path / "runs/data/x", saved=6)
    (tmp_path / "runs/data" / "manifest.json").write_text("{}")
    made(tmp_path / "runs/.hidden/x", saved=6)
    assert sorted(as_json(tmp_path / "runs")) == ["a", "linked/b"]
    (tmp_path / "runs/closed").mkdir()
    scandir = os.scandir

    def refuse(folder):
        if folder.name == "closed":
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    found = as_json(tmp_path / "runs")
    assert (found["closed"]["state"], found["closed"]["note"]) == (
        "broken",
        "cannot be read (Permission denied); make it readable",
    )


def test_a_checkpoint_after_half_of_the_steps_is_no_end(tmp_path):
    row = overview.of_run(made(tmp_path / "a", saved=3))  # of 3 epochs with 2 steps each
    assert (row.state, row.step, row.steps) == (overview.INTERRUPTED, 3, 6)


def test_the_best_of_all_probes_and_the_last_loss(tmp_path):
    lines = [{"step": 1, "loss": 2.5}, {"step": 2, "left_out": True}]
    probes = [{"step": i + 1, "linear/accuracy": 0.9 if i == 5 else 0.5, "knn/mae": float("nan")} for i in range(2000)]
    folder = made(tmp_path / "a", saved=2, lines=lines)
    (folder / layout.PROBES).write_text("".join(json.dumps(line) + "\n" for line in probes))
    assert (folder / layout.PROBES).stat().st_size > overview.TAIL
    row = overview.of_run(folder)
    assert (row.loss, row.step, row.score.value) == (2.5, 2, 0.9)


def fit(number, accuracy):
    return {"labels_per_class": number, "test": {"accuracy": accuracy}}


def test_a_study_and_a_search_are_a_line_each(tmp_path):
    study, search = tmp_path / "study", tmp_path / "search"
    path, probe = "pretraining/m/seed_0", "probe/faces/m/seed_0"
    made(study / path, saved=6, done={"steps": 6})
    scored = {
        "kind": "single",
        "data": {"name": "faces", "version": "2"},
        "selected": [fit(5, 0.9), fit(0, 0.4), fit(0, 0.6)],
    }
    made(study / probe, result=scored, config={"downstream__checkpoint": str(study / path)})
    (study / layout.STUDY).write_text(json.dumps({"methods": {"m": {}, "n": {}}, "datasets": {"faces": {}}}))
    (study / layout.RUNS).write_text(json.dumps([path, probe, "probe/faces/n/seed_0"]))
    made(search / "trials/0000", saved=2)
    made(search / "best", saved=6)
    definition = {"objective": "pretraining_loss", "config": json.loads((study / path / layout.CONFIG).read_text())}
    (search / layout.SEARCH).write_text(json.dumps(definition | {"data": {"name": "faces", "version": "1"}}))
    counts = {"finished": 3, "pruned": 2, "failed": 0, "running": 1}
    result = {"num_trials": counts, "best": {"value": 0.25, "number": 2}}
    (search / layout.RESULT).write_text(json.dumps(result))
    found = as_json(tmp_path)
    assert set(found) == {"study", "search", "search/best"}
    one = found["study"]
    assert (one["kind"], one["method"], one["data"], one["step"], one["steps"]) == ("study", "m, n", "faces", 2, 3)
    assert (one["state"], one["score"]) == ("interrupted", None)
    other = found["search"]
    assert (other["kind"], other["method"], other["state"], other["step"]) == ("search", "conclugen", "interrupted", 5)
    assert other["score"] == {"value": 0.25, "measure": "pretraining_loss", "of": "trial 2"}
    assert "pretraining_loss 0.25" in table(tmp_path).stdout
    with locks.hold(search / "trials/0001.lock"):
        assert as_json(tmp_path)["search"]["state"] == "running"
    members = as_json(tmp_path, "--all")
    assert {*members} == {"study", "search", "search/best", "search/trials/0000", f"study/{path}", f"study/{probe}"}
    score = {"value": 0.5, "measure": "accuracy", "of": "test, all labels"}
    assert (members[f"study/{probe}"]["score"], members[f"study/{probe}"]["data"]) == (score, "faces 2")
    (study / layout.RUNS).write_text(json.dumps([path, probe]))
    place = {"dataset": "faces", "protocol": "probe"}
    means = [(5, "m", 0.9), (0, "m", 0.5), (0, "n", 0.7)]
    summary = [{**place, "labels_per_class": k, "method": m, "scores": {"accuracy": {"mean": x}}} for k, m, x in means]
    (study / layout.RESULTS).write_text(json.dumps({"summary": summary}))
    one = as_json(tmp_path)["study"]
    assert one["score"] == {"value": 0.7, "measure": "accuracy", "of": "n on faces, probe, all labels"}
    assert one["state"] == "done"
    (study / probe / layout.FAILURE).write_text(json.dumps({"error": "too few rows"}))
    one = as_json(tmp_path)["study"]
    assert (one["state"], one["note"]) == ("failed", f"1 of 2 runs failed, such as {probe}: too few rows")


def test_what_conclugen_run_has_made_is_a_line_and_so_are_folds(tmp_path):
    made(tmp_path / "all/pretraining/m/seed_0", saved=6, done={})
    (tmp_path / "all" / layout.REQUEST).write_text("{}")
    assert as_json(tmp_path)["all"]["state"] == "interrupted"
    (tmp_path / "all" / layout.REPORT).write_text("")
    folded = {"kind": "value", "data": {"name": "faces", "version": "1"}, "num_folds": 2, "test": {"mae": 0.5}}
    (made(tmp_path / "folds", result=folded) / layout.DATA).unlink()
    made(tmp_path / "folds/fold_0", result=folded)
    found = as_json(tmp_path)
    assert set(found) == {"all", "folds"}
    one = found["all"]
    assert (one["kind"], one["method"], one["state"], one["step"]) == ("run", "conclugen", "done", 1)
    assert (found["folds"]["score"]["measure"], found["folds"]["data"]) == ("mae", "faces 1")
    assert set(as_json(tmp_path, "--all")) == {"all", "all/pretraining/m/seed_0", "folds", "folds/fold_0"}


def test_what_is_sorted_by(tmp_path):
    for name, loss, value in (("a", 2.0, 0.5), ("b", 1.0, 0.9), ("c", 3.0, 0.7)):
        results = [{"name": f"{name}, pretrained", "num_labels": 0, "accuracy": [value, value]}]
        made(tmp_path / name, lines=[{"step": 1, "loss": loss}], label_efficiency={"results": results})
        os.utime(tmp_path / name / layout.METRICS, (time.time() + 100 * loss,) * 2)
    made(tmp_path / "d")
    (tmp_path / "e").mkdir()
    order = {
        column: "".join(as_json(tmp_path, f"--sort={column}")) for column in ("loss", "-loss", "score", "age", "folder")
    }
    assert order == {"loss": "bacd", "-loss": "cabd", "score": "bcad", "age": "cabd", "folder": "abcd"}
    assert as_json(tmp_path)["a"]["score"]["of"] == "probe, test, all labels"


def test_mistakes(tmp_path):
    with pytest.raises(ConclugenError, match="no such folder; name one with runs below it"):
        list(listing.below(tmp_path / "x"))
    assert "--sort=los: no such column; did you mean loss?" in table("--sort=los", code=2).stderr
    assert "is one folder too many; name one" in table("a", "b", code=2).stderr
    assert table(tmp_path).stdout == f"no runs below {tmp_path}\n"
    assert json.loads(table(tmp_path, "--json").stdout) == {"folder": str(tmp_path), "runs": []}


def test_objectives_of_no_shipped_configuration_are_named_by_their_terms():
    config = tiny_config("data")
    assert overview.method(json.dumps(config.loss.to_dict())) == "conclugen"
    config.loss.clustering_weight = 0.0
    assert overview.method(json.dumps(config.loss.to_dict())) == "congen"
    config.loss.contrastive_weight = 0.5
    assert overview.method(json.dumps(config.loss.to_dict())) == "contrastive + reconstruction"


def test_a_thousand_runs_take_seconds_and_no_jax(tmp_path):
    for i in range(1000):
        made(tmp_path / f"{i % 10}/{i}", saved=6, lines=[{"step": 6, "epoch": 2, "loss": 1.0}] * 20)
    code = f"import sys; from conclugen_jax.commands import app; app.call('runs', [{str(tmp_path)!r}, '--json'])\n"
    code += "sys.exit(bool({'jax', 'optuna', 'sklearn'} & set(sys.modules)))"
    before = os.times()
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    after = os.times()
    assert len(json.loads(result.stdout)["runs"]) == 1000
    took = after.children_user + after.children_system - before.children_user - before.children_system
    assert took < 6, took  # seconds of a processor; about 1.5 on a laptop

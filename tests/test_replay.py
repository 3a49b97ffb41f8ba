"""Steps that were left out are kept with all they need, and computed again: the same losses, and what went wrong."""

import json
import shutil

import jax
import numpy as np
import pytest

from conclugen_jax import pretrain
from conclugen_jax.data import builders, shards
from conclugen_jax.errors import ConclugenError
from conclugen_jax.pretrain import recorder, replay
from conclugen_jax.runs import log as log_lib
from conclugen_jax.system import files
from tests import helpers
from tests.helpers import Faces, log_without_times, run, tiny_config

BAD = 10  # in the middle of a dispatch
BAD_ROW = 37
VARIANTS = {
    "split update": {
        "data__tier": "device",
        "data__standardize": "split",
        "optimizer__shard": True,
        "loss__instance_weight": 1.0,
    },
    "neighbours": {
        "loss__neighbours": 3,
        "loss__neighbour_probability": 0.5,
        "data__storage_dtype": "bfloat16",
        "augmentation__modality_dropout": 0.2,
    },
    "refreshed": {
        "loss__neighbours": 3,
        "loss__neighbour_space": "representation",
        "loss__neighbour_refresh_epochs": 2,
    },
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return builders.build(Faces(), tmp_path_factory.mktemp("data"))


def config_of(data, **changes):
    return tiny_config(data, **{"data__tier": "shards", "clustering__start_epoch": 1, **changes})


def train(config, folder, **options):
    return pretrain.pretrain(config, folder, devices=jax.devices()[:2], **options)


@pytest.fixture
def bad_step(monkeypatch):
    good = recorder.Recorder._is_good
    monkeypatch.setattr(recorder.Recorder, "_is_good", lambda self, r: r["step"] != BAD and good(self, r))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_replay_gives_the_losses_of_the_step(data, tmp_path, monkeypatch, variant):
    config = config_of(data, **VARIANTS[variant])
    train(config, tmp_path / "good")
    expected = log_without_times(tmp_path / "good")[BAD - 1]
    good = recorder.Recorder._is_good
    monkeypatch.setattr(
        recorder.Recorder, "_is_good", lambda self, r: "left_out" in r or (r["step"] != BAD and good(self, r))
    )
    train(config, tmp_path / "bad")
    path = tmp_path / f"bad/bad_steps/{BAD}.npz"
    monkeypatch.setattr(shards, "open_dataset", None)  # it needs no data
    found = replay.replay(shutil.move(path, tmp_path / "elsewhere.npz"))
    names = [name for name in expected if name.startswith("loss") or name == "gradient_norm"]
    assert len(names) > 3
    assert {n: found.metrics[n] for n in names} == pytest.approx({n: expected[n] for n in names}, rel=1e-4)
    assert (found.step, found.not_finite, found.first) == (BAD, {}, "")
    assert replay.lines(found)[2] == f"step {BAD}: no operation gave a result that is not a number"


@pytest.fixture(scope="module")
def bad_run(data, tmp_path_factory):
    """A run whose row 37 has a NaN, a step in each of five epochs."""
    with helpers.bad_row(BAD_ROW):
        folder = tmp_path_factory.mktemp("bad")
        train(config_of(data, train__num_epochs=5), folder)
    return folder


def test_only_the_newest_are_written(data, tmp_path, monkeypatch):
    kept, keep = [], replay.keep
    monkeypatch.setattr(replay, "keep", lambda run, state, step: kept.append(step) or keep(run, state, step))
    (tmp_path / log_lib.BAD_STEPS).write_text("".join(f'{{"step": {step}}}\n' for step in (9, 2, 3, 12, 4)))
    train(config_of(data), tmp_path)
    assert kept == [4, 9, 12]
    facts = [json.loads(str(np.load(tmp_path / f"bad_steps/{step}.npz")["facts"])) for step in kept]
    assert [x["cluster"] for x in facts] == [False, True, True]  # from the second epoch of four steps on


def test_the_newest_are_kept(bad_run):
    steps = log_lib.left_out_steps(bad_run)
    assert len(steps) == 5
    assert {p.name for p in (bad_run / "bad_steps").iterdir()} == {f"{step}.npz" for step in steps[-replay.KEPT :]}


def test_what_went_wrong_is_named(bad_run):
    step = log_lib.left_out_steps(bad_run)[-1]
    path = bad_run / f"bad_steps/{step}.npz"
    lines = run("replay", path).stdout.splitlines()
    assert lines[0].startswith(f"step {step}: gradient_norm nan")
    assert lines[1] == f"step {step}: the features audio of train{BAD_ROW} are not finite"
    assert "encountered in dot_general, in layers.py, line " in lines[2]
    found = json.loads(run("replay", path, "--json").stdout)
    assert (found["metrics"]["loss"], found["not_finite"]) == ("nan", {"audio": [f"train{BAD_ROW}"]})


def test_the_step_that_ends_a_run_is_kept_too(data, tmp_path, bad_step):
    with pytest.raises(
        ConclugenError, match=f"^step {BAD}: .*; conclugen replay {tmp_path}/bad_steps/{BAD}.npz comput"
    ):
        train(config_of(data, train__max_bad_steps=0), tmp_path)
    assert replay.replay(tmp_path / f"bad_steps/{BAD}.npz").step == BAD
    assert log_lib.left_out_steps(tmp_path) == []


def test_a_disk_without_room_does_not_end_the_run(data, tmp_path, monkeypatch, capsys):
    (tmp_path / log_lib.BAD_STEPS).write_text('{"step": 3}\n')
    write = files.write_atomically

    def full(path, *arguments, **options):
        if path.suffix == ".npz":
            raise ConclugenError(f"{path}: cannot be written (No space left on device)")
        write(path, *arguments, **options)

    monkeypatch.setattr(files, "write_atomically", full)
    assert int(train(config_of(data), tmp_path, debug_nans=True).step) == 16
    assert "warning: step 3 cannot be kept for conclugen replay" in capsys.readouterr().err


def test_files_that_hold_no_step_are_refused(bad_run, tmp_path):
    (path, *_) = (bad_run / "bad_steps").iterdir()
    (tmp_path / "cut.npz").write_bytes(path.read_bytes()[:-5000])
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with np.load(path) as stored:
        arrays = dict(stored)
    newer = json.loads(str(arrays["facts"])) | {"version": 2}
    np.savez(tmp_path / "newer.npz", **arrays | {"facts": np.array(json.dumps(newer))})
    unknown = {name: x for name, x in newer.items() if name != "ids"} | {"version": 1}
    np.savez(tmp_path / "unknown.npz", **arrays | {"facts": np.array(json.dumps(unknown))})
    np.savez(tmp_path / "tree.npz", **arrays | {"state/step/more": np.zeros(1)})
    arrays.pop("state/step")
    np.savez(tmp_path / "less.npz", **arrays)
    for name, message in {
        "none": "no such file; name a file of RUN/bad_steps",
        "cut": "not a step that was kept, or damaged \\(no .npz file, or a part of one\\); name a file of RUN/bad_steps",
        "other": "not a step that was kept, or damaged",
        "newer": "of version 2, expected 1",
        "unknown": "damaged .*missing required field `ids`.*; name a file",
        "tree": "not a step that was kept, or damaged",
        "less": "step is missing",
    }.items():
        with pytest.raises(ConclugenError, match=f"{name}.npz: .*{message}"):
            replay.replay(tmp_path / f"{name}.npz")
    assert "name one file: conclugen replay RUN/bad_steps/STEP.npz" in run("replay", code=2).stderr

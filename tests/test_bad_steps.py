"""Steps whose loss or gradient is not finite are skipped exactly and named, up to a limit in a row."""

import contextlib
import io
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest

from conclugen_jax import pretrain
from conclugen_jax.data import builders
from conclugen_jax.errors import ConclugenError
from conclugen_jax.pretrain import recorder
from conclugen_jax.runs import checkpoint, log as log_lib
from conclugen_jax.system import signals
from tests import helpers
from tests.helpers import Faces, assert_same_bits, log_without_times, tiny_config

DEVICES = jax.devices()[:2]
BAD_ROW = 37


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return builders.build(Faces(), tmp_path_factory.mktemp("data"))


@pytest.fixture
def bad_row():
    with helpers.bad_row(BAD_ROW):
        yield


@pytest.fixture(scope="module")
def bad_run(data, tmp_path_factory):
    """Train over the bad row, with clustering from the second epoch on; return the last state, the folder and the output."""
    folder, said = tmp_path_factory.mktemp("bad"), io.StringIO()
    with helpers.bad_row(BAD_ROW), contextlib.redirect_stderr(said):
        state = pretrain.pretrain(config_of(data, clustering__start_epoch=1), folder, devices=DEVICES)
    return state, folder, said.getvalue()


def config_of(data, **changes):
    # The host tier reads rows when they are needed: a table cached beside the shards would not hold the NaN.
    return tiny_config(data, **{"data__tier": "shards", "clustering__start_epoch": 0, **changes})


def test_a_row_that_is_not_finite_costs_one_step_an_epoch_and_is_named(data, tmp_path, bad_run, bad_row):
    state, folder, said = bad_run
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((state.params, state.batch_stats, state.opt_state)))
    notes = [json.loads(line) for line in (folder / log_lib.BAD_STEPS).read_text().splitlines()]
    assert [(n["step"] - 1) // 4 for n in notes] == [0, 1, 2, 3]  # 4 epochs of 4 steps
    assert all(n["ids"] == [f"train{BAD_ROW}"] and BAD_ROW in n["rows"] and len(n["rows"]) == 16 for n in notes)
    records = log_without_times(folder)
    assert [r["step"] for r in records] == list(range(1, 17))
    assert [r["step"] for r in records if r.get("left_out")] == [n["step"] for n in notes]
    assert all(np.isfinite(r["loss"]) for r in records if not r.get("left_out"))
    assert f"the features of train{BAD_ROW} are not finite; the step is skipped" in said

    # A run that knows the steps beforehand never goes back, and is the same bit for bit.
    (tmp_path / "knowing").mkdir()
    (tmp_path / "knowing" / log_lib.BAD_STEPS).write_text((folder / log_lib.BAD_STEPS).read_text(encoding="utf-8"))
    assert_same_bits(
        pretrain.pretrain(config_of(data, clustering__start_epoch=1), tmp_path / "knowing", devices=DEVICES), state
    )
    assert log_without_times(tmp_path / "knowing") == records


def test_a_step_that_is_left_out_changes_nothing_but_the_count(data, tmp_path):
    (tmp_path / "run").mkdir()
    log_lib.leave_out(tmp_path / "run", {"step": 1})
    config = config_of(data, train__num_epochs=2, clustering__queue_reset="never")
    whole = pretrain.pretrain(config, tmp_path / "whole", devices=DEVICES)
    state = pretrain.pretrain(config, tmp_path / "run", devices=DEVICES)
    assert int(state.step) == int(whole.step) == 8
    first, second = log_without_times(tmp_path / "run")[:2]
    assert first == {"step": 1, "epoch": 0, "left_out": True}
    # What the second step sees is what the first one saw: its terms are those of fresh weights on other rows.
    fresh = log_without_times(tmp_path / "whole")
    assert second["loss/contrastive"] != fresh[1]["loss/contrastive"]
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim == 0]
    assert 7 in {int(x) for x in moments}  # Adam has moved seven times


def test_interrupted_and_resumed_it_leaves_out_the_same(data, tmp_path, bad_run, bad_row, monkeypatch):
    expected, folder, _ = bad_run
    config, take = config_of(data, clustering__start_epoch=1), recorder.Recorder.take

    def take_then_stop(self, dispatch, metrics):
        take(self, dispatch, metrics)
        if dispatch.end_step == 10:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(recorder.Recorder, "take", take_then_stop)
        with pytest.raises(signals.Interrupted):
            pretrain.pretrain(config, tmp_path / "run", devices=DEVICES)
    assert_same_bits(pretrain.pretrain(config, tmp_path / "run", devices=DEVICES), expected)
    assert log_without_times(tmp_path / "run") == log_without_times(folder)


@pytest.mark.parametrize(("allowed", "message"), [(0, r"^step 9: the loss"), (2, r"^step 11: .*so were the 2 before")])
def test_a_run_that_stays_bad_ends_with_its_last_good_checkpoint(data, tmp_path, allowed, message, monkeypatch):
    monkeypatch.setattr(recorder.Recorder, "_is_good", lambda self, r: "left_out" in r or r["step"] <= 8)
    config, check, checked = config_of(data, train__max_bad_steps=allowed), checkpoint.Checkpoints.check_space, []
    monkeypatch.setattr(checkpoint.Checkpoints, "check_space", lambda *a: (checked.append(a), check(*a)))
    with pytest.raises(
        ConclugenError, match=message + ".*lower config.optimizer.learning_rate.*conclugen replay .*npz"
    ):
        pretrain.pretrain(config, tmp_path, devices=DEVICES)
    assert len(checked) == 1  # not again while a save may be under way, whose files come and go
    assert log_lib.left_out_steps(tmp_path) == list(range(9, 9 + allowed))
    with checkpoint.Checkpoints(tmp_path, read_only=True) as saved:
        assert saved.steps() == [4, 8]


def test_a_disk_without_room_leaves_no_configuration(data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 0))
        with pytest.raises(ConclugenError, match=r"but 0.00 GiB are free; free space"):
            pretrain.pretrain(config_of(data), tmp_path / "run", devices=DEVICES)
    assert [p.name for p in (tmp_path / "run").rglob("*") if p.is_file()] == []
    pretrain.pretrain(config_of(data, seed=3, train__num_epochs=3), tmp_path / "run", devices=DEVICES)


def test_a_loss_that_stands_out_is_left_out_by_choice(data, tmp_path, monkeypatch):
    monkeypatch.setattr(recorder, "USUAL_STEPS", 4)
    config = config_of(data, train__num_epochs=3, clustering__start_epoch=2, train__max_loss_ratio=1.02)
    pretrain.pretrain(config, tmp_path / "run", devices=DEVICES)
    left_out = log_lib.left_out_steps(tmp_path / "run")
    losses = [r.get("loss") for r in log_without_times(tmp_path / "run")]
    assert 9 < min(left_out) <= 12  # clustering joins in epoch 2 and adds its term
    assert [i + 1 for i, x in enumerate(losses) if x is None] == left_out
    for i in range(5, 12):
        before = [x for x in losses[:i] if x is not None][-4:]
        assert losses[i] is None or losses[i] <= 1.02 * np.mean(before)


def test_a_damaged_note_is_refused(data, tmp_path):
    (tmp_path / log_lib.BAD_STEPS).write_text('{"step": 1}\n{"st')
    with pytest.raises(ConclugenError, match=r"bad_steps.jsonl, line 2: not a JSON object.*choose another --workdir"):
        pretrain.pretrain(config_of(data), tmp_path, devices=DEVICES)


def test_the_first_operation_that_gives_no_number_is_named_by_choice(data, tmp_path, bad_row, capsys):
    config = config_of(data, train__num_epochs=2)
    state = pretrain.pretrain(config, tmp_path / "run", devices=DEVICES, debug_nans=True)
    said = [line for line in capsys.readouterr().err.splitlines() if "invalid value (nan)" in line]
    steps = log_lib.left_out_steps(tmp_path / "run")
    assert [line.split(":")[0] for line in said] == [f"step {step}" for step in steps]
    # The NaN of the features meets the first product of the audio's network.
    assert all("encountered in dot_general" in line and ", in layers.py, line " in line for line in said), said
    assert_same_bits(pretrain.pretrain(config, tmp_path / "without", devices=DEVICES), state)

"""Mirrors of the log: what they get, that a resumed run goes on in the same one, and that none of them ends a run."""

import json
import logging
import sys
import types

import pytest

from conclugen_jax.errors import ConclugenError
from conclugen_jax.runs import log as log_lib

RECORDS = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]


class Calls(list):
    """A fake package: notes what it is told, and fails at one kind of call if that is wanted."""

    def __init__(self, fails=""):
        super().__init__()
        self.fails = fails

    def note(self, name, /, *arguments, **named):
        self.append((name, *arguments, named))
        if name == self.fails:
            raise RuntimeError(f"{name} failed")


def wandb(calls):
    def init(**named):
        calls.note("init", **named)
        run = types.SimpleNamespace(id=named["id"] or "new7")
        run.log = lambda values, step: calls.note("log", values, step)
        run.finish = lambda: calls.note("finish")
        return run

    return types.SimpleNamespace(init=init)


def mlflow(calls):
    def start_run(**named):
        calls.note("start_run", **named)
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=named.get("run_id", "new7")))

    return types.SimpleNamespace(
        start_run=start_run,
        log_metrics=lambda values, step: calls.note("log_metrics", values, step),
        end_run=lambda: calls.note("end_run"),
    )


def tensorboard(calls):
    def writer(*_, **named):
        calls.note("SummaryWriter", **named)
        return types.SimpleNamespace(
            add_scalar=lambda *a: calls.note("add_scalar", *a), close=lambda: calls.note("close")
        )

    return types.SimpleNamespace(SummaryWriter=writer)


FAKES = {
    "wandb": ("wandb", wandb, ("init", "log", "finish")),
    "mlflow": ("mlflow", mlflow, ("start_run", "log_metrics", "end_run")),
    "TensorBoard": ("tensorboardX", tensorboard, ("SummaryWriter", "add_scalar", "close")),
}
TRACKERS = ("wandb", "mlflow")


def write(folder, tracker, step=0, records=RECORDS):
    wanted = {"tensorboard": True} if tracker == "TensorBoard" else {"tracker": tracker}
    with log_lib.MetricsLog(folder, step, **wanted) as log:
        for record in records:
            log.write([record])
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("tracker", TRACKERS)
def test_records_arrive_with_their_steps_and_a_resumed_run_goes_on_in_the_same_one(tmp_path, monkeypatch, tracker):
    package, fake, (begin, log, end) = FAKES[tracker]
    monkeypatch.setitem(sys.modules, package, fake(calls := Calls()))
    write(tmp_path, tracker)
    assert [c[0] for c in calls] == [begin, log, log, end]
    assert [c[1:3] for c in calls if c[0] == log] == [({"loss": 2.0}, 1), ({"loss": 1.0}, 2)]
    write(tmp_path, tracker, step=2, records=[{"step": 3, "loss": 0.5}])
    again = calls[4]
    assert again[0] == begin
    assert "new7" in again[-1].values()
    assert tmp_path.name in calls[0][-1].values()


@pytest.mark.parametrize("tracker", FAKES)
@pytest.mark.parametrize("point", [0, 1, 2])
def test_a_tracker_that_fails_is_given_up_with_one_warning(tmp_path, monkeypatch, caplog, tracker, point):
    package, fake, names = FAKES[tracker]
    monkeypatch.setitem(sys.modules, package, fake(calls := Calls(fails=names[point])))
    with caplog.at_level(logging.WARNING):
        assert write(tmp_path, tracker) == RECORDS
    (warning,) = caplog.records
    assert f"{tracker} is dropped" in warning.getMessage()
    assert f"{names[point]} failed" in warning.getMessage()
    assert [c[0] for c in calls].count(names[point]) == 1


def test_event_files_that_cannot_be_opened_are_a_warning_too(tmp_path, caplog):
    (tmp_path / log_lib.FOLDER).write_text("in the way")
    with caplog.at_level(logging.WARNING), log_lib.MetricsLog(tmp_path, 0, tensorboard=True) as log:
        log.write(RECORDS)
    assert len(caplog.records) == 1
    assert "TensorBoard is dropped" in caplog.text


@pytest.mark.parametrize("tracker", FAKES)
def test_a_package_that_is_missing_is_said_before_training(tmp_path, monkeypatch, tracker):
    package = FAKES[tracker][0]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConclugenError, match=rf"config.train.* but.*pip install {package}"):
        write(tmp_path, tracker)


def test_a_damaged_note_of_the_run_starts_a_new_one(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", wandb(calls := Calls()))
    (tmp_path / log_lib.RUN_ID).write_text('{"wandb": 3')
    write(tmp_path, "wandb")
    assert calls[0][-1]["id"] is None

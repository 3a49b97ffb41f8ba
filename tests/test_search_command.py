"""The search as a command: killed, stopped, shared by processes; and the hook of pretraining that it is built on."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from conclugen_jax import pretrain
from conclugen_jax.commands import app
from conclugen_jax.pretrain import recorder
from conclugen_jax.runs import checkpoint, workdir as workdir_lib
from conclugen_jax.system import signals
from tests.helpers import QUICK_COMPILATION, log_without_times, tiny_config
from tests.searching import DEVICES, RATES, make_config, opened, run

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return make_config(tmp_path_factory.mktemp("data"))


# The hook of pretraining.


def test_the_hook_has_every_epoch_once_with_its_means_also_where_a_run_was_stopped_in_an_epoch(
    config, tmp_path, monkeypatch
):
    config = tiny_config(config.data.path, clustering__start_epoch=1, train__num_epochs=3)
    seen, take = {}, recorder.Recorder.take

    def note(epoch, means, state):
        assert int(state.step) == 4 * (epoch + 1)
        records = log_without_times(tmp_path)
        assert [r["step"] for r in records if r["epoch"] == epoch] == [4 * epoch + i for i in range(1, 5)]
        assert not (tmp_path / checkpoint.FOLDER / str(4 * (epoch + 1))).exists()
        assert epoch not in seen
        seen[epoch] = means

    def take_then_stop(self, dispatch, metrics):
        take(self, dispatch, metrics)
        if dispatch.end_step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(recorder.Recorder, "take", take_then_stop)
        with pytest.raises(signals.Interrupted):
            pretrain.pretrain(config, tmp_path, devices=DEVICES, on_epoch=note)
    assert sorted(seen) == [0]
    pretrain.pretrain(config, tmp_path, devices=DEVICES, on_epoch=note)
    assert sorted(seen) == [0, 1, 2]
    records = log_without_times(tmp_path)
    for epoch, means in seen.items():
        for name in ("loss", "loss/contrastive", "loss/reconstruction", "loss/clustering"):
            values = [r[name] for r in records if r["epoch"] == epoch and name in r]
            # Clustering: not before epoch 1, and not in an epoch's first step.
            assert len(values) == (4 if name != "loss/clustering" else 3 * (epoch >= 1))
            assert (name in means) == bool(values)
            if values:
                assert means[name] == pytest.approx(np.mean(values), rel=1e-6)


def test_what_the_hook_raises_ends_the_run_in_order(config, tmp_path):
    def refuse(epoch, means, state):
        if epoch == 1:
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        pretrain.pretrain(config, tmp_path, devices=DEVICES, on_epoch=refuse)
    with workdir_lib.claim(tmp_path), checkpoint.Checkpoints(tmp_path, read_only=True) as saved:
        assert saved.steps() == [4]
    assert [r["step"] for r in log_without_times(tmp_path)] == list(range(1, 9))


# The command.


@pytest.fixture(scope="module")
def place(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("command")
    (folder / "config.py").write_text(
        "from conclugen_jax.study import search_space\nfrom configs import base\n\ndef get_config():\n"
        f"    return search_space.with_overrides(base.get_config(), {dict(flat(config))!r})\n"
    )
    (folder / "space.json").write_text(json.dumps(RATES))
    return folder


def flat(config):
    for section, keys in config.items():
        if hasattr(keys, "items"):
            yield from ((f"{section}.{key}", value) for key, value in keys.items())
        else:
            yield section, keys


def begin(command, folder, *more):
    """Start ``search``, or another command that works in the folder of a study, in a process of its own."""
    kind = "search" if command == "search" else "study"
    return subprocess.Popen(
        [sys.executable, "-m", f"launch.{command}", f"--{kind}={folder}", *more],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": QUICK_COMPILATION, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start(place, folder, *more):
    return begin("search", folder, f"--config={place}/config.py", f"--space={place}/space.json", *more)


def wait_for(path, pattern, process):
    deadline = time.monotonic() + 120
    while not list(path.glob(pattern)) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.slow
def test_killed_stopped_and_shared_searches_end_as_one_that_nothing_disturbed(place, config, tmp_path):
    whole = run(config, tmp_path / "whole", 2)
    broken = tmp_path / "broken"
    killed = start(place, broken, "--trials=2")
    wait_for(broken, "trials/0000/checkpoints/[0-9]*", killed)
    killed.kill()
    killed.communicate()
    stopped = start(place, broken, "--trials=2")
    wait_for(broken, "trials/0001", stopped)
    stopped.send_signal(signal.SIGINT)
    _, errors = stopped.communicate(timeout=120)
    assert stopped.returncode in (0, 130), errors
    assert "Traceback" not in errors
    last = start(place, broken, "--trials=2")
    output, errors = last.communicate(timeout=120)
    assert last.returncode == 0, errors
    result = json.loads((broken / "result.json").read_text())
    assert result["trials"] == whole["trials"]
    for t in whole["trials"]:
        name = f"trials/{t['number']:04d}"
        assert log_without_times(broken / name) == log_without_times(tmp_path / "whole" / name)
    # The command in the result gives the best trial again.
    assert result["command"] in output
    program, *arguments = shlex.split(result["command"])
    assert program == "conclugen"
    environment = {**os.environ, "XLA_FLAGS": QUICK_COMPILATION, "PYTHONPATH": str(ROOT)}
    again = [sys.executable, "-m", "conclugen_jax", *arguments]
    subprocess.run(again, cwd=ROOT, env=environment, check=True, capture_output=True)
    assert log_without_times(broken / "best") == log_without_times(Path(result["best"]["workdir"]))


@pytest.mark.slow
def test_two_workers_do_as_many_trials_as_wanted(place, tmp_path):
    process = start(place, tmp_path, "--trials=5", "--workers=2")
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    result = json.loads((tmp_path / "result.json").read_text())
    assert [t["number"] for t in result["trials"]] == list(range(5))
    assert result["num_trials"]["finished"] + result["num_trials"]["pruned"] == 5
    assert errors.count("from random weights") == 5  # none was run twice
    assert "[0] trial" in errors
    assert "[1] trial" in errors
    assert "pretraining_loss, minimize" in output


@pytest.mark.slow
def test_ctrl_c_ends_workers_with_130_and_the_search_goes_on(place, tmp_path):
    process = start(place, tmp_path, "--trials=50", "--workers=2", "--config.train.num_epochs=400")
    wait_for(tmp_path, "trials/*/metrics.jsonl", process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    with opened(tmp_path) as trials, trials.taken(0) as trial:
        assert trial is not None  # nobody is at work on it any more


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trials=0"], "flag --trials=0"),
        (["--objective=accuracy"], "the objective 'accuracy' is unknown"),
        (["--space=/nowhere.json"], "/nowhere.json: cannot be read"),
        (["--workers=2", "--config.train.batch_size=1000"], "only 64 usable examples"),
    ],
)
def test_mistakes_end_in_one_sentence(place, tmp_path, arguments, message):
    process = start(place, tmp_path / "search", *arguments)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2, errors
    assert "Traceback" not in errors
    assert errors.strip().splitlines()[-1].startswith("error: ")
    assert errors.count(message) == 1
    assert not (tmp_path / "search").exists()


def test_without_optuna_one_sentence_says_what_to_install(place, tmp_path, monkeypatch, capfd):
    for name in ("search", "trials"):
        monkeypatch.delitem(sys.modules, f"conclugen_jax.study.{name}")
        monkeypatch.delattr(f"conclugen_jax.study.{name}")
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert app.call("search", [f"--config={place}/config.py", f"--search={tmp_path / 'search'}"]) == 2
    assert "needs optuna, which is not installed; pip install 'conclugen_jax[search]'" in capfd.readouterr().err
    assert not (tmp_path / "search").exists()

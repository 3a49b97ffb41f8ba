"""Several processes train as one does, stop together, and only the first writes."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from conclugen_jax import pretrain
from conclugen_jax.data import builders, shards
from conclugen_jax.errors import ConclugenError
from conclugen_jax.runs import checkpoint
from conclugen_jax.system import processes
from conclugen_jax.train import feed, parallel
from tests.helpers import QUICK_COMPILATION, Faces, assert_same_bits, close, flat, log_without_times, tiny_config
from tests.run_processes import STOP_AFTER, config_of

ROOT = Path(__file__).parent.parent
DEVICES = jax.devices()[:4]
LIMIT = 600


def free_port():
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def start(*arguments, count=2):
    """Python with some arguments as so many processes of two devices each; use :func:`ended` on them."""
    port, shared = free_port(), {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    shared |= {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {QUICK_COMPILATION}",
        processes.COUNT: str(count),
    }
    shared[processes.ADDRESS] = f"127.0.0.1:{port}"
    return [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=ROOT,
            env={**shared, processes.INDEX: str(i)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for i in range(count)
    ]


def ended(started):
    """Exit codes and last lines of standard error; none is left behind, whatever happens."""
    try:
        errors = [p.communicate(timeout=LIMIT)[1] for p in started]
        return [p.returncode for p in started], errors
    finally:
        for p in started:
            p.kill()
            p.wait()
            p.stderr.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return builders.build(Faces(missing=0.3), tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def together(data, tmp_path_factory):
    """Runs of two processes with two devices each, and how the processes ended."""
    folder = tmp_path_factory.mktemp("together")
    return folder, *ended(start("-m", "tests.run_processes", data, folder))


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """Runs of one process with four devices, by tier."""
    folders = {tier: tmp_path_factory.mktemp(tier) for tier in ("device", "host")}
    for tier, folder in folders.items():
        pretrain.pretrain(config_of(data, tier), folder, devices=DEVICES)
    return folders


def checkpoint_of(workdir, step):
    return checkpoint.Checkpoints(workdir, read_only=True).restore_tree(step)


def assert_alike(workdir, expected):
    """Logs and all checkpoints of two runs are equal but for the order of sums over devices."""
    log, expected_log = log_without_times(workdir), log_without_times(expected)
    assert len(log) == len(expected_log) == 12
    for ours, theirs in zip(log, expected_log, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    steps = checkpoint.Checkpoints(expected, read_only=True).steps()
    assert steps[-1] == 12
    for step in steps:
        (tree, info), (expected_tree, expected_info) = (checkpoint_of(d, step) for d in (workdir, expected))
        for path, x in flat(expected_tree).items():
            # What has a gradient of zero, such as a bias before BatchNorm, is rounding, and so are its moments.
            assert close(flat(tree)[path], x, 1e-6) or np.abs(flat(tree)[path] - x).max() < 1e-6, path
        assert info["epoch_sums"] == pytest.approx(expected_info["epoch_sums"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("tier", ["device", "host"])
def test_two_processes_train_as_one_does(together, alone, tier):
    assert_alike(together[0] / tier, alone[tier])


@pytest.mark.slow
def test_a_signal_to_one_stops_all_after_the_same_dispatch_and_the_run_goes_on(together):
    folder, _, errors = together
    stopped = STOP_AFTER + 2  # the others learn of it one dispatch later
    assert [r["step"] for r in log_without_times(folder / "interrupted")] == list(range(1, stopped + 1))
    assert checkpoint.Checkpoints(folder / "interrupted", read_only=True).steps() == [4, stopped]
    assert "stopped after step 6" in errors[0]
    assert log_without_times(folder / "shards") == log_without_times(folder / "host")
    tree, expected = (checkpoint_of(folder / tier, 12)[0] for tier in ("shards", "host"))
    assert_same_bits(tree, expected)


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_in_one(together, alone, data, tmp_path):
    workdir = shutil.copytree(together[0] / "interrupted", tmp_path / "run")
    pretrain.pretrain(config_of(data, "shards"), workdir, devices=DEVICES)
    shutil.rmtree(workdir / checkpoint.FOLDER / str(STOP_AFTER + 2))
    assert_alike(workdir, alone["host"])


@pytest.mark.slow
def test_only_the_first_process_shows_and_writes(together):
    folder, _, errors = together
    assert "4 cpu device(s) of 2 processes" in errors[0]
    assert "pretrain" not in errors[1]
    assert re.fullmatch(r"process \d+ on .+ since .+\n", (folder / "owner").read_text())


@pytest.mark.slow
def test_processes_of_different_configurations_all_end_with_one_sentence(together):
    folder, codes, errors = together
    assert codes == [2, 2], errors
    last = [e.strip().splitlines()[-1] for e in errors]
    sentence = "this process differs from process 0 (config.seed: 0 -> 1); start all with the same command and data"
    assert last == [f"error: process 1: {sentence}", f"error: {sentence}"]
    assert not any("Traceback" in e for e in errors)
    assert not (folder / "different").exists()


@pytest.fixture(scope="module")
def endless(data, tmp_path_factory):
    """Configuration of a run that lasts until it is stopped."""
    path = tmp_path_factory.mktemp("endless") / "config.py"
    changes = {"train.num_epochs": 100_000, "checkpoint.every_epochs": 100_000}
    path.write_text(
        "from tests.run_processes import config_of\n\n\ndef get_config():\n"
        f"    config = config_of({str(data)!r}, 'device')\n"
        f"    config.update_from_flattened_dict({changes})\n    return config\n"
    )
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("number", "codes"), [(signal.SIGTERM, [143, 143]), (signal.SIGKILL, [1, -9])])
def test_launchers_end_with_the_one_that_is_stopped_or_killed(endless, tmp_path, number, codes):
    arguments = f"--config={endless}", f"--workdir={tmp_path / 'run'}", "--distributed=auto"
    started = start("-m", "launch.pretrain", *arguments)
    log, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + LIMIT
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline and started[0].poll() is None:
        time.sleep(0.1)
    began = time.monotonic()
    started[1].send_signal(number)
    found, errors = ended(started)
    assert found == codes, errors
    assert time.monotonic() - began < 30
    assert not any("Traceback" in e for e in errors)
    last = errors[0].strip().splitlines()[-1]
    if number == signal.SIGKILL:
        assert last.startswith("error: process 1 is gone"), errors[0]
    else:
        assert last.startswith("stopped after step"), errors[0]
        assert f"after step {max(int(p.name) for p in (tmp_path / 'run/checkpoints').iterdir())};" in last


def test_each_process_reads_the_rows_of_its_own_devices_alone(data, monkeypatch):
    stream = shards.ShardStream(shards.open_dataset(data), "train", ["audio"])
    batches = feed.Feed(stream, tiny_config(data), DEVICES)
    dispatch = next(batches.plan(0))
    whole = jax.tree.map(np.asarray, batches._rows_of(dispatch))
    read = []
    rows = stream.rows
    monkeypatch.setattr(stream, "rows", lambda indices, variants: read.append(len(indices)) or rows(indices, variants))
    monkeypatch.setattr(parallel, "shard", lambda tree, devices: tree)
    for own in ((0, 1), (2, 3), (1, 3)):
        monkeypatch.setattr(parallel, "own_devices", lambda devices, own=own: {i: devices[i] for i in own})
        part = batches._rows_of(dispatch)
        assert read.pop() == 2 * 16 // 2  # steps of a dispatch x half of a batch
        assert_same_bits(part, jax.tree.map(lambda x, own=own: x[list(own)], whole))


def test_other_data_or_unequal_devices_are_refused(data, tmp_path, monkeypatch):
    config, other = config_of(data, "host"), builders.build(Faces(seed=1), tmp_path)
    manifests = [shards.open_dataset(path).manifest for path in (data, other)]
    parallel.check_alike(config, manifests[1])  # alone
    sent = []
    monkeypatch.setattr(processes, "several", lambda: True)
    monkeypatch.setattr(processes, "wait", lambda: None)
    monkeypatch.setattr(processes, "json_of_main", lambda value: sent.append(value) or value)
    parallel.check_alike(config, manifests[0])
    monkeypatch.setattr(processes, "json_of_main", lambda value: sent[0])
    parallel.check_alike(config, manifests[0])
    elsewhere = config.copy_and_resolve_references()
    elsewhere.data.path = "/elsewhere"
    parallel.check_alike(elsewhere, manifests[0])
    with pytest.raises(ConclugenError, match=r"not the data set faces 1\.0\.0 of process 0.*start all with the same"):
        parallel.check_alike(config, manifests[1])

    sent[0]["facts"] = {"split": "test"}
    with pytest.raises(
        ConclugenError, match=r"process 0 \(split: test -> validation\); start all with the same command"
    ):
        parallel.check_alike(config, manifests[0], split="validation")

    class Device:
        def __init__(self, process_index):
            self.process_index = process_index

    monkeypatch.setattr(jax, "devices", lambda: [Device(0), Device(0), Device(1)])
    with pytest.raises(ConclugenError, match="the processes have 2, 1 devices"):
        parallel.check_alike(config, manifests[0])

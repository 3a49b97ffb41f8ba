"""Several processes train as one does, stop together, end together, and only the first writes."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from conclugen_jax import pretrain
from conclugen_jax.data import builders, shards
from conclugen_jax.errors import ConclugenError
from conclugen_jax.pretrain import setup
from conclugen_jax.run import checkpoint
from conclugen_jax.system import cluster, party, processes
from conclugen_jax.train import feed, parallel
from tests.helpers import QUICK_COMPILATION, Faces, assert_same_bits, close, flat, log_without_times, tiny_config
from tests.run_processes import STOP_AFTER, config_of

ROOT = Path(__file__).parent.parent
DEVICES = jax.devices()[:4]
LIMIT = 240


def free_port():
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def start(*arguments, count=2):
    """Python with some arguments as so many processes of two devices each; use :func:`ended` on them."""
    port, shared = free_port(), {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    shared |= {"XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {QUICK_COMPILATION}", cluster.COUNT: str(count)}
    shared[cluster.ADDRESS] = f"127.0.0.1:{port}"
    return [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=ROOT,
            env={**shared, cluster.INDEX: str(i)},
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
            assert close(flat(tree)[path], x, 1e-6), path
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
    sentence = "the configuration differs from that of process 0 (config.seed: 0 -> 1); start all with the same command"
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
    sent = []
    monkeypatch.setattr(processes, "text_of_main", lambda text: sent.append(text) or text)
    setup.check_alike(config, manifests[0])
    monkeypatch.setattr(processes, "text_of_main", lambda text: sent[0])
    setup.check_alike(config, manifests[0])
    elsewhere = config.copy_and_resolve_references()
    elsewhere.data.path = "/elsewhere"
    setup.check_alike(elsewhere, manifests[0])
    with pytest.raises(ConclugenError, match=r"faces 1\.0\.0 here is not the data set that process 0 has"):
        setup.check_alike(config, manifests[1])

    class Device:
        def __init__(self, process_index):
            self.process_index = process_index

    monkeypatch.setattr(jax, "devices", lambda: [Device(0), Device(0), Device(1)])
    with pytest.raises(ConclugenError, match="the processes have 2, 1 devices"):
        setup.check_alike(config, manifests[0])


def place(index, count=2, port=None):
    return cluster.Place(f"127.0.0.1:{port or free_port()}", count, index)


def test_a_process_without_its_coordinator_ends_in_time():
    began, here = time.monotonic(), place(1)
    with pytest.raises(ConclugenError, match=rf"{here.address}: process 0 could not be reached there within 1 s"):
        party._call(here, 1)
    assert time.monotonic() - began < 3


def test_a_host_that_is_not_there():
    with pytest.raises(ConclugenError, match=r"nowhere\.invalid:1234: process 0 could not be reached"):
        party._call(cluster.Place("nowhere.invalid:1234", 2, 1), 1)


def meet(*places, timeout=1.5, first=lambda: None):
    """What comes of processes that meet: a list of lines or the error of each."""
    found = {}

    def go(i, here):
        try:
            lines = party.meet(here, timeout)
            found[i] = len(lines)
            time.sleep(0.2)
            for line in lines:
                line.close()
        except ConclugenError as e:
            found[i] = str(e)

    threads = [threading.Thread(target=go, args=x) for x in enumerate(places)]
    threads[0].start()
    first()
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[i] for i in range(len(places))]


def test_all_processes_meet_whoever_else_calls():
    port = free_port()

    def stranger():
        time.sleep(0.2)  # until process 0 listens
        line = party.Line(socket.create_connection(("127.0.0.1", port), timeout=1))
        line.send("GET / HTTP/1.1")
        assert line.receive(1) is None
        line.close()

    assert meet(place(0, 3, port), place(1, 3, port), place(2, 3, port), first=stranger) == [2, 1, 1]


def test_those_who_came_hear_who_did_not():
    port = free_port()
    found = meet(place(0, 4, port), place(2, 4, port), timeout=1)
    assert found[0] == found[1]
    assert found[0].startswith(f"process 1, 3 of 4 did not come to 127.0.0.1:{port} within 1 s")


@pytest.mark.parametrize("second", [(1, 3), (2, 4), (0, 3)])
def test_a_number_that_comes_twice_or_of_another_count(second):
    port = free_port()
    found = meet(place(0, 3, port), place(1, 3, port), cluster.Place(f"127.0.0.1:{port}", second[1], second[0]))
    if second[0] == 0:
        assert any("cannot listen there" in str(f) for f in found)
    else:
        assert "each of 1 to 2 of 3 is expected, once" in found[0]


PARTY = """
import os, sys, time
from conclugen_jax.system import cluster, party, processes
place = cluster.from_environment()
lines = party.meet(place, 20)
end, joined = os._exit, time.monotonic()

def slow_exit(code):
    time.sleep(place.index != FIRST)
    print(time.monotonic() - joined, file=sys.stderr, flush=True)
    end(code)

os._exit = slow_exit
processes._party = party.Party(place, lines)
if place.index == FIRST:
    ACTION
if place.index != FIRST:
    time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, 1])
def test_all_end_with_the_one_that_fails_and_process_0_last(first):
    code = PARTY.replace("FIRST", str(first)).replace("ACTION", 'processes.fail("no luck", 2)')
    codes, errors = ended(start("-c", code, count=3))
    assert codes == [2] * 3
    sentences, seconds = zip(*(e.splitlines() for e in errors), strict=True)
    assert list(sentences) == [f"error: {'' if i == first else f'process {first}: '}no luck" for i in range(3)]
    # Whoever is told takes a second to end here, and process 0 waits for the others before it does.
    assert float(seconds[0]) > 0.9 + (first != 0)


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, 1])
def test_all_end_where_one_is_gone(first):
    started = start("-c", PARTY.replace("FIRST", str(first)).replace("ACTION", "end(9)"), count=3)
    codes, errors = ended(started)
    assert codes == [9 if i == first else 1 for i in range(3)]
    assert all(e.startswith(f"error: process {first} is gone") for i, e in enumerate(errors) if i != first)


@pytest.mark.slow
def test_who_is_done_waits_for_the_others():
    action = """
    if place.index == 1:
        time.sleep(1)
    processes.leave()
    print(time.monotonic() - joined, file=sys.stderr)
"""
    code = PARTY.replace("FIRST", "place.index").replace("    ACTION", action)
    codes, errors = ended(start("-c", code, count=3))
    assert codes == [0] * 3
    assert min(float(errors[0]), float(errors[2])) > 0.5


CLUSTERS = [
    ({}, "no cluster here; set JAX_COORDINATOR_ADDRESS=HOST:PORT"),
    ({"JAX_PROCESS_ID": "1"}, "JAX_COORDINATOR_ADDRESS is not set"),
    ({"JAX_PROCESS_ID": "1", "JAX_COORDINATOR_ADDRESS": "a:1"}, "JAX_NUM_PROCESSES is not set"),
    ({"JAX_PROCESS_ID": "x", "JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2"}, "JAX_PROCESS_ID is x"),
    ({"JAX_PROCESS_ID": "2", "JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2"}, "they count from 0"),
    ({"JAX_PROCESS_ID": "0", "JAX_COORDINATOR_ADDRESS": "a", "JAX_NUM_PROCESSES": "2"}, "it must be HOST:PORT"),
    ({"JAX_PROCESS_ID": "0", "JAX_COORDINATOR_ADDRESS": "a:99999", "JAX_NUM_PROCESSES": "2"}, "it must be HOST:PORT"),
]
SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "node[007-008]",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}
NODES = {"node1": "node1", "node1,other2": "node1", "node[001,007-015],other": "node001"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
CONTACTS = {
    "1531576320.0;tcp://10.96.0.1,10.148.0.1,10.108.0.1:34911": "10.96.0.1:62624",
    "1314521088.0;tcp6://[fe80::b9b:ac5d:9cf0:b858,2620:10d:c083:150e::3000:2]:43370": "[fe80::b9b:ac5d:9cf0:b858]:62880",
}


@pytest.fixture
def no_cluster(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "KUBERNETES_", "TPU_", "JAX_COORDINATOR", "JAX_NUM_", "JAX_PROCESS_")):
            monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(("environment", "message"), CLUSTERS)
def test_an_environment_that_does_not_say_it_is_refused(no_cluster, environment, message):
    for name, value in environment.items():
        no_cluster.setenv(name, value)
    with pytest.raises(ConclugenError) as refused:
        cluster.from_environment()
    assert message in str(refused.value)


def test_what_the_environment_says(no_cluster):
    for name, value in SLURM.items():
        no_cluster.setenv(name, value)
    assert cluster.from_environment() == cluster.Place("node007:61441", 16, 9, [1])
    for nodes, host in NODES.items():
        no_cluster.setenv("SLURM_STEP_NODELIST", nodes)
        assert cluster.from_environment().address == f"{host}:61441"
    no_cluster.setenv(cluster.ADDRESS, "chosen:5")
    assert cluster.from_environment() == cluster.Place("chosen:5", 16, 9, [1])
    for name, value in zip((cluster.ADDRESS, cluster.COUNT, cluster.INDEX), ("h:1", "3", "2"), strict=True):
        no_cluster.setenv(name, value)
    assert cluster.from_environment() == cluster.Place("h:1", 3, 2)


def test_what_open_mpi_says(no_cluster):
    for name, value in OPEN_MPI.items():
        no_cluster.setenv(name, value)
    for contact, address in CONTACTS.items():
        no_cluster.setenv("OMPI_MCA_orte_hnp_uri", contact)
        assert cluster.from_environment() == cluster.Place(address, 4, 3, [1])


@pytest.mark.parametrize("variables", [SLURM, *({**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": x} for x in CONTACTS)])
def test_jax_finds_the_same_place(no_cluster, variables):
    from jax._src import clusters  # what jax.distributed.initialize calls by itself; it has no public name

    for name, value in variables.items():
        no_cluster.setenv(name, value)
    address, *others = clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, 1)
    found = cluster.from_environment()
    assert (found.host, found.port) == (address.rpartition(":")[0], int(address.rpartition(":")[2]))
    assert others == [found.count, found.index, found.devices]


def test_a_process_alone_is_the_main_one_and_waits_for_nobody():
    assert processes.is_main()
    assert not processes.several()
    processes.fail("nothing happens", 2)
    processes.leave()
    tree = {"x": np.array([-0.0, np.nan])}
    assert processes.of_main(tree) is tree
    assert parallel.Largest(DEVICES)(15) == 15

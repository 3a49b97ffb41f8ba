"""Processes find each other, hear of each other, and all end with the one that fails."""

import os
import socket
import threading
import time

import jax
import numpy as np
import pytest

from conclugen_jax.errors import ConclugenError
from conclugen_jax.system import processes
from conclugen_jax.train import parallel
from tests.test_processes import ended, free_port, start


def place(index, count=2, port=None):
    return processes.Place(f"127.0.0.1:{port or free_port()}", count, index)


def test_a_process_without_its_coordinator_ends_in_time():
    began, here = time.monotonic(), place(1)
    with pytest.raises(ConclugenError, match=rf"{here.address}: process 0 could not be reached there within 1 s"):
        processes._call(here, 1)
    assert time.monotonic() - began < 3


def test_a_host_that_is_not_there():
    with pytest.raises(ConclugenError, match=r"nowhere\.invalid:1234: process 0 could not be reached"):
        processes._call(processes.Place("nowhere.invalid:1234", 2, 1), 1)


def meet(*places, timeout=1.5, first=lambda: None):
    """What comes of processes that meet: a list of lines or the error of each."""
    found = {}

    def go(i, here):
        try:
            lines = processes.meet(here, timeout)
            found[i] = len(lines)
            time.sleep(0.2)
            for line in lines.values():
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
        line = processes.Line(socket.create_connection(("127.0.0.1", port), timeout=1))
        line.send(request="GET / HTTP/1.1")
        assert line.receive(1) == {}
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
    found = meet(place(0, 3, port), place(1, 3, port), processes.Place(f"127.0.0.1:{port}", second[1], second[0]))
    if second[0] == 0:
        assert any("cannot listen there" in str(f) for f in found)
    else:
        assert "each of 1 to 2 of 3 is expected, once" in found[0]


PARTY = """
import os, sys, threading, time
from conclugen_jax.system import processes
start = threading.Thread.start
threading.Thread.start = lambda thread: (start(thread), time.sleep(place.index == 0))  # one hears before the next is there
place = processes.from_environment()
lines = processes.meet(place, 20)
end, joined = os._exit, time.monotonic()

def slow_exit(code):
    began = time.monotonic()
    time.sleep(place.index != FIRST)
    print(began, time.monotonic(), file=sys.stderr, flush=True)
    end(code)

os._exit = slow_exit
processes._party = processes.Party(place, lines)
if place.index == FIRST:
    ACTION
if place.index != FIRST:
    time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, 1, 2])
def test_all_end_with_the_one_that_fails_and_process_0_last(first):
    code = PARTY.replace("FIRST", str(first)).replace("ACTION", 'processes.fail("no luck", 2)')
    codes, errors = ended(start("-c", code, count=3))
    assert codes == [2] * 3
    sentences, times = zip(*(e.splitlines() for e in errors), strict=True)
    assert list(sentences) == [f"error: {'' if i == first else f'process {first}: '}no luck" for i in range(3)]
    # Each process that hears of it takes a second to end here; process 0 waits for the others before it begins to end.
    began, ended_at = zip(*(map(float, line.split()) for line in times), strict=True)
    assert began[0] >= max(ended_at[1:])


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


LATE = """
import time
import jax, numpy as np
from conclugen_jax.system import processes
processes.start(60)
time.sleep(0 if processes.is_main() else 35)
mesh = jax.sharding.Mesh(jax.devices(), "x")
split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
assert jax.make_array_from_callback((4,), split, lambda _: np.full(1, 2.0)).prod() == 16
processes.leave()
"""


@pytest.mark.slow
def test_a_process_that_compiles_half_a_minute_longer_is_waited_for():
    codes, errors = ended(start("-c", LATE))
    assert codes == [0, 0], errors


WHOLE = {processes.ADDRESS: "a:1", processes.COUNT: "2", processes.INDEX: "0"}
CLUSTERS = [
    ({}, "no cluster here; set JAX_COORDINATOR_ADDRESS=HOST:PORT"),
    ({processes.INDEX: "1"}, "missing required field `JAX_COORDINATOR_ADDRESS`"),
    ({processes.INDEX: "1", processes.ADDRESS: "a:1"}, "missing required field `JAX_NUM_PROCESSES`"),
    (WHOLE | {processes.INDEX: "x"}, "Expected `int`, got `str` - at `$.JAX_PROCESS_ID`"),
    (WHOLE | {processes.INDEX: "2"}, "JAX_PROCESS_ID is 2 of 2 processes, which count from 0"),
    (WHOLE | {processes.ADDRESS: "a"}, "at `$.JAX_COORDINATOR_ADDRESS`"),
    (WHOLE | {processes.ADDRESS: "a:99999"}, "JAX_COORDINATOR_ADDRESS is a:99999"),
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
        processes.from_environment()
    assert message in str(refused.value)


def test_what_the_environment_says(no_cluster):
    for name, value in SLURM.items():
        no_cluster.setenv(name, value)
    assert processes.from_environment() == processes.Place("node007:61441", 16, 9, [1])
    for nodes, host in NODES.items():
        no_cluster.setenv("SLURM_STEP_NODELIST", nodes)
        assert processes.from_environment().address == f"{host}:61441"
    no_cluster.setenv(processes.ADDRESS, "chosen:5")
    assert processes.from_environment() == processes.Place("chosen:5", 16, 9, [1])
    for name, value in zip((processes.ADDRESS, processes.COUNT, processes.INDEX), ("h:1", "3", "2"), strict=True):
        no_cluster.setenv(name, value)
    assert processes.from_environment() == processes.Place("h:1", 3, 2)


def test_what_open_mpi_says(no_cluster):
    for name, value in OPEN_MPI.items():
        no_cluster.setenv(name, value)
    for contact, address in CONTACTS.items():
        no_cluster.setenv("OMPI_MCA_orte_hnp_uri", contact)
        assert processes.from_environment() == processes.Place(address, 4, 3, [1])


def test_clusters_that_only_jax_knows_are_found_by_it(no_cluster):
    from jax._src import clusters

    asked = []

    class Pods(clusters.ClusterEnv):
        name = "pods"
        is_env_present = classmethod(lambda cls: True)
        get_coordinator_address = classmethod(lambda cls, **_: asked.append(cls) or "pod-0:8482")
        get_process_count = classmethod(lambda cls: 4)
        get_process_id = classmethod(lambda cls: 3 if len(asked) < 2 else 1 / 0)

    no_cluster.setattr(clusters.ClusterEnv, "_cluster_types", [Pods])
    assert processes.from_environment() == processes.Place("pod-0:8482", 4, 3)
    with pytest.raises(
        ConclugenError, match=r"the cluster cannot be asked \(division by zero\); set JAX_COORDINATOR_ADDR"
    ):
        processes.from_environment()


def test_a_process_alone_is_the_main_one_and_waits_for_nobody():
    assert processes.is_main()
    assert not processes.several()
    processes.fail("nothing happens", 2)
    processes.leave()
    tree = {"x": np.array([-0.0, np.nan])}
    assert processes.of_main(tree) is tree
    assert parallel.Largest(jax.devices()[:4])(15) == 15

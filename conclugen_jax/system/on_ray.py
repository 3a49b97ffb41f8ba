"""Tasks on a Ray cluster: a worker is an actor of Ray, anywhere, that runs its task in a process of its own, as here.

So a task sees nothing of Ray: it has the variables, working directory and signals that a local process would have. Of the
machines one thing is asked: that all see the folder of the work, and the data, at the same paths.
"""

import contextlib
import functools
import logging
import os
import pickle
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import ray

from conclugen_jax import __version__
from conclugen_jax.errors import ConclugenError, reason
from conclugen_jax.system import engines, environment, files, tasks
from conclugen_jax.system.pool import Died
from conclugen_jax.system.tasks import LOGS, SEEN, Remote, Setting

OBJECTS = 80 * 2**20
"""Memory that a node which is started here keeps for Ray's objects, bytes: about the least; tasks exchange files."""
EVERY, MISSES = 2.0, 3
"""Seconds between two looks at the cluster, and how many in a row may fail before it is given up."""


@contextlib.contextmanager
def connected(address: str | None) -> Iterator["Ray"]:
    """Connect to a cluster, or start one node that ends with the context; nothing of Ray is printed.

    Raises:
      ConclugenError: no cluster there, or one of another version.
    """
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    alone = address == "local"
    own = {"object_store_memory": OBJECTS, "include_dashboard": False, "num_cpus": len(tasks.processors())}
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    _quiet()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        _reach(address)
        ray.init(address, log_to_driver=False, logging_level=logging.CRITICAL, **own if alone else {})
    except Exception as e:  # Ray raises several kinds
        raise ConclugenError(_unusable(address, e)) from e
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    try:
        yield Ray(address)
    finally:
        ray.shutdown()


def _quiet() -> None:
    """Keep what Ray says in its own logs: it prints from threads on the screen, whatever ``log_to_driver``."""
    from ray._private import worker

    worker.listen_error_messages = lambda *_: None
    for name in list(logging.root.manager.loggerDict):
        if name.partition(".")[0] == "ray":
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _reach(address: str) -> None:
    """Try whether anybody listens at HOST:PORT, since Ray waits for minutes."""
    host, _, port = address.rpartition(":")
    if "://" in address:
        raise ValueError("a client cannot start tasks; name HOST:PORT of the head, on a machine of the cluster")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()


def _unusable(address: str, error: Exception) -> str:
    """Say why a cluster cannot be used, and the way out."""
    if "ersion mismatch" in str(error):
        found = " ".join(line.strip() for line in str(error).splitlines()[1:] if line.strip())
        return f"--ray_address={address}: the cluster has other versions ({found}); install the same on all machines"
    if address == "local":
        return f"--engine=ray: no Ray node can be started here ({reason(error)})"
    way_out = "start it by `ray start`, correct the address, or leave it out for a node of this machine"
    return f"--ray_address={address}: no Ray cluster answers ({reason(error)}); {way_out}"


class Ray(engines.Engine):
    """Starts processes on the machines of a cluster that this process is connected to."""

    retries = 4

    def __init__(self, address: str):
        self._address, self._misses, self._next, self._shown = address, 0, 0.0, {}
        self.lost = False
        own = next(node for node in _nodes() if node["NodeID"] == ray.get_runtime_context().get_node_id())
        host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
        self._vital = {(host, int(port)), (own["NodeManagerAddress"], own["NodeManagerPort"])}

    def plan(self, folder: Path, num_tasks: int, jobs: int, gib: float) -> int:
        """See the base class; with a given number of jobs each has its share of the processors, else one."""
        files.refuse_bucket(folder)
        there = [node["Resources"] for node in _nodes()]
        most = max(node.get("CPU", 0) for node in there)
        cores = max(1, min(int(most), int(sum(node.get("CPU", 0) for node in there) / jobs))) if jobs else 1
        needs = {"CPU": cores, "memory": int(gib * 2**30), "GPU": int(any(node.get("GPU") for node in there))}
        if not any(all(node.get(key, 0) >= number for key, number in needs.items()) for node in there):
            largest = {key: max(node.get(key, 0) for node in there) for key in needs}
            raise ConclugenError(
                f"a task asks for {_amount(needs)}, and no node of the Ray cluster has that much (at most "
                f"{_amount(largest)}); lower config.job_gib, or add a larger node"
            )
        self._needs = {"num_cpus": cores, "num_gpus": needs["GPU"], "memory": needs["memory"]}
        self._folder = folder.absolute()
        self._setting = Setting(
            environment.carried(), os.getcwd(), str(self._folder), secrets.token_hex(8), __version__
        )
        (self._folder / "logs").mkdir(parents=True, exist_ok=True)
        (self._folder / SEEN).write_text(self._setting.token, encoding="utf-8")
        self._show(silent=True)
        return min(jobs or num_tasks, max(num_tasks, 1))

    def start(self, place: int, begin: tasks.Begin) -> "Worker":
        """See the base class."""
        begun = functools.partial(tasks.begin_task, self._needs["num_cpus"], None, begin, place)
        return Worker(self, ray.remote(Remote).options(**self._needs, max_concurrency=2).remote(), begun)

    def check(self) -> None:
        """See the base class; without its head this process would be ended by Ray after a minute."""
        if time.monotonic() < self._next:
            return
        self._show()
        try:
            for place in self._vital:
                socket.create_connection(place, timeout=5).close()
            self._misses = 0
        except OSError:
            self._misses += 1
        self._next = time.monotonic() + EVERY
        if self._misses >= MISSES:
            self.lost = True
            raise ConclugenError(
                f"{self._folder}: the head of the Ray cluster ({self._address}) is gone; what was done is saved: start "
                "the cluster again and repeat the command to resume"
            )

    def _show(self, *, silent: bool = False) -> None:
        """Print what workers have said since the last look."""
        for path in self._folder.glob(LOGS.format("*")):
            with path.open(encoding="utf-8", errors="replace") as file:
                file.seek(self._shown.get(path, 0))
                text = file.read()
                self._shown[path] = file.tell()
            print("" if silent else text, end="", file=sys.stderr, flush=True)


class Worker:
    """An actor of Ray for one task, as ``Pool`` is a process for it."""

    def __init__(self, engine: Ray, actor: Any, begin: Callable[[], None]):
        self._engine, self._actor, self._begin, self._code = engine, actor, begin, -signal.SIGKILL
        self._outcome, self._ready = Future(), actor.__ray_ready__.remote()

    def submit(self, function: Callable, task: Any) -> Future:
        """Call a function with a task, once."""
        job = pickle.dumps((self._begin, function, task))
        self._actor.call.remote(self._engine._setting, job).future().add_done_callback(self._note)
        return self._outcome

    def _note(self, called: Future) -> None:
        if self._outcome.done():
            return
        error = called.exception()
        if error is None:
            value, error, self._code = called.result()
        elif isinstance(error, ray.exceptions.RayError):
            missing = "No module named 'conclugen_jax'" in str(error)
            way_out = "a node of the Ray cluster has no conclugen_jax; install this version on all"
            error = ConclugenError(way_out) if missing else Died(reason(error))
        if error is None:
            self._outcome.set_result(value)
        else:
            self._outcome.set_exception(error)

    def terminate(self) -> None:
        """Send SIGTERM to the process of the task; one that has not begun is not begun any more."""
        if self._engine.lost:
            self._outcome.set_exception(Died())
        elif ray.wait([self._ready], timeout=0)[0]:
            self._actor.terminate.remote()
        else:
            self.kill()

    def kill(self) -> None:
        """End the process of the task, whatever it does."""
        if not self._engine.lost:
            ray.kill(self._actor)

    def close(self) -> list[int | None]:
        """Give the place back; return the exit code of the process."""
        self.kill()
        return [self._code]


def _nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _amount(of: dict[str, float]) -> str:
    return f"{of['CPU']:g} processors, {of['memory'] / 2**30:.1f} GiB and {of['GPU']:g} GPUs"

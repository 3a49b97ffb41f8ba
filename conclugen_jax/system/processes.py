"""Several processes that share one run: how they meet, which one writes, what all get from it, and how they end together.

If a process never comes, JAX aborts the others from C++. So process 0 first listens on the coordinator's port, and JAX joins
them on the same port when all are there. The connections on which they met stay open: a process that fails tells the others
why, and one that is gone is noticed at once.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Annotated, Any, NoReturn

import msgspec
import numpy as np

from conclugen_jax.errors import ConclugenError, reason

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
NEEDED = f"{ADDRESS}=HOST:PORT of process 0, {COUNT}, and {INDEX} from 0 to one less than that"

PATIENCE = 10.0
"""Seconds that process 0 waits for the others to end, and that anyone waits for an answer."""

_party: "Party | None" = None


def is_main() -> bool:
    """Return whether this process writes the files of the run: process 0 does, and a process that is alone."""
    return _party is None or _party.place.index == 0


def several() -> bool:
    """Return whether this process shares its run with others."""
    return _party is not None


def start(timeout: float) -> None:
    """Join the processes that the environment describes; to be called before anything else of JAX.

    All must come within ``timeout`` seconds, or are refused as an environment that describes none; a process that is silent for
    so long later counts as gone, too.
    """
    global _party
    place = from_environment()
    if place.count == 1:
        return
    _party = Party(place, meet(place, timeout))
    import jax  # late: commands without JAX import this module, too

    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from the run
    names = "initialization_timeout", "heartbeat_timeout_seconds", "shutdown_timeout_seconds"
    jax.distributed.initialize(
        place.address,
        place.count,
        place.index,
        local_device_ids=place.devices,
        cluster_detection_method="deactivate",
        **dict.fromkeys(names, max(1, round(timeout))),
    )
    # Let all devices meet in one sum. On CPUs the first collective operation waits 30 s for the other processes; later it
    # would come after a compilation, which may take one process much longer than another that finds its programs in the cache.
    mesh = jax.sharding.Mesh(jax.devices(), "devices")
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("devices"))
    jax.block_until_ready(jax.make_array_from_callback((mesh.size,), split, lambda _: np.ones(1, np.float32)).sum())


def of_main(tree: Any) -> Any:
    """Return the tree of NumPy arrays of process 0, bit for bit; shapes and types are the same on every process."""
    if not several():
        return tree
    import jax
    from jax.experimental import multihost_utils

    def broadcast(x: np.ndarray) -> np.ndarray:
        # Send bytes: the broadcast sums values, which changes -0.0 and NaN.
        sent = multihost_utils.broadcast_one_to_all(np.ascontiguousarray(x).reshape(-1).view(np.uint8))
        return np.asarray(sent).view(x.dtype).reshape(x.shape)

    return jax.tree.map(broadcast, tree)


def json_of_main(value: Any) -> Any:
    """Return the JSON value of process 0 on every process."""
    data = json.dumps(value).encode()
    length = int(of_main(np.array([len(data)], np.int64))[0])
    return json.loads(of_main(np.frombuffer(data[:length].ljust(length), np.uint8)).tobytes())


def shared(work: Callable[[np.ndarray], Any], rows: np.ndarray) -> Any:
    """Return ``work(rows)``, a tree of arrays with an entry for each of n > 0 rows; every process computes its share.

    All processes get all entries, bit for bit. Entries must not depend on other rows of the call.
    """
    if _party is None:
        return work(rows)
    import jax
    from jax.experimental import multihost_utils

    each = -(-len(rows) // _party.place.count)
    own = rows[np.minimum(np.arange(each) + each * _party.place.index, len(rows) - 1)]
    leaves, form = jax.tree.flatten(work(own))
    parts = [np.ascontiguousarray(x).reshape(each, -1).view(np.uint8) for x in leaves]
    found = np.asarray(multihost_utils.process_allgather(np.hstack(parts)))  # [processes, each, bytes of a row]
    found = np.split(found.reshape(-1, found.shape[-1])[: len(rows)], np.cumsum([x.shape[1] for x in parts])[:-1], 1)
    pairs = zip(found, leaves, strict=True)
    return form.unflatten([np.ascontiguousarray(a).view(x.dtype).reshape(len(rows), *x.shape[1:]) for a, x in pairs])


def wait() -> None:
    """Wait until all processes have called this."""
    if several():
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("conclugen_jax")


def fail(sentence: str, code: int) -> None:
    """Print why this process fails, tell the others, and end at once; return if it is alone."""
    if _party is not None:
        _party.end(sentence, code, f"process {_party.place.index}: {sentence}")


def leave() -> None:
    """Wait until the other processes are done as well; return at once if this one is alone."""
    if _party is not None:
        _party.leave()


class Place(msgspec.Struct, frozen=True, rename={"address": ADDRESS, "count": COUNT, "index": INDEX}):
    """A process among all."""

    address: Annotated[str, msgspec.Meta(pattern=r"^.+:\d{1,5}$")]  # HOST:PORT of process 0
    count: Annotated[int, msgspec.Meta(ge=1)]  # number of processes
    index: Annotated[int, msgspec.Meta(ge=0)]  # number of this process, from 0
    devices: list[int] | None = None  # numbers of its devices on this machine; ``None``: all

    def __post_init__(self) -> None:
        if self.index >= self.count:
            raise ValueError(f"{INDEX} is {self.index} of {self.count} processes, which count from 0")
        if self.endpoint[1] >= 2**16:
            raise ValueError(f"{ADDRESS} is {self.address}")

    @property
    def endpoint(self) -> tuple[str, int]:
        """Return host and port of process 0; an IPv6 address without its brackets."""
        host, _, port = self.address.rpartition(":")
        return host.strip("[]"), int(port)


def from_environment() -> Place:
    """Return the place of this process by our three variables, or else as JAX finds it out.

    JAX knows Slurm, Open MPI, Cloud TPUs and Kubernetes. No cluster, and incomplete or contradictory variables, are refused.
    """
    given = {name: value for name in (ADDRESS, COUNT, INDEX) if (value := os.environ.get(name)) is not None}
    try:
        return msgspec.convert(
            given if given.keys() & {COUNT, INDEX} else _of_jax(given.get(ADDRESS)), Place, strict=False
        )
    except msgspec.ValidationError as e:
        raise ConclugenError(f"--distributed=auto needs {NEEDED}: {e}") from e


def _of_jax(address: str | None) -> dict[str, Any]:
    """Return the facts of this process as JAX finds them out."""
    try:
        from jax._src import clusters  # what jax.distributed.initialize() asks; no public name tells the address

        detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
        address, count, index, devices = detect(address, None, None, None, None, 60)
        why = "no cluster here" if None in (address, count, index) else ""
    except Exception as e:  # what a cluster's own service raises, or a JAX that has this elsewhere
        why = f"the cluster cannot be asked ({reason(e)})"
    if why:
        raise ConclugenError(
            f"--distributed=auto: {why}; set {NEEDED}, start it by Slurm (srun), Open MPI (mpirun) or on Cloud TPUs, or leave "
            "--distributed off"
        )
    host, _, port = address.rpartition(":")
    address = f"[{host.strip('[]')}]:{port}" if ":" in host else address  # JAX drops the brackets of IPv6
    return {ADDRESS: address, COUNT: count, INDEX: index, "devices": devices}


class Line:
    """A connection to another process, on which JSON objects are sent, one a line."""

    def __init__(self, connection: socket.socket):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._connection, self._received = connection, connection.makefile("rb")

    def send(self, **word: Any) -> None:
        """Send an object; nothing happens if the other process is gone."""
        with contextlib.suppress(OSError):
            self._connection.sendall(json.dumps(word).encode() + b"\n")

    def receive(self, timeout: float | None = None) -> dict[str, Any]:
        """Return the next object; an empty one if the other process is gone, silent for too long, or sends something else."""
        try:
            self._connection.settimeout(timeout)
            word = json.loads(self._received.readline(2**16))
        except (OSError, ValueError):
            return {}
        return word if isinstance(word, dict) else {}

    def close(self) -> None:
        """Close the connection."""
        self._received.close()
        self._connection.close()


def meet(place: Place, timeout: float) -> dict[int, Line]:
    """Return process 0's lines to the others by number, or another's to it; refuse who is late or does not belong."""
    return _listen(place, timeout) if place.index == 0 else {0: _call(place, timeout)}


def _listen(place: Place, timeout: float) -> dict[int, Line]:
    deadline, both = time.monotonic() + timeout, socket.has_dualstack_ipv6()
    address, family = ("", place.endpoint[1]), socket.AF_INET6 if both else socket.AF_INET
    try:
        server = socket.create_server(address, family=family, dualstack_ipv6=both, backlog=place.count)
    except OSError as e:
        raise ConclugenError(
            f"{place.address}: process 0 cannot listen there ({e.strerror}); set {ADDRESS} to a free port"
        ) from e
    lines: dict[int, Line] = {}
    with server:
        while missing := [i for i in range(1, place.count) if i not in lines]:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                line = Line(server.accept()[0])
            except TimeoutError:
                _refuse(
                    lines.values(),
                    f"process {', '.join(map(str, missing))} of {place.count} did not come to {place.address} within "
                    f"{timeout:g} s; start all of them, with the same {ADDRESS}, or raise --distributed_timeout",
                )
            said = line.receive(PATIENCE)
            if said.keys() != {"index", "count"}:  # a port scanner, for example
                line.close()
            elif said["count"] != place.count or said["index"] not in missing:
                _refuse(
                    [*lines.values(), line],
                    f"{place.address}: a process came as {INDEX}={said['index']} of {COUNT}={said['count']}, but each of "
                    f"1 to {place.count - 1} of {place.count} is expected, once",
                )
            else:
                lines[said["index"]] = line
    for line in lines.values():
        line.send(join=True)
    return lines


def _refuse(lines: Iterable[Line], sentence: str) -> NoReturn:
    for line in lines:
        line.send(error=sentence)
        line.close()
    raise ConclugenError(sentence)


def _call(place: Place, timeout: float) -> Line:
    deadline, why = time.monotonic() + timeout, ""
    while (left := deadline - time.monotonic()) > 0:
        try:
            line = Line(socket.create_connection(place.endpoint, timeout=left))
        except OSError as e:  # process 0 does not listen yet, or there is no such host
            why = f" ({e.strerror or e})"
            time.sleep(min(0.2, left))
            continue
        line.send(index=place.index, count=place.count)
        answer = line.receive(timeout + PATIENCE)  # process 0 may have begun to wait for the others just now
        if "join" in answer:
            return line
        line.close()
        if "error" in answer:
            raise ConclugenError(answer["error"])
        why = " (what is there gave no answer)"
    raise ConclugenError(
        f"{place.address}: process 0 could not be reached there within {timeout:g} s{why}; start it, check {ADDRESS}, or "
        "raise --distributed_timeout"
    )


class Party:
    """This process among those that have met; a thread for each line hears how the process there ends."""

    def __init__(self, place: Place, lines: dict[int, Line]):
        self.place, self._lines = place, lines
        self._ending = threading.Lock()  # held by the thread that ends this process
        self._left = threading.Semaphore(0)  # processes that have said that they leave
        self._hearing = [threading.Thread(target=self._hear, args=x, daemon=True) for x in lines.items()]
        self._all_started = threading.Event()  # a thread that was not started could not be waited for
        for thread in self._hearing:
            thread.start()
        self._all_started.set()

    def _hear(self, number: int, line: Line) -> None:
        self._all_started.wait()
        gone = (
            f"process {number} is gone (killed, out of memory, or its machine or network failed); repeat the command on "
            "all machines to resume"
        )
        while word := line.receive():
            if "error" in word:
                self.end(word["error"], word["code"])
            gone = ""
            self._left.release()
        if gone:
            self.end(gone, 1)

    def end(self, sentence: str, code: int, told: str = "") -> None:
        """End this process with a sentence, and all others with a sentence for them; only the first thread to call does."""
        if not self._ending.acquire(blocking=threading.current_thread() not in self._hearing):
            return
        try:
            print(f"error: {sentence}", file=sys.stderr, flush=True)
            for line in self._lines.values():
                line.send(error=told or sentence, code=code)
            if self.place.index == 0:  # JAX aborts all others as soon as process 0 is gone
                deadline = time.monotonic() + PATIENCE
                for thread in self._hearing:
                    if thread is not threading.current_thread():
                        thread.join(max(0, deadline - time.monotonic()))
        finally:  # also where standard error is closed
            os._exit(code)

    def leave(self) -> None:
        """Return when all processes have called this: the others tell process 0, which then tells them."""
        if self.place.index == 0:
            for _ in self._lines:
                self._left.acquire()
        for line in self._lines.values():
            line.send(leaving=True)
        if self.place.index != 0:
            self._left.acquire()

"""Several processes that share one run: how they find each other, who writes, and how they end together.

JAX ends a process that waits in vain for another by an abort of its C++ code. So the processes meet before: number 0
listens on the coordinator's port, the others say who they are, and only when all are there does JAX join them, on the
same port. The connections made then stay: by them a process that fails tells the others why, and one that is gone is
noticed at once.
"""

import contextlib
import dataclasses
import json
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any, NoReturn

import numpy as np

from conclugen_jax.errors import ConclugenError

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
PATIENCE = 10.0
"""Seconds that process 0 waits for the others to end, and anyone for the answer to a word."""


@dataclasses.dataclass(frozen=True)
class Place:
    """A process among all.

    Attributes:
      address: host:port of process 0.
      count: how many processes there are.
      index: this one's number, from 0.
      devices: numbers of the devices that are its own on this machine; ``None``: all.
    """

    address: str
    count: int
    index: int
    devices: list[int] | None = None


_party: "_Party | None" = None


def is_main() -> bool:
    """Whether this process writes what the run leaves: process 0 does, and one that is alone."""
    return _party is None or _party.place.index == 0


def several() -> bool:
    """Whether this process shares its run with others."""
    return _party is not None


def start(timeout: float) -> None:
    """Join the processes that the environment tells of; before anything else that JAX does.

    Args:
      timeout: seconds within which all must have come, and after which one that has fallen silent counts as gone.

    Raises:
      ConclugenError: the environment tells of none, or not all have come in time.
    """
    global _party
    place = from_environment(timeout)
    if place.count == 1:
        return
    _party = _Party(place, _listen(place, timeout) if place.index == 0 else [_call(place, timeout)])
    import jax  # late: launchers that need no JAX share this module's first lines with those that do

    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from the run
    seconds = max(1, round(timeout))
    jax.distributed.initialize(
        place.address,
        place.count,
        place.index,
        local_device_ids=place.devices,
        cluster_detection_method="deactivate",
        initialization_timeout=seconds,
        heartbeat_timeout_seconds=seconds,
        shutdown_timeout_seconds=seconds,
    )


def from_environment(timeout: float) -> Place:
    """Where this process stands, by our three variables or else by what JAX finds of Slurm, Open MPI, Kubernetes or TPUs.

    Raises:
      ConclugenError: neither says it, or not in full.
    """
    given = {name: os.environ.get(name) for name in (ADDRESS, COUNT, INDEX)}
    if given[COUNT] is None and given[INDEX] is None:
        from jax._src import clusters  # what jax.distributed.initialize calls; it does not say what it has found

        found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            given[ADDRESS], None, None, None, None, round(timeout)
        )
        if None in found[:3]:
            raise ConclugenError(
                f"--distributed=auto: no cluster here; set {ADDRESS}=HOST:PORT of process 0, {COUNT} and {INDEX}, start it "
                "by Slurm (srun) or Open MPI (mpirun), or leave --distributed off"
            )
        return _checked(Place(*found))
    for name, value in given.items():
        if value is None or (name != ADDRESS and not value.isdecimal()):
            raise ConclugenError(
                f"{name} is {value or 'not set'}; --distributed=auto needs {ADDRESS}=HOST:PORT of process 0, {COUNT} and "
                f"{INDEX}, from 0"
            )
    return _checked(Place(given[ADDRESS], int(given[COUNT]), int(given[INDEX])))


def _checked(place: Place) -> Place:
    host, _, port = place.address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConclugenError(f"{ADDRESS} is {place.address}; it must be HOST:PORT of process 0")
    if place.index >= place.count:
        raise ConclugenError(f"{INDEX} is {place.index} of {place.count} processes; they count from 0")
    return place


def of_main(tree: Any) -> Any:
    """The arrays that process 0 has, on every process, bit for bit; where they are the same shapes and types.

    Args:
      tree: of NumPy arrays.
    """
    if not several():
        return tree
    import jax
    from jax.experimental import multihost_utils

    def broadcast(x: np.ndarray) -> np.ndarray:
        # As bytes: what is sent is a sum over processes, of which -0.0 and NaN would not come out as they went in.
        sent = multihost_utils.broadcast_one_to_all(np.ascontiguousarray(x).reshape(-1).view(np.uint8))
        return np.asarray(sent).view(x.dtype).reshape(x.shape)

    return jax.tree.map(broadcast, tree)


def text_of_main(text: str) -> str:
    """The text that process 0 has, on every process."""
    data = np.frombuffer(text.encode(), np.uint8)
    length = int(of_main(np.array([len(data)], np.int64))[0])
    padded = np.zeros(length, np.uint8)
    padded[: len(data)] = data[:length]
    return of_main(padded).tobytes().decode()


def wait() -> None:
    """Return once all processes have called this."""
    if several():
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("conclugen_jax")


def fail(sentence: str, code: int) -> None:
    """Say why this process fails, tell the others, and end, at once; nothing if it is alone."""
    if _party is not None:
        _party.end(sentence, code, told=f"process {_party.place.index}: {sentence}")


def leave() -> None:
    """Wait for the other processes to have come to their ends as well; nothing if this one is alone."""
    if _party is not None:
        _party.leave()


def _listen(place: Place, timeout: float) -> list["_Line"]:
    """Process 0: the lines to all others, once every one has said its number."""
    deadline, port = time.monotonic() + timeout, int(place.address.rpartition(":")[2])
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        server = socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=place.count)
    except OSError as e:
        raise ConclugenError(
            f"{place.address}: process 0 cannot listen there ({e.strerror}); set {ADDRESS} to a free port"
        ) from e
    lines: dict[int, _Line] = {}
    with server:
        while len(lines) < place.count - 1:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                line = _Line(server.accept()[0])
            except TimeoutError:
                missing = sorted(set(range(1, place.count)) - set(lines))
                _refuse(
                    lines.values(),
                    f"process {', '.join(map(str, missing))} of {place.count} did not come to {place.address} within "
                    f"{timeout:g} s; start all of them, with the same {ADDRESS}, or raise --distributed_timeout",
                )
            said = line.receive(PATIENCE)
            if said is None or said.keys() != {"index", "count"}:
                line.close()  # a stranger
                continue
            if said["count"] != place.count or said["index"] in lines or not 0 < said["index"] < place.count:
                _refuse(
                    [*lines.values(), line],
                    f"{place.address}: a process came as {INDEX}={said['index']} of {COUNT}={said['count']}, but each of "
                    f"1 to {place.count - 1} of {place.count} is expected, once",
                )
            lines[said["index"]] = line
    for line in lines.values():
        line.send({"join": True})
    return [lines[i] for i in sorted(lines)]


def _refuse(lines: Iterable["_Line"], sentence: str) -> NoReturn:
    for line in lines:
        line.send({"error": sentence})
        line.close()
    raise ConclugenError(sentence)


def _call(place: Place, timeout: float) -> "_Line":
    """Any other process: the line to process 0, once that has all of them."""
    deadline, (host, _, port) = time.monotonic() + timeout, place.address.rpartition(":")
    reason = ""
    while (left := deadline - time.monotonic()) > 0:
        try:
            line = _Line(socket.create_connection((host.strip("[]"), int(port)), timeout=left))
        except OSError as e:  # not yet, or no such host
            reason = f" ({e.strerror or e})"
            time.sleep(min(0.2, left))
            continue
        line.send({"index": place.index, "count": place.count})
        answer = line.receive(timeout + PATIENCE) or {}  # process 0 waits for the others, and may just have begun to
        if "join" in answer:
            return line
        line.close()
        if "error" in answer:
            raise ConclugenError(answer["error"])
        reason = " (what is there gave no answer)"
    raise ConclugenError(
        f"{place.address}: process 0 could not be reached there within {timeout:g} s{reason}; start it, check {ADDRESS}, or "
        "raise --distributed_timeout"
    )


class _Line:
    """A connection on which JSON objects are sent, one a line."""

    def __init__(self, connection: socket.socket):
        self._connection, self._received = connection, b""
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def fileno(self) -> int:
        return self._connection.fileno()

    def send(self, word: dict[str, Any]) -> None:
        """Send a word; one who is gone does not hear it."""
        with contextlib.suppress(OSError):
            self._connection.sendall(json.dumps(word).encode() + b"\n")

    def receive(self, timeout: float | None) -> dict[str, Any] | None:
        """The next word; ``None`` if the other is gone, says nothing in time, or speaks another language."""
        self._connection.settimeout(timeout if timeout is None else max(0.01, timeout))
        try:
            while b"\n" not in self._received:
                data = self._connection.recv(65536)
                if not data or len(self._received) > 2**20:
                    return None
                self._received += data
            word, _, self._received = self._received.partition(b"\n")
            word = json.loads(word)
        except (OSError, ValueError):
            return None
        return word if isinstance(word, dict) else None

    def close(self) -> None:
        self._connection.close()


class _Party:
    """This process among those that have joined; a thread hears what becomes of the others."""

    def __init__(self, place: Place, lines: list[_Line]):
        self.place = place
        self._lines = dict(zip(range(1, place.count) if place.index == 0 else [0], lines, strict=True))
        self._ending = threading.Lock()  # taken by the first who ends this process, never let go
        self._others_left = threading.Event()
        threading.Thread(target=self._hear, name="processes", daemon=True).start()

    def _hear(self) -> None:
        listening = {line: index for index, line in self._lines.items()}
        while listening:
            for line in select.select(list(listening), [], [])[0]:
                word = line.receive(PATIENCE)
                if word is None:
                    self.end(
                        f"process {listening[line]} is gone (killed, out of memory, or its machine or network failed); "
                        "repeat the command on all machines to resume",
                        1,
                    )
                elif "error" in word:
                    self.end(word["error"], word["code"])
                del listening[line]  # it has said that it leaves
        self._others_left.set()

    def end(self, sentence: str, code: int, *, told: str = "") -> NoReturn:
        """End this process with a sentence, and all others with what they are told; what is committed stays."""
        self._ending.acquire()
        try:
            print(f"error: {sentence}", file=sys.stderr, flush=True)
            for line in self._lines.values():
                line.send({"error": told or sentence, "code": code})
            if self.place.index == 0:  # JAX aborts those that are left when process 0 is gone
                deadline = time.monotonic() + PATIENCE
                for line in self._lines.values():
                    while line.receive(deadline - time.monotonic()) is not None:
                        pass
        finally:  # even if nobody reads what is printed
            os._exit(code)

    def leave(self) -> None:
        """Return once all have called this: others first tell process 0, which then tells them."""
        if self.place.index == 0:
            self._others_left.wait()
        for line in self._lines.values():
            line.send({"leaving": True})
        self._others_left.wait()

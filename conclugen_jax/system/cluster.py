"""Which of several processes this one is, and how all of them meet before JAX joins them.

If a process never comes, JAX aborts the others from C++. So process 0 first listens on the coordinator's port, and JAX joins
them on the same port when all are there.
"""

import contextlib
import dataclasses
import json
import os
import socket
import time
from collections.abc import Iterable
from typing import Any, NoReturn

from conclugen_jax.errors import ConclugenError, reason

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
NEEDED = f"{ADDRESS}=HOST:PORT of process 0, {COUNT}, and {INDEX} from 0 to one less than that"

PATIENCE = 10.0
"""Seconds that process 0 waits for the others to end, and that anyone waits for an answer."""


@dataclasses.dataclass(frozen=True)
class Place:
    """A process among all.

    Attributes:
      address: HOST:PORT of process 0.
      count: number of processes.
      index: number of this process, from 0.
      devices: numbers of its devices on this machine; ``None``: all.
    """

    address: str
    count: int
    index: int
    devices: list[int] | None = None

    @property
    def endpoint(self) -> tuple[str, int]:
        """Return host and port of process 0; an IPv6 address without its brackets."""
        host, _, port = self.address.rpartition(":")
        return host.strip("[]"), int(port)


def from_environment() -> Place:
    """Return the place of this process by our three variables, or else as JAX finds it out.

    JAX knows Slurm, Open MPI, Cloud TPUs and Kubernetes.

    Raises:
      ConclugenError: there is no cluster, or the variables are incomplete or contradictory.
    """
    found, devices = {name: os.environ.get(name) for name in (ADDRESS, COUNT, INDEX)}, None
    if found[COUNT] is None and found[INDEX] is None:
        found, devices = _of_jax(found[ADDRESS])
    host, _, port = (found[ADDRESS] or "").rpartition(":")
    count, index = (int(x) if (x := found[name] or "").isdecimal() else -1 for name in (COUNT, INDEX))
    right = {ADDRESS: host and port.isdecimal() and 0 < int(port) < 2**16, COUNT: count > 0, INDEX: 0 <= index < count}
    for name, fine in right.items():
        if not fine:
            raise ConclugenError(f"{name} is {found[name] or 'not set'}; --distributed=auto needs {NEEDED}")
    address = f"[{host.strip('[]')}]:{port}" if ":" in host else found[ADDRESS]  # JAX leaves the brackets of IPv6 out
    return Place(address, count, index, devices)


def _of_jax(address: str | None) -> tuple[dict[str, str], list[int] | None]:
    """Return the values of the three variables, and the devices of this process, as JAX finds them out."""
    try:
        from jax._src import clusters  # what jax.distributed.initialize() asks; no public name tells the address

        detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
        *found, devices = detect(address, None, None, None, None, 60)
        why = "" if None not in found else "no cluster here"
    except Exception as e:  # what a cluster's own service raises, or a JAX that has this elsewhere
        why = f"the cluster cannot be asked ({reason(e)})"
    if why:
        raise ConclugenError(
            f"--distributed=auto: {why}; set {NEEDED}, start it by Slurm (srun), Open MPI (mpirun) or on Cloud TPUs, or leave "
            "--distributed off"
        )
    return dict(zip((ADDRESS, COUNT, INDEX), map(str, found), strict=True)), devices


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
    """Return the lines of process 0 to all others by their numbers, or the one of another process to process 0.

    Raises:
      ConclugenError: not all have come within ``timeout`` seconds, or they do not belong together.
    """
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

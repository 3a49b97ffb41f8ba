"""Which of several processes this one is, and how all of them meet before JAX joins them.

If a process never comes, JAX aborts the others from C++. So process 0 first listens on the coordinator's port, and JAX joins
them on the same port when all are there.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterable
from typing import Annotated, Any, NoReturn

import msgspec

from conclugen_jax.errors import ConclugenError, reason

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
NEEDED = f"{ADDRESS}=HOST:PORT of process 0, {COUNT}, and {INDEX} from 0 to one less than that"

PATIENCE = 10.0
"""Seconds that process 0 waits for the others to end, and that anyone waits for an answer."""


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

    JAX knows Slurm, Open MPI, Cloud TPUs and Kubernetes.

    Raises:
      ConclugenError: there is no cluster, or the variables are incomplete or contradictory.
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
    address = f"[{host.strip('[]')}]:{port}" if ":" in host else address  # JAX leaves out the brackets of IPv6
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

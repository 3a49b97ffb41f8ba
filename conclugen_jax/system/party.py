"""How processes meet before JAX joins them, and end together.

If a process never comes, JAX aborts the others from C++. So process 0 first listens on the coordinator's port, and JAX joins
them on the same port when all are there. The connections stay open: a process that fails tells the others why, and one
that is gone is noticed at once.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any, NoReturn

from conclugen_jax.errors import ConclugenError
from conclugen_jax.system.cluster import ADDRESS, COUNT, INDEX, Place

PATIENCE = 10.0
"""Seconds that process 0 waits for the others to end, and that anyone waits for an answer."""


class Line:
    """A connection to another process, on which JSON objects are sent, one a line."""

    def __init__(self, connection: socket.socket):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._connection, self._received = connection, connection.makefile("rb")

    def send(self, word: dict[str, Any]) -> None:
        """Send an object; nothing happens if the other process is gone."""
        with contextlib.suppress(OSError):
            self._connection.sendall(json.dumps(word).encode() + b"\n")

    def receive(self, timeout: float | None = None) -> dict[str, Any] | None:
        """Return the next object; ``None`` if the other process is gone, is silent for too long, or sends something else."""
        try:
            self._connection.settimeout(timeout)
            word = json.loads(self._received.readline(2**16))
        except (OSError, ValueError):
            return None
        return word if isinstance(word, dict) else None

    def close(self) -> None:
        """Close the connection."""
        self._received.close()
        self._connection.close()


def meet(place: Place, timeout: float) -> list[Line]:
    """Return the lines of process 0 to all others, in order, or of another process to process 0, when all are there.

    Raises:
      ConclugenError: not all have come within ``timeout`` seconds, or they do not belong together.
    """
    return _listen(place, timeout) if place.index == 0 else [_call(place, timeout)]


def _listen(place: Place, timeout: float) -> list[Line]:
    deadline, both = time.monotonic() + timeout, socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        server = socket.create_server(("", place.port), family=family, dualstack_ipv6=both, backlog=place.count)
    except OSError as e:
        raise ConclugenError(
            f"{place.address}: process 0 cannot listen there ({e.strerror}); set {ADDRESS} to a free port"
        ) from e
    lines: dict[int, Line] = {}
    with server:
        while missing := sorted(set(range(1, place.count)) - set(lines)):
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
            if said is None or said.keys() != {"index", "count"}:  # a port scanner, for example
                line.close()
                continue
            if said["count"] != place.count or said["index"] not in missing:
                _refuse(
                    [*lines.values(), line],
                    f"{place.address}: a process came as {INDEX}={said['index']} of {COUNT}={said['count']}, but each of "
                    f"1 to {place.count - 1} of {place.count} is expected, once",
                )
            lines[said["index"]] = line
    for line in lines.values():
        line.send({"join": True})
    return [lines[i] for i in sorted(lines)]


def _refuse(lines: Iterable[Line], sentence: str) -> NoReturn:
    for line in lines:
        line.send({"error": sentence})
        line.close()
    raise ConclugenError(sentence)


def _call(place: Place, timeout: float) -> Line:
    deadline, reason = time.monotonic() + timeout, ""
    while (left := deadline - time.monotonic()) > 0:
        try:
            line = Line(socket.create_connection((place.host, place.port), timeout=left))
        except OSError as e:  # process 0 does not listen yet, or there is no such host
            reason = f" ({e.strerror or e})"
            time.sleep(min(0.2, left))
            continue
        line.send({"index": place.index, "count": place.count})
        answer = line.receive(timeout + PATIENCE) or {}  # process 0 may have begun to wait for the others just now
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


class Party:
    """This process among those that have met; a thread for each line hears what becomes of the process there."""

    def __init__(self, place: Place, lines: list[Line]):
        self.place, self._lines = place, lines
        self._ending = threading.Lock()  # held by the thread that ends this process
        self._left = threading.Semaphore(0)  # processes that have said that they leave
        numbers = range(1, place.count) if place.index == 0 else [0]
        self._hearing = [
            threading.Thread(target=self._hear, args=x, daemon=True) for x in zip(numbers, lines, strict=True)
        ]
        for thread in self._hearing:
            thread.start()

    def _hear(self, number: int, line: Line) -> None:
        leaves = False
        while word := line.receive():
            if "error" in word:
                self.end(word["error"], word["code"])
            leaves = True
            self._left.release()
        if not leaves:
            self.end(
                f"process {number} is gone (killed, out of memory, or its machine or network failed); repeat the command on "
                "all machines to resume",
                1,
            )

    def end(self, sentence: str, code: int, *, told: str = "") -> None:
        """End this process with a sentence, and all others with what they are told.

        A thread that hears returns if another one ends the process.
        """
        if not self._ending.acquire(blocking=threading.current_thread() not in self._hearing):
            return
        try:
            print(f"error: {sentence}", file=sys.stderr, flush=True)
            for line in self._lines:
                line.send({"error": told or sentence, "code": code})
            if self.place.index == 0:  # JAX aborts all others as soon as process 0 is gone
                deadline = time.monotonic() + PATIENCE
                for thread in self._hearing:
                    if thread is not threading.current_thread():
                        thread.join(max(0, deadline - time.monotonic()))
        finally:  # also where standard error is closed
            os._exit(code)

    def leave(self) -> None:
        """Return when all processes have called this: the others tell process 0, which then tells them."""
        others = len(self._lines)
        for _ in range(others if self.place.index == 0 else 0):
            self._left.acquire()
        for line in self._lines:
            line.send({"leaving": True})
        if self.place.index != 0:
            self._left.acquire()

"""The same work in several processes of one machine, which share its trials by files."""

import concurrent.futures
import functools
import io
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, TextIO

from conclugen_jax.errors import ConclugenError
from conclugen_jax.system import signals
from conclugen_jax.system.pool import Died, Pool


def share(workers: int, work: Callable[[], Any]) -> None:
    """Do the same work in several processes; return when all have done it.

    Args:
      workers: number of processes.
      work: what each does, such as trials of one search; it can be pickled.

    Raises:
      ConclugenError: the mistake that one process found, or processes were killed.
    """
    pools = [Pool(1, start=functools.partial(_begin, i, workers)) for i in range(workers)]
    received: list[int] = []

    def forward(number: int, _frame: object) -> None:
        received.append(number)
        for pool in pools:
            pool.terminate()

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    ended = [pool.submit(_worked, work) for pool in pools if not received]
    concurrent.futures.wait(ended)
    codes = [code for pool in pools for code in pool.close()]
    for number, handler in before.items():
        signal.signal(number, handler)
    if received:
        sys.exit(128 + received[0])
    for future in ended:
        if future.exception() and not isinstance(future.exception(), Died):
            raise future.exception()
    lost = sum(bool(future.exception()) or not future.result() for future in ended)
    if lost:
        raise ConclugenError(
            f"{lost} of {workers} workers ended before their time (exit codes {codes}; -9: killed, out of memory?); repeat "
            "the command to resume, with fewer --workers if memory is short"
        )


def _begin(worker: int, workers: int) -> None:
    """Give a process its share of a GPU's memory and its number in front of what it says."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{0.75 / workers:.3f}")
    sys.stderr = _Numbered(worker, sys.stderr)


class _Numbered(io.TextIOBase):
    """Standard error of a worker, with its number in front of each line."""

    def __init__(self, worker: int, file: TextIO):
        self._prefix, self._file, self._rest = f"[{worker}] ", file, ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        self._file.write("".join(f"{self._prefix}{line}\n" for line in lines))
        self._file.flush()
        return len(text)


def _worked(work: Callable[[], Any]) -> bool:
    """Return whether the work came to its end; a signal stops it before."""
    try:
        work()
        return True
    except signals.Interrupted:
        return False

"""Work shared out to processes of this machine, each of which may be killed or end by itself."""

import concurrent.futures
import functools
import io
import operator
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TextIO

from conclugen_jax.errors import ConclugenError
from conclugen_jax.system import environment, signals
from conclugen_jax.system.pool import Died, Pool

PATIENCE = 300.0
"""Seconds after a signal within which a process must have ended."""


def side_by_side(
    tasks: list[Any], jobs: int, function: Callable[[Any], Any], begin: Callable[[int, int], None], stop: signals.Stop
) -> Iterator[tuple[Any, Future, int]]:
    """Call a function with each task in a process of its own, ``jobs`` at a time; yield task, outcome and exit code.

    The caller may add tasks meanwhile. ``begin`` is called first in each process with its place among the jobs and their
    number. A signal ends all; what handles SIGTERM, as pretraining does, saves a checkpoint first.

    Raises:
      Interrupted: a signal came.
    """
    free = list(range(jobs))
    running: dict[Future, tuple[Pool, Any, int]] = {}
    try:
        while (tasks or running) and not stop.signal:
            while tasks and free:
                task, place = tasks.pop(0), free.pop(0)
                pool = Pool(1, start=functools.partial(begin, place, jobs))
                running[pool.submit(function, task)] = pool, task, place
            done, _ = concurrent.futures.wait(running, timeout=0.1, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in () if stop.signal else done:
                pool, task, place = running.pop(future)
                free.append(place)
                yield task, future, pool.close()[0] or 0
    finally:
        for pool, _, _ in running.values():
            pool.terminate()
        concurrent.futures.wait(running, timeout=PATIENCE)
        for pool, _, _ in running.values():
            pool.kill()
            pool.close()
    if stop.signal:
        raise signals.Interrupted(stop.signal)


def share(workers: int, work: Callable[[], Any]) -> None:
    """Do the same work, such as trials of one search, in several processes; return when all have done it.

    An error of one ends no other.

    Raises:
      ConclugenError: the mistake that a process found first, or processes were killed.
      Interrupted: a signal came.
    """
    codes, errors = [], []
    with signals.caught() as stop:
        for _, future, code in side_by_side([work] * workers, workers, operator.call, _begin, stop):
            error = future.exception()
            if isinstance(error, (Died, signals.Interrupted)):
                codes.append(code)
            elif error:
                errors.append(error)
    if errors:
        raise errors[0]
    if codes:
        raise ConclugenError(
            f"{len(codes)} of {workers} workers ended before their time (exit codes {codes}; -9: killed, out of memory?); "
            "repeat the command to resume, with fewer --workers if memory is short"
        )


def _begin(worker: int, workers: int) -> None:
    """Give a process its share of a GPU's memory and its number in front of what it says."""
    environment.share_memory(0.75 / workers)
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

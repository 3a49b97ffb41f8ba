"""The same work in several processes, each of which may be killed or end by itself."""

import io
import operator
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from conclugen_jax.errors import ConclugenError
from conclugen_jax.system import engines, signals
from conclugen_jax.system.pool import Died


def share(workers: int, work: Callable[[], Any], folder: str | Path, engine: engines.Engine | None = None) -> None:
    """Do the same work in a folder, such as trials of one search, in several processes; return when all have done it.

    An error of one ends no other.

    Raises:
      ConclugenError: the mistake that a process found first, or processes were killed.
      Interrupted: a signal came.
    """
    codes, errors = [], []
    engine = engine or engines.Engine()
    with signals.caught() as stop:
        jobs = engine.plan(Path(folder), workers, workers, 0)
        for _, future, code in engines.side_by_side(engine, jobs, [work] * workers, operator.call, _begin, stop):
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


def _begin(worker: int) -> None:
    """Put the number of a process in front of what it says."""
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

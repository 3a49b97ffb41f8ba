"""Tasks side by side, each in a process of its own that may be killed or end by itself: here, or on a Ray cluster.

An engine says how many tasks fit and starts a process for each; the rest is the same for all. What has been done is on
disk, so that another engine can resume the same tasks.
"""

import concurrent.futures
import functools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from conclugen_jax.errors import reason
from conclugen_jax.system import progress, signals
from conclugen_jax.system.pool import Died, Pool
from conclugen_jax.system.tasks import Begin, begin_task, free_memory, processors

PATIENCE = 300.0
"""Seconds after a signal within which a process must have ended."""
PAUSE = 2.0
"""Seconds before a lost task is resumed, more each time: a cluster notices only after a while that a machine is gone."""


class Engine:
    """Starts processes for tasks: here those of this machine, which share its processors and a GPU's memory."""

    retries = 0
    """How often a task is begun again whose process has died."""

    def plan(self, folder: Path, num_tasks: int, jobs: int, gib: float) -> int:
        """Return how many tasks work side by side in a folder: ``jobs``; 0: as many as fit, each with memory of ``gib`` GiB."""
        self._jobs = min(jobs or automatic_jobs(gib), max(num_tasks, 1))
        return self._jobs

    def start(self, place: int, begin: Begin) -> Pool:
        """Return a process, or what has its methods; in it ``begin`` is called first, with its place among the others."""
        cores = max(1, len(processors()) // self._jobs)
        share = 0.9 / self._jobs if self._jobs > 1 else None
        return Pool(1, start=functools.partial(begin_task, cores, share, begin, place))

    def check(self) -> None:
        """Raise ``ConclugenError`` where the engine itself is gone; called again and again."""


def side_by_side(
    engine: Engine, jobs: int, tasks: list[Any], function: Callable[[Any], Any], begin: Begin, stop: signals.Stop
) -> Iterator[tuple[Any, Future, int]]:
    """Call a function with each task in a process of its own, ``jobs`` at a time; yield task, outcome and exit code.

    The caller may add tasks meanwhile. A signal ends all; what handles SIGTERM, as pretraining does, saves a checkpoint first.

    Raises:
      Interrupted: a signal came.
    """
    free, again = list(range(jobs)), []
    running: dict[Future, tuple[Pool, Any, int, int]] = {}
    try:
        while (tasks or again or running) and not stop.signal:
            engine.check()
            while (tasks or again) and free:
                (task, tries), place = again.pop(0) if again else (tasks.pop(0), 0), free.pop(0)
                worker = engine.start(place, begin)
                running[worker.submit(function, task)] = worker, task, tries, place
            done, _ = concurrent.futures.wait(running, timeout=0.1, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in () if stop.signal else done:
                worker, task, tries, place = running.pop(future)
                free.append(place)
                code = worker.close()[0] or 0
                if isinstance(future.exception(), Died) and tries < engine.retries:
                    progress.say(
                        f"a process was lost ({reason(future.exception())}); its work is resumed in another one"
                    )
                    time.sleep(PAUSE * (tries + 1))
                    again.append((task, tries + 1))
                else:
                    yield task, future, code
    finally:
        for worker, *_ in running.values():
            worker.terminate()
        concurrent.futures.wait(running, timeout=PATIENCE)
        for worker, *_ in running.values():
            worker.kill()
            worker.close()
    if stop.signal:
        raise signals.Interrupted(stop.signal)


def automatic_jobs(gib: float) -> int:
    """Return how many tasks processors and free memory allow, each with so much memory, GiB."""
    free = free_memory()
    return len(processors()) if free is None else max(1, min(len(processors()), int(free / 2**30 / gib)))

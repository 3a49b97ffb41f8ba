"""Worker processes: fresh ones, blind to Ctrl-C, that end with this process however it ends."""

import concurrent.futures
import concurrent.futures.process
import contextlib
import multiprocessing.context
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Died = concurrent.futures.process.BrokenProcessPool
"""Raised by the result of a call whose process was killed or crashed."""


class _Spawning(multiprocessing.context.SpawnContext):
    """Remembers the processes that it starts."""

    def __init__(self) -> None:
        self.started: list[multiprocessing.context.SpawnProcess] = []

    def Process(self, *args, **kwargs):
        self.started.append(super().Process(*args, **kwargs))
        return self.started[-1]


class Pool(contextlib.AbstractContextManager):
    """Worker processes; a context that leaves none behind. Spawned, since the fork of a process with threads may hang."""

    def __init__(self, num_workers: int, *, start: Callable[[], None] | None = None):
        """Prepare a pool; processes start with the first call, and each calls ``start`` before its first one."""
        self._context, self._num_workers = _Spawning(), num_workers
        self._executor = concurrent.futures.ProcessPoolExecutor(
            num_workers, mp_context=self._context, initializer=_start, initargs=(os.getpid(), start)
        )

    def submit(self, function: Callable, *args: Any) -> concurrent.futures.Future:
        """Queue one call; a process that starts for it never sees Ctrl-C, which a terminal sends to all."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return self._executor.submit(function, *args)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def map(self, function: Callable, jobs: Iterable[Any], *, ahead: int = 2) -> Iterator[Any]:
        """Yield ``function(job)`` of each job in order, few read ``ahead`` per process; ``Died`` if a process has died."""
        waiting: deque[concurrent.futures.Future] = deque()
        for job in jobs:
            waiting.append(self.submit(function, job))
            if len(waiting) >= self._num_workers * (1 + ahead):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def terminate(self) -> None:
        """Send SIGTERM to all processes; a call that handles it, as pretraining does, still returns."""
        for process in filter(lambda process: process.pid, self._context.started):
            process.terminate()

    def kill(self) -> None:
        """End all processes, whatever they do."""
        for process in filter(lambda process: process.pid, self._context.started):
            process.kill()

    def close(self) -> list[int | None]:
        """Wait for all processes to end; return their exit codes, negative for the signal that ended one."""
        self._executor.shutdown(wait=True, cancel_futures=True)
        return [process.exitcode for process in self._context.started]

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is not None:
            self.kill()
        self.close()


@contextlib.contextmanager
def without_script() -> Iterator[None]:
    """Start processes that do not run the script of this one, which may lack ``if __name__ == "__main__":``.

    What they call must not be defined in it.
    """
    main = vars(sys.modules["__main__"])
    before = {name: main[name] for name in ("__file__", "__spec__") if name in main}
    main.update(__file__=None, __spec__=None)
    try:
        yield
    finally:
        for name in ("__file__", "__spec__"):
            del main[name]
        main.update(before)


def _start(parent: int, start: Callable[[], None] | None) -> None:
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    if start is not None:
        start()


def _end_with(parent: int) -> None:
    """End this process as soon as its parent is gone, however that ended; ``parent`` is its process id."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)

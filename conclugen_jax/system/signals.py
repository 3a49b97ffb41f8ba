"""SIGINT, SIGTERM and SIGUSR1 ask a run to stop at its next safe point; a second signal ends the process at once.

Slurm sends SIGUSR1 before the time limit of a job that asks for it (``--signal=USR1@120``).
"""

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

from conclugen_jax.system import processes

CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
STOPPED = "stopped; repeat the command to resume"
GRACE = 20.0
"""Seconds that a signal waits for compiled code inside :meth:`Stop.at_once`."""


class Interrupted(SystemExit):
    """A signal has stopped a run, which can be resumed; the exit code is 128 + the number of the signal."""

    def __init__(self, number: int):
        super().__init__(128 + number)


class Stop:
    """Whether a signal has come: ``signal`` is its number, 0 before."""

    def __init__(self) -> None:
        self.signal = 0
        self._at_once_now = False  # whether the program is inside of ``at_once``

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a signal raise :class:`Interrupted` wherever it finds the program, while the context lasts.

        This is for work that a repeated command does again: reading rows, compilation, evaluation. The process ends after
        ``GRACE`` seconds where compiled code does not return or some code swallows the exception. Of several processes that
        share a run all end there and then, since the others may wait for this one.
        """
        if self.signal:
            self._end()
        before, self._at_once_now = self._at_once_now, True
        try:
            yield
        finally:
            self._at_once_now = before

    def note(self, number: int, _frame: object) -> None:
        """Note the first signal, as its handler; the thread of :meth:`watch` ends the process at the second one."""
        if self.signal:
            return
        self.signal = number
        if self._at_once_now:
            self._end()
        os.write(2, b"stopping after the steps under way; once more to stop at once\n")

    def _end(self) -> NoReturn:
        processes.fail(STOPPED, 128 + self.signal)
        raise Interrupted(self.signal)

    def watch(self, pipe: int) -> None:
        """End the process at the second signal, and for a first one that waits too long for compiled code.

        Python runs no handler while the main thread is in compiled code, which may be minutes. So this is a thread: it reads
        the numbers of signals from a pipe, into which the interpreter writes them even then; a zero ends it.
        """
        first, wait, ready = 0, None, select.poll()
        ready.register(pipe, select.POLLIN)
        while True:
            if not ready.poll(wait):
                if self._at_once_now:
                    processes.fail(STOPPED, 128 + first)
                    os.write(2, f"{STOPPED}\n".encode())
                    os._exit(128 + first)
                wait = None
            elif (number := os.read(pipe, 1)[0]) == 0:
                return os.close(pipe)
            elif number in CAUGHT:
                if first:
                    os._exit(128 + number)
                first, wait = number, GRACE * 1000  # milliseconds


_outermost: list[Stop] = []


@contextlib.contextmanager
def caught() -> Iterator[Stop]:
    """Catch signals while the context lasts, in the main thread.

    A context inside of another one shares its ``Stop``: a signal between two runs of a search stops the next run. In another
    thread, a context that is inside of none has a ``Stop`` that never changes.
    """
    if _outermost or threading.current_thread() is not threading.main_thread():
        yield _outermost[0] if _outermost else Stop()
        return

    def report(unraisable: Any) -> None:
        # An exception in ``__del__`` cannot propagate; the signal is noted nevertheless.
        if not isinstance(unraisable.exc_value, Interrupted):
            hook(unraisable)

    stop, (out, into) = Stop(), os.pipe()
    os.set_blocking(into, False)
    hook, sys.unraisablehook = sys.unraisablehook, report
    before = {number: signal.signal(number, stop.note) for number in CAUGHT}
    wakeup = signal.set_wakeup_fd(into, warn_on_full_buffer=False)
    threading.Thread(target=stop.watch, args=(out,), daemon=True).start()
    _outermost.append(stop)
    try:
        yield stop
    finally:
        _outermost.clear()
        signal.set_wakeup_fd(wakeup)
        os.write(into, b"\0")
        os.close(into)
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """Let signals end all of the work in the context, or in the decorated function; see :meth:`Stop.at_once`."""
    with caught() as stop, stop.at_once():
        yield

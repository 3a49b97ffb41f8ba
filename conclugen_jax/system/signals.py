"""SIGINT, SIGTERM and SIGUSR1 ask a run to stop at its next safe point; a second one ends it at once.

Slurm sends SIGUSR1 ahead of the time limit where a job asks for it (``--signal=USR1@120``).
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
GRACE = 20.0
"""Seconds that a call into compiled code may keep a signal waiting where nothing would be lost."""


class Interrupted(SystemExit):
    """A run was asked to stop and did, with a checkpoint; the exit code is 128 + the signal's number."""

    def __init__(self, number: int):
        super().__init__(128 + number)


class Stop:
    """Whether a signal has come: ``signal`` is its number, 0 as long as there was none."""

    def __init__(self) -> None:
        self.signal = 0
        self.handled = False  # whether this object's handlers are installed
        self.loses_nothing = False
        self.leaving = False  # whether Interrupted was raised and has not left its context yet

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """While the context lasts a signal raises :class:`Interrupted` where it finds the program.

        For what a repeated command does again: reading rows, compilation, evaluation. Where compiled code does not come
        back within ``GRACE`` seconds, or something on the way keeps the exception, the process ends without it.
        """
        if self.signal and self.handled:
            raise Interrupted(self.signal)
        self.loses_nothing = self.handled
        try:
            yield
        finally:
            self.loses_nothing = self.leaving = False


_outermost: list[Stop] = []


@contextlib.contextmanager
def caught() -> Iterator[Stop]:
    """Note signals instead of dying of them, while the context lasts (main thread only).

    Within another such context it is that one's ``Stop``: a signal between two runs of a search stops the next one.
    """
    if _outermost:
        yield _outermost[0]
        return
    stop = Stop()

    def note(number: int, _frame: object) -> None:
        if stop.signal:
            os._exit(128 + number)
        stop.signal = number
        if stop.loses_nothing:
            stop.loses_nothing, stop.leaving = False, True
            raise Interrupted(number)
        os.write(2, b"stopping after the steps under way; once more to stop at once\n")

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def report(unraisable: Any) -> None:
        # Raised in a place that lets no exception out (the end of some object), it is noted all the same.
        if not isinstance(unraisable.exc_value, Interrupted):
            usual(unraisable)

    usual, sys.unraisablehook = sys.unraisablehook, report
    before = {number: signal.signal(number, note) for number in CAUGHT}
    _outermost.append(stop)
    stop.handled = True
    try:
        with _watched(stop):
            yield stop
    finally:
        _outermost.clear()
        stop.handled, sys.unraisablehook = False, usual
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _watched(stop: Stop) -> Iterator[None]:
    """Look after signals that come while the main thread is in compiled code, where no handler of Python runs."""
    out, into = os.pipe()
    os.set_blocking(into, False)
    before = signal.set_wakeup_fd(into, warn_on_full_buffer=False)

    def watch() -> None:
        came = 0
        while number := os.read(out, 1)[0]:
            if number not in CAUGHT:
                continue
            came += 1
            if came > 1:
                time.sleep(0.5)  # the handler would have ended the process by now
                os._exit(128 + number)
            threading.Thread(target=expire, args=(number,), daemon=True).start()
        os.close(out)

    def expire(number: int) -> None:
        time.sleep(GRACE)
        if stop.leaving or (stop.loses_nothing and not stop.signal):
            os.write(2, b"stopped; repeat the command to resume\n")
            os._exit(128 + number)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.write(into, b"\0")
        os.close(into)


def end_with(parent: int) -> None:
    """End this process as soon as its parent is gone, however that ended; ``parent``: its process id."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def unwinding() -> None:
    """From now on SIGINT and SIGTERM end the process by way of SystemExit, so that what is half done is removed.

    A second one ends it at once.
    """

    def end(number: int, _frame: object) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, lambda again, _: os._exit(128 + again))
        raise SystemExit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)

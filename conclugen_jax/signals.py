"""SIGINT and SIGTERM ask a run to stop at its next safe point; a second one ends it at once."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator


class Interrupted(SystemExit):
    """A run was asked to stop and did, with a checkpoint; the exit code is 128 + the signal's number."""

    def __init__(self, number: int):
        super().__init__(128 + number)


class Stop:
    """Whether a signal has come: ``signal`` is its number, 0 as long as there was none."""

    def __init__(self) -> None:
        self.signal = 0


_outermost: list[Stop] = []


@contextlib.contextmanager
def caught() -> Iterator[Stop]:
    """Note SIGINT and SIGTERM instead of dying of them, while the context lasts (main thread only).

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
        os.write(2, b"stopping after the steps under way; once more to stop at once\n")

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    _outermost.append(stop)
    try:
        yield stop
    finally:
        _outermost.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


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

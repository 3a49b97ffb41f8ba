"""Locks on files: one holder at a time; the system releases the lock when its holder ends, however it ends."""

import contextlib
import datetime
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO


class Busy(Exception):
    """Another process holds the lock; the text says which."""


@contextlib.contextmanager
def hold(path: Path, *, wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold a lock while the context lasts: a file that is created, names the holder, and is removed afterwards.

    ``wait`` is called with the holder before waiting for it; ``None``: raise ``Busy``. A file that cannot be written, or a disk
    without locks, raises ``OSError``.
    """
    while True:
        with path.open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "another process"
                if wait is None:
                    raise Busy(holder) from None
                wait(holder)
                fcntl.flock(file, fcntl.LOCK_EX)
            if not _is(file, path):  # the last holder removed the file after it was opened here
                continue
            try:
                now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}\n")
                file.flush()
                yield
                return
            finally:
                path.unlink(missing_ok=True)


def taken(path: Path) -> IO[str] | None:
    """Lock a file until it is closed or this process ends; ``None``: another process has it, or it cannot be opened."""
    with contextlib.suppress(OSError), contextlib.ExitStack() as opened:
        file = opened.enter_context(path.open("a", encoding="utf-8"))
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        opened.pop_all()
        return file
    return None


def holder(path: Path) -> str | None:
    """Return who holds a lock, without taking it; ``None`` if no process does, even where a file of it was left behind."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # given back as the file is closed
            except BlockingIOError:
                return file.read().strip() or "another process"
    except OSError:
        return None
    return None


def _is(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False

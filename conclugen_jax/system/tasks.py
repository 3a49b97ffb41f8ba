"""What a process does before its task, here or on a machine of a cluster, where it finds what it would find here."""

import contextlib
import os
import platform
import tempfile
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import IO, Any, NamedTuple

from conclugen_jax import __version__
from conclugen_jax.errors import ConclugenError
from conclugen_jax.system import environment, locks
from conclugen_jax.system.pool import Pool, without_script

Begin = Callable[[int], None]
"""Called first in each process, with its place among those that work side by side."""
SEEN = ".seen"
"""File in the folder of the work by which machines find out that it is the same folder."""
LOGS = "logs/ray_{}.log"
"""In that folder, what tasks on a machine of that name say."""


def processors() -> list[int]:
    """Return the numbers of the processors that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def free_memory() -> int | None:
    """Return the bytes that processes of this machine may still take, file caches included; ``None``: unknown."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def begin_task(cores: int, share: float | None, begin: Begin, place: int) -> None:
    """Give this process processors of its own and a share of a GPU's memory, then do what comes first."""
    for processor in processors() if hasattr(os, "sched_setaffinity") else ():
        name = f"conclugen_{os.getuid()}_processor_{processor}"
        if len(_held) < cores and (lock := locks.taken(Path(tempfile.gettempdir(), name))):
            _held[processor] = lock
    if _held:
        os.sched_setaffinity(0, _held)
    if share:
        environment.share_memory(share)
    begin(place)


_held: dict[int, IO[str]] = {}  # processor -> its lock, until this process ends


class Setting(NamedTuple):
    """What a task finds on another machine as it was on this one."""

    variables: dict[str, str]
    directory: str
    folder: str  # of the work
    token: str  # content of the file SEEN in it
    version: str  # of this package


class Remote:
    """An actor that does one task; its methods are called in two threads."""

    def __init__(self) -> None:
        self._pool = Pool(1)

    def call(self, setting: Setting, job: bytes) -> tuple[Any, BaseException | None, int]:
        """Return result, exception and exit code of a task."""
        with without_script():
            future = self._pool.submit(_work, setting, job)
        error = future.exception()
        return None if error else future.result(), error, self._pool.close()[0] or 0

    def terminate(self) -> None:
        """Send SIGTERM to the process of the task."""
        self._pool.terminate()


def _work(setting: Setting, job: bytes) -> Any:
    """Do a task in a process of its own, in the setting of the machine that sent it."""
    environment.carry(setting.variables)
    here, way_out = platform.node(), "name a folder that all nodes of the cluster share, at the same path"
    if setting.version != __version__:
        raise ConclugenError(
            f"{here} has conclugen_jax {__version__}, expected {setting.version}; install that on all nodes"
        )
    try:
        os.chdir(setting.directory)
    except OSError as e:
        raise ConclugenError(f"{setting.directory}: {here} has no such folder to work in; {way_out}") from e
    seen = Path(setting.folder, SEEN)
    if not seen.exists() or seen.read_text(encoding="utf-8") != setting.token:
        raise ConclugenError(f"{setting.folder}: {here} does not see this folder; {way_out}")
    log = Path(setting.folder, LOGS.format(here))
    with (
        log.open("a", encoding="utf-8", buffering=1) as said,
        contextlib.redirect_stderr(said),
        contextlib.redirect_stdout(said),
    ):
        begin, function, task = ForkingPickler.loads(job)
        begin()
        return function(task)

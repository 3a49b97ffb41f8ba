"""The folder of a run: one owner at a time, its configuration and data manifest, its metrics log."""

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from conclugen_jax.data import manifest as manifest_lib
from conclugen_jax.data.manifest import Manifest
from conclugen_jax.errors import ConclugenError
from conclugen_jax.run import config as config_lib
from conclugen_jax.run import trackers
from conclugen_jax.system import files, locks, processes, progress

CONFIG = "config.json"
DATA = "data.json"
METRICS = "metrics.jsonl"
PROBES = "probes.jsonl"
BAD_STEPS = "bad_steps.jsonl"
LOCK = ".lock"
IMPORTED = "import.json"
"""In workdirs made of an export: hashes of the weights."""


@contextlib.contextmanager
def claim(workdir: str | Path) -> Iterator[Path]:
    """Own a workdir while the context lasts; it is made if needed.

    The lock belongs to the process and vanishes with it, so a killed run leaves nothing to clean up. Of several
    processes the main one is the owner.

    Raises:
      ConclugenError: the folder cannot be written, or a running process owns it.
    """
    workdir = Path(workdir)
    if not processes.is_main():
        yield workdir
        return
    with contextlib.ExitStack() as owned:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            owned.enter_context(locks.hold(workdir / LOCK))
            with files.replaced(workdir / ".probe") as probe:  # a full disk shows only when data is written and synced
                probe.write_bytes(bytes(65536))
            (workdir / ".probe").unlink()
        except locks.Busy as e:
            raise ConclugenError(
                f"{workdir}: in use by {e}; wait for it, stop it, or choose another --workdir"
            ) from None
        except OSError as e:
            raise ConclugenError(
                f"{workdir}: cannot be written ({e.strerror}); choose another --workdir or free it"
            ) from e
        yield workdir


PLACES = ("data.path", "online_probe.path", "downstream.checkpoint")
"""Keys that say where something is, not what."""


def settle(workdir: Path, config: ConfigDict, data: Manifest, *, moved: bool = False) -> None:
    """Write configuration and data manifest into a new workdir, or compare them with those of an old one.

    Args:
      workdir: of the run.
      config: of the run.
      data: manifest of its data set.
      moved: what the configuration names may lie elsewhere now; the data set must be the same by its hashes.

    Raises:
      ConclugenError: the workdir belongs to a run with another configuration or other data; the differences are
        listed.
    """
    if not processes.is_main():
        return
    if (workdir / IMPORTED).exists():
        raise ConclugenError(
            f"{workdir}: holds imported weights, which come without what training needs to go on; choose another --workdir"
        )
    if (workdir / CONFIG).exists():
        changed = config_lib.differences(read_config(workdir), config)
        elsewhere = [line for line in changed if line.startswith(tuple(f"config.{key}:" for key in PLACES))]
        if elsewhere == changed and not moved and changed:
            raise ConclugenError(
                f"{workdir}: the run here was started with {'; '.join(changed)}; repeat the command with --moved if that is "
                "the same thing in another place, or choose another --workdir"
            )
        if [line for line in changed if line not in elsewhere]:
            raise ConclugenError(
                f"{workdir}: the run here was started with another configuration ({'; '.join(changed)}); repeat that one to "
                "resume or choose another --workdir"
            )
        if read_data(workdir).fingerprint() != data.fingerprint():
            raise ConclugenError(
                f"{workdir}: the run here was started with other data (data set {data.name} {data.version} has changed since); "
                "restore that data set to resume or choose another --workdir"
            )
        if elsewhere:
            files.write_atomically(workdir / CONFIG, config_lib.to_json(config))
        return
    if any(workdir.glob("checkpoints/[0-9]*")):
        raise ConclugenError(
            f"{workdir / CONFIG}: missing, but there are checkpoints; restore it or choose another --workdir"
        )
    files.write_atomically(workdir / DATA, data.to_json())
    files.write_atomically(workdir / CONFIG, config_lib.to_json(config))


def read_config(workdir: str | Path) -> ConfigDict:
    """The configuration of the run in a workdir."""
    path = Path(workdir) / CONFIG
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConclugenError(f"{path}: no run here that can be read ({e}); name the workdir of a run") from e
    return config_lib.from_json(text, str(path))


def read_data(workdir: str | Path) -> Manifest:
    """The manifest of the data set that the run in a workdir was started with."""
    return manifest_lib.read_file(Path(workdir) / DATA, missing="name the workdir of a run")


def left_out_steps(workdir: Path) -> list[int]:
    """Steps of a run that went wrong, whose updates are left out; see :func:`leave_out`.

    Raises:
      ConclugenError: the file is damaged.
    """
    path = workdir / BAD_STEPS
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        steps = {json.loads(line)["step"] for line in lines}
        if not all(isinstance(step, int) for step in steps):
            raise TypeError
        return sorted(steps)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise ConclugenError(
            f"{path}: damaged ({type(e).__name__}); restore it, or choose another --workdir: without it the run would not "
            "be the same"
        ) from e


def leave_out(workdir: Path, record: dict[str, Any]) -> None:
    """Note a step whose update is left out.

    Args:
      workdir: of the run.
      record: ``step``, ``reason``, ``ids`` of examples that are not finite, ``rows`` of the split that were its batch.
    """
    path = workdir / BAD_STEPS
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    files.write_atomically(path, before + json.dumps(record) + "\n")


class MetricsLog:
    """``metrics.jsonl``: one JSON object a line, in the order of steps.

    Opened at a step, it drops what a killed run wrote beyond the checkpoint of that step, so that the resumed run
    neither doubles nor misses a line. A context manager: the file is closed however the run ends. Of several processes
    the main one writes.
    """

    def __init__(self, workdir: Path, step: int, *, name: str = METRICS, tensorboard: bool = False, tracker: str = ""):
        self._mirrors, self._path = None, workdir / name
        self._waiting, self._warned = b"", False  # what a full disk has not taken yet
        if not processes.is_main():
            self._file = open(os.devnull, "ab", buffering=0)  # noqa: SIM115
            return
        self._mirrors = trackers.Mirrors(workdir, step, tensorboard=tensorboard, tracker=tracker)
        kept = [line for line in self._lines() if json.loads(line)["step"] <= step]
        files.write_atomically(self._path, "".join(line + "\n" for line in kept))
        self._file = self._path.open("ab", buffering=0)

    def write(self, records: list[dict[str, Any]]) -> None:
        """Append records and hand them to the operating system.

        What a full disk does not take is kept and tried again the next time, with a warning; a mirror that fails is dropped
        with a warning.
        """
        self._waiting += "".join(json.dumps(record) + "\n" for record in records).encode()
        self._drain()
        if self._mirrors is not None:
            self._mirrors.write(records)

    def sync(self) -> bool:
        """Put everything on the disk; whether that worked.

        Raises:
          ConclugenError: the file is not there any more.
        """
        self._drain()
        if processes.is_main() and not self._path.exists():
            raise ConclugenError(f"{self._path}: removed while the run was going on; repeat the command to start again")
        try:
            os.fsync(self._file.fileno())
        except OSError as e:
            if e.errno != errno.EINVAL:  # no file of a disk
                return False
        return not self._waiting

    def _drain(self) -> None:
        try:
            while self._waiting:
                written = self._file.write(self._waiting)
                self._waiting = self._waiting[written:]
        except OSError as e:
            if not self._warned:
                progress.say(
                    f"warning: {self._path}: cannot be written ({e.strerror}); tried again after the next steps"
                )
            self._warned = True

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        """Close the file; lines that are still not written are an error, unless another has ended the run."""
        if self._mirrors is not None:
            self._mirrors.close()
        complete = self.sync()
        with contextlib.suppress(OSError):
            self._file.close()
        if not complete and kind is None:
            raise ConclugenError(f"{self._path}: cannot be written; free space and repeat the command to resume")

    def _lines(self) -> list[str]:
        """Complete lines; a line that a kill cut short is dropped."""
        if not self._path.exists():
            return []
        complete = self._path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
        return [line for line in complete if _is_record(line)]


def _is_record(line: str) -> bool:
    try:
        return isinstance(json.loads(line)["step"], int)
    except (json.JSONDecodeError, KeyError, TypeError):
        return False

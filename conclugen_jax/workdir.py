"""The folder of a run: one owner at a time, its configuration and data manifest, its metrics log."""

import contextlib
import datetime
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from conclugen_jax import config as config_lib
from conclugen_jax import processes, trackers
from conclugen_jax.data import manifest as manifest_lib
from conclugen_jax.data.manifest import Manifest
from conclugen_jax.errors import ConclugenError

CONFIG = "config.json"
DATA = "data.json"
METRICS = "metrics.jsonl"
PROBES = "probes.jsonl"
LOCK = ".lock"


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
    mend = "choose another --workdir or free it"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = open(workdir / LOCK, "a+")  # noqa: SIM115  closed below, after the run
    except OSError as e:
        raise ConclugenError(f"{workdir}: cannot be written ({e.strerror}); {mend}") from e
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise ConclugenError(
                f"{workdir}: in use by {lock.read().strip() or 'another process'}; wait for it, stop it, or "
                "choose another --workdir"
            ) from None
        try:
            _write_owner(lock)
            _probe(workdir)
        except OSError as e:
            raise ConclugenError(f"{workdir}: cannot be written ({e.strerror}); {mend}") from e
        yield workdir


def _write_owner(lock: Any) -> None:
    lock.truncate(0)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    lock.write(f"process {os.getpid()} on {socket.gethostname()} since {now}\n")
    lock.flush()


def _probe(workdir: Path) -> None:
    """Write and sync a file, since a full disk shows only then."""
    probe = workdir / ".probe"
    try:
        with probe.open("wb") as f:
            f.write(bytes(65536))
            f.flush()
            os.fsync(f.fileno())
    finally:
        probe.unlink(missing_ok=True)


def settle(workdir: Path, config: ConfigDict, data: Manifest) -> None:
    """Write configuration and data manifest into a new workdir, or compare them with those of an old one.

    Raises:
      ConclugenError: the workdir belongs to a run with another configuration or other data; the differences are
        listed.
    """
    if not processes.is_main():
        return
    if (workdir / CONFIG).exists():
        changed = config_lib.differences(read_config(workdir), config)
        if changed:
            raise ConclugenError(
                f"{workdir}: the run here was started with another configuration ({'; '.join(changed)}); repeat that one to "
                "resume or choose another --workdir"
            )
        if read_data(workdir).fingerprint() != data.fingerprint():
            raise ConclugenError(
                f"{workdir}: the run here was started with other data (data set {data.name} {data.version} has changed since); "
                "restore that data set to resume or choose another --workdir"
            )
        return
    if any(workdir.glob("checkpoints/[0-9]*")):
        raise ConclugenError(
            f"{workdir / CONFIG}: missing, but there are checkpoints; restore it or choose another --workdir"
        )
    write_atomically(workdir / DATA, data.to_json())
    write_atomically(workdir / CONFIG, config_lib.to_json(config))


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


def write_atomically(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all, even after a power cut."""
    scratch = path.with_name(f".{path.name}.tmp")
    try:
        with scratch.open("w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(scratch, path)
    except OSError as e:
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise ConclugenError(f"{path}: cannot be written ({e.strerror}); free space or choose another --workdir") from e


class MetricsLog:
    """``metrics.jsonl``: one JSON object a line, in the order of steps.

    Opened at a step, it drops what a killed run wrote beyond the checkpoint of that step, so that the resumed run
    neither doubles nor misses a line. A context manager: the file is closed however the run ends. Of several processes
    the main one writes.
    """

    def __init__(self, workdir: Path, step: int, *, name: str = METRICS, tensorboard: bool = False):
        self._mirror, self._path = None, workdir / name
        if not processes.is_main():
            self._file = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
            return
        if tensorboard:
            self._mirror = trackers.TensorBoard(workdir, step)
        kept = [line for line in self._lines() if json.loads(line)["step"] <= step]
        write_atomically(self._path, "".join(line + "\n" for line in kept))
        self._file = self._path.open("a", encoding="utf-8")

    def write(self, records: list[dict[str, Any]]) -> None:
        """Append records and hand them to the operating system; a mirror that fails is dropped with a warning."""
        try:
            self._file.writelines(json.dumps(record) + "\n" for record in records)
            self._file.flush()
        except OSError as e:
            raise ConclugenError(
                f"{self._path}: cannot be written ({e.strerror}); free space and repeat the command to resume"
            ) from e
        if self._mirror is not None:
            try:
                self._mirror.write(records)
            except Exception as e:  # whatever it is, it must not end the run
                logging.warning("TensorBoard files are no longer written (%s); %s is complete", e, self._path)
                self._mirror = None

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._mirror is not None:
            self._mirror.close()
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError:
            pass  # a failed write has been reported by write(); nothing more can be saved here
        finally:
            with contextlib.suppress(OSError):
                self._file.close()

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

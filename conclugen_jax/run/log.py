"""The logs of a run: metrics line by line, and the steps whose update is skipped."""

import contextlib
import errno
import json
import os
from pathlib import Path
from typing import Any

from conclugen_jax.errors import ConclugenError
from conclugen_jax.run import trackers
from conclugen_jax.system import files, processes, progress

METRICS = "metrics.jsonl"
PROBES = "probes.jsonl"
BAD_STEPS = "bad_steps.jsonl"


def left_out_steps(workdir: Path) -> list[int]:
    """Return the steps whose update is skipped, in order; see :func:`leave_out`.

    Raises:
      ConclugenError: the file is damaged.
    """
    path = workdir / BAD_STEPS
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    except OSError as e:
        raise ConclugenError(f"{path}: cannot be read ({e.strerror}); make it readable and repeat the command") from e
    steps = [_step_of(line) for line in lines]
    if None in steps:
        raise ConclugenError(
            f"{path}: damaged in line {steps.index(None) + 1}; restore it, or choose another --workdir: without it the run "
            "would not be the same"
        )
    return sorted(set(steps))


def records(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a log; none where there is no file. A last line that a kill cut short is ignored.

    Raises:
      ConclugenError: the file cannot be read, or a line is not a JSON object with a step.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as e:
        raise ConclugenError(f"{path}: cannot be read ({e}); repeat the run in a new folder") from e
    for number, line in enumerate(lines, 1):
        if _step_of(line) is None:
            raise ConclugenError(f"{path}, line {number}: not a JSON object with a step; correct or delete that line")
    return [json.loads(line) for line in lines]


def leave_out(workdir: Path, record: dict[str, Any]) -> None:
    """Note a step whose update is skipped.

    Args:
      workdir: of the run.
      record: ``step``, ``reason``, ``ids`` of examples that are not finite, ``rows`` of the split that were its batch.
    """
    path = workdir / BAD_STEPS
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    files.write_atomically(path, before + json.dumps(record) + "\n")


class MetricsLog:
    """A log with one JSON object a line, in the order of steps; a context manager.

    Opened at a step, it drops the lines beyond it, which a killed run wrote after the checkpoint of that step. So the
    resumed run neither repeats nor misses a line. Of several processes only the main one writes.
    """

    def __init__(self, workdir: Path, step: int, *, name: str = METRICS, tensorboard: bool = False, tracker: str = ""):
        """Open a log.

        Args:
          workdir: of the run.
          step: that the run resumes after.
          name: of the file.
          tensorboard: whether event files are written, too.
          tracker: ``wandb``, ``mlflow`` or empty.

        Raises:
          ConclugenError: the file cannot be written, or a package is not installed.
        """
        self._path, self._file = workdir / name, None
        self._waiting, self._warned = b"", False  # lines that are not written yet, and whether that was said
        if processes.is_main():
            self._mirrors = trackers.Mirrors(workdir, step, tensorboard=tensorboard, tracker=tracker)
            files.write_atomically(self._path, "".join(f"{line}\n" for line in self._lines(step)))
            self._file = self._path.open("ab", buffering=0)

    def write(self, records: list[dict[str, Any]]) -> None:
        """Append records and hand them to the operating system.

        Lines are buffered, with one warning, while the disk is full; a mirror that fails is dropped with a warning.
        """
        if self._file is not None:
            self._waiting += "".join(json.dumps(record) + "\n" for record in records).encode()
            self._drain()
            self._mirrors.write(records)

    def sync(self) -> bool:
        """Put all lines on the disk; return whether that worked.

        Raises:
          ConclugenError: the file was removed.
        """
        if self._file is None:
            return True
        self._drain()
        if not self._path.exists():
            raise ConclugenError(f"{self._path}: removed while the run was going on; repeat the command to start again")
        try:
            os.fsync(self._file.fileno())
        except OSError as e:
            if e.errno != errno.EINVAL:  # a pipe or a device, which cannot be synced
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
        """Close the file; unwritten lines are an error, unless another error has ended the run."""
        if self._file is None:
            return
        self._mirrors.close()
        complete = self.sync()
        with contextlib.suppress(OSError):
            self._file.close()
        if not complete and kind is None:
            raise ConclugenError(f"{self._path}: cannot be written; free space and repeat the command to resume")

    def _lines(self, last: int) -> list[str]:
        """Return the lines up to a step, without a last one that a kill cut short."""
        if not self._path.exists():
            return []
        complete = self._path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
        return [line for line in complete if (step := _step_of(line)) is not None and step <= last]


def _step_of(line: str) -> int | None:
    """Return the step of a line; ``None`` if the line is damaged."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) else None

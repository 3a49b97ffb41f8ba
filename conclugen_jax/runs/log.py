"""Logs of a run: metrics line by line, mirrors for other tools, and the steps whose update is skipped."""

import contextlib
import errno
import importlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from conclugen_jax.errors import ConclugenError
from conclugen_jax.runs.layout import METRICS, PROBES  # noqa: F401
from conclugen_jax.system import files, processes, progress

BAD_STEPS = "bad_steps.jsonl"
FOLDER = "tensorboard"
RUN_ID = "tracker.json"
"""File with the id of the run at its tracker, so that a resumed run continues the same curves."""

Mirror = tuple[Callable[[int, Mapping[str, float]], Any], Callable[[], Any]]
"""The functions that add the numbers of a step and that end the mirror."""


def left_out_steps(workdir: Path) -> list[int]:
    """Return the steps whose update is skipped, in order; see :func:`leave_out`. A damaged file is refused."""
    way_out = "restore it, or choose another --workdir: without it the run would not be the same"
    return sorted({record["step"] for record in records(workdir / BAD_STEPS, way_out=way_out, whole=True)})


def records(path: Path, *, way_out: str = "correct or delete that line", whole: bool = False) -> list[dict[str, Any]]:
    """Read a log, empty without a file; refuse lines without a step, but ignore a last one cut short unless ``whole``."""
    try:
        lines = _lines(path)
    except OSError as e:
        raise ConclugenError(f"{path}: cannot be read ({e.strerror}); make it readable and repeat the command") from e
    lines = lines if whole and lines[-1] else lines[:-1]
    for number, line in enumerate(lines, 1):
        if _step_of(line) is None or "\ufffd" in line:
            raise ConclugenError(f"{path}, line {number}: not a JSON object with a step; {way_out}")
    return [json.loads(line) for line in lines]


def leave_out(workdir: Path, record: dict[str, Any]) -> None:
    """Note a step that is skipped: ``step``, ``reason``, ``ids`` of examples that are not finite, ``rows`` of its batch."""
    lines = [*_lines(workdir / BAD_STEPS)[:-1], json.dumps(record), ""]
    files.write_atomically(workdir / BAD_STEPS, "\n".join(lines))


class MetricsLog(contextlib.AbstractContextManager):
    """A log with one JSON object a line, in the order of steps; a context manager.

    Opened at a step, it drops the lines beyond it, which a killed run wrote after the checkpoint of that step. So the
    resumed run neither repeats nor misses a line. Of several processes only the main one writes. Mirrors, such as event files
    or a run at a tracker, get the numbers too; one that fails is dropped with one warning, since this log is the record.
    """

    def __init__(self, workdir: Path, step: int, *, name: str = METRICS, tensorboard: bool = False, tracker: str = ""):
        """Open a log to resume after a step, with optional mirrors; raise if a file or package cannot be used."""
        self._path, self._file = workdir / name, None
        self._waiting, self._warned = b"", False  # lines that are not written yet, and whether that was said
        self._mirrors: dict[str, Mirror] = {}
        if not processes.is_main():
            return
        for mirror in ["TensorBoard"] * tensorboard + [tracker] * bool(tracker):
            package, begin, why, way_out = KINDS[mirror]
            try:
                module = importlib.import_module(package)
            except ImportError as e:
                raise ConclugenError(f"{why} but {package} is not installed; pip install {package} or {way_out}") from e
            with self._surviving(mirror):
                self._mirrors[mirror] = begin(module, workdir, step)
        kept = [line for line in _lines(self._path)[:-1] if (at := _step_of(line)) is not None and at <= step]
        files.write_atomically(self._path, "".join(f"{line}\n" for line in kept))
        self._file = self._path.open("ab", buffering=0)

    @contextlib.contextmanager
    def _surviving(self, mirror: str) -> Iterator[None]:
        """Drop a mirror that fails, with a warning: an error of a tracker must not end the run."""
        try:
            yield
        except Exception as e:
            self._mirrors.pop(mirror, None)
            logging.warning("%s is dropped (%s: %s); metrics.jsonl is complete", mirror, type(e).__name__, e)

    def write(self, records: list[dict[str, Any]]) -> None:
        """Append records and pass them to the operating system; buffer them while the disk is full, with one warning."""
        if self._file is None:
            return
        self._waiting += "".join(json.dumps(record) + "\n" for record in records).encode()
        self._drain()
        for record in records:
            numbers = {name: x for name, x in record.items() if name != "step"}
            for mirror, (write, _) in list(self._mirrors.items()):
                with self._surviving(mirror):
                    write(record["step"], numbers)

    def sync(self) -> bool:
        """Sync all lines to the disk and return whether that worked; raise ``ConclugenError`` if the file was removed."""
        if self._file is None:
            return True
        self._drain()
        if not self._path.exists():
            raise ConclugenError(f"{self._path}: was removed during the run; repeat the command to start again")
        try:
            os.fsync(self._file.fileno())
        except OSError as e:
            return e.errno == errno.EINVAL and not self._waiting  # a pipe or a device, which cannot be synced
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

    def __exit__(self, kind: Any, *_: Any) -> None:
        """Close the file; unwritten lines are an error, unless another error has ended the run."""
        if self._file is None:
            return
        for mirror, (_, close) in list(self._mirrors.items()):
            with self._surviving(mirror):
                close()
        complete = self.sync()
        with contextlib.suppress(OSError):
            self._file.close()
        if not complete and kind is None:
            raise ConclugenError(f"{self._path}: cannot be written; free space and repeat the command to resume")


def _lines(path: Path) -> list[str]:
    """Return the lines of a file, and the rest behind the last one: empty, or a line that a kill cut short."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return [""]


def _step_of(line: str) -> int | None:
    """Return the step of a line; ``None`` if the line is damaged."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) else None


def _tensorboard(package: Any, workdir: Path, step: int) -> Mirror:
    # Later events, of a killed run, are hidden.
    writer = package.SummaryWriter(str(workdir / FOLDER), purge_step=step + 1)

    def write(step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return write, writer.close


def _wandb(package: Any, workdir: Path, _step: int) -> Mirror:
    run = package.init(id=_run_id(workdir, "wandb"), resume="allow", name=workdir.name, dir=str(workdir))
    files.write_json(workdir / RUN_ID, {"wandb": run.id})
    return lambda step, numbers: run.log(numbers, step=step), run.finish


def _mlflow(package: Any, workdir: Path, _step: int) -> Mirror:
    number = _run_id(workdir, "mlflow")
    run = package.start_run(run_id=number) if number else package.start_run(run_name=workdir.name)
    files.write_json(workdir / RUN_ID, {"mlflow": run.info.run_id})
    return lambda step, numbers: package.log_metrics(numbers, step=step), package.end_run


KINDS = {
    "TensorBoard": ("tensorboardX", _tensorboard, "config.train.tensorboard is True", "set the key to False"),
    "wandb": ("wandb", _wandb, "config.train.tracker is 'wandb'", "empty the key"),
    "mlflow": ("mlflow", _mlflow, "config.train.tracker is 'mlflow'", "empty the key"),
}
"""Mirror -> its package, what opens it, why it is wanted and how to do without. WANDB_* and MLFLOW_* variables set the rest."""


def _run_id(workdir: Path, tracker: str) -> str | None:
    try:
        return files.read_json(workdir / RUN_ID, dict[str, str], way_out="").get(tracker)
    except ConclugenError:  # without the note a new run is started
        return None

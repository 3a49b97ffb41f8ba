"""Mirrors of the metrics log for other tools. ``metrics.jsonl`` is the record; a mirror may fail."""

import contextlib
import importlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from conclugen_jax.errors import ConclugenError
from conclugen_jax.system import files

FOLDER = "tensorboard"
RUN_ID = "tracker.json"
"""File with the id of the run at its tracker, so that a resumed run continues the same curves."""

Mirror = tuple[Callable[[int, Mapping[str, float]], Any], Callable[[], Any]]
"""What adds the numbers of a step, and what ends the mirror."""


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


class Mirrors:
    """Several mirrors; one that fails is dropped with one warning."""

    def __init__(self, workdir: Path, step: int, *, tensorboard: bool, tracker: str):
        """Open event files, a run at a tracker (``wandb``, ``mlflow``) or neither, to continue after a step.

        Raises:
          ConclugenError: a package is not installed.
        """
        self._open: dict[str, Mirror] = {}
        for name in ["TensorBoard"] * tensorboard + [tracker] * bool(tracker):
            package, begin, why, way_out = KINDS[name]
            try:
                module = importlib.import_module(package)
            except ImportError as e:
                raise ConclugenError(f"{why} but {package} is not installed; pip install {package} or {way_out}") from e
            with self._surviving(name):
                self._open[name] = begin(module, workdir, step)

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Hand the numbers of records to all mirrors that still work."""
        for record in records:
            numbers = {name: x for name, x in record.items() if name != "step"}
            for name, (write, _) in list(self._open.items()):
                with self._surviving(name):
                    write(record["step"], numbers)

    def close(self) -> None:
        """Close all that still work."""
        for name, (_, close) in list(self._open.items()):
            with self._surviving(name):
                close()

    @contextlib.contextmanager
    def _surviving(self, name: str) -> Iterator[None]:
        """Drop a mirror that fails, with a warning: an error of a tracker must not end the run."""
        try:
            yield
        except Exception as e:
            self._open.pop(name, None)
            logging.warning("%s is dropped (%s: %s); metrics.jsonl is complete", name, type(e).__name__, e)


def _run_id(workdir: Path, tracker: str) -> str | None:
    try:
        return files.read_json(workdir / RUN_ID, dict[str, str], way_out="").get(tracker)
    except ConclugenError:  # without the note a new run is started
        return None

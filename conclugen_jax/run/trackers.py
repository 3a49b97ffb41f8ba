"""Mirrors of the metrics log for other tools. ``metrics.jsonl`` is the record; a mirror may fail."""

import importlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from conclugen_jax.errors import ConclugenError
from conclugen_jax.system import files

FOLDER = "tensorboard"
RUN_ID = "tracker.json"
"""File with the id of the run at its tracker, so that a resumed run continues the same curves."""


class Mirror(Protocol):
    """A place besides the log where the numbers of records are written."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Add the numbers of a step."""

    def close(self) -> None:
        """Write what is buffered and end."""


class TensorBoard:
    """Event files for TensorBoard in ``WORKDIR/tensorboard``, written by tensorboardX."""

    def __init__(self, workdir: Path, step: int):
        """Open event files that continue after a step; later events, of a killed run, are hidden.

        Raises:
          ConclugenError: tensorboardX is not installed.
        """
        tensorboardx = _package("tensorboardX", "config.train.tensorboard is True", "set the key to False")
        self._writer = tensorboardx.SummaryWriter(str(workdir / FOLDER), purge_step=step + 1)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Add one point per number."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is buffered."""
        self._writer.close()


class WeightsAndBiases:
    """A run at Weights & Biases; its settings (project, host, key, offline) come from WANDB_* variables."""

    def __init__(self, workdir: Path, step: int):
        """Start a run, or resume that of the workdir.

        Raises:
          ConclugenError: wandb is not installed.
        """
        wandb = _package("wandb", "config.train.tracker is 'wandb'", "empty the key")
        number = _run_id(workdir, "wandb")
        self._run = wandb.init(id=number, resume="allow", name=workdir.name, dir=str(workdir))
        _keep_run_id(workdir, "wandb", self._run.id)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Log the numbers of a step."""
        self._run.log(numbers, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class MLflow:
    """A run at MLflow; MLFLOW_* variables say where it is kept."""

    def __init__(self, workdir: Path, step: int):
        """Start a run, or resume that of the workdir.

        Raises:
          ConclugenError: mlflow is not installed.
        """
        self._mlflow = _package("mlflow", "config.train.tracker is 'mlflow'", "empty the key")
        number = _run_id(workdir, "mlflow")
        run = self._mlflow.start_run(run_id=number) if number else self._mlflow.start_run(run_name=workdir.name)
        _keep_run_id(workdir, "mlflow", run.info.run_id)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Log the numbers of a step."""
        self._mlflow.log_metrics(numbers, step=step)

    def close(self) -> None:
        """End the run."""
        self._mlflow.end_run()


TRACKERS: dict[str, Callable[[Path, int], Mirror]] = {"wandb": WeightsAndBiases, "mlflow": MLflow}


class Mirrors:
    """Several mirrors; one that fails is dropped with one warning."""

    def __init__(self, workdir: Path, step: int, *, tensorboard: bool, tracker: str):
        """Open the mirrors that are wanted.

        Args:
          workdir: of the run.
          step: that the run resumes after.
          tensorboard: whether event files are written.
          tracker: ``wandb``, ``mlflow`` or empty.

        Raises:
          ConclugenError: a package is not installed.
        """
        wanted = [TensorBoard] * tensorboard + ([TRACKERS[tracker]] if tracker else [])
        self._open: list[Mirror] = []
        for kind in wanted:
            self._try(kind.__name__, lambda kind=kind: self._open.append(kind(workdir, step)))

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Hand the numbers of records to all mirrors that still work."""
        for record in records:
            step, numbers = record["step"], {name: x for name, x in record.items() if name != "step"}
            self._open = [m for m in self._open if self._try(type(m).__name__, m.write, step, numbers)]

    def close(self) -> None:
        """Close all that still work."""
        for mirror in self._open:
            self._try(type(mirror).__name__, mirror.close)

    @staticmethod
    def _try(name: str, action: Callable[..., Any], *arguments: Any) -> bool:
        try:
            action(*arguments)
        except ConclugenError:
            raise
        except Exception as e:  # an error of a tracker must not end the run
            logging.warning("%s is dropped (%s: %s); metrics.jsonl is complete", name, type(e).__name__, e)
            return False
        return True


def _package(name: str, why: str, way_out: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise ConclugenError(f"{why} but {name} is not installed; pip install {name} or {way_out}") from e


def _run_id(workdir: Path, tracker: str) -> str | None:
    try:
        return files.read_json(workdir / RUN_ID, dict[str, str], way_out="").get(tracker)
    except ConclugenError:  # without the note a new run is started
        return None


def _keep_run_id(workdir: Path, tracker: str, number: str) -> None:
    with files.replaced(workdir / RUN_ID) as scratch:
        scratch.write_text(json.dumps({tracker: number}) + "\n", encoding="utf-8")

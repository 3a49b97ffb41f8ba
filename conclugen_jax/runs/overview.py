"""Summarise a run in one line from the files in its folder; reads only text, so that a thousand runs take seconds."""

import functools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np

from conclugen_jax.data import manifest as manifest_lib
from conclugen_jax.errors import ConclugenError
from conclugen_jax.runs import configuration_files, layout
from conclugen_jax.system import files, locks

RUNNING, DONE, INTERRUPTED, FAILED, BROKEN = "running", "done", "interrupted", "failed", "broken"
TAIL = 1 << 16
"""Bytes of the end of a log that are read."""
MOST_OF_PROBES = 1 << 24
"""Bytes of probes that are read: all, since the best may be anywhere."""
WRITTEN = (
    *(layout.CONFIG, layout.METRICS, layout.PROBES, layout.RESULT, layout.FAILURE, layout.DONE, layout.LOCK),
    layout.CHECKPOINTS,
)
"""Files that a run writes while it runs."""
TERMS = "contrastive", "clustering", "reconstruction", "instance", "fusion"

T = TypeVar("T")


class Score(NamedTuple):
    """The best score of a run."""

    value: float
    measure: str  # accuracy, mae, or what a search measures
    of: str  # of which vectors, rows and labels


class Row(NamedTuple):
    """One run; ``None`` or an empty text where something is not known."""

    folder: Path
    kind: str
    state: str
    changed: float  # seconds since 1970
    method: str = ""
    data: str = ""
    step: int | None = None  # of a study: runs that are done; of a search: trials that have ended
    steps: int | None = None
    loss: float | None = None
    score: Score | None = None
    note: str = ""  # why it has failed or cannot be read


class _Settings(msgspec.Struct):
    """What is read of ``config.json``."""

    loss: dict[str, Any]
    train: dict[str, Any]
    data: dict[str, Any]
    downstream: dict[str, Any]


class _Data(msgspec.Struct):
    """What is read of ``data.json``."""

    name: str
    version: str
    splits: dict[str, manifest_lib.SplitFacts]


def read(path: Path, like: type[T] = dict[str, Any]) -> T:
    """Read a JSON file of a run."""
    return files.read_json(path, like, way_out="restore it or delete the run")


def changed(folder: Path, names: Sequence[str]) -> float:
    """Return the time at which any of the files was last written, in seconds since 1970; 0 if there are none."""
    return max(((folder / name).stat().st_mtime for name in names if (folder / name).exists()), default=0.0)


def of_run(folder: Path) -> Row:
    """Read a pretraining or a downstream run.

    Raises:
      ConclugenError: a file that cannot be read; LookupError, TypeError and ValueError: one that is not of a run.
    """
    written, error = changed(folder, WRITTEN), failure(folder)
    if error and not (folder / layout.CONFIG).exists():  # it failed before it began
        return Row(folder, "", INTERRUPTED if error == layout.BEGUN else FAILED, written, note=error)
    config, data = read(folder / layout.CONFIG, _Settings), None
    if (folder / layout.DATA).exists():
        data = read(folder / layout.DATA, _Data)
    last, protocol = next(_lines(folder / layout.METRICS), {}), config.downstream["protocol"]
    result = read(folder / layout.RESULT) if (folder / layout.RESULT).exists() else None
    trained = result or config.downstream["checkpoint"] or protocol in ("supervised", "raw_features", "untrained")
    found = _downstream(config, result, last) if trained else _pretraining(folder, config, data, last)
    state = DONE if found.pop("done") else INTERRUPTED
    if locks.holder(folder / layout.LOCK):
        state = RUNNING
    elif error:
        state = INTERRUPTED if error == layout.BEGUN else FAILED
    named = result["data"] if result else {"name": data.name, "version": data.version} if data else {}
    # A skipped step has none.
    loss = next((one["loss"] for one in _lines(folder / layout.METRICS) if "loss" in one), None)
    found |= {"data": " ".join(named[key] for key in ("name", "version") if key in named)}
    return Row(
        folder=folder,
        state=state,
        changed=written,
        loss=float(loss) if isinstance(loss, int | float) else None,
        note=error if state == FAILED else "",
        **found,
    )


def failure(folder: Path) -> str:
    """Return why a run of a study failed, or that it has begun; an empty text if neither."""
    path = folder / layout.FAILURE
    return str(read(path)["error"]) if path.exists() else ""


def _pretraining(folder: Path, config: _Settings, data: _Data | None, last: Mapping[str, Any]) -> dict[str, Any]:
    steps, saved, epochs, batch = None, _newest(folder), config.train["num_epochs"], config.train["batch_size"]
    imported = (folder / layout.IMPORTED).exists()  # weights alone
    if data and not imported:
        split = data.splits[config.data["train_split"]]
        # Rows without any of the modalities are not trained on; how many these are only the rows say.
        most = split["num_examples"] // batch
        least = max(split["present"][m] for m in config.data["modalities"] or split["present"]) // batch
        steps = most * epochs
        if saved and saved % epochs == 0 and least <= saved // epochs <= most:
            steps = saved
    return {
        "kind": "pretraining",
        "method": method(json.dumps(config.loss)),
        "step": max(saved, last.get("step", 0)),
        "steps": steps,
        "score": _probed(folder),
        "done": bool(saved) and (imported or saved == steps),
    }


def _downstream(config: _Settings, result: Mapping[str, Any] | None, last: Mapping[str, Any]) -> dict[str, Any]:
    steps, source = None, config.downstream["checkpoint"]
    if any(name.startswith("validation/") for name in last):  # the last step of an epoch
        steps = last["step"] // (last["epoch"] + 1) * config.train["num_epochs"]
    return {
        "kind": config.downstream["protocol"].replace("_", " "),
        "method": method_of(Path(source)) if source else "",
        "step": last.get("step"),
        "steps": steps,
        "score": _scored(result) if result else None,
        "done": result is not None,
    }


def _newest(folder: Path) -> int:
    """Return the step of the newest checkpoint; 0 without any."""
    saved = (folder / layout.CHECKPOINTS).glob("[0-9]*")
    return max((int(path.name) for path in saved if path.name.isdecimal()), default=0)


def _lines(path: Path, most: int = TAIL) -> Iterator[dict[str, Any]]:
    """Yield the lines of the end of a log, the last first, without those that are damaged or still being written."""
    try:
        with path.open("rb") as file:
            file.seek(max(os.fstat(file.fileno()).st_size - most, 0))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return
    for line in reversed(lines[:-1]):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            yield record


def _probed(folder: Path) -> Score | None:
    """Return the score of the probe with the most labels on test rows or, without one, of the best online probe."""
    path = folder / f"{layout.EFFICIENCY}.json"
    if path.exists():
        own = [one for one in read(path)["results"] if one["name"].endswith(", pretrained")]
        best = max(own, key=lambda one: one["num_labels"] or math.inf)
        return Score(float(np.mean(best["accuracy"])), "accuracy", f"probe, test, {labels(best['num_labels'])}")
    found = [
        Score(float(value), measure, f"online probe, {kind}")
        for record in _lines(folder / layout.PROBES, most=MOST_OF_PROBES)
        for kind in ("linear", "knn")
        for measure in ("accuracy", "mae")
        if math.isfinite(value := record.get(f"{kind}/{measure}", math.nan))
    ]
    return min(found, key=cost, default=None)


def cost(score: Score) -> float:
    """Return a number that is lower for better scores."""
    return score.value if score.measure == "mae" else -score.value


def labels(number: int) -> str:
    """Return so many labels of each class in words."""
    return f"{number} labels" if number else "all labels"


def _scored(result: Mapping[str, Any]) -> Score:
    """Return the mean score of a downstream run with the most labels, on test rows if any were scored."""
    fits = result.get("selected") or [result]
    most = max(fit.get("labels_per_class", 0) or math.inf for fit in fits)
    own = [fit for fit in fits if (fit.get("labels_per_class", 0) or math.inf) == most]
    split, measure = "test" if "test" in own[0] else "validation", "mae" if result["kind"] == "value" else "accuracy"
    value = float(np.mean([fit[split][measure] for fit in own]))
    return Score(value, measure, f"{split}, {labels(0 if most == math.inf else most)}")


@functools.cache
def method_of(workdir: Path) -> str:
    """Return the method of a pretraining run; empty where it cannot be read."""
    try:
        return method(json.dumps(read(workdir / layout.CONFIG, _Settings).loss))
    except ConclugenError:  # moved or deleted since
        return ""


@functools.cache
def method(loss: str) -> str:
    """Return the first shipped configuration with this section ``loss``, as JSON; else the terms of the objective."""
    own = json.loads(loss)
    for name, section in _shipped().items():
        if {**section, **own} == section:
            return name
    return " + ".join(term for term in TERMS if own.get(f"{term}_weight"))


@functools.cache
def _shipped() -> dict[str, dict[str, Any]]:
    paths = sorted(configuration_files.FOLDER.glob("*.py"))
    paths = [path for path in paths if not path.name.startswith(("study_", "base", "__"))]
    return {path.stem: configuration_files.load(str(path), of_run=True).loss.to_dict() for path in paths}

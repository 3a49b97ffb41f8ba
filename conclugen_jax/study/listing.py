"""List all runs below a folder: single runs, studies, searches, and the runs of ``conclugen run``."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from conclugen_jax.data import manifest as manifest_lib
from conclugen_jax.errors import ConclugenError, reason
from conclugen_jax.runs import layout, overview
from conclugen_jax.runs.overview import BROKEN, DONE, FAILED, INTERRUPTED, RUNNING, Row, Score
from conclugen_jax.system import locks

LEAVES = {layout.CHECKPOINTS, "damaged", "tensorboard", "logs"}
"""Folders of runs that hold no runs."""
OF_RUN = {layout.CONFIG, layout.DATA, layout.METRICS, layout.CHECKPOINTS, layout.RESULT}
"""A folder with two of these is that of a run: one alone may be of another program."""
UNREADABLE = OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError


def below(folder: Path, *, members: bool = False) -> Iterator[Row]:
    """Yield the runs in a folder and below it, in the order of their paths.

    A study, a search or a run over folds is one row; ``members`` yields the runs inside it as well. Links are followed, and
    each folder is looked at once. A run that cannot be read is ``broken``, with the reason.

    Raises:
      ConclugenError: there is no such folder.
    """
    if not folder.is_dir():
        raise ConclugenError(f"{folder}: no such folder; name one with runs below it")
    yield from _walk(folder, members, set())


def _walk(folder: Path, members: bool, seen: set[tuple[int, int]]) -> Iterator[Row]:
    try:
        facts = folder.stat()
        if (place := (facts.st_dev, facts.st_ino)) in seen:
            return
        seen.add(place)
        with os.scandir(folder) as entries:
            found = {entry.name: entry.is_dir() for entry in entries}
    except OSError as e:
        yield Row(folder, "", BROKEN, 0.0, note=f"cannot be read ({e.strerror}); make it readable")
        return
    if manifest_lib.FILE in found:  # a data set
        return
    inner = {name for name, is_folder in found.items() if is_folder and name[0] != "."} - LEAVES
    row = _row(folder, set(found))
    if row:
        yield row
        if not members:
            inner = _own(row.kind, inner)
    for name in sorted(inner):
        yield from _walk(folder / name, members, seen)


def _row(folder: Path, names: set[str]) -> Row | None:
    """Return the kind of run in a folder with files of these names; ``None`` if it holds no run."""
    if names & {layout.REQUEST, layout.STUDY}:
        kind, read = "study", _study
    elif layout.SEARCH in names:
        kind, read = "search", _search
    elif layout.FAILURE in names or len(names & OF_RUN) > 1:
        kind, read = "", overview.of_run
    else:
        return None
    try:
        return read(folder)
    except ConclugenError as e:
        note = str(e)
    except UNREADABLE as e:
        note = f"a file of the run is damaged ({type(e).__name__}: {reason(e)}); restore it or delete the run"
    return Row(folder, kind, BROKEN, overview.changed(folder, sorted(names)), note=note)


def _own(kind: str, inner: set[str]) -> set[str]:
    """Return the subfolders of a run that may hold separate runs."""
    if kind in ("study", "run"):
        return set()
    return {name for name in inner if name != layout.TRIALS and not name.startswith("fold_")}


def _study(folder: Path) -> Row:
    """Read a study, also one that ``conclugen run`` made."""
    whole = (folder / layout.REQUEST).exists()
    study = overview.read(folder / layout.STUDY) if (folder / layout.STUDY).exists() else {}
    listed = overview.read(folder / layout.RUNS, list[str]) if (folder / layout.RUNS).exists() else None
    marks = layout.CONFIG, layout.FAILURE
    members = sorted({path.parent for mark in marks for path in folder.rglob(mark)} - {folder})
    if listed is not None:
        members = [folder / name for name in listed]
    errors = {path: error for path in members if (error := overview.failure(path))}
    failed = {path: error for path, error in errors.items() if error != layout.BEGUN}
    ended = [path for path in members if any((path / name).exists() for name in (layout.RESULT, layout.DONE))]
    done = [path for path in ended if path not in errors]
    state, note = FAILED if failed else INTERRUPTED, ""
    if failed:
        path, error = next(iter(failed.items()))
        note = f"{len(failed)} of {len(members)} runs failed, such as {path.relative_to(folder)}: {error}"
    if (folder / (layout.REPORT if whole else layout.RESULTS)).exists() and len(done) == len(members):
        state = DONE
    written = [overview.changed(path, overview.WRITTEN) for path in members]
    own = layout.STUDY, layout.RUNS, layout.RESULTS, layout.REQUEST, layout.REPORT, layout.LOCK
    pretrained = [path for path in members if path.relative_to(folder).parts[0] == "pretraining"]
    return Row(
        folder=folder,
        kind="run" if whole else "study",
        state=RUNNING if locks.holder(folder / layout.LOCK) else state,
        changed=max([overview.changed(folder, own), *written]),
        method=overview.method_of(pretrained[0]) if whole and pretrained else ", ".join(study.get("methods", ())),
        data=", ".join(study.get("datasets", ())),
        step=len(done),
        steps=len(members) if listed is not None else None,
        score=_best(folder) if (folder / layout.RESULTS).exists() else None,
        note=note,
    )


def _best(folder: Path) -> Score | None:
    """Return the best mean of a method on the first data set of a study with the most labels."""
    summary = overview.read(folder / layout.RESULTS)["summary"]
    found = []
    for row in summary:
        measure, number = next(iter(row["scores"])), row["labels_per_class"]
        of = f"{row['method']} on {row['dataset']}, {row['protocol'].replace('_', ' ')}, {overview.labels(number)}"
        if row["dataset"] == summary[0]["dataset"]:
            found.append((number or math.inf, Score(row["scores"][measure]["mean"], measure, of)))
    most = max((number for number, _ in found), default=0)
    return min((score for number, score in found if number == most), key=overview.cost, default=None)


def _search(folder: Path) -> Row:
    """Read a search; its trials are steps."""
    definition, result = overview.read(folder / layout.SEARCH), {}
    if (folder / layout.RESULT).exists():
        result = overview.read(folder / layout.RESULT)
    counts: Mapping[str, int] = result.get("num_trials", {})
    best: Mapping[str, Any] | None = result.get("best")
    ended = sum(counts.values()) - counts.get("running", 0)
    running = any(locks.holder(path) for path in (folder / layout.TRIALS).glob("*.lock"))
    state = DONE if ended and not counts.get("running") else INTERRUPTED
    logs = [overview.changed(path, overview.WRITTEN) for path in (folder / layout.TRIALS).glob("[0-9]*")]
    data = definition["data"]
    score = Score(best["value"], definition["objective"], f"trial {best['number']}") if best else None
    return Row(
        folder=folder,
        kind="search",
        state=RUNNING if running else state,
        changed=max([overview.changed(folder, (layout.SEARCH, layout.RESULT)), *logs]),
        method=overview.method(json.dumps(definition["config"]["loss"])),
        data=f"{data['name']} {data['version']}",
        step=ended,
        score=score,
    )

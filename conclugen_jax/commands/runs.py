"""List the runs below a folder.

conclugen runs                     those below the current folder, the newest first
conclugen runs RUNS --sort=loss    those below RUNS, the least loss first; --sort=-loss: the greatest

The table has one line for each pretraining run, classifier, study, search and folder of conclugen run: its method and data,
its step, the last loss, the best score, its state (running, done, interrupted, failed or broken) and the time of its last
change. The step of a study counts runs, that of a search trials. --all also lists the runs of studies, searches and folds.
--json prints everything as one JSON object, with the meaning of each score.
"""

import datetime
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conclugen_jax.commands import app
from conclugen_jax.errors import ConclugenError, did_you_mean
from conclugen_jax.runs.overview import Row, cost

COLUMNS = ("kind", "method", "data", "step", "loss", "score", "state", "age", "folder")
NUMBERS = ("step", "loss", "score", "age")

command = app.Command(words="the folder to look in", jax=False)
FLAGS = command.flags
command.string("sort", "age", f"Column to sort by, - in front to reverse it: {', '.join(COLUMNS)}; default: age")
command.bool("all", False, "List the runs of studies, searches and folds too")
command.bool("json", False, "Print one JSON object on standard output, nothing else")


def main() -> None:
    """Read, sort and print."""
    if len(command.words) > 1:
        raise ConclugenError(f"{command.words[1]!r} is one folder too many; name one")
    column = FLAGS.sort.removeprefix("-")
    if column not in COLUMNS:
        raise ConclugenError(f"--sort={FLAGS.sort}: no such column{did_you_mean(column, COLUMNS)}; name {_listed()}")
    from conclugen_jax.study import listing

    root = Path(*command.words)
    rows = list(listing.below(root, members=FLAGS.all))
    known = [row for row in rows if _key(row, column) is not None]
    unknown = [row for row in rows if _key(row, column) is None]
    known.sort(key=lambda row: _key(row, column), reverse=FLAGS.sort.startswith("-"))
    rows = known + unknown
    if FLAGS.json:
        print(json.dumps({"folder": str(root), "runs": [_facts(root, row) for row in rows]}, indent=1, allow_nan=False))
    elif rows:
        _show([COLUMNS, *(_cells(root, row) for row in rows)])
        for row in rows:
            if row.note:
                place = str(row.folder)
                print(f"{row.state}: {row.note if row.note.startswith(place) else f'{place}: {row.note}'}")
    else:
        print(f"no runs below {root}")


def _listed() -> str:
    return ", ".join(COLUMNS[:-1]) + f" or {COLUMNS[-1]}"


def _key(row: Row, column: str) -> Any:
    """Return the sort key of a run; ``None``, which sorts last, if the run has no such value."""
    if column == "age":
        return -row.changed
    if column == "score":
        return cost(row.score) if row.score else None
    value = getattr(row, column)
    return None if value in ("", None) or value != value else value


def _facts(root: Path, row: Row) -> dict[str, Any]:
    facts = row._asdict() | {"folder": str(row.folder.relative_to(root)), "score": row.score and row.score._asdict()}
    written = datetime.datetime.fromtimestamp(row.changed, datetime.UTC).isoformat(timespec="seconds")
    finite = row.loss is not None and math.isfinite(row.loss)
    return facts | {"loss": row.loss if finite else None, "changed": written}


def _show(rows: Sequence[Sequence[str]]) -> None:
    """Print a table whose last column, the folders, may be longer than a line."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        aligned = zip(COLUMNS, row, widths, strict=True)
        cells = [text.rjust(width) if name in NUMBERS else text.ljust(width) for name, text, width in aligned]
        print("  ".join(cells).rstrip())


def _cells(root: Path, row: Row) -> list[str]:
    step = "" if row.step is None else f"{row.step:,}" + ("" if row.steps is None else f" / {row.steps:,}")
    loss = "" if row.loss is None else f"{row.loss:.4g}"
    score = ""
    if row.score:
        share = row.score.measure in ("accuracy", "validation_probe")
        score = f"{100 * row.score.value:.1f} %" if share else f"{row.score.measure} {row.score.value:.4g}"
    cells = row.kind, row.method, row.data, step, loss, score, row.state, _age(time.time() - row.changed)
    return [*(cell or "-" for cell in cells), str(row.folder.relative_to(root))]


def _age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"

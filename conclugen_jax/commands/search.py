"""Search for hyper-parameters of pretraining.

conclugen search --config=demo --data=DATA/NAME/VERSION --search=SEARCH --trials=40

Repeat the same command to resume, with more --trials if you like; start it on several terminals or machines (or with
--workers=2) to share the trials of one folder. SEARCH/result.json names the best values and the command that pretrains
with them; SEARCH/trials/NNNN is the workdir of each trial; the best one keeps its checkpoints. Ctrl-C or SIGTERM saves a
checkpoint first.

--space=FILE.json sets what is searched instead of the default, around the values of --config:
{"optimizer.learning_rate": {"low": 1e-5, "high": 1e-3, "log": true}, "model.projection_dim": {"choices": [256, 512]}}
"""

import concurrent.futures
import functools
import io
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

from conclugen_jax.commands import app
from conclugen_jax.errors import ConclugenError
from conclugen_jax.study import search, search_space
from conclugen_jax.system import signals
from conclugen_jax.system.pool import Died, Pool

command = app.Command(config="run", short=app.OF_PRETRAINING)
FLAGS = command.flags
command.string(
    "search", None, "Folder of the search: search.sqlite, result.json, trials; default: runs/search_CONFIGURATION"
)
command.integer(
    "trials", 40, "How many, finished, pruned and failed together; default 40 (the authors: 200)", lower_bound=1
)
command.enum(
    "objective",
    "pretraining_loss",
    list(search_space.OBJECTIVES),
    "pretraining_loss (default; reads no label) or validation_probe (logistic regression, one class per example)",
)
command.string("space", None, "JSON file of what is searched; default: sizes, loss weights, clusters, rates")
command.integer("workers", 1, "Processes on this machine that share the trials, default 1", lower_bound=1)

SHOWN = 10  # rows of the table


def main() -> None:
    """Run trials, then show the best ones."""
    folder = FLAGS.search or f"runs/search_{command.config_name}"
    space = search_space.read(FLAGS.space) if FLAGS.space else None
    search_all = functools.partial(
        search.search,
        command.config,
        folder,
        num_trials=FLAGS.trials,
        objective=FLAGS.objective,
        space=space,
        source=FLAGS.space or "",
        arguments=command.config_arguments,
    )
    if FLAGS.workers > 1:
        _share(FLAGS.workers, functools.partial(_worked, search_all))
    result = search_all()
    console = Console()
    console.print(table(result))
    counts = ", ".join(f"{count} {state}" for state, count in result["num_trials"].items() if count)
    for t in result["trials"]:
        if t["error"]:
            console.print(f"trial {t['number']} failed: {t['error']}", markup=False, soft_wrap=True)
    console.print(f"{counts}; saved as {folder}/result.json", markup=False, soft_wrap=True)
    if result["best"]:
        console.print(f"best, with checkpoints: {result['best']['workdir']}", markup=False, soft_wrap=True)
        console.print(f"again: {result['command']}", markup=False, soft_wrap=True)


def table(result: dict[str, Any]) -> Table:
    """The best trials, best first."""
    objective = result["objective"]
    shown = Table(title=f"{objective['name']}, {objective['direction']}", caption=objective["meaning"])
    finished = [t for t in result["trials"] if t["state"] == "finished"]
    finished.sort(key=lambda t: t["value"], reverse=objective["direction"] == "maximize")
    shown.add_column("trial", justify="right")
    shown.add_column("value", no_wrap=True)
    shown.add_column("values searched", overflow="fold")
    for t in finished[:SHOWN]:
        searched = ", ".join(f"{key.split('.')[-1]} {search.short(value)}" for key, value in t["overrides"].items())
        shown.add_row(str(t["number"]), f"{t['value']:.6g}", searched)
    return shown


def _share(workers: int, work: Callable[[], bool]) -> None:
    """Do the same work in several processes; return when all have done it.

    Args:
      workers: number of processes.
      work: returns whether a process came to its end, not where a signal stopped it.

    Raises:
      ConclugenError: the mistake that one process found, or processes were killed.
    """
    pools = [Pool(1, start=functools.partial(_begin, i, workers)) for i in range(workers)]
    received: list[int] = []

    def forward(number: int, _frame: object) -> None:
        received.append(number)
        for pool in pools:
            pool.terminate()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    ended = [pool.submit(work) for pool in pools if not received]
    concurrent.futures.wait(ended)
    codes = [code for pool in pools for code in pool.close()]
    if received:
        sys.exit(128 + received[0])
    for future in ended:
        if future.exception() and not isinstance(future.exception(), Died):
            raise future.exception()
    lost = sum(bool(future.exception()) or not future.result() for future in ended)
    if lost:
        raise ConclugenError(
            f"{lost} of {workers} workers ended before their time (exit codes {codes}; -9: killed, out of memory?); repeat "
            "the command to resume, with fewer --workers if memory is short"
        )


def _begin(worker: int, workers: int) -> None:
    """Give a process its share of a GPU's memory and its number in front of what it says."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{0.75 / workers:.3f}")
    sys.stderr = _Numbered(worker, sys.stderr)


class _Numbered(io.TextIOBase):
    """Standard error of a worker, with its number in front of each line."""

    def __init__(self, worker: int, file: TextIO):
        self._prefix, self._file, self._rest = f"[{worker}] ", file, ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        self._file.write("".join(f"{self._prefix}{line}\n" for line in lines))
        self._file.flush()
        return len(text)


def _worked(search_all: Callable[[], Any]) -> bool:
    try:
        search_all()
        return True
    except signals.Interrupted:
        return False

"""Search for hyper-parameters of pretraining.

conclugen search --config=demo --data=DATA/NAME/VERSION --search=SEARCH --trials=40

Repeat the same command to resume, with more --trials if you like; start it on several terminals or machines (or with
--workers=2) to share the trials of one folder. SEARCH/result.json names the best values and the command that pretrains
with them; SEARCH/trials/NNNN is the workdir of each trial; the best one keeps its checkpoints. Ctrl-C or SIGTERM saves a
checkpoint first.

--space=FILE.json sets what is searched instead of the default, around the values of --config:
{"optimizer.learning_rate": {"low": 1e-5, "high": 1e-3, "log": true}, "model.projection_dim": {"choices": [256, 512]}}
"""

import os
import signal
import subprocess
import sys
import threading
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

from conclugen_jax.commands import app
from conclugen_jax.errors import ConclugenError
from conclugen_jax.study import search, search_space

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
    list(search.OBJECTIVES),
    "pretraining_loss (default; reads no label) or validation_probe (logistic regression, one class per example)",
)
command.string("space", None, "JSON file of what is searched; default: sizes, loss weights, clusters, rates")
command.integer("workers", 1, "Processes on this machine that share the trials, default 1", lower_bound=1)

SHOWN = 10  # rows of the table


def main() -> None:
    """Run trials, then show the best ones."""
    folder = FLAGS.search or f"runs/search_{command.config_name}"
    space = search_space.read(FLAGS.space) if FLAGS.space else None
    if FLAGS.workers > 1:
        _share(FLAGS.workers)
    result = search.search(
        command.config,
        folder,
        num_trials=FLAGS.trials,
        objective=FLAGS.objective,
        space=space,
        source=FLAGS.space or "",
        arguments=command.config_arguments,
    )
    console = Console()
    console.print(table(result))
    counts = ", ".join(f"{count} {state}" for state, count in result["num_trials"].items() if count)
    for t in result["trials"]:
        if t["error"]:
            console.print(f"trial {t['number']} failed: {t['error']}", markup=False, soft_wrap=True)
    console.print(f"{counts}; saved as {folder}/{search.RESULT}", markup=False, soft_wrap=True)
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


def _share(workers: int) -> None:
    """Run this same command so many times at once, and end as the first that could not; return when all are done.

    Each has a session of its own, so that Ctrl-C reaches it once, from here.
    """
    fraction = f"{0.75 / workers:.3f}"  # of a GPU's memory, which each would take for itself
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": fraction, **os.environ}
    again = [sys.executable, "-m", "conclugen_jax", "search", *command.argv, "--workers=1"]
    received: list[int] = []
    processes: list[subprocess.Popen] = []

    def forward(number: int, _frame: object) -> None:
        received.append(number)
        for process in processes:
            process.terminate()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    for _ in range(workers):
        if not received:
            processes.append(
                subprocess.Popen(
                    again,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                    env=environment,
                    start_new_session=True,
                )
            )
    said: set[str] = set()
    copies = [threading.Thread(target=_copy, args=(i, p.stderr, said)) for i, p in enumerate(processes)]
    for copy in copies:
        copy.start()
    codes = [process.wait() for process in processes]
    for copy in copies:
        copy.join()
    if received:
        sys.exit(128 + received[0])
    if 2 in codes:
        sys.exit(2)
    if any(codes):
        raise ConclugenError(
            f"{sum(map(bool, codes))} of {workers} workers ended before their time (exit codes {codes}; -9: killed, out of "
            "memory?); repeat the command to go on, with fewer --workers if memory is short"
        )


def _copy(worker: int, lines: TextIO, said: set[str]) -> None:
    """Hand on what a worker says, with its number; a mistake that all of them name once."""
    with lines:
        for line in lines:
            if not line.startswith("error: "):
                sys.stderr.write(f"[{worker}] {line}")
            elif line not in said:
                said.add(line)
                sys.stderr.write(line)

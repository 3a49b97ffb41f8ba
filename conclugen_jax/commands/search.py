"""Search for hyper-parameters of pretraining.

conclugen search --config=demo --data=DATA/NAME/VERSION --search=SEARCH --trials=40

Repeat the same command to resume, with more --trials if you like; start it on several terminals or machines (or with
--workers=2) to share the trials of one folder. SEARCH/result.json names the best values and the command that pretrains
with them; SEARCH/trials/NNNN is the workdir of each trial; the best one keeps its checkpoints. Ctrl-C or SIGTERM saves a
checkpoint first.

--space=FILE.json sets what is searched instead of the default, around the values of --config:
{"optimizer.learning_rate": {"low": 1e-5, "high": 1e-3, "log": true}, "model.projection_dim": {"choices": [256, 512]}}
"""

import functools
from typing import Any

from rich.console import Console
from rich.table import Table

from conclugen_jax.commands import app
from conclugen_jax.study import search, search_space, sharing

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
        sharing.share(FLAGS.workers, search_all)
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

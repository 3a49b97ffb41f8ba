"""List, verify, export and import checkpoints.

conclugen checkpoint list --workdir=RUN                     a table: step, size, when saved, loss, newest and best
conclugen checkpoint verify --workdir=RUN                   re-read every checkpoint; exit code 2 if one is damaged
conclugen checkpoint export --workdir=RUN --output=FOLDER   the newest checkpoint's weights, for others
conclugen checkpoint import --source=FOLDER --workdir=NEW   a workdir of such weights

An export is weights.safetensors (parameters, running averages and feature statistics; nothing that only training needs)
and export.json (configuration without its paths, manifest of the data set, step, hashes). RUN is a pretraining run. NEW
serves probe, embed, the notebooks, and downstream as --checkpoint=NEW; it cannot be trained further. Give --data to
import if the data set of the run is on this machine, else to those commands. export and import print the same hashes:
publish them, and compare.
"""

import json

from rich.console import Console
from rich.table import Table

from conclugen_jax.commands import app
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import exchange

command = app.Command(words="list, verify, export or import")
FLAGS = command.flags
command.string("workdir", None, "Folder of a run; import: the folder to make")
command.string("step", None, "verify, export: newest, best or a step; default: verify all, export newest")
command.string("output", None, "export: folder to make")
command.string("source", None, "import: folder of an export")
command.string("data", None, "import: folder of the data set that the run was trained on, if it is here")
command.bool("json", False, "list, verify: print one JSON array on standard output, nothing else")


def main() -> None:
    """Do what the first argument says."""
    action, *more = command.words or [""]
    if action not in ACTIONS:
        raise ConclugenError(f"{action!r} is not a command; write {', '.join(ACTIONS)} first, see --help")
    if more:
        raise ConclugenError(f"{more[0]!r} is not a flag; write --flag=value, see --help")
    does, takes = ACTIONS[action]
    for name in ("step", "output", "source", "data", "json"):
        if name not in takes and FLAGS[name].present:
            raise ConclugenError(f"--{name} is no flag of {action!r}; see --help")
    does(command.required("workdir"))


def _list(workdir: str) -> None:
    rows = exchange.listing(workdir)
    if FLAGS.json:
        print(json.dumps(rows, indent=1))
        return
    table = Table()
    for name in ("step", "MB", "saved (UTC)", "loss", ""):
        table.add_column(name, justify="right" if name in ("step", "MB", "loss") else "left", no_wrap=True)
    for row in rows:
        loss = "" if row["loss"] is None else f"{row['loss']:.6g}"
        saved = (row["saved"] or "unknown").removesuffix("+00:00").replace("T", " ")
        marks = ", ".join(mark for mark in ("newest", "best") if row[mark])
        table.add_row(str(row["step"]), f"{row['bytes'] / 1e6:,.1f}", saved, loss, marks)
    Console(highlight=False).print(table)


def _verify(workdir: str) -> None:
    rows = exchange.verify(workdir, FLAGS.step or "all")
    if FLAGS.json:
        print(json.dumps(rows, indent=1))
    else:
        for row in rows:
            print(f"step {row['step']}: {row['wrong'] or 'ok'}")
    damaged = [str(row["step"]) for row in rows if row["wrong"]]
    if damaged:
        raise ConclugenError(
            f"{workdir}: {len(damaged)} of {len(rows)} checkpoints damaged (step {', '.join(damaged)}); use another, or repeat "
            "the run's command, which goes on from the newest intact one"
        )


def _export(workdir: str) -> None:
    output = command.required("output")
    _say(output, exchange.export_weights(workdir, output, FLAGS.step or "newest"))


def _import(workdir: str) -> None:
    _say(workdir, exchange.import_weights(command.required("source"), workdir, FLAGS.data))


def _say(folder: str, hashes: exchange.Hashes) -> None:
    print(f"{folder}: weights of step {hashes.step}")
    print(f"SHA-256 of {exchange.WEIGHTS}: {hashes.weights}")
    print(f"SHA-256 of the parameters: {hashes.parameters}")


ACTIONS = {
    "list": (_list, {"json"}),
    "verify": (_verify, {"step", "json"}),
    "export": (_export, {"step", "output"}),
    "import": (_import, {"source", "data"}),
}

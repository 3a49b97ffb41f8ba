"""Checkpoints of a run: see them, verify them, hand their weights on, use those of others.

python -m launch.checkpoint list --workdir=RUN                   a table: step, size, when saved, loss, newest and best
python -m launch.checkpoint verify --workdir=RUN                 re-reads every checkpoint; exit code 2 if one is damaged
python -m launch.checkpoint export --workdir=RUN --output=FOLDER          the newest checkpoint's weights, for others
python -m launch.checkpoint import --source=FOLDER --workdir=NEW          a workdir of such weights

An export is weights.safetensors (parameters, running averages and feature statistics; nothing that only training needs)
and export.json (configuration without its paths, manifest of the data set, step, hashes). RUN is a pretraining run. NEW
serves launch.probe, launch.embed, the notebooks, and launch.downstream as config.downstream.checkpoint=NEW; it cannot be
trained further. Give --data to import where the data set of the run is here, else to those commands. export and import
print the same hashes: publish them, and compare.
"""

import json
import sys

from absl import flags
from rich.console import Console
from rich.table import Table

from conclugen_jax.commands import app
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import exchange

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run; import: the folder to make")
STEP = flags.DEFINE_string("step", None, "verify, export: newest, best or a step; default: verify all, export newest")
OUTPUT = flags.DEFINE_string("output", None, "export: folder to make")
SOURCE = flags.DEFINE_string("source", None, "import: folder of an export")
DATA = flags.DEFINE_string("data", None, "import: folder of the data set that the run was trained on, if it is here")
JSON = flags.DEFINE_bool("json", False, "list, verify: one JSON array on standard output, nothing else")

command = ""


def main() -> None:
    """Do what the first argument says."""
    if command not in COMMANDS:
        raise ConclugenError(f"{command!r} is not a command; write {', '.join(COMMANDS)} first, see --help")
    does, takes = COMMANDS[command]
    for name in ("step", "output", "source", "data", "json"):
        if name not in takes and flags.FLAGS[name].present:
            raise ConclugenError(f"--{name} is no flag of {command!r}; see --help")
    does(app.required("workdir"))


def _list(workdir: str) -> None:
    rows = exchange.listing(workdir)
    if JSON.value:
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
    rows = exchange.verify(workdir, STEP.value or "all")
    if JSON.value:
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
    output = app.required("output")
    _say(output, exchange.export_weights(workdir, output, STEP.value or "newest"))


def _import(workdir: str) -> None:
    _say(workdir, exchange.import_weights(app.required("source"), workdir, DATA.value))


def _say(folder: str, hashes: exchange.Hashes) -> None:
    print(f"{folder}: weights of step {hashes.step}")
    print(f"SHA-256 of {exchange.WEIGHTS}: {hashes.weights}")
    print(f"SHA-256 of the parameters: {hashes.parameters}")


COMMANDS = {
    "list": (_list, {"json"}),
    "verify": (_verify, {"step", "json"}),
    "export": (_export, {"step", "output"}),
    "import": (_import, {"source", "data"}),
}

if __name__ == "__main__":
    if sys.argv[1:] and not sys.argv[1].startswith("-"):
        command = sys.argv.pop(1)
    app.run(main)

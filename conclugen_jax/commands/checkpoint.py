"""List, verify, export and import checkpoints.

conclugen checkpoint list --workdir=RUN                     a table: step, size, when saved, loss, newest and best
conclugen checkpoint verify --workdir=RUN                   re-read every checkpoint; exit code 2 if one is damaged
conclugen checkpoint export --workdir=RUN --output=FOLDER   the newest checkpoint's weights, for others
conclugen checkpoint import --source=FOLDER --workdir=NEW   a workdir of such weights

An export is weights.safetensors (parameters, running averages and feature statistics; nothing that only training needs)
and export.json (configuration without its paths, manifest of the data set, step, hashes). RUN is a pretraining run. Use
NEW with probe, embed, the notebooks, and downstream --checkpoint=NEW; it cannot be trained further. If the data set of the
run is on this machine, pass --data to import, otherwise to those commands. export and import print the same hashes: publish
them, so that others can compare. For a run that averages vectors with its training rows, embed needs these rows: from the
data set, or from bank.safetensors, which --bank adds to an export.
"""

import json

from conclugen_jax.commands import app
from conclugen_jax.errors import ConclugenError

command = app.Command(words="list, verify, export or import")
FLAGS = command.flags
command.string("workdir", None, "Folder of a run; import: the folder to make")
command.string("step", None, "verify, export: newest, best or a step; default: verify all, export newest")
command.string("output", None, "export: folder to make")
command.bool("bank", False, "export: add the vectors of the training rows, for runs that average vectors with them")
command.string("source", None, "import: folder of an export")
command.string("data", None, "import: folder of the training data set, if it is on this machine")
command.bool("json", False, "list, verify: print one JSON array on standard output, nothing else")

TAKES = {
    "list": {"json"},
    "verify": {"step", "json"},
    "export": {"step", "output", "bank"},
    "import": {"source", "data"},
}
"""Action -> its flags besides --workdir."""


def main() -> None:
    """Run the action that the first argument names."""
    action = " ".join(command.words)
    if action not in TAKES:
        raise ConclugenError(f"{action!r} is not a command; write {', '.join(TAKES)} first, see --help")
    for name in set().union(*TAKES.values()) - TAKES[action]:
        if FLAGS[name].present:
            raise ConclugenError(f"--{name} is no flag of {action!r}; see --help")
    workdir = command.required("workdir")
    from conclugen_jax.evaluate import bank, exchange
    from conclugen_jax.runs import workdir as workdir_lib

    if action in ("list", "verify"):
        rows = exchange.listing(workdir) if action == "list" else exchange.verify(workdir, FLAGS.step or "all")
        if FLAGS.json:
            print(json.dumps(rows, indent=1))
        elif action == "list":
            _show(rows)
        else:
            print("\n".join(f"step {row['step']}: {row['wrong'] or 'ok'}" for row in rows))
        damaged = [str(row["step"]) for row in rows if row.get("wrong")]
        if damaged:
            fact = f"{len(damaged)} of {len(rows)} checkpoints damaged (step {', '.join(damaged)})"
            way_out = "use another, or repeat the run's command, which resumes from the newest intact one"
            raise ConclugenError(f"{workdir}: {fact}; {way_out}")
        return
    folder = command.required("output") if action == "export" else workdir
    if action == "export":
        hashes = exchange.export_weights(workdir, folder, FLAGS.step or "newest", bank=FLAGS.bank)
    else:
        hashes = exchange.import_weights(command.required("source"), workdir, FLAGS.data)
    print(f"{folder}: weights of step {hashes.step}")
    print(f"SHA-256 of {exchange.WEIGHTS}: {hashes.weights}")
    print(f"SHA-256 of the parameters: {hashes.parameters}")
    if hashes.bank:
        print(f"SHA-256 of {bank.FILE}: {hashes.bank}")
    elif action == "export" and workdir_lib.read_config(workdir).evaluation.smoothing_neighbours:
        print("Vectors are averaged with training rows, which are not in it: others need the data set, or --bank here")


def _show(rows: list[dict]) -> None:
    table = []
    for row in rows:
        loss = "" if row["loss"] is None else f"{row['loss']:.6g}"
        saved = (row["saved"] or "unknown").removesuffix("+00:00").replace("T", " ")
        marks = ", ".join(mark for mark in ("newest", "best") if row[mark])
        table.append([str(row["step"]), f"{row['bytes'] / 1e6:,.1f}", saved, loss, marks])
    app.show(("step", "MB", "saved (UTC)", "loss", ""), table, wide=4)

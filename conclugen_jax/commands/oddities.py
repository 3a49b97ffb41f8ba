"""List oddities of a data set: likely wrong labels, copies, persons as clusters, useless modalities, clips all methods miss.

conclugen oddities --data=data/mine/1.0.0
conclugen oddities --workdir=PRETRAINING_RUN

Without a run, the command searches raw features. With one, it searches the vectors of the run, and lists the clips that the
run, raw features and an untrained network all get wrong. Classifiers trained on other rows (of other persons, if the data
set names persons) judge the labels. The command prints the oddest rows of each kind, and writes a csv with a line for every
row, the likeliest wrong labels first.
"""

import json
from pathlib import Path

from conclugen_jax.commands import app
from conclugen_jax.errors import ConclugenError
from conclugen_jax.system import files, progress

command = app.Command()
FLAGS = command.flags
command.string("data", None, "Folder of a built data set; default: the one of the run")
command.list(
    "workdir", [], "Folders of one or more pretraining runs; with several, also list what all of them get wrong"
)
command.string("checkpoint", "newest", "newest, best or a step; default: newest")
command.list("splits", [], "Splits to search; default: all")
command.float(
    "similar", 0.98, "Cosine from which rows are near duplicates, default 0.98", lower_bound=0.01, upper_bound=1
)
command.integer("rows", 100_000, "Maximum number of rows to search; of a larger data set, random rows", lower_bound=2)
command.integer("top", 10, "Rows of each kind to print, default 10", lower_bound=0)
command.bool("json", False, "Print one JSON object on standard output, nothing else")
command.string("output", None, "The csv to write, NAME.csv; default: oddities.csv in WORKDIR, else here")


def main() -> None:
    """Find the oddities, write the csv, print them."""
    data, workdirs = FLAGS.data, FLAGS.workdir
    output = Path(FLAGS.output or Path(*workdirs[:1], "oddities.csv"))
    if output.suffix != ".csv":
        raise ConclugenError(f"--output={output}: expected a name that ends with .csv")
    if not (data or workdirs):
        raise ConclugenError("--data is missing, and so is --workdir; name a data set or a pretraining run, see --help")
    from conclugen_jax.evaluate import odd_tables, oddities

    how = {"which": FLAGS.checkpoint, "splits": FLAGS.splits, "threshold": FLAGS.similar, "most_rows": FLAGS.rows}
    found = oddities.find(data or "", workdirs, **how)
    files.write_atomically(output, found.as_csv(), place="--output")
    if FLAGS.json:
        print(json.dumps(found.as_json(), indent=1, allow_nan=False))
        return
    for title, said, columns, rows in odd_tables.shown(found, FLAGS.top):
        app.draw(f"{title}: {said}")
        if rows:
            app.show(columns, rows, wide=-1)
    for note in found.notes:
        progress.say(f"note: {note}")
    print(f"saved as {output}: {len(found.table):,} rows")

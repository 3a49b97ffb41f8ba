"""Measure accuracy with few labels per class.

conclugen probe --workdir=PRETRAINING_RUN

Compares raw features, the same network untrained, and the checkpoint by linear evaluation; each score is the mean and
standard deviation over several draws of the labels. Prints the table and writes it as OUTPUT.json and OUTPUT.md.
"""

import dataclasses
from pathlib import Path

from rich.console import Console
from rich.table import Table

from conclugen_jax.commands import app
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import probe
from conclugen_jax.system import files

command = app.Command()
FLAGS = command.flags
command.string("workdir", None, "Folder of a pretraining run")
command.string("checkpoint", "newest", "newest, best or a step; default: newest")
command.string("data", None, "Folder of a labelled data set; default: the one of the run")
command.string("output", None, "Path of the table without its ending; default: WORKDIR/label_efficiency")
command.list("labels", None, "Labels per class; default: those of 2,5,20 that every class has, and all")
command.integer("draws", 10, "Random draws of the labelled examples, default 10", lower_bound=2)
command.integer("seed", 0, "Seed of the draws", lower_bound=0)


def main() -> None:
    """Compute the table, write it, print it."""
    output = Path(FLAGS.output or Path(command.required("workdir"), "label_efficiency"))
    bad = [
        text for text in FLAGS.labels or () if text != "all" and not (text.isascii() and text.isdecimal() and int(text))
    ]
    if FLAGS.labels is not None and not FLAGS.labels:
        raise ConclugenError("--labels is empty; name numbers of labels per class, or all")
    if bad:
        raise ConclugenError(f"--labels: {bad[0]!r} is neither a number of labels per class nor 'all'")
    if FLAGS.output:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ConclugenError(f"--output={output}: {e.strerror}; choose another path") from e
    report = probe.label_efficiency_of_run(
        command.required("workdir"),
        which=FLAGS.checkpoint,
        data=FLAGS.data,
        labels_per_class=FLAGS.labels and [0 if text == "all" else int(text) for text in FLAGS.labels],
        num_draws=FLAGS.draws,
        seed=FLAGS.seed,
    )
    files.write_json(Path(f"{output}.json"), dataclasses.asdict(report), place="--output")
    columns, rows = probe.table(report.results, factor=100, digits=1)
    markdown = ["| " + " | ".join(row) + " |" for row in (columns, ["---"] * len(columns), *rows)]
    lines = "\n".join([*markdown, "", report.protocol, ""])
    files.write_atomically(Path(f"{output}.md"), lines, place="--output")
    table = Table(title="accuracy in % by labels per class", caption=report.protocol)
    for column in columns:
        table.add_column(column, no_wrap=column != columns[0])
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(table)
    console.print(f"saved as {output.with_suffix('.md')} and {output.with_suffix('.json')}", soft_wrap=True)

"""Measure accuracy with few labels per class.

conclugen probe --workdir=PRETRAINING_RUN

The command compares the checkpoint with raw features, their principal components, canonical correlations of the modalities,
and the same network untrained, by linear evaluation. Each score is the mean and standard deviation over several draws of the
labels. The command prints the table and writes it as OUTPUT.json and OUTPUT.md.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conclugen_jax.commands import app
from conclugen_jax.errors import ConclugenError
from conclugen_jax.runs import layout
from conclugen_jax.system import files, processes, progress

command = app.Command()
FLAGS = command.flags
command.string("workdir", None, "Folder of a pretraining run")
command.string("checkpoint", "newest", "newest, best or a step; default: newest")
command.string("data", None, "Folder of a labelled data set; default: the one of the run")
TEST_DATA = "Folders of other data sets, A,B, whose test splits are scored too; classes are matched by name"
command.list("test_data", [], TEST_DATA)
command.string("output", None, "Path of the table without its ending; default: WORKDIR/label_efficiency")
LABELS = "Labels per class, or all that a class has; default: those of 2,5,20 that the largest class has, and all"
command.list("labels", None, LABELS)
VECTORS = "representation, pre_activation, both, projection or with_raw; default: as in the run's configuration"
command.string("vectors", None, VECTORS)
SMOOTHING = "Number of nearest training rows to average vectors with, 0: none; default: as in the run's configuration"
command.integer("smoothing", None, SMOOTHING, lower_bound=0)
command.integer("draws", 10, "Random draws of the labelled examples, default 10", lower_bound=2)
command.integer("seed", 0, "Seed of the draws", lower_bound=0)
command.distribute()


def main() -> None:
    """Compute the table, write it, print it."""
    output = Path(FLAGS.output or Path(command.required("workdir"), layout.EFFICIENCY))
    labels = None if FLAGS.labels is None else [_number(text) for text in FLAGS.labels or [""]]
    command.join()
    if FLAGS.output and processes.is_main():
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ConclugenError(f"--output={output}: {e.strerror}; choose another path") from e
    from conclugen_jax.evaluate import probe, probe_across

    given = {"vectors": FLAGS.vectors, "smoothing_neighbours": FLAGS.smoothing}
    evaluation = {key: value for key, value in given.items() if value is not None}
    options = {"labels_per_class": labels, "num_draws": FLAGS.draws, **command.values("data", "test_data", "seed")}
    options["evaluation"] = evaluation
    report = probe.label_efficiency_of_run(command.required("workdir"), which=FLAGS.checkpoint, **options)
    if report is None:
        return
    files.write_json(Path(f"{output}.json"), dataclasses.asdict(report), place="--output")
    lines = [text for line in report.warnings for text in ("", line)]
    columns, rows = probe.table(report.results, factor=100, digits=1)
    tables, trained = [(columns, rows, report.protocol)], report.data["name"]
    tables += [(*_across(probe.table, one, trained), probe_across.said(one, trained)) for one in report.across]
    content = []
    for columns, rows, below in tables:
        content += ["| " + " | ".join(row) + " |" for row in (columns, ["---"] * len(columns), *rows)]
        content += ["", below, ""]
    files.write_atomically(Path(f"{output}.md"), "\n".join([*content[:-1], *lines, ""]), place="--output")
    for line in report.warnings:
        progress.say(line)
    for columns, rows, below in tables:
        app.show(columns, rows, title="accuracy in % by labels per class", caption=below)
    print(f"saved as {output}.md and {output}.json")


def _across(table: Callable, found: Any, trained: str) -> tuple[list[str], list[list[str]]]:
    """Return header and rows: accuracy in % on test rows of the data set ``trained`` on, and on those of the other."""
    parts = [(trained, found.within["results"]), (found.test_data["data"]["name"], found.results)]
    header, rows = [], {}
    for name, results in parts:
        columns, cells = table(results, factor=100, digits=1)
        header += [f"{name}: {column}" for column in columns[1:]]
        for vectors, *own in cells:
            rows.setdefault(vectors, [vectors]).extend(own)
    return ["vectors", *header], list(rows.values())


def _number(text: str) -> int:
    if text != "all" and not (text.isascii() and text.isdecimal() and int(text)):
        raise ConclugenError(f"--labels: {text!r} is neither a number of labels per class nor 'all'")
    return 0 if text == "all" else int(text)

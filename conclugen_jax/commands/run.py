"""Run all steps: from clips, features or a data set to a trained model, its scores and a report.

conclugen run SOURCE --workdir=RUN [--quick]

SOURCE is a folder of clips, a folder or file of features, or a built data set. The command chooses settings
from the data, prints them with their reasons, and saves them in RUN/config.py. Change any of them by --config.KEY=VALUE.
Repeat the command to resume after an interruption.
"""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conclugen_jax.commands import app, build, extract, scores
from conclugen_jax.errors import ConclugenError

command = app.Command(config="run", default="conclu_neighbours", words="SOURCE")
FLAGS = command.flags
OF_LABELS = "labels", "label", "label_kind", "classes", "targets", "drop_bad"
command.borrow(build.command, **dict.fromkeys(OF_LABELS, ""))
command.borrow(extract.command, label_pattern="", no_thumbnails="")
command.string("workdir", None, "Folder for all results")
app.choose_engine(command)
command.bool("quick", False, "Take a first look: fewer steps, one fold, at most 60 clips")


def main() -> None:
    """Run the missing stages; print settings, scores and the next steps."""
    if len(command.words) != 1 or not command.words[0]:
        raise ConclugenError("name one folder or file: conclugen run SOURCE --workdir=RUN")
    layout, workdir = build.layout_of(command), command.required("workdir")
    from conclugen_jax.pipeline import run as run_lib

    about = {"labels": tuple(map(Path, FLAGS.labels)), "pattern": FLAGS.label_pattern, "drop_bad": FLAGS.drop_bad}
    about["thumbnails"] = not FLAGS.no_thumbnails
    source = run_lib.Source(Path(command.words[0]), layout=layout, **about)
    options = {"quick": FLAGS.quick, "config": command.config_given, "changes": command.changes}
    with app.engine(command) as engine:
        found = run_lib.run(source, workdir, engine=engine, **options)
    if found.results:
        scores.show(found.results)
    for remark in found.remarks:
        print(remark)
    for line in _next(found):
        print(line)


def _next(found: Any) -> Iterator[str]:
    """Yield suggestions for next steps."""
    data, pretraining, config = (shlex.quote(str(x)) for x in (found.data, found.pretraining, found.config))
    yield f"look:       {found.report}"
    if found.classifier and found.clips:
        yield f"predict:    conclugen predict --checkpoint={shlex.quote(str(found.classifier))} CLIP.mp4"
    if found.classifier and not found.clips:
        yield f"predict:    conclugen embed --workdir={shlex.quote(str(found.classifier))} --data=OTHER_DATA --split=test"
    yield f"vectors:    conclugen embed --workdir={pretraining} --data={data} --split={found.split} --output=vectors.npz"
    if FLAGS.quick:
        yield "in full:    the same command without --quick, with another --workdir"
    yield f"go deeper:  conclugen pretrain --config={config} --config.train.num_epochs=200 --workdir=ANOTHER"

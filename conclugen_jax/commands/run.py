"""Do everything in one go: from clips, features or a data set to a trained model, its scores and a page.

conclugen run SOURCE --workdir=RUN [--quick]

SOURCE is a folder of clips, a folder or file of features, or a built data set. The settings are chosen from the data and
printed with their reasons; RUN/config.py has them, and any can be changed by --config.KEY=VALUE. Repeat the command to
resume after an interruption.
"""

import shlex
from pathlib import Path

from conclugen_jax.commands import app, build, scores
from conclugen_jax.errors import ConclugenError

command = app.Command(config="run", default="conclu_neighbours", words="SOURCE")
FLAGS = command.flags
command.borrow(build.command, **dict.fromkeys(("labels", "label", "label_kind", "classes", "targets", "drop_bad"), ""))
command.string("workdir", None, "Folder for all that comes of it")
command.bool("quick", False, "A first look: fewer steps, one fold")


def main() -> int:
    """Do what is not done, print settings, scores and what to do next."""
    if len(command.words) != 1:
        raise ConclugenError("name one folder or file: conclugen run SOURCE --workdir=RUN")
    layout, workdir = build.layout_of(command), command.required("workdir")
    from conclugen_jax.pipeline import run as run_lib

    source = run_lib.Source(Path(command.words[0]), tuple(map(Path, FLAGS.labels)), layout, FLAGS.drop_bad)
    config = command.config_arguments[0].partition("=")[2] if command.config_given else ""
    found = run_lib.run(source, workdir, quick=FLAGS.quick, config=config, changes=command.changes)
    if found.results:
        scores.show(found.results)
    run = shlex.quote(str(found.workdir))
    print(f"report: {found.report}")
    print(f"settings: {found.config}")
    if found.classifier:
        print(f"predict: conclugen predict --checkpoint={run}/classifier CLIP.mp4")
    print(f"vectors: conclugen embed --workdir={run}/pretraining --data={found.data} --output=vectors.npz")
    return 0

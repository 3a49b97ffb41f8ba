"""Write a page and tables of a study, a run or a search.

conclugen report FOLDER

Writes report.html (one file with all tables and figures, which opens without a network) and report.md (the tables) into
that folder or into --output. FOLDER is a study, a run of pretraining, a search, or what conclugen run has made. If the
data of a run have classes, the command scores the run by logistic regressions on few labels.
"""

import sys

from conclugen_jax.commands import app
from conclugen_jax.errors import ConclugenError

command = app.Command(words="FOLDER")
FLAGS = command.flags
command.string("study", None, "Folder of a study; the same as FOLDER")
command.string("output", None, "Folder for report.html and report.md; default: FOLDER")
command.list("maps", None, "Methods whose representations are drawn; default: the first three; --maps= for none")


def main() -> None:
    """Write the report, say where."""
    if len(folders := [*command.words, *([FLAGS.study] if FLAGS.study else [])]) != 1:
        raise ConclugenError("name one folder: conclugen report FOLDER")
    from conclugen_jax.study.report import pages

    written = pages.write(folders[0], FLAGS.output, maps=FLAGS.maps)
    for sentence in written.warnings:
        print(f"beware: {sentence}", file=sys.stderr)
    if written.progress:
        print(written.progress)
    print("saved as " + " and ".join(map(str, written.files)))

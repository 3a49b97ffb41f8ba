"""Write a page and tables of a study.

conclugen report --study=STUDY

Writes report.html (one file with all tables and figures, which opens without a network) and report.md (the tables) into
the study's folder or into --output. Needs the study's results.json; curves and maps come from its pretraining runs.
"""

import sys

from conclugen_jax.commands import app

command = app.Command()
FLAGS = command.flags
command.string("study", None, "Folder of a study")
command.string("output", None, "Folder for report.html and report.md; default: the study's")
command.list("maps", None, "Methods whose representations are drawn; default: the first three; --maps= for none")


def main() -> None:
    """Write the report, say where."""
    from conclugen_jax.study.report import report

    written = report.write(command.required("study"), FLAGS.output, maps=FLAGS.maps)
    for sentence in written.warnings:
        print(f"beware: {sentence}", file=sys.stderr)
    print(written.progress)
    print("saved as " + " and ".join(map(str, written.files)))

"""A page and tables of a study: python -m launch.report --study=STUDY

Writes report.html (one file with all tables and figures, opens without a network) and report.md (the tables) into the
study's folder or into --output. Needs the study's results.json; curves and maps come from its pretraining runs.
"""

import sys

from absl import flags

from conclugen_jax.commands import app
from conclugen_jax.study.report import report

STUDY = flags.DEFINE_string("study", None, "Folder of a study")
OUTPUT = flags.DEFINE_string("output", None, "Folder for report.html and report.md; default: the study's")
MAPS = flags.DEFINE_list(
    "maps", None, "Methods whose representations are drawn as maps, default the first three; --maps= for none"
)


def main() -> None:
    """Write the report, say where."""
    written = report.write(app.required("study"), OUTPUT.value, maps=MAPS.value)
    for sentence in written.warnings:
        print(f"beware: {sentence}", file=sys.stderr)
    print(written.progress)
    print("saved as " + " and ".join(map(str, written.files)))


if __name__ == "__main__":
    app.run(main)

"""Run a whole study.

conclugen study --config=study_demo --study=FOLDER

Runs methods x data sets x protocols x seeds, several runs side by side. Repeat the command to resume after an
interruption; finished runs are skipped. FOLDER/results.json holds all scores; conclugen report --study=FOLDER makes the
report.
"""

import sys

from conclugen_jax.commands import app, scores

command = app.Command(config="study")
FLAGS = command.flags
command.string("study", None, "Folder of the study: its runs, study.json, results.json; default: runs/CONFIGURATION")
app.choose_engine(command)


def main() -> int:
    """Run the missing cells, print a table of accuracies, exit with 1 if a cell failed."""
    from conclugen_jax.study import study

    with app.engine(command) as engine:
        results = study.run(command.config, FLAGS.study or f"runs/{command.config_name}", engine)
    for line in results["warnings"]:
        print(f"warning: {line}", file=sys.stderr)
    scores.show(results)
    failed: dict[tuple[str, str], list[str]] = {}
    for cell in results["cells"]:
        if cell["status"] != "done":
            failed.setdefault((cell["status"], cell["error"] or "it was not run"), []).append(cell["path"])
    for (status, cause), (path, *others) in failed.items():
        more = f" and {len(others)} more" if others else ""
        print(f"{status}: {path}{more}: {cause}", file=sys.stderr)
    return int(bool(failed))

"""Run a whole study.

conclugen study --config=study_demo --study=FOLDER

Runs methods x data sets x protocols x seeds, several runs side by side. Repeat the command to resume after an
interruption; finished runs are skipped. FOLDER/results.json holds all scores; conclugen report --study=FOLDER makes the
report.
"""

import sys

from rich.console import Console
from rich.table import Table

from conclugen_jax.commands import app
from conclugen_jax.study import study as study_lib

command = app.Command(config="study")
FLAGS = command.flags
command.string("study", None, "Folder of the study: its runs, study.json, results.json; default: runs/CONFIGURATION")


def main() -> int:
    """Run what is missing, print a table of accuracies, exit with 1 if a cell has failed."""
    results = study_lib.run(command.config, FLAGS.study or f"runs/{command.config_name}")
    for dataset, protocol in dict.fromkeys((s["dataset"], s["protocol"]) for s in results["summary"]):
        _show(results, dataset, protocol)
    failed = [cell for cell in results["cells"] if cell["status"] != "done"]
    for cell in failed:
        print(f"{cell['status']}: {cell['path']}: {cell['error'] or 'it was not run'}", file=sys.stderr)
    return int(bool(failed))


def _show(results: dict, dataset: str, protocol: str) -> None:
    rows = study_lib.chosen(results["summary"], dataset=dataset, protocol=protocol)
    numbers = list(dict.fromkeys(row["labels_per_class"] for row in rows))
    measure = next(iter(rows[0]["scores"]))
    factor = 1 if measure == "mae" else 100
    table = Table(title=f"{protocol} on {dataset}: {measure}{'' if factor == 1 else ' in %'}, mean and 95 % interval")
    table.add_column("method")
    for number in numbers:
        table.add_column(f"{number} labels" if number else "all labels", justify="right")
    for method in dict.fromkeys(row["method"] for row in rows):
        own = {row["labels_per_class"]: row["scores"][measure] for row in study_lib.chosen(rows, method=method)}
        table.add_row(results["methods"][method]["title"], *(_cell(own.get(n), factor) for n in numbers))
    Console().print(table)


def _cell(score: dict | None, factor: int) -> str:
    if score is None:
        return "-"
    digits = 3 if factor == 1 else 1
    shown = f"{factor * score['mean']:.{digits}f}"
    if score["interval"] is None:
        return shown
    return f"{shown} ± {factor * (score['interval'][1] - score['mean']):.{digits}f}"

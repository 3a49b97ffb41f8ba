"""Train and score a classifier.

conclugen downstream --config=linear_evaluation --data=DATA/NAME/VERSION --checkpoint=PRETRAINING_RUN

Prints the scores of the test split and writes them, with confusion matrix and per-class scores, to WORKDIR/result.json.
With --sweep the grid of config.sweep (rates, decays, seeds, labels per class, draws of them) is trained at once on
frozen representations, and rate and decay are chosen by the validation split:
--sweep --config.sweep.learning_rates=1e-3,1e-2 --config.sweep.labels_per_class=5,20,0

With several machines or processes, start the same command once for each, with --distributed=auto (launch/cluster).
"""

from collections.abc import Sequence
from pathlib import Path

from conclugen_jax.commands import app
from conclugen_jax.system import processes

command = app.Command(
    config="run", short=app.OF_PRETRAINING | {"checkpoint": "downstream.checkpoint", "test_data": "data.test_paths"}
)
FLAGS = command.flags
PLACE = "Folder of result.json, metrics.jsonl, checkpoints; default: CHECKPOINT/PROTOCOL, or runs/PROTOCOL"
command.string("workdir", None, PLACE)
command.bool("sweep", False, "Train the whole grid of config.sweep in one run")
command.distribute()

MEMBER = ("labels_per_class", "label_draw", "seed", "learning_rate", "weight_decay")  # what is shown of one of a sweep
COLUMNS = ("labels", "draw", "seed", "rate", "decay")


def main() -> None:
    """Train, choose the best epoch, print the scores."""
    from conclugen_jax.evaluate import downstream, sweep, weights
    from conclugen_jax.runs.config import PRETRAINED

    command.join()
    section = command.config.downstream
    beside = section.checkpoint if section.protocol in PRETRAINED and section.checkpoint else "runs"
    workdir = FLAGS.workdir or str(Path(beside, section.protocol + ("_sweep" if FLAGS.sweep else "")))
    result = (sweep.sweep if FLAGS.sweep else downstream.downstream)(command.config, workdir)
    if processes.is_main():
        _show(result)
        print(f"saved as {workdir}/{weights.RESULT}")


def _show(result: dict) -> None:
    """Print a row for each split, or for each selected member of a sweep."""
    scores, factor, digits = ("accuracy", "f1", "precision", "recall"), 100, 2
    if result["kind"] == "value":
        scores, factor, digits = ("mae", "correlation", "accuracy_2", "f1_2", "accuracy_7"), 1, 3
    target = f"{result['target']} of " if result["target"] else ""
    unit = "a number to predict" if factor == 1 else "weighted scores in %"
    if "selected" in result:
        facts, kind = COLUMNS, f"those of best validation of {len(result['members'])} classifiers, test split"
        rows = [([_number(row[fact]) for fact in MEMBER], row["test"]) for row in result["selected"]]
        for named, _ in rows:
            named[0] = {"0": "all"}.get(named[0], named[0])
    else:
        facts, rows = ["split"], [([split], result[split]) for split in ("validation", "test") if split in result]
        kind = "" if "num_folds" in result else f"best epoch {result['best_epoch'] + 1}"
    if "num_folds" in result:
        kind = ", ".join(filter(None, (kind, f"mean of {result['num_folds']} folds")))
    cells = [[*named, *(f"{factor * scored[score]:.{digits}f}" for score in scores)] for named, scored in rows]
    title = f"{result['protocol']} on {target}{result['data']['name']}, {kind}, {unit}"
    app.show([*facts, *scores], cells, title=title)
    fits = result.get("selected", [result])
    names = [named for named, _ in rows] if "selected" in result else [["test"]]
    for i in range(len(result.get("test_data", []))):
        _show_across(result, i, facts, [(named, fit["across"][i]) for named, fit in zip(names, fits, strict=True)])


def _show_across(result: dict, i: int, facts: Sequence[str], found: Sequence[tuple[list[str], dict]]) -> None:
    """Print scores on another data set beside those on rows of the own one that have the same classes."""
    from conclugen_jax.evaluate import across

    measure, factor, digits = ("mae", 1, 3) if result["kind"] == "value" else ("accuracy", 100, 2)
    trained, other = result["data"]["name"], result["test_data"][i]
    columns, cells = [], [list(named) for named, _ in found]
    for name, of in ((trained, lambda one: one["within"]), (other["data"]["name"], lambda one: one)):
        columns.append(f"{name} ({of(found[0][1])['n']} rows)")
        for row, (_, one) in zip(cells, found, strict=True):
            row.append(f"{factor * of(one)['scores'][measure]:.{digits}f}")
    unit = " in %" * (factor > 1)
    app.show([*facts, *columns], cells, title=f"trained on {trained}: {measure}{unit}, test rows of classes in both")
    for line in across.said(other, found[0][1], trained):
        print(line)


def _number(value: float | list[float]) -> str:
    """Return a number as text; of those of several folds the least and the greatest."""
    values = value if isinstance(value, list) else [value]
    return " to ".join(dict.fromkeys(f"{x:g}" for x in (min(values), max(values))))

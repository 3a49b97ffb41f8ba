"""Train and score a classifier.

conclugen downstream --config=linear_evaluation --data=DATA/NAME/VERSION --checkpoint=PRETRAINING_RUN

Prints the scores of the test split and writes them, with confusion matrix and per-class scores, to WORKDIR/result.json.
With --sweep the grid of config.sweep (rates, decays, seeds, labels per class, draws of them) is trained at once on
frozen representations, and rate and decay are chosen by the validation split:
--sweep --config.sweep.learning_rates=1e-3,1e-2 --config.sweep.labels_per_class=5,20,0
"""

from pathlib import Path

from conclugen_jax.commands import app

command = app.Command(config="run", short=app.OF_PRETRAINING | {"checkpoint": "downstream.checkpoint"})
FLAGS = command.flags
PLACE = "Folder of result.json, metrics.jsonl, checkpoints; default: CHECKPOINT/PROTOCOL, or runs/PROTOCOL"
command.string("workdir", None, PLACE)
command.bool("sweep", False, "Train the whole grid of config.sweep in one run")

MEMBER = ("labels_per_class", "label_draw", "seed", "learning_rate", "weight_decay")  # what is shown of one of a sweep
COLUMNS = ("labels", "draw", "seed", "rate", "decay")


def main() -> None:
    """Train, choose the best epoch, print the scores."""
    from conclugen_jax.evaluate import downstream, sweep, weights
    from conclugen_jax.runs.config import PRETRAINED

    section = command.config.downstream
    beside = section.checkpoint if section.protocol in PRETRAINED and section.checkpoint else "runs"
    workdir = FLAGS.workdir or str(Path(beside, section.protocol + ("_sweep" if FLAGS.sweep else "")))
    _show((sweep.sweep if FLAGS.sweep else downstream.downstream)(command.config, workdir))
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


def _number(value: float | list[float]) -> str:
    """Return a number as text; of those of several folds the least and the greatest."""
    values = value if isinstance(value, list) else [value]
    return " to ".join(dict.fromkeys(f"{x:g}" for x in (min(values), max(values))))

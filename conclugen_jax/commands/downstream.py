"""Train and score a classifier.

conclugen downstream --config=linear_evaluation --data=DATA/NAME/VERSION --checkpoint=PRETRAINING_RUN

Prints the scores of the test split and writes them, with confusion matrix and per-class scores, to WORKDIR/result.json.
With --sweep the grid of config.sweep (rates, decays, seeds, labels per class, draws of them) is trained at once on
frozen representations, and rate and decay are chosen by the validation split:
--sweep --config.sweep.learning_rates=1e-3,1e-2 --config.sweep.labels_per_class=5,20,0
"""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from conclugen_jax.commands import app
from conclugen_jax.evaluate import downstream, sweep

command = app.Command(config="run", short=app.OF_PRETRAINING | {"checkpoint": "downstream.checkpoint"})
FLAGS = command.flags
command.string(
    "workdir",
    None,
    "Folder of the run: result.json, metrics.jsonl, checkpoints; default: CHECKPOINT/PROTOCOL, or runs/PROTOCOL",
)
command.bool("sweep", False, "Train the whole grid of config.sweep in one run")

SCORES = ("accuracy", "f1", "precision", "recall")
VALUE_SCORES = ("mae", "correlation", "accuracy_2", "f1_2", "accuracy_7")


def main() -> None:
    """Train, choose the best epoch, print the scores."""
    workdir = FLAGS.workdir or _beside_checkpoint()
    if FLAGS.sweep:
        _show_sweep(sweep.sweep(command.config, workdir))
    else:
        _show(downstream.downstream(command.config, workdir))
    print(f"saved as {workdir}/{downstream.RESULT}")


def _beside_checkpoint() -> str:
    section = command.config.downstream
    trained_before = section.protocol in ("linear_evaluation", "fine_tuning")
    folder = section.checkpoint if trained_before and section.checkpoint else "runs"
    return str(Path(folder, section.protocol + ("_sweep" if FLAGS.sweep else "")))


def _show(result: dict) -> None:
    number = result["kind"] == "value"
    scores = VALUE_SCORES if number else SCORES
    what = f"{result['target']} of " if result["target"] else ""
    when = f"mean of {result['num_folds']} folds" if "num_folds" in result else f"best epoch {result['best_epoch'] + 1}"
    table = Table(
        title=f"{result['protocol']} on {what}{result['data']['name']}, {when}, "
        + ("a number to predict" if number else "weighted scores in %")
    )
    for column in ("split", *scores):
        table.add_column(column, justify="left" if column == "split" else "right")
    for split in ("validation", "test"):
        table.add_row(split, *(_shown(result[split][score], number) for score in scores))
    Console().print(table)


def _show_sweep(result: dict) -> None:
    number = result["kind"] == "value"
    scores = VALUE_SCORES if number else SCORES
    table = Table(
        title=f"{result['protocol']} on {result['data']['name']}: {len(result['members'])} classifiers, those of best "
        + f"validation {'mae' if number else 'accuracy'}, test scores{'' if number else ' in %'}"
    )
    for column in ("labels", "draw", "seed", "rate", "decay", *scores):
        table.add_column(column, justify="right")
    for row in result["selected"]:
        table.add_row(
            str(row["labels_per_class"] or "all"),
            str(row["label_draw"]),
            str(row["seed"]),
            f"{row['learning_rate']:g}",
            f"{row['weight_decay']:g}",
            *(_shown(row["test"][score], number) for score in scores),
        )
    Console().print(table)


def _shown(score: float, number: bool) -> str:
    return f"{score:.3f}" if number else f"{100 * score:.2f}"

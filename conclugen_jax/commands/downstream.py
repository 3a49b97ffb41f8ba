"""Train and score a classifier: python -m launch.downstream --config=configs/linear_evaluation.py
--config.data.path=DATA/NAME/VERSION --config.downstream.checkpoint=PRETRAINING_RUN --workdir=RUN

Prints the scores of the test split and leaves them, with confusion matrix and per-class scores, in RUN/result.json.
With --sweep the grid of config.sweep (rates, decays, seeds, labels per class, draws of them) is trained at once on
frozen representations, and rate and decay are chosen by the validation split:
--sweep --config.sweep.learning_rates="(1e-3,1e-2)" --config.sweep.labels_per_class="(5,20,0)"
"""

from absl import flags
from rich.console import Console
from rich.table import Table

from conclugen_jax.commands import app
from conclugen_jax.evaluate import downstream, sweep

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: result.json, metrics.jsonl, checkpoints")
SWEEP = flags.DEFINE_bool("sweep", False, "Train the whole grid of config.sweep in one run")
app.define_config()

SCORES = ("accuracy", "f1", "precision", "recall")
VALUE_SCORES = ("mae", "correlation", "accuracy_2", "f1_2", "accuracy_7")


def main() -> None:
    """Train, choose the best epoch, print the scores."""
    if SWEEP.value:
        _show_sweep(sweep.sweep(app.config(), app.required("workdir")))
        return
    result = downstream.downstream(app.config(), app.required("workdir"))
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


if __name__ == "__main__":
    app.run(main)

"""Train and score a classifier: python -m launch.downstream --config=configs/linear_evaluation.py
--config.data.path=DATA/NAME/VERSION --config.downstream.checkpoint=PRETRAINING_RUN --workdir=RUN

Prints the scores of the test split and leaves them, with confusion matrix and per-class scores, in RUN/result.json.
"""

from absl import flags
from rich.console import Console
from rich.table import Table

from conclugen_jax import downstream
from launch import app

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: result.json, metrics.jsonl, checkpoints")
app.define_config()

SCORES = ("accuracy", "f1", "precision", "recall")
VALUE_SCORES = ("mae", "correlation", "accuracy_2", "f1_2", "accuracy_7")


def main() -> None:
    """Train, choose the best epoch, print the scores."""
    result = downstream.downstream(app.config(), app.required("workdir"))
    number = result["kind"] == "value"
    scores = VALUE_SCORES if number else SCORES
    what = f"{result['target']} of " if result["target"] else ""
    table = Table(
        title=f"{result['protocol']} on {what}{result['data']['name']}, best epoch {result['best_epoch'] + 1}, "
        + ("a number to predict" if number else "weighted scores in %")
    )
    for column in ("split", *scores):
        table.add_column(column, justify="left" if column == "split" else "right")
    for split in ("validation", "test"):
        table.add_row(split, *(_shown(result[split][score], number) for score in scores))
    Console().print(table)


def _shown(score: float, number: bool) -> str:
    return f"{score:.3f}" if number else f"{100 * score:.2f}"


if __name__ == "__main__":
    app.run(main)

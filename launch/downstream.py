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


def main() -> None:
    """Train, choose the best epoch, print the scores."""
    result = downstream.downstream(app.config(), app.required("workdir"))
    table = Table(
        title=f"{result['protocol']} on {result['data']['name']}, best epoch {result['best_epoch'] + 1}, weighted scores in %"
    )
    for column in ("split", *SCORES):
        table.add_column(column, justify="left" if column == "split" else "right")
    for split in ("validation", "test"):
        table.add_row(split, *(f"{100 * result[split][score]:.2f}" for score in SCORES))
    Console().print(table)


if __name__ == "__main__":
    app.run(main)

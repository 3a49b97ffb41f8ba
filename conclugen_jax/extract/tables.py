"""A table of predictions, for a terminal."""

from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from conclugen_jax.extract.prediction import Prediction


def of_predictions(predictions: Sequence[Prediction], title: str) -> Table:
    """One row for each utterance.

    Args:
      predictions: those that did not fail; of one run.
      title: what made them.
    """
    classes = predictions[0].classes if predictions else ()
    table = Table(title=escape(f"{title}: probabilities in %" if classes else title))
    said = any(p.text for p in predictions)
    for column in ("clip", "seconds", *(["words"] if said else []), "prediction"):
        table.add_column(column, overflow="fold")
    for name in classes:
        table.add_column(escape(name), justify="right")
    remarks = [_remarks(p) for p in predictions]
    if any(remarks):
        table.add_column("remarks", overflow="fold")
    for p, remark in zip(predictions, remarks, strict=True):
        cells = [Path(p.clip).name, f"{p.start:.1f}-{p.end:.1f}", *([p.text or ""] if said else []), p.said]
        row = [*map(escape, cells), *(f"{100 * x:.1f}" for x in p.probability)]
        table.add_row(*row, *([escape(remark)] if any(remarks) else []))
    return table


def _remarks(p: Prediction) -> str:
    return "; ".join(dict.fromkeys([*(f"no {modality}" for modality in p.missing), *p.notes]))

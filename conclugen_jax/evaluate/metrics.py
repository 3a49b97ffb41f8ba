"""Scores of a whole split, weighted as the paper's tables are."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np


def weighted_accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Return the accuracy weighted by occurrence.

    That is plain accuracy for one class per example [n]. For any number of labels [n, labels] it is the accuracy
    (tp + tn) / n of each, weighted by its share of all positives (0 without any positive).
    """
    right = np.asarray(labels, int) == np.asarray(predictions, int)
    if right.ndim == 1:
        return float(right.mean())
    support = np.asarray(labels, int).sum(axis=0)
    return float(np.average(right.mean(axis=0), weights=support)) if support.any() else 0.0


def absolute_error(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Return the mean absolute error of numbers [n]."""
    return float(np.abs(np.asarray(labels, np.float64) - np.asarray(predictions, np.float64)).mean())


def class_scores(labels: np.ndarray, predictions: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Compute the scores of one class per example [n], or of any number of labels, 0 or 1 [n, labels]; n >= 1.

    Classes are weighted by their examples, labels by their positives: weighted recall of classes equals plain accuracy.
    A class that is never predicted has precision 0; without any positive all scores are 0.

    Returns:
      ``accuracy`` (:func:`weighted_accuracy`), ``f1``, ``precision``, ``recall``; ``confusion_matrix``, counts,
      [class][predicted class] or [label][present][predicted]; ``per_class``: name -> {precision, recall, f1, support},
      and of labels {accuracy}, (tp + tn) / n.
    """
    from sklearn import metrics  # here, since it takes a second to import and most commands do without

    labels, predictions, several = labels.astype(int), predictions.astype(int), labels.ndim == 2
    classes = {"labels": np.arange(len(names))}
    confusion = metrics.multilabel_confusion_matrix if several else metrics.confusion_matrix
    scored = functools.partial(metrics.precision_recall_fscore_support, labels, predictions, **classes, zero_division=0)
    kinds = ("precision", "recall", "f1")
    weighted = {kind: float(x) for kind, x in zip(kinds, scored(average="weighted"), strict=False)}
    per_class = {
        name: {"precision": float(p), "recall": float(r), "f1": float(f), "support": int(s)}
        for name, p, r, f, s in zip(names, *scored(average=None), strict=True)
    }
    if several:
        for name, value in zip(names, (labels == predictions).mean(axis=0), strict=True):
            per_class[name]["accuracy"] = float(value)
    accuracy = weighted_accuracy(labels, predictions)
    matrix = confusion(labels, predictions, **classes).tolist()
    return {"accuracy": accuracy, **weighted, "per_class": per_class, "confusion_matrix": matrix}


def never_predicted(matrices: Iterable[Any], names: Sequence[str]) -> dict[str, int]:
    """Count the evaluations in which a class, or label, is never predicted though test examples have it.

    ``matrices``: a ``confusion_matrix`` of :func:`class_scores` for each. Returns name -> count, where it is not 0.
    """
    missed = np.zeros(len(names), int)
    for support, predicted in map(_totals, matrices):
        missed += (support > 0) & (predicted == 0)
    return {name: int(count) for name, count in zip(names, missed, strict=True) if count}


def _totals(matrix: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return how many examples each class, or label, has and how often it is predicted."""
    counts = np.asarray(matrix)
    if counts.ndim == 3:
        return counts[:, 1].sum(axis=1), counts[:, :, 1].sum(axis=1)
    return counts.sum(axis=1), counts.sum(axis=0)


def remarks(matrices: Sequence[Any], names: Sequence[str]) -> list[str]:
    """Return remarks on what a weighted mean hides on a test split: classes never predicted, and classes without examples."""
    found = []
    if not matrices:
        return found
    if missed := never_predicted(matrices, names):
        found.append(f"warning: {missed_sentence({'': (missed, len(matrices))})}")
    return found + absent(sum(_totals(matrix)[0] for matrix in matrices), names)


def absent(support: np.ndarray, names: Sequence[str]) -> list[str]:
    """Return a sentence on the classes without test examples; empty if there are none."""
    shown = " or ".join(repr(name) for name, count in zip(names, support, strict=True) if not count)
    return [f"note: no example of the test split is {shown}; the scores say nothing about that"] * bool(shown)


def missed_sentence(found: Mapping[str, tuple[Mapping[str, int], int]]) -> str:
    """Name the classes that are never predicted: what is evaluated -> (:func:`never_predicted`, number of evaluations)."""
    parts = []
    for what, (missed, total) in found.items():
        shown = [
            repr(name) + (f" ({count} of {total} evaluations)" if total > 1 else "") for name, count in missed.items()
        ]
        parts.append(f"{what}: {', '.join(shown)}" if what else ", ".join(shown))
    return f"never predicted on the test split: {'; '.join(parts)}; weighted means hide the F1 of 0 of such a class"


def value_scores(labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """Compute the usual scores of sentiment from -3 to 3 (CMU-MOSI, CMU-MOSEI), real [n], n >= 1.

    Returns:
      ``mae``: mean absolute error; ``correlation``: Pearson's, 0 where either side does not vary; ``accuracy_7``: of
      values rounded to -3..3; ``accuracy_2``, ``f1_2``: negative against not negative, over all rows; ``accuracy_2_nonzero``,
      ``f1_2_nonzero``: negative against positive, over rows whose label is not 0 (0 if there are none). F1 is weighted by
      class occurrence.
    """
    from sklearn.metrics import f1_score

    labels, predictions = labels.astype(np.float64), predictions.astype(np.float64)
    steps = [np.clip(np.round(x), -3, 3) for x in (labels, predictions)]
    varies = labels.std() > 0 and predictions.std() > 0
    scores = {
        "mae": absolute_error(labels, predictions),
        "correlation": float(np.corrcoef(labels, predictions)[0, 1]) if varies else 0.0,
        "accuracy_7": weighted_accuracy(*steps),
    }
    nonzero = labels != 0
    sides = {"": (labels >= 0, predictions >= 0), "_nonzero": (labels[nonzero] > 0, predictions[nonzero] > 0)}
    for suffix, sides_of_rows in sides.items():
        some = len(sides_of_rows[0]) > 0
        scores[f"accuracy_2{suffix}"] = weighted_accuracy(*sides_of_rows) if some else 0.0
        f1 = f1_score(*sides_of_rows, average="weighted", zero_division=0) if some else 0.0
        scores[f"f1_2{suffix}"] = float(f1)
    return scores

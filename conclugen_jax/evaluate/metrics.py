"""Scores of a whole split, weighted as the paper's tables are."""

from collections.abc import Sequence
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


def single_label_scores(labels: np.ndarray, predictions: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Compute accuracy, F1, precision and recall of one class per example, each class weighted by its number of examples.

    Weighted recall equals plain accuracy. A class that is never predicted has precision 0.

    Args:
      labels: integer [n], n >= 1.
      predictions: integer [n].
      names: of the classes.

    Returns:
      ``accuracy``, ``f1``, ``precision``, ``recall``; ``confusion_matrix`` [class][predicted class], counts;
      ``per_class``: name -> {precision, recall, f1, support}.
    """
    _check(labels, predictions, 1)
    classes = np.arange(len(names))
    from sklearn.metrics import confusion_matrix  # here, since it takes a second to import and most commands do without

    matrix = confusion_matrix(labels, predictions, labels=classes)
    scores = _weighted(labels, predictions, classes, names)
    return {"accuracy": weighted_accuracy(labels, predictions), **scores, "confusion_matrix": matrix.tolist()}


def multi_label_scores(labels: np.ndarray, predictions: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Compute accuracy, F1, precision and recall of any number of labels per example, weighted by the labels' positives.

    Accuracy of a label is (tp + tn) / n; the mean over labels weighs each by its share of all positives. A label
    that is never predicted has precision 0. Without any positive all scores are 0.

    Args:
      labels: 0 or 1, [n, num_labels], n >= 1.
      predictions: 0 or 1, [n, num_labels].
      names: of the labels.

    Returns:
      ``accuracy``, ``f1``, ``precision``, ``recall``; ``confusion_matrix`` [label][present][predicted], counts;
      ``per_class``: name -> {accuracy, precision, recall, f1, support}.
    """
    _check(labels, predictions, 2)
    labels, predictions = labels.astype(int), predictions.astype(int)
    from sklearn.metrics import multilabel_confusion_matrix

    matrices = multilabel_confusion_matrix(labels, predictions, labels=np.arange(len(names)))
    scores = _weighted(labels, predictions, np.arange(len(names)), names)
    for name, value in zip(names, (labels == predictions).mean(axis=0), strict=True):
        scores["per_class"][name]["accuracy"] = float(value)
    return {"accuracy": weighted_accuracy(labels, predictions), **scores, "confusion_matrix": matrices.tolist()}


def value_scores(labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """Compute the usual scores of sentiment from -3 to 3 (CMU-MOSI, CMU-MOSEI).

    Args:
      labels: real [n], n >= 1.
      predictions: real [n].

    Returns:
      ``mae``: mean absolute error; ``correlation``: Pearson's, 0 where either side does not vary; ``accuracy_7``: of
      values rounded to -3..3; ``accuracy_2``, ``f1_2``: negative against not negative, over all rows; ``accuracy_2_nonzero``,
      ``f1_2_nonzero``: negative against positive, over rows whose label is not 0 (0 if there are none). F1 is weighted by
      class occurrence.
    """
    _check(labels, predictions, 1)
    labels, predictions = labels.astype(np.float64), predictions.astype(np.float64)
    steps = [np.clip(np.round(x), -3, 3) for x in (labels, predictions)]
    varies = labels.std() > 0 and predictions.std() > 0
    scores = {
        "mae": absolute_error(labels, predictions),
        "correlation": float(np.corrcoef(labels, predictions)[0, 1]) if varies else 0.0,
        "accuracy_7": float((steps[0] == steps[1]).mean()),
    }
    from sklearn.metrics import f1_score

    nonzero = labels != 0
    sides = {"": (labels >= 0, predictions >= 0), "_nonzero": (labels[nonzero] > 0, predictions[nonzero] > 0)}
    for suffix, (truth, guess) in sides.items():
        f1 = f1_score(truth, guess, average="weighted", zero_division=0) if truth.size else 0.0
        scores[f"accuracy_2{suffix}"] = float((truth == guess).mean()) if truth.size else 0.0
        scores[f"f1_2{suffix}"] = float(f1)
    return scores


def _weighted(labels, predictions, classes, names) -> dict[str, Any]:
    arguments = {"labels": classes, "zero_division": 0}
    from sklearn.metrics import precision_recall_fscore_support

    precision, recall, f1, _ = precision_recall_fscore_support(labels, predictions, average="weighted", **arguments)
    each = precision_recall_fscore_support(labels, predictions, average=None, **arguments)
    per_class = {
        name: {"precision": float(p), "recall": float(r), "f1": float(f), "support": int(s)}
        for name, p, r, f, s in zip(names, *each, strict=True)
    }
    return {"f1": float(f1), "precision": float(precision), "recall": float(recall), "per_class": per_class}


def _check(labels: np.ndarray, predictions: np.ndarray, ndim: int) -> None:
    if labels.shape != predictions.shape or labels.ndim != ndim or not len(labels):
        raise ValueError(
            f"labels and predictions must be of one shape with {ndim} axes, got {labels.shape}, {predictions.shape}"
        )

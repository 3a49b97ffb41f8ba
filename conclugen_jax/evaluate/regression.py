"""Logistic regressions on few labels, by one rule for all vectors."""

import functools
from collections.abc import Sequence

import numpy as np
from threadpoolctl import ThreadpoolController

_libraries = functools.cache(ThreadpoolController)  # to find them takes as long as a small fit


def classify(train: np.ndarray, labels: np.ndarray, test: np.ndarray, *, c_times_dim: float = 0.0) -> np.ndarray:
    """Fit scikit-learn's logistic regression (L2) on rows [n, dim] of classes [n]; return the classes [m] of rows [m, dim].

    ``c_times_dim`` is the inverse strength C of the penalty times dim, so that vectors of different sizes are treated alike:
    the more features, the stronger the penalty; 0: C is 1. The solution is a combination of the rows, so that with fewer rows
    than half the features the fit is made in the space that they span.
    """
    classes, probabilities = classified(train, labels, test, c_times_dim)
    return classes[probabilities.argmax(axis=1)]


def classified(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, c_times_dim: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the classes [k] and their probabilities for each test row [m, k]."""
    from sklearn.linear_model import LogisticRegression

    c = c_times_dim / train.shape[1] if c_times_dim else 1.0
    few = 2 * len(train) < train.shape[1]
    # In small fits the threads wait for each other, for far longer than they save on a busy machine.
    with _libraries().limit(limits=1 if few or len(train) < 1000 else None):
        if few:
            basis, _ = np.linalg.qr(train.T)
            train, test = train @ basis, test @ basis
        fitted = LogisticRegression(C=c, max_iter=2000).fit(train, labels)
        return fitted.classes_, fitted.predict_proba(test)


def self_trained(
    train: np.ndarray,
    labels: np.ndarray,
    others: np.ndarray,
    test: np.ndarray,
    *,
    shares: Sequence[float],
    c_times_dim: float = 0.0,
) -> np.ndarray:
    """Classify as :func:`classify` does, after rounds in which unlabelled rows get the classes that are predicted for them.

    Args:
      train: [n, dim].
      labels: classes [n] of ``train``.
      others: [u, dim], the unlabelled training rows.
      test: [m, dim].
      shares: of each predicted class, the share of rows most sure of it that are trained on next, one for each round.
      c_times_dim: see :func:`classify`.

    References:
      Lee, "Pseudo-label: the simple and efficient semi-supervised learning method for deep neural networks", 2013.
    """
    rows, known = train, labels
    for share in shares if len(others) else ():
        classes, probabilities = classified(rows, known, others, c_times_dim)
        guess, sure = probabilities.argmax(axis=1), probabilities.max(axis=1)
        kept = []
        for c in np.unique(guess):
            own = np.flatnonzero(guess == c)
            kept.append(own[np.argsort(-sure[own], kind="stable")][: max(1, round(share * len(own)))])
        kept = np.concatenate(kept)
        rows, known = np.concatenate([train, others[kept]]), np.concatenate([labels, classes[guess[kept]]])
    return classify(rows, known, test, c_times_dim=c_times_dim)


def draw_labels(labels: np.ndarray, num_per_class: int, *, seed: int) -> np.ndarray:
    """Return the rows of ``num_per_class`` random examples of every class, or all that it has (0: all rows)."""
    if num_per_class == 0:
        return np.arange(len(labels))
    rng = np.random.default_rng(seed)
    rows = []
    for value in np.unique(labels):
        members = np.flatnonzero(labels == value)
        rows.append(rng.choice(members, min(num_per_class, len(members)), replace=False))
    return np.sort(np.concatenate(rows))

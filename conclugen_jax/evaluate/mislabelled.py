"""Find labels that are likely wrong, by confident learning on out-of-fold probabilities of probes.

The probabilities come from cross-validation by person, so that no row is judged by a classifier that knows its own label, or
the person. The same probes say whether a modality adds anything.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from conclugen_jax.data import batches
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import probe

FOLDS = 5  # at most; fewer persons, or rows of the largest class, make fewer
C_TIMES_DIM = (
    3.0  # of logistic regression; a stronger penalty than scores have: wrong labels are not to be learnt by heart
)
MOST_DIM = 512  # numbers of a vector beyond which its principal components take its place
SMALL = 2e7  # numbers up to which one thread is fastest in products; in regressions it always is
Folds = Sequence[tuple[np.ndarray, np.ndarray]]
"""Training rows and other rows of each fold."""


def folds(labels: np.ndarray, groups: np.ndarray, copies: np.ndarray, *, seed: int = 0) -> Folds:
    """Cut rows with classes [n] into folds of similar shares of classes, by person where there are two or more.

    ``groups``: strings [n], the person of each row, empty for none. ``copies``: int [n], see :func:`similar.copies`; of rows
    without a person copies stay together, since a row would else be judged by itself.

    Raises:
      ConclugenError: rows of one class alone, or too few to cut.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    classes, counts = np.unique(labels, return_counts=True)
    number, kind, persons = min(FOLDS, int(counts.max(initial=0))), StratifiedKFold, None
    if by_person(groups) or (copies != np.arange(len(copies))).any():
        persons = _numbers(groups if by_person(groups) else np.full(len(groups), ""), copies)
        kind, number = StratifiedGroupKFold, min(number, int(persons.max()) + 1)
    if len(classes) < 2 or number < 2:
        fact = f"{len(labels)} rows of {len(classes)} class{'es' * (len(classes) != 1)}"
        raise ConclugenError(f"{fact}; cross-validation needs two classes, and two different rows of one of them")
    with warnings.catch_warnings():  # of classes with fewer rows than folds, which out_of_fold drops
        warnings.simplefilter("ignore", UserWarning)
        return list(kind(number, shuffle=True, random_state=seed).split(labels, labels, persons))


def _numbers(groups: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the number of each row's person; a row without one counts as a person of its own, numbered by ``others``."""
    names = [name or f"\0{i}" for name, i in zip(groups.tolist(), others.tolist(), strict=True)]
    return np.unique(names, return_inverse=True)[1]


def by_person(groups: np.ndarray) -> bool:
    """Return whether rows of these persons [n] are cut by person: there are two or more."""
    return len(np.unique(groups[groups != ""])) > 1


def out_of_fold(vectors: np.ndarray, labels: np.ndarray, among: Folds, num_classes: int) -> np.ndarray:
    """Return the probabilities of the classes by logistic regressions on the other folds, float64 [n, num_classes].

    Vectors [n, dim] are standardised by all rows, without their labels; of more than ``MOST_DIM`` numbers so many principal
    components are used. A row is NaN where the other folds lack its class: then nothing can be said about its label.
    """
    found = np.full((len(labels), num_classes), np.nan)
    with threadpool_limits(1 if vectors.size < SMALL else None):
        z, strength = _reduced(vectors), C_TIMES_DIM / vectors.shape[1]
    with threadpool_limits(1):
        for train, others in among:
            if len(np.unique(labels[train])) < 2:
                continue
            classes, probabilities = probe.classified(z[train], labels[train], z[others], strength * z.shape[1])
            judged = np.isin(labels[others], classes)
            found[others[judged]] = 0
            found[np.ix_(others[judged], classes)] = probabilities[judged]
    return found


def _reduced(vectors: np.ndarray) -> np.ndarray:
    """Return standardised vectors or, of wide ones, their principal components, float [n, at most MOST_DIM]."""
    from scipy import linalg
    from sklearn.preprocessing import StandardScaler

    z = StandardScaler().fit_transform(vectors)
    n, dim = z.shape
    if (number := min(MOST_DIM, n)) >= dim:
        return z
    products = z @ z.T if n < dim else z.T @ z  # the smaller matrix has all of the components
    values, axes = linalg.eigh(products.astype(np.float64), subset_by_index=[len(products) - number, len(products) - 1])
    if n < dim:
        return axes * np.sqrt(np.maximum(values, 0))
    return np.concatenate([z[i : i + batches.CHUNK_ROWS] @ axes for i in range(0, n, batches.CHUNK_ROWS)])  # in float64


class Confident(NamedTuple):
    """Results of confident learning on n labels; rows that are not judged have NaN and -1."""

    self_confidence: np.ndarray  # float64 [n], probability of the label itself: the lower, the likelier it is wrong
    margin: np.ndarray  # float64 [n], (1 + probability of the label - that of the likeliest other class) / 2
    suggested: np.ndarray  # int [n], the class that a row is confidently counted in, -1 for none
    thresholds: np.ndarray  # float64 [classes]; NaN for a class without rows
    joint: np.ndarray  # int [classes, classes], rows by their label and by the class they are counted in
    judged: np.ndarray  # int [classes], rows of each label that are judged

    @property
    def errors(self) -> float:
        """Estimated number of wrong labels: of the rows of each class, the share of its counts in other classes."""
        counted = self.joint.sum(axis=1)
        off = np.where(counted > 0, 1 - np.diag(self.joint) / np.maximum(counted, 1), 0)
        return float((off * self.judged).sum())


def confident(probabilities: np.ndarray, labels: np.ndarray) -> Confident:
    """Find confident disagreement of out-of-fold probabilities [n, classes] with labels [n].

    The threshold of class j is the mean probability of j over the rows with label j:
    ``t_j = mean of p(j; x) over x with label j``. A row is counted in the class of highest probability among those that
    reach their threshold, ``argmax over j with p(j; x) >= t_j``, and in none if no class does. A row that is counted in
    another class than its label is likely mislabelled.

    References:
      Northcutt, Jiang and Chuang, "Confident learning: estimating uncertainty in dataset labels", JAIR 70, 2021: Eq. 1 and 2;
      Eq. 3 for :attr:`Confident.errors`. Self-confidence and normalised margin as scores of rows: Sec. 3.2 there, and Kuan and
      Mueller, "Model-agnostic label quality scoring to detect real-world label errors", 2022.
    """
    num_classes, judged = probabilities.shape[1], np.isfinite(probabilities).all(axis=1)
    own, rows = labels[judged], probabilities[judged]
    of_label = rows[np.arange(len(own)), own]
    counts = np.bincount(own, minlength=num_classes)
    sums = np.bincount(own, weights=of_label, minlength=num_classes)
    thresholds = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    reached = rows >= thresholds - 1e-12  # a mean of equal numbers is rounded; no number reaches NaN
    counted_in = np.where(reached.any(axis=1), np.where(reached, rows, -1).argmax(axis=1), -1)
    joint = np.zeros((num_classes, num_classes), int)
    np.add.at(joint, (own[counted_in >= 0], counted_in[counted_in >= 0]), 1)
    others = rows.copy()
    others[np.arange(len(own)), own] = -1
    score, margin = np.full((2, len(labels)), np.nan)
    suggested = np.full(len(labels), -1)
    score[judged], margin[judged], suggested[judged] = of_label, (1 + of_label - others.max(axis=1)) / 2, counted_in
    return Confident(score, margin, suggested, thresholds, joint, counts)


class Worth(NamedTuple):
    """The gain of a modality over the others, on the rows that have it and another one."""

    modality: str
    rows: int
    alone: float  # accuracies out of fold
    without: float
    together: float
    interval: tuple[float, float] | None  # 95 %, of the difference together - without; None: it cannot be said

    @property
    def difference(self) -> float:
        """Accuracy that the modality adds."""
        return self.together - self.without


def worth(
    fused: Callable[[Sequence[str]], np.ndarray],
    present: dict[str, np.ndarray],
    labels: np.ndarray,
    groups: np.ndarray,
    among: Folds,
    num_classes: int,
) -> list[Worth]:
    """Score probes with and without each modality, on the same folds; nothing where there is one.

    ``fused``: some modalities -> their joined vectors [n, dim]. ``present``: modality -> boolean [n]. ``groups``: strings [n],
    see :func:`interval`.
    """
    names = list(present)

    @functools.cache  # of two modalities each is alone what is left without the other
    def right(*chosen: str) -> np.ndarray:
        found = out_of_fold(fused(chosen), labels, among, num_classes)
        return np.where(np.isfinite(found).all(axis=1), found.argmax(axis=1) == labels, np.nan)

    every, result = right(*names), []
    for m in names if len(names) > 1 else ():
        others = [x for x in names if x != m]
        rows = present[m] & np.any([present[x] for x in others], axis=0) & np.isfinite(every)
        if rows.sum() < 2:
            continue
        alone, without, together = (x[rows] for x in (right(m), right(*others), every))
        between = interval(together - without, groups[rows])
        result.append(Worth(m, int(rows.sum()), *(float(x.mean()) for x in (alone, without, together)), between))
    return result


def interval(differences: np.ndarray, groups: np.ndarray) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean of differences [n], which belong together within a person [n], by Student's t.

    Rows without a person stand for themselves; so do all where there is one person. ``None`` where no difference varies, since
    then nothing says how far the mean is off. The standard error is that of a mean over clusters (Liang and Zeger, 1986, with
    the factor G / (G - 1) for G clusters).
    """
    from scipy import stats

    number = np.arange(len(differences))
    number = _numbers(groups, number) if by_person(groups) else number
    clusters, mean = number.max() + 1, differences.mean()
    sums = np.bincount(number, weights=differences - mean)
    error = np.sqrt(clusters / max(clusters - 1, 1) * np.square(sums).sum()) / len(differences)
    if clusters < 2 or error < 1e-12:
        return None
    half = stats.t.ppf(0.975, clusters - 1) * error
    return float(mean - half), float(mean + half)

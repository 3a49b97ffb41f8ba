"""Measure vectors and clusters without labels: effective rank, alignment between modalities, balance of clusters."""

import itertools

import numpy as np


def effective_rank(vectors: np.ndarray) -> float:
    """Return how many dimensions vectors [n, dim] use, between 1 and min(n, dim): RankMe; 1 if all are zero.

    It is the exponential of the entropy of the singular values, divided by their sum. Vectors are not centred.

    References:
      Garrido et al., "RankMe: Assessing the downstream performance of pretrained self-supervised representations by their
      rank", 2023 (arXiv 2210.02885), Eq. 1.
    """
    return rank_of_products(products(vectors))


def alignment(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Return the mean squared distance of rows of one number in unit rows [n, dim], and that of all other pairs of rows.

    References:
      Wang and Isola, "Understanding contrastive representation learning through alignment and uniformity on the
      hypersphere", 2020 (arXiv 2005.10242), with the exponent 2.
    """
    squared = _squared_distances(a, b)
    own = np.trace(squared)
    return float(own / len(a)), float((squared.sum() - own) / max(squared.size - len(a), 1))


def uniformity(x: np.ndarray) -> float:
    """Return the log of the mean of exp(-2 d²) over pairs of different unit rows [n, dim], at distances d.

    0 where all rows are the same, -4 where all are orthogonal; the lower, the more evenly they cover the sphere.

    References:
      Wang and Isola, 2020 (see :func:`alignment`), with t = 2.
    """
    others = ~np.eye(len(x), dtype=bool)
    return float(np.log(np.exp(-2 * _squared_distances(x, x)[others]).mean()))


def recall_at_1(a: np.ndarray, b: np.ndarray) -> float:
    """Return the share of unit rows [n, dim] whose nearest row of the other modality is their own, both ways; chance is 1/n."""
    similar, own = a @ b.T, np.arange(len(a))
    return float(((similar.argmax(axis=1) == own).mean() + (similar.argmax(axis=0) == own).mean()) / 2)


def balance(clusters: np.ndarray, num_clusters: int) -> float:
    """Return the entropy of the sizes of clusters, int [n], over the greatest there is: 1 if all are as large, 0 for one."""
    sizes = np.bincount(clusters, minlength=num_clusters)
    return _entropy(sizes) / np.log(max(len(sizes), 2))


def adjusted_information(a: np.ndarray, b: np.ndarray) -> float:
    """Return the adjusted mutual information of two partitions [n]: 1 if they are equal, about 0 if they are independent.

    It is (I - E[I]) / (mean of the two entropies - E[I]), where I is their mutual information and E[I] its expectation over
    partitions of the same sizes at random; as ``sklearn.metrics.adjusted_mutual_info_score``, which takes a second to import.

    References:
      Vinh et al., "Information theoretic measures for clusterings comparison", 2010, Eq. 24a.
    """
    counts = np.zeros([len(np.unique(x)) for x in (a, b)], int)
    np.add.at(counts, tuple(np.unique(x, return_inverse=True)[1] for x in (a, b)), 1)
    rows, columns = counts.sum(axis=1), counts.sum(axis=0)
    entropies = _entropy(rows), _entropy(columns)
    information = sum(entropies) - _entropy(counts.ravel())
    expected = _expected_information(rows, columns)
    return float((information - expected) / max(sum(entropies) / 2 - expected, 1e-12))


def _expected_information(rows: np.ndarray, columns: np.ndarray) -> float:
    """Mutual information of two random partitions of such sizes: a sum over hypergeometric counts."""
    n, total = int(rows.sum()), 0.0
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    sizes = [zip(*np.unique(x, return_counts=True), strict=True) for x in (rows, columns)]
    for (a, times_a), (b, times_b) in itertools.product(*sizes):
        both = np.arange(max(1, a + b - n), min(a, b) + 1)
        chosen = [a, b, n - a, n - b], [n, both, a - both, b - both, n - a - b + both]
        above, below = (sum(log_factorial[x] for x in part) for part in chosen)
        total += times_a * times_b * np.sum(both / n * np.log(n * both / (a * b)) * np.exp(above - below))
    return total


def products(x: np.ndarray) -> np.ndarray:
    """Return x x^T in float64; its eigenvalues are the squares of the singular values of x."""
    x = np.asarray(x, np.float64)
    return x @ x.T


def rank_of_products(products: np.ndarray) -> float:
    """Return :func:`effective_rank` of vectors by their inner products [n, n]."""
    squared = np.linalg.eigvalsh(products) if products.size else np.zeros(1)
    values = np.sqrt(np.maximum(squared, 0))
    return float(np.exp(_entropy(values[values > 1e-7 * values.max()])))  # below is rounding


def _entropy(sizes: np.ndarray) -> float:
    shares = sizes[sizes > 0] / sizes.sum() if sizes.any() else np.ones(1)
    return float(np.sum(shares * np.log(1 / shares)))


def unit(x: np.ndarray) -> np.ndarray:
    """Return rows [n, dim] divided by their norms."""
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    squares = (np.square(a).sum(axis=1)[:, None], np.square(b).sum(axis=1)[None, :])
    return np.maximum(sum(squares) - 2 * a @ b.T, 0)

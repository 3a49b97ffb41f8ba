"""Vectors in closed form, to compare trained ones with: principal components, and generalised canonical correlations.

A few directions: probes standardise vectors, and then the last direction counts as much as the first.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

ByModality = Mapping[str, np.ndarray]


class Projections(NamedTuple):
    """What a closed form has learned of training rows: modality -> mean, scale [dim] and projection [dim, k]."""

    mean: ByModality
    scale: ByModality
    weights: ByModality

    def of(self, features: ByModality, present: ByModality) -> np.ndarray:
        """Return vectors, float32 [n, k]: the mean over the modalities that a row has, zeros without any."""
        sums, count = 0, 0
        for m, weights in self.weights.items():
            z = np.where(present[m][:, None], (features[m] - self.mean[m]) / self.scale[m], 0)
            sums, count = sums + z @ weights, count + present[m]
        return (sums / np.maximum(count, 1)[:, None]).astype(np.float32)


def _moments(features: ByModality, present: ByModality) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    rows = {m: x[present[m]] if present[m].any() else np.zeros_like(x[:1]) for m, x in features.items()}
    mean = {m: x.mean(axis=0, dtype=np.float64) for m, x in rows.items()}
    deviation = {m: x.std(axis=0, dtype=np.float64) for m, x in rows.items()}
    return mean, {m: np.where(x > 1e-6, x, 1) for m, x in deviation.items()}


def _left(x: np.ndarray, k: int) -> np.ndarray:
    """Return the first k left singular vectors of x [n, d], [n, at most k]; with d <= n zeros for singular values of 0.

    By the smaller one of the products of x with itself, which takes a tenth of the time of a decomposition of x.
    """
    wide = len(x) < x.shape[1]
    eigenvalues, v = np.linalg.eigh(x @ x.T if wide else x.T @ x)
    eigenvalues, v = eigenvalues[: -k - 1 : -1], v[:, : -k - 1 : -1]
    if wide:
        return v
    counts = eigenvalues > 1e-12 * max(eigenvalues[0], 1e-300)
    return np.where(counts, x @ v / np.sqrt(np.where(counts, eigenvalues, 1)), 0)


def canonical(features: ByModality, present: ByModality, *, k: int = 16, ridge: float = 0.1) -> Projections:
    """Find what the modalities of an example have in common: regularised generalised CCA (MAXVAR).

    Of standardised modalities X_m [n, d_m], zero where absent, n_m rows of which are there, it finds G [n, k] with G^T G = I
    that maximises ``sum_m tr(G^T P_m G)``, ``P_m = X_m (X_m^T X_m + ridge n_m I)^-1 X_m^T``, and projects every modality onto
    it, ``W_m = (X_m^T X_m + ridge n_m I)^-1 X_m^T G``. With two modalities and no ridge these are the variates of CCA.

    Args:
      features: modality -> float [n, d_m] of training rows.
      present: modality -> boolean [n].
      k: number of directions; at most as many as there are features, and rows.
      ridge: added to each covariance, in variances of a feature.

    References:
      Kettenring, "Canonical analysis of several sets of variables", 1971; missing rows as van de Velden and Bijmolt, 2006.
    """
    mean, scale = _moments(features, present)
    whole, solved = [], {}
    for m, x in features.items():
        z = np.where(present[m][:, None], (x - mean[m]) / scale[m], 0)
        # With X^T X = V L V^T, P = X V (L + r)^-1 (X V)^T: a product of X V / sqrt(L + r) with itself.
        eigenvalues, v = np.linalg.eigh(z.T @ z)
        r = np.maximum(eigenvalues, 0) + max(ridge * present[m].sum(), 1e-9)
        whole.append(z @ v / np.sqrt(r))
        solved[m] = (v / r) @ (z @ v).T  # (X^T X + r I)^-1 X^T
    g = _left(np.concatenate(whole, axis=1), k)
    directions = g * np.sqrt(len(g))  # of variance 1 over the training rows
    return Projections(mean, scale, {m: x @ directions for m, x in solved.items()})


def principal(features: ByModality, present: ByModality, *, k: int = 16) -> Projections:
    """Find the k principal components of all standardised modalities side by side, zeros where absent."""
    mean, scale = _moments(features, present)
    z = [np.where(present[m][:, None], (x - mean[m]) / scale[m], 0) for m, x in features.items()]
    v = _left(np.concatenate(z, axis=1).T, k)
    parts = np.split(v, np.cumsum([x.shape[1] for x in z])[:-1])
    return Projections(mean, scale, dict(zip(features, parts, strict=True)))


FORMS: dict[str, Callable[..., Projections]] = {"principal_components": principal, "canonical_correlations": canonical}
"""Name -> closed form."""


class Baseline(NamedTuple):
    """Vectors that trained ones are compared with in studies."""

    title: str
    protocol: str  # whose encoder gives them: raw_features, or untrained: a random network
    form: str = ""  # closed form that is computed from them; empty: none
    smoothed: bool = True  # as the vectors of the methods are


BASELINES = {
    "raw": Baseline("raw features, not smoothed", "raw_features", smoothed=False),
    "raw_smoothed": Baseline("raw features", "raw_features"),
    "principal_components": Baseline("principal components", "raw_features", "principal_components"),
    "canonical_correlations": Baseline("canonical correlations", "raw_features", "canonical_correlations"),
    "untrained": Baseline("untrained network", "untrained"),
}

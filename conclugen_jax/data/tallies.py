"""Measure feature vectors one by one, and summarise them and the labels of a split."""

import hashlib
from typing import Any, NamedTuple

import numpy as np

from conclugen_jax.data.parts import Moments
from conclugen_jax.data.sources import LabelSpec

COLUMNS_SHOWN = 8
"""Constant columns that are named, at most."""


class Vectors(NamedTuple):
    """What is kept of each vector of a modality, [n, variants] each.

    Attributes:
      hashes: uint64, of the bytes; 0 for a vector that is absent or all zeros.
      norms: float64, L2.
      lows: float32, least value.
      highs: float32, largest value.
      zeros: int32, number of zeros.
      bad: int32, number of values that are not finite.
    """

    hashes: np.ndarray
    norms: np.ndarray
    lows: np.ndarray
    highs: np.ndarray
    zeros: np.ndarray
    bad: np.ndarray


@np.errstate(all="ignore")
def measure(x: np.ndarray) -> Vectors:
    """Measure vectors, float32 [n, variants, dim]."""
    hashes, filled = np.zeros(x.shape[:2], np.uint64), x.any(axis=2)
    hashes[filled] = [int.from_bytes(hashlib.blake2b(v, digest_size=8).digest(), "little") for v in x[filled]]
    norms = np.linalg.norm(x.astype(np.float64), axis=2)
    zeros, bad = (found.sum(axis=2, dtype=np.int32) for found in (x == 0, ~np.isfinite(x)))
    return Vectors(hashes, norms, x.min(axis=2), x.max(axis=2), zeros, bad)


class Columns:
    """Mean, deviation and extremes of each feature, over vectors [n, dim] of several calls."""

    def __init__(self, dim: int):
        self.moments = Moments.zero(dim)
        self.low, self.high = np.full(dim, np.inf, np.float32), np.full(dim, -np.inf, np.float32)

    def add(self, vectors: np.ndarray) -> None:
        """Count vectors [n, dim]; n may be 0."""
        if len(vectors):
            self.moments.merge(Moments.of(vectors))
            self.low = np.minimum(self.low, vectors.min(axis=0))
            self.high = np.maximum(self.high, vectors.max(axis=0))


def feature_report(vectors: Vectors, good: np.ndarray, present: np.ndarray, columns: Columns) -> dict[str, Any]:
    """Summarise a modality of a split.

    Args:
      vectors: of all examples.
      good: bool [n, variants], present and finite; others count only as ``non_finite``.
      present: bool [n].
      columns: of the good vectors.

    Returns:
      Numbers, None for those that need a vector where there is none.
    """
    number = int(good.sum())
    norm, low, high = (_spread(x[good]) for x in (vectors.norms, vectors.lows, vectors.highs))
    constant = np.flatnonzero(columns.low == columns.high) if number > 1 else np.zeros(0, int)
    return {
        "vectors": number,
        "norm_mean": norm["mean"],
        "norm_std": norm["std"],
        "min": low["min"],
        "max": high["max"],
        "zero_share": int(vectors.zeros[good].sum()) / (number * len(columns.low)) if number else None,
        "zero_vectors": int((vectors.hashes[good] == 0).sum()),
        "constant_columns": len(constant),
        "first_constant_columns": constant[:COLUMNS_SHOWN].tolist(),
        "non_finite": int(vectors.bad[present].sum()),
    }


def label_fits(values: np.ndarray, spec: LabelSpec) -> tuple[np.ndarray, np.ndarray]:
    """Return which labels are in range and which are unknown (-1 or NaN), bool [n] each; ``values``: [n] or [n, labels]."""
    if spec.kind == "single":
        return (values >= 0) & (values < len(spec.names)), values == -1
    if spec.kind == "multi":
        return np.isin(values, (0, 1)).all(axis=1), np.isnan(values).all(axis=1)
    return np.isfinite(values), np.isnan(values)


def label_report(values: np.ndarray | None, spec: LabelSpec) -> dict[str, Any]:
    """Summarise labels in range: ``known`` and ``counts``, or ``mean``, ``std``, ``min`` and ``max`` (None without any)."""
    if values is None:  # of kind "none"
        return {"known": 0}
    if spec.kind == "value":
        return {"known": len(values), **_spread(values)}
    counts = np.bincount(values, minlength=len(spec.names)) if spec.kind == "single" else values.sum(axis=0).astype(int)
    return {"known": len(values), "counts": counts.tolist()}


def _spread(values: np.ndarray) -> dict[str, float | None]:
    values = values.astype(np.float64)
    return {key: float(getattr(values, key)()) if len(values) else None for key in ("mean", "std", "min", "max")}

"""Count feature vectors and labels while they are read; the counts take no more memory with more examples."""

import hashlib
from typing import Any

import numpy as np

from conclugen_jax.data.moments import Moments
from conclugen_jax.data.sources import LabelSpec

COLUMNS_SHOWN = 8
"""Constant columns that are named, at most."""


class Spread:
    """Mean, deviation and extremes of each column of rows [n, dim], over several calls."""

    def __init__(self, dim: int):
        self.moments = Moments.zero(dim)
        self.low, self.high = np.full(dim, np.inf), np.full(dim, -np.inf)

    def add(self, rows: np.ndarray) -> None:
        """Count rows [n, dim]; n may be 0."""
        if len(rows):
            self.moments.merge(Moments.of(rows))
            self.low, self.high = np.minimum(self.low, rows.min(axis=0)), np.maximum(self.high, rows.max(axis=0))

    def center(self) -> dict[str, float | None]:
        """Return ``mean`` and ``std`` of the only column; None without rows."""
        known = self.moments.count > 0
        return {key: values[0] if known else None for key, values in self.moments.result().items()}

    def extremes(self) -> dict[str, float | None]:
        """Return ``min`` and ``max`` over all columns; None without rows."""
        known = self.moments.count > 0
        return {"min": float(self.low.min()) if known else None, "max": float(self.high.max()) if known else None}


class LabelTally:
    """Counts of one label.

    Attributes:
      known: number of examples that have it.
      counts: int64 [names], examples of each class, or with each label.
      wrong: number of examples whose label is out of range.
    """

    def __init__(self, spec: LabelSpec):
        self.spec, self.known, self.wrong = spec, 0, 0
        self.counts, self._spread = np.zeros(len(spec.names), np.int64), Spread(1)

    def add(self, values: np.ndarray, *, may_lack: bool) -> np.ndarray:
        """Count labels.

        Args:
          values: [n], or [n, labels] for ``multi``.
          may_lack: -1 or NaN stands for unknown, as it does for further targets.

        Returns:
          Bool [n], those that are out of range, which are not counted.
        """
        kind, num = self.spec.kind, len(self.spec.names)
        if kind == "single":
            unknown, fits = values == -1, (values >= 0) & (values < num)
            self.counts += np.bincount(values[fits], minlength=num)
        elif kind == "multi":
            unknown, fits = np.isnan(values).all(axis=1), np.isin(values, (0, 1)).all(axis=1)
            self.counts += values[fits].sum(axis=0).astype(np.int64)
        else:
            unknown, fits = np.isnan(values), np.isfinite(values)
            self._spread.add(values[fits, None])
        wrong = ~fits & ~(unknown & may_lack)
        self.known += int(fits.sum())
        self.wrong += int(wrong.sum())
        return wrong

    def report(self) -> dict[str, Any]:
        """Return ``known`` and ``counts``, or ``mean``, ``std``, ``min`` and ``max`` (None where no label is known)."""
        if self.spec.kind == "none":
            return {"known": 0}
        if self.spec.kind != "value":
            return {"known": self.known, "counts": self.counts.tolist()}
        return {"known": self.known, **self._spread.center(), **self._spread.extremes()}


class FeatureTally:
    """Numbers of one modality in one split, over the vectors of the examples that have it.

    Only the number of values that are not finite counts vectors with such values. Where several variants are stored, each
    is a vector.

    Attributes:
      non_finite: number of values that are not finite.
      columns: mean, deviation and extremes of each column.
    """

    def __init__(self, dim: int):
        self.columns, self._norms = Spread(dim), Spread(1)
        self.non_finite = self._zeros = self._zero_vectors = 0
        self._hashes: list[np.ndarray] = [np.zeros((0, 1), np.uint64)]

    def add(self, x: np.ndarray, present: np.ndarray) -> None:
        """Count vectors.

        Args:
          x: float32 [n, variants, dim].
          present: bool [n].
        """
        hashes = np.zeros(x.shape[:2], np.uint64)
        there = present[:, None] & (x != 0).any(axis=2)
        hashes[there] = [int.from_bytes(hashlib.blake2b(v, digest_size=8).digest(), "little") for v in x[there]]
        self._hashes.append(hashes)
        vectors = x[present].reshape(-1, x.shape[2])
        finite = np.isfinite(vectors)
        self.non_finite += int(finite.size - finite.sum())
        vectors = vectors[finite.all(axis=1)]
        self._zeros += int((vectors == 0).sum())
        self._zero_vectors += int((~vectors.any(axis=1)).sum())
        self._norms.add(np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True))
        self.columns.add(vectors)

    def hashes(self) -> np.ndarray:
        """Return a hash of each vector's bytes, uint64 [n, variants]; 0 where it is absent or all zeros."""
        found = [hashes for hashes in self._hashes if len(hashes)] or self._hashes
        return np.concatenate(found)

    def report(self) -> dict[str, Any]:
        """Return all numbers; None for those that need a vector where there is none."""
        number, norm = self.columns.moments.count, self._norms.center()
        constant = np.flatnonzero(self.columns.low == self.columns.high) if number > 1 else np.zeros(0, int)
        return {
            "vectors": number,
            "norm_mean": norm["mean"],
            "norm_std": norm["std"],
            **self.columns.extremes(),
            "zero_share": self._zeros / (number * len(self.columns.low)) if number else None,
            "zero_vectors": self._zero_vectors,
            "constant_columns": len(constant),
            "first_constant_columns": constant[:COLUMNS_SHOWN].tolist(),
            "non_finite": self.non_finite,
        }

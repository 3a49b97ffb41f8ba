"""What is counted of feature vectors and labels while they go by: numbers that take no more room with more examples."""

import hashlib
from typing import Any

import numpy as np

from conclugen_jax.data.manifest import Statistics
from conclugen_jax.data.sources import LabelSpec

COLUMNS_SHOWN = 8
"""Numbers of constant columns that are named, at most."""


class LabelTally:
    """Counts of one label.

    Attributes:
      known: number of examples that have it.
      counts: int64 [names], examples of each class, or with each label.
      wrong: number of examples whose label is out of range.
    """

    def __init__(self, spec: LabelSpec):
        self.spec, self.known, self.wrong = spec, 0, 0
        self.counts = np.zeros(len(spec.names), np.int64)
        self._statistics, self._low, self._high = Statistics(1), np.inf, -np.inf

    def add(self, values: np.ndarray, *, may_lack: bool) -> np.ndarray:
        """Take in labels.

        Args:
          values: [n], or [n, labels] for ``multi``.
          may_lack: -1 or NaN stands for unknown, as it does for further targets.

        Returns:
          Bool [n], those that are out of range, which are not counted.
        """
        kind, num = self.spec.kind, len(self.spec.names)
        if kind == "single":
            unknown, fits = values == -1, (values >= 0) & (values < num)
        elif kind == "value":
            unknown, fits = np.isnan(values), np.isfinite(values)
        else:
            unknown, fits = np.isnan(values).all(axis=1), np.isin(values, (0, 1)).all(axis=1)
        good = values[fits]
        self.known += len(good)
        if kind == "single":
            self.counts += np.bincount(good, minlength=num)
        elif kind == "multi":
            self.counts += good.sum(axis=0).astype(np.int64)
        elif len(good):
            _merge(self._statistics, good[:, None])
            self._low, self._high = min(self._low, float(good.min())), max(self._high, float(good.max()))
        wrong = ~fits & ~(unknown & may_lack)
        self.wrong += int(wrong.sum())
        return wrong

    def report(self) -> dict[str, Any]:
        """``known`` and ``counts``, or ``mean``, ``std``, ``min`` and ``max`` (None where no label is known)."""
        if self.spec.kind == "none":
            return {"known": 0}
        if self.spec.kind != "value":
            return {"known": self.known, "counts": self.counts.tolist()}
        return {"known": self.known, **_spread(self._statistics), **_extremes(self._low, self._high)}


class FeatureTally:
    """Numbers of one modality in one split, over the vectors of the examples that have it.

    Vectors with values that are not finite are left out of all but the number of those values. Where several variants
    are stored, each is a vector.

    Attributes:
      non_finite: number of values that are not finite.
    """

    def __init__(self, dim: int, *, columns: bool):
        """Nothing is counted yet; ``columns``: whether :meth:`statistics` is wanted."""
        self._dim, self._columns = dim, columns
        self.non_finite = self._vectors = self._zeros = self._zero_vectors = 0
        self._norms = Statistics(1)
        self._low, self._high = np.full(dim, np.inf, np.float32), np.full(dim, -np.inf, np.float32)
        self._parts: dict[str, Statistics] = {}
        self._hashes: list[np.ndarray] = []

    def add(self, x: np.ndarray, present: np.ndarray, *, part: str) -> None:
        """Take in vectors.

        Args:
          x: float32 [n, variants, dim].
          present: bool [n].
          part: the file they are from; statistics are taken file by file, as they were when it was written.
        """
        vectors = x[present].reshape(-1, self._dim)
        hashes = np.zeros(x.shape[:2], np.uint64)
        hashes[present] = np.array([_vector_hash(v) for v in vectors], np.uint64).reshape(-1, x.shape[1])
        finite = np.isfinite(vectors)
        if not finite.all():
            self.non_finite += int(finite.size - finite.sum())
            vectors = vectors[finite.all(axis=1)]
        zero = vectors == 0
        self._zeros += int(zero.sum())
        empty = zero.all(axis=1)
        self._zero_vectors += int(empty.sum())
        hashes[(x == 0).all(axis=2)] = 0
        self._hashes.append(hashes)
        self._vectors += len(vectors)
        if not len(vectors):
            return
        self._low = np.minimum(self._low, vectors.min(axis=0))
        self._high = np.maximum(self._high, vectors.max(axis=0))
        wide = vectors.astype(np.float64)
        _merge(self._norms, np.sqrt(np.einsum("ij,ij->i", wide, wide))[:, None])
        if self._columns:
            statistics = self._parts.setdefault(part, Statistics(self._dim))
            for vector in vectors:
                statistics.add(vector)

    def hashes(self) -> np.ndarray:
        """Uint64 [n, variants]: a hash of each vector's bytes, 0 where it is absent or zero throughout."""
        return np.concatenate(self._hashes) if self._hashes else np.zeros((0, 1), np.uint64)

    def statistics(self) -> dict[str, list[float]]:
        """``mean`` and ``std`` of each column, put together as the builder does."""
        total = Statistics(self._dim)
        for statistics in self._parts.values():
            total.merge(**statistics.state())
        return total.result()

    def report(self) -> dict[str, Any]:
        """All numbers; None for those that need a vector where there is none."""
        norm = _spread(self._norms)
        constant = np.flatnonzero(self._low == self._high) if self._vectors > 1 else np.zeros(0, np.int64)
        return {
            "vectors": self._vectors,
            "norm_mean": norm["mean"],
            "norm_std": norm["std"],
            **_extremes(float(self._low.min()), float(self._high.max())),
            "zero_share": self._zeros / (self._vectors * self._dim) if self._vectors else None,
            "zero_vectors": self._zero_vectors,
            "constant_columns": len(constant),
            "first_constant_columns": constant[:COLUMNS_SHOWN].tolist(),
            "non_finite": self.non_finite,
        }


def _vector_hash(vector: np.ndarray) -> int:
    """64 bits of a hash."""
    return int.from_bytes(hashlib.blake2b(vector.tobytes(), digest_size=8).digest(), "little")


def _merge(statistics: Statistics, x: np.ndarray) -> None:
    """Take in rows [n, dim], n > 0."""
    x = x.astype(np.float64)
    mean = x.mean(axis=0)
    statistics.merge(count=len(x), mean=mean, squares=np.square(x - mean).sum(axis=0))


def _spread(statistics: Statistics) -> dict[str, float | None]:
    if not statistics.count:
        return {"mean": None, "std": None}
    return {key: values[0] for key, values in statistics.result().items()}


def _extremes(low: float, high: float) -> dict[str, float | None]:
    return {"min": low, "max": high} if low <= high else {"min": None, "max": None}

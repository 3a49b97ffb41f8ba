"""Items of many clips through one backbone in full batches, and the mean vector of each clip."""

import dataclasses
from collections.abc import Hashable, Iterator

import numpy as np

from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract.backbones import Backbone, Items


@dataclasses.dataclass
class _Sum:
    left: int
    total: np.ndarray
    count: int


class Averages:
    """Runs a backbone; batches always have its batch size, so that a clip's vector does not depend on its neighbours."""

    def __init__(self, backbone: Backbone):
        self.backbone = backbone
        self._waiting: dict[tuple, list[tuple[Hashable, Items]]] = {}
        self._sums: dict[Hashable, _Sum] = {}

    def add(self, key: Hashable, items: Items) -> Iterator[tuple[Hashable, np.ndarray]]:
        """Take the items of a clip; yields (key, float32 [dim]) of each clip that is complete by now.

        Raises:
          ConclugenError: vectors of another size than the backbone says.
        """
        n = len(items[0])
        if not n or key in self._sums:
            raise ValueError(f"{key}: no items, or added twice")
        self._sums[key] = _Sum(n, np.zeros(self.backbone.dim, np.float64), n)
        shape = tuple((x.shape[1:], x.dtype.str) for x in items)
        rows = self._waiting.setdefault(shape, [])
        rows += [(key, tuple(x[i] for x in items)) for i in range(n)]
        while len(rows) >= self.backbone.batch_size:
            yield from self._run(rows)

    def flush(self) -> Iterator[tuple[Hashable, np.ndarray]]:
        """Run what is left, in batches filled up with copies."""
        for rows in self._waiting.values():
            while rows:
                yield from self._run(rows)

    def _run(self, waiting: list[tuple[Hashable, Items]]) -> Iterator[tuple[Hashable, np.ndarray]]:
        """Take a batch off the front."""
        rows = waiting[: self.backbone.batch_size]
        del waiting[: self.backbone.batch_size]
        filled = rows + [rows[-1]] * (self.backbone.batch_size - len(rows))
        arrays = [np.stack(columns) for columns in zip(*(items for _, items in filled), strict=True)]
        vectors = np.asarray(self.backbone.vectors(*arrays), np.float32)
        if vectors.shape != (len(filled), self.backbone.dim):
            raise ConclugenError(
                f"backbone {self.backbone.name}: vectors of shape {vectors.shape}, expected {(len(filled), self.backbone.dim)}"
            )
        for (key, _), vector in zip(rows, vectors, strict=False):
            known = self._sums[key]
            known.left -= 1
            known.total += vector
            if not known.left:
                del self._sums[key]
                yield key, (known.total / known.count).astype(np.float32)

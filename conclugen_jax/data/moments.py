"""Compute mean and deviation of feature columns in one pass."""

import dataclasses

import numpy as np


@dataclasses.dataclass
class Moments:
    """Running mean and deviation of columns, float64 (Chan, Golub and LeVeque, 1983).

    Attributes:
      count: number of rows.
      mean: [dim].
      squares: [dim], sums of squared differences from the mean.
    """

    count: int
    mean: np.ndarray
    squares: np.ndarray

    @classmethod
    def zero(cls, dim: int) -> "Moments":
        """Return those of no row."""
        return cls(0, np.zeros(dim), np.zeros(dim))

    @classmethod
    def of(cls, rows: np.ndarray) -> "Moments":
        """Return those of rows [n, dim], n > 0."""
        rows = np.array(rows, np.float64)
        mean = rows.mean(axis=0)
        rows -= mean
        return cls(len(rows), mean, np.square(rows, out=rows).sum(axis=0))

    def merge(self, other: "Moments") -> None:
        """Add the rows of another object."""
        if other.count:
            delta, total = other.mean - self.mean, self.count + other.count
            self.squares = self.squares + other.squares + np.square(delta) * (self.count * other.count / total)
            self.mean = self.mean + delta * (other.count / total)
            self.count = total

    def result(self) -> dict[str, list[float]]:
        """Return ``mean`` and ``std`` (population), each a list [dim]; zeros and ones if there was no row."""
        if not self.count:
            return {"mean": [0.0] * len(self.mean), "std": [1.0] * len(self.mean)}
        return {"mean": self.mean.tolist(), "std": np.sqrt(self.squares / self.count).tolist()}

"""Facts of a written part of a split, for the manifest; means and deviations in one pass."""

import dataclasses
import io
from pathlib import Path

import msgspec
import numpy as np


@dataclasses.dataclass
class Moments:
    """Running ``mean`` [dim] and ``squares`` [dim], the sums of squared differences from it, of ``count`` rows, in float64.

    Reference: Chan, Golub and LeVeque, 1983.
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
        deviation = np.sqrt(self.squares / self.count) if self.count else np.ones_like(self.mean)
        return {"mean": self.mean.tolist(), "std": deviation.tolist()}


@dataclasses.dataclass
class Part:
    """Facts of a written part.

    Attributes:
      rows: int64 [n], the source's row of each record.
      presence: bool [n, modalities].
      ids: uint64 [n], hashes of the ids.
      groups: uint64 [n], hashes of the groups, 0 where empty.
      label_counts: "" for the main label, and each further target -> int64 [names].
      statistics: modality -> running statistics, of the first split.
      bad: (row, id, reason) of each example that was dropped.
      converted: number of vectors that were not float32, by "modality dtype".
      replaced: number of values that the source's reader put 0 for, by modality.
      sha256: of the file, "" where there is none.
    """

    rows: np.ndarray
    presence: np.ndarray
    ids: np.ndarray
    groups: np.ndarray
    label_counts: dict[str, np.ndarray]
    statistics: dict[str, Moments]
    bad: list[tuple[int, str, str]]
    converted: dict[str, int]
    replaced: dict[str, int]
    sha256: str = ""

    def save(self, path: Path) -> None:
        """Write a file that :meth:`load` reads."""

        def npy(array: np.ndarray) -> bytes:
            np.save(file := io.BytesIO(), array, allow_pickle=False)
            return file.getvalue()

        path.write_bytes(msgspec.msgpack.encode(self, enc_hook=npy))

    @classmethod
    def load(cls, path: Path) -> "Part":
        """Read what :meth:`save` wrote."""

        def array(_type: type, npy: bytes) -> np.ndarray:
            return np.load(io.BytesIO(npy), allow_pickle=False)

        return msgspec.msgpack.decode(path.read_bytes(), type=cls, dec_hook=array)


Entries = list[tuple[Path, Part]]
"""File and facts of each part of a split, in order."""

Parts = dict[str, Entries]
"""By split."""

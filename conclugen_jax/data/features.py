"""Read the feature vectors of one modality from one file with ids: a matrix or a Parquet column."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conclugen_jax.data.files import NpyMatrix, as_text, npz_arrays, read_ids, read_npy
from conclugen_jax.data.index import Index, canonical
from conclugen_jax.data.parquet import parquet_column, parquet_kinds, parquet_vectors
from conclugen_jax.data.pooling import pool
from conclugen_jax.errors import ConclugenError

BLOCK_BYTES = 2**27
"""Bytes of vectors of a Parquet column that are kept, since rows may be asked for in another order than the file's."""


@dataclasses.dataclass(frozen=True)
class Npy:
    """A matrix ``NAME.npy``; its ids in ``NAME.txt`` or ``ids.txt``, lengths of padded steps in ``NAME_lengths.npy``."""

    path: Path

    @property
    def ids_path(self) -> Path:
        for candidate in (self.path.with_suffix(".txt"), self.path.parent / "ids.txt"):
            if candidate.is_file():
                return candidate
        raise ConclugenError(f"{self.path}: no ids; put one id a line in {self.path.stem}.txt beside it")

    @property
    def lengths_path(self) -> Path:
        return self.path.with_name(self.path.stem + "_lengths.npy")

    def files(self) -> list[Path]:
        return [self.path, *(path for path in (self.ids_path, self.lengths_path) if path.exists())]

    def ids(self) -> list[str]:
        return read_ids(self.ids_path)

    def arrays(self) -> tuple[NpyMatrix, np.ndarray | None]:
        """Return the matrix, whose rows are read when asked for, and the lengths."""
        return NpyMatrix(self.path), read_npy(self.lengths_path)


@dataclasses.dataclass(frozen=True)
class Npz:
    """A matrix ``KEY`` of an npz file; its ids in ``ids`` or ``id``, lengths of padded steps in ``KEY_lengths``."""

    path: Path
    key: str

    @property
    def ids_path(self) -> Path:
        return self.path

    def files(self) -> list[Path]:
        return [self.path]

    def ids(self) -> list[str]:
        arrays = npz_arrays(self.path, ("id", "ids"))
        ids = arrays.get("ids", arrays.get("id"))
        if ids is None or ids.ndim != 1 or ids.dtype.kind not in "USiu":
            raise self._without("ids", " of one id a row")
        return as_text(ids, f"{self.path}, ids")

    def arrays(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the matrix and the lengths, both read whole."""
        arrays = npz_arrays(self.path, (self.key, f"{self.key}_lengths"))
        if self.key not in arrays:
            raise self._without(self.key)
        return arrays[self.key], arrays.get(f"{self.key}_lengths")

    def _without(self, name: str, such: str = "") -> ConclugenError:
        return ConclugenError(f"{self.path}: no array {name!r}{such}; it has {', '.join(npz_arrays(self.path))}")


class MatrixFeatures:
    """One array [n, dim] or [n, time, dim] with n ids, in an npy or npz file."""

    def __init__(self, path: Path, *, how: str, key: str = ""):
        """Open a matrix.

        Args:
          path: of the npy or npz file.
          how: pooling over time.
          key: of the array in an npz file.

        Raises:
          ConclugenError: files that are missing, damaged or do not fit each other.
        """
        self.path, self.how = path, how
        self._stored = Npz(path, key) if path.suffix == ".npz" else Npy(path)
        self._opened: tuple[np.ndarray | NpyMatrix, np.ndarray | None] | None = None
        names, ids_path = self._stored.ids(), self._stored.ids_path
        array, _ = self._arrays()
        if len(names) != len(array):
            raise ConclugenError(f"{path}: {len(array)} rows but {len(names)} ids in {ids_path}")
        if not names:
            raise ConclugenError(f"{path}: no rows; leave the modality out")
        self._index = Index(names, str(ids_path))
        self.dim = array.shape[-1]

    def names(self) -> dict[str, list[str]]:
        """Return the ids, in the file's order, as of one split."""
        return {"": list(map(canonical, self._stored.ids()))}

    def files(self) -> Iterable[Path]:
        return self._stored.files()

    def locate(self, split: str, keys: Sequence[str]) -> Sequence[int | None]:
        """Return the row of each key: of ``SPLIT/KEY`` if there is one, else of ``KEY``."""
        return self._index.rows(split, keys)

    def read(self, place: int) -> np.ndarray:
        """Return the vector [dim] of a row.

        Raises:
          ConclugenError: a length outside the sequence, or a file that has become shorter.
        """
        array, lengths = self._arrays()
        length = None if lengths is None else int(lengths[place])
        return pool(np.array(array[place]), self.how, f"{self.path}, row {place}", length=length)

    def __getstate__(self) -> dict[str, Any]:
        """Drop the open arrays and the ids for another process, which does not call :meth:`locate`."""
        return {**self.__dict__, "_opened": None, "_index": None}

    def _arrays(self) -> tuple[np.ndarray | NpyMatrix, np.ndarray | None]:
        """Return the array, opened once in each process, and the lengths of its sequences."""
        if self._opened is not None:
            return self._opened
        array, lengths = self._stored.arrays()
        if len(array.shape) not in (2, 3) or array.dtype.kind not in "fiub" or 0 in array.shape[1:]:
            raise ConclugenError(
                f"{self.path}: {array.dtype} of shape {array.shape}, expected numbers of shape (n, dim) or (n, time, dim)"
            )
        if lengths is not None and (lengths.shape != array.shape[:1] or lengths.dtype.kind not in "iu"):
            raise ConclugenError(f"{self.path}: lengths of shape {lengths.shape}, expected {len(array)} integers")
        self._opened = array, lengths if len(array.shape) == 3 else None
        return self._opened


class ParquetFeatures:
    """A column of number lists in a Parquet file, beside a column ``id``."""

    def __init__(self, path: Path, *, how: str, column: str):
        """Open a column.

        Raises:
          ConclugenError: no Parquet file, or without such a column of lists of numbers.
        """
        self.path, self.column, self.how = path, column, how
        self._block: dict[int, np.ndarray | None] = {}
        kinds = parquet_kinds(path)
        if kinds.get(column, "vectors") != "vectors":
            raise ConclugenError(f"{path}: column {column!r} holds {kinds[column]}, expected lists of numbers")
        names = parquet_column(path, "id")
        self._index = Index(names, str(path))
        first = next((x for _, x in self._vectors(np.arange(len(names))) if x is not None), None)
        if first is None:
            raise ConclugenError(f"{path}: column {column!r} is empty in every row; leave the modality out")
        self.dim = len(first)

    def names(self) -> dict[str, list[str]]:
        """Return the ids, in the file's order, as of one split."""
        return {"": list(map(canonical, parquet_column(self.path, "id")))}

    def files(self) -> Iterable[Path]:
        """Return the path of the file."""
        return [self.path]

    def locate(self, split: str, keys: Sequence[str]) -> Sequence[tuple[int, np.ndarray] | None]:
        """Return the position of each key among the keys, and the rows of all of them (``SPLIT/KEY``, else ``KEY``)."""
        rows = self._index.rows(split, keys)
        every = np.array([-1 if row is None else row for row in rows], np.int64)
        return [None if row is None else (i, every) for i, row in enumerate(rows)]

    def read(self, place: tuple[int, np.ndarray]) -> np.ndarray | None:
        """Return the vector [dim] of a row, None where the column is null.

        The rows that will be asked for next are read with it, in the file's order.

        Raises:
          ConclugenError: a row of something else than numbers, or a damaged file.
        """
        position, rows = place
        row = int(rows[position])
        if row not in self._block:
            following = np.unique(rows[position : position + max(1, BLOCK_BYTES // (8 * self.dim))])
            self._block = dict(self._vectors(following))  # -1, of no row, is before the first
        return self._block[row]

    def __getstate__(self) -> dict[str, Any]:
        """Drop the vectors and the ids for another process, which does not call :meth:`locate`."""
        return {**self.__dict__, "_block": {}, "_index": None}

    def _vectors(self, rows: np.ndarray) -> Iterable[tuple[int, np.ndarray | None]]:
        for row, x in parquet_vectors(self.path, self.column, rows):
            yield row, None if x is None else pool(x, self.how, f"{self.path}, row {row}, column {self.column!r}")

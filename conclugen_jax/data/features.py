"""Feature vectors of one modality in one file with ids: a matrix or a Parquet column."""

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
"""Of vectors of a Parquet column that are kept, since rows may be asked for in another order than the file's."""


class MatrixFeatures:
    """One array [n, dim] or [n, time, dim] with n ids: ``NAME.npy`` and ``NAME.txt``, or an npz file.

    Rows of an npy file are read one by one; arrays of an npz file are read whole, by each process.
    """

    def __init__(self, path: Path, *, how: str, key: str | None = None, ids: Path | None = None):
        """Open a matrix.

        Args:
          path: of the npy or npz file.
          how: pooling over time.
          key: of the array in an npz file; beside it lie ``id`` or ``ids``, and ``KEY_lengths`` if steps are padded.
          ids: text file with an id a line; ``NAME.txt`` or ``ids.txt`` beside the npy file by default. Lengths of padded
            sequences lie beside it in ``NAME_lengths.npy``.

        Raises:
          ConclugenError: files that are missing, damaged or do not fit each other.
        """
        self.path, self.key, self.how = path, key, how
        self._arrays: tuple[np.ndarray | NpyMatrix, np.ndarray | None] | None = None
        self.ids_path = None if path.suffix == ".npz" else ids or self._find_ids()
        names = self._npz_ids() if self.ids_path is None else read_ids(self.ids_path)
        array, _ = self._open()
        if len(names) != len(array):
            raise ConclugenError(f"{path}: {len(array)} rows but {len(names)} ids in {self.ids_path or path}")
        if not names:
            raise ConclugenError(f"{path}: no rows; leave the modality out")
        self._index = Index(names, str(self.ids_path or path))
        self.dim = array.shape[-1]

    def names(self) -> dict[str, list[str]]:
        """The ids, in the file's order, as of one split."""
        return {"": [*map(canonical, self._npz_ids() if self.ids_path is None else read_ids(self.ids_path))]}

    def files(self) -> Iterable[Path]:
        """The matrix, its ids and its lengths."""
        beside = [] if self.path.suffix == ".npz" else [self.ids_path, self._lengths_path()]
        return [self.path, *(p for p in beside if p is not None and p.exists())]

    def locate(self, split: str, keys: Sequence[str]) -> Sequence[int | None]:
        """Row of each key: of ``SPLIT/KEY`` if there is one, else of ``KEY``."""
        return self._index.rows(split, keys)

    def read(self, place: int) -> np.ndarray:
        """The vector [dim] of a row.

        Raises:
          ConclugenError: a length outside the sequence, or a file that has become shorter.
        """
        array, lengths = self._open()
        length = None if lengths is None else int(lengths[place])
        return pool(np.array(array[place]), self.how, f"{self.path}, row {place}", length=length)

    def __getstate__(self) -> dict[str, Any]:
        """For another process: without the open arrays and the ids, which only :meth:`locate` needs."""
        return {**self.__dict__, "_arrays": None, "_index": None}

    def _find_ids(self) -> Path:
        for candidate in (self.path.with_suffix(".txt"), self.path.parent / "ids.txt"):
            if candidate.is_file():
                return candidate
        raise ConclugenError(
            f"{self.path}: no ids; put one id a line in {self.path.with_suffix('.txt').name} beside it"
        )

    def _lengths_path(self) -> Path:
        return self.path.with_name(self.path.stem + "_lengths.npy")

    def _npz_ids(self) -> list[str]:
        arrays = npz_arrays(self.path, ("id", "ids"))
        ids = arrays.get("ids", arrays.get("id"))
        if ids is None or ids.ndim != 1 or ids.dtype.kind not in "USiu":
            raise ConclugenError(
                f"{self.path}: no array 'ids' of one id a row; it has {', '.join(npz_arrays(self.path))}"
            )
        return as_text(ids, f"{self.path}, ids")

    def _open(self) -> tuple[np.ndarray | NpyMatrix, np.ndarray | None]:
        if self._arrays is None:
            if self.path.suffix == ".npz":
                arrays = npz_arrays(self.path, (self.key, f"{self.key}_lengths"))
                if self.key not in arrays:
                    raise ConclugenError(
                        f"{self.path}: no array {self.key!r}; it has {', '.join(npz_arrays(self.path))}"
                    )
                array, lengths = arrays[self.key], arrays.get(f"{self.key}_lengths")
            else:
                array, lengths = NpyMatrix(self.path), read_npy(self._lengths_path())
            if len(array.shape) not in (2, 3) or array.dtype.kind not in "fiub" or 0 in array.shape[1:]:
                raise ConclugenError(
                    f"{self.path}: {array.dtype} of shape {array.shape}, expected numbers of shape (n, dim) or (n, time, dim)"
                )
            if lengths is not None and (lengths.shape != array.shape[:1] or lengths.dtype.kind not in "iu"):
                raise ConclugenError(f"{self.path}: lengths of shape {lengths.shape}, expected {len(array)} integers")
            self._arrays = array, lengths if len(array.shape) == 3 else None
        return self._arrays


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
        """The ids, in the file's order, as of one split."""
        return {"": [*map(canonical, parquet_column(self.path, "id"))]}

    def files(self) -> Iterable[Path]:
        """The file."""
        return [self.path]

    def locate(self, split: str, keys: Sequence[str]) -> Sequence[tuple[int, np.ndarray] | None]:
        """Position of each key among the keys, and the rows of all of them: ``SPLIT/KEY`` if it is there, else ``KEY``."""
        rows = self._index.rows(split, keys)
        every = np.array([-1 if row is None else row for row in rows], np.int64)
        return [None if row is None else (i, every) for i, row in enumerate(rows)]

    def read(self, place: tuple[int, np.ndarray]) -> np.ndarray | None:
        """The vector [dim] of a row, None where the column is null there.

        The rows that will be asked for next are read along with it, in the file's order.

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
        """For another process: without the vectors kept and the ids, which only :meth:`locate` needs."""
        return {**self.__dict__, "_block": {}, "_index": None}

    def _vectors(self, rows: np.ndarray) -> Iterable[tuple[int, np.ndarray | None]]:
        for row, x in parquet_vectors(self.path, self.column, rows):
            yield row, None if x is None else pool(x, self.how, f"{self.path}, row {row}, column {self.column!r}")

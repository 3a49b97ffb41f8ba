"""Vectors of one modality: how they are named, pooled over time, and read from a matrix with ids."""

import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conclugen_jax.data.files import NpyMatrix, as_text, npz_arrays, read_ids, read_npy
from conclugen_jax.data.sources import SPLIT_NAMES, name_hash
from conclugen_jax.errors import ConclugenError

POOLS = ("mean", "max", "last")


def pool(x: Any, how: str, where: str, *, length: int | None = None) -> np.ndarray:
    """Reduce a sequence of frame-level or token-level features over time.

    Args:
      x: real numbers [dim], returned as they are, or [time, dim].
      how: ``mean``, ``max`` or ``last``, over the valid steps.
      where: names the features in messages, such as the file.
      length: number of valid steps, from the first; all where None.

    Returns:
      [dim] of the type of ``x``; a mean is taken in float64, and float64 it stays unless ``x`` is float32.

    Raises:
      ConclugenError: not numbers, another number of axes, no valid step, or a length outside 1..time.
    """
    x = np.asarray(x)
    if x.dtype.kind not in "fiub" or x.ndim not in (1, 2):
        raise ConclugenError(
            f"{where}: {x.dtype} of shape {x.shape}, expected real numbers of shape (dim,) or (time, dim)"
        )
    if x.ndim == 1:
        return x
    if not 1 <= (len(x) if length is None else length) <= len(x):
        raise ConclugenError(
            f"{where}: {length or 0} steps of a sequence of {len(x)}; correct that, or leave out what is absent"
        )
    x = x[:length]
    if how == "last":
        return x[-1]
    if how == "max":
        return x.max(axis=0)
    mean = x.mean(axis=0, dtype=np.float64)
    return mean.astype(np.float32) if x.dtype == np.float32 else mean


def canonical(name: str) -> str:
    """Return a name as names are compared: accents composed with their letters, a split in front by its own name."""
    name = unicodedata.normalize("NFC", name)
    split, slash, rest = name.partition("/")
    return f"{SPLIT_NAMES[split.lower()]}/{rest}" if slash and split.lower() in SPLIT_NAMES else name


class Index:
    """Rows by name, in 16 bytes a name: names are compared by 64 bits of their hash."""

    def __init__(self, names: Sequence[str], where: str):
        """Index the name of each row; ``where`` names the file in messages."""
        hashes = _hashes(names)
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]
        if not hashes.all():
            raise ConclugenError(f"{where}: the id of row {int(np.argmin(hashes != 0))} is empty; each row needs one")
        twice = np.flatnonzero(self._hashes[1:] == self._hashes[:-1])
        if twice.size:
            name = names[self._order[twice[0]]]
            raise ConclugenError(f"{where}: id {name!r} appears twice; each row needs an id of its own")

    def rows(self, split: str, keys: Sequence[str]) -> np.ndarray:
        """Return the row (int64 [n]) of the name ``SPLIT/KEY`` of each key if there is one, else of ``KEY``, else -1."""
        plain, within = self._find(keys), self._find([f"{split}/{key}" for key in keys])
        return np.where(within >= 0, within, plain)

    def _find(self, names: Sequence[str]) -> np.ndarray:
        hashes = _hashes(names)
        at = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        return np.where(self._hashes[at] == hashes, self._order[at], -1)


def _hashes(names: Sequence[str]) -> np.ndarray:
    return np.array([name_hash(canonical(name)) for name in names], np.uint64)


class MatrixFeatures:
    """One array [n, dim] or [n, time, dim] with n ids.

    ``NAME.npy`` has its ids in ``NAME.txt`` or ``ids.txt`` and lengths of padded steps in ``NAME_lengths.npy``; an array
    ``KEY`` of an npz file has them in the arrays ``ids`` or ``id`` and ``KEY_lengths``.
    """

    def __init__(self, path: Path, *, how: str, key: str = ""):
        """Open a matrix.

        Args:
          path: of the npy or npz file.
          how: pooling over time.
          key: of the array in an npz file.

        Raises:
          ConclugenError: files that are missing, damaged or do not fit each other.
        """
        self.path, self.how, self.key = path, how, key
        self._ids_path = self._lengths_path = path
        if not key:
            self._lengths_path = path.with_name(path.stem + "_lengths.npy")
            beside = [p for p in (path.with_suffix(".txt"), path.parent / "ids.txt") if p.is_file()]
            if not beside:
                raise ConclugenError(f"{path}: no ids; put one id a line in {path.stem}.txt beside it")
            self._ids_path = beside[0]
        self._opened: tuple[np.ndarray | NpyMatrix, np.ndarray | None] | None = None
        names, (array, _) = self._ids(), self._arrays()
        if len(names) != len(array):
            raise ConclugenError(f"{path}: {len(array)} rows but {len(names)} ids in {self._ids_path}")
        if not names:
            raise ConclugenError(f"{path}: no rows; leave the modality out")
        self._index = Index(names, str(self._ids_path))
        self.dim = array.shape[-1]

    def names(self) -> dict[str, list[str]]:
        """Return the ids, in the file's order, as of one split."""
        return {"": list(map(canonical, self._ids()))}

    def files(self) -> Iterable[Path]:
        lengths = [self._lengths_path] if self._lengths_path.exists() else []
        return dict.fromkeys([self.path, self._ids_path, *lengths])

    def locate(self, split: str, keys: Sequence[str]) -> Sequence[int | None]:
        """Return the row of each key: of ``SPLIT/KEY`` if there is one, else of ``KEY``."""
        return [None if row < 0 else row for row in self._index.rows(split, keys).tolist()]

    def read(self, place: int) -> np.ndarray:
        """Return the vector [dim] of a row."""
        array, lengths = self._arrays()
        length = None if lengths is None else int(lengths[place])
        return pool(np.array(array[place]), self.how, f"{self.path}, row {place}", length=length)

    def __getstate__(self) -> dict[str, Any]:
        """Drop the open arrays and the ids for another process, which does not call :meth:`locate`."""
        return {**self.__dict__, "_opened": None, "_index": None}

    def _ids(self) -> list[str]:
        if not self.key:
            return read_ids(self._ids_path)
        arrays = npz_arrays(self.path, ("id", "ids"))
        ids = arrays.get("ids", arrays.get("id"))
        if ids is None or ids.ndim != 1 or ids.dtype.kind not in "USiu":
            raise ConclugenError(
                f"{self.path}: no array 'ids' of one id a row; it has {', '.join(npz_arrays(self.path))}"
            )
        return as_text(ids, f"{self.path}, ids")

    def _arrays(self) -> tuple[np.ndarray | NpyMatrix, np.ndarray | None]:
        """Return the array, opened once in each process, and the lengths of its sequences."""
        if self._opened is not None:
            return self._opened
        if self.key:
            arrays = npz_arrays(self.path, (self.key, f"{self.key}_lengths"))
            if self.key not in arrays:
                raise ConclugenError(f"{self.path}: no array {self.key!r}; it has {', '.join(npz_arrays(self.path))}")
            array, lengths = arrays[self.key], arrays.get(f"{self.key}_lengths")
        else:
            array, lengths = NpyMatrix(self.path), read_npy(self._lengths_path)
        if len(array.shape) not in (2, 3) or array.dtype.kind not in "fiub" or 0 in array.shape[1:]:
            raise ConclugenError(
                f"{self.path}: {array.dtype} of shape {array.shape}, expected numbers of shape (n, dim) or (n, time, dim)"
            )
        if lengths is not None and (lengths.shape != array.shape[:1] or lengths.dtype.kind not in "iu"):
            raise ConclugenError(f"{self.path}: lengths of shape {lengths.shape}, expected {len(array)} integers")
        self._opened = array, lengths if len(array.shape) == 3 else None
        return self._opened

"""Feature vectors of one modality as files hold them: a file per clip, a matrix with ids, a Parquet column."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conclugen_jax.data.files import map_npy, npz_arrays, open_parquet, parquet_column, read_ids, read_npy
from conclugen_jax.data.pooling import pool
from conclugen_jax.data.sources import SPLIT_NAMES, Features, name_hash
from conclugen_jax.errors import ConclugenError


class Index:
    """Rows by name, in 16 bytes a name: names are told apart by 64 bits of their hash."""

    def __init__(self, names: Sequence[str], where: str):
        hashes = np.array([name_hash(name) for name in names], np.uint64)
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]
        twice = np.flatnonzero(self._hashes[1:] == self._hashes[:-1])
        if twice.size:
            name = names[self._order[twice[0]]]
            raise ConclugenError(f"{where}: id {name!r} is there twice; each row needs an id of its own")

    def rows(self, split: str, keys: Sequence[str]) -> list[int | None]:
        """Row of the name ``SPLIT/KEY`` if there is one, else of ``KEY``, else None."""
        plain, within = self._find(keys), self._find([f"{split}/{key}" for key in keys])
        return [None if row < 0 else int(row) for row in np.where(within >= 0, within, plain)]

    def _find(self, names: Sequence[str]) -> np.ndarray:
        hashes = np.array([name_hash(name) for name in names], np.uint64)
        at = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        return np.where(self._hashes[at] == hashes, self._order[at], -1)


class FolderFeatures:
    """One npy file per clip, ``FOLDER/KEY.npy`` or ``FOLDER/SPLIT/KEY.npy``: [dim] or [time, dim]."""

    def __init__(self, folder: Path, *, how: str):
        """Look which clips there are; ``how``: the pooling over time, none allowed if empty.

        Raises:
          ConclugenError: no folder, or no npy file in it.
        """
        self.folder, self.how = folder, how
        self.splits = _split_folders(folder)
        first = next((p for f in self.splits.values() for p in _npy_files(f)), None)
        if first is None:
            raise ConclugenError(f"{folder}: no .npy files, neither in it nor in folders named train, validation, test")
        self.dim = len(self.read(first))

    def names(self) -> dict[str, list[str]]:
        """split -> names of its files without ending, sorted; the split is "" where there are no split folders."""
        return {s: sorted(os.path.basename(p)[:-4] for p in _npy_files(f)) for s, f in self.splits.items()}

    def files(self) -> Iterable[str]:
        """All files, sorted."""
        return (path for f in self.splits.values() for path in sorted(_npy_files(f)))

    def locate(self, split: str, keys: Sequence[str]) -> Sequence[str | None]:
        """Paths; whether there is a file shows when it is read."""
        folder = self.splits.get(split, self.splits.get(""))
        if folder is None:
            return [None] * len(keys)
        for key in keys:
            if "/" in key or "\\" in key or "\0" in key or key in (".", ".."):
                raise ConclugenError(
                    f"{folder}: {key!r} is no name of a file; ids name files without folder and ending"
                )
        return [f"{folder}{os.sep}{key}.npy" for key in keys]

    def read(self, place: str | Path) -> np.ndarray | None:
        """The vector [dim] of a file, None if there is no such file."""
        x = read_npy(Path(place))
        if x is None:
            return None
        if not self.how and x.ndim != 1:
            raise ConclugenError(
                f"{place}: shape {x.shape}, expected one vector per clip; these are no pooled features"
            )
        return pool(x, self.how or "mean", str(place))


def _split_folders(folder: Path) -> dict[str, Path]:
    try:
        found = sorted(p for p in folder.iterdir() if p.name in SPLIT_NAMES and p.is_dir())
    except OSError as e:
        raise ConclugenError(f"{folder}: cannot be read ({e.strerror}); name a folder of .npy files") from e
    splits = {SPLIT_NAMES[p.name]: p for p in found}
    if len(splits) < len(found):
        raise ConclugenError(f"{folder}: two folders for the same split ({', '.join(p.name for p in found)})")
    return splits or {"": folder}


def _npy_files(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return [entry.path for entry in entries if entry.name.endswith(".npy")]


class MatrixFeatures:
    """One array [n, dim] or [n, time, dim] with n ids: ``NAME.npy`` and ``NAME.txt``, or an npz file.

    An npy file is memory-mapped; arrays of an npz file are read whole, by each process.
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
        self._arrays: tuple[np.ndarray, np.ndarray | None] | None = None
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
        return {"": self._npz_ids() if self.ids_path is None else read_ids(self.ids_path)}

    def files(self) -> Iterable[Path]:
        """The matrix, its ids and its lengths."""
        beside = [] if self.path.suffix == ".npz" else [self.ids_path, self._lengths_path()]
        return [self.path, *(p for p in beside if p is not None and p.exists())]

    def locate(self, split: str, keys: Sequence[str]) -> Sequence[int | None]:
        """Row of each key: of ``SPLIT/KEY`` if there is one, else of ``KEY``."""
        return self._index.rows(split, keys)

    def read(self, place: int) -> np.ndarray:
        """The vector [dim] of a row."""
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
        arrays = npz_arrays(self.path)
        ids = arrays.get("ids", arrays.get("id"))
        if ids is None or ids.ndim != 1 or ids.dtype.kind not in "USiu":
            raise ConclugenError(f"{self.path}: no array 'ids' of one id a row; it has {', '.join(arrays)}")
        return [str(x) for x in (np.char.decode(ids, "utf-8") if ids.dtype.kind == "S" else ids)]

    def _open(self) -> tuple[np.ndarray, np.ndarray | None]:
        if self._arrays is None:
            if self.path.suffix == ".npz":
                arrays = npz_arrays(self.path)
                if self.key not in arrays:
                    raise ConclugenError(f"{self.path}: no array {self.key!r}; it has {', '.join(arrays)}")
                array, lengths = arrays[self.key], arrays.get(f"{self.key}_lengths")
            else:
                array, lengths = map_npy(self.path), read_npy(self._lengths_path())
            if array.ndim not in (2, 3) or array.dtype.kind not in "fiub" or 0 in array.shape[1:]:
                raise ConclugenError(
                    f"{self.path}: {array.dtype} of shape {array.shape}, expected numbers of shape (n, dim) or (n, time, dim)"
                )
            if lengths is not None and (lengths.shape != array.shape[:1] or lengths.dtype.kind not in "iu"):
                raise ConclugenError(f"{self.path}: lengths of shape {lengths.shape}, expected {len(array)} integers")
            self._arrays = array, lengths if array.ndim == 3 else None
        return self._arrays


class ParquetFeatures:
    """A column of number lists in a Parquet file, beside a column ``id``."""

    def __init__(self, path: Path, *, how: str, column: str):
        """Open a column.

        Raises:
          ConclugenError: no Parquet file, or without such a column.
        """
        self.path, self.column, self.how = path, column, how
        self._file: Any = None
        self._group: tuple[int, Any] = (-1, None)
        names = self.names()[""]
        self._index = Index(names, str(path))
        first = next((x for x in (self.read(row) for row in range(len(names))) if x is not None), None)
        if first is None:
            raise ConclugenError(f"{path}: column {column!r} is empty in every row; leave the modality out")
        self.dim = len(first)

    def names(self) -> dict[str, list[str]]:
        """The ids, in the file's order, as of one split."""
        return {"": [str(name) for name in parquet_column(self.path, "id")]}

    def files(self) -> Iterable[Path]:
        """The file."""
        return [self.path]

    def locate(self, split: str, keys: Sequence[str]) -> Sequence[int | None]:
        """Row of each key: of ``SPLIT/KEY`` if there is one, else of ``KEY``."""
        return self._index.rows(split, keys)

    def read(self, place: int) -> np.ndarray | None:
        """The vector [dim] of a row, None where the column is null there."""
        values = self._value(place)
        if values is None:
            return None
        where = f"{self.path}, row {place}, column {self.column!r}"
        try:
            x = np.asarray(values)
        except ValueError as e:
            raise ConclugenError(f"{where}: lists of different lengths; expected (dim,) or (time, dim)") from e
        return pool(x, self.how, where)

    def __getstate__(self) -> dict[str, Any]:
        """For another process: without the open file and the ids, which only :meth:`locate` needs."""
        return {**self.__dict__, "_file": None, "_group": (-1, None), "_index": None}

    def _value(self, row: int) -> Any:
        """Rows are asked for in order, so that one row group is decoded at a time."""
        if self._file is None:
            self._file = open_parquet(self.path)
            sizes = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
            self._starts = np.concatenate([[0], np.cumsum(sizes)])
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        if self._group[0] != group:
            try:
                self._group = group, self._file.read_row_group(group, columns=[self.column]).column(self.column)
            except (OSError, KeyError, ValueError) as e:
                raise ConclugenError(f"{self.path}: column {self.column!r} cannot be read ({e})") from e
        value = self._group[1][row - int(self._starts[group])]
        return value.as_py()


class ConcatFeatures:
    """Several vectors of one clip as one, such as 2D and 3D frame features; absent where one of them is."""

    def __init__(self, pieces: Sequence[Features]):
        self.pieces, self.dim = pieces, sum(piece.dim for piece in pieces)

    def names(self) -> dict[str, list[str]]:
        """Those of the first piece."""
        return self.pieces[0].names()

    def files(self) -> Iterable[Path]:
        """Those of all pieces."""
        return (path for piece in self.pieces for path in piece.files())

    def locate(self, split: str, keys: Sequence[Any]) -> Sequence[tuple | None]:
        """One place in each piece."""
        places = zip(*(piece.locate(split, keys) for piece in self.pieces), strict=True)
        return [None if None in place else place for place in places]

    def read(self, place: tuple) -> np.ndarray | None:
        """The vectors one after the other [dim]."""
        vectors = [piece.read(part) for piece, part in zip(self.pieces, place, strict=True)]
        return None if any(x is None for x in vectors) else np.concatenate(vectors)


class VariantFeatures:
    """Several stored variants of each clip of the first split; of the other splits, variant 0."""

    def __init__(self, variants: Sequence[Features], *, first_split: str):
        self.variants, self.first_split, self.dim = variants, first_split, variants[0].dim

    def names(self) -> dict[str, list[str]]:
        """Those that any variant has."""
        names: dict[str, set[str]] = {}
        for variant in self.variants:
            for split, some in variant.names().items():
                names.setdefault(split, set()).update(some)
        return {split: sorted(some) for split, some in names.items()}

    def files(self) -> Iterable[Path]:
        """Those of all variants."""
        return (path for variant in self.variants for path in variant.files())

    def locate(self, split: str, keys: Sequence[Any]) -> Sequence[tuple | None]:
        """Places in every variant that counts for the split."""
        used = self.variants if split == self.first_split else self.variants[:1]
        places = zip(*(variant.locate(split, keys) for variant in used), strict=True)
        return [None if all(p is None for p in place) else place for place in places]

    def read(self, place: tuple) -> np.ndarray | None:
        """[variants, dim]; None if none is there.

        Raises:
          ConclugenError: some are there and some are not, or they differ in size.
        """
        vectors = [None if part is None else v.read(part) for v, part in zip(self.variants, place, strict=False)]
        if all(x is None for x in vectors):
            return None
        for part, x in zip(place, vectors, strict=True):
            if x is None or len(x) != self.dim:
                fault = "is missing" if x is None else f"has {len(x)} values"
                raise ConclugenError(f"{part}: this variant {fault}, another has {self.dim}; complete the variants")
        return np.stack(vectors)


class OfSplit:
    """Features whose files all lie in one split, whatever split their rows are put in."""

    def __init__(self, features: Features, split: str):
        self.features, self.split, self.dim = features, split, features.dim

    def names(self) -> dict[str, list[str]]:
        """Those of the features."""
        return self.features.names()

    def files(self) -> Iterable[Path]:
        """Those of the features."""
        return self.features.files()

    def locate(self, split: str, keys: Sequence[Any]) -> Sequence[Any]:
        """Places in the split where the files lie."""
        return self.features.locate(self.split, keys)

    def read(self, place: Any) -> np.ndarray | None:
        """The vector [dim] at a place."""
        return self.features.read(place)


def all_from(features: Features, split: str) -> Features:
    """Features that are looked for in one split, also for rows of others."""
    if isinstance(features, VariantFeatures):
        return VariantFeatures([OfSplit(v, split) for v in features.variants], first_split=features.first_split)
    return OfSplit(features, split)

"""Vectors of one modality: named, pooled over time, read from a matrix or from a file per clip, and combined."""

import itertools
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conclugen_jax.data import wide
from conclugen_jax.data.files import NpyMatrix, as_text, npz_arrays, read_ids, read_npy, readable, spelled
from conclugen_jax.data.sources import SPLIT_NAMES, Features, name_hash
from conclugen_jax.errors import ConclugenError

POOLS = ("mean", "max", "last")


def pool(x: Any, how: str, where: str, *, length: int | None = None) -> np.ndarray:
    """Reduce a sequence [time, dim] to [dim] by ``mean``, ``max`` or ``last`` of its first ``length`` steps.

    An array [dim] is returned unchanged. A mean is computed in float64 and returned as float64, unless ``x`` is float32.
    ``where`` names the features in messages.
    """
    x = np.asarray(x)
    if x.dtype.kind not in "fiub" or x.ndim not in (1, 2):
        found = f"{x.dtype} of shape {x.shape}"
        raise ConclugenError(f"{where}: {found}, expected real numbers of shape (dim,) or (time, dim)")
    if x.ndim == 1:
        return x
    if not 1 <= (len(x) if length is None else length) <= len(x):
        raise ConclugenError(
            f"{where}: {length or 0} steps of {len(x)}, expected 1 at least; remove the file if it is absent"
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


class RowFeatures:
    """The rows of a file, found by what ``ids`` returns; of the ids, 64 bits of their hash are kept."""

    def __init__(self, path: Path, how: str, ids_path: Path):
        self.path, self.how, self.ids_path = path, how, ids_path
        names = self.ids()
        if not names:
            raise ConclugenError(f"{ids_path}: no ids; each row needs one, or leave the modality out")
        hashes = _hashes(names)
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]
        if not hashes.all():
            raise ConclugenError(f"{ids_path}: the id of row {np.argmin(hashes != 0)} is empty; each row needs one")
        twice = np.flatnonzero(self._hashes[1:] == self._hashes[:-1])
        if twice.size:
            name = names[self._order[twice[0]]]
            raise ConclugenError(f"{ids_path}: id {name!r} appears twice; each row needs an id of its own")

    def names(self) -> dict[str, list[str]]:
        """Return the names of all rows, under no split."""
        return {"": list(map(canonical, self.ids()))}

    def files(self) -> Iterable[Path]:
        """Return the file."""
        return [self.path]

    def rows(self, split: str, keys: Sequence[str]) -> list[int]:
        """Return the row of the name ``SPLIT/KEY`` of each key if there is one, else of ``KEY``, else -1."""
        plain, within = self._find(keys), self._find([f"{split}/{key}" for key in keys])
        return np.where(within >= 0, within, plain).tolist()

    def _find(self, names: Sequence[str]) -> np.ndarray:
        hashes = _hashes(names)
        at = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        return np.where(self._hashes[at] == hashes, self._order[at], -1)

    def __getstate__(self) -> dict[str, Any]:
        """Drop the ids for another process, which does not call :meth:`rows`."""
        return {**self.__dict__, "_hashes": None, "_order": None}


def _hashes(names: Sequence[str]) -> np.ndarray:
    return np.array([name_hash(canonical(name)) for name in names], np.uint64)


class MatrixFeatures(RowFeatures):
    """One array [n, dim] or [n, time, dim] with n ids.

    ``NAME.npy`` has its ids in ``NAME.txt`` or ``ids.txt`` and lengths of padded steps in ``NAME_lengths.npy``; an array
    ``KEY`` of an npz file has them in the arrays ``ids`` or ``id`` and ``KEY_lengths``.
    """

    def __init__(self, path: Path, *, how: str, key: str = ""):
        self.key, self._opened, self._lengths_path = key, None, path.with_name(path.stem + "_lengths.npy")
        beside = [path] if key else [p for p in (path.with_suffix(".txt"), path.parent / "ids.txt") if p.is_file()]
        if not beside:
            raise ConclugenError(f"{path}: no ids; put one id a line in {path.stem}.txt beside it")
        super().__init__(path, how, beside[0])
        array, _ = self._arrays()
        if len(self._order) != len(array):
            raise ConclugenError(f"{path}: {len(array)} rows but {len(self._order)} ids in {self.ids_path}")
        self.dim = array.shape[-1]

    def ids(self) -> list[str]:
        """Return the id of each row, from the file of ids or the array ``ids`` of an npz file."""
        if not self.key:
            return read_ids(self.ids_path)
        arrays = npz_arrays(self.path, ("id", "ids"))
        ids = arrays.get("ids", arrays.get("id"))
        if ids is None or ids.ndim != 1 or ids.dtype.kind not in "USiu":
            raise ConclugenError(f"{self.path}: no array 'ids' of one id a row")
        return as_text(ids, f"{self.path}, ids")

    def files(self) -> Iterable[Path]:
        """Return the table and the files beside it."""
        return [self.path] if self.key else [p for p in (self.path, self.ids_path, self._lengths_path) if p.exists()]

    def locate(self, split: str, keys: Sequence[str]) -> Sequence[int | None]:
        """Return the row of each key; None for one that the table lacks."""
        return [None if row < 0 else row for row in self.rows(split, keys)]

    def read(self, place: int) -> np.ndarray:
        """Return the vector [dim] of a row."""
        array, lengths = self._arrays()
        length = None if lengths is None else int(lengths[place])
        return pool(np.array(array[place]), self.how, f"{self.path}, row {place}", length=length)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_opened": None}

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
            found = f"{array.dtype} of shape {array.shape}"
            raise ConclugenError(f"{self.path}: {found}, expected numbers of shape (n, dim) or (n, time, dim)")
        if lengths is not None and (lengths.shape != array.shape[:1] or lengths.dtype.kind not in "iu"):
            raise ConclugenError(f"{self.path}: lengths of shape {lengths.shape}, expected {len(array)} integers")
        self._opened = array, lengths if len(array.shape) == 3 else None
        return self._opened


class FolderFeatures:
    """One file per clip, ``FOLDER/KEY.npy`` or ``FOLDER/SPLIT/KEY.npy`` ([dim] or [time, dim]), or a table of its frames.

    Attributes:
      left_out: maps each reason to the number of frames of tables that this process skipped.
      notes: sentences on how the tables were read.
    """

    def __init__(self, folder: Path, *, how: str):
        """Look for the clips. ``how`` is the pooling over time; sequences are refused if it is empty."""
        self.how, self.left_out, self.notes, self._columns = how, Counter[str](), [], ()
        self.ending = next((e for e in (".npy", *wide.ENDINGS) if _holds(folder, e)), ".npy")
        self.splits = _split_folders(folder, self.ending)
        self._first, self.dim = next(iter(self.files()), None), 0
        if self._first is None:
            raise ConclugenError(f"{folder}: no .npy files, neither in it nor in folders named train, validation, test")
        if self.ending == ".npy":
            self.dim = len(self.read(self._first))
        else:
            frames = wide.read(Path(self._first))
            self.dim, self._columns = len(frames.names), frames.names
            self.notes = [wide.describe(frames, f"one {self.ending} file for each clip")]

    def names(self) -> dict[str, list[str]]:
        """Return split -> names of its files without ending, sorted; the split is "" where there are no split folders."""
        found = {split: _scan(folder, self.ending)[0] for split, folder in self.splits.items()}
        return {split: sorted(map(canonical, map(self._name, paths))) for split, paths in found.items()}

    def _name(self, path: str) -> str:
        return os.path.basename(path).removesuffix(self.ending)

    def files(self) -> Iterable[str]:
        """Return the files of all clips."""
        return (path for folder in self.splits.values() for path in sorted(_scan(folder, self.ending)[0]))

    def locate(self, split: str, keys: Sequence[str]) -> Sequence[str | None]:
        """Return paths; only :meth:`read` looks whether there is a file."""
        folder = self.splits.get(split, self.splits.get(""))
        if folder is None:
            return [None] * len(keys)
        odd = {} if all(map(str.isascii, keys)) else _other_spellings(folder, self.ending)
        paths = [_path(folder, key, self.ending) for key in keys]
        return [odd.get(canonical(key)) or path for key, path in zip(keys, paths, strict=True)]

    def read(self, place: str | Path) -> np.ndarray | None:
        """Return the vector [dim] of a file, None if there is no such file or it is a table none of whose rows counts."""
        x = read_npy(Path(place)) if self.ending == ".npy" else self._frames(Path(place))
        if x is None:
            return None
        if not self.how and x.ndim != 1:
            raise ConclugenError(f"{place}: shape {x.shape}, expected one vector per clip, pooled features")
        x = pool(x, self.how, str(place))
        if len(x) != (self.dim or len(x)):
            way_out = "extract both with the same network, or remove one"
            raise ConclugenError(f"{place}: {len(x)} values, but {self._first} has {self.dim}; {way_out}")
        return x

    def _frames(self, path: Path) -> np.ndarray | None:
        """Return the frames [time, dim] of a table that count, None if there are none."""
        if not os.path.lexists(path):
            return None
        frames = wide.read(path, features=self._columns)
        if frames.key.lower() in wide.KEYS and len(named := list(dict.fromkeys(frames.keys))) > 1:
            some = f"rows of {len(named)} clips, such as {named[0]!r} and {named[1]!r}"
            raise ConclugenError(f"{path}: {some}; name the file itself with --modality NAME={path}")
        x, reasons = wide.usable(frames, slice(None), framewise=True)
        self.left_out += reasons
        return x if len(x) else None


def _path(folder: Path, key: str, ending: str) -> str:
    """Return the path of a clip's file."""
    if "/" in key or "\\" in key or "\0" in key or key in (".", ".."):
        raise ConclugenError(f"{folder}: {key!r} is no name of a file; ids name files without folder and ending")
    return f"{folder}{os.sep}{key}{ending}"


def _other_spellings(folder: Path, ending: str) -> dict[str, str]:
    """Return id -> path of the files whose names are not ASCII; some systems write letters and their accents apart."""
    found: dict[str, str] = {}
    for path in sorted(path for path in _scan(folder, ending)[0] if not os.path.basename(path).isascii()):
        name = canonical(os.path.basename(path).removesuffix(ending))
        if (other := found.setdefault(name, path)) != path:
            raise ConclugenError(f"{path!a}: the same name as {other!a}, with accents composed otherwise; remove one")
    return found


def _holds(folder: Path, ending: str) -> bool:
    """Return whether files of an ending are in a folder, or in those of splits in it."""
    files, others = _scan(folder, ending)
    return bool(files or any(_scan(p, ending)[0] for p in others if p.name.lower() in SPLIT_NAMES and p.is_dir()))


def _split_folders(folder: Path, ending: str) -> dict[str, Path]:
    """Return split -> its folder; "" -> the folder itself if it has no folders of splits."""
    loose, others = _scan(folder, ending)
    found = [p for p in others if p.name.lower() in SPLIT_NAMES and p.is_dir()]
    splits = {SPLIT_NAMES[p.name.lower()]: p for p in found}
    if len(splits) < len(found):
        raise ConclugenError(f"{folder}: two folders for the same split ({', '.join(p.name for p in found)})")
    if found and loose:
        raise ConclugenError(f"{loose[0]}: is next to folders of splits; move it into one of them")
    for path in [p for p in others if p not in found] + [p for split in found for p in _scan(split, ending)[1]]:
        if path.suffix.lower() == ".npy":
            raise ConclugenError(f"{path}: files of features end in .npy, in lower case; rename it")
        if path.name in ("metadata.csv", "labels.csv"):
            raise ConclugenError(
                f"{path}: is ignored there; move it to the folder that --source names, or out and name it with --labels"
            )
        if holds_npy(path):
            way_out = "folders of splits are called train, validation and test and hold no further folders"
            raise ConclugenError(f"{path}: the .npy files below it would not be read; {way_out}")
    return splits or {"": folder}


def holds_npy(path: Path) -> bool:
    """Return whether there are npy files anywhere below a folder, except hidden files."""
    names = (name for _, _, names in os.walk(path) for name in names)
    return any(name.lower().endswith(".npy") and not name.startswith(".") for name in names)


def holds_tables(path: Path) -> bool:
    """Return whether a folder holds, in it or in folders of splits, tables of features, by the first of them."""
    if not path.is_dir():
        return False
    files = sorted(p for e in wide.ENDINGS for p in (*path.glob(f"*{e}"), *path.glob(f"*/*{e}")))
    tables = (p for p in files if not p.name.startswith(".") and p.name not in ("labels.csv", "metadata.csv"))
    return any(map(wide.holds_features, itertools.islice(tables, 1)))


def _scan(folder: Path, ending: str) -> tuple[list[str], list[Path]]:
    """Return the paths of the files of an ending in a folder, and what else is there, sorted; without hidden files."""
    with readable(folder, "name a folder of .npy files"), os.scandir(folder) as found:
        paths = [entry.path for entry in found if not entry.name.startswith(".")]
    own = {f"{folder}{os.sep}{name}" for name in ("labels.csv", "metadata.csv")}  # refused there
    files = [path for path in paths if path.endswith(ending) and path not in own]
    try:
        "".join(files).encode()
    except UnicodeEncodeError as e:
        name = next(ascii(os.path.basename(p)) for p in files if not p.isprintable())
        raise ConclugenError(f"{folder}: the name {name} of a file is not UTF-8; rename it") from e
    return files, sorted(map(Path, {*paths}.difference(files)))


class ListedFeatures:
    """npy files that a table lists: [dim] or [time, dim] each. Keys are rows of relative paths, one per modality."""

    def __init__(self, root: Path, column: int, paths: Sequence[str], *, how: str):
        """Take the column's place among the modalities and its paths, relative to ``root``."""
        self.root, self.column, self.how = root, column, how
        self._paths = sorted({path for path in paths if path})
        if not self._paths:
            raise ConclugenError(f"{root}: a column of metadata.csv lists no file; leave it out")
        self.dim = len(self.read(self._paths[0]))

    def names(self) -> dict[str, list[str]]:
        """Return no names: the table lists paths."""
        return {}

    def files(self) -> Iterable[str]:
        """Return the files that the table lists."""
        return (str(spelled(self.root / path)) for path in self._paths)

    def locate(self, split: str, keys: Sequence[tuple[str, ...]]) -> Sequence[str | None]:
        """Return relative paths; an empty cell is an absent modality."""
        return [key[self.column] or None for key in keys]

    def read(self, place: str) -> np.ndarray | None:
        """Return the vector [dim] of a file, which must exist since the table lists it."""
        x = read_npy(spelled(self.root / place))
        if x is None:
            raise ConclugenError(f"{self.root / place}: no such file, but metadata.csv lists it; leave its cell empty")
        return pool(x, self.how, str(self.root / place))

    def __getstate__(self) -> dict[str, Any]:
        """Drop the list of all files, which other processes do not need."""
        return {**self.__dict__, "_paths": []}


class Combined:
    """Vectors side by side, such as 2D and 3D frame features, in several stored variants.

    The first split has all variants, [variants, dim] where there are several; the others have variant 0.
    """

    def __init__(self, variants: Sequence[Sequence[Features]], *, first_split: str = "train", stored: str = ""):
        """Take variants of the pieces that stand side by side; ``stored`` is the one split whose files are all read."""
        self.variants, self.first_split, self.stored = variants, first_split, stored
        self.dim = sum(piece.dim for piece in variants[0])

    @property
    def left_out(self) -> Counter[str]:
        """Reason -> number of frames that this process dropped of the pieces."""
        pieces = (piece for pieces in self.variants for piece in pieces)
        return sum((getattr(piece, "left_out", Counter()) for piece in pieces), Counter[str]())

    def names(self) -> dict[str, list[str]]:
        """Return the names that any variant has."""
        names: dict[str, set[str]] = {}
        for first, *_ in self.variants:
            for split, some in first.names().items():
                names.setdefault(split, set()).update(some)
        return {split: sorted(some) for split, some in names.items()}

    def files(self) -> Iterable[Path]:
        """Return the files of all pieces of all variants."""
        return (path for pieces in self.variants for piece in pieces for path in piece.files())

    def locate(self, split: str, keys: Sequence[Any]) -> Sequence[tuple | None]:
        """Return how many variants the split uses, and the places in each variant, None where a piece is absent."""
        count, where = len(self.variants) if split == self.first_split else 1, self.stored or split
        found = [zip(*(piece.locate(where, keys) for piece in pieces), strict=True) for pieces in self.variants]
        places = [tuple(None if None in place else place for place in of_key) for of_key in zip(*found, strict=True)]
        return [(count, place) if any(place) else None for place in places]

    def read(self, place: tuple) -> np.ndarray | None:
        """Return the vectors, None if no variant exists; a part of the variants is refused."""
        count, parts = place

        def side_by_side(pieces: Sequence[Features], places: tuple | None) -> np.ndarray | None:
            vectors = [None] if places is None else [p.read(place) for p, place in zip(pieces, places, strict=True)]
            return None if any(x is None for x in vectors) else np.concatenate(vectors)

        stored = map(side_by_side, self.variants, parts)
        vectors = list(itertools.islice(stored, count))
        if len(self.variants) == 1 or (all(x is None for x in vectors) and all(x is None for x in stored)):
            return vectors[0]
        for part, x in zip(parts, vectors, strict=False):
            if x is None or len(x) != self.dim:
                where, fault = part and part[0], "is missing" if x is None else f"has {len(x)} values"
                raise ConclugenError(f"{where}: this variant {fault}, another has {self.dim}; complete the variants")
        return np.stack(vectors)

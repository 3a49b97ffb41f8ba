"""Read the feature vectors of one modality from a folder with a file per clip."""

import os
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from conclugen_jax.data.files import read_npy
from conclugen_jax.data.index import canonical
from conclugen_jax.data.pooling import pool
from conclugen_jax.data.sources import SPLIT_NAMES
from conclugen_jax.errors import ConclugenError


class FolderFeatures:
    """One npy file per clip, ``FOLDER/KEY.npy`` or ``FOLDER/SPLIT/KEY.npy``: [dim] or [time, dim]."""

    def __init__(self, folder: Path, *, how: str):
        """Look for the clips. ``how`` is the pooling over time; sequences are refused if it is empty.

        Raises:
          ConclugenError: no folder, no npy file in it, or files where none are looked for.
        """
        self.folder, self.how = folder, how
        self.splits = _split_folders(folder)
        first = next((p for f in self.splits.values() for p in _npy_files(f)), None)
        if first is None:
            raise ConclugenError(f"{folder}: no .npy files, neither in it nor in folders named train, validation, test")
        self.dim = len(self.read(first))

    def names(self) -> dict[str, list[str]]:
        """Return split -> names of its files without ending, sorted; the split is "" where there are no split folders."""
        return {s: sorted(canonical(os.path.basename(p)[:-4]) for p in _npy_files(f)) for s, f in self.splits.items()}

    def files(self) -> Iterable[str]:
        """Return the paths of all files, sorted."""
        return (path for f in self.splits.values() for path in sorted(_npy_files(f)))

    def locate(self, split: str, keys: Sequence[str]) -> Sequence[str | None]:
        """Return paths; only :meth:`read` looks whether there is a file.

        Raises:
          ConclugenError: a key that is no name of a file.
        """
        folder = self.splits.get(split, self.splits.get(""))
        if folder is None:
            return [None] * len(keys)
        for key in keys:
            if "/" in key or "\\" in key or "\0" in key or key in (".", ".."):
                raise ConclugenError(
                    f"{folder}: {key!r} is no name of a file; ids name files without folder and ending"
                )
        return [_path(folder, key) for key in keys]

    def read(self, place: str | Path) -> np.ndarray | None:
        """Return the vector [dim] of a file, None if there is no such file.

        Raises:
          ConclugenError: a damaged file, or one of something else than numbers.
        """
        x = read_npy(Path(place))
        if x is None:
            return None
        if not self.how and x.ndim != 1:
            raise ConclugenError(
                f"{place}: shape {x.shape}, expected one vector per clip; these are no pooled features"
            )
        return pool(x, self.how or "mean", str(place))


def _path(folder: Path, key: str) -> str:
    """Return the path of a clip's file; some systems write the letters of a name and their accents apart."""
    path = f"{folder}{os.sep}{key}.npy"
    if key.isascii() or os.path.lexists(path):
        return path
    forms = (f"{folder}{os.sep}{unicodedata.normalize(form, key)}.npy" for form in ("NFC", "NFD"))
    return next(filter(os.path.lexists, forms), path)


def _split_folders(folder: Path) -> dict[str, Path]:
    """Return split -> its folder; "" -> the folder itself if it has no folders of splits."""
    others = _others(folder)
    found = [p for p in others if p.name.lower() in SPLIT_NAMES and os.path.isdir(p)]
    splits = {SPLIT_NAMES[p.name.lower()]: p for p in found}
    if len(splits) < len(found):
        raise ConclugenError(f"{folder}: two folders for the same split ({', '.join(p.name for p in found)})")
    if found and (loose := _npy_files(folder)):
        raise ConclugenError(f"{loose[0]}: is next to folders of splits; move it into one of them")
    for path in [p for p in others if p not in found] + [p for split in found for p in _others(split)]:
        _refuse_misplaced(path)
    return splits or {"": folder}


def _others(folder: Path) -> list[Path]:
    """Return what lies in a folder beside its npy files, sorted, without hidden files."""
    try:
        with os.scandir(folder) as found:
            names = sorted(e.name for e in found if not e.name.endswith(".npy") and not e.name.startswith("."))
    except OSError as e:
        raise ConclugenError(f"{folder}: cannot be read ({e.strerror}); name a folder of .npy files") from e
    return [folder / name for name in names]


def _refuse_misplaced(path: Path) -> None:
    """Refuse what looks like features or labels but would be ignored."""
    if path.suffix.lower() == ".npy":
        raise ConclugenError(f"{path}: files of features end in .npy, in lower case; rename it")
    if path.name in ("metadata.csv", "labels.csv"):
        raise ConclugenError(f"{path}: is ignored there; move it to the folder that --source names")
    if holds_npy(path):
        raise ConclugenError(
            f"{path}: the .npy files below it would not be read; folders of splits are called train, validation and test, "
            "and files lie in them without further folders"
        )


def holds_npy(path: Path) -> bool:
    """Return whether npy files lie somewhere below a folder, hidden files aside."""
    if not os.path.isdir(path):
        return False
    names = (name for _, _, names in os.walk(path) for name in names)
    return any(name.lower().endswith(".npy") and not name.startswith(".") for name in names)


def _npy_files(folder: Path) -> list[str]:
    """Return the paths of the npy files in a folder, without hidden files.

    Raises:
      ConclugenError: a name that is not UTF-8.
    """
    with os.scandir(folder) as found:
        paths = [entry.path for entry in found if entry.name.endswith(".npy") and not entry.name.startswith(".")]
    try:
        "".join(paths).encode()
    except UnicodeEncodeError as e:
        name = next(ascii(os.path.basename(p)) for p in paths if not p.isprintable())
        raise ConclugenError(f"{folder}: the name {name} of a file is not UTF-8; rename it") from e
    return paths

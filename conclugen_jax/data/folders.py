"""Read the feature vectors of one modality from a folder with a file per clip."""

import os
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from conclugen_jax.data.features import canonical, pool
from conclugen_jax.data.files import read_npy, readable
from conclugen_jax.data.sources import SPLIT_NAMES
from conclugen_jax.errors import ConclugenError


class FolderFeatures:
    """One npy file per clip, ``FOLDER/KEY.npy`` or ``FOLDER/SPLIT/KEY.npy``: [dim] or [time, dim]."""

    def __init__(self, folder: Path, *, how: str):
        """Look for the clips. ``how`` is the pooling over time; sequences are refused if it is empty."""
        self.how, self.splits = how, _split_folders(folder)
        first = next((path for inside in self.splits.values() for path in _scan(inside)[0]), None)
        if first is None:
            raise ConclugenError(f"{folder}: no .npy files, neither in it nor in folders named train, validation, test")
        self.dim = len(self.read(first))

    def names(self) -> dict[str, list[str]]:
        """Return split -> names of its files without ending, sorted; the split is "" where there are no split folders."""
        return {s: sorted(canonical(os.path.basename(p)[:-4]) for p in _scan(f)[0]) for s, f in self.splits.items()}

    def files(self) -> Iterable[str]:
        """Return the paths of all files, sorted."""
        return (path for folder in self.splits.values() for path in sorted(_scan(folder)[0]))

    def locate(self, split: str, keys: Sequence[str]) -> Sequence[str | None]:
        """Return paths; only :meth:`read` looks whether there is a file."""
        folder = self.splits.get(split, self.splits.get(""))
        return [None if folder is None else _path(folder, key) for key in keys]

    def read(self, place: str | Path) -> np.ndarray | None:
        """Return the vector [dim] of a file, None if there is no such file."""
        x = read_npy(Path(place))
        if x is None:
            return None
        if not self.how and x.ndim != 1:
            raise ConclugenError(f"{place}: shape {x.shape}, expected one vector per clip, pooled features")
        return pool(x, self.how, str(place))


def _path(folder: Path, key: str) -> str:
    """Return the path of a clip's file; some systems write the letters of a name and their accents apart."""
    if "/" in key or "\\" in key or "\0" in key or key in (".", ".."):
        raise ConclugenError(f"{folder}: {key!r} is no name of a file; ids name files without folder and ending")
    path = f"{folder}{os.sep}{key}.npy"
    if key.isascii() or os.path.lexists(path):
        return path
    forms = (f"{folder}{os.sep}{unicodedata.normalize(form, key)}.npy" for form in ("NFC", "NFD"))
    return next(filter(os.path.lexists, forms), path)


def _split_folders(folder: Path) -> dict[str, Path]:
    """Return split -> its folder; "" -> the folder itself if it has no folders of splits."""
    loose, others = _scan(folder)
    found = [p for p in others if p.name.lower() in SPLIT_NAMES and p.is_dir()]
    splits = {SPLIT_NAMES[p.name.lower()]: p for p in found}
    if len(splits) < len(found):
        raise ConclugenError(f"{folder}: two folders for the same split ({', '.join(p.name for p in found)})")
    if found and loose:
        raise ConclugenError(f"{loose[0]}: is next to folders of splits; move it into one of them")
    for path in [p for p in others if p not in found] + [p for split in found for p in _scan(split)[1]]:
        if path.suffix.lower() == ".npy":
            raise ConclugenError(f"{path}: files of features end in .npy, in lower case; rename it")
        if path.name in ("metadata.csv", "labels.csv"):
            raise ConclugenError(f"{path}: is ignored there; move it to the folder that --source names")
        if holds_npy(path):
            way_out = "folders of splits are called train, validation and test and hold no further folders"
            raise ConclugenError(f"{path}: the .npy files below it would not be read; {way_out}")
    return splits or {"": folder}


def holds_npy(path: Path) -> bool:
    """Return whether npy files lie somewhere below a folder, hidden files aside."""
    names = (name for _, _, names in os.walk(path) for name in names)
    return any(name.lower().endswith(".npy") and not name.startswith(".") for name in names)


def _scan(folder: Path) -> tuple[list[str], list[Path]]:
    """Return the paths of the npy files in a folder, and what else lies there, sorted; without hidden files."""
    with readable(folder, "name a folder of .npy files"), os.scandir(folder) as found:
        paths = [entry.path for entry in found if not entry.name.startswith(".")]
    files = [path for path in paths if path.endswith(".npy")]
    try:
        "".join(files).encode()
    except UnicodeEncodeError as e:
        name = next(ascii(os.path.basename(p)) for p in files if not p.isprintable())
        raise ConclugenError(f"{folder}: the name {name} of a file is not UTF-8; rename it") from e
    return files, sorted(Path(path) for path in paths if not path.endswith(".npy"))

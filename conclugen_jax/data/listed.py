"""Feature files that a ``metadata.csv`` lists, beside their labels."""

import dataclasses
import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from conclugen_jax.data.cells import Table, read_csv, stack
from conclugen_jax.data.features import pool
from conclugen_jax.data.files import entries, read_npy
from conclugen_jax.data.requests import Found, Request
from conclugen_jax.data.sources import SPLIT_NAMES
from conclugen_jax.errors import ConclugenError


def open_metadata(request: Request) -> Found:
    """Open ``metadata.csv`` beside the files it lists, in the source or in a folder for each split.

    Columns: ``MODALITY_file_name`` for each modality, or ``file_name`` for one called ``features``; ``id`` (else the
    file's name without ending); labels, ``group`` and ``split`` as in every table.
    """
    source = request.source
    folders = [p for p in (source, *entries(source)) if (p / "metadata.csv").is_file()]
    unknown = [p.name for p in folders if p != source and p.name.lower() not in SPLIT_NAMES]
    if not folders or unknown or (source in folders and len(folders) > 1):
        raise ConclugenError(
            f"{source}: expected one metadata.csv in it, or one in each folder train, validation, test"
            + (f"; {unknown[0]} is none of these" if unknown else "")
        )
    if (source / "labels.csv").is_file():
        raise ConclugenError(
            f"{source / 'labels.csv'}: is next to metadata.csv, which holds the labels of this format; move it away, or name "
            "--format=table"
        )
    tables = [read_csv(folder / "metadata.csv") for folder in folders]
    columns = _file_columns(tables[0])
    for table in tables:
        table.require(*columns.values(), why=", which another split has")
    table = stack([_listing(t, columns, "" if p == source else p.name) for p, t in zip(folders, tables, strict=True)])
    openers = {
        m: functools.partial(ListedFeatures, source, i, [key[i] for key in table.keys], how=request.pool)
        for i, m in enumerate(columns)
    }
    return Found(request.opened(openers), table=table, label_files=[t.path for t in tables])


def _file_columns(table: Table) -> dict[str, str]:
    """Return modality -> the column that lists its files."""
    listing = [name for name in table.columns if name == "file_name" or name.endswith("_file_name")]
    columns = {"features" if name == "file_name" else name.removesuffix("_file_name"): name for name in listing}
    if not columns or len(columns) < len(listing):
        raise ConclugenError(
            f"{table.path}: expected a column MODALITY_file_name for each modality, or file_name alone; file_name and "
            "features_file_name are the same modality"
        )
    return columns


def _listing(table: Table, columns: Mapping[str, str], folder: str) -> Table:
    """Return a table whose keys are paths relative to the source, with the columns ``id`` and ``split`` filled in."""
    keys, ids, splits = [], [], []
    for where, row in table:
        paths = tuple(_inside(where, row[column].strip(), folder) for column in columns.values())
        first = next(filter(None, paths), None)
        if first is None:
            raise ConclugenError(f"{where}: no file in any of the columns {', '.join(columns.values())}; drop the row")
        split = row.get("split", folder or "train").strip() or folder
        if folder and SPLIT_NAMES.get(split.lower()) != SPLIT_NAMES[folder.lower()]:
            raise ConclugenError(
                f"{where}: split {split!r} in the folder {folder!r}; correct the cell, or drop the column"
            )
        keys.append(paths)
        ids.append(row.get("id") or PurePosixPath(first).stem)
        splits.append(split)
    return dataclasses.replace(table.having(id=ids, split=splits), keys=keys)


def _inside(where: str, text: str, folder: str) -> str:
    """Return a path relative to the source, "" for an empty cell."""
    path = PurePosixPath(folder, text)
    if path.is_absolute() or ".." in path.parts or "\\" in text or "\0" in text:
        raise ConclugenError(f"{where}: file name {text!r} leads out of the folder; list files below it, without '..'")
    return str(path) if text else ""


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
        """Return nothing: the table lists paths, not names."""
        return {}

    def files(self) -> Iterable[str]:
        """Return the paths of all files."""
        return (f"{self.root}{os.sep}{path}" for path in self._paths)

    def locate(self, split: str, keys: Sequence[tuple[str, ...]]) -> Sequence[str | None]:
        """Return relative paths; an empty cell is an absent modality."""
        return [key[self.column] or None for key in keys]

    def read(self, place: str) -> np.ndarray | None:
        """Return the vector [dim] of a file, which must exist since the table lists it."""
        x = read_npy(self.root / place)
        if x is None:
            raise ConclugenError(f"{self.root / place}: no such file, but metadata.csv lists it; leave its cell empty")
        return pool(x, self.how, str(self.root / place))

    def __getstate__(self) -> dict[str, Any]:
        """Drop the list of all files, which other processes do not need."""
        return {**self.__dict__, "_paths": []}

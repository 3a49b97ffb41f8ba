"""Tables of features with ids, as arrays, folders, Parquet or listed in a metadata.csv, and their labels."""

import dataclasses
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from conclugen_jax.data import annotations as annotations_lib
from conclugen_jax.data import csd
from conclugen_jax.data.annotations import Columns
from conclugen_jax.data.cells import CsvTable, column_name
from conclugen_jax.data.corpora import dropped
from conclugen_jax.data.features import FolderFeatures, MatrixFeatures, ParquetFeatures
from conclugen_jax.data.files import npz_arrays, open_parquet, parquet_column, read_npy
from conclugen_jax.data.pooling import pool
from conclugen_jax.data.requests import Found, Request, from_names, is_feature_folder, open_features, union
from conclugen_jax.data.sources import SPLIT_NAMES, Features, LabelSpec
from conclugen_jax.errors import ConclugenError


def open_table(request: Request) -> Found:
    """``MODALITY.npy`` with ``MODALITY.txt``, or a folder ``MODALITY`` of npy files, for each modality; ``labels.csv``."""
    features: dict[str, Features] = {}
    for path in sorted(request.source.iterdir()) if request.source else []:
        if path.suffix == ".npy" and not path.stem.endswith("_lengths"):
            features[path.stem] = MatrixFeatures(path, how=request.pool)
        elif is_feature_folder(path):
            features[path.name] = FolderFeatures(path, how=request.pool)
    return Found(features)


def open_npz(request: Request) -> Found:
    """One npz file: arrays ``ids``, one [n, dim] or [n, time, dim] per modality, and columns such as ``label`` [n]."""
    arrays = npz_arrays(request.source)
    if arrays.get("label", np.zeros(0)).ndim != 1:
        raise ConclugenError(
            f"{request.source}: label of shape {arrays['label'].shape}, expected one value a row; write several labels as one "
            "array of 0 and 1 each and name them with --label"
        )
    columns = {column_name(k): a for k, a in arrays.items() if a.ndim == 1 and not k.endswith("_lengths")}
    features = {
        k: MatrixFeatures(request.source, how=request.pool, key=k)
        for k, a in arrays.items()
        if a.ndim in (2, 3) and a.dtype.kind in "fiub" and k not in request.layout.label
    }
    if "ids" in columns:
        columns["id"] = columns.pop("ids")
    return _from_rows(request, features, ColumnRows(request.source, columns), [request.source])


def open_parquet_table(request: Request) -> Found:
    """A Parquet file: a column ``id``, a column of number lists per modality, columns such as ``split`` and ``label``."""
    source = request.source
    if source.is_dir():
        files = sorted(source.glob("*.parquet"))
        if len(files) != 1:
            raise ConclugenError(f"{source}: {len(files)} Parquet files; name one file that holds all rows")
        (source,) = files
    import pyarrow.types

    schema = open_parquet(source).schema_arrow
    lists = [f.name for f in schema if pyarrow.types.is_nested(f.type)]
    if "label" in lists:
        raise ConclugenError(
            f"{source}: column 'label' of lists; write several labels as a column of 0 and 1 each, --label=A,B"
        )
    columns = {column_name(f.name): parquet_column(source, f.name) for f in schema if f.name not in lists}
    features = {name: ParquetFeatures(source, how=request.pool, column=name) for name in lists}
    return _from_rows(request, features, ColumnRows(source, columns), [source])


class ColumnRows:
    """Rows of a table that is there by column: (where, columns as text), made one at a time."""

    def __init__(self, path: Path, columns: Mapping[str, Any]):
        """Take columns of one length, among them ``id``.

        Raises:
          ConclugenError: there is no such column, or no row, or columns differ in length.
        """
        if not len(columns.get("id", ())):
            raise ConclugenError(f"{path}: no column 'id', or no rows; each row needs an id")
        self.path, self.columns, self.num_rows = path, columns, len(columns["id"])
        for name, column in columns.items():
            if len(column) != self.num_rows:
                raise ConclugenError(f"{path}: {len(column)} values of {name!r} for {self.num_rows} ids; mend the file")

    def __iter__(self) -> Iterator[tuple[str, dict[str, str]]]:
        """The rows, in order."""
        for i in range(self.num_rows):
            yield f"{self.path}, row {i}", {name: _text(column[i]) for name, column in self.columns.items()}


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    return "" if value is None else str(value)


def _from_rows(request: Request, features: Mapping[str, Features], rows: ColumnRows, files: Sequence[Path]) -> Found:
    """Annotations that stand in the file of the features itself."""
    if request.labels:
        return Found(features)
    corpus = request.corpus
    if corpus is not None and corpus.named is not None and "split" not in rows.columns:
        return Found(features)
    return _read_rows(request, Found(features), rows, files)


def annotate(request: Request, found: Found) -> Found:
    """Annotations from ``labels.csv``, from files that the user named, or from the utterances' names."""
    corpus = request.corpus
    files = list(request.labels)
    if not files and request.source is not None and request.source.is_dir():
        beside = sorted(p for p in request.source.iterdir() if p.suffix.lower() == ".csv" and p.is_file())
        files = [p for p in beside if p.name.lower() == "labels.csv"] or (beside if corpus is not None else [])
    if files:
        tables = [CsvTable(path) for path in files]
        if request.dataset in csd.LABEL_COLUMNS and "start_time" in tables[0].names:
            columns, _ = csd.read_label_csv(files, request.dataset, drop=dropped(corpus, ""))
            by_id = {split: dataclasses.replace(a, keys=a.ids) for split, a in columns.items()}
            return dataclasses.replace(found, columns=by_id, label_files=files)
        return _read_rows(request, found, _Chain(tables), files)
    features = found.features or {m: open_features(p, request.pool) for m, p in request.modalities.items()}
    if corpus is not None:
        return dataclasses.replace(found, columns=from_names(request, features))
    columns = Columns(LabelSpec("none"), {})
    for split, names in union(features).items():
        for name in names:
            columns.add(split or "train", name)
    return dataclasses.replace(found, columns=columns.result(), label=LabelSpec("none"))


class _Chain:
    """The rows of several csv files; where they say nothing of splits, the files' names do."""

    def __init__(self, tables: Sequence[CsvTable]):
        _refuse_fewer_columns(tables)
        self._splits = {table: self._split(table) for table in tables}

    @staticmethod
    def _split(table: CsvTable) -> str | None:
        words = re.split(r"[^a-z]+", table.path.stem.lower())
        splits = {SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES}
        if "split" in map(str.lower, table.names) or not splits:
            return None
        if len(splits) > 1:
            raise ConclugenError(
                f"{table.path}: its name says {' and '.join(sorted(splits))}; add a column 'split' that says it of each row"
            )
        return splits.pop()

    def __iter__(self):
        for table, split in self._splits.items():
            for where, row in table:
                yield where, row if split is None else {**row, "split": split}


def _refuse_fewer_columns(tables: Sequence[CsvTable]) -> None:
    """Rows of all tables are read by the columns of the first."""
    first, *others = tables
    for table in others:
        missing = next((name for name in first.names if name not in table.names), None)
        if missing:
            raise ConclugenError(
                f"{table.path}: no column {missing!r}, which {first.path} has; it has {', '.join(table.names)}"
            )


def _read_rows(request: Request, found: Found, rows: Iterable, files: Sequence[Path]) -> Found:
    corpus, where = request.corpus, os.fspath(files[0])
    if corpus is not None:
        columns = annotations_lib.corpus_table(corpus, rows, where=where)
        return dataclasses.replace(found, columns=columns.result(), label_files=files)
    layout = request.layout
    names = next(iter(rows), ("", {}))[1]
    if not layout.label and "label" in names:
        layout = dataclasses.replace(layout, label=("label",))
    columns = annotations_lib.from_table(rows, layout, where=where)
    return dataclasses.replace(
        found,
        columns=columns.result(),
        label=columns.label,
        targets=columns.targets,
        label_files=files,
    )


class ListedFeatures:
    """npy files that a table lists: [dim] or [time, dim] each. Keys are rows of relative paths, one per modality."""

    def __init__(self, root: Path, column: int, paths: Sequence[str], *, how: str):
        self.root, self.column, self.how = root, column, how
        self._paths = sorted({path for path in paths if path})
        if not self._paths:
            raise ConclugenError(f"{root}: a column of metadata.csv lists no file; leave it out")
        self.dim = len(self._read(self._paths[0]))

    def names(self) -> dict[str, list[str]]:
        """None: the table lists paths, not names."""
        return {}

    def files(self) -> Iterable[str]:
        """All files."""
        return (f"{self.root}{os.sep}{path}" for path in self._paths)

    def locate(self, split: str, keys: Sequence[tuple[str, ...]]) -> Sequence[str | None]:
        """Relative paths; an empty cell is an absent modality."""
        return [key[self.column] or None for key in keys]

    def read(self, place: str) -> np.ndarray:
        """The vector [dim] of a file, which must be there since the table lists it."""
        return self._read(place)

    def __getstate__(self) -> dict[str, Any]:
        """For another process: without the list of all files."""
        return {**self.__dict__, "_paths": []}

    def _read(self, place: str) -> np.ndarray:
        x = read_npy(self.root / place)
        if x is None:
            raise ConclugenError(f"{self.root / place}: no such file, but metadata.csv lists it; leave its cell empty")
        return pool(x, self.how, str(self.root / place))


def open_metadata(request: Request) -> Found:
    """``metadata.csv`` beside the files it lists, in the source or in a folder for each split.

    Columns: ``MODALITY_file_name`` for each modality, or ``file_name`` for one called ``features``; ``id`` (else the
    file's name without ending); labels, ``group`` and ``split`` as in every table.
    """
    source = request.source
    tables = {"": source / "metadata.csv"} if (source / "metadata.csv").is_file() else {}
    folders = sorted(p for p in source.iterdir() if p.name in SPLIT_NAMES and (p / "metadata.csv").is_file())
    tables |= {p.name: p / "metadata.csv" for p in folders}
    if (len(tables) != 1 and "" in tables) or not tables:
        raise ConclugenError(
            f"{source}: expected one metadata.csv in it, or one in each folder train, validation, test"
        )
    rows, columns, read = [], None, [CsvTable(path) for path in tables.values()]
    _refuse_fewer_columns(read)
    for folder, table in zip(tables, read, strict=True):
        files = {_modality(n): n for n in table.names if n == "file_name" or n.endswith("_file_name")}
        if not files or (columns is not None and list(files) != list(columns)):
            raise ConclugenError(
                f"{table.path}: no column file_name or MODALITY_file_name, or not those of the other splits"
            )
        columns = files
        rows += [(where, _listed(where, row, files, folder)) for where, row in table]
    features = {
        m: ListedFeatures(source, i, [row[annotations_lib.KEY][i] for _, row in rows], how=request.pool)
        for i, m in enumerate(columns)
    }
    return _read_rows(request, Found(features), rows, list(tables.values()))


def _modality(column: str) -> str:
    return column.removesuffix("_file_name") if column != "file_name" else "features"


def _listed(where: str, row: Mapping[str, str], files: Mapping[str, str], folder: str) -> dict[str, Any]:
    """A row with its paths, relative to the source and inside it, its id and its split."""
    paths = tuple(_inside(where, row[column], folder) for column in files.values())
    first = next((path for path in paths if path), None)
    if first is None:
        raise ConclugenError(f"{where}: no file in any of the columns {', '.join(files.values())}; drop the row")
    return {
        **row,
        annotations_lib.KEY: paths,
        "id": row.get("id") or PurePosixPath(first).stem,
        "split": row.get("split") or folder or "train",
    }


def _inside(where: str, text: str, folder: str) -> str:
    path = PurePosixPath(folder, text.strip())
    if not text.strip():
        return ""
    if path.is_absolute() or ".." in path.parts or "\\" in text or "\0" in text:
        raise ConclugenError(f"{where}: file name {text!r} leads out of the folder; list files below it, without '..'")
    return str(path)

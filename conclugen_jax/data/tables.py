"""Tables of features with ids, as arrays, folders, Parquet or listed in a metadata.csv, and their labels."""

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from conclugen_jax.data import annotations as annotations_lib
from conclugen_jax.data.annotations import Columns
from conclugen_jax.data.cells import CsvTable, column_name
from conclugen_jax.data.corpora import dropped
from conclugen_jax.data.features import MatrixFeatures, ParquetFeatures
from conclugen_jax.data.files import as_text, entries, npz_arrays, read_npy
from conclugen_jax.data.folders import FolderFeatures, holds_npy
from conclugen_jax.data.importers import csd
from conclugen_jax.data.parquet import parquet_column, parquet_kinds
from conclugen_jax.data.pooling import pool
from conclugen_jax.data.requests import Found, Request, from_names, union
from conclugen_jax.data.sources import SPLIT_NAMES, Features, LabelSpec
from conclugen_jax.errors import ConclugenError


def open_table(request: Request) -> Found:
    """``MODALITY.npy`` with ``MODALITY.txt``, or a folder ``MODALITY`` of npy files, for each modality; ``labels.csv``.

    Raises:
      ConclugenError: no folder, or features that cannot be read.
    """
    found: dict[str, Callable[[], Features]] = {}
    others: list[Path] = []
    for path in entries(request.source) if request.source else []:
        if path.suffix == ".npy" and not _is_lengths(path):
            if path.stem in found:  # the folder of this name comes first
                raise ConclugenError(
                    f"{path}: lies beside a folder {path.stem} of .npy files; remove or rename one of them"
                )
            found[path.stem] = functools.partial(MatrixFeatures, path, how=request.pool)
        elif holds_npy(path):
            if path.name.lower() in SPLIT_NAMES:
                raise ConclugenError(
                    f"{path}: a split where a modality is expected; move it to {path.parent / 'MODALITY' / path.name}, or name "
                    f"the folder above it with --modality NAME={path.parent}"
                )
            found[path.name] = functools.partial(FolderFeatures, path, how=request.pool)
        elif path.suffix.lower() == ".npy" and not _is_lengths(path):
            raise ConclugenError(f"{path}: files of features end in .npy, in small letters; rename it")
        else:
            others.append(path)
    _refuse_label_arrays(request.source, found)
    beside = {f"{m}{ending}" for m in found for ending in (".txt", "_lengths.npy")} | {"ids.txt"}
    return Found(request.opened(found), passed_over=[p.name for p in others if p.name not in beside])


def _is_lengths(path: Path) -> bool:
    """Whether a file holds the lengths of another's sequences."""
    return path.stem.endswith("_lengths") and path.with_name(path.name.replace("_lengths.npy", ".npy")).exists()


def _refuse_label_arrays(where: Path | None, modalities: Iterable[str]) -> None:
    """Arrays called like labels are no modality unless a user says so; trained on, they would give the answer away."""
    for name in modalities:
        if name.lower() in ("label", "labels", "split", "group", "id", "ids"):
            raise ConclugenError(
                f"{where}: {name!r} is an array of several values a row, taken for no modality; write labels as columns of "
                "one value each, named with --label=A,B, or rename it"
            )


def open_npz(request: Request) -> Found:
    """One npz file: arrays ``ids``, one [n, dim] or [n, time, dim] per modality, and columns such as ``label`` [n].

    Raises:
      ConclugenError: no npz file, or arrays that do not fit each other.
    """
    source = request.source
    arrays = npz_arrays(source)
    found, cells, others = {}, {}, []
    for name, a in arrays.items():
        if a.ndim == 1 and a.dtype.kind in "USfiub" and not name.endswith("_lengths"):
            cells[name] = a
        elif a.ndim in (2, 3) and a.dtype.kind in "fiub" and name not in request.layout.label:
            found[name] = functools.partial(MatrixFeatures, source, how=request.pool, key=name)
        elif not name.endswith("_lengths") or name.removesuffix("_lengths") not in arrays:
            others.append(f"{name} ({a.dtype} of shape {a.shape})")
    _refuse_label_arrays(source, found)
    columns = _columns(source, {} if request.labels else cells)
    if "ids" in columns:
        columns["id"] = columns.pop("ids")
    texts = {name: as_text(column, f"{source}, {name}") for name, column in columns.items()}
    return _from_rows(request, Found(request.opened(found), passed_over=others), texts, source)


def open_parquet_table(request: Request) -> Found:
    """A Parquet file: a column ``id``, a column of number lists per modality, columns such as ``split`` and ``label``.

    Raises:
      ConclugenError: no such file, several, or columns that cannot be read.
    """
    source, others = request.source, []
    if source.is_dir():
        inside = entries(source)
        files = [p for p in inside if p.suffix == ".parquet"]
        if len(files) != 1:
            raise ConclugenError(f"{source}: {len(files)} Parquet files; name one file that holds all rows")
        (source,) = files
        others = [p.name for p in inside if p != source]
    kinds = parquet_kinds(source)
    others += [f"{name} ({kind})" for name, kind in kinds.items() if kind not in ("vectors", "values")]
    lists = [name for name, kind in kinds.items() if kind == "vectors"]
    _refuse_label_arrays(source, lists)
    found = {name: functools.partial(ParquetFeatures, source, how=request.pool, column=name) for name in lists}
    names = _columns(source, {name: name for name, kind in kinds.items() if kind == "values"})
    beside = request.source / "labels.csv"
    if not request.labels and beside.is_file():
        if set(names) != {"id"}:
            raise ConclugenError(
                f"{beside}: lies beside {source.name}, which has columns of its own; choose with --labels={beside} or "
                f"--source={source}"
            )
        request = dataclasses.replace(request, labels=(beside,))
    texts = {name: parquet_column(source, column) for name, column in names.items()} if not request.labels else {}
    return _from_rows(request, Found(request.opened(found), passed_over=others), texts, source)


def _columns(where: Path, columns: Mapping[str, Any]) -> dict[str, Any]:
    """Columns by the names that they get."""
    named = {column_name(name): column for name, column in columns.items()}
    if len(named) < len(columns):
        raise ConclugenError(
            f"{where}: two columns that differ in spaces or capitals only, among {', '.join(columns)}; rename one"
        )
    return named


class ColumnRows:
    """Rows of a table that is there by column: (where, columns as text), made one at a time."""

    def __init__(self, path: Path, columns: Mapping[str, Sequence[str]]):
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
            yield f"{self.path}, row {i}", {name: column[i] for name, column in self.columns.items()}


def _from_rows(request: Request, found: Found, columns: Mapping[str, Sequence[str]], file: Path) -> Found:
    """Annotations that stand in the file of the features itself, where no others are named."""
    if request.labels:
        return dataclasses.replace(found, label_files=request.labels)
    rows = ColumnRows(file, columns)
    if request.corpus is not None and request.corpus.named is not None and "split" not in columns:
        return found
    return _read_rows(request, found, rows, [file])


def annotate(request: Request, found: Found) -> Found:
    """Annotations from ``labels.csv``, from files that the user named, or from the utterances' names.

    Raises:
      ConclugenError: a faulty table, or names that do not say enough.
    """
    corpus = request.corpus
    files = list(found.label_files or request.labels)
    if not files and request.source is not None and request.source.is_dir():
        beside = sorted(p for p in request.source.iterdir() if p.suffix.lower() == ".csv" and p.is_file())
        files = [p for p in beside if p.name.lower() == "labels.csv"] or (beside if corpus is not None else [])
    if files:
        tables = [CsvTable(path) for path in files]
        if request.dataset in csd.LABEL_COLUMNS and "start_time" in tables[0].names:
            columns, outside = csd.read_label_csv(files, request.dataset, drop=dropped(corpus, ""))
            by_id = {split: dataclasses.replace(a, keys=a.ids) for split, a in columns.items()}
            facts = {**found.facts, "rows_outside_folds": outside}
            return dataclasses.replace(found, columns=by_id, label_files=files, facts=facts)
        return _read_rows(request, found, _Chain(tables), files)
    if corpus is not None:
        return dataclasses.replace(found, columns=from_names(request, found.features))
    columns = Columns(LabelSpec("none"), {})
    for split, names in union(found.features).items():
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


def _refuse_fewer_columns(tables: Sequence[CsvTable], *, optional: Sequence[str] = ()) -> None:
    """Rows of all tables are read by the columns of the first; some need not be in each."""
    first, *others = tables
    for table in others:
        missing = next((name for name in first.names if name not in (*table.names, *optional)), None)
        if missing:
            raise ConclugenError(
                f"{table.path}: no column {missing!r}, which {first.path} has; it has {', '.join(table.names)}"
            )


def _read_rows(request: Request, found: Found, rows: Iterable, files: Sequence[Path]) -> Found:
    corpus, where = request.corpus, os.fspath(files[0])
    if corpus is not None:
        columns = annotations_lib.corpus_table(corpus, rows, where=where)
        return dataclasses.replace(found, columns=columns.result(), label_files=files)
    layout = dataclasses.replace(
        request.layout,
        label=tuple(map(column_name, request.layout.label)),
        targets=tuple(map(column_name, request.layout.targets)),
    )
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
        """Take the column's place among the modalities and its paths, relative to ``root``.

        Raises:
          ConclugenError: no path at all, or a first file that is missing or damaged.
        """
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

    Raises:
      ConclugenError: no such table, or one that lists files outside or none at all.
    """
    source = request.source
    inside = entries(source)
    tables = {"": source / "metadata.csv"} if (source / "metadata.csv").is_file() else {}
    folders = [p for p in inside if (p / "metadata.csv").is_file()]
    tables |= {p.name: p / "metadata.csv" for p in folders}
    unknown = [p.name for p in folders if p.name.lower() not in SPLIT_NAMES]
    if (len(tables) != 1 and "" in tables) or not tables or unknown:
        raise ConclugenError(
            f"{source}: expected one metadata.csv in it, or one in each folder train, validation, test"
            + (f"; {unknown[0]} is none of these" if unknown else "")
        )
    if (source / "labels.csv").is_file():
        raise ConclugenError(
            f"{source / 'labels.csv'}: lies beside metadata.csv, where the labels of this format stand; move it away, or name "
            "--format=table"
        )
    rows, columns, read = [], None, [CsvTable(path) for path in tables.values()]
    _refuse_fewer_columns(read, optional=["split"])  # the folder says it too
    for folder, table in zip(tables, read, strict=True):
        listing = [n for n in table.names if n == "file_name" or n.endswith("_file_name")]
        files = {_modality(n): n for n in listing}
        if len(files) < len(listing):
            raise ConclugenError(
                f"{table.path}: columns file_name and features_file_name are the same modality; rename one"
            )
        if not files or (columns is not None and list(files) != list(columns)):
            raise ConclugenError(
                f"{table.path}: no column file_name or MODALITY_file_name, or not those of the other splits"
            )
        columns = files
        rows += [(where, _listed(where, row, files, folder)) for where, row in table]
    found = {
        m: functools.partial(
            ListedFeatures, source, i, [row[annotations_lib.KEY][i] for _, row in rows], how=request.pool
        )
        for i, m in enumerate(columns)
    }
    return _read_rows(request, Found(request.opened(found)), rows, list(tables.values()))


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
        "split": _split(where, row, folder),
    }


def _split(where: str, row: Mapping[str, str], folder: str) -> str:
    """The folder's split or the row's, which must be the same; without both it is train, but an empty cell is refused."""
    cell = row.get("split", folder or "train").strip() or folder
    if folder and SPLIT_NAMES.get(cell.lower()) != SPLIT_NAMES[folder.lower()]:
        raise ConclugenError(f"{where}: split {cell!r} in the folder {folder!r}; mend the cell, or drop the column")
    return cell


def _inside(where: str, text: str, folder: str) -> str:
    path = PurePosixPath(folder, text.strip())
    if not text.strip():
        return ""
    if path.is_absolute() or ".." in path.parts or "\\" in text or "\0" in text:
        raise ConclugenError(f"{where}: file name {text!r} leads out of the folder; list files below it, without '..'")
    return str(path)

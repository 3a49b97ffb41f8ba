"""Formats that list features by id: files of one folder, an npz file, a Parquet file, a ``metadata.csv``."""

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from conclugen_jax.data import wide
from conclugen_jax.data.cells import Table, column_name, read_csv, stack
from conclugen_jax.data.column_features import ColumnFeatures
from conclugen_jax.data.features import FolderFeatures, ListedFeatures, MatrixFeatures, holds_npy, holds_tables
from conclugen_jax.data.files import as_text, entries, npz_arrays
from conclugen_jax.data.importers import merbench
from conclugen_jax.data.parquet import ParquetFeatures, parquet_classes, parquet_column, parquet_kinds, read_columns
from conclugen_jax.data.requests import Found, Request
from conclugen_jax.data.sources import SPLIT_NAMES
from conclugen_jax.errors import ConclugenError

LABEL_ARRAYS = ("y", "labels", "target")  # arrays of an npz file that hold the label where none is called label


def open_table(request: Request) -> Found:
    """Open ``MODALITY.npy`` with ``MODALITY.txt``, ``MODALITY.csv``, or a folder ``MODALITY``, for each modality."""
    found, others, source = {}, [], request.source
    if source and is_merbench(source):
        source = source / "features"
    paths = {p.name: p for p in entries(source)} if source else {}
    for name, path in paths.items():
        if name.endswith("_lengths.npy") and name.replace("_lengths.npy", ".npy") in paths:
            continue
        if path.stem in found and (path.suffix == ".npy" or is_table(path)):  # the folder of this name comes first
            raise ConclugenError(f"{path}: is next to other features called {path.stem}; rename one of them")
        if path.suffix == ".npy":
            found[path.stem] = functools.partial(MatrixFeatures, path, how=request.pool)
        elif path.suffix.lower() == ".npy":
            raise ConclugenError(f"{path}: files of features end in .npy, in lower case; rename it")
        elif path not in request.labels and is_table(path):
            found[path.stem] = functools.partial(ColumnFeatures, path, how=request.pool, apart=no_features(request))
        elif not (holds_npy(path) or holds_tables(path)):
            others.append(name)
        elif name.lower() in SPLIT_NAMES:
            way_out = f"move it to {path.parent / 'MODALITY' / name}, or name --modality NAME={path.parent}"
            raise ConclugenError(f"{path}: a split where a modality is expected; {way_out}")
        else:
            found[name] = functools.partial(FolderFeatures, path, how=request.pool)
    _refuse_label_arrays(request.source, found)
    beside = {"ids.txt", *(f"{modality}.txt" for modality in found)}
    names = {name: re.sub(r"\W+", "_", name, flags=re.ASCII) for name in found}
    if len(set(names.values())) < len(names):
        raise ConclugenError(f"{source}: {', '.join(names)} differ only in punctuation; rename one of them")
    notes = [
        f"{new}: the modality of {name!r}; --modality NAME=PATH names it" for name, new in names.items() if new != name
    ]
    passed_over = [name for name in others if name not in beside]
    found = {names[name]: opener for name, opener in found.items()}
    labels = _label_npz(request)
    if source != request.source:  # a damaged file of labels does not show that it is one
        passed_over += [p.name for p in entries(request.source) if p.suffix == ".npz" and p not in labels]
    return Found(found, label_files=labels, passed_over=passed_over, facts={"notes": notes} if notes else {})


def _label_npz(request: Request) -> list[Path]:
    """Return the file of labels of MERBench in the source of a user, where no others are named or in the way."""
    source = request.source
    if source is None or request.labels or request.corpus is not None or os.path.lexists(source / "labels.csv"):
        return []
    files = merbench.label_files(source)
    if len(files) > 1:
        some = ", ".join(path.name for path in files)
        raise ConclugenError(f"{source}: {some} all hold labels; name one with --labels=FILE.npz")
    return files


def is_merbench(source: Path) -> bool:
    """Return whether features are laid out as MERBench does: ``features/NAME-UTT/CLIP.npy``, or ``NAME-FRA``."""
    folder = source / "features"
    return folder.is_dir() and any(p.name.endswith(("UTT", "FRA")) and p.is_dir() for p in entries(folder))


def is_table(path: Path) -> bool:
    """Return whether a file is a table of features that is read without being named, by its content."""
    return path.is_file() and path.name not in ("labels.csv", "metadata.csv") and wide.holds_features(path)


def no_features(request: Request) -> list[str]:
    """Return names, in lower case, of columns that a user or a corpus says are no features."""
    known = request.corpus.label.names if request.corpus is not None else ()
    return [name.lower() for name in (*request.layout.label, *request.layout.targets, *known)]


def open_columns(request: Request) -> Found:
    """Open a csv or ARFF file with a column per feature, and columns ``id``, ``split``, ``group`` and ``label``."""
    features = ColumnFeatures(request.source, how=request.pool, apart=no_features(request))
    return _with_labels(request, Found({"features": features}), request.source, features.labels())


def _refuse_label_arrays(where: Path | None, modalities: Iterable[str], others: Sequence[str] = ()) -> None:
    """Refuse modalities with names of labels (or in ``others``), since training on them would leak the answer."""
    for name in modalities:
        if name.lower() in ("label", "labels", "split", "group", "id", "ids", *others):
            fault = f"{name!r} is an array of several values a row, not a modality"
            raise ConclugenError(f"{where}: {fault}; write labels as columns named with --label=A,B, or rename it")


def open_npz(request: Request) -> Found:
    """Open an npz file: arrays ``ids``, one [n, dim] or [n, time, dim] per modality, and columns such as ``label`` [n]."""
    source = request.source
    arrays = npz_arrays(source)
    found, columns, others = {}, {}, []
    for name, a in arrays.items():
        if a.ndim == 1 and a.dtype.kind in "USfiub" and not name.endswith("_lengths"):
            columns[name] = functools.partial(as_text, a, f"{source}, {name}")
        elif a.ndim in (2, 3) and a.dtype.kind in "fiub" and name not in request.layout.label:
            found[name] = functools.partial(MatrixFeatures, source, how=request.pool, key=name)
        elif not name.endswith("_lengths") or name.removesuffix("_lengths") not in arrays:
            others.append(f"{name} ({a.dtype} of shape {a.shape})")
    _refuse_label_arrays(source, found, LABEL_ARRAYS)
    if "ids" in columns:
        columns["id"] = columns.pop("ids")
    named = next((name for name in LABEL_ARRAYS if name in columns), "")
    facts = {}
    if named and "label" not in map(column_name, columns) and not (request.layout.label or request.labels):
        columns["label"] = columns[named]
        facts["notes"] = [f"{source.name}: the array {named!r} is taken for the label; use --label to change that"]
    return _with_labels(request, Found(found, passed_over=others, facts=facts), source, columns)


def open_parquet_table(request: Request) -> Found:
    """Open a Parquet file: a column ``id``, one of number lists per modality, columns such as ``split`` and ``label``."""
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
    _refuse_label_arrays(source, lists, [name.lower() for name in lists if parquet_classes(source, name)])
    found = {name: functools.partial(ParquetFeatures, source, how=request.pool, column=name) for name in lists}
    values = [name for name, kind in kinds.items() if kind == "values"]
    columns = {name: functools.partial(parquet_column, source, name) for name in values}
    if not lists and not request.modalities:  # a column per feature
        each = ColumnFeatures(source, how=request.pool, apart=no_features(request), load=read_columns)
        found["features"], columns = each, each.labels()
    beside = request.source / "labels.csv"
    if not request.labels and os.path.lexists(beside):
        if list(map(column_name, columns)) != ["id"]:
            fault = f"is next to {source.name}, which has columns of its own"
            raise ConclugenError(f"{beside}: {fault}; choose with --labels={beside} or --source={source}")
        request = dataclasses.replace(request, labels=(beside,))
    classes = {column_name(name): names for name in values if (names := parquet_classes(source, name))}
    return _with_labels(request, Found(found, passed_over=others), source, columns, classes)


def _with_labels(
    request: Request,
    found: Found,
    file: Path,
    columns: Mapping[str, Callable[[], list[str]]],
    classes: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> Found:
    """Find labels: in files that the user named, in columns of the features' file, or nowhere."""
    if request.labels:
        return dataclasses.replace(found, label_files=request.labels)
    texts = {column_name(name): read() for name, read in columns.items()}
    if len(texts) < len(columns):
        fault = f"two columns that differ in spaces or capitals only, among {', '.join(columns)}"
        raise ConclugenError(f"{file}: {fault}; rename one")
    num_rows = len(texts.get("id", ()))
    if not num_rows:
        raise ConclugenError(f"{file}: no column 'id', or no rows; each row needs an id")
    for name, column in texts.items():
        if len(column) != num_rows:
            raise ConclugenError(f"{file}: {len(column)} values of {name!r} for {num_rows} ids; correct the file")
    if request.corpus is not None and request.corpus.named is not None and "split" not in texts:
        return found  # the names say as much
    table = Table(file, texts, [f"{file}, row {i}" for i in range(num_rows)], classes=classes)
    return dataclasses.replace(found, label_files=[file], table=table)


def open_metadata(request: Request) -> Found:
    """Open ``metadata.csv`` beside the files it lists, in the source or in a folder for each split."""
    folders = metadata_folders(request.source, entries(request.source))
    table, modalities, files = read_metadata(request.source, folders, name=lambda parts: parts[-1])
    openers = {
        m: functools.partial(ListedFeatures, request.source, i, [key[i] for key in table.keys], how=request.pool)
        for i, m in enumerate(modalities)
    }
    return Found(openers, table=table, label_files=files)


def metadata_folders(source: Path, inside: Iterable[Path]) -> list[Path]:
    """Return which of a folder and those inside hold a ``metadata.csv``."""
    return [folder for folder in (source, *inside) if (folder / "metadata.csv").is_file()]


def read_metadata(
    source: Path, folders: Sequence[Path], *, name: Callable[[Sequence[str]], str]
) -> tuple[Table, list[str], list[Path]]:
    """Read ``metadata.csv`` in the source or in folders of splits.

    Columns: ``MODALITY_file_name`` for each modality, or ``file_name`` for one called ``features``; ``id`` (else the
    ``name`` made of the parts of the file's path, without ending and without folders of splits); labels, ``group`` and
    ``split`` as in every table. If the files are in folders of splits, the folder is the split.

    Returns:
      The rows, with paths relative to the source as keys, one for each modality; the modalities; the files read.
    """
    unknown = [p.name for p in folders if p != source and p.name.lower() not in SPLIT_NAMES]
    if not folders or unknown or (source in folders and len(folders) > 1):
        fault = f"; {unknown[0]} is none of these" if unknown else ""
        expected = "expected one metadata.csv in it, or one in each folder train, validation, test"
        raise ConclugenError(f"{source}: {expected}{fault}")
    labels = source / "labels.csv"
    if os.path.lexists(labels):
        raise ConclugenError(f"{labels}: is next to metadata.csv, which holds the labels; move it, or --format=table")
    files = [read_csv(folder / "metadata.csv") for folder in folders]
    listings = [[c for c in t.columns if c == "file_name" or c.endswith("_file_name")] for t in files]
    modalities = [column.removesuffix("file_name").removesuffix("_") or "features" for column in listings[0]]
    for table, listing in zip(files, listings, strict=True):
        if listing != listings[0] or len(set(modalities)) < max(1, len(listing)):
            expected = "expected columns MODALITY_file_name, or file_name alone, and the same in each split"
            raise ConclugenError(f"{table.path}: {', '.join(table.columns)}; {expected}")
    if not any(map(len, files)):
        raise ConclugenError(f"{files[0].path}: no rows below the header")
    parts = zip(files, folders, strict=True)
    table = stack([_listing(part, listings[0], "" if p == source else p.name, name) for part, p in parts])
    return table, modalities, [t.path for t in files]


def _listing(table: Table, listing: Sequence[str], folder: str, name: Callable[[Sequence[str]], str]) -> Table:
    """Return a table whose keys are paths relative to the source, with the columns ``id`` and ``split`` filled in."""
    keys, ids, splits = [], [], []
    for where, row in table:
        paths = tuple(str(PurePosixPath(folder, row[c].strip())) if row[c].strip() else "" for c in listing)
        first = next(filter(None, paths), None)
        if first is None:
            raise ConclugenError(f"{where}: no file in any of the columns {', '.join(listing)}; drop the row")
        for path in map(PurePosixPath, paths):
            if path.is_absolute() or ".." in path.parts or "\\" in str(path):
                raise ConclugenError(f"{where}: file name {str(path)!r} leads out of the folder; list files below it")
        keys.append(paths)
        *folders, stem = PurePosixPath(first).with_suffix("").parts
        ids.append(row.get("id") or name([*(part for part in folders if part.lower() not in SPLIT_NAMES), stem]))
        splits.append(_split_of_files(paths, row.get("split", "").strip(), where))
    if "split" not in table.columns and not all(splits):
        if any(splits):
            fault = "its file is in no folder of a split, and others are; move it, or add a column 'split'"
            raise ConclugenError(f"{table.where[splits.index('')]}: {fault}")
        splits = ["train"] * len(splits)
    return dataclasses.replace(table.having(id=ids, split=splits), keys=keys)


def _split_of_files(paths: Sequence[str], cell: str, where: str) -> str:
    """Return the split that a cell or the folders of a row's files say, ``""`` if none; refuse a row that says two."""
    folders = [part for path in paths for part in PurePosixPath(path).parts[:-1] if part.lower() in SPLIT_NAMES]
    for folder in folders:
        if SPLIT_NAMES[folder.lower()] != SPLIT_NAMES[folders[0].lower()]:
            raise ConclugenError(
                f"{where}: files in the folders {folders[0]!r} and {folder!r}; list files of one split"
            )
        if cell and SPLIT_NAMES.get(cell.lower()) != SPLIT_NAMES[folder.lower()]:
            fault = f"split {cell!r} in the folder {folder!r}"
            raise ConclugenError(f"{where}: {fault}; correct the cell, or drop the column")
    return cell or "".join(folders[:1])

"""Tables of features with ids: arrays and folders of one folder, an npz file, a Parquet file."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from conclugen_jax.data.cells import Table, column_name
from conclugen_jax.data.features import MatrixFeatures, ParquetFeatures
from conclugen_jax.data.files import as_text, entries, npz_arrays
from conclugen_jax.data.folders import FolderFeatures, holds_npy
from conclugen_jax.data.parquet import parquet_column, parquet_kinds
from conclugen_jax.data.requests import Found, Request
from conclugen_jax.data.sources import SPLIT_NAMES, Features
from conclugen_jax.errors import ConclugenError

Openers = dict[str, Callable[[], Features]]
"""Modality -> what opens its features."""


def open_table(request: Request) -> Found:
    """Open ``MODALITY.npy`` with ``MODALITY.txt``, or a folder ``MODALITY`` of npy files, for each modality.

    Raises:
      ConclugenError: no folder, or features that cannot be read.
    """
    found: Openers = {}
    others: list[Path] = []
    for path in entries(request.source) if request.source else []:
        if path.suffix == ".npy" and not _is_lengths(path):
            if path.stem in found:  # the folder of this name comes first
                raise ConclugenError(
                    f"{path}: is next to a folder {path.stem} of .npy files; remove or rename one of them"
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
            raise ConclugenError(f"{path}: files of features end in .npy, in lower case; rename it")
        else:
            others.append(path)
    _refuse_label_arrays(request.source, found)
    beside = {f"{m}{ending}" for m in found for ending in (".txt", "_lengths.npy")} | {"ids.txt"}
    return Found(request.opened(found), passed_over=[p.name for p in others if p.name not in beside])


def _is_lengths(path: Path) -> bool:
    """Return whether a file holds the lengths of another's sequences."""
    return path.stem.endswith("_lengths") and path.with_name(path.name.replace("_lengths.npy", ".npy")).exists()


def _refuse_label_arrays(where: Path | None, modalities: Iterable[str]) -> None:
    """Refuse arrays called like labels: trained on, they would give the answer away."""
    for name in modalities:
        if name.lower() in ("label", "labels", "split", "group", "id", "ids"):
            raise ConclugenError(
                f"{where}: {name!r} is an array of several values a row, not a modality; write labels as columns of "
                "one value each, named with --label=A,B, or rename it"
            )


def open_npz(request: Request) -> Found:
    """Open an npz file: arrays ``ids``, one [n, dim] or [n, time, dim] per modality, and columns such as ``label`` [n].

    Raises:
      ConclugenError: no npz file, or arrays that do not fit each other.
    """
    source = request.source
    arrays = npz_arrays(source)
    found: Openers = {}
    cells, others = {}, []
    for name, a in arrays.items():
        if a.ndim == 1 and a.dtype.kind in "USfiub" and not name.endswith("_lengths"):
            cells[name] = a
        elif a.ndim in (2, 3) and a.dtype.kind in "fiub" and name not in request.layout.label:
            found[name] = functools.partial(MatrixFeatures, source, how=request.pool, key=name)
        elif not name.endswith("_lengths") or name.removesuffix("_lengths") not in arrays:
            others.append(f"{name} ({a.dtype} of shape {a.shape})")
    _refuse_label_arrays(source, found)
    named = _named(source, {} if request.labels else cells)
    if "ids" in named:
        named["id"] = named.pop("ids")
    texts = {name: as_text(column, f"{source}, {name}") for name, column in named.items()}
    return _with_labels(request, Found(request.opened(found), passed_over=others), source, texts)


def open_parquet_table(request: Request) -> Found:
    """Open a Parquet file: a column ``id``, one of number lists per modality, columns such as ``split`` and ``label``.

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
    named = _named(source, {name: name for name, kind in kinds.items() if kind == "values"})
    beside = request.source / "labels.csv"
    if not request.labels and beside.is_file():
        if set(named) != {"id"}:
            raise ConclugenError(
                f"{beside}: is next to {source.name}, which has columns of its own; choose with --labels={beside} or "
                f"--source={source}"
            )
        request = dataclasses.replace(request, labels=(beside,))
    texts = {} if request.labels else {name: parquet_column(source, column) for name, column in named.items()}
    return _with_labels(request, Found(request.opened(found), passed_over=others), source, texts)


def _named(where: Path, columns: Mapping[str, Any]) -> dict[str, Any]:
    """Return columns by the names that they get."""
    named = {column_name(name): column for name, column in columns.items()}
    if len(named) < len(columns):
        raise ConclugenError(
            f"{where}: two columns that differ in spaces or capitals only, among {', '.join(columns)}; rename one"
        )
    return named


def _with_labels(request: Request, found: Found, file: Path, columns: Mapping[str, Sequence[str]]) -> Found:
    """Say where labels stand: in files that the user named, in columns of the file of the features, or nowhere.

    Raises:
      ConclugenError: the file has no column ``id``, or no row, or columns differ in length.
    """
    if request.labels:
        return dataclasses.replace(found, label_files=request.labels)
    num_rows = len(columns.get("id", ()))
    if not num_rows:
        raise ConclugenError(f"{file}: no column 'id', or no rows; each row needs an id")
    for name, column in columns.items():
        if len(column) != num_rows:
            raise ConclugenError(f"{file}: {len(column)} values of {name!r} for {num_rows} ids; correct the file")
    if request.corpus is not None and request.corpus.named is not None and "split" not in columns:
        return found  # the names say as much
    table = Table(file, columns, [f"{file}, row {i}" for i in range(num_rows)])
    return dataclasses.replace(found, label_files=[file], table=table)

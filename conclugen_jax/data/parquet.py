"""Columns of Parquet files: text whole, lists of numbers a few MiB at a time, and the vectors in them by id."""

import contextlib
import functools
import itertools
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet, types

from conclugen_jax.data.features import RowFeatures, pool
from conclugen_jax.data.files import MOST_UNPACKED, as_text, open_regular, stand_in
from conclugen_jax.data.wide import Frames, frames
from conclugen_jax.errors import ConclugenError, reason

BATCH_BYTES = 2**26  # of a column that are decoded at a time
BLOCK_BYTES = 2**27  # of vectors that are kept, since rows may be asked for in another order than the file's

FOOTER = """# Look at what a Parquet file says of its columns.
import sys
from pyarrow import parquet
found = parquet.ParquetFile(sys.argv[1]).metadata
for group in range(found.num_row_groups):
    for column in range(found.num_columns):
        found.row_group(group).column(column)
"""


def parquet_kinds(path: Path) -> dict[str, str]:
    """Check a file and return the kind of each column: ``vectors`` (lists of numbers), ``values``, or its type."""
    with open_regular(path) as file:
        stat = os.fstat(file.fileno())
    _check_footer(path.absolute(), stat.st_ino, stat.st_mtime_ns, stat.st_size)
    with _faults(path):
        schema = parquet.ParquetFile(path).schema_arrow
    twice = [name for name, n in Counter(schema.names).items() if n > 1]
    if twice:
        raise ConclugenError(f"{path}: column {twice[0]!r} appears twice; each needs a name of its own")
    return {field.name: _kind(field.type) for field in schema}


@functools.lru_cache(maxsize=4096)
def _check_footer(path: Path, *_version: int) -> None:
    """Look at the footer in another process first: some damaged footers make pyarrow's C++ code abort the process.

    Errors that pyarrow reports itself are handled where the file is read.
    """
    command = [sys.executable, "-c", FOOTER, str(path)]
    done = subprocess.run(command, input="", capture_output=True, text=True, errors="replace", check=False)
    if done.returncode < 0:
        said = done.stderr.strip().splitlines() or [f"signal {-done.returncode}"]
        raise _unreadable(path, said[-1].strip().removeprefix("what():").strip()[:300])


def _unreadable(path: Path, why: str) -> ConclugenError:
    return ConclugenError(f"{path}: {stand_in(path) or f'cannot be read as a Parquet file ({why}); write it again'}")


@contextlib.contextmanager
def _faults(path: Path) -> Iterator[None]:
    """Turn the errors that pyarrow raises on damaged files into one sentence."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, OverflowError, KeyError, IndexError) as e:
        raise _unreadable(path, reason(e, 300)) from e


def _kind(column: pa.DataType) -> str:
    inner, depth = column, 0
    while types.is_list(inner) or types.is_large_list(inner) or types.is_fixed_size_list(inner):
        inner, depth = inner.value_type, depth + 1
    number = types.is_integer(inner) or types.is_floating(inner) or types.is_boolean(inner)
    if depth:
        return "vectors" if number and depth <= 2 else str(column)
    if types.is_dictionary(inner):
        inner = inner.value_type
    text = any(f(inner) for f in (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary))
    return "values" if number or text or types.is_null(inner) or types.is_decimal(inner) else str(column)


def parquet_column(path: Path, column: str) -> list[str]:
    """Return all values of a column of text or numbers as text, "" where it is null."""
    file, _ = _opened(path, column)
    kind = _kind(file.schema_arrow.field(column).type)
    if kind != "values":
        raise ConclugenError(f"{path}: column {column!r} holds {kind}, expected text or numbers, one in each row")
    texts: list[str] = []
    where = f"{path}, column {column!r}"
    with _faults(path):
        file = parquet.ParquetFile(path, read_dictionary=[column])  # holds a text once, however often it is repeated
        for chunk in file.read(columns=[column]).column(column).chunks:
            if isinstance(chunk, pa.DictionaryArray):
                words = as_text(chunk.dictionary.to_pylist(), where)
                texts += ["" if i is None else words[i] for i in chunk.indices.to_pylist()]
            else:
                texts += as_text(chunk.to_pylist(), where)
    if (names := _class_label(file.schema_arrow, column)) and types.is_integer(file.schema_arrow.field(column).type):
        for i, text in enumerate(texts):
            if text and not -1 <= int(text) < len(names):
                raise ConclugenError(
                    f"{path}, row {i}: {column} {text}, but its classes are {', '.join(names)}; correct it"
                )
        texts = ["" if text in ("", "-1") else names[int(text)] for text in texts]  # -1: without label
    return texts


def parquet_classes(path: Path, column: str) -> list[str]:
    """Return the class names that the file stores for a column, in its order; empty if it stores none.

    They are the names of a ``ClassLabel`` of Hugging Face, or the categories of pandas or of an ordered dictionary.
    """
    with _faults(path):
        schema = parquet.ParquetFile(path).schema_arrow
        if names := _class_label(schema, column):
            return names
        kind, described = schema.field(column).type, _described(schema, b"pandas", "columns")
        of_pandas = any(
            isinstance(each, dict) and (each.get("name"), each.get("pandas_type")) == (column, "categorical")
            for each in (described if isinstance(described, list) else ())
        )
        if not types.is_dictionary(kind) or not (kind.ordered or of_pandas):
            return []
        chunks = _opened(path, column)[0].read(columns=[column]).column(column).chunks
        words = (as_text(chunk.dictionary.to_pylist(), f"{path}, column {column!r}") for chunk in chunks)
        return list(dict.fromkeys(itertools.chain(*words)))


def _class_label(schema: pa.Schema, column: str) -> list[str]:
    """Return the names of classes, one or several a row, that Hugging Face's ``datasets`` keeps in a schema, or nothing."""
    features = _described(schema, b"huggingface", "info", "features")
    feature = features.get(column) if isinstance(features, dict) else None
    if isinstance(feature, dict) and feature.get("_type") in ("Sequence", "List", "LargeList"):
        feature = feature.get("feature")
    names = feature.get("names") if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" else None
    return list(map(str, names)) if isinstance(names, list) else []


def _described(schema: pa.Schema, key: bytes, *path: str) -> Any:
    """Return a part of the JSON metadata that a program wrote about its columns; None if it is missing."""
    try:
        found = msgspec.json.decode((schema.metadata or {})[key])
        for name in path:
            found = found[name]
    except (KeyError, TypeError, RecursionError, msgspec.MsgspecError, UnicodeDecodeError):
        return None
    return found


def _numbers(values: pa.Array, where: str) -> np.ndarray:
    """Return a list's values [dim], or [time, dim] of a list of lists."""
    shape, nulls = (len(values),), values.null_count
    if types.is_nested(values.type):
        dims = pc.unique(pc.list_value_length(values)).to_pylist() or [0]
        if len(dims) > 1:
            raise ConclugenError(f"{where}: lists of different lengths; expected (dim,) or (time, dim)")
        shape, values = (len(values), dims[0]), values.flatten()
        nulls += values.null_count
    if nulls:
        raise ConclugenError(f"{where}: an empty value (null) within a list; a missing modality is null as a whole")
    return values.to_numpy(zero_copy_only=False).reshape(shape)


def read_columns(path: Path, apart: Sequence[str] = ()) -> Frames:
    """Read a file with one column per feature; ``apart`` are names of columns that are no features."""
    kinds = parquet_kinds(path)
    names = [name for name, kind in kinds.items() if kind == "values"]
    _opened(path, *names)
    with _faults(path):
        table = parquet.read_table(path, columns=names)
    others = [c.cast(pa.float64()) if types.is_decimal(c.type) else c for c in table.columns]
    return frames(path, names, others, apart)


def _opened(path: Path, *columns: str) -> tuple[parquet.ParquetFile, int]:
    """Open a file; return the bytes, too, that columns take once decoded, where a repeated value counts each time."""
    with _faults(path):
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        for column in columns:
            if column not in names:
                raise ConclugenError(f"{path}: no column {column!r}; it has {', '.join(names)}")
        roots = {column.split(".")[0] for column in columns}
        parts = [i for i in range(len(file.schema)) if file.schema.column(i).path.split(".")[0] in roots]
        chunks = [file.metadata.row_group(g).column(i) for g in range(file.num_row_groups) for i in parts]
        size = 1 + sum(max(8 * chunk.num_values, chunk.total_uncompressed_size) for chunk in chunks)
    if size > MOST_UNPACKED * max(path.stat().st_size, 2**20):
        found = f"would unpack to {size / 2**30:.1f} GiB, more than {MOST_UNPACKED} times the file's size"
        raise ConclugenError(f"{path}: column {columns[0]!r} {found}; write it again")
    return file, size


class ParquetFeatures(RowFeatures):
    """A column of number lists in a Parquet file, beside a column ``id``."""

    def __init__(self, path: Path, *, how: str, column: str):
        """Open a column; ``how`` is the pooling over time."""
        self.column, self._block = column, {}
        kind = parquet_kinds(path).get(column, "vectors")
        if kind != "vectors":
            raise ConclugenError(f"{path}: column {column!r} holds {kind}, expected lists of numbers")
        super().__init__(path, how, path)
        first = next((x for _, x in self._vectors(np.arange(len(self._order))) if x is not None), None)
        if first is None:
            raise ConclugenError(f"{path}: column {column!r} is empty in every row; leave the modality out")
        self.dim = len(first)

    def ids(self) -> list[str]:
        """Return the column ``id``."""
        return parquet_column(self.path, "id")

    def locate(self, split: str, keys: Sequence[str]) -> Sequence[tuple[int, np.ndarray] | None]:
        """Return the position of each key among the keys, and the rows of all of them."""
        rows = self.rows(split, keys)
        every = np.array(rows, np.int64)
        return [None if row < 0 else (i, every) for i, row in enumerate(rows)]

    def read(self, place: tuple[int, np.ndarray]) -> np.ndarray | None:
        """Return a row's vector [dim], None if null; those asked for next are read with it, in the file's order."""
        position, rows = place
        row = int(rows[position])
        if row not in self._block:
            following = np.unique(rows[position : position + max(1, BLOCK_BYTES // (8 * self.dim))])
            self._block = dict(self._vectors(following))  # -1, of no row, is before the first
        return self._block[row]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_block": {}}

    def _vectors(self, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray | None]]:
        """Yield each row and its vector [dim], None where the column is null; a few MiB are decoded at a time.

        The rows are int64 [n], ascending, each once; negative ones stand for no row.
        """
        file, size = _opened(self.path, self.column)
        batch_rows = max(1, min(2**16, BATCH_BYTES * file.metadata.num_rows // size))
        start = 0
        with _faults(self.path):
            for group in range(file.num_row_groups):
                stop = start + file.metadata.row_group(group).num_rows
                wanted = rows[np.searchsorted(rows, start) : np.searchsorted(rows, stop)]
                if len(wanted):
                    for batch in file.iter_batches(batch_rows, row_groups=[group], columns=[self.column]):
                        here = slice(*np.searchsorted(wanted, [start, start + len(batch)]))
                        for row in wanted[here].tolist():
                            value = batch.column(0)[row - start]
                            where = f"{self.path}, row {row}, column {self.column!r}"
                            yield row, pool(_numbers(value.values, where), self.how, where) if value.is_valid else None
                        start += len(batch)
                    if start <= wanted[-1]:
                        raise _unreadable(self.path, f"row group {group} holds fewer rows than the file declares")
                start = stop

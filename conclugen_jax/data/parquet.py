"""Columns of Parquet files: text whole, lists of numbers a few MiB at a time."""

import contextlib
import functools
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from conclugen_jax.data.files import MOST_UNPACKED, as_text, check_regular
from conclugen_jax.errors import ConclugenError

BATCH_BYTES = 2**26
"""Of a column that are decoded at a time."""


@contextlib.contextmanager
def _parquet_faults(path: Path) -> Iterator[None]:
    """All that pyarrow raises on damaged files -> one sentence."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, KeyError, IndexError) as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0][:300]
        raise ConclugenError(f"{path}: cannot be read as a Parquet file ({reason}); write it anew") from e


def open_parquet(path: Path, *, words: str | None = None) -> Any:
    """A ``pyarrow.parquet.ParquetFile``.

    Args:
      path: of the file.
      words: a column whose texts are to be held once each, however often they are repeated.

    Raises:
      ConclugenError: pyarrow is missing, the file is no Parquet file, or two columns have one name.
    """
    try:
        import pyarrow.parquet
    except ImportError as e:
        raise ConclugenError(f"{path}: Parquet needs pyarrow; pip install pyarrow") from e
    check_regular(path)
    stat = path.stat()
    _check_footer(path.absolute(), stat.st_ino, stat.st_mtime_ns, stat.st_size)
    with _parquet_faults(path):
        file = pyarrow.parquet.ParquetFile(path, read_dictionary=[words] if words else None)
        names = file.schema_arrow.names
    twice = [name for name, n in Counter(names).items() if n > 1]
    if twice:
        raise ConclugenError(f"{path}: column {twice[0]!r} is there twice; each needs a name of its own")
    return file


FOOTER = """
import sys
from pyarrow import parquet
found = parquet.ParquetFile(sys.argv[1]).metadata
for group in range(found.num_row_groups):
    for column in range(found.num_columns):
        found.row_group(group).column(column)
"""
"""Program that looks at what a Parquet file says of its columns."""


@functools.lru_cache(maxsize=4096)
def _check_footer(path: Path, *_version: int) -> None:
    """Let another process look at the footer first: pyarrow's C++ code aborts the one that meets some damaged ones.

    Raises:
      ConclugenError: that process was aborted. What pyarrow itself reports is left to where the file is read.
    """
    if not sys.executable:
        return
    command = [sys.executable, "-c", FOOTER, str(path)]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode < 0:
        said = done.stderr.strip().splitlines()
        reason = said[-1].strip().removeprefix("what():").strip()[:300] if said else f"signal {-done.returncode}"
        raise ConclugenError(f"{path}: cannot be read as a Parquet file ({reason}); write it anew")


def parquet_kinds(path: Path) -> dict[str, str]:
    """Name of each column of a Parquet file -> ``vectors`` (lists of numbers), ``values``, or its type if it is neither.

    Raises:
      ConclugenError: see :func:`open_parquet`.
    """
    return {field.name: _kind(field.type) for field in open_parquet(path).schema_arrow}


def _kind(column: Any) -> str:
    from pyarrow import types

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
    """All values of a column as text, nothing where it is null.

    Raises:
      ConclugenError: no such column, or one that cannot be read or holds neither text nor numbers.
    """
    file = _with_column(open_parquet(path), path, column)
    kind = _kind(file.schema_arrow.field(column).type)
    if kind != "values":
        raise ConclugenError(f"{path}: column {column!r} holds {kind}, expected text or numbers, one in each row")
    file = open_parquet(path, words=column)
    texts: list[str] = []
    with _parquet_faults(path):
        for chunk in file.read(columns=[column]).column(column).chunks:
            where = f"{path}, column {column!r}"
            if hasattr(chunk, "dictionary"):
                words = as_text(chunk.dictionary.to_pylist(), where)
                texts += ["" if i is None else words[i] for i in chunk.indices.to_pylist()]
            else:
                texts += as_text(chunk.to_pylist(), where)
    return texts


def parquet_vectors(path: Path, column: str, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray | None]]:
    """Lists of numbers, a few MiB at a time.

    Args:
      path: of the file.
      column: of lists, or of lists of lists.
      rows: int64 [n], ascending, each once.

    Yields:
      Each row and its array [dim] or [time, dim], None where the column is null.

    Raises:
      ConclugenError: no such column, or one that cannot be read.
    """
    file = _with_column(open_parquet(path), path, column)
    start = 0
    for group in range(file.num_row_groups):
        size = file.metadata.row_group(group).num_rows
        wanted = rows[np.searchsorted(rows, start) : np.searchsorted(rows, start + size)]
        if len(wanted):
            for row, value in _group_values(file, path, column, group, wanted - start):
                where = f"{path}, row {start + row}, column {column!r}"
                yield start + row, None if not value.is_valid else _numbers(value.values, where)
        start += size


def _group_values(file: Any, path: Path, column: str, group: int, wanted: np.ndarray) -> Iterator[tuple[int, Any]]:
    """Values at some rows of a row group."""
    rows = file.metadata.row_group(group).num_rows
    batch_rows = max(1, min(2**16, BATCH_BYTES * rows // _decoded(file, column, [group])))
    with _parquet_faults(path):
        start = 0
        for batch in file.iter_batches(batch_rows, row_groups=[group], columns=[column]):
            for row in wanted[np.searchsorted(wanted, start) : np.searchsorted(wanted, start + len(batch))].tolist():
                yield row, batch.column(0)[row - start]
            start += len(batch)
            if start > wanted[-1]:
                return
    raise ConclugenError(f"{path}: row group {group} holds fewer rows than the file declares; write it anew")


def _numbers(values: Any, where: str) -> np.ndarray:
    """A list's values [dim], or [time, dim] of a list of lists."""
    import pyarrow.compute
    from pyarrow import types

    shape: tuple[int, ...] = (len(values),)
    nulls = values.null_count
    if types.is_nested(values.type):
        dims = pyarrow.compute.unique(pyarrow.compute.list_value_length(values)).to_pylist() or [0]
        if len(dims) > 1:
            raise ConclugenError(f"{where}: lists of different lengths; expected (dim,) or (time, dim)")
        shape = (len(values), dims[0])
        values = values.flatten()
        nulls += values.null_count
    if nulls:
        raise ConclugenError(f"{where}: an empty value (null) within a list; a missing modality is null as a whole")
    return values.to_numpy(zero_copy_only=False).reshape(shape)


def _with_column(file: Any, path: Path, column: str) -> Any:
    """The file, if it has a column, and one that does not unpack beyond measure."""
    names = file.schema_arrow.names
    if column not in names:
        raise ConclugenError(f"{path}: no column {column!r}; it has {', '.join(names)}")
    unpacked = _decoded(file, column, range(file.num_row_groups))
    if unpacked > MOST_UNPACKED * max(path.stat().st_size, 2**20):
        raise ConclugenError(
            f"{path}: column {column!r} would unpack to {unpacked / 2**30:.1f} GiB, more than {MOST_UNPACKED} times the "
            "file's size; write it anew"
        )
    return file


def _decoded(file: Any, column: str, groups: Iterable[int]) -> int:
    """Bytes that a column takes once decoded, as the file declares; a value repeated on disk counts each time."""
    parts = [file.schema.column(i).path.split(".")[0] for i in range(len(file.schema))]
    wanted = [i for i, part in enumerate(parts) if part == column.split(".")[0]]
    chunks = (file.metadata.row_group(group).column(i) for group in groups for i in wanted)
    return 1 + sum(max(8 * chunk.num_values, chunk.total_uncompressed_size) for chunk in chunks)

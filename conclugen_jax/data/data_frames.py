"""Read data frames of pandas, Polars and Arrow as tables, by Arrow's C stream interface."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import types

from conclugen_jax.data.cells import Table, column_name
from conclugen_jax.data.files import as_text
from conclugen_jax.data.requests import Found
from conclugen_jax.errors import ConclugenError, reason


def is_frame(value: Any) -> bool:
    """Return whether a value is a data frame: of pandas since 2.2, Polars, Arrow or another library that exports Arrow."""
    return hasattr(value, "__arrow_c_stream__")


def labels(frame: Any, name: str = "data frame") -> Found:
    """Return a data frame as a table of labels, as if it had been read from a file; categories keep their order.

    Args:
      frame: data frame with the columns of a ``labels.csv``; in pandas the index may be the column ``id``.
      name: name of the data frame in messages.
    """
    if not is_frame(frame):
        raise ConclugenError(f"{name}: a {type(frame).__name__}, expected a data frame of pandas, Polars or Arrow")
    try:
        found = pa.table(frame)
    except (pa.ArrowException, ValueError, TypeError) as e:
        raise ConclugenError(f"{name}: Arrow cannot take its columns ({reason(e)}); make each of one type") from e
    names = list(map(column_name, found.column_names))
    if len(set(names)) < len(names):
        raise ConclugenError(f"{name}: columns {', '.join(names)}; give each a name of its own")
    columns, classes, of_pandas = {}, {}, b"pandas" in (found.schema.metadata or {})
    for column, values in zip(names, found.columns, strict=True):
        if types.is_dictionary(values.type) and (of_pandas or values.type.ordered):
            classes[column] = as_text(values.combine_chunks().dictionary.to_pylist(), f"{name}, {column!r}")
        columns[column] = as_text(values.to_pylist(), f"{name}, column {column!r}")
    where = [f"{name}, row {i}" for i in range(len(found))]
    digest = hashlib.sha256(json.dumps([columns, classes]).encode()).hexdigest()
    return Found({}, table=Table(Path(name), columns, where, classes=classes), facts={"labels_sha256": digest})

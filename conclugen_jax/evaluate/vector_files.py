"""Rows of vectors, as :func:`conclugen_jax.evaluate.embedding.embed` yields them, in one file."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from conclugen_jax.errors import ConclugenError
from conclugen_jax.system import files


def write(rows: Iterable[dict[str, np.ndarray]], output: Path) -> int:
    """Write rows to ``NAME.npz`` (put together in memory) or ``NAME.parquet`` (batch by batch), whole or not at all.

    Args:
      rows: batches, name of a column -> array [n, ...].
      output: the file.

    Returns:
      The number of rows.

    Raises:
      ConclugenError: no space, or not allowed.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with files.replaced(output) as scratch:
            return WRITERS[output.suffix](rows, scratch)
    except OSError as e:
        raise ConclugenError(
            f"--output={output}: cannot be written ({e.strerror or e}); free space or choose another file"
        ) from e


def _write_npz(rows: Iterable[dict[str, Any]], path: Path) -> int:
    chunks = list(rows)
    arrays = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
    np.savez(path, **arrays)
    return len(arrays["id"])


def _write_parquet(rows: Iterable[dict[str, Any]], path: Path) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer, count = None, 0
    try:
        for chunk in rows:
            table = pa.table({name: pa.array(list(x) if x.ndim > 1 else x) for name, x in chunk.items()})
            writer = writer or pq.ParquetWriter(path, table.schema)
            writer.write_table(table)
            count += len(table)
    finally:
        if writer is not None:
            writer.close()
    return count


WRITERS = {".npz": _write_npz, ".parquet": _write_parquet}

"""Files of arrays, read such that nothing in them is executed and no memory is taken that they do not hold."""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from conclugen_jax.errors import ConclugenError

MOST_UNPACKED = 200
"""Times its own size that an npz file may unpack to; arrays of features compress far less."""


def read_npy(path: Path) -> np.ndarray | None:
    """Array of an npy file, None if there is no such file.

    The size that the header declares is compared with the file's before memory is taken, and objects are refused:
    nothing in the file is executed.

    Raises:
      ConclugenError: not an npy file, truncated, or holding Python objects.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as e:
        raise ConclugenError(f"{path}: cannot be read ({e.strerror}); mend the file or its permissions") from e
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except Exception as e:  # NumPy parses the header as Python: damage ends in many kinds
        raise ConclugenError(f"{path}: not an npy file ({e}); write it with numpy.save") from e
    if dtype.hasobject:
        raise ConclugenError(f"{path}: holds Python objects, which are not read; save a plain array of numbers")
    if int(np.prod(shape, dtype=object)) * dtype.itemsize != len(data) - file.tell():
        raise ConclugenError(
            f"{path}: holds fewer or more bytes than its header declares; it is damaged, write it anew"
        )
    try:
        array = np.frombuffer(data, dtype, offset=file.tell())
        return array.reshape(shape[::-1]).T if fortran else array.reshape(shape)
    except (ValueError, TypeError) as e:
        raise ConclugenError(f"{path}: not an npy file ({e}); write it with numpy.save") from e


def map_npy(path: Path) -> np.ndarray:
    """Array of an npy file, memory-mapped.

    Raises:
      ConclugenError: no npy file of numbers.
    """
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except Exception as e:  # NumPy parses the header as Python: damage ends in many kinds
        raise ConclugenError(f"{path}: cannot be read as an npy file of numbers ({e}); write it with numpy.save") from e


def read_ids(path: Path) -> list[str]:
    """Lines of a text file, without spaces around them.

    Raises:
      ConclugenError: no UTF-8 text.
    """
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as e:
        raise ConclugenError(f"{path}: cannot be read ({e}); expected UTF-8 text with one id a line") from e


def npz_arrays(path: Path) -> Mapping[str, np.ndarray]:
    """All arrays of an npz file; nothing in it is executed.

    Raises:
      ConclugenError: no npz file, or one with Python objects.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > MOST_UNPACKED * max(path.stat().st_size, 2**20):
            raise ValueError(f"it would unpack to {unpacked / 2**30:.1f} GiB, more than {MOST_UNPACKED} times its size")
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as e:  # zipfile, zlib and NumPy raise many kinds for damaged files
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise ConclugenError(f"{path}: cannot be read as an npz file of plain arrays ({reason})") from e


def open_parquet(path: Path) -> Any:
    """A ``pyarrow.parquet.ParquetFile``.

    Raises:
      ConclugenError: pyarrow is missing, or the file is no Parquet file.
    """
    try:
        import pyarrow.parquet
    except ImportError as e:
        raise ConclugenError(f"{path}: Parquet needs pyarrow; pip install pyarrow") from e
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as e:
        raise ConclugenError(f"{path}: cannot be read as a Parquet file ({e})") from e


def parquet_column(path: Path, column: str) -> list[Any]:
    """All values of a column.

    Raises:
      ConclugenError: no such column.
    """
    file = open_parquet(path)
    names = file.schema_arrow.names
    if column not in names:
        raise ConclugenError(f"{path}: no column {column!r}; it has {', '.join(names)}")
    return file.read(columns=[column]).column(column).to_pylist()

"""Read files of arrays. Nothing in them is executed, and no more memory is taken than they hold."""

import contextlib
import io
import os
import stat
import weakref
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from conclugen_jax.errors import ConclugenError, reason

MOST_BYTES = 2**30  # that are read at once: the file of a clip, a row of a matrix; a sparse file can have any size
NPY = "write an array of numbers with numpy.save"
MOST_TEXT = 2**31  # bytes of a file of ids or labels
MOST_UNPACKED = 200  # times its own size that a packed file may unpack to; arrays of features compress far less


@contextlib.contextmanager
def readable(
    path: Path | str, way_out: str = "correct the file or its permissions", *, other: type[Exception] = OSError
) -> Iterator[None]:
    """Turn what the system or, of the kind ``other``, a library says of what cannot be read into one sentence."""
    try:
        yield
    except ConclugenError:
        raise
    except (OSError, other) as e:
        why = (getattr(e, "strerror", None) or reason(e)).splitlines()[0][:200]  # HDF5's may have several lines
        raise ConclugenError(f"{path}: cannot be read ({why}); {way_out}") from e


def entries(folder: Path) -> list[Path]:
    """Return what lies in a folder of few files, sorted, without hidden files."""
    with readable(folder, "name a folder of features"):
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file; a pipe may wait for ever, and a device has no end."""
    with readable(path):
        if not stat.S_ISREG(path.stat().st_mode):
            raise ConclugenError(f"{path}: not a regular file but a folder, pipe, socket or device; name a file")
        return path.open("rb")


def read_whole(path: Path, most: int = MOST_BYTES) -> bytes:
    """Return the content of a regular file of at most ``most`` bytes."""
    with open_regular(path) as file, readable(path):
        size = os.fstat(file.fileno()).st_size
        if size > most:
            found = f"{size / 2**30:.1f} GiB, expected at most {most / 2**30:g} GiB in a file of its kind"
            raise ConclugenError(f"{path}: {found}; split it up")
        return file.read()


def read_npy(path: Path) -> np.ndarray | None:
    """Return the array of an npy file, None if there is no such file; nothing in it is executed."""
    try:
        data = read_whole(path)
    except ConclugenError as e:
        if isinstance(e.__cause__, FileNotFoundError) and not path.is_symlink():
            return None
        raise
    file = io.BytesIO(data)
    shape, order, dtype = _npy_header(file, len(data), path)
    with readable(path, NPY, other=Exception):
        return np.frombuffer(data, dtype, offset=file.tell()).reshape(shape, order=order)


def _npy_header(file: BinaryIO, size: int, path: Path) -> tuple[tuple[int, ...], Literal["C", "F"], np.dtype]:
    """Read shape, order of the axes and type of an npy file; its ``size`` is compared with what it declares."""
    with readable(path, NPY, other=Exception):  # NumPy parses the header as Python: damage ends in many kinds
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise ConclugenError(f"{path}: holds Python objects, which are not read; save a plain array of numbers")
    declared = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if declared != size - file.tell() or min(shape, default=0) < 0:
        raise ConclugenError(f"{path}: holds fewer or more bytes than its header declares; write it again")
    return shape, "F" if fortran else "C", dtype


class NpyMatrix:
    """Rows of an npy file [n, ...], read from the open file when they are asked for.

    A memory map would end the process by a signal if the file were truncated meanwhile.
    """

    def __init__(self, path: Path):
        self.path = path
        with open_regular(path) as file:
            self.shape, self._order, self.dtype = _npy_header(file, os.fstat(file.fileno()).st_size, path)
            self._start = file.tell()
            self._file = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._file)
        self._count = int(np.prod(self.shape[1:], dtype=object))
        if self._count * self.dtype.itemsize > MOST_BYTES:
            raise ConclugenError(f"{path}: rows of shape {self.shape[1:]}, more than 1 GiB each; check the axes")

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, row: int) -> np.ndarray:
        """Return a row, of shape ``shape[1:]``."""
        if self._order == "C":
            data = self._bytes(row * self._count, self._count)
        else:
            data = b"".join(self._bytes(j * len(self) + row, 1) for j in range(self._count))
        return np.frombuffer(data, self.dtype).reshape(self.shape[1:], order=self._order)

    def _bytes(self, first: int, count: int) -> bytes:
        size = self.dtype.itemsize
        try:
            data = os.pread(self._file, count * size, self._start + first * size)
        except OSError as e:
            raise ConclugenError(f"{self.path}: cannot be read ({e.strerror}); correct the file") from e
        if len(data) < count * size:
            raise ConclugenError(f"{self.path}: has become shorter while it was read; build again")
        return data


def read_ids(path: Path) -> list[str]:
    """Return the lines of a text file, without spaces around them and without empty lines at the end."""
    with readable(path, "expected UTF-8 text with one id a line", other=UnicodeDecodeError):
        lines = [line.strip() for line in read_whole(path, MOST_TEXT).decode("utf-8-sig").rstrip().splitlines()]
    if "" in lines:
        raise ConclugenError(f"{path}, line {lines.index('') + 1}: empty; each row needs an id of its own")
    return lines


def npz_arrays(path: Path, only: Container[str] | None = None) -> Mapping[str, np.ndarray]:
    """Return the arrays of an npz file, all or those with some names; nothing in it is executed."""
    with (
        open_regular(path) as raw,
        readable(path, "write plain arrays with numpy.savez", other=Exception),  # damage ends in many kinds
        np.lib.npyio.NpzFile(raw, allow_pickle=False) as file,
    ):
        unpacked = sum(member.file_size for member in file.zip.infolist())
        if unpacked > MOST_UNPACKED * max(os.fstat(raw.fileno()).st_size, 2**20):
            size = f"{unpacked / 2**30:.1f} GiB"
            raise ValueError(f"it would unpack to {size}, more than {MOST_UNPACKED} times its size")
        arrays = {}
        for name, count in Counter(file.files).items():
            if count > 1:
                raise ValueError(f"{name!r} appears twice")
            if only is None or name in only:
                arrays[name] = file[name]
                if not isinstance(arrays[name], np.ndarray):  # NumPy returns bytes of what is no array
                    raise ValueError(f"{name!r} in it is no array")
        return arrays


def as_text(values: Iterable[Any], where: str) -> list[str]:
    """Return the values of a column as text that UTF-8 can write, "" for None."""
    texts: list[str] = []
    try:
        for value in values:
            text = value.decode() if isinstance(value, bytes) else "" if value is None else str(value)
            text.encode()
            texts.append(text)
    except (ValueError, SystemError) as e:  # UnicodeError; NumPy's own for what is no character at all
        raise ConclugenError(f"{where}, row {len(texts)}: no Unicode text ({e}); write the column as UTF-8") from e
    return texts

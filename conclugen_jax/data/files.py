"""Read files of arrays, without executing their content or allocating more memory than they fill."""

import contextlib
import io
import os
import re
import stat
import unicodedata
import weakref
import zipfile
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

PICTURES = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".flv", ".mpg", ".mpeg", ".m4v", ".wmv")
PICTURES += (".ts", ".mts", ".m2ts", ".3gp", ".ogv")
SOUNDS = (".wav", ".mp3", ".m4a", ".flac", ".ogg", ".aac", ".opus", ".wma")
MEDIA = PICTURES + SOUNDS  # endings of files that count as clips
STILLS = (".jpg", ".jpeg", ".png")  # endings of frames

AGAIN = "download or copy it again"
UNPACK = "unpack it and name what is in it"
STAND_INS: tuple[tuple[bytes, str, str, tuple[str, ...]], ...] = (
    (rb"version https://git-lfs\.github\.com/spec/", "a git-lfs pointer, not the file itself", "run git lfs pull", ()),
    (rb"\S*/annex/objects/", "a git-annex pointer, not the file itself", "run git annex get", ()),
    (rb"(?i:\s*<(?:!doctype html|html|head|body)\b)", "an HTML page, not the file itself", AGAIN, ()),
    (rb"\s*<\?xml\b", "an XML document, not the file itself", AGAIN, ()),
    (
        rb"(?i:\s*[a-z]\w+://\S+\s*\Z)|\[InternetShortcut\]",
        "a link, not the file itself",
        "download what it leads to",
        (),
    ),
    (
        rb"(?s:PK\x03\x04.{26}(?:\[Content_Types\]|_rels/|docProps/|xl/))|\xd0\xcf\x11\xe0",
        "a workbook",
        "save it as csv",
        (),
    ),
    (rb"PK\x03\x04", "a zip archive", UNPACK, (".npz", ".pth", ".pt", ".bin", ".ckpt", ".tar")),
    (rb"(?s:\x1f\x8b|BZh\d|\xfd7zXZ|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd|.{257}ustar)", "a packed file", UNPACK, ()),
    (rb"\x93NUMPY", "an npy file", "give it the ending .npy", (".npy",)),
    (rb"PAR1", "a Parquet file", "give it the ending .parquet", (".parquet",)),
    (rb"\x89HDF\r\n", "an HDF5 file", "write plain arrays with numpy.save", (".csd", ".h5", ".hdf5")),
    (rb"MATLAB \d", "a MATLAB file", "write plain arrays with numpy.save", ()),
    (rb"\x80[\x02-\x05]", "a pickle", "write plain arrays with numpy.save", (".pkl", ".pickle", ".pth", ".pt", ".bin")),
)
"""First bytes of files that often replace another file, with their kind, the way out, and the endings that they may have."""

_STAND_IN = re.compile(b"|".join(b"(%s)" % beginning for beginning, *_ in STAND_INS))
_TEXTS = (".csv", ".tsv", ".txt", ".srt", ".vtt", ".arff", ".yaml", ".yml", ".json", ".pkl", ".pickle")  # or may be


def stand_in(path: Path | str, begin: bytes | None = None) -> str:
    """Return which other kind of file this is, such as an error page, and the way out; an empty text if it may be right.

    Args:
      path: the file, which may be missing.
      begin: its first 512 bytes, which are read if they are not given.
    """
    try:
        if begin is None and os.path.isfile(path):
            with open(path, "rb") as file:
                begin = file.read(512)
        elif begin is None:
            begin = b"/annex/objects/" if "annex/objects/" in os.readlink(path) else b"\0"
    except OSError:
        return ""
    suffix = os.path.splitext(path)[1].lower()
    if match := _STAND_IN.match(begin):
        _, what, way_out, right = STAND_INS[match.lastindex - 1]
        return "" if suffix in right else f"is {what}; {way_out}"
    if not begin:
        return f"is empty (0 bytes); {AGAIN}"
    with contextlib.suppress(UnicodeDecodeError):
        line = begin.decode().strip().partition("\n")[0].strip()
        if line.isprintable() and suffix not in _TEXTS:
            return f"is text ({line[:60]!r}), not the file itself; {AGAIN}"
    return ""


@contextlib.contextmanager
def readable(
    path: Path | str, way_out: str = "correct the file or its permissions", *, other: type[Exception] = OSError
) -> Iterator[None]:
    """Turn read errors of the system, and of a library (type ``other``), into one sentence."""
    try:
        yield
    except ConclugenError:
        raise
    except (OSError, other) as e:
        why = (getattr(e, "strerror", None) or reason(e)).splitlines()[0][:200]  # HDF5's may have several lines
        raise ConclugenError(f"{path}: {stand_in(path) or f'cannot be read ({why}); {way_out}'}") from e


def entries(folder: Path) -> list[Path]:
    """Return the sorted paths in a folder, without hidden files; only for folders of few files."""
    with readable(folder, "name a folder of features"):
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def spelled(path: Path) -> Path:
    """Return a path as the disk spells it (accents composed or not); the path itself if there is no such file."""
    if str(path).isascii() or os.path.lexists(path):
        return path
    for form in ("NFC", "NFD"):  # before folders are listed, which may hold many files
        if os.path.lexists(other := unicodedata.normalize(form, str(path))):
            return Path(other)
    parent, name = spelled(path.parent), unicodedata.normalize("NFC", path.name)
    inside = os.listdir(parent) if parent.is_dir() else []
    return parent / next((each for each in inside if unicodedata.normalize("NFC", each) == name), path.name)


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file; a pipe may wait forever, and a device has no end."""
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
        content = file.read()
    if content and (found := stand_in(path, content[:512])):
        raise ConclugenError(f"{path}: {found}")
    return content


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
    """Read shape, order of the axes and type of an npy file; raise if its ``size`` differs from what it declares."""
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
            raise ConclugenError(f"{self.path}: became shorter during reading; build again")
        return data


def read_ids(path: Path) -> list[str]:
    """Return the lines of a text file, without spaces around them and without empty lines at the end."""
    with readable(path, "expected UTF-8 text with one id a line", other=UnicodeDecodeError):
        text = unicodedata.normalize("NFC", read_whole(path, MOST_TEXT).decode("utf-8-sig"))
    lines = [line.strip() for line in text.rstrip().splitlines()]
    if "" in lines:
        raise ConclugenError(f"{path}, line {lines.index('') + 1}: empty; each row needs an id of its own")
    return lines


def check_unpacked(archive: zipfile.ZipFile, raw: BinaryIO) -> None:
    """Refuse, by a ValueError, an archive that would unpack to far more than its size."""
    unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > MOST_UNPACKED * max(os.fstat(raw.fileno()).st_size, 2**20):
        size = f"{unpacked / 2**30:.1f} GiB"
        raise ValueError(f"it would unpack to {size}, more than {MOST_UNPACKED} times its size")


def npz_arrays(path: Path, only: Container[str] | None = None) -> Mapping[str, np.ndarray]:
    """Return the arrays of an npz file, all or those with some names; nothing in it is executed."""
    with (
        open_regular(path) as raw,
        readable(path, "write plain arrays with numpy.savez", other=Exception),  # damage ends in many kinds
        np.lib.npyio.NpzFile(raw, allow_pickle=False) as file,
    ):
        check_unpacked(file.zip, raw)
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
    """Return the values of a column as text that UTF-8 can write, with composed accents, "" for None."""
    texts: list[str] = []
    try:
        for value in values:
            text = value.decode() if isinstance(value, bytes) else "" if value is None else str(value)
            text.encode()
            texts.append(unicodedata.normalize("NFC", text))
    except (ValueError, SystemError) as e:  # UnicodeError; NumPy's own for what is no character at all
        raise ConclugenError(f"{where}, row {len(texts)}: no Unicode text ({e}); write the column as UTF-8") from e
    return texts

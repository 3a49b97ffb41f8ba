"""Files of our own: written whole or not at all, hashed, and read back as what they should be."""

import contextlib
import hashlib
import json
import os
import re
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from conclugen_jax.errors import ConclugenError

T = TypeVar("T")

SCRATCH = ".tmp-"
"""How the name of a scratch file begins."""


@contextlib.contextmanager
def replaced(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yield a scratch path whose file takes the place of ``path`` when the context ends without an error.

    The file is synced first, so that it is there whole or not at all even after a power cut. The scratch file is in the folder
    of ``path`` and has its ending. It is removed if the context fails, with ``OSError`` where there is no space or it is not
    allowed; what a killed process left of it is overwritten, unless the file is ``shared``: several processes may write it.
    """
    scratch = path.with_name(f"{SCRATCH}{uuid.uuid4().hex + path.suffix if shared else path.name}")
    try:
        yield scratch
        with scratch.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:  # also where a signal ends the run
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


def refuse_bucket(path: str | Path) -> None:
    """Refuse a URL as the folder of runs: object stores can neither lock nor rename."""
    if re.match(r"\w{2,}:/", str(path)):
        way_out = "name a folder on a disk, which several machines may share, and copy it afterwards"
        raise ConclugenError(f"{path}: runs cannot be kept in a bucket; {way_out}")


def write_atomically(path: Path, content: str | bytes, *, place: str = "--workdir") -> None:
    """Write a file (text as UTF-8) whole or not at all, or raise ``ConclugenError``; ``place`` is the option of its folder."""
    try:
        with replaced(path) as scratch:
            scratch.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as e:
        raise ConclugenError(f"{path}: cannot be written ({e.strerror}); free space or choose another {place}") from e


def write_json(path: Path, value: Any, *, place: str = "--workdir") -> None:
    """Write a JSON file atomically, indented; see :func:`write_atomically`."""
    write_atomically(path, json.dumps(value, indent=1) + "\n", place=place)


def read_json(path: Path, like: type[T], *, way_out: str) -> T:
    """Read a JSON file as a type, such as a ``msgspec.Struct``; ``dict[str, Any]`` for any object.

    A file that cannot be read, is not JSON, or lacks or mistypes a field, which is named, raises ``ConclugenError``, which
    ends with the ``way_out``.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe may wait forever
            raise ConclugenError(f"{path}: not a regular file but a folder, pipe, socket or device; {way_out}")
        return msgspec.convert(json.loads(path.read_text(encoding="utf-8")), like)
    except OSError as e:
        raise ConclugenError(f"{path}: cannot be read ({e.strerror}); {way_out}") from e
    except msgspec.ValidationError as e:
        raise ConclugenError(f"{path}: not as expected ({e}); {way_out}") from e
    except (ValueError, RecursionError) as e:
        raise ConclugenError(f"{path}: not valid JSON ({e}); {way_out}") from e


def size(folder: Path) -> int:
    """Return the bytes of all files below a folder, without those that are deleted meanwhile."""
    total = 0
    for root, _, names in os.walk(folder):  # which passes over folders that are gone by then
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(root, name)).st_size
    return total


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

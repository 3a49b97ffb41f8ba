"""Hashes of all files of a folder, kept in it as ``SHA256SUMS``, which ``sha256sum -c`` reads as well."""

import hashlib
import os
from pathlib import Path

SUMS = "SHA256SUMS"


def write(folder: Path) -> None:
    """Write the hashes of all files of a finished folder.

    Raises:
      OSError: no space, or not allowed.
    """
    lines = [f"{_hash(path)}  {path.relative_to(folder)}\n" for path in _files(folder)]
    scratch = folder / f".{SUMS}.tmp"
    with scratch.open("w", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, folder / SUMS)


def changed(folder: Path) -> str:
    """What differs from the hashes of a folder's files; empty if nothing does, or if they were never written."""
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError):
        return f"{SUMS} cannot be read"
    expected = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    if "" in expected:
        return f"{SUMS} has changed"
    found = {str(path.relative_to(folder)): path for path in _files(folder)}
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} is no part of it"
        try:
            if _hash(found[name]) != expected[name]:
                return f"{name} has changed"
        except OSError as e:
            return f"{name} cannot be read: {e.strerror}"
    return ""


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in (SUMS, f".{SUMS}.tmp"))


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

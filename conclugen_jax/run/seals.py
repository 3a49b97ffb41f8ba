"""Hashes of all files of a folder, kept in it as ``SHA256SUMS``, which ``sha256sum -c`` reads as well."""

from pathlib import Path

from conclugen_jax.system import files

SUMS = "SHA256SUMS"


def write(folder: Path) -> None:
    """Write the hashes of all files of a finished folder.

    Raises:
      OSError: no space, or not allowed.
    """
    lines = [f"{files.sha256(path)}  {name}\n" for name, path in _files(folder).items()]
    with files.replaced(folder / SUMS) as scratch:
        scratch.write_text("".join(lines), encoding="utf-8")


def changed(folder: Path) -> str:
    """Say what differs from the hashes of a folder; empty if nothing does, or if hashes were never written."""
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError):
        return f"{SUMS} cannot be read"
    expected = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    if "" in expected:
        return f"{SUMS} has changed"
    found = _files(folder)
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} is no part of it"
        try:
            if files.sha256(found[name]) != expected[name]:
                return f"{name} has changed"
        except OSError as e:
            return f"{name} cannot be read: {e.strerror}"
    return ""


def _files(folder: Path) -> dict[str, Path]:
    """Return the files of a folder by name, in order, without the hashes and what a killed process left of them."""
    paths = sorted(
        p for p in folder.rglob("*") if p.is_file() and p.name != SUMS and not p.name.startswith(files.SCRATCH)
    )
    return {str(path.relative_to(folder)): path for path in paths}

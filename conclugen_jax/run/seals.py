"""Hashes of all files of a folder, kept in it as ``SHA256SUMS``, which ``sha256sum -c`` reads as well."""

from pathlib import Path

from conclugen_jax.system import files

SUMS = "SHA256SUMS"


def write(folder: Path) -> None:
    """Write the hashes of all files of a finished folder; raise ``OSError`` where there is no space."""
    with files.replaced(folder / SUMS) as scratch:
        lines = [f"{files.sha256(folder / name)}  {name}\n" for name in _names(folder)]
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
    found = _names(folder)
    for name in sorted({*expected, *found}):
        if name not in found:
            return f"{name} is missing" if name else f"{SUMS} has changed"
        if name not in expected:
            return f"{name} is no part of it"
        try:
            if files.sha256(folder / name) != expected[name]:
                return f"{name} has changed"
        except OSError as e:
            return f"{name} cannot be read: {e.strerror}"
    return ""


def _names(folder: Path) -> list[str]:
    """Return the files of a folder, in order, without the hashes and what a killed process left of them."""
    kept = (p for p in folder.rglob("*") if p.is_file() and p.name != SUMS and not p.name.startswith(files.SCRATCH))
    return sorted(str(path.relative_to(folder)) for path in kept)

"""Claim the place of a data set: one process builds it at a time, and it gets its final name only when complete."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from conclugen_jax.errors import ConclugenError
from conclugen_jax.system import locks


@contextlib.contextmanager
def claimed(target: Path) -> Iterator[Path]:
    """Own a data set's place while the context lasts, on any machine and in any container.

    Anything else there was left by builds that were killed, and is cleaned up first.

    Args:
      target: ``DATA_DIR/NAME/VERSION``; DATA_DIR is made if needed.

    Yields:
      An empty scratch folder in DATA_DIR, removed after.

    Raises:
      ConclugenError: another process is building this data set.
      OSError: DATA_DIR cannot be written.
    """
    data_dir, prefix, old = target.parent.parent, f".building-{target.parent.name}-{target.name}", _aside(target)
    data_dir.mkdir(parents=True, exist_ok=True)
    try:
        with locks.hold(data_dir / f"{prefix}.lock"):
            if old.exists() and not target.exists():  # a kill in the middle of a replacement
                os.replace(old, target)
            for path in (*data_dir.glob(f"{prefix}-*"), old):
                shutil.rmtree(path, ignore_errors=True)
            # The name is unique because workers of a killed build may run for another second.
            with tempfile.TemporaryDirectory(prefix=f"{prefix}-", dir=data_dir, ignore_cleanup_errors=True) as scratch:
                yield Path(scratch)
    except locks.Busy as e:
        way_out = "wait until it is there, or choose another name, version or --data_dir"
        raise ConclugenError(f"{target}: being built by {e}; {way_out}") from None


def swap(built: Path, target: Path) -> None:
    """Put the finished folder in place; move an old one aside first, back if that fails, and delete it after."""
    old = _aside(target)
    if target.exists():
        os.replace(target, old)
    try:
        os.replace(built, target)
    except OSError:
        if old.exists():
            os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _aside(target: Path) -> Path:
    return target.with_name(f".replaced-{target.name}")

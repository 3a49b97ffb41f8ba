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
    """Own a data set's place while the context lasts.

    Only the holder of the lock builds this data set, on any machine or in any container. Anything else there was left by
    builds that were killed, and is cleaned up first.

    Args:
      target: ``DATA_DIR/NAME/VERSION``; DATA_DIR is made if needed.

    Yields:
      An empty scratch folder in DATA_DIR, removed after.

    Raises:
      ConclugenError: another process is building this data set.
      OSError: DATA_DIR cannot be written.
    """
    data_dir, prefix = target.parent.parent, f".building-{target.parent.name}-{target.name}"
    data_dir.mkdir(parents=True, exist_ok=True)
    try:
        with locks.hold(data_dir / f"{prefix}.lock"):
            for path in data_dir.glob(f"{prefix}-*"):
                shutil.rmtree(path, ignore_errors=True)
            _restore_interrupted_swap(target)
            # The name is unique because workers of a killed build may run for another second.
            with tempfile.TemporaryDirectory(prefix=f"{prefix}-", dir=data_dir, ignore_cleanup_errors=True) as scratch:
                yield Path(scratch)
    except locks.Busy as e:
        raise ConclugenError(
            f"{target}: being built by {e}; wait until it is there, or choose another name, version or --data_dir"
        ) from None


def swap(built: Path, target: Path) -> None:
    """Put the finished folder in place; move an old one aside first, back if that fails, and delete it after.

    Raises:
      OSError: one of the moves failed.
    """
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


def _restore_interrupted_swap(target: Path) -> None:
    """After a kill in the middle of a replacement, restore the old data set, or delete it if the new one is in place."""
    old = _aside(target)
    if old.exists() and not target.exists():
        os.replace(old, target)
    elif old.exists():
        shutil.rmtree(old, ignore_errors=True)

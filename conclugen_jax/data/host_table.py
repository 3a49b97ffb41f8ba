"""All rows of a split as arrays: in memory, or in memory-mapped files beside the shards, made once.

The files lie in ``DATA_SET/cache/SPLIT``. They belong to one manifest, whose hash is noted beside them with their own;
whatever does not fit is made anew from the shards.
"""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from conclugen_jax.data import manifest as manifest_lib
from conclugen_jax.data.shards import ShardStream, Variants
from conclugen_jax.errors import ConclugenError
from conclugen_jax.types import Rows

CHUNK_ROWS = 1024  # records decoded at a time while a table is filled
FOLDER = "cache"

Progress = Callable[[int, int], None] | None


class HostTable:
    """All rows of a split on the host, one array per modality."""

    tier = "host"

    def __init__(self, table: Rows, usable: np.ndarray):
        self.table, self.usable = table, usable
        self.num_examples = len(table["label"])
        self.variants = {m: x.shape[1] for m, x in table["features"].items() if x.ndim == 3}

    def rows(self, indices: np.ndarray, variants: Variants | None = None) -> Rows:
        """Rows at the given indices, in that order; see :class:`conclugen_jax.data.shards.RowSource`."""
        wanted = dict.fromkeys(self.variants, np.zeros(len(indices), int)) | dict(variants or {})
        features = {
            m: x[per_variant(indices, wanted[m]), wanted[m]] if m in wanted else x[indices]
            for m, x in self.table["features"].items()
        }
        others = {k: v for k, v in self.table.items() if k != "features"}
        return {"features": features, **map_arrays(lambda x: x[indices], others)}


class DeviceTable(HostTable):
    """A host table that the training loop copies to the device once; batches are then indices only."""

    tier = "device"


def read(stream: ShardStream, *, progress: Progress = None) -> Rows:
    """All rows of a split in memory, read a chunk at a time."""
    table = None
    for start, chunk in _chunks(stream, progress):
        if table is None:
            table = map_arrays(lambda x: np.empty((stream.num_examples, *x.shape[1:]), x.dtype), chunk)
        fill(table, chunk, start)
    return table


def mapped(stream: ShardStream, *, progress: Progress = None) -> Rows:
    """All rows of a split, memory-mapped; in memory where the files cannot be written."""
    folder = stream.dataset.path / FOLDER / stream.split
    labels = f"label.{stream.target}"  # no modality has a dot in its name; the main label's is empty
    names = (*(_column(stream, m) for m in stream.modalities), labels)
    if not all(_is_intact(stream, folder, name) for name in names):
        try:
            _make(stream, folder, labels, progress)
        except OSError as e:
            logging.getLogger(__name__).warning(
                "%s: the host table cannot be kept there (%s); it is read into memory", folder, e.strerror or e
            )
            return read(stream, progress=progress)
    columns = {name: np.lib.format.open_memmap(folder / f"{name}.npy", mode="r") for name in names}
    return {
        "features": {m: columns[_column(stream, m)] for m in stream.modalities},
        "present": {m: stream.presence[:, c] for c, m in enumerate(stream.modalities)},
        "label": columns[labels],
    }


def _column(stream: ShardStream, modality: str) -> str:
    """Name of the files of a modality: those of all variants are others than those of variant 0."""
    return f"{modality}.variants" if modality in stream.variants else modality


def _is_intact(stream: ShardStream, folder: Path, name: str) -> bool:
    """Whether a file is there and is what was written for this very manifest."""
    path = folder / f"{name}.npy"
    try:
        facts = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        fits = facts["manifest"] == stream.dataset.manifest.fingerprint() and facts["bytes"] == path.stat().st_size
        if fits and stream.dataset.verified == "hash":
            fits = facts["sha256"] == manifest_lib.sha256(path)
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError, ConclugenError):
        fits = False
    if not fits:
        logging.getLogger(__name__).warning("%s: damaged, or of other data; it is made anew from the shards", path)
    return fits


def _make(stream: ShardStream, folder: Path, labels: str, progress: Progress) -> None:
    """Write the files of all columns; each appears under its name when complete, its facts after it."""
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".making-", dir=folder))
    try:
        files = {}
        for start, chunk in _chunks(stream, progress):
            features = {_column(stream, m): x for m, x in chunk["features"].items()}
            for name, x in {**features, labels: chunk["label"]}.items():
                if name not in files:
                    shape = (stream.num_examples, *x.shape[1:])
                    files[name] = np.lib.format.open_memmap(scratch / f"{name}.npy", "w+", x.dtype, shape)
                    _reserve(scratch / f"{name}.npy")
                files[name][start : start + len(x)] = x
        for name, x in files.items():
            x.flush()
            path = scratch / f"{name}.npy"
            facts = {"manifest": stream.dataset.manifest.fingerprint(), "bytes": path.stat().st_size}
            facts["sha256"] = manifest_lib.sha256(path)
            (scratch / f"{name}.json").write_text(json.dumps(facts), encoding="utf-8")
            for suffix in ("npy", "json"):
                os.replace(scratch / f"{name}.{suffix}", folder / f"{name}.{suffix}")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _reserve(path: Path) -> None:
    """Take the disk space of a file at once: writing to memory mapped on a full disk would end the process."""
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, file.seek(0, os.SEEK_END))


def _chunks(stream: ShardStream, progress: Progress) -> Iterator[tuple[int, Rows]]:
    """Consecutive rows of a split with the index of the first."""
    n = stream.num_examples
    for start in range(0, n, CHUNK_ROWS):
        stop = min(start + CHUNK_ROWS, n)
        every = {m: np.tile(np.arange(number), (stop - start, 1)) for m, number in stream.variants.items()}
        yield start, stream.rows(np.arange(start, stop), every)
        if progress is not None:
            progress(stop, n)


def per_variant(indices: Any, variants: Any) -> Any:
    """Row indices [n] in the shape of the variants asked for, [n] or [n, k]; NumPy or JAX."""
    return indices[:, None] if variants.ndim == 2 else indices


def map_arrays(fn: Callable[[np.ndarray], np.ndarray], rows: Rows) -> Rows:
    """Apply a function to every array of some rows."""
    return {k: {m: fn(x) for m, x in v.items()} if isinstance(v, dict) else fn(v) for k, v in rows.items()}


def fill(table: Rows, chunk: Rows, start: int) -> None:
    """Write consecutive rows into a table from row ``start`` on."""
    for key, value in chunk.items():
        for modality, x in value.items() if isinstance(value, dict) else [(None, value)]:
            target = table[key] if modality is None else table[key][modality]
            target[start : start + len(x)] = x

"""Choose the rows of each batch, and where rows are kept.

The order of examples is a function of (seed, epoch) alone, and the step number is the position in that order. It does not
depend on the number of devices or on where the rows are kept: in a table on the device or on the host, or in the shards.

Large tables are memory-mapped files in ``DATA_SET/cache/SPLIT``, written once. Beside each file stand its hash and the hash of
the manifest it belongs to. If either does not match, the file is rebuilt from the shards.
"""

import concurrent.futures
import contextlib
import logging
import os
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from conclugen_jax.data.shards import Rows, RowSource, ShardStream, Variants
from conclugen_jax.system import files, locks

CHUNK_ROWS = 1024  # records that are decoded together
FOLDER = "cache"

LOG = logging.getLogger(__name__)
Progress = Callable[[int, int], None] | None
Columns = Mapping[str, tuple[tuple[int, ...], np.dtype]]
"""File name -> shape and type of its array."""


class Facts(msgspec.Struct):
    """What is noted beside a file: fingerprint of the manifest it belongs to, its own size and SHA-256."""

    manifest: str
    bytes: int
    sha256: str


class HostTable:
    """All rows of a split on the host, one array per modality; a :class:`conclugen_jax.data.shards.RowSource`.

    The training loop copies a table of the tier ``device`` to the device once. Batches then consist of indices only.
    """

    def __init__(self, table: Rows, usable: np.ndarray, *, tier: str = "host"):
        self.table, self.usable, self.tier = table, usable, tier
        self.num_examples = len(table["label"])
        self.variants = {m: x.shape[1] for m, x in table["features"].items() if x.ndim == 3}

    def rows(self, indices: np.ndarray, variants: Variants | None = None) -> Rows:
        """Return rows at the given indices, in that order."""
        wanted = dict.fromkeys(self.variants, np.zeros(len(indices), int)) | dict(variants or {})
        features = {
            m: x[per_variant(indices, wanted[m]), wanted[m]] if m in wanted else x[indices]
            for m, x in self.table["features"].items()
        }
        others = {k: v for k, v in self.table.items() if k != "features"}
        return {"features": features, **map_arrays(lambda x: x[indices], others)}


def load(
    stream: ShardStream,
    *,
    tier: str = "auto",
    device_table_gib: float = 0.0,
    host_table_gib: float = 0.0,
    host_cache_gib: float = float("inf"),
    progress: Progress = None,
) -> RowSource:
    """Fill the table of a split, or leave its rows in the shards.

    Args:
      stream: the split.
      tier: ``device``, ``host``, ``shards``, or ``auto``: the first of these whose limit holds the split.
      device_table_gib: limit of the device table, GiB.
      host_table_gib: limit of the host table, GiB.
      host_cache_gib: from this size on, in GiB, a table is kept in memory-mapped files beside the shards.
      progress: called with the rows read and all rows while a table is filled.

    Raises:
      ConclugenError: a record that cannot be read.
    """
    tier = choose_tier(tier, stream.gib, device_table_gib=device_table_gib, host_table_gib=host_table_gib)
    if tier == "shards":
        return stream
    fill = mapped if stream.gib >= host_cache_gib else read
    return HostTable(fill(stream, progress=progress), stream.usable, tier=tier)


def choose_tier(tier: str, gib: float, *, device_table_gib: float, host_table_gib: float) -> str:
    """Return ``tier``, or for ``auto`` the first of device, host and shards that holds ``gib`` GiB."""
    if tier != "auto":
        return tier
    return "device" if gib <= device_table_gib else "host" if gib <= host_table_gib else "shards"


def read(stream: ShardStream, *, progress: Progress = None) -> Rows:
    """Read all rows of a split into memory, a chunk at a time; a ConclugenError names a record that cannot be read."""
    table = {name: np.empty(shape, dtype) for name, (shape, dtype) in _columns(stream).items()}
    _fill(stream, table, progress)
    return _rows(stream, table)


def mapped(stream: ShardStream, *, progress: Progress = None) -> Rows:
    """Return the same as :func:`read`, memory-mapped if the files can be written."""
    folder, columns = stream.dataset.path / FOLDER / stream.split, _columns(stream)
    table = _stored(stream, folder, columns)
    if table is None:
        try:
            table = _make(stream, folder, columns, progress)
        except OSError as e:
            LOG.warning("%s: the host table cannot be kept there (%s); it is read into memory", folder, e.strerror or e)
            return read(stream, progress=progress)
    return _rows(stream, table)


def _chunk(stream: ShardStream, start: int, stop: int) -> dict[str, np.ndarray]:
    """Read consecutive rows, with every variant, by file name; all variants and variant 0 alone have different files."""
    variants = {m: np.tile(np.arange(number), (stop - start, 1)) for m, number in stream.variants.items()}
    rows = stream.rows(np.arange(start, stop), variants)
    # No modality has a dot in its name, and the main label's ends with one.
    of = {m: f"{m}.{stream.affine.fingerprint[:16]}" for m in stream.affine.shift} if stream.affine else {}
    features = {of.get(m, m) + ".variants" * (m in variants): x for m, x in rows["features"].items()}
    return {**features, f"label.{stream.target}": rows["label"]}


def _columns(stream: ShardStream) -> Columns:
    return {name: ((stream.num_examples, *x.shape[1:]), x.dtype) for name, x in _chunk(stream, 0, 1).items()}


def _rows(stream: ShardStream, table: Mapping[str, np.ndarray]) -> Rows:
    """Return a table by file name, in the order of :func:`_chunk`, as rows."""
    *features, label = table.values()
    return {
        "features": dict(zip(stream.modalities, features, strict=True)),
        "present": {m: stream.presence[:, c] for c, m in enumerate(stream.modalities)},
        "label": label,
    }


def _stored(stream: ShardStream, folder: Path, columns: Columns) -> dict[str, np.ndarray] | None:
    """Map the files of all columns; return None if one is missing or was not written for this manifest."""
    table = {}
    for name, (shape, dtype) in columns.items():
        path = folder / f"{name}.npy"
        try:
            # Open the file first: a writer removes the facts before it replaces the file, so these facts are the file's.
            table[name] = x = np.lib.format.open_memmap(path, mode="r")
            facts = msgspec.json.decode((folder / f"{name}.json").read_bytes(), type=Facts)
            fits = facts.manifest == stream.dataset.manifest.fingerprint() and facts.bytes == path.stat().st_size
            # A damaged header may still be readable.
            fits = fits and (x.shape, x.dtype.str, x.flags.c_contiguous) == (shape, dtype.str, True)
            fits = fits and (stream.dataset.verified != "hash" or facts.sha256 == files.sha256(path))
        except FileNotFoundError:
            return None
        except Exception:  # NumPy parses the header as Python, so damage raises many kinds
            fits = False
        if not fits:
            LOG.warning("%s: damaged, or of other data; it is made again from the shards", path)
            return None
    return table


def _make(stream: ShardStream, folder: Path, columns: Columns, progress: Progress) -> dict[str, np.ndarray]:
    """Write the files of all columns; if another process is doing so, wait and use its files."""
    folder.mkdir(parents=True, exist_ok=True)
    waited = []

    def wait(holder: str) -> None:
        waited.append(holder)
        LOG.warning("%s: being made by %s; waiting for it", folder, holder)

    with locks.hold(folder / ".lock", wait=wait):
        for path in folder.glob(f"{files.SCRATCH}*"):  # left by a process that was killed: only one has the lock
            path.unlink()
        if waited and (table := _stored(stream, folder, columns)) is not None:
            return table
        table, paths, facts = {}, {}, {}
        with contextlib.ExitStack() as stack:
            for name, (shape, dtype) in columns.items():
                paths[name] = stack.enter_context(files.replaced(folder / f"{name}.npy"))
                table[name] = np.lib.format.open_memmap(paths[name], "w+", dtype, shape)
                _reserve(paths[name])
            _fill(stream, table, progress)
            for name, path in paths.items():
                table[name].flush()
                facts[name] = Facts(stream.dataset.manifest.fingerprint(), path.stat().st_size, files.sha256(path))
            for name in columns:
                (folder / f"{name}.json").unlink(missing_ok=True)
        for name, each in facts.items():
            with files.replaced(folder / f"{name}.json") as path:
                path.write_bytes(msgspec.json.encode(each))
        return {name: np.lib.format.open_memmap(folder / f"{name}.npy", mode="r") for name in columns}


def _reserve(path: Path) -> None:
    """Allocate the disk space of a file now: a full disk would later end the process in the middle of a mapped write."""
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, file.seek(0, os.SEEK_END))


def _fill(stream: ShardStream, table: Mapping[str, np.ndarray], progress: Progress) -> None:
    """Read all rows into the arrays of a table, a chunk at a time."""
    for start in range(0, stream.num_examples, CHUNK_ROWS):
        stop = min(start + CHUNK_ROWS, stream.num_examples)
        for name, x in _chunk(stream, start, stop).items():
            table[name][start:stop] = x
        if progress is not None:
            progress(stop, stream.num_examples)


def per_variant(indices: Any, variants: Any) -> Any:
    """Return row indices [n] in the shape of the variants asked for, [n] or [n, k]; NumPy or JAX."""
    return indices[:, None] if variants.ndim == 2 else indices


def map_arrays(fn: Callable[[np.ndarray], np.ndarray], rows: Rows) -> Rows:
    """Apply a function to every array of some rows."""
    return {k: {m: fn(x) for m, x in v.items()} if isinstance(v, dict) else fn(v) for k, v in rows.items()}


@np.errstate(over="ignore")  # arithmetic modulo 2**32 is meant, here and below
def epoch_order(seed: Any, epoch: Any, num_examples: int, *, xp: Any = np) -> Any:
    """Return a permutation of 0..num_examples-1 that depends on (seed, epoch) alone.

    Positions are sorted by a 32-bit hash of (seed, epoch, position), equal hashes by position: the same on every
    machine and in every release of NumPy, and with ``xp=jax.numpy`` the same on a device (both may be traced).
    """
    key = _stream_key(seed, epoch, xp)
    positions = xp.arange(num_examples, dtype=xp.uint32)
    hashes = _mix(_mix(positions ^ key) + _mix(key + np.uint32(0x6C8E9CF5)))
    return hashes.argsort(kind="stable") if xp is np else xp.argsort(hashes, stable=True)


def _stream_key(seed: Any, epoch: Any, xp: Any) -> Any:
    seed, epoch = (xp.asarray([x], dtype=xp.uint32) for x in (seed, epoch))
    return _mix(_mix(seed + np.uint32(0x9E3779B9)) ^ (epoch * np.uint32(0x85EBCA6B) + np.uint32(1)))


def _mix(x: Any) -> Any:
    """Map 32-bit integers one to one; every input bit changes half of the output bits on average."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def batch_indices(
    usable: np.ndarray, *, seed: int, epoch: int, first_step: int, num_steps: int, batch_size: int
) -> np.ndarray:
    """Return row indices, int32 [num_steps, batch_size], of consecutive training steps of an epoch, counted from 0.

    They are drawn from the rows ``usable``; ``first_step`` is within the epoch, and only whole batches exist.
    """
    order = usable[epoch_order(seed, epoch, len(usable))]
    return order[first_step * batch_size :][: num_steps * batch_size].reshape(num_steps, batch_size).astype(np.int32)


@np.errstate(over="ignore")
def variant_choices(
    indices: Any, variants: Mapping[str, int], *, seed: int, epoch: Any, pairs: Collection[str] = (), xp: Any = np
) -> dict[str, Any]:
    """Choose the stored variant of each row that an epoch visits, by a hash of (seed, epoch, row, modality).

    Args:
      indices: of the rows, any shape; with an epoch on a device ``xp`` is ``jax.numpy``.
      variants: modality -> number of stored variants.
      seed: of the run.
      epoch: counted from 0.
      pairs: modalities that get two different variants of a row.
      xp: ``numpy`` or ``jax.numpy``.

    Returns:
      modality -> int32 in the shape of the indices; with one more axis, of 2, for pairs.
    """
    choices = {}
    for m, number in variants.items():
        key = _mix(_stream_key(seed, epoch, xp) + np.uint32(zlib.crc32(m.encode())))
        hashes = _mix(_mix(indices.astype(xp.uint32) ^ key) + key)
        first = hashes % np.uint32(number)
        if m in pairs:
            further = np.uint32(1) + _mix(hashes) % np.uint32(number - 1)
            first = xp.stack([first, (first + further) % np.uint32(number)], axis=-1)
        choices[m] = first.astype(xp.int32)
    return choices


@np.errstate(over="ignore")
def neighbour_choices(
    indices: Any, near: Any, modalities: Collection[str], *, probability: float, seed: int, epoch: Any, xp: Any = np
) -> dict[str, Any]:
    """Choose for each row and modality, independently, whether a neighbour takes its place, and which.

    By a hash of (seed, epoch, row, modality), as variants are chosen.

    Args:
      indices: of the rows, any shape.
      near: rows of their neighbours, one axis more; below 0 where there are fewer.
      modalities: that neighbours may give.
      probability: that one does.
      seed: of the run.
      epoch: counted from 0; on a device ``xp`` is ``jax.numpy``.
      xp: ``numpy`` or ``jax.numpy``.

    Returns modality -> rows, int32 in the shape of the indices.
    """
    choices, number = {}, near.shape[-1]
    for m in modalities:
        key = _mix(_stream_key(seed, epoch, xp) + np.uint32(zlib.crc32(f"neighbours of {m}".encode())))
        hashes = _mix(_mix(indices.astype(xp.uint32) ^ key) + key)
        which = (_mix(hashes) % np.uint32(number)).astype(xp.int32)
        candidate = xp.take_along_axis(near, which[..., None], axis=-1)[..., 0]
        taken = (hashes < np.uint32(min(probability * 2**32, 2**32 - 1))) & (candidate >= 0)
        choices[m] = xp.where(taken, candidate, indices).astype(xp.int32)
    return choices


def evaluation_batches(indices: np.ndarray, batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Cut indices into batches of one size, in order: (indices [batch_size], number of them that count).

    The last batch is padded with its own first row. Drop the results beyond the count.
    """
    for start in range(0, len(indices), batch_size):
        part = indices[start : start + batch_size]
        filled = np.concatenate([part, np.repeat(part[:1], batch_size - len(part))])
        yield filled, len(part)


def prefetch(make: Callable[[Any], Any], items: Iterable[Any], depth: int = 2) -> Iterator[Any]:
    """Compute ``map(make, items)`` in a thread, up to ``depth`` items ahead; re-raise the exceptions of ``make``."""
    with concurrent.futures.ThreadPoolExecutor(1, "prefetch") as thread:
        waiting: deque[concurrent.futures.Future] = deque()
        try:
            for item in items:
                waiting.append(thread.submit(make, item))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            thread.shutdown(cancel_futures=True)

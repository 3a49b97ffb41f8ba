"""From shards to rows: which rows make which batch, and where the rows are kept.

The order of examples is a function of (seed, epoch) alone: the position in the stream is the step number, whatever
the number of devices and wherever the rows are kept (device table, host table, or the shards on disk).
"""

import dataclasses
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tensorflow_datasets as tfds

from conclugen_jax.data import builders
from conclugen_jax.data import manifest as manifest_lib
from conclugen_jax.data.manifest import Manifest
from conclugen_jax.errors import ConclugenError
from conclugen_jax.types import Rows

CHUNK_ROWS = 1024  # records decoded at a time while a table is filled


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A built data set whose files were compared with its manifest.

    Attributes:
      path: its folder.
      manifest: content of its manifest.
    """

    path: Path
    manifest: Manifest


def open_dataset(path: str | Path, *, verify: str = "hash") -> Dataset:
    """Read and verify the manifest of a built data set.

    Args:
      path: the folder ``DATA_DIR/NAME/VERSION``.
      verify: ``hash`` or ``size``, see :func:`conclugen_jax.data.manifest.verify`.

    Raises:
      ConclugenError: no data set there, or a file that differs from the manifest.
    """
    manifest = manifest_lib.read(path)
    manifest_lib.verify(path, manifest, level=verify)
    return Dataset(Path(path), manifest)


class RowSource(Protocol):
    """Rows of one split by index."""

    tier: str
    num_examples: int
    usable: np.ndarray  # int64, the rows that have at least one of the modalities, in the split's order

    def rows(self, indices: np.ndarray) -> Rows:
        """Rows at the given indices, in that order."""


class ShardStream:
    """Rows read from the shards when they are asked for: random access, nothing kept."""

    tier = "shards"

    def __init__(self, dataset: Dataset, split: str, modalities: Sequence[str]):
        manifest = dataset.manifest
        where = f"data set {dataset.path}"
        manifest_lib.choose(manifest.splits, [split], what="split", where=where)
        self.modalities = tuple(manifest_lib.choose(manifest.modalities, modalities, what="modality", where=where))
        self.label_kind, self.where = manifest.label.kind, f"{where}, split {split!r}"
        self.num_examples = manifest.splits[split]["num_examples"]
        self.source = _data_source(dataset, split)
        if len(self.source) != self.num_examples:
            raise ConclugenError(
                f"{where}: split {split!r} has {len(self.source)} records, the manifest says {self.num_examples}; build it anew"
            )
        columns = [list(manifest.modalities).index(m) for m in self.modalities]
        self.presence = _read_presence(dataset, split, len(manifest.modalities), self.num_examples)[:, columns]
        self.usable = np.flatnonzero(self.presence.any(axis=1))
        if not self.usable.size:
            raise ConclugenError(
                f"{where}: no row of split {split!r} has any of the modalities {list(modalities)}; name others"
            )
        self.gib = self.num_examples * sum(manifest.modalities[m] for m in self.modalities) * 4 / 2**30

    def rows(self, indices: np.ndarray) -> Rows:
        """Rows at the given indices, in that order."""
        records = self._records(indices)
        return {
            "features": {m: np.stack([r["features"][m] for r in records]) for m in self.modalities},
            "present": {m: self.presence[indices, c] for c, m in enumerate(self.modalities)},
            "label": self._labels(records),
        }

    def names(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids and groups of the rows, two string arrays."""
        records = self._records(indices)
        return tuple(np.array([r[key].decode() for r in records]) for key in ("id", "group"))

    def _records(self, indices: np.ndarray) -> list[Any]:
        try:
            return self.source.__getitems__([int(i) for i in indices])
        except Exception as e:  # array_record and TFDS raise many kinds for content that is not what was written
            reason = (str(e).strip() or type(e).__name__).splitlines()[0][:200]
            raise ConclugenError(f"{self.where}: a record cannot be read ({reason}); build the data set anew") from e

    def _labels(self, records: Sequence[Any]) -> np.ndarray:
        if self.label_kind == "single":
            return np.array([r["label"] for r in records], np.int64)
        if self.label_kind == "multi":
            return np.stack([r["label"] for r in records])
        return np.zeros((len(records), 0), np.float32)


class HostTable:
    """All rows of a split in host memory, one contiguous array per modality."""

    tier = "host"

    def __init__(self, table: Rows, usable: np.ndarray):
        self.table, self.usable = table, usable
        self.num_examples = len(table["label"])

    @classmethod
    def read(cls, stream: ShardStream) -> "HostTable":
        """Fill a table from the shards, a chunk at a time."""
        n, table = stream.num_examples, None
        for start in range(0, n, CHUNK_ROWS):
            chunk = stream.rows(np.arange(start, min(start + CHUNK_ROWS, n)))
            if table is None:
                table = map_arrays(lambda x: np.empty((n, *x.shape[1:]), x.dtype), chunk)
            fill(table, chunk, start)
        return cls(table, stream.usable)

    def rows(self, indices: np.ndarray) -> Rows:
        """Rows at the given indices, in that order."""
        return map_arrays(lambda x: x[indices], self.table)


class DeviceTable(HostTable):
    """A host table that the training loop moves to the device once; batches are then indices only."""

    tier = "device"


TABLES = {"host": HostTable, "device": DeviceTable}


def open_split(
    dataset: Dataset, split: str, modalities: Sequence[str], *, tier: str = "auto", **limits: float
) -> RowSource:
    """Rows of a split, kept where :func:`load` says.

    Args:
      dataset: as opened.
      split: its name.
      modalities: those to read, in this order.
      tier: see :func:`load`.
      **limits: see :func:`load`.

    Raises:
      ConclugenError: unknown split or modality, or a split without usable rows.
    """
    return load(ShardStream(dataset, split, modalities), tier=tier, **limits)


def load(
    stream: ShardStream, *, tier: str = "auto", device_table_gib: float = 0.0, host_table_gib: float = 0.0
) -> RowSource:
    """Fill the table of a split, or leave the rows in the shards.

    Args:
      stream: the split.
      tier: ``device``, ``host``, ``shards``, or ``auto``: the first of these whose limit holds the split.
      device_table_gib: limit of the device table, GiB.
      host_table_gib: limit of the host table, GiB.
    """
    tier = choose_tier(tier, stream.gib, device_table_gib=device_table_gib, host_table_gib=host_table_gib)
    return stream if tier == "shards" else TABLES[tier].read(stream)


def choose_tier(tier: str, gib: float, *, device_table_gib: float, host_table_gib: float) -> str:
    """``tier`` itself, or for ``auto`` the first of device, host and shards that holds ``gib`` GiB."""
    if tier != "auto":
        return tier
    return "device" if gib <= device_table_gib else "host" if gib <= host_table_gib else "shards"


def epoch_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    """A permutation of 0..num_examples-1 that depends on (seed, epoch) alone.

    Positions are sorted by a 32-bit hash of (seed, epoch, position), equal hashes by position: the same on every
    machine and in every release of NumPy, and as easily computed on a device.
    """
    seed, epoch = np.uint32(seed), np.uint32(epoch)
    with np.errstate(over="ignore"):  # arithmetic modulo 2**32 is meant
        key = _mix(_mix(np.atleast_1d(seed) + np.uint32(0x9E3779B9)) ^ (epoch * np.uint32(0x85EBCA6B) + np.uint32(1)))
        positions = np.arange(num_examples, dtype=np.uint32)
        hashes = _mix(_mix(positions ^ key) + _mix(key + np.uint32(0x6C8E9CF5)))
    return np.argsort(hashes, kind="stable")


def _mix(x: np.ndarray) -> np.ndarray:
    """A bijection of 32-bit integers in which every input bit changes half of the output bits on average."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def batch_indices(
    usable: np.ndarray, *, seed: int, epoch: int, first_step: int, num_steps: int, batch_size: int
) -> np.ndarray:
    """Row indices of consecutive training steps of one epoch.

    Args:
      usable: rows to draw from.
      seed: of the run.
      epoch: counted from 0.
      first_step: within the epoch.
      num_steps: steps wanted; only whole batches exist.
      batch_size: rows per step.

    Returns:
      int32 [num_steps, batch_size].
    """
    order = usable[epoch_order(seed, epoch, len(usable))]
    return order[first_step * batch_size :][: num_steps * batch_size].reshape(num_steps, batch_size).astype(np.int32)


def evaluation_batches(indices: np.ndarray, batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Cut indices into batches of one size, in order: (indices [batch_size], how many of them count).

    The last batch is filled up with its own first row; rows beyond the count are to be dropped.
    """
    for start in range(0, len(indices), batch_size):
        part = indices[start : start + batch_size]
        filled = np.concatenate([part, np.repeat(part[:1], batch_size - len(part))])
        yield filled, len(part)


def prefetch(make: Callable[[Any], Any], items: Iterable[Any], depth: int = 2) -> Iterator[Any]:
    """``map(make, items)`` computed by a thread up to ``depth`` items ahead; an exception appears where it is due."""
    results: queue.Queue = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(result: tuple[str, Any]) -> None:
        while not stop.is_set():
            try:
                results.put(result, timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                if stop.is_set():
                    return
                put(("item", make(item)))
            put(("end", None))
        except BaseException as e:
            put(("error", e))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = results.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stop.set()
        thread.join()


def map_arrays(fn: Callable[[np.ndarray], np.ndarray], rows: Rows) -> Rows:
    """Apply a function to every array of some rows."""
    return {k: {m: fn(x) for m, x in v.items()} if isinstance(v, dict) else fn(v) for k, v in rows.items()}


def fill(table: Rows, chunk: Rows, start: int) -> None:
    """Write consecutive rows into a table from row ``start`` on."""
    for key, value in chunk.items():
        for modality, x in value.items() if isinstance(value, dict) else [(None, value)]:
            target = table[key] if modality is None else table[key][modality]
            target[start : start + len(x)] = x


def _read_presence(dataset: Dataset, split: str, num_modalities: int, num_examples: int) -> np.ndarray:
    """Bool [num_examples, num_modalities], memory-mapped: nothing is read before its header has been checked."""
    path, shape = dataset.path / builders.PRESENCE.format(split=split), (num_examples, num_modalities)
    try:
        presence = np.load(path, allow_pickle=False, mmap_mode="r")
    except (OSError, ValueError) as e:
        raise ConclugenError(f"{path}: cannot be read ({e}); build the data set anew") from e
    if presence.dtype != bool or presence.shape != shape:
        raise ConclugenError(
            f"{path}: {presence.dtype} of shape {presence.shape}, expected bool of shape {shape}; build the data set anew"
        )
    return np.asarray(presence)


def _data_source(dataset: Dataset, split: str) -> Any:
    try:
        return tfds.builder_from_directory(dataset.path).as_data_source(split)
    except Exception as e:  # TFDS raises many kinds; the files were verified, so whatever it is concerns their content
        raise ConclugenError(
            f"{dataset.path}: split {split!r} cannot be opened ({type(e).__name__}: {str(e).splitlines()[0]}); build it anew"
        ) from e

"""Choose the rows of each batch, and where rows are kept.

The order of examples is a function of (seed, epoch) alone, and the step number is the position in that order. It does not
depend on the number of devices or on where the rows are kept (device table, host table, or the shards on disk).
"""

import concurrent.futures
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from conclugen_jax.data import host_table
from conclugen_jax.data.host_table import DeviceTable, HostTable
from conclugen_jax.data.shards import Dataset, RowSource, ShardStream

TABLES = {"host": HostTable, "device": DeviceTable}


def open_split(dataset: Dataset, split: str, modalities: Sequence[str], **options: Any) -> RowSource:
    """Open the rows of a split, kept where the options of :func:`load` say.

    Raises:
      ConclugenError: unknown split or modality, or a split without usable rows.
    """
    return load(ShardStream(dataset, split, modalities), **options)


def load(
    stream: ShardStream,
    *,
    tier: str = "auto",
    device_table_gib: float = 0.0,
    host_table_gib: float = 0.0,
    host_cache_gib: float = float("inf"),
    progress: Callable[[int, int], None] | None = None,
) -> RowSource:
    """Fill the table of a split, or leave the rows in the shards.

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
    read = host_table.mapped if stream.gib >= host_cache_gib else host_table.read
    return TABLES[tier](read(stream, progress=progress), stream.usable)


def choose_tier(tier: str, gib: float, *, device_table_gib: float, host_table_gib: float) -> str:
    """Return ``tier``, or for ``auto`` the first of device, host and shards that holds ``gib`` GiB."""
    if tier != "auto":
        return tier
    return "device" if gib <= device_table_gib else "host" if gib <= host_table_gib else "shards"


@np.errstate(over="ignore")  # arithmetic modulo 2**32 is meant, here and below
def epoch_order(seed: int, epoch: Any, num_examples: int, *, xp: Any = np) -> Any:
    """A permutation of 0..num_examples-1 that depends on (seed, epoch) alone.

    Positions are sorted by a 32-bit hash of (seed, epoch, position), equal hashes by position: the same on every
    machine and in every release of NumPy, and with ``xp=jax.numpy`` the same on a device (``epoch`` may be traced).
    """
    key = _stream_key(seed, epoch, xp)
    positions = xp.arange(num_examples, dtype=xp.uint32)
    hashes = _mix(_mix(positions ^ key) + _mix(key + np.uint32(0x6C8E9CF5)))
    return hashes.argsort(kind="stable") if xp is np else xp.argsort(hashes, stable=True)


def _stream_key(seed: int, epoch: Any, xp: Any) -> Any:
    seed, epoch = (xp.asarray([x], dtype=xp.uint32) for x in (seed, epoch))
    return _mix(_mix(seed + np.uint32(0x9E3779B9)) ^ (epoch * np.uint32(0x85EBCA6B) + np.uint32(1)))


def _mix(x: Any) -> Any:
    """A bijection of 32-bit integers in which every input bit changes half of the output bits on average."""
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


def evaluation_batches(indices: np.ndarray, batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Cut indices into batches of one size, in order: (indices [batch_size], number of them that count).

    The last batch is filled up with its own first row; drop the results beyond the count.
    """
    for start in range(0, len(indices), batch_size):
        part = indices[start : start + batch_size]
        filled = np.concatenate([part, np.repeat(part[:1], batch_size - len(part))])
        yield filled, len(part)


def prefetch(make: Callable[[Any], Any], items: Iterable[Any], depth: int = 2) -> Iterator[Any]:
    """Compute ``map(make, items)`` in a thread, up to ``depth`` items ahead; what ``make`` raises comes in its place."""
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

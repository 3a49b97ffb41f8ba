"""Run backbones over prepared utterances: items in full batches, and the mean vector of each utterance."""

import ctypes
import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence

import numpy as np

from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract.backbones import Backbone, Items
from conclugen_jax.extract.preparation import Parts, Prepared

COMPILING = "compiling"  # the part of the work that each program's first batch is
MOST_WAITING = 64  # utterances that wait for their batches to fill; an interruption loses their vectors

Finished = Iterator[tuple[Prepared, dict[str, np.ndarray]]]
"""Utterances as soon as they are complete, with modality -> float32 [views, dim]; nothing for failures."""
_Key = tuple[int, str]  # a view and a backbone


@dataclasses.dataclass
class Clock:
    """What the time of an extraction went into, in seconds."""

    host: float = 0.0  # that the device waited for prepared clips
    device: float = 0.0  # that the backbones took, and writing
    parts: Parts = dataclasses.field(default_factory=Parts)  # what all processes together took


def vectors(prepared: Iterator[Prepared], backbones: Sequence[Backbone], clock: Clock | None = None) -> Finished:
    """Run the backbones over prepared utterances; vectors of one modality are joined in the order of their backbones.

    The clock accumulates the time taken. Vectors that are not finite are a failure; of another size, a ConclugenError.
    """
    clock = clock or Clock()
    running = _Running(backbones, clock.parts)
    start = time.perf_counter()
    for each in itertools.chain(prepared, (None,)):
        came = time.perf_counter()
        clock.host += came - start
        clock.parts.update(each.parts if each else {})
        if each is None:
            yield from running.flush()
        elif each.failure:
            yield each, {}
        else:
            yield from running.add(each)
        start = time.perf_counter()
        clock.device += start - came


class _Running:
    """Utterances under way. Batches have one size, so that the vector of a clip does not depend on its neighbours."""

    def __init__(self, backbones: Sequence[Backbone], parts: Parts):
        self._backbones, self._parts = {b.name: b for b in backbones}, parts
        self._compiled: set[tuple] = set()  # sizes of batches that were seen
        # (backbone, shapes and types of an item's arrays) -> items that wait for a full batch
        self._queues: dict[tuple, list[tuple[str, _Key, Items]]] = {}
        # place -> utterance, number of the vectors of each view, and those that there are
        self._waiting: dict[str, tuple[Prepared, dict[_Key, int], dict[_Key, list[np.ndarray]]]] = {}

    def add(self, each: Prepared) -> Finished:
        """Take an utterance; yield those that are complete by now."""
        counts: dict[_Key, int] = {}
        self._waiting[each.place] = dataclasses.replace(each, views=({},) * len(each.views)), counts, {}
        queues = []
        for view, items in enumerate(each.views):
            for name, arrays in items.items():
                n = counts[view, name] = len(arrays[0])
                kind = name, *((x.shape[1:], x.dtype.str) for x in arrays)
                queue = self._queues.setdefault(kind, [])
                queue += [(each.place, (view, name), tuple(x[i] for x in arrays)) for i in range(n)]
                queues.append((name, queue))
        for name, queue in queues:
            while len(queue) >= self._backbones[name].batch_size:
                yield from self._run(name, queue)
        if len(self._waiting) >= MOST_WAITING:
            yield from self.flush()

    def flush(self) -> Finished:
        """Run what is left, in batches filled up with copies."""
        for (name, *_), queue in self._queues.items():
            while queue:
                yield from self._run(name, queue)

    def _run(self, name: str, queue: list[tuple[str, _Key, Items]]) -> Finished:
        """Take a batch off the front of a queue."""
        backbone = self._backbones[name]
        size = backbone.batch_size, backbone.dim
        rows = queue[: size[0]]
        del queue[: size[0]]
        filled = rows + [rows[-1]] * (size[0] - len(rows))
        arrays = [np.stack(columns) for columns in zip(*(items for *_, items in filled), strict=True)]
        kind = name, *(x.shape for x in arrays)
        with self._parts.timed(name if kind in self._compiled else COMPILING):
            found = np.asarray(backbone.vectors(*arrays), np.float32)
        self._compiled.add(kind)
        if found.shape != size:
            raise ConclugenError(f"backbone {name}: vectors of shape {found.shape}, expected {size}")
        for (place, key, _), vector in zip(rows, found, strict=False):
            each, counts, there = self._waiting[place]
            there.setdefault(key, []).append(vector)
            if all(len(there.get(k, ())) == n for k, n in counts.items()):
                del self._waiting[place]
                yield self._finished(each, {k: np.mean(x, axis=0, dtype=np.float64) for k, x in there.items()})

    def _finished(self, each: Prepared, found: dict[_Key, np.ndarray]) -> tuple[Prepared, dict[str, np.ndarray]]:
        if bad := sorted({name for (_, name), x in found.items() if not np.isfinite(x).all()}):
            names = ", ".join(bad)
            reason = f"{each.place}: {names} gave numbers that are not finite; is something odd about the clip?"
            return Prepared(each.place, failure=reason), {}
        joined: dict[str, list[np.ndarray]] = {}  # a modality is there with all backbones in all views, or not
        for b in self._backbones.values():
            if (0, b.name) in found:
                joined.setdefault(b.modality, []).append(np.stack([found[v, b.name] for v in range(len(each.views))]))
        vectors = {m: np.concatenate(x, axis=1).astype(np.float32) for m, x in joined.items()}
        return dataclasses.replace(each, views=()), vectors


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed for the next allocation, instead of giving it back to the system at once.

    XLA takes and frees hundreds of MiB for every batch on a processor; without this a fifth of the time goes into pages that
    the system fills with zeros. To be called before threads are started; freed memory stays with the process from then on.
    Returns whether the C library can do it; others are left as they are.
    """
    mmap_threshold, trim_threshold, arena_max = -3, -1, -8  # of <malloc.h>
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return all([set_option(arena_max, 1), set_option(mmap_threshold, 2**30), set_option(trim_threshold, 2**31 - 1)])

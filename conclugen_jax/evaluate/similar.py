"""Find similar rows: exact copies, near duplicates, and persons whose rows are neighbours."""

import hashlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from conclugen_jax.method import neighbours

BLOCK = 1024, 8192  # rows and columns of the similarities that are in memory at once
MOST_PAIRS = 1000
NEAREST = 10
OWN_CLUSTER = 0.5  # share of neighbours of the same person, corrected for chance, from which a person is a cluster


class Pairs(NamedTuple):
    """Pairs of rows above a cosine similarity, the most similar first."""

    first: np.ndarray  # int [k]
    second: np.ndarray  # int [k], after the first
    cosine: np.ndarray  # float32 [k]
    total: int  # pairs that there are; k of them are kept


def copies(features: Mapping[str, np.ndarray], present: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return for each of n rows the first row that has the same modalities with the very same numbers, int [n]; itself if new.

    ``features``: modality -> [n, dim]; ``present``: modality -> boolean [n].
    """
    first: dict[bytes, int] = {}
    rows = range(len(next(iter(present.values()))))
    found = []
    for i in rows:
        there = [m for m in features if present[m][i]]
        content = hashlib.blake2b(repr(there).encode(), digest_size=16)
        for m in there:
            content.update(features[m][i].tobytes())
        found.append(first.setdefault(content.digest(), i))
    return np.array(found, int)


def near_duplicates(
    vectors: np.ndarray,
    threshold: float,
    *,
    most: int = MOST_PAIRS,
    block: tuple[int, int] = BLOCK,
    progress: Callable[[int, int], None] | None = None,
) -> Pairs:
    """Find all pairs of rows [n, dim] whose cosine similarity is at least a threshold above 0: exact, block by block.

    Memory beside one float32 copy of the vectors is that of a block of similarities and of twice the ``most`` pairs that are
    kept, the most similar ones; all are counted. Zero rows are similar to none. ``progress``: called with rows done and all.
    """
    unit = unit_rows(vectors)
    kept, total = Pairs(np.zeros(0, int), np.zeros(0, int), np.zeros(0, np.float32), 0), 0
    for start in range(0, len(unit), block[0]):
        rows = unit[start : start + block[0]]
        for column in range(start, len(unit), block[1]):
            cosine = rows @ unit[column : column + block[1]].T
            i, j = np.nonzero(cosine >= threshold)
            later = i + start < j + column
            i, j = i[later], j[later]
            total += len(i)
            kept = _most_similar(kept, Pairs(i + start, j + column, cosine[i, j], total), most)
        if progress is not None:
            progress(min(start + block[0], len(unit)), len(unit))
    return kept._replace(total=total)


def _most_similar(a: Pairs, b: Pairs, most: int) -> Pairs:
    joined = [np.concatenate(both) for both in zip(a[:3], b[:3], strict=True)]
    order = np.lexsort((joined[1], joined[0], -joined[2]))[:most]
    return Pairs(*(x[order] for x in joined), b.total)


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Return rows [n, dim] at length 1, float32; zero rows stay zero."""
    vectors = np.asarray(vectors, np.float32)
    length = np.sqrt(np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64))
    return vectors / np.where(length > 0, length, 1).astype(np.float32)[:, None]


class Person(NamedTuple):
    """What the nearest neighbours of a person's rows are; shares are means over its rows."""

    name: str
    rows: int
    own: float  # share of the neighbours that are rows of this person
    own_chance: float
    same_class: float  # share of the neighbours that have the class of the row; NaN without labels
    class_chance: float

    @property
    def above_chance(self) -> float:
        """Return (own - chance) / (1 - chance): 0 is chance, 1: all neighbours are the person's."""
        return (self.own - self.own_chance) / max(1 - self.own_chance, 1e-12)

    @property
    def is_cluster(self) -> bool:
        """Return whether the rows are a cluster of their own: above chance by half, and by more than the class is."""
        of_class = (self.same_class - self.class_chance) / max(1 - self.class_chance, 1e-12)
        return self.above_chance >= OWN_CLUSTER and not of_class >= self.above_chance


def persons(
    vectors: np.ndarray, groups: np.ndarray, labels: np.ndarray | None = None, *, k: int = NEAREST
) -> list[Person]:
    """Count whose rows, and of which class, the nearest neighbours of each person's rows are, by cosine.

    Of a person with r rows min(k, r - 1) neighbours count, so that all of them can be the person's; persons with one row are
    dropped, and there are none to tell apart where there is one person. Chance is that of neighbours drawn at random.

    Args:
      vectors: [n, dim].
      groups: strings [n], the person of each row; rows without one are neighbours only.
      labels: classes [n], or ``None``.
      k: number of neighbours.

    Returns the persons with the highest share first.
    """
    names, number, counts = np.unique(groups, return_inverse=True, return_counts=True)
    asked = np.flatnonzero((groups != "") & (counts[number] > 1))
    if len(names[names != ""]) < 2 or not len(asked):
        return []
    rows, _ = neighbours.nearest(vectors[asked], vectors, min(k, len(vectors) - 1), own=asked)
    counted = np.arange(rows.shape[1])[None, :] < np.minimum(k, counts[number[asked]] - 1)[:, None]

    def share(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        same = (values[rows] == values[asked][:, None]) & counted
        chance = (np.unique(values, return_counts=True)[1][np.unique(values, return_inverse=True)[1]] - 1) / (
            len(values) - 1
        )
        return same.sum(axis=1) / counted.sum(axis=1), chance[asked]

    nothing = np.full(len(asked), np.nan)
    figures = [*share(number), *(share(labels) if labels is not None else (nothing, nothing))]
    found = []
    for i in np.unique(number[asked]):
        own = number[asked] == i
        found.append(Person(str(names[i]), int(counts[i]), *(float(x[own].mean()) for x in figures)))
    return sorted(found, key=lambda one: (-one.above_chance, one.name))

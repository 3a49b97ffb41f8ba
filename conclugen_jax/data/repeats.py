"""Find names and vectors that occur more than once, by their hashes."""

import itertools
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

Repeats = list[dict[str, list[int]]]
"""For each hash that is there more than once: split -> positions of the rows that have it, ascending."""


def repeats(hashes: Mapping[str, np.ndarray]) -> Repeats:
    """Return where hashes other than 0 are repeated; ``hashes``: split -> uint64 [n, several]."""
    values, counts = np.unique(np.concatenate([x.ravel() for x in hashes.values()]), return_counts=True)
    several = values[(counts > 1) & (values != 0)]
    found: dict[int, dict[str, list[int]]] = {}
    for split, x in hashes.items():
        for row, column in np.argwhere(np.isin(x, several)).tolist():
            rows = found.setdefault(int(x[row, column]), {}).setdefault(split, [])
            if rows[-1:] != [row]:
                rows.append(row)
    return list(found.values())


def within(found: Repeats, split: str) -> list[list[int]]:
    """Return the rows that have the same hash within a split, of each such hash; those of the most rows first."""
    shared = [rows[split] for rows in found if len(rows.get(split, [])) > 1]
    return sorted(shared, key=lambda rows: (-len(rows), rows))


def across(found: Repeats, splits: Mapping[str, object]) -> Iterator[tuple[tuple[str, str], list[list[list[int]]]]]:
    """Yield pairs of splits that share hashes, and the rows in both of each such hash, in the order of the first's."""
    for a, b in itertools.combinations(splits, 2):
        if shared := sorted([rows[a], rows[b]] for rows in found if a in rows and b in rows):
            yield (a, b), shared


def num_rows(shared: Iterable[Iterable[int]]) -> int:
    """Return the number of different rows that are named."""
    return len(set(itertools.chain(*shared)))

"""Find what is wrong or suspicious in a data set as a whole: bad rows, repeated ids, ids or groups in two splits."""

import itertools
from collections.abc import Iterator, Mapping, Sized

import numpy as np

from conclugen_jax.data import wire
from conclugen_jax.data.records import Part, Parts
from conclugen_jax.data.sources import DatasetSpec
from conclugen_jax.errors import ConclugenError

SHOWN = 5
"""Names in a message, at most."""

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


def refuse_bad(parts: Parts, *, drop_bad: bool) -> None:
    """Refuse examples with NaN or infinite values or without modality, unless they are to be dropped."""
    bad = [
        f"split {split!r}, row {row}, id {name[:100]!r}, {reason}"
        for split, each in parts.items()
        for part in each
        for row, name, reason in part.bad
    ]
    if bad and not drop_bad:
        more = f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        way_out = "repair them, or leave them out with --drop_bad (drop_bad=True)"
        raise ConclugenError(f"{_number(bad, 'bad example')}: {'; '.join(bad[:SHOWN])}{more}; {way_out}")


def refuse_duplicates(parts: Parts) -> None:
    """Refuse an id that occurs twice in a split."""
    for split, each in parts.items():
        if twice := within(repeats({split: _joined(each, "ids")[:, None]}), split):
            (first, second), rows = twice[0][:2], _joined(each, "rows")
            where = f"split {split!r}, row {rows[second]}, id {_name(each, second, 'id')[:100]!r}"
            unique = f"ids must be unique within a split ({sum(map(len, twice)) - len(twice)} are not)"
            raise ConclugenError(f"{where}: the same id as row {rows[first]}; {unique}")


def refuse_absent_modalities(spec: DatasetSpec, parts: Parts) -> None:
    """Refuse a modality that no example has; most often its ids differ from those of the labels."""
    presence = np.concatenate([_joined(each, "presence") for each in parts.values()])
    for modality, present in zip(spec.modalities, presence.T, strict=True):
        if not present.any():
            way_out = "compare its ids with those of the labels, or leave the modality out"
            raise ConclugenError(f"modality {modality!r} is in none of the {len(presence)} examples; {way_out}")


def leaks(spec: DatasetSpec, parts: Parts) -> list[str]:
    """Return one sentence for each pair of splits that has ids or groups in common."""
    sentences = []
    for what in ("id",) if spec.shared_groups else ("id", "group"):
        found = repeats({split: _joined(each, f"{what}s")[:, None] for split, each in parts.items()})
        for (a, b), shared in across(found, parts):
            examples = ", ".join(sorted(repr(_name(parts[a], rows[0], what)) for rows, _ in shared[:SHOWN]))
            sentences.append(f"splits {a!r} and {b!r} have {_number(shared, what)} in common, such as {examples}")
    return sentences


def _number(found: Sized, noun: str) -> str:
    return f"{len(found)} {noun}{'s' if len(found) > 1 else ''}"


def _joined(parts: list[Part], column: str) -> np.ndarray:
    return np.concatenate([getattr(part, column) for part in parts])


def _name(parts: list[Part], position: int, key: str) -> str:
    """Return the id or group of a written record, by its position in the split."""
    records = wire.open_shards(part.path for part in parts if len(part.rows))
    return wire.parse(records[position])[key].bytes_list.value[0].decode()

"""Find what is wrong or suspicious in a data set as a whole: bad rows, repeated ids, ids or groups in two splits."""

import itertools

import numpy as np
from array_record.python import array_record_data_source

from conclugen_jax.data.parts import Entries, Parts
from conclugen_jax.data.records import record_features
from conclugen_jax.data.sources import DatasetSpec
from conclugen_jax.errors import ConclugenError

SHOWN = 5
"""Names in a message, at most."""


def refuse_bad(parts: Parts, *, drop_bad: bool) -> None:
    """Refuse examples with NaN or infinite values or without modality, unless they are to be dropped.

    Raises:
      ConclugenError: there are some; the first of them are named.
    """
    bad = [
        f"split {split!r}, row {row}, id {name[:100]!r}, {reason}"
        for split, entries in parts.items()
        for _, part in entries
        for row, name, reason in part.bad
    ]
    if bad and not drop_bad:
        more = f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise ConclugenError(
            f"{len(bad)} bad example{'s' if len(bad) > 1 else ''}: {'; '.join(bad[:SHOWN])}{more}; repair them, or leave them "
            "out with --drop_bad (drop_bad=True)"
        )


def refuse_duplicates(spec: DatasetSpec, parts: Parts) -> None:
    """Refuse an id that occurs twice in a split.

    Raises:
      ConclugenError: there is one.
    """
    for split, entries in parts.items():
        ids = np.concatenate([part.ids for _, part in entries])
        order = np.argsort(ids, kind="stable")
        twice = np.flatnonzero(ids[order][1:] == ids[order][:-1])
        if twice.size:
            rows = np.concatenate([part.rows for _, part in entries])
            first, second = order[twice[0]], order[twice[0] + 1]
            name = _name(spec, entries, int(second), "id")
            raise ConclugenError(
                f"split {split!r}, row {rows[second]}, id {name[:100]!r}: the same id as row {rows[first]}; ids must be "
                f"unique within a split ({twice.size} are not)"
            )


def refuse_absent_modalities(spec: DatasetSpec, parts: Parts) -> None:
    """Refuse a modality that no example has; most often its ids differ from those of the labels.

    Raises:
      ConclugenError: there is one.
    """
    presence = np.concatenate([part.presence for _, part in itertools.chain(*parts.values())])
    for modality, present in zip(spec.modalities, presence.T, strict=True):
        if not present.any():
            raise ConclugenError(
                f"modality {modality!r} is in none of the {len(presence)} examples; compare its ids with those of the "
                "labels, or leave the modality out"
            )


def leaks(spec: DatasetSpec, parts: Parts) -> list[str]:
    """Return one sentence for each pair of splits that has ids or groups in common."""
    found = []
    for what, column in (("id", "ids"), ("group", "groups")):
        if what == "group" and spec.shared_groups:
            continue
        names = {s: np.concatenate([getattr(part, column) for _, part in entries]) for s, entries in parts.items()}
        for a, b in itertools.combinations(parts, 2):
            common = np.setdiff1d(np.intersect1d(names[a], names[b]), [0])  # 0 is the hash of no name
            if common.size:
                rows = [int(np.flatnonzero(names[a] == h)[0]) for h in common[:SHOWN]]
                examples = ", ".join(sorted(repr(_name(spec, parts[a], row, what)) for row in rows))
                found.append(
                    f"splits {a!r} and {b!r} have {common.size} {what}{'s' if common.size > 1 else ''} in common, such as "
                    f"{examples}"
                )
    return found


def _name(spec: DatasetSpec, entries: Entries, position: int, key: str) -> str:
    """Return the id or group of a written record, by its position in the split."""
    for path, part in entries:
        if position < len(part.rows):
            source = array_record_data_source.ArrayRecordDataSource([str(path)])
            return record_features(spec).deserialize_example_np(source[position])[key].decode()
        position -= len(part.rows)
    raise IndexError(position)

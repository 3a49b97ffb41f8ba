"""Rows in memory: their columns by modality, their missing modalities, and a source of examples made from them."""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from conclugen_jax.data.cells import MISSING
from conclugen_jax.data.sources import DatasetSpec, Example, LabelSpec
from conclugen_jax.errors import ConclugenError

ONE = "features"
"""Name of the modality of rows that name none."""
NAME, VERSION, SPLIT = "rows", "1.0.0", "train"
NUMBERED = re.compile(r"(.+)_\d+")

Features = Mapping[str, np.ndarray]
"""Modality -> float32 [n, dim], zeros where it is absent; or bool [n]."""


class InputError(ConclugenError, ValueError):
    """Rows that cannot be used; a ``ValueError``, as other estimators raise."""


def columns_of(names: Sequence[Any], asked: Mapping[str, Sequence[Any]] | None) -> dict[str, np.ndarray]:
    """Return modality -> positions of its columns, int64.

    They are those that are ``asked`` for by name or position; else columns called ``(MODALITY, ...)`` or ``MODALITY_0``; else
    all are of one modality.
    """
    if asked is not None:
        places = dict(zip(range(len(names)), range(len(names)), strict=True)) | {n: i for i, n in enumerate(names)}
        for modality, wanted in asked.items():
            if absent := [name for name in wanted if name not in places]:
                raise InputError(f"columns[{modality!r}] has {absent[0]!r}, which is no column of X; correct it")
        return {m: np.array([places[name] for name in wanted], np.int64) for m, wanted in asked.items()}
    found: dict[str, list[int]] = {}
    others = []
    for i, name in enumerate(names):
        match = NUMBERED.fullmatch(name) if isinstance(name, str) else None
        if match or isinstance(name, tuple):
            found.setdefault(match[1] if match else str(name[0]), []).append(i)
        else:
            others.append(name)
    if not found:
        return {ONE: np.arange(len(names))}
    if others:
        fact = f"column {others[0]!r} names no modality, but {names[next(iter(found.values()))[0]]!r} does"
        raise InputError(f"{fact}; rename it to MODALITY_0, drop it, or pass columns={{MODALITY: names}}")
    return {m: np.array(at, np.int64) for m, at in found.items()}


def by_modality(matrix: np.ndarray, columns: Mapping[str, np.ndarray]) -> tuple[Features, Features]:
    """Return features and presence of rows [n, dims] with NaN where a modality is absent.

    Raises:
      InputError: a row with some values of a modality, or without any modality.
    """
    features, present = {}, {}
    for m, at in columns.items():
        missing = np.isnan(matrix[:, at])
        present[m] = ~missing.all(axis=1)
        if (partly := np.flatnonzero(missing.any(axis=1) & present[m])).size:
            fact = f"X, row {partly[0]}: {missing[partly[0]].sum()} of {len(at)} values of {m} are NaN"
            raise InputError(f"{fact}; fill them in, or set all to NaN if the modality is absent")
        features[m] = np.where(missing, np.float32(0), matrix[:, at])
    if (empty := np.flatnonzero(~np.any(list(present.values()), axis=0))).size:
        raise InputError(f"X, row {empty[0]}: all values are NaN, expected at least one modality; drop the row")
    return features, present


def group_names(groups: Sequence[Any] | None, n: int) -> list[str]:
    """Return groups as text; what is missing (None, NaN, ...) is in no group."""
    found = [""] * n if groups is None else ["" if str(g) in MISSING else str(g) for g in groups]
    if len(found) != n:
        raise InputError(f"groups has {len(found)} entries, but X has {n} rows; pass one group for each row")
    return found


def keys(features: Features, present: Features, groups: Sequence[str]) -> list[bytes]:
    """Return a hash of each row, of any order of the modalities."""
    parts = [x for m in sorted(features) for x in (features[m], present[m][:, None].astype(np.float32))]
    table = np.concatenate(parts, axis=1)
    return [
        hashlib.blake2b(x.tobytes() + g.encode(), digest_size=16).digest() for x, g in zip(table, groups, strict=True)
    ]


class Rows:
    """Source of one split, for :func:`conclugen_jax.data.builders.build`."""

    def __init__(self, features: Features, present: Features, groups: Sequence[str]):
        self._features, self._present, self._groups = features, present, groups
        self.spec = DatasetSpec(
            name=NAME,
            version=VERSION,
            description="Rows given to ConCluGen.fit.",
            licence="not stated",
            modalities={m: x.shape[1] for m, x in features.items()},
            label=LabelSpec("none"),
            splits=(SPLIT,),
        )

    def fingerprint(self) -> str:
        """Return a hash of all features and groups."""
        digest = hashlib.sha256(repr(self.spec).encode())
        for key in keys(self._features, self._present, self._groups):
            digest.update(key)
        return digest.hexdigest()

    def examples(self, split: str) -> Iterator[Example]:
        """Yield the examples in order; their ids are their positions."""
        for i, group in enumerate(self._groups):
            yield Example(str(i), {m: x[i] for m, x in self._features.items() if self._present[m][i]}, group=group)

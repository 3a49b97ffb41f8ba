"""Check examples one by one, turn them into records, and count what the manifest needs."""

from collections import Counter
from typing import Any

import numpy as np

from conclugen_jax.data.parts import Moments, Part
from conclugen_jax.data.sources import DatasetSpec, Example, LabelSpec, name_hash
from conclugen_jax.errors import ConclugenError

BLOCK = 64
"""Vectors whose statistics are computed together."""

MOST_NAME = 1000
"""Characters of an id or a group, at most."""


class _Bad(Exception):
    """An example that may be dropped."""


class Checker:
    """Turn the examples of a part into records, refuse bad ones, and count."""

    def __init__(self, spec: DatasetSpec, split: str, *, first_split: bool):
        self.spec, self.split = spec, split
        self.shapes = {m: (dim,) for m, dim in spec.modalities.items()}
        stacked = {m: n for m, n in spec.variants.items() if n > 1}
        self.shapes |= {m: (n if first_split else 1, spec.modalities[m]) for m, n in stacked.items()}
        self.statistics = {m: Moments.zero(dim) for m, dim in spec.modalities.items()} if first_split else {}
        self.pending: dict[str, list[np.ndarray]] = {m: [] for m in self.statistics}
        self.written: list[tuple[int, int, int, list[bool]]] = []  # row, hashes of id and group, presence
        self.label_counts = {"": np.zeros(len(spec.label.names), np.int64)}
        self.label_counts |= {name: np.zeros(len(t.names), np.int64) for name, t in spec.targets.items()}
        self.bad: list[tuple[int, str, str]] = []
        self.converted: Counter[str] = Counter()
        self.replaced: Counter[str] = Counter()

    def part(self) -> Part:
        """Return everything counted so far."""
        for m in self.pending:
            self._count_pending(m)
        rows, ids, groups, presence = zip(*self.written, strict=True) if self.written else ((),) * 4
        return Part(
            rows=np.array(rows, np.int64),
            presence=np.array(presence, bool).reshape(-1, len(self.spec.modalities)),
            ids=np.array(ids, np.uint64),
            groups=np.array(groups, np.uint64),
            label_counts=self.label_counts,
            statistics=self.statistics,
            bad=self.bad,
            converted=dict(self.converted),
            replaced=dict(self.replaced),
        )

    def record(self, row: int, example: Example) -> dict[str, Any] | None:
        """Return the TFDS record of an example, None if it is bad."""
        if not isinstance(example, Example):
            raise ConclugenError(f"split {self.split!r}, row {row}: a {type(example).__name__}, expected an Example")
        where = f"split {self.split!r}, row {row}, id {str(example.id)[:100]!r}"
        for name, text, least in (("id", example.id, 1), ("group", example.group, 0)):
            if not isinstance(text, str) or not least <= len(text) <= MOST_NAME or not text.isprintable():
                raise ConclugenError(f"{where}: {name} must be a printable str of {least} to {MOST_NAME} characters")
        for kind, given, known in (
            ("modality", example.features, self.spec.modalities),
            ("target", example.targets, self.spec.targets),
        ):
            if not given.keys() <= known.keys():
                spare = min(given.keys() - known.keys())
                raise ConclugenError(f"{where}: unknown {kind} {spare!r}; the data set has {list(known)}")
        try:
            if not example.features:
                raise _Bad("no modality is present")
            vectors = {m: self._vector(f"{where}, modality {m!r}", m, x) for m, x in example.features.items()}
        except _Bad as e:
            self.bad.append((row, example.id, str(e)))
            return None
        present = {m: m in vectors for m in self.spec.modalities}
        features = {m: vectors[m] if there else np.zeros(self.shapes[m], np.float32) for m, there in present.items()}
        record = {"id": example.id, "group": example.group, "features": features, "present": present}
        if self.spec.label.kind != "none":
            record["label"] = self._label(where, self.spec.label, example.label, self.label_counts[""])
        if self.spec.targets:
            record["targets"] = {
                name: self._target(f"{where}, target {name!r}", name, example.targets.get(name))
                for name in self.spec.targets
            }
        self.written.append((row, name_hash(example.id), name_hash(example.group), list(present.values())))
        self._count(example, vectors)
        return record

    def _count(self, example: Example, vectors: dict[str, np.ndarray]) -> None:
        self.replaced.update({m: n for m, n in example.replaced.items() if n})
        for m, x in vectors.items():
            dtype = np.asarray(example.features[m]).dtype
            if dtype != np.float32:
                self.converted[f"{m} {dtype}"] += 1
            if m in self.statistics:
                for variant in np.atleast_2d(x):
                    self.pending[m].append(variant)
                    if len(self.pending[m]) == BLOCK:
                        self._count_pending(m)

    def _count_pending(self, modality: str) -> None:
        if self.pending[modality]:
            self.statistics[modality].merge(Moments.of(self.pending[modality]))
            self.pending[modality] = []

    def _vector(self, where: str, modality: str, x: Any) -> np.ndarray:
        x, shape = np.asarray(x), self.shapes[modality]
        if shape[:-1] == (1,) and x.ndim == 1:
            x = x[None]
        if x.dtype.kind not in "fiub" or x.shape != shape:
            raise ConclugenError(f"{where}: {x.dtype} of shape {x.shape}, expected real numbers of shape {shape}")
        with np.errstate(over="ignore"):
            y = x.astype(np.float32)
        bad = np.flatnonzero(~np.isfinite(y))
        if bad.size:
            raise _Bad(
                f"modality {modality!r}: {bad.size} of {y.size} values are NaN or infinite in float32 "
                f"(first at column {bad[0] % shape[-1]})"
            )
        return y

    def _target(self, where: str, name: str, value: Any) -> Any:
        spec = self.spec.targets[name]
        if value is not None:
            return self._label(where, spec, value, self.label_counts[name])
        if spec.kind == "single":
            return -1
        return np.float32(np.nan) if spec.kind == "value" else np.full(len(spec.names), np.nan, np.float32)

    def _label(self, where: str, spec: LabelSpec, label: Any, counts: np.ndarray) -> Any:
        """Return a label as it is stored, and count it."""
        number = len(spec.names)
        if spec.kind == "single":
            fits = isinstance(label, int | np.integer) and not isinstance(label, bool) and 0 <= label < number
            expected = f"an integer from 0 to {number - 1}"
        else:
            values = _floats(label)
            if spec.kind == "value":
                fits, expected = values.shape == () and np.isfinite(values), "a finite number of float32"
            else:
                fits = values.shape == (number,) and np.isin(values, (0, 1)).all()
                expected = f"{number} values 0 or 1 ({', '.join(spec.names)})"
        if not fits:
            raise ConclugenError(f"{where}: label {_shown(label)}, expected {expected}")
        if spec.kind == "single":
            counts[label] += 1
            return int(label)
        if spec.kind == "value":
            return np.float32(values)
        counts += values.astype(np.int64)
        return values


def _floats(label: Any) -> np.ndarray:
    """Return a label as float32, of no value where it is no number."""
    try:
        with np.errstate(over="ignore"):  # infinite then, and refused
            return np.asarray(label, np.float32)
    except (TypeError, ValueError, OverflowError):
        return np.zeros(0, np.float32)


def _shown(label: Any) -> str:
    """Return a label for a message; Python refuses to print an integer of thousands of digits."""
    try:
        return repr(label)[:100]
    except ValueError:
        return f"{type(label).__name__} too large to be written"

"""Check examples one by one, turn them into records, and count what the manifest needs."""

from collections import Counter
from typing import Any

import numpy as np

from conclugen_jax.data.moments import Moments
from conclugen_jax.data.parts import Part
from conclugen_jax.data.sources import DatasetSpec, Example, LabelSpec, name_hash
from conclugen_jax.errors import ConclugenError

BLOCK = 64
"""Vectors whose statistics are computed together."""

MOST_NAME = 1000
"""Characters of an id or a group, at most."""


def _shown(label: Any) -> str:
    """Return a label for a message; Python refuses to print an integer of thousands of digits."""
    try:
        return repr(label)[:100]
    except ValueError:
        return f"{type(label).__name__} too large to be written"


class _Bad(Exception):
    """An example that may be dropped."""


class Checker:
    """Turn examples into records, refuse bad ones, and count."""

    def __init__(self, spec: DatasetSpec, split: str, *, first_split: bool):
        self.spec, self.split = spec, split
        self.variants = {m: spec.variants.get(m, 1) if first_split else 1 for m in spec.modalities}
        self.statistics = {m: Moments.zero(dim) for m, dim in spec.modalities.items()} if first_split else {}
        self.pending: dict[str, list[np.ndarray]] = {m: [] for m in self.statistics}
        self.rows: list[int] = []
        self.presence: list[list[bool]] = []
        self.ids: list[int] = []
        self.groups: list[int] = []
        self.label_counts = {"": np.zeros(len(spec.label.names), np.int64)}
        self.label_counts |= {name: np.zeros(len(t.names), np.int64) for name, t in spec.targets.items()}
        self.bad: list[tuple[int, str, str]] = []
        self.converted: Counter[str] = Counter()
        self.replaced: Counter[str] = Counter()

    def part(self) -> Part:
        """Return everything counted so far."""
        for m in self.pending:
            self._count_pending(m)
        return Part(
            rows=np.array(self.rows, np.int64),
            presence=np.array(self.presence, bool).reshape(-1, len(self.spec.modalities)),
            ids=np.array(self.ids, np.uint64),
            groups=np.array(self.groups, np.uint64),
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
        spare = set(example.features) - set(self.spec.modalities)
        if spare:
            raise ConclugenError(
                f"{where}: unknown modality {min(spare)!r}; the data set has {list(self.spec.modalities)}"
            )
        try:
            if not example.features:
                raise _Bad("no modality is present")
            vectors = {m: self._vector(f"{where}, modality {m!r}", m, x) for m, x in example.features.items()}
        except _Bad as e:
            self.bad.append((row, example.id, str(e)))
            return None
        record = {
            "id": example.id,
            "group": example.group,
            "features": {m: vectors[m] if m in vectors else self._absent(m) for m in self.spec.modalities},
            "present": {m: m in vectors for m in self.spec.modalities},
        }
        if self.spec.label.kind != "none":
            record["label"] = self._label(where, self.spec.label, example.label, self.label_counts[""])
        if self.spec.targets:
            record["targets"] = self._targets(where, example)
        self._count(row, example, vectors)
        return record

    def _count(self, row: int, example: Example, vectors: dict[str, np.ndarray]) -> None:
        self.rows.append(row)
        self.ids.append(name_hash(example.id))
        self.groups.append(name_hash(example.group))
        self.presence.append([m in vectors for m in self.spec.modalities])
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

    def _absent(self, modality: str) -> np.ndarray:
        dim, variants = self.spec.modalities[modality], self.variants[modality]
        stacked = self.spec.variants.get(modality, 1) > 1
        return np.zeros((variants, dim) if stacked else dim, np.float32)

    def _vector(self, where: str, modality: str, x: Any) -> np.ndarray:
        x = np.asarray(x)
        dim, variants = self.spec.modalities[modality], self.variants[modality]
        stacked = self.spec.variants.get(modality, 1) > 1
        if stacked and variants == 1 and x.ndim == 1:
            x = x[None]
        shape = (variants, dim) if stacked else (dim,)
        if x.dtype == object or x.dtype.kind not in "fiub" or x.shape != shape:
            raise ConclugenError(f"{where}: {x.dtype} of shape {x.shape}, expected real numbers of shape {shape}")
        with np.errstate(over="ignore"):
            y = x.astype(np.float32)
        bad = np.flatnonzero(~np.isfinite(y))
        if bad.size:
            raise _Bad(
                f"modality {modality!r}: {bad.size} of {y.size} values are NaN or infinite in float32 "
                f"(first at column {bad[0] % dim})"
            )
        return y

    def _label(self, where: str, spec: LabelSpec, label: Any, counts: np.ndarray) -> Any:
        if spec.kind == "single":
            if isinstance(label, bool) or not isinstance(label, (int, np.integer)) or not 0 <= label < len(spec.names):
                raise ConclugenError(
                    f"{where}: label {_shown(label)}, expected an integer from 0 to {len(spec.names) - 1}"
                )
            counts[label] += 1
            return int(label)
        try:
            with np.errstate(over="ignore"):  # infinite then, and refused
                values = np.asarray(label, np.float32) if label is not None else np.zeros(0, np.float32)
        except (TypeError, ValueError, OverflowError):
            values = np.zeros(0, np.float32)
        if spec.kind == "value":
            if values.shape != () or not np.isfinite(values):
                raise ConclugenError(f"{where}: label {_shown(label)}, expected a finite number of float32")
            return np.float32(values)
        if values.shape != (len(spec.names),) or not np.isin(values, (0, 1)).all():
            raise ConclugenError(
                f"{where}: label {_shown(label)}, expected {len(spec.names)} values 0 or 1 ({', '.join(spec.names)})"
            )
        counts += values.astype(np.int64)
        return values

    def _targets(self, where: str, example: Example) -> dict[str, Any]:
        spare = set(example.targets) - set(self.spec.targets)
        if spare:
            raise ConclugenError(f"{where}: unknown target {min(spare)!r}; the data set has {list(self.spec.targets)}")
        result = {}
        for name, spec in self.spec.targets.items():
            value = example.targets.get(name)
            if value is None:
                nothing = np.full(len(spec.names), np.nan, np.float32)
                result[name] = {"single": -1, "value": np.float32(np.nan), "multi": nothing}[spec.kind]
            else:
                result[name] = self._label(f"{where}, target {name!r}", spec, value, self.label_counts[name])
        return result

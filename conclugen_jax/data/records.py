"""Check examples, write them as TFDS records to one part of a split, and count what the manifest needs.

One process writes a part, to a file of its own. Parts can be made in any order, on any machine.
"""

import dataclasses
import errno
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_pb2

from conclugen_jax.data.manifest import sha256
from conclugen_jax.data.moments import Moments
from conclugen_jax.data.sources import DatasetSpec, Example, LabelSpec, name_hash
from conclugen_jax.errors import ConclugenError, reason

WRITER_OPTIONS = "group_size:1,snappy"
"""One record a chunk, for random access; the quickest compression, since float features hardly shrink."""

BLOCK = 64
"""Vectors whose statistics are computed together."""

MOST_NAME = 1000
"""Characters of an id or a group, at most."""


def record_features(spec: DatasetSpec) -> tfds.features.FeaturesDict:
    """Return the TFDS features of one record."""

    def scalar(dtype):
        return tfds.features.Tensor(shape=(), dtype=dtype)

    def vector(*shape):
        return tfds.features.Tensor(shape=shape, dtype=np.float32, encoding=tfds.features.Encoding.BYTES)

    def target(label: LabelSpec):
        if label.kind == "multi":
            return vector(len(label.names))
        return scalar(np.int64 if label.kind == "single" else np.float32)

    record = {
        "id": tfds.features.Text(),
        "group": tfds.features.Text(),
        "features": {
            m: vector(None, dim) if spec.variants.get(m, 1) > 1 else vector(dim) for m, dim in spec.modalities.items()
        },
        "present": {m: scalar(np.bool_) for m in spec.modalities},
    }
    if spec.label.kind != "none":
        record["label"] = target(spec.label)
    if spec.targets:
        record["targets"] = {name: target(label) for name, label in spec.targets.items()}
    return tfds.features.FeaturesDict(record)


class _Texts(msgspec.Struct):
    """The fields of a part that are no arrays."""

    bad: list[tuple[int, str, str]]
    converted: dict[str, int]
    replaced: dict[str, int]
    targets: list[str]
    sha256: str


@dataclasses.dataclass
class Part:
    """Facts of a written part.

    Attributes:
      rows: int64 [n], the source's row of each record.
      presence: bool [n, modalities].
      ids: uint64 [n], hashes of the ids.
      groups: uint64 [n], hashes of the groups, 0 where empty.
      label_counts: the main label's first, then the further targets'; int64 [names] each.
      statistics: modality -> running statistics, of the first split.
      bad: (row, id, reason) of each example that was dropped.
      converted: number of vectors that were not float32, by "modality dtype".
      replaced: number of values that the source's reader put 0 for, by modality.
      sha256: of the file, "" where there is none.
    """

    rows: np.ndarray
    presence: np.ndarray
    ids: np.ndarray
    groups: np.ndarray
    label_counts: dict[str, np.ndarray]
    statistics: dict[str, Moments]
    bad: list[tuple[int, str, str]]
    converted: dict[str, int]
    replaced: dict[str, int]
    sha256: str = ""

    def save(self, path: Path) -> None:
        """Write an npz file that :meth:`load` reads."""
        texts = _Texts(self.bad, self.converted, self.replaced, list(self.label_counts), self.sha256)
        arrays = {name: getattr(self, name) for name in ("rows", "presence", "ids", "groups")}
        arrays |= {f"counts/{name}": counts for name, counts in self.label_counts.items()}
        for m, s in self.statistics.items():
            arrays |= {f"statistics/{m}/{k}": np.asarray(v) for k, v in vars(s).items()}
        np.savez(path, texts=np.frombuffer(msgspec.json.encode(texts), np.uint8), **arrays)

    @classmethod
    def load(cls, path: Path, spec: DatasetSpec) -> "Part":
        """Read what :meth:`save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            texts, statistics = msgspec.json.decode(file["texts"].tobytes(), type=_Texts), {}
            for m in spec.modalities:
                if f"statistics/{m}/count" in file:
                    count, *others = (file[f"statistics/{m}/{k}"] for k in ("count", "mean", "squares"))
                    statistics[m] = Moments(int(count), *others)
            return cls(
                **{name: file[name] for name in ("rows", "presence", "ids", "groups")},
                label_counts={name: file[f"counts/{name}"] for name in texts.targets},
                statistics=statistics,
                bad=texts.bad,
                converted=texts.converted,
                replaced=texts.replaced,
                sha256=texts.sha256,
            )


def write_part(
    spec: DatasetSpec, split: str, first_row: int, examples: Iterable[Example], path: Path, *, first_split: bool
) -> Part:
    """Check examples, write them as TFDS records to one array_record file, and count.

    Args:
      spec: of the data set.
      split: of the examples.
      first_row: the source's row of the first example.
      examples: to be written, in order.
      path: of the file; none remains if no example was good.
      first_split: compute statistics, and expect variants.

    Returns:
      Facts of the part. Examples with NaN or infinite values or without any modality are not written but listed as bad.

    Raises:
      ConclugenError: any other fault of an example, or a source that cannot be read.
      OSError: the file cannot be written.
    """
    checker = _Checker(spec, split, first_split=first_split)
    failure: list[Exception] = []

    def records() -> Iterator[bytes]:
        try:
            for row, example in enumerate(examples, first_row):
                record = checker.record(row, example)
                if record is not None:
                    yield serialize(record)
        except Exception as e:
            failure.append(e)
            raise

    try:
        writer = array_record_module.ArrayRecordWriter(str(path), WRITER_OPTIONS)
        try:
            for record in records():
                writer.write(record)
        finally:
            writer.close()
    except Exception as e:
        if failure:  # of the source or of a check; all else comes from writing
            raise _of_the_source(failure[0], split).with_traceback(None) from None
        if isinstance(e, OSError):
            raise
        what = reason(e, 300)
        number = next((n for n in (errno.ENOSPC, errno.EDQUOT) if os.strerror(n) in what), errno.EIO)
        raise OSError(number, what, str(path)) from e
    part = checker.part()
    if len(part.rows):
        part.sha256 = sha256(path)
    else:
        path.unlink()
    return part


def _of_the_source(error: Exception, split: str) -> Exception:
    if not isinstance(error, OSError):
        return error
    return ConclugenError(
        f"{error.filename or f'split {split!r}'}: cannot be read ({error.strerror or error}); repair the source"
    )


def serialize(record: Mapping[str, Any]) -> bytes:
    """Serialise a record as TFDS does under :func:`record_features`, in a third of the time of its general encoder."""
    example = tf_example_pb2.Example()
    feature = example.features.feature
    for name, value in _flat(record):
        if isinstance(value, str):
            feature[name].bytes_list.value.append(value.encode())
        elif isinstance(value, np.ndarray) and value.ndim:
            feature[name].bytes_list.value.append(value.tobytes())
        elif isinstance(value, float | np.floating):
            feature[name].float_list.value.append(value)
        else:
            feature[name].int64_list.value.append(int(value))
    return example.SerializeToString(deterministic=True)


def _flat(record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in record.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{key}", each) for key, each in value.items())
        else:
            yield name, value


def _shown(label: Any) -> str:
    """Return a label for a message; Python refuses to print an integer of thousands of digits."""
    try:
        return repr(label)[:100]
    except ValueError:
        return f"{type(label).__name__} too large to be written"


class _Bad(Exception):
    """An example that may be dropped."""


class _Checker:
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

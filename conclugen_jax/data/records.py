"""Check examples, write them as TFDS records to one part of a split, and count what the manifest needs.

One process writes a part, to a file of its own. Parts can be made in any order, on any machine.
"""

import contextlib
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

from conclugen_jax.data.cells import short
from conclugen_jax.data.sources import DatasetSpec, Example, LabelSpec, name_hash
from conclugen_jax.errors import ConclugenError, reason
from conclugen_jax.system import files

WRITER_OPTIONS = "group_size:1,snappy"
"""One record a chunk, for random access; the quickest compression, since float features hardly shrink."""

BLOCK = 64  # vectors whose statistics are computed together
MOST_NAME = 1000  # characters of an id or a group


@dataclasses.dataclass
class Moments:
    """Running mean and deviation of columns, float64 (Chan, Golub and LeVeque, 1983)."""

    count: int  # number of rows
    mean: np.ndarray  # [dim]
    squares: np.ndarray  # [dim], sums of squared differences from the mean

    @classmethod
    def zero(cls, dim: int) -> "Moments":
        """Return the moments of no rows."""
        return cls(0, np.zeros(dim), np.zeros(dim))

    @classmethod
    def of(cls, rows: np.ndarray) -> "Moments":
        """Return those of rows [n, dim], n > 0."""
        rows = np.array(rows, np.float64)
        mean = rows.mean(axis=0)
        rows -= mean
        return cls(len(rows), mean, np.square(rows, out=rows).sum(axis=0))

    def merge(self, other: "Moments") -> None:
        """Add the rows of another object."""
        if other.count:
            delta, total = other.mean - self.mean, self.count + other.count
            self.squares = self.squares + other.squares + np.square(delta) * (self.count * other.count / total)
            self.mean = self.mean + delta * (other.count / total)
            self.count = total

    def result(self) -> dict[str, list[float]]:
        """Return ``mean`` and ``std`` (population), each a list [dim]; zeros and ones if there was no row."""
        deviation = np.sqrt(self.squares / self.count) if self.count else np.ones_like(self.mean)
        return {"mean": self.mean.tolist(), "std": deviation.tolist()}


@dataclasses.dataclass(frozen=True)
class Job:
    """A part of a split that is to be written to an array_record file of its own."""

    spec: DatasetSpec
    split: str
    first_row: int  # of the source
    examples: Iterable[Example]
    path: Path


@dataclasses.dataclass
class Part:
    """Facts of a written part of n records."""

    split: str
    path: str  # of the file; there is none where n is 0
    rows: np.ndarray  # int64 [n], of the source
    presence: np.ndarray  # bool [n, modalities]
    ids: np.ndarray  # uint64 [n], hashes
    groups: np.ndarray  # uint64 [n], hashes, 0 where empty
    label_counts: dict[str, np.ndarray]  # "" for the main label, and each further target -> int64 [names]
    statistics: dict[str, Moments]  # of each modality, in the first split
    bad: list[tuple[int, str, str]]  # row, id and reason of each example that was dropped
    converted: dict[str, int]  # "modality dtype" -> number of vectors that were not float32
    replaced: dict[str, int]  # modality -> number of values that the source's reader put 0 for
    left_out: dict[str, int]  # "modality reason" -> number of frames that the source's reader dropped
    sha256: str = ""  # of the file, if there is one

    def save(self) -> None:
        """Write a file beside the part's, which :meth:`load` reads."""
        encoder = msgspec.msgpack.Encoder(enc_hook=lambda x: (x.dtype.str, x.shape, x.tobytes()))
        Path(f"{self.path}.facts").write_bytes(encoder.encode(self))

    @classmethod
    def load(cls, path: Path) -> "Part":
        """Read what :meth:`save` wrote beside a part's file."""
        decoder = msgspec.msgpack.Decoder(cls, dec_hook=lambda _, x: np.frombuffer(x[2], x[0]).reshape(x[1]))
        return decoder.decode(Path(f"{path}.facts").read_bytes())


Parts = dict[str, list[Part]]  # of each split, in order


def record_features(spec: DatasetSpec) -> tfds.features.FeaturesDict:
    """Return the TFDS features of one record."""

    def vector(*shape):
        return tfds.features.Tensor(shape=shape, dtype=np.float32, encoding=tfds.features.Encoding.BYTES)

    def target(label: LabelSpec):
        if label.kind == "multi":
            return vector(len(label.names))
        return tfds.features.Tensor(shape=(), dtype=np.int64 if label.kind == "single" else np.float32)

    several = {m for m, n in spec.variants.items() if n > 1}
    record = {
        "id": tfds.features.Text(),
        "group": tfds.features.Text(),
        "features": {m: vector(None, dim) if m in several else vector(dim) for m, dim in spec.modalities.items()},
        "present": {m: tfds.features.Tensor(shape=(), dtype=np.bool_) for m in spec.modalities},
    }
    if spec.label.kind != "none":
        record["label"] = target(spec.label)
    if spec.targets:
        record["targets"] = {name: target(label) for name, label in spec.targets.items()}
    return tfds.features.FeaturesDict(record)


def write_part(job: Job) -> Part:
    """Check examples, write them to one array_record file, and count.

    For the first split, the function also computes statistics and expects variants. It does not write examples with NaN,
    infinite values or no modality, but lists them as bad. If all are bad, no file remains.

    Raises:
      ConclugenError: an example has any other fault, or the source cannot be read.
      OSError: the file cannot be written.
    """

    def readable() -> Iterator[Example]:
        try:
            yield from job.examples
        except OSError as e:
            where = e.filename or f"split {job.split!r}"
            raise ConclugenError(f"{where}: cannot be read ({e.strerror or e}); repair the source") from None

    checker, path = Checker(job.spec, job.split), job.path
    with _writing(path):
        writer = array_record_module.ArrayRecordWriter(str(path), WRITER_OPTIONS)
    try:
        for row, example in enumerate(readable(), job.first_row):
            record = checker.record(row, example)
            if record is not None:
                data = serialize(record)
                with _writing(path):
                    writer.write(data)
    finally:
        with _writing(path):
            writer.close()
    if checker.written:
        return checker.part(path, files.sha256(path))
    path.unlink()
    return checker.part(path, "")


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn whatever the writer raises into OSError."""
    try:
        yield
    except Exception as e:
        what = reason(e, 300)
        number = next((n for n in (errno.ENOSPC, errno.EDQUOT) if os.strerror(n) in what), errno.EIO)
        raise OSError(number, what, str(path)) from e


def serialize(record: Mapping[str, Any]) -> bytes:
    """Serialise a record as TFDS does under :func:`record_features`, in a third of the time of its general encoder."""
    example = tf_example_pb2.Example()
    feature = example.features.feature
    for name, value in record.items():
        if isinstance(value, str):
            feature[name].bytes_list.value.append(value.encode())
        elif isinstance(value, np.ndarray) and value.ndim:
            feature[name].bytes_list.value.append(value.tobytes())
        elif isinstance(value, float | np.floating):
            feature[name].float_list.value.append(value)
        else:
            feature[name].int64_list.value.append(int(value))
    return example.SerializeToString(deterministic=True)


class Checker:
    """Turn the examples of a part into records, refuse bad ones, and count."""

    def __init__(self, spec: DatasetSpec, split: str):
        self.spec, self.split, first_split = spec, split, split == spec.splits[0]
        self.shapes = {m: (dim,) for m, dim in spec.modalities.items()}
        stacked = {m: n for m, n in spec.variants.items() if n > 1}
        self.shapes |= {m: (n if first_split else 1, spec.modalities[m]) for m, n in stacked.items()}
        self.statistics = {m: Moments.zero(dim) for m, dim in spec.modalities.items()} if first_split else {}
        self.pending: dict[str, list[np.ndarray]] = {m: [] for m in self.statistics}
        self.written: list[tuple[int, int, int, list[bool]]] = []  # row, hashes of id and group, presence
        labels = {"": spec.label, **spec.targets}
        self.label_counts = {name: np.zeros(len(label.names), np.int64) for name, label in labels.items()}
        self.bad: list[tuple[int, str, str]] = []
        self.converted, self.replaced, self.left_out = Counter(), Counter(), Counter()

    def part(self, path: Path, sha256: str) -> Part:
        """Return everything counted, with the file and its hash."""
        for m in self.pending:
            self._count_pending(m)
        rows, ids, groups, presence = zip(*self.written, strict=True) if self.written else ((),) * 4
        return Part(
            split=self.split,
            path=str(path),
            rows=np.array(rows, np.int64),
            presence=np.array(presence, bool).reshape(-1, len(self.spec.modalities)),
            ids=np.array(ids, np.uint64),
            groups=np.array(groups, np.uint64),
            label_counts=self.label_counts,
            statistics=self.statistics,
            bad=self.bad,
            converted=dict(self.converted),
            replaced=dict(self.replaced),
            left_out=dict(self.left_out),
            sha256=sha256,
        )

    def record(self, row: int, example: Example) -> dict[str, Any] | None:
        """Return the TFDS record of an example, by names such as ``features/video``; None if it is bad."""
        if not isinstance(example, Example):
            raise ConclugenError(f"split {self.split!r}, row {row}: a {type(example).__name__}, expected an Example")
        spec, where = self.spec, f"split {self.split!r}, row {row}, id {str(example.id)[:100]!r}"
        for name, text, least in (("id", example.id, 1), ("group", example.group, 0)):
            if not isinstance(text, str) or not least <= len(text) <= MOST_NAME or not text.isprintable():
                raise ConclugenError(f"{where}: {name} must be a printable str of {least} to {MOST_NAME} characters")
        known = {"modality": (example.features, spec.modalities), "target": (example.targets, spec.targets)}
        for kind, (given, names) in known.items():
            if not given.keys() <= names.keys():
                spare = min(given.keys() - names.keys())
                raise ConclugenError(f"{where}: unknown {kind} {spare!r}; the data set has {list(names)}")
        self.left_out.update(example.left_out)
        vectors = {m: self._vector(where, m, x) for m, x in example.features.items()}
        fault = "" if vectors else "no modality is present"
        for m, x in vectors.items():
            wrong = np.flatnonzero(~np.isfinite(x))
            if wrong.size and not fault:
                found = f"{wrong.size} of {x.size} values are NaN or infinite in float32"
                fault = f"modality {m!r}: {found} (first at column {wrong[0] % x.shape[-1]})"
        if fault:
            self.bad.append((row, example.id, fault))
            return None
        present = {m: m in vectors for m in spec.modalities}
        record = {"id": example.id, "group": example.group}
        for m, there in present.items():
            record[f"features/{m}"] = vectors[m] if there else np.zeros(self.shapes[m], np.float32)
            record[f"present/{m}"] = there
        if spec.label.kind != "none":
            record["label"] = self._label(where, spec.label, example.label, self.label_counts[""])
        for name in spec.targets:
            record[f"targets/{name}"] = self._target(where, name, example.targets.get(name))
        self.written.append((row, name_hash(example.id), name_hash(example.group), list(present.values())))
        self.replaced.update({m: n for m, n in example.replaced.items() if n})
        for m, x in vectors.items():
            dtype = np.asarray(example.features[m]).dtype
            if dtype != np.float32:
                self.converted[f"{m} {dtype}"] += 1
            for variant in np.atleast_2d(x) if m in self.statistics else ():
                self.pending[m].append(variant)
                if len(self.pending[m]) == BLOCK:
                    self._count_pending(m)
        return record

    def _count_pending(self, modality: str) -> None:
        if self.pending[modality]:
            self.statistics[modality].merge(Moments.of(self.pending[modality]))
            self.pending[modality] = []

    def _vector(self, where: str, modality: str, x: Any) -> np.ndarray:
        x, shape = np.asarray(x), self.shapes[modality]
        if shape[:-1] == (1,) and x.ndim == 1:
            x = x[None]
        if x.dtype.kind not in "fiub" or x.shape != shape:
            found = f"{x.dtype} of shape {x.shape}, expected real numbers of shape {shape}"
            raise ConclugenError(f"{where}, modality {modality!r}: {found}")
        with np.errstate(over="ignore"):  # infinite then, and bad
            return x.astype(np.float32)

    def _target(self, where: str, name: str, value: Any) -> Any:
        spec = self.spec.targets[name]
        if value is not None:
            return self._label(f"{where}, target {name!r}", spec, value, self.label_counts[name])
        if spec.kind == "single":
            return -1
        return np.float32(np.nan) if spec.kind == "value" else np.full(len(spec.names), np.nan, np.float32)

    def _label(self, where: str, spec: LabelSpec, label: Any, counts: np.ndarray) -> Any:
        """Return a label as it is stored, and count it."""
        number = len(spec.names)
        if spec.kind == "single":
            if isinstance(label, int | np.integer) and not isinstance(label, bool) and 0 <= label < number:
                counts[label] += 1
                return int(label)
            raise ConclugenError(f"{where}: label {short(label)}, expected an integer from 0 to {number - 1}")
        with np.errstate(over="ignore"), contextlib.suppress(TypeError, ValueError, OverflowError):
            values = np.asarray(label, np.float32)
            if spec.kind == "value" and values.shape == () and np.isfinite(values):
                return np.float32(values)
            if spec.kind == "multi" and values.shape == (number,) and np.isin(values, (0, 1)).all():
                counts += values.astype(np.int64)
                return values
        one = "a finite number of float32"
        expected = one if spec.kind == "value" else f"{number} values 0 or 1 ({', '.join(spec.names)})"
        raise ConclugenError(f"{where}: label {short(label)}, expected {expected}")

"""Open and verify a built data set, and read its rows from the shards on request.

A record is a serialised ``tf.train.Example`` with its fields in the order that protobuf gives them (by name, but a name
comes after those that it begins): first the vectors of all modalities, of known sizes, then everything else. A record in
this form needs no parsing for its vectors; any other record is parsed.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypedDict

import numpy as np

from conclugen_jax.data import manifest as manifest_lib
from conclugen_jax.data.files import readable
from conclugen_jax.data.manifest import Manifest
from conclugen_jax.data.sources import LabelSpec
from conclugen_jax.errors import ConclugenError

LABEL_LISTS = {"single": "int64_list", "value": "float_list", "multi": "bytes_list"}
"""Kind of a label -> the list of a protobuf feature that holds its one value."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A built data set in a folder, whose files were compared with its manifest by ``hash`` or by ``size``."""

    path: Path
    manifest: Manifest
    verified: str = "hash"


def open_dataset(path: str | Path, *, verify: str = "hash") -> Dataset:
    """Open the folder ``DATA_DIR/NAME/VERSION`` of a built data set, and verify its files by ``hash`` or by ``size``.

    Raises:
      ConclugenError: no data set there, or a file that differs from the manifest.
    """
    manifest = manifest_lib.read(path)
    manifest_lib.verify(path, manifest, level=verify)
    return Dataset(Path(path), manifest, verify)


Variants = Mapping[str, np.ndarray]
"""Modality -> which stored variants of the rows asked for: integer [n] or, for several of each row, [n, k]."""


class Rows(TypedDict):
    """Rows of a split, in the order they were asked for."""

    features: dict[str, np.ndarray]  # of each modality float32 [n, dim]; zeros where it is absent
    present: dict[str, np.ndarray]  # of each modality bool [n]
    label: np.ndarray  # int64 [n] (one class), float32 [n] (value), [n, num_labels] (multi-label) or [n, 0] (none)


class RowSource(Protocol):
    """Rows of one split by index."""

    tier: str
    num_examples: int
    usable: np.ndarray  # int64, the rows that have at least one of the modalities, in the split's order
    variants: Mapping[str, int]  # modality -> number of variants that can be asked for, where there are several

    def rows(self, indices: np.ndarray, variants: Variants | None = None) -> Rows:
        """Return rows at the given indices [n], in that order.

        A modality that ``variants`` does not name gets variant 0. If ``variants`` has shape [n, k], features are [n, k, dim].
        """


def label_field(target: str) -> str:
    """Return the field of a further target, or of the main label for the empty name."""
    return f"targets/{target}" if target else "label"


def label_array(values: Sequence[Any], spec: LabelSpec) -> np.ndarray:
    """Return stored labels as int64 [n] (single), float32 [n] (value), [n, labels] (multi) or [n, 0] (none)."""
    if spec.kind == "multi":
        return np.frombuffer(b"".join(values), "<f4").reshape(-1, len(spec.names))
    if spec.kind == "none":
        return np.zeros((len(values), 0), np.float32)
    return np.array(values, np.int64 if spec.kind == "single" else np.float32)


def fields(manifest: Manifest, split: str) -> dict[str, tuple[str, int | None]]:
    """Return field of a split's records -> the protobuf list that holds its one value, and its bytes where known."""
    found: dict[str, tuple[str, int | None]] = {"id": ("bytes_list", None), "group": ("bytes_list", None)}
    for m, variants in manifest.stored_variants(split).items():
        found[f"features/{m}"] = ("bytes_list", 4 * manifest.modalities[m] * variants)
        found[f"present/{m}"] = ("int64_list", None)
    for target, spec in manifest.labels().items():
        if spec.kind != "none":
            size = 4 * len(spec.names) if spec.kind == "multi" else None
            found[label_field(target)] = (LABEL_LISTS[spec.kind], size)
    return found


def open_shards(paths: Iterable[Path]) -> Any:
    """Return the records of shard files by their position."""
    from array_record.python import array_record_data_source  # late, as below: mistakes are reported before

    return array_record_data_source.ArrayRecordDataSource([str(path) for path in paths])


def parse(record: bytes) -> Any:
    """Return the fields of a record by name."""
    from tensorflow_datasets.proto import tf_example_pb2

    return tf_example_pb2.Example.FromString(record).features.feature


class Wire:
    """Where the leading float vectors of every record of a split are; ``offsets``, by name, are from the first field."""

    def __init__(self, sizes: Mapping[str, int]):
        """Lay out the fields ``sizes``: name -> number of float32 values; they sort before all other fields."""
        from tensorflow_datasets.proto import tf_feature_pb2 as proto

        self._parse = proto.Features.FromString
        self.offsets: dict[str, int] = {}
        self._headers: list[tuple[int, int, bytes]] = []
        self._end = 0
        for name in sorted(sizes, key=lambda name: name.encode() + b"\xff"):
            content = bytes(4 * sizes[name])
            feature = proto.Feature(bytes_list=proto.BytesList(value=[content]))
            header = proto.Features(feature={name: feature}).SerializeToString().removesuffix(content)
            self.offsets[name] = self._end + len(header)
            self._headers.append((self._end, self.offsets[name], header))
            self._end = self.offsets[name] + len(content)

    def locate(self, record: bytes) -> tuple[int, Any] | None:
        """Return where the first field begins, and the parsed other fields; None for a record of another form."""
        start = 2
        while start < 11 and record[start - 1 : start] >= b"\x80":
            start += 1  # the length of all fields comes first, seven bits a byte
        if record[:1] != b"\x0a":
            return None
        for begin, end, header in self._headers:
            if record[start + begin : start + end] != header:
                return None
        if start + self._end > len(record):
            return None
        return start, self._parse(record[start + self._end :]).feature


class ShardStream:
    """Rows read from the shards when they are asked for: random access, nothing kept."""

    tier = "shards"

    def __init__(
        self, dataset: Dataset, split: str, modalities: Sequence[str], *, target: str = "", all_variants: bool = False
    ):
        """Open a split.

        Args:
          dataset: as opened.
          split: its name.
          modalities: those to read, in this order.
          target: which further target is the rows' label; the main one by default.
          all_variants: whether tables made of this stream hold all stored variants of an example, or variant 0 only.

        Raises:
          ConclugenError: unknown split, modality or target, files that do not fit the manifest, or no usable row.
        """
        manifest, where = dataset.manifest, f"data set {dataset.path}"
        way_out = "; add a column 'split' or folders of splits, or build with --num_folds and --fold"
        manifest_lib.choose(manifest.splits, [split], what="split", where=where, way_out=way_out)
        self.dataset, self.split, self.target = dataset, split, target
        self.modalities = tuple(manifest_lib.choose(manifest.modalities, modalities, what="modality", where=where))
        manifest_lib.choose(manifest.targets, [target] if target else [], what="target", where=where)
        self.label = manifest.labels()[target]
        self.where = f"{where}, split {split!r}"
        self.num_examples = manifest.splits[split]["num_examples"]
        columns = [list(manifest.modalities).index(m) for m in self.modalities]
        with self._reading():
            self.source = open_shards(dataset.path / name for name in manifest_lib.shard_names(manifest, split))
            if len(self.source) != self.num_examples:
                raise ValueError(f"{len(self.source)} records, the manifest says {self.num_examples}")
            self.presence = manifest_lib.read_presence(dataset.path, manifest, split)[:, columns]
        self.usable = np.flatnonzero(self.presence.any(axis=1))
        if not self.usable.size:
            raise ConclugenError(f"{self.where}: no row has any of the modalities {list(modalities)}; name others")
        self._stored = manifest.stored_variants(split)
        self.variants = {m: self._stored[m] for m in self.modalities if all_variants and self._stored[m] > 1}
        self._wire = Wire({f"features/{m}": dim * self._stored[m] for m, dim in manifest.modalities.items()})
        floats = sum(manifest.modalities[m] * self.variants.get(m, 1) for m in self.modalities)
        self.gib = self.num_examples * floats * 4 / 2**30
        self.affine: Any = None  # ``persons.Affine`` by which features are standardised

    def rows(self, indices: np.ndarray, variants: Variants | None = None) -> Rows:
        """Read rows; see :class:`RowSource`. A ConclugenError names the split of a record that cannot be read."""
        dims, wanted = self.dataset.manifest.modalities, variants or {}
        features = {m: np.empty((*np.shape(wanted.get(m, indices)), dims[m]), np.float32) for m in self.modalities}
        columns = [(m, x, self._wire.offsets[f"features/{m}"], dims[m]) for m, x in features.items()]
        labels, name, stored = [], label_field(self.target), LABEL_LISTS.get(self.label.kind)
        with self._reading():
            for i, record in enumerate(self._read(indices)):
                start, others = self._wire.locate(record) or (None, parse(record))
                for m, x, offset, dim in columns:
                    data, at = (record, start + offset) if start else (_bytes(others, f"features/{m}"), 0)
                    if m in wanted:
                        x[i] = np.frombuffer(data, "<f4", dim * self._stored[m], at).reshape(-1, dim)[wanted[m][i]]
                    else:
                        x[i] = np.frombuffer(data, "<f4", dim, at)
                labels.append(None if stored is None else getattr(others[name], stored).value[0])
            label = label_array(labels, self.label)
        return {
            "features": features if self.affine is None else self.affine.of(indices, features),
            "present": {m: self.presence[indices, c] for c, m in enumerate(self.modalities)},
            "label": label,
        }

    def labels(self, indices: np.ndarray) -> np.ndarray:
        """Read the labels of rows alone, as :meth:`rows` does."""
        name, stored = label_field(self.target), LABEL_LISTS[self.label.kind]
        with self._reading():
            values = [getattr(parse(record)[name], stored).value[0] for record in self._read(indices)]
        return label_array(values, self.label)

    def names(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Read ids and groups of the rows, two string arrays, as :meth:`rows` does."""
        with self._reading():
            examples = [parse(record) for record in self._read(indices)]
            return tuple(np.array([_bytes(e, key).decode() for e in examples]) for key in ("id", "group"))

    def _read(self, indices: np.ndarray) -> list[bytes]:
        return self.source.__getitems__([int(i) for i in indices])

    def _reading(self) -> contextlib.AbstractContextManager:
        """Catch the many kinds of errors that array_record and protobuf raise on damaged records."""
        return readable(self.where, "build the data set again", other=Exception)


def _bytes(example: Any, key: str) -> bytes:
    return example[key].bytes_list.value[0]

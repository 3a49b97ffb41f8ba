"""Know the form of stored records: their fields, and where the feature vectors are in the bytes.

A record is a serialised ``tf.train.Example`` with its fields in the order that protobuf gives them (by name, but a name
comes after those that it begins): first the vectors of all modalities, of known sizes, then everything else. A record in
this form needs no parsing for its vectors; any other record is parsed.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conclugen_jax.data.manifest import Manifest
from conclugen_jax.data.sources import LabelSpec

LABEL_LISTS = {"single": "int64_list", "value": "float_list", "multi": "bytes_list"}
"""Kind of a label -> the list of a protobuf feature that holds its one value."""


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

"""Where the feature vectors lie in the bytes of a record, so that they can be taken without parsing it.

A record is a serialised ``tf.train.Example`` with its fields in the order that protobuf gives them (by name, but a name
comes after those that it begins): first the vectors of all modalities, of known sizes, then everything else. Any record
that is not exactly so is parsed in the general way.
"""

from collections.abc import Mapping
from typing import Any

from tensorflow_datasets.proto import tf_feature_pb2


class Wire:
    """Offsets of the leading float vectors of every record of a split."""

    def __init__(self, sizes: Mapping[str, int]):
        """Lay out; ``sizes``: field -> number of float32 values, for all fields that sort before any other."""
        self._offsets: dict[str, int] = {}
        self._headers: list[tuple[int, int, bytes]] = []
        position = 0
        for name in sorted(sizes, key=lambda name: name.encode() + b"\xff"):
            header, num_bytes = _header(name.encode(), 4 * sizes[name]), 4 * sizes[name]
            self._headers.append((position, position + len(header), header))
            self._offsets[name] = position + len(header)
            position += len(header) + num_bytes
        self._end = position

    def locate(self, record: bytes) -> tuple[int, Any] | None:
        """Where the first field begins, and the parsed other fields; None if the record is laid out differently."""
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
        return start, tf_feature_pb2.Features.FromString(record[start + self._end :]).feature

    def offset(self, name: str) -> int:
        """Offset of a vector from the first field."""
        return self._offsets[name]


def _header(name: bytes, num_bytes: int) -> bytes:
    """What protobuf writes before the bytes of ``{name: Feature(bytes_list=BytesList(value=[bytes]))}`` in a map."""
    value = b"\x0a" + _varint(num_bytes)
    bytes_list = b"\x0a" + _varint(len(value) + num_bytes) + value
    entry = b"\x0a" + _varint(len(name)) + name + b"\x12" + _varint(len(bytes_list) + num_bytes) + bytes_list
    return b"\x0a" + _varint(len(entry) + num_bytes) + entry


def _varint(n: int) -> bytes:
    result = b""
    while n >= 0x80:
        result += bytes([n & 0x7F | 0x80])
        n >>= 7
    return result + bytes([n])

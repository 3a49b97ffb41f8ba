"""Read the records of a split once: what they hold in numbers, hashes of names and vectors, and every fault."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python import array_record_data_source
from tensorflow_datasets.proto import tf_example_pb2

from conclugen_jax.data import manifest as manifest_lib
from conclugen_jax.data import wire
from conclugen_jax.data.checks import MOST_NAME
from conclugen_jax.data.manifest import Manifest
from conclugen_jax.data.sources import name_hash
from conclugen_jax.data.tallies import FeatureTally, LabelTally
from conclugen_jax.errors import ConclugenError, reason

CHUNK_BYTES = 4 * 2**20
"""Features that are looked at together, at most."""

MOST_ROWS = 2048
"""Records in a chunk, at most."""


class Faults:
    """What is wrong: by file and kind, with the rows of the split that it concerns."""

    def __init__(self, folder: Path, *, collect: bool):
        """Collect faults, or refuse the data set at the first one."""
        self._folder, self._collect = folder, collect
        self._found: dict[tuple[str, str], list[list[int]]] = {}

    def add(self, file: str, what: str, rows: Iterable[int] | None = None) -> None:
        """Note a fault of a file, or of these rows of its split; nothing where there are none.

        Raises:
          ConclugenError: faults are not collected.
        """
        for row in [None] if rows is None else rows:
            if not self._collect:
                place = "" if row is None else f"row {row}: "
                raise ConclugenError(
                    f"{self._folder / file}: {place}{what}; --verify lists all faults, launch.build_dataset --overwrite "
                    "builds again"
                )
            ranges = self._found.setdefault((file, what), [])
            if row is not None and ranges and ranges[-1][1] == row - 1:
                ranges[-1][1] = int(row)
            elif row is not None:
                ranges.append([int(row), int(row)])

    def check_file(self, manifest: Manifest, name: str) -> None:
        """Compare a file's size and hash with the manifest.

        Raises:
          ConclugenError: faults are not collected.
        """
        path, expected = self._folder / name, manifest.files[name]
        if not path.is_file():
            self.add(name, "the file is missing")
        elif path.stat().st_size != expected["bytes"]:
            self.add(name, f"{path.stat().st_size} bytes, the manifest says {expected['bytes']}")
        else:
            try:
                if manifest_lib.sha256(path) != expected["sha256"]:
                    self.add(name, "content differs from the manifest (SHA-256)")
            except ConclugenError as e:
                self.add(name, str(e).removeprefix(f"{path}: "))

    def report(self) -> list[dict[str, Any]]:
        """Return ``file``, ``what`` and ``rows`` (first and last of each range) of each fault, in the order found."""
        return [{"file": file, "what": what, "rows": rows} for (file, what), rows in self._found.items()]


class Chunk(NamedTuple):
    """Consecutive records of a shard.

    Attributes:
      file: name of the shard.
      rows: int64 [n], rows of the split.
      columns: field of the records -> n values.
    """

    file: str
    rows: np.ndarray
    columns: dict[str, list[Any]]


class SplitScan:
    """Everything that was learned of a split; complete once :meth:`run` has returned.

    The shards are read one after the other without TFDS, so that a fault has a file and a row.

    Attributes:
      rows: int64 [n], those that could be read.
      ids: uint64 [n], hashes of the ids.
      groups: uint64 [n], hashes of the groups, 0 where empty.
      present: bool [n, modalities].
      features: modality -> numbers and hashes of its vectors.
      labels: "" and each further target -> its counts.
      complete: whether every record could be read, and none is missing or spare.
    """

    def __init__(self, folder: Path, manifest: Manifest, split: str, faults: Faults, *, verify: bool):
        """Prepare; nothing is read yet.

        Args:
          folder: of the data set.
          manifest: as read from it.
          split: its name.
          faults: takes in what is found.
          verify: hash the shards and check every field of every record.
        """
        self._folder, self._manifest, self._split = folder, manifest, split
        self._faults, self._verify = faults, verify
        self._sizes = {name: manifest.files[name]["records"] for name in manifest_lib.shard_names(manifest, split)}
        first = split == next(iter(manifest.splits))
        self._variants = {m: manifest.variants.get(m, 1) if first else 1 for m in manifest.modalities}
        self._fields = wire.fields(manifest, self._variants)
        row_bytes = sum(4 * dim * self._variants[m] for m, dim in manifest.modalities.items())
        self._chunk_rows = max(1, min(MOST_ROWS, CHUNK_BYTES // row_bytes))
        self._flags = _presence(folder, manifest, split, faults) if verify else None
        self.features = {m: FeatureTally(dim) for m, dim in manifest.modalities.items()}
        self.labels = {name: LabelTally(spec) for name, spec in {"": manifest.label, **manifest.targets}.items()}
        self.rows, self.complete = np.zeros(0, np.int64), True
        self.ids = self.groups = np.zeros(0, np.uint64)
        self.present = np.zeros((0, len(manifest.modalities)), bool)

    def run(self, progress: Callable[[int], None]) -> "SplitScan":
        """Read all records; ``progress`` is called with the number of rows done.

        Raises:
          ConclugenError: the first fault, where faults are not collected.
        """
        done, pieces = 0, [(self.rows, self.ids, self.groups, self.present)]
        for name, size in self._sizes.items():
            if self._verify:
                self._faults.check_file(self._manifest, name)
            for chunk in self._chunks(name, done):
                pieces.append(self._take(chunk))
                progress(int(chunk.rows[-1]) + 1)
            done += size
            progress(done)
        self.rows, self.ids, self.groups, self.present = map(np.concatenate, zip(*pieces, strict=True))
        self.complete &= len(self.rows) == done
        if self._verify:
            _, first = np.unique(self.ids, return_index=True)
            for row in np.delete(self.rows, first):
                self._faults.add(self._find(int(row))[0], "the id of a row before it in the split", [row])
        return self

    def text(self, row: int, key: str) -> str:
        """Return ``id`` or ``group`` of a row that was read before."""
        name, position = self._find(row)
        return _parse(_open(self._folder / name)[position], self._fields)[key]

    def _find(self, row: int) -> tuple[str, int]:
        """Return the shard that holds a row of the split, and the row's place in it."""
        for name, size in self._sizes.items():
            if row < size:
                return name, row
            row -= size
        raise IndexError(row)

    def _chunks(self, name: str, first_row: int) -> Iterator[Chunk]:
        """Yield the records of one shard that can be read; the first is row ``first_row`` of the split."""
        try:
            source = _open(self._folder / name)
        except Exception as e:  # array_record raises RuntimeError, most often without saying more
            self._faults.add(name, f"cannot be opened ({reason(e)})")
            return
        if len(source) != self._sizes[name]:
            self.complete = False
            self._faults.add(name, f"holds {len(source)} records, the manifest says {self._sizes[name]}")
        num = min(len(source), self._sizes[name])
        for start in range(0, num, self._chunk_rows):
            positions = range(start, min(start + self._chunk_rows, num))
            found: dict[int, dict[str, Any]] = {}
            for position, raw in zip(positions, _read(source, positions), strict=True):
                row = first_row + position
                try:
                    found[row] = _parse(raw, self._fields)
                except _Unfit as e:
                    self._faults.add(name, str(e), [row])
            if found:
                columns = {field: [record[field] for record in found.values()] for field in self._fields}
                yield Chunk(name, np.array([*found], np.int64), columns)

    def _take(self, chunk: Chunk) -> tuple[np.ndarray, ...]:
        """Count a chunk; returns its rows, hashes of ids and groups, and presence."""
        manifest, columns = self._manifest, chunk.columns
        present = np.array([columns[f"present/{m}"] for m in manifest.modalities], bool).T
        features = {
            m: np.frombuffer(b"".join(columns[f"features/{m}"]), "<f4").reshape(-1, self._variants[m], dim)
            for m, dim in manifest.modalities.items()
        }
        if self._verify:
            self._check(chunk, present, features)
        for c, (m, x) in enumerate(features.items()):
            self.features[m].add(x, present[:, c])
        for target, tally in self.labels.items():
            if tally.spec.kind == "none":
                continue
            wrong = tally.add(wire.label_array(columns[wire.label_field(target)], tally.spec), may_lack=bool(target))
            what = f"target {target!r}" if target else "label"
            self._faults.add(chunk.file, f"{what} is out of range", chunk.rows[wrong])
        ids, groups = (np.array([name_hash(text) for text in columns[key]], np.uint64) for key in ("id", "group"))
        return chunk.rows, ids, groups, present

    def _check(self, chunk: Chunk, present: np.ndarray, features: Mapping[str, np.ndarray]) -> None:
        """Find faults of records that can be parsed."""
        file, rows, faults = chunk.file, chunk.rows, self._faults
        for key, least in (("id", 1), ("group", 0)):
            bad = [not (least <= len(t) <= MOST_NAME and t.isprintable()) for t in chunk.columns[key]]
            faults.add(file, f"{key} is not of {least} to {MOST_NAME} printable characters", rows[np.array(bad)])
        for here, (m, x) in zip(present.T, features.items(), strict=True):
            finite = np.isfinite(x).all(axis=(1, 2))
            faults.add(file, f"{m} has values that are not finite", rows[~finite])
            faults.add(file, f"{m} is absent but not zero", rows[~here & finite & x.any(axis=(1, 2))])
        faults.add(file, "no modality is present", rows[~present.any(axis=1)])
        if self._flags is not None:
            other, name = self._flags[rows] != present, manifest_lib.PRESENCE.format(split=self._split)
            for c, m in enumerate(features):
                faults.add(name, f"{m} is said otherwise than in the record", rows[other[:, c]])


class _Unfit(Exception):
    """A record that is not of the form the manifest says."""


def _parse(raw: bytes | None, fields: Mapping[str, tuple[str, int | None]]) -> dict[str, Any]:
    """Return the values of a record, each of the kind and size it must have."""
    if raw is None:
        raise _Unfit("the record cannot be read")
    try:
        found = tf_example_pb2.Example.FromString(raw).features.feature
    except Exception as e:  # protobuf raises kinds of its own
        raise _Unfit("the record cannot be parsed") from e
    record = {}
    for name, (kind, size) in fields.items():
        values = getattr(found[name], kind).value if name in found else ()
        if len(values) != 1:
            raise _Unfit(f"field {name!r} holds {len(values)} values of the expected kind, expected one")
        if size is not None and len(values[0]) != size:
            raise _Unfit(f"field {name!r} holds {len(values[0])} bytes, expected {size}")
        record[name] = values[0]
    if len(found) != len(fields):
        raise _Unfit(f"unknown field {min(set(found) - set(fields))!r}")
    try:
        return record | {key: record[key].decode() for key in ("id", "group")}
    except UnicodeDecodeError as e:
        raise _Unfit("id or group is not UTF-8") from e


def _open(path: Path) -> Any:
    return array_record_data_source.ArrayRecordDataSource([str(path)])


def _read(source: Any, positions: Sequence[int]) -> list[bytes | None]:
    """Return records, None for those that cannot be read."""
    try:
        return source.__getitems__(list(positions))
    except Exception:  # array_record does not say which of them failed, and raises many kinds
        if len(positions) == 1:
            return [None]
        return [record for position in positions for record in _read(source, [position])]


def _presence(folder: Path, manifest: Manifest, split: str, faults: Faults) -> np.ndarray | None:
    """Return the file beside the shards, bool [num_examples, modalities]; None where it is not that."""
    name = manifest_lib.PRESENCE.format(split=split)
    faults.check_file(manifest, name)
    shape = (manifest.splits[split]["num_examples"], len(manifest.modalities))
    try:
        flags = np.load(folder / name, allow_pickle=False, mmap_mode="r")
    except (OSError, ValueError, EOFError) as e:
        faults.add(name, f"cannot be read ({reason(e)})")
        return None
    if not isinstance(flags, np.ndarray) or flags.dtype != bool or flags.shape != shape:
        faults.add(name, f"not bool of shape {shape}")
        return None
    return flags

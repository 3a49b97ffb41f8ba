"""One pass over the records of a split: what they hold in numbers, hashes of names and vectors, and every fault."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_data_source
from tensorflow_datasets.proto import tf_example_pb2

from conclugen_jax.data import manifest as manifest_lib
from conclugen_jax.data.manifest import Manifest
from conclugen_jax.data.records import MOST_NAME
from conclugen_jax.data.sources import name_hash
from conclugen_jax.data.tallies import FeatureTally, LabelTally
from conclugen_jax.errors import ConclugenError

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

    def add(self, file: str, what: str, row: int | None = None) -> None:
        """Note a fault of a file, and of a row of its split.

        Raises:
          ConclugenError: faults are not collected.
        """
        if not self._collect:
            place = "" if row is None else f"row {row}: "
            raise ConclugenError(
                f"{self._folder / file}: {place}{what}; --verify lists all faults, launch.build_dataset --overwrite builds anew"
            )
        ranges = self._found.setdefault((file, what), [])
        if row is None:
            return
        if ranges and ranges[-1][1] == row - 1:
            ranges[-1][1] = row
        else:
            ranges.append([row, row])

    def add_rows(self, file: str, what: str, rows: np.ndarray) -> None:
        """Note the same fault of several rows.

        Raises:
          ConclugenError: faults are not collected.
        """
        for row in rows.tolist():
            self.add(file, what, row)

    def report(self) -> list[dict[str, Any]]:
        """``file``, ``what`` and ``rows`` (first and last of each range) of each fault, in the order found."""
        return [{"file": file, "what": what, "rows": rows} for (file, what), rows in self._found.items()]


@dataclasses.dataclass
class Chunk:
    """Consecutive records of a shard.

    Attributes:
      file: name of the shard.
      rows: int64 [n], rows of the split.
      texts: ``id`` and ``group`` -> n strings.
      present: bool [n, modalities].
      features: modality -> float32 [n, variants, dim].
      labels: "" and each further target -> [n] or [n, labels].
    """

    file: str
    rows: np.ndarray
    texts: dict[str, list[str]]
    present: np.ndarray
    features: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]


class Shards:
    """The shards of a split, read one after the other without TFDS, so that a fault has a file and a row.

    Attributes:
      sizes: name of each shard -> number of its records, as the manifest says.
      as_listed: whether every shard read so far holds as many.
    """

    def __init__(self, folder: Path, manifest: Manifest, split: str):
        self.folder, self.manifest = folder, manifest
        first = split == next(iter(manifest.splits))
        self.variants = {m: manifest.variants.get(m, 1) if first else 1 for m in manifest.modalities}
        self.sizes = {name: manifest.files[name]["records"] for name in manifest_lib.shard_names(manifest, split)}
        self.as_listed = True
        self._fields = _fields(manifest, self.variants)
        row_bytes = sum(4 * dim * self.variants[m] for m, dim in manifest.modalities.items())
        self._chunk_rows = max(1, min(MOST_ROWS, CHUNK_BYTES // row_bytes))

    def find(self, row: int) -> tuple[str, int]:
        """The shard that holds a row of the split, and the row's place in it."""
        for name, size in self.sizes.items():
            if row < size:
                return name, row
            row -= size
        raise IndexError(row)

    def text(self, row: int, key: str) -> str:
        """``id`` or ``group`` of a row that was read before."""
        name, position = self.find(row)
        return _parse(_open(self.folder / name)[position], self._fields)[key]

    def chunks(self, name: str, first_row: int, faults: Faults) -> Iterator[Chunk]:
        """The records of one shard that can be read, the first of which is row ``first_row`` of the split.

        Raises:
          ConclugenError: the first fault, where faults are not collected.
        """
        try:
            source = _open(self.folder / name)
        except Exception as e:  # array_record raises RuntimeError, most often without saying more
            faults.add(name, f"cannot be opened ({_reason(e)})")
            return
        if len(source) != self.sizes[name]:
            self.as_listed = False
            faults.add(name, f"holds {len(source)} records, the manifest says {self.sizes[name]}")
        num = min(len(source), self.sizes[name])
        for start in range(0, num, self._chunk_rows):
            positions = range(start, min(start + self._chunk_rows, num))
            rows, records = [], []
            for position, raw in zip(positions, _read(source, positions), strict=True):
                try:
                    records.append(_parse(raw, self._fields))
                    rows.append(first_row + position)
                except _Unfit as e:
                    faults.add(name, str(e), first_row + position)
            if records:
                yield self._chunk(name, rows, records)

    def _chunk(self, name: str, rows: list[int], records: list[dict[str, Any]]) -> Chunk:
        manifest, n = self.manifest, len(records)
        columns = {field: [record[field] for record in records] for field in self._fields}

        def vectors(field: str, *shape: int) -> np.ndarray:
            return np.frombuffer(b"".join(columns[field]), "<f4").reshape(n, *shape)

        labels = {}
        for target, spec in {"": manifest.label, **manifest.targets}.items():
            field = f"targets/{target}" if target else "label"
            if spec.kind == "multi":
                labels[target] = vectors(field, len(spec.names))
            elif spec.kind != "none":
                labels[target] = np.array(columns[field], np.int64 if spec.kind == "single" else np.float32)
        return Chunk(
            file=name,
            rows=np.array(rows, np.int64),
            texts={key: columns[key] for key in ("id", "group")},
            present=np.array([columns[f"present/{m}"] for m in manifest.modalities], bool).T,
            features={m: vectors(f"features/{m}", self.variants[m], dim) for m, dim in manifest.modalities.items()},
            labels=labels,
        )


class SplitScan:
    """Everything that was learned of a split.

    Attributes:
      shards: of the split.
      rows: int64 [n], those that could be read.
      ids: uint64 [n], hashes of the ids.
      groups: uint64 [n], hashes of the groups, 0 where empty.
      present: bool [n, modalities].
      features: modality -> numbers and hashes of its vectors.
      labels: "" and each further target -> its counts.
      complete: whether every record could be read, and none is missing or spare.
    """

    def __init__(self, folder: Path, manifest: Manifest, split: str, faults: Faults, *, verify: bool):
        """Nothing is read yet.

        Args:
          folder: of the data set.
          manifest: as read from it.
          split: its name.
          faults: takes in what is found.
          verify: hash the shards and check every field of every record.
        """
        self.shards = Shards(folder, manifest, split)
        self._manifest, self._split, self._faults, self._verify = manifest, split, faults, verify
        first = split == next(iter(manifest.splits))
        self.features = {m: FeatureTally(dim, columns=verify and first) for m, dim in manifest.modalities.items()}
        self.labels = {name: LabelTally(spec) for name, spec in {"": manifest.label, **manifest.targets}.items()}
        self._flags = _presence(folder, manifest, split, faults) if verify else None
        self._columns: dict[str, list[np.ndarray]] = {
            "rows": [np.zeros(0, np.int64)],
            "ids": [np.zeros(0, np.uint64)],
            "groups": [np.zeros(0, np.uint64)],
            "present": [np.zeros((0, len(manifest.modalities)), bool)],
        }

    def run(self, progress: Callable[[int], None]) -> "SplitScan":
        """Read all records; ``progress`` is called with the number of rows done.

        Raises:
          ConclugenError: the first fault, where faults are not collected.
        """
        done = 0
        for name, size in self.shards.sizes.items():
            if self._verify:
                check_file(self.shards.folder, self._manifest, name, self._faults)
            for chunk in self.shards.chunks(name, done, self._faults):
                self._take(chunk)
                progress(int(chunk.rows[-1]) + 1)
            done += size
            progress(done)
        for key, pieces in self._columns.items():
            setattr(self, key, np.concatenate(pieces))
        whole = len(self.rows) == self._manifest.splits[self._split]["num_examples"]
        self.complete = whole and self.shards.as_listed
        if self._verify:
            self._check_ids()
        return self

    def _take(self, chunk: Chunk) -> None:
        if self._verify:
            self._check(chunk)
        self._columns["rows"].append(chunk.rows)
        self._columns["present"].append(chunk.present)
        for key in ("id", "group"):
            hashes = np.array([name_hash(text) for text in chunk.texts[key]], np.uint64)
            self._columns[f"{key}s"].append(hashes)
        for c, (m, x) in enumerate(chunk.features.items()):
            self.features[m].add(x, chunk.present[:, c], part=chunk.file)
        for target, values in chunk.labels.items():
            wrong = self.labels[target].add(values, may_lack=bool(target))
            what = f"target {target!r}" if target else "label"
            self._faults.add_rows(chunk.file, f"{what} is out of range", chunk.rows[wrong])

    def _check(self, chunk: Chunk) -> None:
        """Faults of records that are read without trouble."""
        for key, least in (("id", 1), ("group", 0)):
            bad = [not (least <= len(t) <= MOST_NAME and t.isprintable()) for t in chunk.texts[key]]
            what = f"{key} is not of {least} to {MOST_NAME} printable characters"
            self._faults.add_rows(chunk.file, what, chunk.rows[np.array(bad)])
        for c, (m, x) in enumerate(chunk.features.items()):
            here = chunk.present[:, c]
            finite, zero = np.isfinite(x).all(axis=(1, 2)), (x == 0).all(axis=(1, 2))
            self._faults.add_rows(chunk.file, f"{m} has values that are not finite", chunk.rows[~finite])
            self._faults.add_rows(chunk.file, f"{m} is absent but not zero", chunk.rows[~here & finite & ~zero])
        self._faults.add_rows(chunk.file, "no modality is present", chunk.rows[~chunk.present.any(axis=1)])
        if self._flags is not None:
            other = self._flags[chunk.rows] != chunk.present
            file = manifest_lib.PRESENCE.format(split=self._split)
            for c, m in enumerate(chunk.features):
                self._faults.add_rows(file, f"{m} is said otherwise than in the record", chunk.rows[other[:, c]])

    def _check_ids(self) -> None:
        order = np.argsort(self.ids, kind="stable")
        again = order[1:][self.ids[order][1:] == self.ids[order][:-1]]
        for row in np.sort(self.rows[again]):
            self._faults.add(self.shards.find(int(row))[0], "the id of a row before it in the split", int(row))


def check_file(folder: Path, manifest: Manifest, name: str, faults: Faults) -> None:
    """Compare a file's size and hash with the manifest.

    Raises:
      ConclugenError: the first fault, where faults are not collected.
    """
    path, expected = folder / name, manifest.files[name]
    if not path.is_file():
        faults.add(name, "the file is missing")
    elif path.stat().st_size != expected["bytes"]:
        faults.add(name, f"{path.stat().st_size} bytes, the manifest says {expected['bytes']}")
    else:
        try:
            if manifest_lib.sha256(path) != expected["sha256"]:
                faults.add(name, "content differs from the manifest (SHA-256)")
        except ConclugenError as e:
            faults.add(name, str(e).removeprefix(f"{path}: "))


class _Unfit(Exception):
    """A record that is not of the form the manifest says."""


def _fields(manifest: Manifest, variants: Mapping[str, int]) -> dict[str, tuple[str, int | None]]:
    """Name of each field of a record -> the list that holds its one value, and its bytes where they are known."""
    fields: dict[str, tuple[str, int | None]] = {"id": ("bytes_list", None), "group": ("bytes_list", None)}
    for m, dim in manifest.modalities.items():
        fields[f"features/{m}"] = ("bytes_list", 4 * dim * variants[m])
        fields[f"present/{m}"] = ("int64_list", None)
    for name, spec in {"label": manifest.label, **{f"targets/{k}": v for k, v in manifest.targets.items()}}.items():
        if spec.kind == "multi":
            fields[name] = ("bytes_list", 4 * len(spec.names))
        elif spec.kind != "none":
            fields[name] = ("int64_list" if spec.kind == "single" else "float_list", None)
    return fields


def _parse(raw: bytes | None, fields: Mapping[str, tuple[str, int | None]]) -> dict[str, Any]:
    """The values of a record, each of the kind and size it must have."""
    if raw is None:
        raise _Unfit("the record cannot be read")
    try:
        found = tf_example_pb2.Example.FromString(raw).features.feature
    except Exception as e:  # protobuf has kinds of its own
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
    """Records, None for those that cannot be read."""
    try:
        return source.__getitems__(list(positions))
    except Exception:  # one of them, and array_record does not say which
        return [_read_one(source, position) for position in positions]


def _read_one(source: Any, position: int) -> bytes | None:
    try:
        return source[position]
    except Exception:  # array_record raises many kinds for content that is not what was written
        return None


def _presence(folder: Path, manifest: Manifest, split: str, faults: Faults) -> np.ndarray | None:
    """Bool [num_examples, modalities] of the file beside the shards, None where it is not that."""
    name = manifest_lib.PRESENCE.format(split=split)
    check_file(folder, manifest, name, faults)
    shape = (manifest.splits[split]["num_examples"], len(manifest.modalities))
    try:
        flags = np.load(folder / name, allow_pickle=False, mmap_mode="r")
    except (OSError, ValueError, EOFError) as e:
        faults.add(name, f"cannot be read ({_reason(e)})")
        return None
    if not isinstance(flags, np.ndarray) or flags.dtype != bool or flags.shape != shape:
        faults.add(name, f"not bool of shape {shape}")
        return None
    return flags


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]

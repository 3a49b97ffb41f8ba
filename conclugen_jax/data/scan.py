"""Read the records of a split once: what they hold in numbers, hashes of names and vectors, and every fault."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_data_source
from tensorflow_datasets.proto import tf_example_pb2

from conclugen_jax.data import manifest as manifest_lib
from conclugen_jax.data import wire
from conclugen_jax.data.checks import MOST_NAME
from conclugen_jax.data.manifest import Manifest
from conclugen_jax.data.sources import name_hash
from conclugen_jax.data.tallies import Columns, Vectors, label_fits, measure
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
                    f"{self._folder / file}: {place}{what}; --verify lists all faults, conclugen build --overwrite "
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
        if fault := manifest_lib.file_fault(self._folder, manifest, name, level="hash"):
            self.add(name, fault)

    def report(self) -> list[dict[str, Any]]:
        """Return ``file``, ``what`` and ``rows`` (first and last of each range) of each fault, in the order found."""
        return [{"file": file, "what": what, "rows": rows} for (file, what), rows in self._found.items()]


class SplitScan:
    """Everything that was learned of a split; complete once :meth:`run` has returned.

    The shards are read one after the other without TFDS, so that a fault has a file and a row.

    Attributes:
      rows: int64 [n], those that could be read.
      ids: uint64 [n], hashes of the ids.
      groups: uint64 [n], hashes of the groups, 0 where empty.
      present: bool [n, modalities].
      vectors: modality -> measures of its vectors.
      columns: modality -> mean, deviation and extremes of its features, over the vectors that are present and finite.
      labels: "" and each further target -> its known values, [k] or [k, labels]; no entry without labels.
      misfits: those of the labels with values out of range.
      complete: whether every record could be read, and none is missing or spare.
    """

    def __init__(self, folder: Path, manifest: Manifest, split: str, faults: Faults):
        """Prepare; nothing is read yet.

        Args:
          folder: of the data set.
          manifest: as read from it.
          split: its name.
          faults: takes in what is found.
        """
        self._folder, self._manifest, self._split, self._faults = folder, manifest, split, faults
        self._sizes = {name: manifest.files[name]["records"] for name in manifest_lib.shard_names(manifest, split)}
        first = split == next(iter(manifest.splits))
        self._variants = {m: manifest.variants.get(m, 1) if first else 1 for m in manifest.modalities}
        self._fields = wire.fields(manifest, self._variants)
        row_bytes = sum(4 * dim * self._variants[m] for m, dim in manifest.modalities.items())
        self._chunk_rows = max(1, min(MOST_ROWS, CHUNK_BYTES // row_bytes))
        self.specs = {"": manifest.label, **manifest.targets}
        self.columns = {m: Columns(dim) for m, dim in manifest.modalities.items()}
        self.complete, self.misfits = True, set[str]()

    def run(self, progress: Callable[[int], None], *, verify: bool) -> "SplitScan":
        """Read all records.

        Args:
          progress: called with the number of rows done.
          verify: hash the shards and check every field of every record.

        Raises:
          ConclugenError: the first fault, where faults are not collected.
        """
        flags = _presence(self._folder, self._manifest, self._split, self._faults) if verify else None
        done, chunks = 0, [self._columns([], [])]
        for name, size in self._sizes.items():
            if verify:
                self._faults.check_file(self._manifest, name)
            for rows, records in self._chunks(name, done):
                chunks.append(self._columns(rows, records))
                progress(rows[-1] + 1)
            done += size
            progress(done)
        self._join(chunks)
        self.complete &= len(self.rows) == done
        if verify:
            self._check(flags)
        for target, values in self.labels.items():
            fits, unknown = label_fits(values, self.specs[target])
            wrong = ~fits & ~(unknown & bool(target))  # only further targets may be unknown
            self._note(f"target {target!r} is out of range" if target else "label is out of range", wrong)
            self.labels[target] = values[fits]
            if wrong.any():
                self.misfits.add(target)
        if verify:
            again = np.ones(len(self.rows), bool)
            again[np.unique(self.ids, return_index=True)[1]] = False
            self._note("the id of a row before it in the split", again)
        return self

    def good(self, modality: str) -> np.ndarray:
        """Return which vectors of a modality are present and finite, bool [n, variants]."""
        column = list(self.vectors).index(modality)
        return self.present[:, [column]] & (self.vectors[modality].bad == 0)

    def text(self, row: int, key: str) -> str:
        """Return ``id`` or ``group`` of a row that was read before."""
        for name, size in self._sizes.items():
            if row < size:
                return _parse(_open(self._folder / name)[row], self._fields)[key]
            row -= size
        raise IndexError(row)

    def _chunks(self, name: str, first_row: int) -> Iterator[tuple[list[int], list[dict[str, Any]]]]:
        """Yield rows and records of one shard that can be read; the first is row ``first_row`` of the split."""
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
                try:
                    found[first_row + position] = _parse(raw, self._fields)
                except _Unfit as e:
                    self._faults.add(name, str(e), [first_row + position])
            if found:
                yield list(found), list(found.values())

    def _columns(self, rows: list[int], records: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        """Return what is kept of a chunk of records, by name."""
        modalities = self._manifest.modalities
        kept = {"rows": np.array(rows, np.int64)}
        kept["present"] = np.array([[r[f"present/{m}"] for m in modalities] for r in records], bool)
        kept["present"] = kept["present"].reshape(-1, len(modalities))
        for key, least in (("id", 1), ("group", 0)):
            texts = [record[key] for record in records]
            kept[f"{key}s"] = np.array([name_hash(text) for text in texts], np.uint64)
            kept[f"{key}s wrong"] = np.array(
                [not (least <= len(t) <= MOST_NAME and t.isprintable()) for t in texts], bool
            )
        for c, (m, dim) in enumerate(modalities.items()):
            x = np.frombuffer(b"".join(r[f"features/{m}"] for r in records), "<f4").reshape(-1, self._variants[m], dim)
            vectors = measure(x)
            vectors.hashes[~kept["present"][:, c]] = 0
            kept |= {f"{m} {key}": values for key, values in vectors._asdict().items()}
            self.columns[m].add(x[kept["present"][:, c, None] & (vectors.bad == 0)])
        for target, spec in self.specs.items():
            if spec.kind != "none":
                field = wire.label_field(target)
                kept[field] = wire.label_array([record[field] for record in records], spec)
        return kept

    def _join(self, chunks: list[dict[str, np.ndarray]]) -> None:
        kept = {key: np.concatenate([chunk[key] for chunk in chunks]) for key in chunks[0]}
        self.rows, self.ids, self.groups, self.present = (kept[key] for key in ("rows", "ids", "groups", "present"))
        self._wrong = {key: kept[f"{key}s wrong"] for key in ("id", "group")}
        self.vectors = {m: Vectors(*(kept[f"{m} {f}"] for f in Vectors._fields)) for m in self._manifest.modalities}
        self.labels = {t: kept[wire.label_field(t)] for t, spec in self.specs.items() if spec.kind != "none"}

    def _note(self, what: str, wrong: np.ndarray) -> None:
        """Note a fault of rows, bool [n], of the shards that hold them."""
        end = 0
        for name, size in self._sizes.items():
            start, end = end, end + size
            self._faults.add(name, what, self.rows[wrong & (start <= self.rows) & (self.rows < end)])

    def _check(self, flags: np.ndarray | None) -> None:
        """Find faults of records that can be parsed; ``flags``: bool [num_examples, modalities] beside the shards."""
        for key, least in (("id", 1), ("group", 0)):
            self._note(f"{key} is not of {least} to {MOST_NAME} printable characters", self._wrong[key])
        for here, (m, v) in zip(self.present.T, self.vectors.items(), strict=True):
            finite = (v.bad == 0).all(axis=1)
            self._note(f"{m} has values that are not finite", ~finite)
            self._note(f"{m} is absent but not zero", ~here & finite & ((v.lows != 0) | (v.highs != 0)).any(axis=1))
        self._note("no modality is present", ~self.present.any(axis=1))
        if flags is not None:
            other, file = flags[self.rows] != self.present, manifest_lib.PRESENCE.format(split=self._split)
            for c, m in enumerate(self.vectors):
                self._faults.add(file, f"{m} is said otherwise than in the record", self.rows[other[:, c]])


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

"""Read the records of a split once: what they hold in numbers, hashes of names and vectors, and every fault."""

import collections
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conclugen_jax.data import manifest as manifest_lib, persons, shards
from conclugen_jax.data.manifest import Manifest
from conclugen_jax.data.records import MOST_NAME, Moments
from conclugen_jax.data.sources import LabelSpec, name_hash
from conclugen_jax.errors import reason

CHUNK_BYTES = 4 * 2**20
"""Features that are looked at together, at most."""

MOST_ROWS = 2048
"""Records in a chunk, at most."""

COLUMNS_SHOWN = 8
"""Constant columns that are named, at most."""


class Faults(dict[tuple[str, str], list[int]]):
    """(file, what is wrong) -> the rows of the file's split that it concerns, none for the file as a whole."""

    def add(self, file: str, what: str, rows: Iterable[int] = ()) -> None:
        """Note a fault of these rows or of a file; nothing where the text is empty."""
        if what:
            self.setdefault((file, what), []).extend(map(int, rows))

    def report(self) -> list[dict[str, Any]]:
        """Return ``file``, ``what`` and ``rows`` (first and last of each range) of each fault, file by file as found."""
        files = [file for file, _ in self]
        report = []
        for file, what in sorted(self, key=lambda fault: files.index(fault[0])):
            rows = np.array(self[file, what], int)
            ranges = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1) if len(rows) else []
            report.append({"file": file, "what": what, "rows": [[int(r[0]), int(r[-1])] for r in ranges]})
        return report


class Tally:
    """Numbers of a modality's vectors. Those that are present and finite count; others only as not finite."""

    def __init__(self, dim: int):
        self.columns, self._norms = Moments.zero(dim), Moments.zero(1)
        self._low, self._high = np.full(dim, np.inf, np.float32), np.full(dim, -np.inf, np.float32)
        self._zeros = self._zero_vectors = self.non_finite = 0

    @np.errstate(all="ignore")
    def add(self, x: np.ndarray, present: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Count vectors, float32 [n, variants, dim] of n examples.

        Returns:
          Hashes of the vectors, uint64 [n, variants], 0 for those of zeros only; which examples are finite, bool [n].
        """
        filled, bad = x.any(axis=2), (~np.isfinite(x)).sum(axis=2)
        hashes = np.zeros(filled.shape, np.uint64)
        hashes[filled] = [int.from_bytes(hashlib.blake2b(v, digest_size=8).digest(), "little") for v in x[filled]]
        self.non_finite += int(bad[present].sum())
        which = present[:, None] & (bad == 0)
        good = x[which]
        if len(good):
            self.columns.merge(Moments.of(good))
            self._norms.merge(Moments.of(np.sqrt(np.einsum("nd,nd->n", good, good, dtype=np.float64))[:, None]))
            self._low, self._high = np.minimum(self._low, good.min(axis=0)), np.maximum(self._high, good.max(axis=0))
            self._zeros += good.size - np.count_nonzero(good)
            self._zero_vectors += int((~filled[which]).sum())
        return hashes, (bad == 0).all(axis=1)

    def report(self) -> dict[str, Any]:
        """Return the numbers; None for those that need a vector where there is none."""
        count, norm = self.columns.count, self._norms.result()
        constant = np.flatnonzero(self._low == self._high).tolist() if count > 1 else []
        return {
            "vectors": count,
            "norm_mean": norm["mean"][0] if count else None,
            "norm_std": norm["std"][0] if count else None,
            "min": float(self._low.min()) if count else None,
            "max": float(self._high.max()) if count else None,
            "zero_share": self._zeros / (count * len(self._low)) if count else None,
            "zero_vectors": self._zero_vectors,
            "constant_columns": len(constant),
            "first_constant_columns": constant[:COLUMNS_SHOWN],
            "non_finite": self.non_finite,
        }


class SplitScan:
    """The results of reading a split once; complete when :meth:`run` has returned.

    It reads the shards one after the other without TFDS, so that it can report the file and row of a fault.
    """

    rows: np.ndarray  # int64 [n], those that could be read
    present: np.ndarray  # bool [n, modalities]
    hashes: dict[str, np.ndarray]
    """``id``, ``group``, ``features/MODALITY`` -> uint64 [n, 1 or variants]; 0 where empty, absent or all zeros."""
    labels: dict[str, np.ndarray]  # "" and each further target that has labels -> those in range, [k] or [k, labels]

    def __init__(self, folder: Path, manifest: Manifest, split: str, faults: Faults, *, verify: bool):
        """Prepare; with ``verify`` files are hashed and every field is checked, else only that labels can be counted."""
        self._folder, self._manifest, self._split, self._faults, self._verify = folder, manifest, split, faults, verify
        self._sizes = {name: manifest.files[name]["records"] for name in manifest_lib.shard_names(manifest, split)}
        self._variants, self._fields = manifest.stored_variants(split), shards.fields(manifest, split)
        self._chunk_rows = max(1, min(MOST_ROWS, CHUNK_BYTES // sum(size or 0 for _, size in self._fields.values())))
        self._kept: dict[str, list[np.ndarray]] = collections.defaultdict(list)
        self._presence_file, self._flags = manifest_lib.PRESENCE.format(split=split), None
        self.specs = {name: spec for name, spec in manifest.labels().items() if spec.kind != "none"}
        self.tallies = {m: Tally(dim) for m, dim in manifest.modalities.items()}
        self.complete = True  # every record could be read, and none is missing or spare
        self.misfits = set[str]()  # those of the labels with values out of range

    def run(self, progress: Callable[[int], None]) -> "SplitScan":
        """Read all records; call ``progress`` with the number of rows done."""
        if self._verify:
            self._check_file(self._presence_file)
            try:
                self._flags = manifest_lib.read_presence(self._folder, self._manifest, self._split)
            except ValueError as e:
                self._faults.add(self._presence_file, str(e).removeprefix(f"{self._presence_file}: "))
        self._add("", [], [])  # so that there are arrays of each kind
        done = 0
        for name, size in self._sizes.items():
            if self._verify:
                self._check_file(name)
            for rows, records in self._chunks(name, done):
                self._add(name, rows, records)
                progress(rows[-1] + 1)
            done += size
            progress(done)
        found = {key: np.concatenate(chunks) for key, chunks in self._kept.items()}
        self.rows, self.present = found.pop("rows"), found.pop("present")
        self.labels = {name: found.pop(shards.label_field(name)) for name in self.specs}
        self._groups = {name: found.pop(f"group of {shards.label_field(name)}")[:, 0] for name in self.specs}
        self.hashes = found
        self.complete &= len(self.rows) == done
        for row in np.delete(self.rows, np.unique(found["id"], return_index=True)[1]) if self._verify else ():
            self._faults.add(self._shard(row)[0], "the id of a row before it in the split", [row])
        return self

    def label_report(self, name: str) -> dict[str, Any]:
        """Summarise labels in range: ``known`` and ``counts``, or ``mean``, ``std``, ``min`` and ``max`` (None without any).

        ``explained_by_group`` is :func:`persons.explained`.
        """
        if name not in self.labels:
            return {"known": 0}
        values, spec = self.labels[name], self.specs[name]
        share = {"explained_by_group": persons.explained(values, spec, self._groups[name])}
        if spec.kind == "value":
            keys, values = ("mean", "std", "min", "max"), values.astype(np.float64)
            spread = {key: float(getattr(values, key)()) if len(values) else None for key in keys}
            return {"known": len(values), **spread, **share}
        counts = np.bincount(values, minlength=len(spec.names)) if spec.kind == "single" else values.sum(axis=0)
        return {"known": len(values), "counts": counts.astype(int).tolist(), **share}

    def text(self, index: int, key: str) -> str:
        """Return ``id`` or ``group`` of one of the rows that were read."""
        name, position = self._shard(self.rows[index])
        return self._parse(shards.open_shards([self._folder / name])[position])[key]

    def _shard(self, row: int) -> tuple[str, int]:
        """Return the shard that holds a row, and the row's position in it."""
        ends = np.cumsum(list(self._sizes.values()))
        number = int(np.searchsorted(ends, row, side="right"))
        name = list(self._sizes)[number]
        return name, int(row - ends[number] + self._sizes[name])

    def _check_file(self, name: str) -> None:
        self._faults.add(name, manifest_lib.file_fault(self._folder, self._manifest, name, level="hash"))

    def _chunks(self, name: str, first_row: int) -> Iterator[tuple[list[int], list[dict[str, Any]]]]:
        """Yield rows and records of one shard that can be read; the first is row ``first_row`` of the split."""
        try:
            source = shards.open_shards([self._folder / name])
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
            for row, raw in enumerate(_read(source, positions), first_row + start):
                try:
                    found[row] = self._parse(raw)
                except ValueError as e:
                    self._faults.add(name, str(e), [row])
            if found:
                yield list(found), list(found.values())

    def _parse(self, raw: bytes | None) -> dict[str, Any]:
        """Return the values of a record, each of the kind and size it must have; else raise a ValueError that says why."""
        if raw is None:
            raise ValueError("the record cannot be read")
        try:
            found = shards.parse(raw)
        except Exception as e:  # protobuf raises kinds of its own
            raise ValueError("the record cannot be parsed") from e
        record = {}
        for name, (kind, size) in self._fields.items():
            values = getattr(found[name], kind).value if name in found else ()
            if len(values) != 1:
                raise ValueError(f"field {name!r} holds {len(values)} values of the expected kind, expected one")
            if size is not None and len(values[0]) != size:
                raise ValueError(f"field {name!r} holds {len(values[0])} bytes, expected {size}")
            record[name] = values[0]
        if len(found) != len(self._fields):
            raise ValueError(f"unknown field {min(set(found) - set(self._fields))!r}")
        try:
            return record | {key: record[key].decode() for key in ("id", "group")}
        except UnicodeDecodeError as e:
            raise ValueError("id or group is not UTF-8") from e

    def _add(self, name: str, rows: list[int], records: list[dict[str, Any]]) -> None:
        """Collect hashes and numbers of a chunk of records, and their faults."""

        def note(what: str, wrong: np.ndarray, file: str = name, *, always: bool = False) -> None:
            if wrong.any() and (always or self._verify):
                self._faults.add(file, what, kept["rows"][wrong])

        modalities = self._manifest.modalities
        present = np.array([[r[f"present/{m}"] for m in modalities] for r in records], bool)
        present = present.reshape(-1, len(modalities))
        kept = {"rows": np.array(rows, np.int64), "present": present}
        for key, least in (("id", 1), ("group", 0)):
            texts = [record[key] for record in records]
            kept[key] = np.array([name_hash(text) for text in texts], np.uint64)[:, None]
            wrong = np.array([not (least <= len(t) <= MOST_NAME and t.isprintable()) for t in texts], bool)
            note(f"{key} is not of {least} to {MOST_NAME} printable characters", wrong)
        for c, (m, dim) in enumerate(modalities.items()):
            x = np.frombuffer(b"".join(r[f"features/{m}"] for r in records), "<f4").reshape(-1, self._variants[m], dim)
            hashes, finite = self.tallies[m].add(x, present[:, c])
            kept[f"features/{m}"] = np.where(present[:, [c]], hashes, np.uint64(0))
            note(f"{m} has values that are not finite", ~finite)
            note(f"{m} is absent but not zero", ~present[:, c] & finite & hashes.any(axis=1))
            if self._flags is not None:
                other = self._flags[rows, c] != present[:, c]
                note(f"{m} is said otherwise than in the record", other, self._presence_file)
        note("no modality is present", ~present.any(axis=1))
        for target, spec in self.specs.items():
            field = shards.label_field(target)
            values = shards.label_array([record[field] for record in records], spec)
            fits, unknown = _in_range(values, spec)
            wrong = ~fits & ~(unknown & bool(target))  # only further targets may be unknown
            note(f"target {target!r} is out of range" if target else "label is out of range", wrong, always=True)
            kept[field], kept[f"group of {field}"] = values[fits], kept["group"][fits]
            if wrong.any():
                self.misfits.add(target)
        for key, values in kept.items():
            self._kept[key].append(values)


def _in_range(values: np.ndarray, spec: LabelSpec) -> tuple[np.ndarray, np.ndarray]:
    """Return which labels are in range and which are unknown (-1 or NaN), bool [n] each; ``values``: [n] or [n, labels]."""
    if spec.kind == "single":
        return (values >= 0) & (values < len(spec.names)), values == -1
    if spec.kind == "multi":
        return np.isin(values, (0, 1)).all(axis=1), np.isnan(values).all(axis=1)
    return np.isfinite(values), np.isnan(values)


def _read(source: Any, positions: Sequence[int]) -> list[bytes | None]:
    """Return records, None for those that cannot be read."""
    try:
        return source.__getitems__(list(positions))
    except Exception:  # array_record does not say which of them failed, and raises many kinds
        if len(positions) == 1:
            return [None]
        return [record for position in positions for record in _read(source, [position])]

"""Report what a built data set holds, what is suspicious in it, where it came from, and on request whether it is sound."""

import contextlib
import io
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from conclugen_jax.data import manifest as manifest_lib
from conclugen_jax.data.corpora import CORPORA, expected_counts
from conclugen_jax.data.manifest import Manifest
from conclugen_jax.data.records import record_features
from conclugen_jax.data.scan import Faults, SplitScan
from conclugen_jax.data.sources import DatasetSpec, LabelSpec
from conclugen_jax.data.tallies import feature_report, label_report
from conclugen_jax.errors import reason

Scans = dict[str, SplitScan]
TOLERANCE = 1e-9
"""Relative difference of statistics from the manifest's that is put down to rounding."""


def inspect(
    path: str | Path, *, verify: bool = False, top: int = 5, progress: Callable[[int, int | None], None] | None = None
) -> dict[str, Any]:
    """Read all records of a data set once and report on them.

    Args:
      path: the folder ``DATA_DIR/NAME/VERSION``.
      verify: compare every file's hash, every field of every record, all counts, the statistics and the metadata of
        TFDS with the manifest, and list every fault; else only the files' sizes are compared.
      top: names of examples and groups that are listed of each kind, at most.
      progress: called with the number of examples done and of all.

    Returns:
      A report that JSON can hold; ``faults`` is empty for a sound data set, ``verified`` is ``records`` or ``size``.

    Raises:
      ConclugenError: no data set there, a manifest that cannot be used; without ``verify`` the first file of another
        size or record that cannot be used.
    """
    folder = Path(path)
    manifest = manifest_lib.read(folder)
    faults = Faults(folder, collect=verify)
    total = sum(facts["num_examples"] for facts in manifest.splits.values())
    if verify:
        _check_metadata(folder, manifest, faults)
    else:
        manifest_lib.verify(folder, manifest, level="size")
    scans: Scans = {}
    done = 0
    for split, facts in manifest.splits.items():
        tell = (lambda n, before=done: progress(before + n, total)) if progress is not None else lambda n: None
        scans[split] = SplitScan(folder, manifest, split, faults).run(tell, verify=verify)
        done += facts["num_examples"]
    if verify:
        _check_counts(manifest, scans, faults)
        _check_statistics(manifest, scans, faults)
    return {
        **_identity(folder, manifest),
        "splits": {split: _split_report(manifest, split, scan) for split, scan in scans.items()},
        "duplicates": {m: _duplicates(scans, m, top) for m in manifest.modalities},
        "shared_ids": _shared(scans, "id", top),
        "shared_groups": _shared(scans, "group", top),
        **_provenance(folder, manifest),
        "verified": "records" if verify else "size",
        "faults": faults.report(),
    }


def _identity(folder: Path, manifest: Manifest) -> dict[str, Any]:
    def label(spec: LabelSpec) -> dict[str, Any]:
        return {"kind": spec.kind, "names": list(spec.names)}

    kept = ("name", "version", "description", "licence", "modalities", "variants")
    return {
        "path": str(folder),
        **{key: getattr(manifest, key) for key in kept},
        "label": label(manifest.label),
        "targets": {name: label(spec) for name, spec in manifest.targets.items()},
    }


def _split_report(manifest: Manifest, split: str, scan: SplitScan) -> dict[str, Any]:
    modalities = list(manifest.modalities)
    kinds, counts = np.unique(scan.present, axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    combinations = {"+".join(m for m, p in zip(modalities, kinds[i], strict=True) if p): int(counts[i]) for i in order}
    labels = {name: label_report(scan.labels.get(name), spec) for name, spec in scan.specs.items()}
    missing = (~scan.present).sum(axis=0).tolist()
    return {
        "num_examples": len(scan.rows),
        "dropped": manifest.splits[split]["dropped"],
        "groups": int(np.unique(scan.groups[scan.groups != 0]).size),
        "label": labels.pop(""),
        "targets": labels,
        "missing": dict(zip(modalities, missing, strict=True)),
        "combinations": combinations,
        "features": {
            m: feature_report(scan.vectors[m], scan.good(m), scan.present[:, c], scan.columns[m])
            for c, m in enumerate(modalities)
        },
    }


Entries = tuple[np.ndarray, np.ndarray]
"""Hashes in ascending order, and the row of each, in ascending order where they tie; no pair twice."""


def _entries(hashes: np.ndarray, rows: np.ndarray) -> Entries:
    """Return the entries of hashes [n, several] other than 0."""
    kept = hashes.ravel() != 0
    values, rows = hashes.ravel()[kept], np.repeat(rows, hashes.shape[1])[kept]
    order = np.lexsort((rows, values))
    values, rows = values[order], rows[order]
    new = np.ones(len(values), bool)
    new[1:] = (np.diff(values) != 0) | (np.diff(rows) != 0)
    return values[new], rows[new]


def _within(entries: Entries, top: int) -> tuple[int, int, list[tuple[int, int]]]:
    """Return rows that share a hash with another row, shared hashes, and the first two rows of the most frequent ones."""
    hashes, rows = entries
    _, starts, inverse, counts = np.unique(hashes, return_index=True, return_inverse=True, return_counts=True)
    shared = np.flatnonzero(counts > 1)
    num_rows = np.unique(rows[counts[inverse] > 1]).size
    first = starts[shared[np.lexsort((rows[starts[shared]], -counts[shared]))]][:top]
    return int(num_rows), len(shared), [(int(rows[i]), int(rows[i + 1])) for i in first]


def _common(entries: Mapping[str, Entries], top: int) -> Iterator[tuple[tuple[str, str], int, dict[str, int], Any]]:
    """Yield pairs of splits that share hashes: (splits, shared hashes, rows that have one, the first pairs of rows)."""
    for names in itertools.combinations(entries, 2):
        pair = [entries[name] for name in names]
        common = np.intersect1d(pair[0][0], pair[1][0])
        if len(common):
            num_rows = [int(np.unique(rows[np.isin(hashes, common)]).size) for hashes, rows in pair]
            first = np.stack([rows[np.searchsorted(hashes, common)] for hashes, rows in pair], axis=1)
            order = np.argsort(first[:, 0], kind="stable")[:top]
            yield names, len(common), dict(zip(names, num_rows, strict=True)), first[order].tolist()


def _duplicates(scans: Scans, modality: str, top: int) -> dict[str, Any]:
    """Find examples with identical vectors of a modality (other than zero ones), within splits and across them."""
    entries = {split: _entries(scan.vectors[modality].hashes, scan.rows) for split, scan in scans.items()}
    within, across = {}, []
    for split, scan in scans.items():
        rows, vectors, pairs = _within(entries[split], top)
        if vectors:
            names = [[scan.text(row, "id") for row in pair] for pair in pairs]
            within[split] = {"vectors": vectors, "rows": rows, "pairs": names}
    for splits, vectors, rows, pairs in _common(entries, top):
        names = [[scans[s].text(row, "id") for s, row in zip(splits, pair, strict=True)] for pair in pairs]
        across.append({"splits": list(splits), "vectors": vectors, "rows": rows, "pairs": names})
    return {"within": within, "across": across}


def _shared(scans: Scans, key: str, top: int) -> list[dict[str, Any]]:
    """Find ids or groups that pairs of splits have in common."""
    entries = {split: _entries(getattr(scan, f"{key}s")[:, None], scan.rows) for split, scan in scans.items()}
    found = []
    for splits, count, rows, pairs in _common(entries, top):
        names = [scans[splits[0]].text(row, key) for row, _ in pairs]
        found.append({"splits": list(splits), "count": count, "rows": rows, "names": names})
    return found


def _provenance(folder: Path, manifest: Manifest) -> dict[str, Any]:
    corpus = CORPORA.get(str(manifest.source.get("dataset")))
    files = {name: {k: v for k, v in facts.items() if k != "sha256"} for name, facts in manifest.files.items()}
    on_disk = {entry.name for entry in folder.iterdir() if entry.is_file()}
    return {
        "shared_groups_by_design": corpus is not None and corpus.shared_groups,
        "warnings": manifest.warnings,
        "source": manifest.source,
        "expected": expected_counts(corpus, {name: facts["num_examples"] for name, facts in manifest.splits.items()}),
        "files": files,
        "unlisted_files": sorted(on_disk - set(files) - {manifest_lib.FILE}),
        "total_bytes": sum(facts["bytes"] for facts in files.values()),
        "num_shards": sum("records" in facts for facts in files.values()),
        "fingerprint": manifest.fingerprint(),
    }


def _check_metadata(folder: Path, manifest: Manifest, faults: Faults) -> None:
    """Check the files beside the shards, other than those that a split's scan checks, and what TFDS makes of them."""
    ours = {manifest_lib.PRESENCE.format(split=split) for split in manifest.splits}
    ours |= {name for split in manifest.splits for name in manifest_lib.shard_names(manifest, split)}
    for name in manifest.files:
        if name not in ours:
            faults.check_file(manifest, name)
    readable = True
    for name in ("dataset_info.json", "features.json"):
        if name not in manifest.files:
            faults.add(manifest_lib.FILE, f"{name}, which TFDS needs, is not listed")
        try:
            json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            faults.add(name, "cannot be read as JSON")
            readable = False
    if readable:
        _check_tfds(folder, manifest, faults)


def _check_tfds(folder: Path, manifest: Manifest, faults: Faults) -> None:
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints advice on files that it cannot use
            info = tfds.builder_from_directory(folder).info
            found = {split: (sorted(s.filenames), list(s.shard_lengths)) for split, s in info.splits.items()}
            features = info.features.to_json()
    except Exception as e:  # TFDS raises many kinds
        faults.add("dataset_info.json", f"TFDS cannot open the data set with it and features.json ({reason(e)})")
        return
    for split in dict.fromkeys((*manifest.splits, *found)):
        names = manifest_lib.shard_names(manifest, split) if split in manifest.splits else []
        if found.get(split, ([], [])) != (names, [manifest.files[name]["records"] for name in names]):
            faults.add("dataset_info.json", f"shards of split {split!r} are said otherwise than in the manifest")
    known = {name: getattr(manifest, name) for name in DatasetSpec.__dataclass_fields__ if hasattr(manifest, name)}
    if features != record_features(DatasetSpec(**known | {"splits": tuple(manifest.splits)})).to_json():
        faults.add("features.json", "fields of the records are said otherwise than in the manifest")


def _check_counts(manifest: Manifest, scans: Scans, faults: Faults) -> None:
    """Compare counts of the records with the manifest's, where no record at fault accounts for a difference."""
    for split, scan in scans.items():
        if not scan.complete:
            continue
        facts = manifest.splits[split]
        present = scan.present.sum(axis=0).tolist()
        pairs = [
            (f"present of {m}", [facts["present"][m]], [n]) for m, n in zip(manifest.modalities, present, strict=True)
        ]
        for name, values in scan.labels.items():
            said = facts["target_counts"][name] if name else facts["label_counts"]
            if name not in scan.misfits:
                counted = label_report(values, scan.specs[name]).get("counts", [])
                pairs.append((f"target_counts of {name}" if name else "label_counts", said, counted))
        for what, *both in pairs:
            if both[0] != both[1]:
                said, counted = (", ".join(map(str, numbers)) for numbers in both)
                faults.add(manifest_lib.FILE, f"split {split!r}: {what} {said}, the records have {counted}")


def _check_statistics(manifest: Manifest, scans: Scans, faults: Faults) -> None:
    """Compare mean and deviation of the first split's vectors with the manifest's, where all of them can be used."""
    first = next(iter(scans.values()))
    for m, columns in first.columns.items():
        if first.vectors[m].bad.any() or not first.complete:
            continue
        counted, said = columns.moments.result(), manifest.statistics[m]
        size = np.abs([counted["mean"], counted["std"]]).max(axis=0)
        for key in ("mean", "std"):
            found, expected = np.array(counted[key]), np.array(said[key])
            # What rounding leaves of a constant column's deviation, or of a mean of zero, is no fault.
            wrong = np.flatnonzero(~(np.abs(found - expected) <= TOLERANCE * np.abs(found) + 1e-13 * size))
            if wrong.size:
                c = wrong[0]
                faults.add(
                    manifest_lib.FILE,
                    f"{key} of {m}: {wrong.size} columns differ from the records' (column {c}: {expected[c]!r}, the "
                    f"records have {found[c]!r})",
                )

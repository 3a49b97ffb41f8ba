"""Report what a built data set holds, what is suspicious in it, where it came from, and on request whether it is sound."""

import contextlib
import io
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import tensorflow_datasets as tfds

from conclugen_jax.data import manifest as manifest_lib
from conclugen_jax.data.assembly import Repeats, across, repeats, within
from conclugen_jax.data.corpora import CORPORA, expected_counts
from conclugen_jax.data.manifest import Manifest
from conclugen_jax.data.records import record_features
from conclugen_jax.data.scan import Faults, SplitScan
from conclugen_jax.data.sources import DatasetSpec
from conclugen_jax.errors import ConclugenError, reason

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
      top: maximum number of examples and groups to list of each kind.
      progress: called with the number of examples done and of all.

    Returns:
      A report that JSON can hold; ``faults`` is empty for a sound data set, ``verified`` is ``records`` or ``size``.

    Raises:
      ConclugenError: no data set there, a manifest that cannot be used; without ``verify`` the first file of another
        size or record that cannot be used.
    """
    folder = Path(path)
    manifest = manifest_lib.read(folder)
    faults = Faults()
    if verify:
        _check_metadata(folder, manifest, faults)
    else:
        manifest_lib.verify(folder, manifest, level="size")
    scans: Scans = {}
    total, done = sum(facts["num_examples"] for facts in manifest.splits.values()), 0
    for split, facts in manifest.splits.items():
        tell = (lambda n, before=done: progress(before + n, total)) if progress is not None else lambda n: None
        scans[split] = SplitScan(folder, manifest, split, faults, verify=verify).run(tell)
        done += facts["num_examples"]
    if verify:
        _check_counts(manifest, scans, faults)
        _check_statistics(manifest, scans, faults)
    elif found := faults.report():
        file, what, rows = found[0].values()
        way_out = "--verify lists all faults, conclugen build --overwrite builds again"
        raise ConclugenError(f"{folder / file}: {f'row {rows[0][0]}: ' if rows else ''}{what}; {way_out}")
    own = ("name", "version", "description", "licence", "modalities", "variants", "label", "targets")
    return {
        "path": str(folder),
        **msgspec.json.decode(msgspec.json.encode({key: getattr(manifest, key) for key in own})),
        "splits": {split: _split_report(manifest, split, scan) for split, scan in scans.items()},
        "duplicates": {m: _duplicates(scans, m, top) for m in manifest.modalities},
        "shared_ids": _shared(scans, "id", top),
        "shared_groups": _shared(scans, "group", top),
        **_provenance(folder, manifest),
        "verified": "records" if verify else "size",
        "faults": faults.report(),
    }


def _split_report(manifest: Manifest, split: str, scan: SplitScan) -> dict[str, Any]:
    modalities = list(manifest.modalities)
    kinds, counts = np.unique(scan.present, axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    missing = (~scan.present).sum(axis=0).tolist()
    return {
        "num_examples": len(scan.rows),
        "dropped": manifest.splits[split]["dropped"],
        "groups": np.setdiff1d(scan.hashes["group"], [0]).size,
        "label": scan.label_report(""),
        "targets": {name: scan.label_report(name) for name in manifest.targets},
        "missing": dict(zip(modalities, missing, strict=True)),
        "combinations": {"+".join(np.compress(kinds[i], modalities)): int(counts[i]) for i in order},
        "features": {m: scan.tallies[m].report() for m in modalities},
    }


def _duplicates(scans: Scans, modality: str, top: int) -> dict[str, Any]:
    """Find examples with identical vectors of a modality (other than zero ones), within splits and across them."""
    found = repeats({split: scan.hashes[f"features/{modality}"] for split, scan in scans.items()})
    inside = {}
    for split, scan in scans.items():
        if shared := within(found, split):
            pairs = [[scan.text(row, "id") for row in rows[:2]] for rows in shared[:top]]
            inside[split] = {"vectors": len(shared), "rows": len(set(itertools.chain(*shared))), "pairs": pairs}
    return {"within": inside, "across": _across(scans, found, "id", top)}


def _shared(scans: Scans, key: str, top: int) -> list[dict[str, Any]]:
    """Find ids or groups that pairs of splits have in common."""
    found = repeats({split: scan.hashes[key] for split, scan in scans.items()})
    return [
        {"splits": e["splits"], "count": e["vectors"], "rows": e["rows"], "names": [name for name, _ in e["pairs"]]}
        for e in _across(scans, found, key, top)
    ]


def _across(scans: Scans, found: Repeats, key: str, top: int) -> list[dict[str, Any]]:
    """Return what pairs of splits share: the number of shared hashes, of rows with one, and ``key`` of the first such rows."""
    entries = []
    for splits, in_hash_order in across(found, scans):
        shared = sorted(in_hash_order)
        rows = {split: len(set(itertools.chain(*(pair[i] for pair in shared)))) for i, split in enumerate(splits)}
        pairs = [[scans[s].text(each[0], key) for s, each in zip(splits, pair, strict=True)] for pair in shared[:top]]
        entries.append({"splits": list(splits), "vectors": len(shared), "rows": rows, "pairs": pairs})
    return entries


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
    shards = {split: manifest_lib.shard_names(manifest, split) for split in manifest.splits}
    scanned = {manifest_lib.PRESENCE.format(split=split) for split in shards}.union(*shards.values())
    for name in manifest.files:
        if name not in scanned:
            faults.add(name, manifest_lib.file_fault(folder, manifest, name, level="hash"))
    for name in ("dataset_info.json", "features.json"):
        if name not in manifest.files:
            faults.add(manifest_lib.FILE, f"{name}, which TFDS needs, is not listed")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints advice on files that it cannot use
            info = tfds.builder_from_directory(folder).info
            found = {split: (sorted(s.filenames), list(s.shard_lengths)) for split, s in info.splits.items()}
            features = info.features.to_json()
    except Exception as e:  # TFDS raises many kinds
        faults.add("dataset_info.json", f"TFDS cannot open the data set with it and features.json ({reason(e)})")
        return
    expected = {split: (names, [manifest.files[name]["records"] for name in names]) for split, names in shards.items()}
    for split in dict.fromkeys((*expected, *found)):
        if found.get(split) != expected.get(split):
            faults.add("dataset_info.json", f"shards of split {split!r} are said otherwise than in the manifest")
    known = {name: getattr(manifest, name) for name in DatasetSpec.__dataclass_fields__ if hasattr(manifest, name)}
    if features != record_features(DatasetSpec(**known | {"splits": tuple(manifest.splits)})).to_json():
        faults.add("features.json", "fields of the records are said otherwise than in the manifest")


def _check_counts(manifest: Manifest, scans: Scans, faults: Faults) -> None:
    """Compare counts of the records with the manifest's, where no record at fault accounts for a difference."""
    for split, scan in scans.items():
        facts, counts = manifest.splits[split], {}
        for m, n in zip(scan.tallies, scan.present.sum(axis=0).tolist(), strict=True):
            counts[f"present of {m}"] = [facts["present"][m]], [n]
        for name in scan.labels:
            said = facts["target_counts"][name] if name else facts["label_counts"]
            if name not in scan.misfits:
                what = f"target_counts of {name}" if name else "label_counts"
                counts[what] = said, scan.label_report(name).get("counts", [])
        for what, both in counts.items() if scan.complete else ():
            if both[0] != both[1]:
                said, counted = (", ".join(map(str, numbers)) for numbers in both)
                faults.add(manifest_lib.FILE, f"split {split!r}: {what} {said}, the records have {counted}")


def _check_statistics(manifest: Manifest, scans: Scans, faults: Faults) -> None:
    """Compare mean and deviation of the first split's vectors with the manifest's, where all of them can be used."""
    first = next(iter(scans.values()))
    for m, tally in first.tallies.items():
        if tally.non_finite or not first.complete:
            continue
        counted = {key: np.array(x) for key, x in tally.columns.result().items()}
        size = np.maximum(np.abs(counted["mean"]), counted["std"])
        for key, found in counted.items():
            expected = np.array(manifest.statistics[m][key])
            # What rounding leaves of a constant column's deviation, or of a mean of zero, is no fault.
            wrong = np.flatnonzero(~np.isclose(expected, found, rtol=TOLERANCE, atol=1e-13 * size))
            if wrong.size:
                c = wrong[0]
                first_one = f"column {c}: {expected[c]!r}, the records have {found[c]!r}"
                what = f"{key} of {m}: {wrong.size} columns differ from the records' ({first_one})"
                faults.add(manifest_lib.FILE, what)

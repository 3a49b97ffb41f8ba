"""Assemble written parts to a data set (refusals, metadata of TFDS, manifest), and put it into its place."""

import contextlib
import csv
import io
import itertools
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from conclugen_jax.data import findings, manifest as manifest_lib
from conclugen_jax.data.records import Moments, Part, Parts, record_features
from conclugen_jax.data.sources import DatasetSpec, Source
from conclugen_jax.errors import ConclugenError
from conclugen_jax.system import locks

DROPPED = "dropped.csv"  # split, row, id and reason of the examples that drop_bad dropped, beside the shards


def finish(source: Source, parts: Parts, folder: Path, *, fingerprint: str, drop_bad: bool, strict: bool) -> None:
    """Do what needs all parts: refusals, final names in the data set's folder, metadata of TFDS, manifest.

    ``drop_bad`` drops bad examples, which are refused otherwise; ``strict`` refuses what is otherwise a warning.
    """
    spec = source.spec
    parts = {split: parts.get(split, []) for split in spec.splits}
    findings.refuse_bad(parts, drop_bad=drop_bad)
    for split, each in parts.items():
        if not any(len(part.rows) for part in each):
            raise ConclugenError(f"split {split!r} of data set {spec.name!r} has no examples; leave the split out")
    findings.refuse_duplicates(parts)
    findings.refuse_absent_modalities(spec, parts)
    warnings = findings.leaks(spec, parts)
    if strict and warnings:
        found = "; ".join(warnings)
        raise ConclugenError(f"data set {spec.name!r}: {found}; repair the splits or build without --strict")
    statistics = {m: Moments.zero(dim) for m, dim in spec.modalities.items()}
    for part in parts[spec.splits[0]]:
        for m, moments in part.statistics.items():
            statistics[m].merge(moments)
    provenance = getattr(source, "provenance", dict)()
    for name in ("converted", "replaced"):
        total = Counter()
        for part in itertools.chain(*parts.values()):
            total.update(getattr(part, name))
        provenance = provenance | {name: dict(total)}
    shards = _place(spec, parts, folder)
    _write_sidecars(parts, folder)
    manifest = manifest_lib.Manifest(
        name=spec.name,
        version=spec.version,
        description=spec.description,
        licence=spec.licence,
        modalities=dict(spec.modalities),
        label=spec.label,
        targets=dict(spec.targets),
        variants={m: n for m, n in spec.variants.items() if n > 1},
        splits={split: _facts(spec, each) for split, each in parts.items()},
        statistics={m: moments.result() for m, moments in statistics.items()},
        files=manifest_lib.describe_files(folder, shards),
        source=provenance | {"fingerprint": fingerprint},
        warnings=warnings,
    )
    (folder / manifest_lib.FILE).write_text(manifest.to_json(), encoding="utf-8")


def _facts(spec: DatasetSpec, parts: list[Part]) -> dict[str, Any]:
    """Return the manifest's entry of a split."""
    present = sum(part.presence.sum(axis=0) for part in parts)
    counts = {name: sum(part.label_counts[name] for part in parts).tolist() for name in ("", *spec.targets)}
    return {
        "num_examples": sum(len(part.rows) for part in parts),
        "present": {m: int(n) for m, n in zip(spec.modalities, present, strict=True)},
        "label_counts": counts.pop(""),
        "target_counts": counts,
        "dropped": sum(len(part.bad) for part in parts),
    }


def _place(spec: DatasetSpec, parts: Parts, folder: Path) -> dict[str, dict[str, Any]]:
    """Move the parts to their final names and write the metadata that TFDS reads; return facts by file name."""
    shards, infos = {}, []
    for split, each in parts.items():
        filled = [part for part in each if len(part.rows)]
        names = [f"{spec.name}-{split}.array_record-{i:05d}-of-{len(filled):05d}" for i in range(len(filled))]
        for name, part in zip(names, filled, strict=True):
            os.replace(part.path, folder / name)
            shards[name] = {"records": len(part.rows), "sha256": part.sha256}
        lengths, size = [shards[name]["records"] for name in names], sum((folder / n).stat().st_size for n in names)
        infos.append(tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size))
    with contextlib.redirect_stdout(io.StringIO()):
        tfds.folder_dataset.write_metadata(
            data_dir=folder,
            features=record_features(spec),
            split_infos=infos,
            version=spec.version,
            description=spec.description,
            check_data=False,
            disable_shuffling=True,  # records keep the source's order
        )
    return shards


def _write_sidecars(parts: Parts, folder: Path) -> None:
    dropped = []
    for split, each in parts.items():
        presence = np.concatenate([part.presence for part in each])
        np.save(folder / manifest_lib.PRESENCE.format(split=split), presence, allow_pickle=False)
        dropped += [(split, *bad) for part in each for bad in part.bad]
    if dropped:
        with (folder / DROPPED).open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("split", "row", "id", "reason"), *dropped])


@contextlib.contextmanager
def claimed(target: Path) -> Iterator[Path]:
    """Own ``DATA_DIR/NAME/VERSION`` while the context lasts, on any machine and in any container.

    Anything else there was left by builds that were killed, and is cleaned up first. The context gets an empty scratch
    folder in DATA_DIR, which is removed after.

    Raises:
      ConclugenError: another process is building this data set.
      OSError: DATA_DIR cannot be written.
    """
    data_dir, prefix = target.parent.parent, f".building-{target.parent.name}-{target.name}"
    old = target.with_name(f".replaced-{target.name}")
    data_dir.mkdir(parents=True, exist_ok=True)
    try:
        with locks.hold(data_dir / f"{prefix}.lock"):
            if old.exists() and not target.exists():  # a kill in the middle of a replacement
                os.replace(old, target)
            for path in (*data_dir.glob(f"{prefix}-*"), old):
                shutil.rmtree(path, ignore_errors=True)
            # The name is unique because workers of a killed build may run for another second.
            with tempfile.TemporaryDirectory(prefix=f"{prefix}-", dir=data_dir, ignore_cleanup_errors=True) as scratch:
                yield Path(scratch)
    except locks.Busy as e:
        way_out = "wait until it is there, or choose another name, version or --data_dir"
        raise ConclugenError(f"{target}: being built by {e}; {way_out}") from None


def swap(built: Path, target: Path) -> None:
    """Put the finished folder in place; move an old one aside first, back if that fails, and delete it after."""
    old = target.with_name(f".replaced-{target.name}")
    if target.exists():
        os.replace(target, old)
    try:
        os.replace(built, target)
    except OSError:
        if old.exists():
            os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)

"""Assemble written parts to a data set (refusals, metadata of TFDS, manifest), and put it into its place."""

import contextlib
import csv
import io
import itertools
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from conclugen_jax.data import manifest as manifest_lib, shards as shards_lib
from conclugen_jax.data.records import Moments, Part, Parts, record_features
from conclugen_jax.data.sources import MIXED_PERSONS, DatasetSpec, Source
from conclugen_jax.errors import ConclugenError
from conclugen_jax.system import files, locks

DROPPED = "dropped.csv"  # split, row, id and reason of the examples that drop_bad dropped, beside the shards
SHOWN = 5  # names in a message, at most

Repeats = list[dict[str, list[int]]]
"""For each hash that is there more than once: split -> positions of the rows that have it, ascending."""


def finish(source: Source, parts: Parts, folder: Path, *, fingerprint: str, drop_bad: bool, strict: bool) -> None:
    """Finish a data set from its parts: check it as a whole, rename the parts, write the metadata of TFDS and the manifest.

    ``drop_bad`` drops bad examples, which are refused otherwise; ``strict`` refuses what is otherwise a warning.
    """
    spec, provenance = source.spec, getattr(source, "provenance", dict)()
    parts = {split: parts.get(split, []) for split in spec.splits}
    alike = provenance.get("alike", {})
    _refuse_bad(parts, [f"{modality}: {remark}" for modality, remark in alike.items()], drop_bad=drop_bad)
    for split, each in parts.items():
        if not any(len(part.rows) for part in each):
            raise ConclugenError(f"split {split!r} of data set {spec.name!r} has no examples; leave the split out")
    _refuse_duplicates(parts)
    _refuse_absent_modalities(spec, parts, alike)
    warnings = _leaks(spec, parts)
    if provenance.get("fold_by") == "example":
        warnings.append(MIXED_PERSONS)
    if strict and warnings:
        found = "; ".join(warnings)
        raise ConclugenError(f"data set {spec.name!r}: {found}; repair the splits or build without --strict")
    statistics = {m: Moments.zero(dim) for m, dim in spec.modalities.items()}
    for part in parts[spec.splits[0]]:
        for m, moments in part.statistics.items():
            statistics[m].merge(moments)
    for name in ("converted", "replaced", "left_out"):
        total = Counter()
        for part in itertools.chain(*parts.values()):
            total.update(getattr(part, name))
        provenance = provenance | {name: dict(total)}
    shards = _place(spec, parts, folder)
    _write_sidecars(parts, folder)
    for path in getattr(source, "beside", ()):
        shutil.copyfile(path, folder / path.name)
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
        files={p.name: shards.get(p.name) or _file_facts(p) for p in sorted(folder.iterdir())},
        source=provenance | {"fingerprint": fingerprint},
        warnings=warnings,
    )
    (folder / manifest_lib.FILE).write_text(manifest.to_json(), encoding="utf-8")


def _refuse_bad(parts: Parts, remarks: Iterable[str], *, drop_bad: bool) -> None:
    """Refuse examples with NaN or infinite values or without modality, unless they are to be dropped."""
    bad = [
        f"split {split!r}, row {row}, id {name[:100]!r}, {reason}"
        for split, each in parts.items()
        for part in each
        for row, name, reason in part.bad
    ]
    if bad and not drop_bad:
        more = f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        way_out = "repair them, or leave them out with --drop_bad (drop_bad=True)"
        told = "; ".join([*bad[:SHOWN], *remarks])
        raise ConclugenError(f"{_number(bad, 'bad example')}: {told}{more}; {way_out}")


def _refuse_duplicates(parts: Parts) -> None:
    """Refuse an id that occurs twice in a split."""
    for split, each in parts.items():
        if twice := within(repeats({split: _joined(each, "ids")[:, None]}), split):
            (first, second), rows = twice[0][:2], _joined(each, "rows")
            where = f"split {split!r}, row {rows[second]}, id {_name(each, second, 'id')[:100]!r}"
            unique = f"ids must be unique within a split ({sum(map(len, twice)) - len(twice)} are not)"
            raise ConclugenError(f"{where}: the same id as row {rows[first]}; {unique}")


def _refuse_absent_modalities(spec: DatasetSpec, parts: Parts, alike: Mapping[str, str]) -> None:
    """Refuse a modality that no example has; most often its ids differ from those of the labels."""
    presence = np.concatenate([_joined(each, "presence") for each in parts.values()])
    for modality, present in zip(spec.modalities, presence.T, strict=True):
        if not present.any():
            told = f" ({alike[modality]})" if modality in alike else ""
            way_out = f"compare its ids with those of the labels{told}, or leave the modality out"
            raise ConclugenError(f"modality {modality!r} is in none of the {len(presence)} examples; {way_out}")


def _leaks(spec: DatasetSpec, parts: Parts) -> list[str]:
    """Return one sentence for each pair of splits that has ids or groups in common."""
    sentences = []
    for what in ("id",) if spec.shared_groups else ("id", "group"):
        found = repeats({split: _joined(each, f"{what}s")[:, None] for split, each in parts.items()})
        for (a, b), shared in across(found, parts):
            examples = ", ".join(sorted(repr(_name(parts[a], rows[0], what)) for rows, _ in shared[:SHOWN]))
            sentences.append(f"splits {a!r} and {b!r} have {_number(shared, what)} in common, such as {examples}")
    return sentences


def _number(found: Sized, noun: str) -> str:
    return f"{len(found)} {noun}{'s' if len(found) > 1 else ''}"


def _joined(parts: list[Part], column: str) -> np.ndarray:
    return np.concatenate([getattr(part, column) for part in parts])


def _name(parts: list[Part], position: int, key: str) -> str:
    """Return the id or group of a written record, by its position in the split."""
    records = shards_lib.open_shards(part.path for part in parts if len(part.rows))
    return shards_lib.parse(records[position])[key].bytes_list.value[0].decode()


def repeats(hashes: Mapping[str, np.ndarray]) -> Repeats:
    """Return where hashes other than 0 are repeated, in their order; ``hashes``: split -> uint64 [n, several]."""
    values, counts = np.unique(np.concatenate([x.ravel() for x in hashes.values()]), return_counts=True)
    several = values[(counts > 1) & (values != 0)]
    found: dict[int, dict[str, list[int]]] = {}
    for split, x in hashes.items():
        for row, column in np.argwhere(np.isin(x, several)).tolist():
            rows = found.setdefault(int(x[row, column]), {}).setdefault(split, [])
            if rows[-1:] != [row]:
                rows.append(row)
    return [found[value] for value in sorted(found)]


def within(found: Repeats, split: str) -> list[list[int]]:
    """Return the rows that have the same hash within a split, of each such hash; those of the most rows first."""
    shared = [rows[split] for rows in found if len(rows.get(split, [])) > 1]
    return sorted(shared, key=lambda rows: (-len(rows), rows))


def across(found: Repeats, splits: Mapping[str, object]) -> Iterator[tuple[tuple[str, str], list[list[list[int]]]]]:
    """Yield pairs of splits that share hashes, and the rows in both of each such hash, in the hashes' order."""
    for a, b in itertools.combinations(splits, 2):
        if shared := [[rows[a], rows[b]] for rows in found if a in rows and b in rows]:
            yield (a, b), shared


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
            shards[name] = _file_facts(folder / name, part.sha256) | {"records": len(part.rows)}
        lengths, size = [shards[name]["records"] for name in names], sum(shards[name]["bytes"] for name in names)
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


def _file_facts(path: Path, sha256: str = "") -> dict[str, Any]:
    return {"sha256": sha256 or files.sha256(path), "bytes": path.stat().st_size}


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

    The function first removes what killed builds left there. It yields an empty scratch folder in DATA_DIR, and removes that
    folder at the end.

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
    """Move the finished folder into place. Keep an old folder until that succeeds, and restore it if it fails."""
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

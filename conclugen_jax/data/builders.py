"""One TFDS builder for every source: checked examples -> array_record shards + manifest, all or nothing.

TensorFlow Datasets runs here without TensorFlow. Shards appear under their final name only when complete.
"""

import contextlib
import errno
import io
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from conclugen_jax.data import manifest as manifest_lib
from conclugen_jax.data.sources import LABEL_KINDS, DatasetSpec, Example, Source
from conclugen_jax.errors import ConclugenError

MOST_NAME = 1000
"""Characters of an id or a group, at most."""

PRESENCE = "presence-{split}.npy"
"""Beside the shards: bool [num_examples, modalities in the manifest's order], read without decoding a record."""


class FeatureVectors(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Records of feature vectors, presence flags, label, id and group, described by a :class:`DatasetSpec`."""

    VERSION = tfds.core.Version("0.0.0")
    name = "feature_vectors"
    url_infos = {}  # noqa: RUF012  nothing is downloaded; TFDS would look for checksums beside the class

    def __init__(self, spec: DatasetSpec, splits: dict[str, Any], data_dir: Path):
        self.spec, self.splits = spec, splits
        self.name, self.VERSION = spec.name, tfds.core.Version(spec.version)
        super().__init__(data_dir=os.fspath(data_dir), file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.spec.description,
            features=record_features(self.spec),
            disable_shuffling=True,  # records keep the source's order
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        return self.splits

    def _generate_examples(self) -> Iterator[Any]:
        raise NotImplementedError("the examples come from the source given at construction")


def record_features(spec: DatasetSpec) -> tfds.features.FeaturesDict:
    """TFDS features of one record."""

    def scalar(dtype):
        return tfds.features.Tensor(shape=(), dtype=dtype)

    def vector(dim):
        return tfds.features.Tensor(shape=(dim,), dtype=np.float32, encoding=tfds.features.Encoding.BYTES)

    record = {
        "id": tfds.features.Text(),
        "group": tfds.features.Text(),
        "features": {m: vector(dim) for m, dim in spec.modalities.items()},
        "present": {m: scalar(np.bool_) for m in spec.modalities},
    }
    if spec.label.kind == "single":
        record["label"] = scalar(np.int64)
    elif spec.label.kind == "multi":
        record["label"] = vector(len(spec.label.names))
    return tfds.features.FeaturesDict(record)


def build(source: Source, data_dir: str | Path, *, overwrite: bool = False) -> Path:
    """Write a data set's shards and manifest.

    Args:
      source: the examples.
      data_dir: parent of the data sets; the files go to ``data_dir/NAME/VERSION``.
      overwrite: replace a data set that is there already.

    Returns:
      The folder of the data set. If it is there already, intact and made from the same examples, nothing is written.

    Raises:
      ConclugenError: a bad example, a data set in the way, or a folder that cannot be written. Nothing half-written
        is left.
    """
    spec = source.spec
    _check_spec(spec)
    data_dir = Path(data_dir)
    target = data_dir / spec.name / spec.version
    _restore_interrupted_swap(target)
    _remove_debris(data_dir)
    if target.exists() and not overwrite:
        _check_same(target, source)
        return target
    scratch = None
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".building-{os.getpid()}-", dir=data_dir))
        built = _write(source, scratch)
        target.parent.mkdir(exist_ok=True)
        _swap(built, target)
    except OSError as e:
        raise ConclugenError(
            f"{e.filename or data_dir}: cannot write the data set ({e.strerror or e}); free space or choose another --data_dir"
        ) from e
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


def _write(source: Source, scratch: Path) -> Path:
    """Shards and manifest in a scratch folder; returns the folder of the data set."""
    spec = source.spec
    checked = {split: _CheckedSplit(spec, split, collect=split == spec.splits[0]) for split in spec.splits}
    builder = FeatureVectors(
        spec, {name: split.records(source.examples(name)) for name, split in checked.items()}, scratch
    )
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS speaks of downloads; there are none
            builder.download_and_prepare()
    except Exception as e:
        # TFDS wraps what a source raises; the original says more. All else comes from writing.
        for split in checked.values():
            if split.error is not None:
                raise split.error.with_traceback(None) from None
        reason = (str(e).strip() or type(e).__name__).splitlines()[0][:300]
        raise OSError(errno.EIO, reason, os.fspath(scratch.parent)) from e
    folder = Path(os.fspath(builder.data_path))
    for name, split in checked.items():
        presence = np.array(split.presence, bool).reshape(-1, len(spec.modalities))
        np.save(folder / PRESENCE.format(split=name), presence, allow_pickle=False)
    records = {}
    for name in spec.splits:
        info = builder.info.splits[name]
        records |= {Path(path).name: length for path, length in zip(info.filepaths, info.shard_lengths, strict=True)}
    manifest = manifest_lib.Manifest(
        name=spec.name,
        version=spec.version,
        description=spec.description,
        licence=spec.licence,
        modalities=dict(spec.modalities),
        label=spec.label,
        splits={name: split.counts() for name, split in checked.items()},
        statistics={m: s.result() for m, s in checked[spec.splits[0]].statistics.items()},
        files=manifest_lib.describe_files(folder, records),
        source={"fingerprint": source.fingerprint()},
    )
    (folder / manifest_lib.FILE).write_text(manifest.to_json(), encoding="utf-8")
    return folder


class _CheckedSplit:
    """Passes examples on as records, refuses bad ones, and counts while they go by."""

    def __init__(self, spec: DatasetSpec, split: str, *, collect: bool):
        self.spec, self.split = spec, split
        self.statistics = {m: manifest_lib.Statistics(dim) for m, dim in spec.modalities.items()} if collect else {}
        self.presence: list[list[bool]] = []
        self.label_counts = np.zeros(len(spec.label.names), np.int64)
        self.error: Exception | None = None  # what the source or a check raised
        self._ids: dict[str, int] = {}

    def records(self, examples: Iterator[Example]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Key and TFDS record of every example."""
        row = -1
        try:
            for row, example in enumerate(examples):
                yield row, self._record(row, example)
            if row < 0:
                raise ConclugenError(
                    f"split {self.split!r} of data set {self.spec.name!r} has no examples; leave the split out"
                )
        except Exception as e:
            self.error = e
            raise

    def counts(self) -> dict[str, Any]:
        """The manifest's entry of this split."""
        present = np.array(self.presence, bool).reshape(-1, len(self.spec.modalities)).sum(axis=0)
        return {
            "num_examples": len(self.presence),
            "present": {m: int(n) for m, n in zip(self.spec.modalities, present, strict=True)},
            "label_counts": self.label_counts.tolist(),
        }

    def _record(self, row: int, example: Example) -> dict[str, Any]:
        if not isinstance(example, Example):
            raise ConclugenError(f"split {self.split!r}, row {row}: a {type(example).__name__}, expected an Example")
        where = f"split {self.split!r}, row {row}, id {str(example.id)[:100]!r}"
        for name, text, least in (("id", example.id, 1), ("group", example.group, 0)):
            if not isinstance(text, str) or not least <= len(text) <= MOST_NAME or not text.isprintable():
                raise ConclugenError(f"{where}: {name} must be a printable str of {least} to {MOST_NAME} characters")
        if example.id in self._ids:
            raise ConclugenError(
                f"{where}: the same id as row {self._ids[example.id]}; ids must be unique within a split"
            )
        self._ids[example.id] = row
        spare = set(example.features) - set(self.spec.modalities)
        if spare:
            raise ConclugenError(
                f"{where}: unknown modality {min(spare)!r}; the data set has {list(self.spec.modalities)}"
            )
        if not example.features:
            raise ConclugenError(f"{where}: no modality is present; drop the example")
        vectors = {m: self._vector(f"{where}, modality {m!r}", m, x) for m, x in example.features.items()}
        self.presence.append([m in vectors for m in self.spec.modalities])
        for m, x in vectors.items():
            if m in self.statistics:
                self.statistics[m].add(x)
        record = {
            "id": example.id,
            "group": example.group,
            "features": {m: vectors.get(m, np.zeros(dim, np.float32)) for m, dim in self.spec.modalities.items()},
            "present": {m: m in vectors for m in self.spec.modalities},
        }
        if self.spec.label.kind != "none":
            record["label"] = self._label(where, example.label)
        return record

    def _vector(self, where: str, modality: str, x: Any) -> np.ndarray:
        x = np.asarray(x)
        dim = self.spec.modalities[modality]
        if x.dtype == object or x.dtype.kind not in "fiub" or x.shape != (dim,):
            raise ConclugenError(f"{where}: {x.dtype} of shape {x.shape}, expected real numbers of shape ({dim},)")
        with np.errstate(over="ignore"):
            x = x.astype(np.float32)
        bad = np.flatnonzero(~np.isfinite(x))
        if bad.size:
            raise ConclugenError(
                f"{where}: {bad.size} of {dim} values are NaN or infinite in float32 (first at column {bad[0]}); "
                "mend the features or drop the example"
            )
        return x

    def _label(self, where: str, label: Any) -> Any:
        names = self.spec.label.names
        if self.spec.label.kind == "single":
            if isinstance(label, bool) or not isinstance(label, (int, np.integer)) or not 0 <= label < len(names):
                raise ConclugenError(f"{where}: label {label!r}, expected an integer from 0 to {len(names) - 1}")
            self.label_counts[label] += 1
            return int(label)
        values = np.asarray(label, np.float32) if label is not None else np.zeros(0, np.float32)
        if values.shape != (len(names),) or not np.isin(values, (0, 1)).all():
            raise ConclugenError(f"{where}: label {label!r}, expected {len(names)} values 0 or 1 ({', '.join(names)})")
        self.label_counts += values.astype(np.int64)
        return values


def _check_spec(spec: DatasetSpec) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", spec.name) or not re.fullmatch(r"\d+\.\d+\.\d+", spec.version):
        raise ConclugenError(
            f"data set {spec.name!r} version {spec.version!r}: the name takes lower case letters, digits and '_', the "
            "version three numbers such as 1.0.0"
        )
    bad = [m for m in spec.modalities if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", m)]
    if bad or not spec.modalities or min(spec.modalities.values()) < 1:
        raise ConclugenError(
            f"data set {spec.name!r}: modalities {dict(spec.modalities)}; names take letters, digits and '_', sizes are >= 1"
        )
    if spec.label.kind not in LABEL_KINDS or bool(spec.label.names) != (spec.label.kind != "none"):
        raise ConclugenError(
            f"data set {spec.name!r}: label kind {spec.label.kind!r} with names {spec.label.names}; kinds are {LABEL_KINDS}, "
            "and all but 'none' have names"
        )
    if not spec.splits:
        raise ConclugenError(f"data set {spec.name!r} has no split; it needs at least one, to train on")


def _check_same(target: Path, source: Source) -> None:
    """A data set that is there already must be intact and of the same source."""
    if not (target / manifest_lib.FILE).is_file():
        raise ConclugenError(
            f"{target}: in the way, and no data set; remove it, pass --overwrite or choose another --data_dir"
        )
    present = manifest_lib.read(target)
    if present.source.get("fingerprint") != source.fingerprint():
        raise ConclugenError(
            f"{target}: holds a data set made from other examples; pass --overwrite (overwrite=True) to replace it or "
            "choose another --data_dir"
        )
    manifest_lib.verify(target, present)


def _swap(built: Path, target: Path) -> None:
    """Put the finished folder in place; an old one is moved aside first, back if that fails, and deleted after."""
    old = _aside(target)
    if target.exists():
        os.replace(target, old)
    try:
        os.replace(built, target)
    except OSError:
        if old.exists():
            os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _aside(target: Path) -> Path:
    return target.with_name(f".replaced-{target.name}")


def _restore_interrupted_swap(target: Path) -> None:
    """After a kill in the middle of a replacement the old data set is back in place, or gone if the new one is."""
    old = _aside(target)
    if old.exists() and not target.exists():
        os.replace(old, target)
    elif old.exists():
        shutil.rmtree(old, ignore_errors=True)


def _remove_debris(parent: Path) -> None:
    """Scratch folders of builds that were killed; those of running processes stay."""
    for path in parent.glob(".building-*"):
        pid = path.name.split("-")[1]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(path, ignore_errors=True)

"""Read, write and check the manifest of a data set: its files, the meaning of its columns, statistics of its features."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import msgspec
import numpy as np

from conclugen_jax.data.sources import LabelSpec
from conclugen_jax.errors import ConclugenError, reason
from conclugen_jax.system import files

FILE = "manifest.json"
PRESENCE = "presence-{split}.npy"
"""Beside the shards: bool [num_examples, modalities in the manifest's order], read without decoding a record."""

FORMAT, FORMAT_VERSION = "conclugen_jax features", 2
KIND = f"{FORMAT!r} version {FORMAT_VERSION}"

Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Size = Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
Name = Annotated[str, msgspec.Meta(min_length=1)]
FileName = Annotated[str, msgspec.Meta(pattern="^[^/]+$")]
Some = msgspec.Meta(min_length=1)


class SplitFacts(TypedDict):
    """Counts of a split: records, records with each modality and with each class or label, and dropped bad examples."""

    num_examples: Count
    present: dict[str, Count]
    label_counts: list[Count]
    target_counts: dict[Name, list[Count]]
    dropped: Count


class FileFacts(TypedDict):
    """What a file must be; only shards have ``records``."""

    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    bytes: Count
    records: NotRequired[Count]


class ColumnStatistics(TypedDict):
    """Mean and population deviation of each feature [dim]."""

    mean: list[float]
    std: list[float]


class PrintedSource(TypedDict, total=False):
    """The fields of a source that commands print."""

    converted: dict[Annotated[str, msgspec.Meta(pattern=r"^\S+ \S+$")], Count]
    unused: dict[str, Count]
    replaced: dict[str, Count]
    left_out: dict[Annotated[str, msgspec.Meta(pattern=r"^\S+ \S+$")], Count]
    rows_outside_folds: Count
    notes: list[str]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Content of ``manifest.json``."""

    name: str  # name of the data set
    version: str  # version of the data set
    description: str  # one sentence
    licence: str  # licence of the data
    modalities: Annotated[dict[str, Size], Some]  # modality -> size of its feature vector
    label: LabelSpec
    targets: dict[Name, LabelSpec]  # further labels
    variants: dict[str, Size]  # modality -> number of vectors per example in the first split, if several
    splits: Annotated[dict[str, SplitFacts], Some]  # facts of each split, in order
    statistics: dict[str, ColumnStatistics]  # statistics of each modality over the rows of the first split that have it
    files: dict[FileName, FileFacts]
    source: dict[str, Any]  # origin of the examples, with their fingerprint
    warnings: list[str]  # sentences on suspicious facts, such as a speaker in two splits

    def to_json(self) -> str:
        """Return the manifest as JSON."""
        tree = {"format": FORMAT, "format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        return json.dumps(tree, indent=1, allow_nan=False) + "\n"

    def fingerprint(self) -> str:
        """Return the SHA-256 of the manifest, which covers every file of the data set by its hash."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def labels(self) -> dict[str, LabelSpec]:
        """Return the label, under the empty name, and the further targets."""
        return {"": self.label, **self.targets}

    def stored_variants(self, split: str) -> dict[str, int]:
        """Return the number of vectors that each modality has in a record of a split."""
        first = split == next(iter(self.splits))
        return {m: self.variants.get(m, 1) if first else 1 for m in self.modalities}

    def standardization(self, modality: str) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and divisor of each feature, float32 [dim] each; the divisor of a constant column is 1.

        A deviation at the level of rounding (1e-6 of the mean's size) counts as constant.
        """
        mean = np.asarray(self.statistics[modality]["mean"], np.float64)
        std = np.asarray(self.statistics[modality]["std"], np.float64)
        scale = np.where(std > 1e-6 * np.maximum(np.abs(mean), 1e-6), std, 1.0)
        return mean.astype(np.float32), scale.astype(np.float32)


def read(folder: str | Path) -> Manifest:
    """Read the manifest of a built data set.

    Raises:
      ConclugenError: there is none, or it is not a manifest of this format.
    """
    if not str(folder):
        raise ConclugenError("no data set is named; name its folder with --data or --config.data.path")
    return read_file(Path(folder) / FILE, missing="name the folder DATA_DIR/NAME/VERSION that conclugen build printed")


def read_file(path: Path, *, missing: str) -> Manifest:
    """Read a manifest by its file name; see :func:`read`. ``missing``: the way out if there is no such file."""
    way_out = f"{missing}, or build the data set again"
    return from_tree(files.read_json(path, Any, way_out=way_out), str(path), way_out=way_out)


def from_tree(tree: Any, source: str, *, way_out: str) -> Manifest:
    """Make a manifest of what :meth:`Manifest.to_json` wrote, parsed; ``source`` names its file in messages.

    Raises:
      ConclugenError: it is not a manifest of this format.
    """
    try:
        if (kind := f"{tree['format']!r} version {tree['format_version']}") != KIND:
            raise ConclugenError(f"{source}: format {kind}, this release reads {KIND}; {way_out}")
        manifest = msgspec.convert(tree, Manifest)
        msgspec.convert(manifest.source, PrintedSource)
        manifest.to_json()  # NaN, or what is nested too deeply to be written again
        _check(manifest)
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as e:
        raise ConclugenError(f"{source}: damaged manifest ({type(e).__name__}: {str(e)[:200]}); {way_out}") from e
    return manifest


def _check(manifest: Manifest) -> None:
    """Check that the fields are consistent; a ValueError names the first that is not."""
    modalities = manifest.modalities
    if not manifest.variants.keys() <= modalities.keys():
        raise ValueError(f"variants {manifest.variants}")
    for modality, dim in modalities.items():
        for statistic, values in manifest.statistics[modality].items():
            if len(values) != dim or not (np.abs(values) < np.finfo(np.float32).max).all():
                raise ValueError(f"{statistic} of {modality!r} is not {dim} finite float32 numbers")
    sizes = {name: len(label.names) for name, label in manifest.labels().items()}
    for split, facts in manifest.splits.items():
        counted = {name: len(n) for name, n in {"": facts["label_counts"], **facts["target_counts"]}.items()}
        if facts["present"].keys() != modalities.keys() or counted != sizes:
            raise ValueError(f"counts of split {split!r}")
        shards = shard_names(manifest, split)
        records = sum(manifest.files[name]["records"] for name in shards)
        if not shards or PRESENCE.format(split=split) not in manifest.files or records != facts["num_examples"]:
            raise ValueError(f"files of split {split!r} are not listed, or their records do not add up")


def shard_names(manifest: Manifest, split: str) -> list[str]:
    """Return the names of a split's shard files, in order."""
    return sorted(name for name in manifest.files if name.startswith(f"{manifest.name}-{split}.array_record-"))


def verify(folder: str | Path, manifest: Manifest, *, level: str = "hash") -> None:
    """Compare existence and size of every file with the manifest, and at the level ``hash``, not ``size``, its SHA-256.

    Raises:
      ConclugenError: the first file that is missing, of another size, or changed.
    """
    for checked in ("size", level):  # sizes of all files first, which takes no time
        for name in manifest.files:
            if fault := file_fault(Path(folder), manifest, name, level=checked):
                raise ConclugenError(
                    f"{Path(folder) / name}: {fault}; restore it from a copy or build the data set again with --overwrite"
                )


def file_fault(folder: Path, manifest: Manifest, name: str, *, level: str) -> str:
    """Return how a file differs from the manifest, or an empty text; see :func:`verify`."""
    path, expected = folder / name, manifest.files[name]
    try:
        if not path.is_file():
            return "the file is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{path.stat().st_size} bytes, the manifest says {expected['bytes']}"
        if level == "hash" and files.sha256(path) != expected["sha256"]:
            return "content differs from the manifest (SHA-256)"
    except OSError as e:
        return f"cannot be read ({e.strerror}); check its permissions and the disk"
    return ""


def read_presence(folder: Path, manifest: Manifest, split: str) -> np.ndarray:
    """Return which examples have which modality, bool [num_examples, modalities]; a ValueError says what is wrong."""
    name, shape = PRESENCE.format(split=split), (manifest.splits[split]["num_examples"], len(manifest.modalities))
    try:  # the file is mapped, so that its header is checked before it is read
        flags = np.load(folder / name, allow_pickle=False, mmap_mode="r")
    except Exception as e:  # NumPy parses the header as Python: damage ends in many kinds
        raise ValueError(f"{name}: cannot be read ({reason(e)})") from e
    if not isinstance(flags, np.ndarray) or flags.dtype != bool or flags.shape != shape:
        raise ValueError(f"{name}: not bool of shape {shape}")
    return np.asarray(flags)


def choose(available: Iterable[str], wanted: Iterable[str], *, what: str, where: str, way_out: str = "") -> list[str]:
    """Return the wanted names; a ConclugenError names the first that is not available, and those there are."""
    available, wanted = list(available), list(wanted)
    for name in wanted:
        if name not in available:
            known = ", ".join(map(repr, available)) or "none"
            raise ConclugenError(f"{where} has no {what} {name!r}; it has {known}{way_out}")
    return wanted

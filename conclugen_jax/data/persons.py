"""Standardise features by person: remove what the clips of a person have in common, keep how they differ.

How a person looks and sounds explains more of frozen features than what they feel. A person is a row's ``group``. With z a
feature standardised by the training split, n clips of a person with mean m and variance v of z, shrinkage k and floor f:

    w = n / (n + k),    y = (z - w m) / sqrt(w v + (1 - w) + f),

and y is standardised by the training split again. With few clips w goes to 0 and y to z / sqrt(1 + f): a person without any, or
a row without a group, is standardised as the split is. No label takes part.

Persons of the training split have the statistics of their clips there, everywhere in this data set; others have those of
their own clips in their split. So no row of validation or test changes the features of training rows.
(Busso et al., "Iterative feature normalization scheme for automatic emotion detection from speech", IEEE TAC 2013.)
"""

import dataclasses
import functools
import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conclugen_jax.data.manifest import Manifest
from conclugen_jax.data.sources import LabelSpec
from conclugen_jax.errors import ConclugenError, reason
from conclugen_jax.system import files

FILE = "persons.npz"  # in the workdir of a run
CHUNK_ROWS = 1024
WORDS = ("text",)  # modalities that are not standardised unless named: words do not identify a person
SPLIT = ("split_mean", "split_scale")  # of z
KNOWN = ("shift", "scale_of")  # of known persons
CONFOUNDED = 0.1  # share of a label's variance that groups explain above which groups and labels belong together

LOG = logging.getLogger(__name__)
Features = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Persons:
    """The statistics by which features are standardised."""

    stats: Mapping[str, Mapping[str, np.ndarray]]
    """Modality -> float32 [dim] each: ``split_mean``, ``split_scale`` of z, ``mean``, ``scale`` of y."""
    floor: float
    shrinkage: float  # infinite if the training split has no persons
    data: str = ""  # name of the data set of the persons below
    names: tuple[str, ...] = ()  # persons of its training split
    shift: Features = dataclasses.field(default_factory=dict)  # modality -> float32 [persons, dim]
    scale_of: Features = dataclasses.field(default_factory=dict)
    """Modality -> float32 [persons, dim]; y is (x - shift) / scale_of."""

    def applied(self, features: Features, present: Features, groups: Sequence[str], *, data: str = "") -> Features:
        """Return y of rows, modality -> float32 [n, dim]; those of modalities without statistics as they are.

        ``groups`` are the persons of the rows; those of the run's training split are known if ``data`` is its data set, the
        others have the statistics of these very rows.
        """
        at = slice(None)
        return self._affine([(at, features, present)], groups, data).of(np.arange(len(groups)), features)

    def attach(self, stream: Any) -> None:
        """Make a ``ShardStream`` return y; unknown persons get the statistics of their rows in this split.

        Warn of a split without groups, and of persons with only a single clip.
        """
        groups = np.concatenate([stream.names(rows)[1] for rows in _chunks(stream.num_examples)])
        name = stream.dataset.manifest.name
        if not (groups != "").any() and math.isfinite(self.shrinkage):
            LOG.warning("%s: no groups; its features are standardised by the split, not by person", stream.where)
        _warn_of_single(stream.where, groups[~np.isin(groups, self.names if name == self.data else ())], self.shrinkage)
        read = ((at, x["features"], x["present"]) for at in _chunks(stream.num_examples) for x in [stream.rows(at)])
        stream.affine = self._affine(read, groups, name)

    def _affine(self, parts: Any, groups: Sequence[str], data: str) -> "Affine":
        known = {name: i for i, name in enumerate(self.names)} if data == self.data else {}
        others = sorted({str(g) for g in groups} - {""} - known.keys())
        index = known | {name: len(known) + i for i, name in enumerate(others)} | {"": len(known) + len(others)}
        person = np.array([index[str(g)] for g in groups], np.int64)
        moments = {m: _Moments(len(index), stats) for m, stats in self.stats.items()}
        for at, features, present in parts if others else ():
            for m in moments.keys() & features.keys():
                moments[m].add(features[m], present[m], person[at])
        shift, scale = {}, {}
        for m, of_rows in moments.items():
            shift[m], scale[m] = of_rows.affine(self.floor, self.shrinkage)
            if known:
                shift[m][: len(known)], scale[m][: len(known)] = self.shift[m], self.scale_of[m]
        return Affine(person, shift, scale)

    def write(self, path: Path) -> None:
        """Write the statistics to a file of NumPy arrays."""
        arrays = {f"{kind}/{m}": x for kind in KNOWN for m, x in getattr(self, kind).items()}
        arrays |= {f"{key}/{m}": x for m, stats in self.stats.items() for key, x in stats.items()}
        facts = {
            "floor": self.floor,
            "shrinkage": self.shrinkage,
            "data": self.data,
            "names": np.array(self.names, str),
        }
        with files.replaced(path) as scratch, scratch.open("wb") as file:
            np.savez(file, modalities=np.array(list(self.stats), str), **facts, **arrays)


@dataclasses.dataclass(frozen=True)
class Affine:
    """(x - shift) / scale by the person of each row."""

    person: np.ndarray  # int64 [n], row of shift and scale
    shift: Features  # modality -> float32 [persons, dim]
    scale: Features

    def of(self, rows: np.ndarray, features: Features) -> dict[str, np.ndarray]:
        """Standardise features [n, dim] or, of variants, [n, k, dim] of the given rows."""
        person, found = self.person[rows], dict(features)
        for m in self.shift.keys() & features.keys():
            axes = (len(person), *(1,) * (features[m].ndim - 2), -1)
            shift, scale = (x[m][person].reshape(axes) for x in (self.shift, self.scale))
            found[m] = (features[m] - shift) / scale
        return found

    @functools.cached_property
    def fingerprint(self) -> str:
        """Return a hash of all numbers."""
        arrays = [self.person, *(x[m] for x in (self.shift, self.scale) for m in sorted(x))]
        return hashlib.sha256(b"".join(np.ascontiguousarray(x).tobytes() for x in arrays)).hexdigest()


class _Moments:
    """Count, mean and variance of z of each person, in float64."""

    def __init__(self, num_persons: int, stats: Mapping[str, np.ndarray]):
        self.mean, self.scale = (np.asarray(stats[key], np.float64) for key in SPLIT)
        self.count = np.zeros((num_persons, 1))
        self.sums, self.squares = np.zeros((2, num_persons, len(self.mean)))

    def add(self, x: np.ndarray, present: np.ndarray, person: np.ndarray) -> None:
        """Take rows [n, dim] of the given persons; absent ones do not count."""
        order = np.argsort(person[present], kind="stable")
        z, person = (x[present][order] - self.mean) / self.scale, person[present][order]
        each, starts, counts = np.unique(person, return_index=True, return_counts=True)
        self.count[each] += counts[:, None]
        self.sums[each] += np.add.reduceat(z, starts) if len(z) else 0
        self.squares[each] += np.add.reduceat(np.square(z), starts) if len(z) else 0

    def of_persons(self) -> tuple[np.ndarray, np.ndarray]:
        """Return m and v, [persons, dim] each; zeros without rows."""
        count = np.maximum(self.count, 1)
        mean = self.sums / count
        return mean, np.maximum(self.squares / count - np.square(mean), 0)

    def affine(self, floor: float, shrinkage: float) -> tuple[np.ndarray, np.ndarray]:
        """Return shift and scale of each person, float32 [persons, dim]: y = (x - shift) / scale; last row: no person."""
        mean, variance = self.of_persons()
        weight = self.count / (self.count + shrinkage) if shrinkage else (self.count > 0).astype(float)
        weight[-1] = 0
        deviation = np.sqrt(weight * variance + (1 - weight) + floor)
        shift = self.mean + self.scale * weight * mean
        return shift.astype(np.float32), (self.scale * deviation).astype(np.float32)

    def of_split(self, shift: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and divisor of y over all rows, float32 [dim], in closed form; the divisor of a constant is 1."""
        mean, variance = self.of_persons()
        x_mean, x_variance = self.mean + self.scale * mean, np.square(self.scale) * variance
        shift, scale, total = shift.astype(np.float64), scale.astype(np.float64), max(self.count.sum(), 1)
        of_person = (x_mean - shift) / scale
        centre = (self.count * of_person).sum(axis=0) / total
        spread = (self.count * (x_variance / np.square(scale) + np.square(of_person - centre))).sum(axis=0) / total
        deviation = np.sqrt(spread)
        return centre.astype(np.float32), np.where(deviation > 1e-6, deviation, 1).astype(np.float32)


def fit(stream: Any, config: Any) -> Persons:
    """Compute the statistics of the training split, a ``ShardStream``, by a configuration.

    Without groups, or with one group for all rows, the function warns and uses the statistics of the split, for all splits. It
    also warns of persons with a single clip and of labels that depend on the groups; labels have no other effect. It raises
    an error if the configuration names modalities that the data set lacks.
    """
    manifest: Manifest = stream.dataset.manifest
    if unknown := set(config.data.person_modalities) - set(stream.modalities):
        raise ConclugenError(
            f"config.data.person_modalities names {min(unknown)!r}, which is none of {', '.join(stream.modalities)}; correct it"
        )
    modalities = config.data.person_modalities or [m for m in stream.modalities if m not in WORDS]
    groups = np.concatenate([stream.names(rows)[1] for rows in _chunks(stream.num_examples)])
    names = sorted({str(g) for g in groups} - {""})
    if len(names) < 2:
        fact = "no groups" if not names else f"one group for all, {names[0]!r}"
        LOG.warning("%s: %s; features are standardised by the split, not by person", stream.where, fact)
        names = []
    shrinkage = config.data.person_shrinkage if names else math.inf
    _warn_of_single(stream.where, groups, shrinkage)
    index = {name: i for i, name in enumerate(names)}
    person = np.array([index.get(str(g), len(names)) for g in groups], np.int64)
    stats = {m: dict(zip(SPLIT, manifest.standardization(m), strict=True)) for m in modalities}
    moments = {m: _Moments(len(names) + 1, stats[m]) for m in modalities}
    labels = []
    for rows in _chunks(stream.num_examples):
        read = stream.rows(rows)
        labels.append(read["label"])
        for m in modalities:
            moments[m].add(read["features"][m], read["present"][m], person[rows])
    share = explained(np.concatenate(labels), stream.label, groups) if names else None
    if share is not None and share > CONFOUNDED:
        fact = f"the groups explain {share:.0%} of the label's variance"
        way_out = "standardisation by person takes part of the label away; config.data.standardize=split keeps it"
        LOG.warning("%s: %s; %s", stream.where, fact, way_out)
    shift, scale = {}, {}
    for m in modalities:
        shift[m], scale[m] = moments[m].affine(config.data.person_floor, shrinkage)
        stats[m]["mean"], stats[m]["scale"] = moments[m].of_split(shift[m], scale[m])
    known = [{m: x[m][:-1] for m in modalities} for x in (shift, scale)]
    return Persons(stats, config.data.person_floor, shrinkage, manifest.name, tuple(names), *known)


def _warn_of_single(where: str, groups: np.ndarray, shrinkage: float) -> None:
    """Warn of persons with a single clip among these rows' groups, unless none counts as a person."""
    names, counts = np.unique(groups[groups != ""], return_counts=True)
    single = names[counts == 1].tolist()
    if not single or math.isinf(shrinkage):
        return
    own = 1 / (1 + shrinkage)
    done = f"their statistics are {own:.0%} those of the clip and {1 - own:.0%} those of the split"
    if not shrinkage:
        done = "all of its features become 0; set config.data.person_shrinkage above 0"
    fact = f"{len(single)} of {len(names)} persons have a single clip (such as {single[0]!r})"
    LOG.warning("%s: %s; %s", where, fact, done)


def explained(labels: np.ndarray, spec: LabelSpec, groups: np.ndarray) -> float | None:
    """Return the share of the variance of labels [n] or [n, k] that groups [n] explain; ``None`` if it is undefined.

    1 - (n - 1) / (n - g) (1 - between / total) of n rows in g groups (epsilon squared; Kelley, 1935), at least 0: groups
    that have nothing to do with the labels explain 0 on average, however small they are. Classes count as 0 and 1 each.
    Rows without a label, or with an empty group (or 0), do not count.
    """
    values = (labels if labels.ndim == 2 else labels[:, None]).astype(np.float64)
    if spec.kind == "single":
        values = np.where(values < 0, np.nan, values == np.arange(len(spec.names)))
    counted = np.isfinite(values).all(axis=1) & (groups != groups.dtype.type())
    values, (names, index, sizes) = values[counted], np.unique(groups[counted], return_inverse=True, return_counts=True)
    centred = values - values.mean(axis=0) if len(values) else values
    total = np.square(centred).sum()
    if len(names) < 2 or len(values) == len(names) or not total:
        return None
    sums = np.zeros((len(names), values.shape[1]))
    np.add.at(sums, index, centred)
    between = (np.square(sums).sum(axis=1) / sizes).sum()
    return max(0.0, float(1 - (len(values) - 1) / (len(values) - len(names)) * (1 - between / total)))


def of_checkpoint(feature_stats: Mapping[str, Any], config: Any) -> Persons:
    """Return the statistics in a checkpoint, which has no persons, with the run's configuration."""
    stats = {m: dict(x) for m, x in feature_stats.items() if SPLIT[0] in x}
    return Persons(stats, config.data.person_floor, config.data.person_shrinkage)


def read(path: Path) -> Persons:
    """Read the file that a run has written."""
    try:
        with np.load(path, allow_pickle=False) as a:
            modalities = a["modalities"].tolist()
            stats = {m: {key: a[f"{key}/{m}"] for key in (*SPLIT, "mean", "scale")} for m in modalities}
            known = {kind: {m: a[f"{kind}/{m}"] for m in modalities} for kind in KNOWN}
            numbers = float(a["floor"]), float(a["shrinkage"])
            return Persons(stats, *numbers, str(a["data"]), tuple(a["names"].tolist()), **known)
    except Exception as e:  # zipfile and NumPy raise many kinds
        fact = f"cannot be read ({reason(e, 120)})"
        raise ConclugenError(f"{path}: {fact}; restore it, or repeat the run in another --workdir") from e


def _chunks(num_rows: int) -> Iterator[np.ndarray]:
    return (np.arange(start, min(start + CHUNK_ROWS, num_rows)) for start in range(0, num_rows, CHUNK_ROWS))


def unfitted(manifest: Manifest, config: Any, modalities: Sequence[str]) -> Persons:
    """Return statistics of the right shapes, those of the split, before any person is known."""
    chosen = config.data.person_modalities or [m for m in modalities if m not in WORDS]
    stats = {m: dict(zip((*SPLIT, "mean", "scale"), manifest.standardization(m) * 2, strict=True)) for m in chosen}
    return Persons(stats, config.data.person_floor, config.data.person_shrinkage)


def feature_stats(manifest: Manifest, persons: Persons | None) -> Callable[[str], dict[str, np.ndarray]]:
    """Return the function modality -> statistics that a model which standardises carries: by person, or of the split."""

    def of(modality: str) -> dict[str, np.ndarray]:
        if persons is not None and modality in persons.stats:
            return dict(persons.stats[modality])
        return dict(zip(("mean", "scale"), manifest.standardization(modality), strict=True))

    return of

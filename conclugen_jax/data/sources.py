"""Define sources of examples: the description of a data set, and the annotations and features that make its examples."""

import dataclasses
import hashlib
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from conclugen_jax.errors import ConclugenError

LABEL_KINDS = ("single", "multi", "value", "none")

SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev", "devel", "development"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_NAMES = {
    word + ending: split
    for split, words in SPLIT_WORDS.items()
    for word in words
    for ending in ("", *(f"{between}{noun}" for between in ("", "_", "-", " ") for noun in ("set", "split")))
}
"""Names that splits have in files, such as val, dev_set and testing -> the names that they get."""


@dataclasses.dataclass(frozen=True)
class LabelSpec:
    """A label or target to predict."""

    kind: Literal["single", "multi", "value", "none"]
    """``single`` (one class per example), ``multi`` (any number of labels), ``value`` (a real number), ``none``."""
    names: tuple[str, ...] = ()
    """Names of the classes or labels, in the order of their index; empty for ``value`` and ``none``."""


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
    """Everything about a data set that is known before its examples are read."""

    name: str  # lower case letters, digits and underscores, starting with a letter
    version: str  # major.minor.patch
    description: str  # one sentence
    licence: str  # licence of the data, with attribution
    modalities: Mapping[str, int]  # modality -> size of its feature vector
    label: LabelSpec
    splits: Sequence[str]  # names of the splits, the training split first
    targets: Mapping[str, LabelSpec] = dataclasses.field(default_factory=dict)
    """Further labels to predict, by name; examples without one hold NaN (``value``) or -1 (``single``)."""
    variants: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Modality -> number of vectors of each example of the first split, such as augmented ones; other splits have 1."""
    shared_groups: bool = False  # do not warn if splits share groups, since this is by design


@dataclasses.dataclass(frozen=True)
class Example:
    """One utterance."""

    id: str  # unique within its split, preferably within the data set
    features: Mapping[str, np.ndarray]
    """Modality -> float vector [dim], or [variants, dim] if the spec has variants; without absent modalities."""
    label: int | float | Sequence[int] | None = None  # class index (single), 0/1 per label (multi), a number (value)
    group: str = ""  # unit to keep within one split, such as the speaker; may be empty
    targets: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # labels; a missing one is unknown
    replaced: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Modality -> number of values that its reader replaced by 0, such as -inf; for the manifest."""
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """``MODALITY REASON`` -> number of frames that its reader dropped, such as those without a face; for the manifest."""


class Source(Protocol):
    """A source of examples for :func:`conclugen_jax.data.builders.build`."""

    spec: DatasetSpec

    def fingerprint(self) -> str:
        """Return a text that changes if the examples change, such as a hash of the source files."""

    def examples(self, split: str) -> Iterator[Example]:
        """Yield the examples of a split, always in the same order."""


@runtime_checkable
class PartedSource(Source, Protocol):
    """A source whose splits consist of parts that several processes can read in parallel."""

    def num_examples(self, split: str) -> int:
        """Return the number of examples of a split."""

    def part(self, split: str, start: int, stop: int) -> Iterable[Example]:
        """Return rows ``start`` to ``stop`` of a split, as a picklable iterable."""


@dataclasses.dataclass(frozen=True)
class Annotations:
    """The ids, groups and labels of the examples of one split: columns of n rows."""

    ids: Sequence[str]  # unique within the split
    groups: Sequence[str]  # an empty text if unknown
    label: np.ndarray | None  # int64 [n] (single), float32 [n, labels] of 0 and 1 (multi), float32 [n] (value)
    targets: Mapping[str, np.ndarray]  # arrays like ``label``; -1 or NaN if unknown
    keys: Sequence[Any]  # keys of the features: a file's name, or (video, start, end) with times in seconds


class Features(Protocol):
    """The feature vectors of one modality, found by key."""

    dim: int

    def names(self) -> dict[str, list[str]]:
        """Return split ("" if unknown) -> keys of its vectors; empty if vectors have no keys."""

    def files(self) -> Iterable[Any]:
        """Return the paths of the files to read, for the fingerprint."""

    def locate(self, split: str, keys: Sequence[Any]) -> Sequence[Any]:
        """Return a place for :meth:`read` for each key; None if the modality is known to be absent."""

    def read(self, place: Any) -> np.ndarray | None:
        """Return the vector [dim] (or [variants, dim]) at a place; None if there is none."""


def name_hash(text: str) -> int:
    """Return 64 bits of a hash of a name, whose accents may be composed or apart; 0 for an empty one."""
    content = unicodedata.normalize("NFC", text).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") if text else 0


def split_name(text: str, where: str) -> str:
    """Return the name that a split gets: train, validation, test, or its own."""
    name = SPLIT_NAMES.get(text.strip().lower(), text.strip())
    if not name.replace("_", "a").isalnum() or not name.isascii() or name.lower() == "all":
        expected = "expected letters, digits and '_', and not 'all'" if name else "fill it in, or leave the row out"
        raise ConclugenError(f"{where}: split {text!r}; {expected}")
    return name


def take(annotations: Annotations, rows: np.ndarray) -> Annotations:
    """Return some rows of a split; ``rows``: int64 [n]."""
    names = annotations.ids, annotations.groups, annotations.keys
    ids, groups, keys = ([column[i] for i in rows.tolist()] for column in names)
    label = None if annotations.label is None else annotations.label[rows]
    return Annotations(ids, groups, label, {name: x[rows] for name, x in annotations.targets.items()}, keys)


def by_split(annotations: Annotations, splits: Sequence[str]) -> dict[str, Annotations]:
    """Cut annotations by the split of each row; train, validation and test come first, in that order."""
    known = list(SPLIT_WORDS)
    order = sorted(set(splits), key=lambda s: (known.index(s) if s in known else len(known), s))
    of_row = np.array(splits, dtype=object)
    return {split: take(annotations, np.flatnonzero(of_row == split)) for split in order}


def by_group(
    annotations: Annotations,
    num_folds: int,
    fold: int,
    *,
    where: str,
    seed: int = 0,
    validation: bool = True,
    option: str = "--",
) -> dict[str, Annotations]:
    """Cut one split into train, validation and test such that no group is in two of them.

    Groups are sorted, shuffled by a ``seed`` above 0, and cut into ``num_folds`` runs of nearly equal length. Run ``fold`` is
    the test split, the one before (the last before the first) the validation split, if there is to be one, the others the
    training split. Fewer groups than folds, or rows without group, are refused. ``option``: what comes before the names of
    options in messages.
    """
    groups = sorted(set(annotations.groups))
    if seed:
        groups = [groups[i] for i in np.random.default_rng(seed).permutation(len(groups))]
    if "" in groups:
        without, total = sum(not group for group in annotations.groups), len(annotations.groups)
        found = (
            "no example has a group (person)" if without == total else f"{without} of {total} examples have no group"
        )
        choice = f"give every example one, or stratify the folds by label with {option}fold_by=example"
        raise ConclugenError(f"{where}: {found}, but folds need one; {choice} (a person may then be in two folds)")
    if num_folds < 3 or not 0 <= fold < num_folds or len(groups) < num_folds:
        more = f", such as {option}num_folds={len(groups)}" if 3 <= len(groups) < num_folds else ""
        found = f"{where}: fold {fold} of {num_folds} over {len(groups)} groups (people)"
        raise ConclugenError(
            f"{found}; expected at least 3 folds, at most as many as groups{more}, and a fold counted from 0"
        )
    runs = np.array_split(np.arange(len(groups)), num_folds)
    fold_of = {groups[i]: number for number, run in enumerate(runs) for i in run}
    return _by_fold(annotations, [fold_of[group] for group in annotations.groups], num_folds, fold, validation)


MIXED_PERSONS = (
    "the folds are cut over examples, so examples of one person may be in training and test, which makes scores too good; "
    "with a group (person) for every example, folds by group keep persons apart"
)
"""Warning for folds cut by :func:`by_example`."""


def by_example(
    annotations: Annotations, num_folds: int, fold: int, *, where: str, seed: int = 0, validation: bool = True
) -> dict[str, Annotations]:
    """Cut one split into train, validation and test over single examples, stratified by label; ignore groups.

    The function shuffles rows by ``seed``, sorts them by label and deals them to the folds in turn. So the numbers of a
    class in two folds differ by one at most, as do the sizes of the folds; a class may have fewer examples than there
    are folds. Rows with several labels are sorted by their combination, numbers by their rank, ``num_folds`` ranks
    together. Folds are train, validation and test as in :func:`by_group`.
    """
    label, n = annotations.label, len(annotations.ids)
    if num_folds < 3 or not 0 <= fold < num_folds or n < num_folds:
        found = f"{where}: fold {fold} of {num_folds} over {n} examples"
        raise ConclugenError(f"{found}; expected at least 3 folds, at most as many as examples, counted from 0")
    order = np.random.default_rng(seed).permutation(n)
    if label is not None:
        numbers = label.ndim == 1 and label.dtype.kind == "f"
        strata = label.argsort(kind="stable").argsort() // num_folds if numbers else label
        order = order[np.lexsort(np.atleast_2d(strata[order].T))]  # a stable sort
    fold_of = np.empty(n, int)
    fold_of[order] = np.arange(n) % num_folds
    return _by_fold(annotations, fold_of.tolist(), num_folds, fold, validation)


def _by_fold(
    annotations: Annotations, fold_of: Sequence[int], num_folds: int, fold: int, validation: bool
) -> dict[str, Annotations]:
    names = ["train"] * num_folds
    names[fold - 1], names[fold] = "validation" if validation else "train", "test"
    return by_split(annotations, [names[number] for number in fold_of])

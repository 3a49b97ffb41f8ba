"""Annotations of utterances: which columns mean what, and how rows are cut into splits and folds."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from conclugen_jax.data.sources import SPLIT_NAMES, Annotations, LabelSpec
from conclugen_jax.errors import ConclugenError


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which columns of a table mean what.

    Attributes:
      label: columns: none; one; or one of 0 and 1 per label.
      kind: of the label; guessed from the values if empty.
      classes: names in order; those found, sorted, if empty.
      targets: columns of further targets.
    """

    label: tuple[str, ...] = ()
    kind: str = ""
    classes: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()


def array(spec: LabelSpec, values: Sequence[Any]) -> np.ndarray | None:
    """Return labels or targets as :class:`Annotations` hold them; ``None`` among the values stands for unknown."""
    if spec.kind == "none":
        return None
    if spec.kind == "multi":
        return np.array(values, np.float32).reshape(len(values), len(spec.names))
    unknown, dtype = (-1, np.int64) if spec.kind == "single" else (np.nan, np.float32)
    return np.array([unknown if v is None else v for v in values], dtype)


def split_name(text: str, where: str) -> str:
    """Return the name that a split gets: train, validation, test, or its own."""
    name = SPLIT_NAMES.get(text.strip().lower(), text.strip())
    if not name.replace("_", "a").isalnum() or not name.isascii() or name.lower() == "all":
        raise ConclugenError(
            f"{where}: split {text!r}; names consist of letters, digits and '_', and 'all' is reserved"
        )
    return name


def take(annotations: Annotations, rows: np.ndarray) -> Annotations:
    """Return some rows of a split; ``rows``: int64 [n]."""
    ids, groups, keys = (
        [column[i] for i in rows.tolist()] for column in (annotations.ids, annotations.groups, annotations.keys)
    )
    label = None if annotations.label is None else annotations.label[rows]
    return Annotations(ids, groups, label, {name: x[rows] for name, x in annotations.targets.items()}, keys)


def by_split(annotations: Annotations, splits: Sequence[str]) -> dict[str, Annotations]:
    """Cut annotations by the split of each row; train, validation and test come first, in that order."""
    known = list(dict.fromkeys(SPLIT_NAMES.values()))
    order = sorted(set(splits), key=lambda s: (known.index(s) if s in known else len(known), s))
    of_row = np.array(splits, dtype=object)
    return {split: take(annotations, np.flatnonzero(of_row == split)) for split in order}


def by_group(annotations: Annotations, num_folds: int, fold: int, *, where: str) -> dict[str, Annotations]:
    """Cut one split into train, validation and test such that no group is in two of them.

    Groups are sorted and cut into ``num_folds`` runs of nearly equal length. Run ``fold`` is the test split, the one
    before (the last before the first) the validation split, the others the training split.

    Raises:
      ConclugenError: fewer than three folds, fewer groups than folds, or rows without group.
    """
    groups = sorted(set(annotations.groups))
    if num_folds < 3 or not 0 <= fold < num_folds or len(groups) < num_folds or "" in groups:
        more = f", such as --num_folds={len(groups)}" if 3 <= len(groups) < num_folds else ""
        raise ConclugenError(
            f"{where}: fold {fold} of {num_folds} over {len(groups)} groups (people); there must be 3 folds at least, as many "
            f"groups as folds{more}, a group for every row, and folds count from 0"
        )
    runs = np.array_split(np.array(groups, dtype=object), num_folds)
    split_of = dict.fromkeys(groups, "train")
    split_of |= dict.fromkeys(runs[fold - 1], "validation") | dict.fromkeys(runs[fold], "test")
    return by_split(annotations, [split_of[group] for group in annotations.groups])

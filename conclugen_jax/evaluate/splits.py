"""Which rows a downstream run trains on, chooses by and scores: stored splits or folds by group, all labels or few."""

import copy
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from conclugen_jax.data import manifest as manifest_lib
from conclugen_jax.data import sources
from conclugen_jax.data.shards import Dataset, Rows, RowSource, ShardStream, Variants
from conclugen_jax.data.sources import Annotations, LabelSpec
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import probe
from conclugen_jax.evaluate import task as task_lib
from conclugen_jax.run.allowed import FROZEN
from conclugen_jax.train import feed

NAMES = ("train", "validation", "test")


class Subset(NamedTuple):
    """Some rows of a split, numbered from 0; keeps no copy of them."""

    source: RowSource
    members: np.ndarray
    tier: str = "host"
    variants: Mapping[str, int] = {}

    @property
    def num_examples(self) -> int:
        return len(self.members)

    @property
    def usable(self) -> np.ndarray:
        return np.flatnonzero(np.isin(self.members, self.source.usable))

    def rows(self, indices: np.ndarray, variants: Variants | None = None) -> Rows:
        return self.source.rows(self.members[indices], variants)


def names(config: ConfigDict) -> dict[str, str]:
    """Return the split that is used as ``train``, ``validation`` and ``test``; one for all where folds are cut."""
    if config.downstream.num_folds:
        return dict.fromkeys(NAMES, config.data.train_split)
    return {name: getattr(config.data, f"{name}_split") for name in NAMES}


def label_of(config: ConfigDict, dataset: Dataset) -> LabelSpec:
    """Return what is to be predicted.

    Raises:
      ConclugenError: an unknown target or split, or a data set without labels.
    """
    manifest, where, target = dataset.manifest, f"data set {config.data.path}", config.downstream.target
    label = manifest.label
    if target:
        label = manifest.targets[manifest_lib.choose(manifest.targets, [target], what="target", where=where)[0]]
    if label.kind == "none":
        raise ConclugenError(f"{config.data.path}: the data set has no labels; a downstream run needs them")
    manifest_lib.choose(manifest.splits, names(config).values(), what="split", where=where)
    return label


def open_streams(config: ConfigDict, dataset: Dataset, modalities: list[str]) -> dict[str, ShardStream]:
    """Open the stream of each split; a training that is not frozen may visit all stored variants."""
    random = config.downstream.protocol not in FROZEN and config.data.variants == "random"
    target = config.downstream.target
    return {
        name: ShardStream(dataset, split, modalities, target=target, all_variants=random and name == "train")
        for name, split in names(config).items()
    }


def load(config: ConfigDict, label: LabelSpec, streams: Mapping[str, ShardStream]) -> dict[str, RowSource]:
    """Load the rows of each split; training uses those that have a label and, by choice, few of each class.

    Raises:
      ConclugenError: folds that cannot be cut, no row with a label, or a class with fewer labels than asked for.
    """
    if config.downstream.num_folds:
        rows = _fold(config, feed.load_rows(config, streams["train"]), streams["train"])
    else:
        rows = {name: feed.load_rows(config, stream) for name, stream in streams.items()}
    train = rows["train"]
    labels = task_lib.labels_of(train)
    usable = task_lib.labelled(label, labels, streams["train"].where, train.usable)
    train.usable = few(label, labels, usable, config.downstream.labels_per_class, config.downstream.label_draw)
    return rows


def few(label: LabelSpec, labels: np.ndarray, usable: np.ndarray, num_per_class: int, draw: int) -> np.ndarray:
    """Draw ``num_per_class`` random rows of every class among those usable (0: all), by the number of the draw alone."""
    if not num_per_class:
        return usable
    if label.kind != "single":
        raise ConclugenError(
            f"config.downstream.labels_per_class is {num_per_class}, but the labels are of kind {label.kind!r}; only with one "
            "class per example can so many of each be drawn"
        )
    return usable[probe.draw_labels(labels[usable], num_per_class, seed=draw)]


def _fold(config: ConfigDict, rows: RowSource, stream: ShardStream) -> dict[str, RowSource]:
    section = config.downstream
    everyone = list(range(stream.num_examples))
    _, groups = stream.names(np.arange(stream.num_examples))
    listed = Annotations(ids=everyone, groups=list(groups), label=None, targets={}, keys=everyone)
    cut = sources.by_group(listed, section.num_folds, section.fold, where=stream.where)
    members = {name: np.array(part.ids, int) for name, part in cut.items()}
    train = copy.copy(rows)
    train.usable = np.intersect1d(rows.usable, members["train"])
    return {"train": train, **{name: Subset(rows, members[name]) for name in NAMES[1:]}}

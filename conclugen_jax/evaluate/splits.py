"""Which rows a downstream run trains on, chooses by and scores: stored splits or folds, all labels or few."""

import copy
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from conclugen_jax.data import persons, sources
from conclugen_jax.data.shards import Dataset, Rows, RowSource, ShardStream, Variants
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import probe, task as task_lib
from conclugen_jax.runs.config import FROZEN
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
        """Number of rows of the part."""
        return len(self.members)

    @property
    def usable(self) -> np.ndarray:
        """Positions of the rows that have a modality, int [n]."""
        return np.flatnonzero(np.isin(self.members, self.source.usable))

    def rows(self, indices: np.ndarray, variants: Variants | None = None) -> Rows:
        """Read rows of the part by their positions."""
        return self.source.rows(self.members[indices], variants)


def open_streams(config: ConfigDict, dataset: Dataset, modalities: list[str]) -> dict[str, ShardStream]:
    """Open what is used as ``train``, ``validation`` and ``test``; one split for all where folds are cut.

    A training that is not frozen may visit all stored variants. There is no ``test`` where ``data.test_split`` is empty.
    """
    section, data = config.downstream, config.data
    random = section.protocol not in FROZEN and data.variants == "random"
    streams = {}
    for name in NAMES:
        split = data.train_split if section.num_folds else getattr(config.data, f"{name}_split")
        if name == "test" and not split:
            continue
        variants = random and name == "train"
        streams[name] = ShardStream(dataset, split, modalities, target=section.target, all_variants=variants)
    if streams["train"].label.kind == "none":
        raise ConclugenError(f"{data.path}: the data set has no labels; a downstream run needs them")
    return streams


def require_test(config: ConfigDict) -> None:
    """Refuse a run that is about its scores, without a split that is scored."""
    if not config.data.test_split:
        raise ConclugenError("config.data.test_split is empty; name the split to score, such as 'test'")


def check(config: ConfigDict, streams: Mapping[str, ShardStream]) -> None:
    """Refuse folds and numbers of labels that the data do not allow; nothing is written yet."""
    _refuse_few(streams["train"].label, config.downstream.labels_per_class)
    if config.downstream.num_folds:
        _cut(config, streams["train"], None)


def fit_persons(config: ConfigDict, dataset: Dataset, modalities: list[str]) -> persons.Persons:
    """Compute the statistics by person of the training split."""
    return persons.fit(ShardStream(dataset, config.data.train_split, modalities), config)


def load(config: ConfigDict, streams: Mapping[str, ShardStream]) -> tuple[dict[str, RowSource], np.ndarray]:
    """Load the rows of each split; training uses those that have a label, optionally few of each class.

    Returns them, and all rows of ``train`` that are its own, with or without a label.
    """
    stream, section = streams["train"], config.downstream
    if section.num_folds:
        rows = _fold(config, feed.load_rows(config, stream), stream)
    else:
        rows = {name: feed.load_rows(config, stream) for name, stream in streams.items()}
    labels, everyone = task_lib.labels_of(rows["train"]), rows["train"].usable
    usable = task_lib.labelled(stream.label, labels, stream.where, everyone)
    rows["train"].usable = few(stream.label, labels, usable, section.labels_per_class, section.label_draw)
    return rows, everyone


def few(label: sources.LabelSpec, labels: np.ndarray, usable: np.ndarray, num_per_class: int, draw: int) -> np.ndarray:
    """Draw ``num_per_class`` random rows of every class among those usable, by the number of the draw alone.

    A class that has fewer gives all of them. 0: all rows.
    """
    _refuse_few(label, num_per_class)
    return usable[probe.draw_labels(labels[usable], num_per_class, seed=draw)]


def _refuse_few(label: sources.LabelSpec, num_per_class: int) -> None:
    if num_per_class and label.kind != "single":
        fact = f"config.downstream.labels_per_class is {num_per_class}, but the labels are of kind {label.kind!r}"
        raise ConclugenError(f"{fact}; only with one class per example can so many of each be drawn")


def _cut(config: ConfigDict, stream: ShardStream, labels: np.ndarray | None) -> dict[str, sources.Annotations]:
    """Return the rows of each part of a fold; those over examples are stratified by the labels."""
    everyone = list(range(stream.num_examples))
    section, (_, groups) = config.downstream, stream.names(np.arange(stream.num_examples))
    listed = sources.Annotations(ids=everyone, groups=list(groups), label=labels, targets={}, keys=everyone)
    wanted = {"num_folds": section.num_folds, "fold": section.fold, "where": stream.where}
    if section.fold_by == "example":
        return sources.by_example(listed, **wanted, seed=config.seed)
    return sources.by_group(listed, **wanted, option="--config.downstream.")


def _fold(config: ConfigDict, rows: RowSource, stream: ShardStream) -> dict[str, RowSource]:
    labels = task_lib.labels_of(rows) if config.downstream.fold_by == "example" else None
    members = {name: np.array(part.ids, int) for name, part in _cut(config, stream, labels).items()}
    train = copy.copy(rows)
    train.usable = np.intersect1d(rows.usable, members["train"])
    return {"train": train, **{name: Subset(rows, members[name]) for name in NAMES[1:]}}


def warnings(config: ConfigDict, label: sources.LabelSpec, labels: np.ndarray) -> list[str]:
    """Return what is to be said of folds over examples, of rows with these labels; nothing of other folds or splits."""
    num_folds = config.downstream.num_folds
    if not num_folds or config.downstream.fold_by != "example":
        return []
    found, known = [f"warning: {sources.MIXED_PERSONS}"], labels[task_lib.known(label, labels)]
    counts = [] if label.kind == "value" else zip(label.names, task_lib.counted(label, known).tolist(), strict=True)
    if few := [f"{name!r} {count}" for name, count in counts if 0 < count < num_folds]:
        fact = f"fewer examples than the {num_folds} folds: {', '.join(few)}"
        found.append(f"warning: {fact}; some folds do not test such a class")
    return found

"""Score a classifier of one data set on the test rows of other data sets, with classes matched by name.

Nothing is fitted on the scored rows, except the statistics of their persons if features are standardised by person.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from conclugen_jax.data import shards
from conclugen_jax.data.manifest import Manifest
from conclugen_jax.data.persons import Persons
from conclugen_jax.data.sources import LabelSpec
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import metrics, task as task_lib, weights

KINDS = {"single": "one class per example", "multi": "any number of labels per example", "value": "a number"}


class Matching(NamedTuple):
    """Which classes, or labels, of a data set that is scored are which of the one that is trained on.

    ``pairs``: the places of those that both have, in (the training data's names, the other's).
    """

    kind: str
    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    pairs: tuple[tuple[int, int], ...]

    def facts(self) -> dict[str, Any]:
        """Return the names that are matched, ours -> theirs, and those that one side alone has."""
        both = ({a for a, _ in self.pairs}, {b for _, b in self.pairs})
        spare = [
            [name for i, name in enumerate(names) if i not in at] for names, at in zip(self[1:3], both, strict=True)
        ]
        matched = {self.ours[a]: self.theirs[b] for a, b in self.pairs}
        return {"classes": matched, "only_trained": spare[0], "only_scored": spare[1]}

    def kept(self, labels: np.ndarray, *, own: bool = False) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
        """Return which rows count, their labels in our numbers, and class -> number of rows that are dropped.

        ``labels``: [n], or [n, labels] of which the labels that both have are returned; of the other data set, or our ``own``.
        """
        names, side = (self.ours, 0) if own else (self.theirs, 1)
        rows = np.flatnonzero(task_lib.known(LabelSpec(self.kind, names), labels))
        if self.kind == "value":
            return rows, labels[rows], {}
        if self.kind == "multi":
            return rows, labels[rows][:, [pair[side] for pair in self.pairs]], {}
        number = np.full(len(names), -1)
        for pair in self.pairs:
            number[pair[side]] = pair[0]
        counts = np.bincount(labels[rows], minlength=len(names))
        left_out = {name: int(counts[i]) for i, name in enumerate(names) if number[i] < 0 and counts[i]}
        rows = rows[number[labels[rows]] >= 0]
        return rows, number[labels[rows]], left_out

    def scores(self, guess: np.ndarray, labels: np.ndarray, *, own: bool = False) -> dict[str, Any]:
        """Score predictions [n], or of all our labels [n, labels], of the rows that count.

        A prediction of a class that the other data set lacks is an error. Returns ``n``, ``left_out``, ``scores``.
        """
        rows, truth, left_out = self.kept(labels, own=own)
        guess, names = guess[rows], self.ours
        if self.kind == "multi":
            at = [a for a, _ in self.pairs]
            guess, names = guess[:, at], [self.ours[a] for a in at]
        found = (
            metrics.value_scores(truth, guess) if self.kind == "value" else metrics.class_scores(truth, guess, names)
        )
        return {"n": len(rows), "left_out": left_out, "scores": found}


def match(ours: LabelSpec, theirs: LabelSpec, trained: str, scored: str) -> Matching:
    """Match classes, or labels, by name; of names that differ in case alone, the same one first.

    ``trained``, ``scored``: whose they are, for messages. Refused are labels of different kinds, and none in common.
    """
    if ours.kind != theirs.kind or theirs.kind == "none":
        kinds = (f"{x} has {KINDS.get(y.kind, 'no labels')}" for x, y in ((trained, ours), (scored, theirs)))
        raise ConclugenError(f"{', '.join(kinds)}; name data sets with labels of one kind, or another target")
    if ours.kind == "value":
        return Matching(ours.kind, (), (), ())
    pairs: dict[int, int] = {}
    for plain in (str, _plain):  # the same names first
        free = {plain(name): b for b, name in reversed(list(enumerate(theirs.names))) if b not in pairs.values()}
        for a, name in enumerate(ours.names):
            if a not in pairs and plain(name) in free:
                pairs[a] = free.pop(plain(name))
    if not pairs:
        lists = f"{', '.join(ours.names)} there, {', '.join(theirs.names)} here"
        raise ConclugenError(f"{scored} has no class in common with {trained} ({lists}); rename them in the labels")
    return Matching(ours.kind, tuple(ours.names), tuple(theirs.names), tuple(sorted(pairs.items())))


def _plain(name: str) -> str:
    return name.strip().casefold()


class Other(NamedTuple):
    """The split of another data set that is scored."""

    key: str  # of its rows, beside those of the splits
    stream: shards.ShardStream
    matching: Matching

    def facts(self) -> dict[str, Any]:
        """Return the data set, and how its classes are matched."""
        manifest = self.stream.dataset.manifest
        named = {"name": manifest.name, "version": manifest.version, "sha256": manifest.fingerprint()}
        return {"data": named, "split": self.stream.split, **self.matching.facts()}

    def scores(self, guess: np.ndarray, labels: np.ndarray, own_guess: np.ndarray, own: np.ndarray) -> dict[str, Any]:
        """Score predictions of its rows and, as ``within``, those of our own test rows with classes that both have."""
        return self.matching.scores(guess, labels) | {"within": self.matching.scores(own_guess, own, own=True)}


def opened(config: ConfigDict, dataset: shards.Dataset, modalities: Sequence[str]) -> list[Other]:
    """Open the data sets of ``config.data.test_paths``, on which a classifier of a data set is scored, too.

    Raises:
      ConclugenError: the data set itself, one without the modalities or with features of other sizes or backbones, or labels
        that cannot be matched.
    """
    ours, target, found = dataset.manifest, config.downstream.target, []
    trained = f"data set {dataset.path}"
    for path in config.data.test_paths:
        other = shards.open_dataset(path, verify=config.data.verify)
        theirs, where = other.manifest, f"data set {path}"
        if any(theirs.fingerprint() == x for x in (ours.fingerprint(), *(o.facts()["data"]["sha256"] for o in found))):
            twice = "is trained on" if theirs.fingerprint() == ours.fingerprint() else "is named already"
            raise ConclugenError(f"{where}, which is to be scored, {twice}; name another one")
        check_features(theirs, ours, modalities, where, trained)
        stream = shards.ShardStream(other, config.data.test_split, modalities, target=target)
        matching = match(ours.labels()[target], stream.label, trained, where)
        for side, manifest in enumerate((ours, theirs)):
            facts = manifest.splits[stream.split]
            counts = facts["target_counts"][target] if target else facts["label_counts"]
            if matching.kind == "single" and not any(counts[pair[side]] for pair in matching.pairs):
                fact = f"no example of split {stream.split!r} has a class that both data sets have"
                raise ConclugenError(f"{(trained, where)[side]}: {fact}; name another data set")
        found.append(Other(f"across {len(found)}", stream, matching))
    return found


def check_features(theirs: Manifest, ours: Manifest, modalities: Sequence[str], where: str, trained: str) -> None:
    """Refuse features whose size differs from the training data or, if manifests record them, whose backbones differ."""
    weights.check_features(theirs, {m: ours.modalities[m] for m in modalities}, where, trained)
    for m in modalities:
        a, b = (_backbones(manifest, m) for manifest in (theirs, ours))
        if a and b and a != b:
            names = [", ".join(sorted(x)) for x in (a, b)]
            same = "" if names[0] != names[1] else ", with other weights or settings"
            fact = (
                f"the features of modality {m!r} of {where} are of {names[0]}{same}, those of {trained} of {names[1]}"
            )
            raise ConclugenError(f"{fact}; extract one of them again as the other was")


def _backbones(manifest: Manifest, modality: str) -> dict[str, Any]:
    """Return the backbones of a modality, without the source of their weights; empty if unknown."""
    made = manifest.source.get("extraction", {}).get("backbones", {})
    return {
        name: {key: x for key, x in facts.items() if key != "source"}
        for name, facts in made.items()
        if facts.get("modality") == modality
    }


def scored(
    others: Sequence[Other], task: task_lib.Task, outputs: Callable[[str], tuple[Any, np.ndarray]]
) -> dict[str, Any]:
    """Return ``across``, the scores of a classifier on each of the other data sets; nothing without any.

    ``outputs``: key of a split -> logits and labels of its rows.
    """

    def predicted(key: str) -> tuple[np.ndarray, np.ndarray]:
        logits, labels = outputs(key)
        return task.predictions(np.asarray(logits)), labels

    own = predicted("test") if others else ()
    return {"across": [other.scores(*predicted(other.key), *own) for other in others]} if others else {}


def strangers(persons: Persons) -> Persons:
    """Return the statistics of persons for another data set, where equal names mean other persons."""
    return dataclasses.replace(persons, data="")


def said(facts: Mapping[str, Any], scored: Mapping[str, Any], trained: str) -> list[str]:
    """Return sentences on how the classes of another data set were matched and which rows were excluded.

    ``facts``: of :meth:`Other.facts`; ``scored``: ``n`` and ``left_out`` of its rows, and of our own as ``within``;
    ``trained``: name of the data set that was trained on.
    """
    name, pairs = facts["data"]["name"], facts["classes"].items()
    if not pairs:
        return []
    lines = [f"classes of {trained} and {name}: {', '.join(a if a == b else f'{a} = {b}' for a, b in pairs)}"]
    for who, spare, rows in ((trained, "only_trained", scored["within"]), (name, "only_scored", scored)):
        if facts[spare]:
            counted = ", ".join(f"{one} ({rows['left_out'].get(one, 0)})" for one in facts[spare])
            lines.append(f"only {who} has these, whose test rows are excluded from both scores: {counted}")
    return lines

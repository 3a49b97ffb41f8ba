"""What a source of examples is: a description of the data set and an iterator over each split."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

LABEL_KINDS = ("single", "multi", "none")


@dataclasses.dataclass(frozen=True)
class LabelSpec:
    """What is to be predicted.

    Attributes:
      kind: ``single`` (one class per example), ``multi`` (any number of labels), ``none``.
      names: of the classes or labels, in the order of their index.
    """

    kind: str
    names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
    """Everything about a data set that is known before its examples are read.

    Attributes:
      name: lower case letters, digits and underscores, starting with a letter.
      version: ``major.minor.patch``.
      description: one sentence.
      licence: of the data, with attribution.
      modalities: modality -> size of its feature vector.
      label: kind and names of the labels.
      splits: names, the one to train on first.
    """

    name: str
    version: str
    description: str
    licence: str
    modalities: Mapping[str, int]
    label: LabelSpec
    splits: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Example:
    """One utterance.

    Attributes:
      id: unique within its split.
      features: modality -> float vector [dim]; a modality that is absent here is not a key.
      label: class index (single), 0/1 per label (multi), or None.
      group: what a split should not tear apart, such as the speaker; stored with the record, may be empty.
    """

    id: str
    features: Mapping[str, np.ndarray]
    label: int | Sequence[int] | None = None
    group: str = ""


class Source(Protocol):
    """Anything that yields examples."""

    spec: DatasetSpec

    def fingerprint(self) -> str:
        """Text that changes when the examples do, such as a hash of the source files."""

    def examples(self, split: str) -> Iterator[Example]:
        """The examples of a split, always in the same order."""

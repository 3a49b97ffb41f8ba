"""What a user asks to be built, and what the reader of a format finds for it."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from conclugen_jax.data import annotations as annotations_lib
from conclugen_jax.data.annotations import Layout
from conclugen_jax.data.corpora import CORPORA, Corpus
from conclugen_jax.data.features import MatrixFeatures, ParquetFeatures
from conclugen_jax.data.folders import FolderFeatures
from conclugen_jax.data.sources import SPLIT_NAMES, Annotations, Features, LabelSpec
from conclugen_jax.errors import ConclugenError


@dataclasses.dataclass(frozen=True)
class Request:
    """What a user wants to build.

    Attributes:
      dataset: a key of :data:`conclugen_jax.data.corpora.CORPORA`, or ``features``.
      source: file or folder, None if every modality is named.
      format: ``auto`` or a key of :data:`conclugen_jax.data.formats.FORMATS`.
      name: of the built data set; the corpus' by default.
      version: of the built data set.
      modalities: modality -> path of its features, beside or instead of those found in the source.
      only: modalities to build, all where empty.
      labels: csv files (or a ``.csd`` file) instead of those in the source.
      layout: which columns mean what; only for ``features``.
      pool: how sequences are reduced over time.
      folds: (number of folds, fold) to split by group; None for the splits that the data have.
    """

    dataset: str
    source: Path | None = None
    format: str = "auto"
    name: str = ""
    version: str = "1.0.0"
    modalities: Mapping[str, str] = dataclasses.field(default_factory=dict)
    only: tuple[str, ...] = ()
    labels: tuple[Path, ...] = ()
    layout: Layout = dataclasses.field(default_factory=Layout)
    pool: str = "mean"
    folds: tuple[int, int] | None = None

    @property
    def corpus(self) -> Corpus | None:
        """Facts of the corpus, None for ``features``."""
        return CORPORA.get(self.dataset)

    def opened(self, found: Mapping[str, Callable[[], Features]]) -> dict[str, Features]:
        """Those modalities that are to be built from what was found: name -> what opens it.

        Raises:
          ConclugenError: one that is asked for cannot be opened, or there is none of its name.
        """
        for modality in self.only:
            if modality not in (*found, *self.modalities):
                known = ", ".join([*found, *self.modalities]) or "none"
                raise ConclugenError(f"no modality {modality!r}; there are {known}")
        return {
            m: open() for m, open in found.items() if m not in self.modalities and (not self.only or m in self.only)
        }


@dataclasses.dataclass(frozen=True)
class Found:
    """What the reader of a format found.

    Attributes:
      features: of each modality.
      columns: annotations of each split; None if the format's own files hold none.
      label: kind and names, where the corpus does not say.
      targets: likewise.
      label_files: that the annotations were read from.
      passed_over: what was found and is not used, in words.
      facts: for the manifest.
      identity: stands for the names, sizes and times of the files, where they were made anew of what it tells apart.
    """

    features: Mapping[str, Features]
    columns: Mapping[str, Annotations] | None = None
    label: LabelSpec | None = None
    targets: Mapping[str, LabelSpec] = dataclasses.field(default_factory=dict)
    label_files: Sequence[Path] = ()
    passed_over: Sequence[str] = ()
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    identity: str = ""


def open_features(path: str, pool: str) -> Features:
    """Features of one modality from a path as users write it.

    A folder of npy files; ``FILE.npy`` with ``FILE.txt``; ``FILE.npz:ARRAY``; ``FILE.parquet:COLUMN``.

    Raises:
      ConclugenError: no such file, or one of another kind.
    """
    place, key = Path(path), ""
    if not os.path.exists(place) and ":" in path:  # which may also be in the name of a file or folder
        file, _, key = path.rpartition(":")
        place = Path(file)
    if not os.path.exists(place):
        raise ConclugenError(
            f"{path}: no such file or folder; name features with --modality NAME=PATH, once for each modality"
        )
    if place.is_dir():
        return FolderFeatures(place, how=pool)
    if place.suffix == ".npy":
        return MatrixFeatures(place, how=pool)
    if place.suffix == ".npz":
        return MatrixFeatures(place, how=pool, key=key or "features")
    if place.suffix == ".parquet":
        return ParquetFeatures(place, how=pool, column=key or "features")
    raise ConclugenError(f"{path}: expected a folder, FILE.npy, FILE.npz:ARRAY or FILE.parquet:COLUMN")


def from_names(request: Request, features: Mapping[str, Features]) -> dict[str, Annotations]:
    """Annotations from the names of the utterances alone.

    Raises:
      ConclugenError: the corpus' names say nothing, or nothing says which split they are in.
    """
    corpus = request.corpus
    if corpus.named is None:
        raise ConclugenError(
            f"{request.dataset}: no labels; add a labels.csv with columns id, split, group and the labels"
        )
    names = union(features)
    if len(corpus.splits) < 2:
        if not names.keys() & {"train", ""}:
            raise ConclugenError(
                f"{request.dataset}: features of {', '.join(names)} only; put all into a folder train, or into none"
            )
        names = {"train": names.get("train", names.get("", []))}
    elif "" in names:
        raise ConclugenError(
            f"{request.dataset}: nothing says which split an utterance is in; use folders train, validation and test, or a "
            "labels.csv with columns id, split and label"
        )
    return annotations_lib.from_names(corpus, names).result()


def union(features: Mapping[str, Features]) -> dict[str, list[str]]:
    """split -> names that at least one modality has, sorted; ``SPLIT/KEY`` is the name ``KEY`` of that split.

    Raises:
      ConclugenError: some names say which split they are of, and some do not.
    """
    names: dict[str, set[str]] = {}
    for each in features.values():
        for split, keys in each.names().items():
            for key in keys:
                within, slash, rest = key.partition("/")
                known = not split and slash and within in SPLIT_NAMES
                names.setdefault(within if known else split, set()).add(rest if known else key)
    if "" in names and len(names) > 1:
        raise ConclugenError(
            "some features lie in split folders or have ids such as train/ID, and some do not; add a labels.csv that says "
            "who is where"
        )
    return {split: sorted(keys) for split, keys in names.items()}

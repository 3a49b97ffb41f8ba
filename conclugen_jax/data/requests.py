"""What a user asks to build, and what the reader of a format finds."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from conclugen_jax.data.cells import Table
from conclugen_jax.data.corpora import CORPORA, Corpus
from conclugen_jax.data.features import FolderFeatures, MatrixFeatures
from conclugen_jax.data.parquet import ParquetFeatures
from conclugen_jax.data.sources import Annotations, Features, LabelSpec
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
        """Return the facts of the corpus, None for ``features``."""
        return CORPORA.get(self.dataset)

    def opened(self, found: Mapping[str, Callable[[], Features]]) -> dict[str, Features]:
        """Open those of the modalities in the source (modality -> what opens it) that are to be built and not named."""
        self.require({**found, **self.modalities})
        wanted = [m for m in found if m not in self.modalities and (not self.only or m in self.only)]
        return {m: found[m]() for m in wanted}

    def require(self, modalities: Mapping[str, Any]) -> None:
        """Refuse a modality that is asked for and not among these."""
        for modality in self.only:
            if modality not in modalities:
                raise ConclugenError(f"no modality {modality!r}; there are {', '.join(modalities) or 'none'}")


@dataclasses.dataclass(frozen=True)
class Found:
    """What the reader of a format found.

    Attributes:
      features: of each modality.
      table: rows with labels that the format's own files hold, None without.
      columns: annotations of each split, None as long as they have not been read.
      label: kind and names, where the corpus does not say.
      targets: likewise.
      label_files: that the annotations are read from.
      passed_over: what was found and is not used, in words.
      facts: for the manifest.
      identity: replaces the names, sizes and times of the files in the fingerprint, where the files were derived from
        something that it identifies.
    """

    features: Mapping[str, Features]
    table: Table | None = None
    columns: Mapping[str, Annotations] | None = None
    label: LabelSpec | None = None
    targets: Mapping[str, LabelSpec] = dataclasses.field(default_factory=dict)
    label_files: Sequence[Path] = ()
    passed_over: Sequence[str] = ()
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    identity: str = ""


def open_features(path: str, pool: str) -> Features:
    """Open the features of one modality from a path as users write it.

    It is a folder of npy files; ``FILE.npy`` with ``FILE.txt``; ``FILE.npz:ARRAY``; or ``FILE.parquet:COLUMN``.
    """
    place, _, key = (path, "", "") if os.path.exists(path) else path.rpartition(":")  # names, too, may hold colons
    if not os.path.exists(place):
        raise ConclugenError(f"{path}: no such file or folder; give --modality NAME=PATH once for each modality")
    place, key = Path(place), key or "features"
    if place.is_dir():
        return FolderFeatures(place, how=pool)
    if place.suffix == ".npy":
        return MatrixFeatures(place, how=pool)
    if place.suffix == ".npz":
        return MatrixFeatures(place, how=pool, key=key)
    if place.suffix == ".parquet":
        return ParquetFeatures(place, how=pool, column=key)
    raise ConclugenError(f"{path}: expected a folder, FILE.npy, FILE.npz:ARRAY or FILE.parquet:COLUMN")

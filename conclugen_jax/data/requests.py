"""The request to build a data set, and the result of reading a format."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from conclugen_jax.data.cells import Table
from conclugen_jax.data.corpora import CORPORA, Corpus
from conclugen_jax.data.sources import Annotations, Features, LabelSpec


@dataclasses.dataclass(frozen=True)
class Layout:
    """The meaning of the columns of a table."""

    label: tuple[str, ...] = ()  # names of the columns: none, one, or one of 0 and 1 per label
    kind: str = ""  # kind of the label; if empty, guessed from the values
    classes: tuple[str, ...] = ()  # class names in order; if empty, all found names, sorted
    targets: tuple[str, ...] = ()  # columns of further labels


@dataclasses.dataclass(frozen=True)
class Request:
    """The request to build a data set."""

    dataset: str  # a key of CORPORA, or features
    source: Path | None = None  # file or folder, None if every modality is named
    format: str = "auto"  # auto, or a key of formats.FORMATS
    name: str = ""  # name of the built data set; that of the corpus by default
    version: str = "1.0.0"  # version of the built data set
    modalities: Mapping[str, str] = dataclasses.field(
        default_factory=dict
    )  # modality -> path, in addition to the source or instead of it
    only: tuple[str, ...] = ()  # modalities to build; empty for all
    labels: tuple[Path, ...] = ()  # csv files (or a .csd file) instead of those in the source
    layout: Layout = dataclasses.field(default_factory=Layout)  # meaning of the columns; only for features
    pool: str = "mean"  # how sequences are reduced over time
    folds: tuple[int, int] | None = None  # number of folds, and the test fold; None to keep the splits of the data
    fold_by: str = "group"  # group, or example: the unit of the folds
    fold_seed: int = 0  # seed of the shuffle before the split; 0 keeps groups sorted
    fold_validation: bool = True  # use the fold before the test fold for validation

    @property
    def corpus(self) -> Corpus | None:
        """Return the facts of the corpus, None for ``features``."""
        return CORPORA.get(self.dataset)


@dataclasses.dataclass(frozen=True)
class Found:
    """The result of reading a format."""

    features: Mapping[
        str, Features | Callable[[], Features]
    ]  # the vectors of each modality, or a function that opens them
    table: Table | None = None  # labels in the format's own files
    columns: Mapping[str, Annotations] | None = None  # annotations of each split; None until they are read
    label: LabelSpec | None = None  # the label, if the corpus does not define it
    targets: Mapping[str, LabelSpec] = dataclasses.field(default_factory=dict)  # further labels, likewise
    label_files: Sequence[Path] = ()  # files with the annotations
    passed_over: Sequence[str] = ()  # unused files, in words
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # facts for the manifest
    identity: str = ""  # fingerprint of the origin of the files, instead of their names, sizes and times
    beside: Sequence[Path] = ()  # files to copy into the folder of the data set

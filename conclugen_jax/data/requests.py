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

    label: tuple[str, ...] = ()  # none; one; or one of 0 and 1 per label
    kind: str = ""  # of the label; guessed from the values if empty
    classes: tuple[str, ...] = ()  # names in order; those found, sorted, if empty
    targets: tuple[str, ...] = ()  # further ones


@dataclasses.dataclass(frozen=True)
class Request:
    """The request to build a data set."""

    dataset: str  # a key of CORPORA, or features
    source: Path | None = None  # file or folder, None if every modality is named
    format: str = "auto"  # or a key of formats.FORMATS
    name: str = ""  # of the built data set; the corpus' by default
    version: str = "1.0.0"  # of the built data set
    modalities: Mapping[str, str] = dataclasses.field(
        default_factory=dict
    )  # -> path, beside or instead of the source's
    only: tuple[str, ...] = ()  # modalities to build, all where empty
    labels: tuple[Path, ...] = ()  # csv files (or a .csd file) instead of those in the source
    layout: Layout = dataclasses.field(default_factory=Layout)  # which columns mean what; only for features
    pool: str = "mean"  # how sequences are reduced over time
    folds: tuple[int, int] | None = (
        None  # number of folds, and the one to test on; None for the splits that the data have
    )
    fold_by: str = "group"  # or example: what folds are cut by
    fold_seed: int = 0  # by which groups or examples are shuffled before; groups are sorted with 0
    fold_validation: bool = True  # the fold before the one to test on validates

    @property
    def corpus(self) -> Corpus | None:
        """Return the facts of the corpus, None for ``features``."""
        return CORPORA.get(self.dataset)


@dataclasses.dataclass(frozen=True)
class Found:
    """The result of reading a format."""

    features: Mapping[str, Features | Callable[[], Features]]  # of each modality, or what opens them
    table: Table | None = None  # rows with labels that the format's own files hold
    columns: Mapping[str, Annotations] | None = None  # of each split, None as long as they have not been read
    label: LabelSpec | None = None  # where the corpus does not say
    targets: Mapping[str, LabelSpec] = dataclasses.field(default_factory=dict)  # likewise
    label_files: Sequence[Path] = ()  # that the annotations are read from
    passed_over: Sequence[str] = ()  # what was found and is not used, in words
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # for the manifest
    identity: str = ""  # fingerprint of what the files were derived from, instead of their names, sizes and times
    beside: Sequence[Path] = ()  # files to be copied into the folder of the data set

"""What a study left on disk, read and checked: its results and the logs of its pretraining runs."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np

from conclugen_jax.data.manifest import Manifest
from conclugen_jax.run import log as log_lib, workdir as workdir_lib
from conclugen_jax.run.allowed import PROTOCOLS
from conclugen_jax.study.results import RESULTS
from conclugen_jax.system import files

PRETRAINING = "pretraining"
Count = Annotated[int, msgspec.Meta(ge=0)]
FolderName = Annotated[str, msgspec.Meta(pattern=r"^(?!\.\.?$)[^/\0]+$")]


class DatasetFacts(msgspec.Struct):
    """A labelled data set; ``error`` says why it could not be read when results were collected, then nothing else is known."""

    path: str
    name: str = ""
    version: str = ""
    sha256: str = ""
    kind: Literal["single", "multi", "value", "unknown"] = "unknown"
    classes: tuple[str, ...] = ()
    num_examples: dict[str, Count] = {}
    error: str = ""

    def fits(self, matrix: list) -> bool:
        """Return whether a confusion matrix has counts in the shape that these labels give."""
        n, counts = len(self.classes), np.asarray(matrix)
        shape = {"single": (n, n), "multi": (n, 2, 2), "unknown": counts.shape}.get(self.kind)
        return counts.shape == shape and counts.dtype.kind == "i" and bool((counts >= 0).all())


class Place(msgspec.Struct):
    """What a number is about; ``labels`` per class, 0 stands for all."""

    dataset: str
    method: str
    protocol: Literal[PROTOCOLS]
    labels: Count = msgspec.field(name="labels_per_class")


class Cell(Place):
    """One run of the study; ``confusion_matrix`` of counts or ``None``."""

    seed: Count
    status: Literal["done", "failed", "missing"]
    path: str
    confusion_matrix: list | None
    error: str | None


class Score(msgspec.Struct):
    """Mean over seeds; deviation and 95 % interval are ``None`` where one seed alone is there."""

    mean: float | None
    std: float | None
    interval: tuple[float, float] | None

    def __post_init__(self) -> None:
        self.mean, self.std, self.interval = _finite(self.mean), _finite(self.std), _finite(self.interval)


class Summary(Place):
    """Scores of one method, protocol and number of labels over ``n`` seeds."""

    n: Count
    scores: dict[str, Score]


class Comparison(Place):
    """Mean difference of a method from a baseline over ``n`` paired seeds, with its 95 % interval."""

    measure: str
    baseline: str
    difference: float | None
    interval: tuple[float, float] | None
    n: Count

    def __post_init__(self) -> None:
        self.difference, self.interval = _finite(self.difference), _finite(self.interval)


class Method(msgspec.Struct):
    """Its name in tables, and the pretraining that it uses (``None``: raw features, supervised)."""

    title: str
    pretraining: FolderName | None


class Run(NamedTuple):
    """A pretraining run: its folder, data, configuration (JSON), and the records of its logs."""

    workdir: Path
    data: Manifest
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    probes: list[dict[str, Any]]


class Study(msgspec.Struct):
    """Everything a report is made of: ``results.json``, see :mod:`conclugen_jax.study.results`, and the runs."""

    name: str
    versions: dict[str, str]
    definition: Any
    datasets: dict[str, DatasetFacts]
    methods: dict[str, Method]
    cells: list[Cell]
    summary: list[Summary]
    comparisons: list[Comparison]
    path: Path = Path()  # folder of the study
    runs: dict[str, dict[int, Run]] = {}  # pretraining -> seed -> run, as far as they have begun

    def __post_init__(self) -> None:
        places = (*self.cells, *self.summary, *self.comparisons)
        unknown = {p.dataset for p in places} - set(self.datasets)
        unknown |= ({p.method for p in places} | {c.baseline for c in self.comparisons}) - set(self.methods)
        if unknown:
            raise ValueError(f"{min(unknown)!r} is not described")
        for cell in self.cells:
            if cell.confusion_matrix is not None and not self.datasets[cell.dataset].fits(cell.confusion_matrix):
                raise ValueError(f"the confusion matrix of {cell.path!r} does not fit the classes of {cell.dataset!r}")
        self.summary.sort(key=lambda s: (self.rank(s.method, s.protocol), s.labels or math.inf))

    def label(self, method: str, protocol: str) -> str:
        """Return what a row of a table is called."""
        return self.methods[method].title + (", fine-tuned" if protocol == "fine_tuning" else "")

    def rank(self, method: str, protocol: str) -> tuple[int, int]:
        """Return a key that sorts by protocol, then by method."""
        return PROTOCOLS.index(protocol), list(self.methods).index(method)

    def user(self, pretraining: str) -> str:
        """Return the method that a pretraining is shown as: the one of its name, else the first that uses it."""
        users = [name for name, method in self.methods.items() if method.pretraining == pretraining]
        return pretraining if pretraining in users else users[0]

    def pretraining_title(self, pretraining: str) -> str:
        """Return what a pretraining is called."""
        return self.methods[self.user(pretraining)].title


def read(folder: str | Path) -> Study:
    """Read a study's folder.

    Raises:
      ConclugenError: no results there, or a damaged file, which is named.
    """
    folder = Path(folder)
    way_out = "name the folder of a study, or repeat `conclugen study` to collect its results again"
    study = files.read_json(folder / RESULTS, Study, way_out=way_out)
    study.path = folder
    names = dict.fromkeys(method.pretraining for method in study.methods.values() if method.pretraining)
    runs = {name: dict(_runs(folder / PRETRAINING / name)) for name in names}
    study.runs = {name: found for name, found in runs.items() if found}
    return study


def _runs(folder: Path) -> Iterator[tuple[int, Run]]:
    for workdir in sorted(folder.glob("seed_*")):
        seed = workdir.name.removeprefix("seed_")
        if not (seed.isascii() and seed.isdecimal()) or not (workdir / workdir_lib.CONFIG).exists():
            continue  # nothing has begun here
        data, config = workdir_lib.read_data(workdir), json.loads(workdir_lib.read_config(workdir).to_json())
        logs = (log_lib.records(workdir / name) for name in (log_lib.METRICS, log_lib.PROBES))
        yield int(seed), Run(workdir, data, config, *logs)


def _finite(x: Any) -> Any:
    """Return a number or interval, or ``None`` where it is not finite, as one seed's deviation may be."""
    return x if x is not None and all(map(math.isfinite, x if isinstance(x, tuple) else (x,))) else None

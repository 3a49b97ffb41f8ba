"""Read and check the results of a study and the logs of its pretraining runs."""

import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np

from conclugen_jax.data.manifest import Manifest
from conclugen_jax.runs import log as log_lib, workdir as workdir_lib
from conclugen_jax.study import results
from conclugen_jax.study.definition import ALL
from conclugen_jax.study.results import RESULTS, bounds
from conclugen_jax.system import files

PRETRAINING = "pretraining"
Count = Annotated[int, msgspec.Meta(ge=0)]
FolderName = Annotated[str, msgspec.Meta(pattern=r"^(?!\.\.?$)[^/\0]+$")]


class DatasetFacts(msgspec.Struct):
    """A labelled data set. If it could not be read, ``error`` says why, and the other facts are empty."""

    path: str
    name: str = ""
    version: str = ""
    sha256: str = ""
    kind: Literal["single", "multi", "value", "unknown"] = "unknown"
    classes: tuple[str, ...] = ()
    num_examples: dict[str, Count] = {}
    error: str = ""

    def title(self, key: str) -> str:
        """Return the key of the data set in the study, with its name and version."""
        name = f"{self.name} {self.version}"
        shown = name if key == self.name else f"{key} ({name})"
        return key if self.error else shown


class Place(msgspec.Struct):
    """The place of a number in a study; ``labels`` per class, 0 for all."""

    dataset: str
    method: str
    protocol: Literal[ALL]
    labels: Count = msgspec.field(name="labels_per_class")


class Cell(Place):
    """One run of the study; ``confusion_matrix`` of counts or ``None``; ``scores``: measure -> mean over draws of labels."""

    seed: Count
    status: Literal["done", "failed", "missing"]
    path: str
    confusion_matrix: list | None
    error: str | None
    scores: dict[str, float] | None = None


class Score(msgspec.Struct):
    """Mean over seeds, NaN where a seed has none; deviation and 95 % interval are ``None`` where one seed alone is there."""

    mean: float
    std: float | None
    interval: tuple[float, float] | None


class Summary(Place):
    """Scores of one method, protocol and number of labels over ``n`` seeds.

    ``never_predicted``: class -> number of ``evaluations`` in which it is never predicted.
    """

    n: Count
    scores: dict[str, Score]
    never_predicted: dict[str, Count] = {}
    evaluations: Count = 0


class Across(Place):
    """Scores on the ``rows`` test rows of another data set, and ``within``, on own ones, of the classes that both have.

    ``classes``: name here -> name there; those that one side alone has are listed.
    """

    test_data: str
    n: Count
    scores: dict[str, Score]
    within: dict[str, Score]
    rows: Count
    rows_within: Count
    classes: dict[str, str]
    only_trained: list[str]
    only_scored: list[str]


class Comparison(Place):
    """Mean difference of a method from a baseline over ``n`` paired seeds, with its 95 % interval."""

    measure: str
    baseline: str
    difference: float
    interval: tuple[float, float] | None
    n: Count
    best: str = ""  # the baseline that is best on average, where the baseline is that


class Method(msgspec.Struct):
    """Its name in tables, and the pretraining that it uses (``None``: raw features, supervised)."""

    title: str
    pretraining: FolderName | None


class Run(NamedTuple):
    """A pretraining run: its folder, data, configuration (JSON), and the records of its logs."""

    workdir: Path
    data: Manifest
    config: dict[str, Any]
    records: list[dict[str, Any]]


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
    across: list[Across] = []
    warnings: list[str] = []  # of its runs on their data
    path: Path = Path()  # folder of the study
    runs: dict[str, list[Run]] = {}  # pretraining -> its runs that have begun, by seed

    def __post_init__(self) -> None:
        places = (*self.cells, *self.summary, *self.comparisons, *self.across)
        unknown = {*(p.dataset for p in places), *(one.test_data for one in self.across)} - set(self.datasets)
        unknown |= ({p.method for p in places} | {c.baseline for c in self.comparisons}) - set(self.methods)
        if unknown:
            raise ValueError(f"{min(unknown)!r} is not described")
        for cell in (c for c in self.cells if c.confusion_matrix is not None):
            facts, counts = self.datasets[cell.dataset], np.asarray(cell.confusion_matrix)
            n = len(facts.classes)
            shape = {"single": (n, n), "multi": (n, 2, 2), "unknown": counts.shape}.get(facts.kind)
            if counts.shape != shape or counts.dtype.kind != "i" or (counts < 0).any():
                raise ValueError(f"the confusion matrix of {cell.path!r} does not fit the classes of {cell.dataset!r}")
        for measure, score in (item for s in self.summary for item in s.scores.items()):
            if score.interval is not None:  # of an earlier version, which did not cut it
                low, high = bounds(measure)
                score.interval = max(score.interval[0], low), min(score.interval[1], high)
        self.summary.sort(key=lambda s: (self.rank(s.method, s.protocol), s.labels or math.inf))

    def scored(self) -> list[str]:
        """Return the data sets that have scores."""
        return [key for key in self.datasets if self.summary_of(key)]

    def summary_of(self, key: str) -> list[Summary]:
        """Return the summaries of a data set."""
        return [s for s in self.summary if s.dataset == key]

    def most_labels(self, key: str) -> int:
        """Return all labels (0) where a data set has that, else the largest number per class."""
        return max((s.labels for s in self.summary_of(key)), key=lambda k: k or math.inf, default=0)

    def label(self, method: str, protocol: str) -> str:
        """Return the label of a row in tables."""
        return self.methods[method].title + {"fine_tuning": ", fine-tuned", "probe": ", probe"}.get(protocol, "")

    def not_ahead(self, key: str, method: str) -> str:
        """Return which baselines a method does not beat on a data set; empty if it beats all or was not compared."""
        titles = {name: one.title for name, one in self.methods.items()}
        comparisons = [{**msgspec.structs.asdict(c), "labels_per_class": c.labels} for c in self.comparisons]
        return results.not_ahead(comparisons, key, method, titles)

    def rank(self, method: str, protocol: str) -> tuple[int, int]:
        """Return a key that sorts by protocol, then by method."""
        return ALL.index(protocol), list(self.methods).index(method)

    def user(self, pretraining: str) -> str:
        """Return the method that a pretraining is shown as: the one of its name, else the first that uses it."""
        users = [name for name, method in self.methods.items() if method.pretraining == pretraining]
        return pretraining if pretraining in users else users[0]


def read(folder: str | Path) -> Study:
    """Read a study's folder.

    Raises:
      ConclugenError: no results there, or a damaged file, which is named.
    """
    folder = Path(folder)
    way_out = "name the folder of a study, or repeat `conclugen study` to collect its results again"
    study = files.read_json(folder / RESULTS, Study, way_out=way_out)
    study.path = folder
    for name in {method.pretraining: None for method in study.methods.values() if method.pretraining}:
        begun = [path.parent for path in (folder / PRETRAINING / name).glob(f"seed_*/{workdir_lib.CONFIG}")]
        seeds = {int(path.name[5:]): path for path in begun if re.fullmatch("seed_[0-9]+", path.name)}
        if seeds:
            study.runs[name] = [_run(seeds[seed]) for seed in sorted(seeds)]
    return study


def of_run(workdir: str | Path, title: str) -> Study:
    """Read a pretraining run as a study of one method without scores, on its own data; ``title``: what tables call it."""
    run = _run(Path(workdir))
    facts = DatasetFacts(run.config["data"]["path"], run.data.name, run.data.version, run.data.fingerprint())
    facts.num_examples = {split: about["num_examples"] for split, about in run.data.splits.items()}
    method = {title: Method(title, title)}
    return Study(
        run.data.name, {}, run.config, {run.data.name: facts}, method, [], [], [], path=run.workdir, runs={title: [run]}
    )


def _run(workdir: Path) -> Run:
    data, config = workdir_lib.read_data(workdir), json.loads(workdir_lib.read_config(workdir).to_json())
    metrics, probes = log_lib.records(workdir / log_lib.METRICS), log_lib.records(workdir / log_lib.PROBES)
    return Run(workdir, data, config, metrics + probes)

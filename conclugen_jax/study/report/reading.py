"""What a study left on disk, read and checked: its results and the logs of its pretraining runs."""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from conclugen_jax.data.manifest import Manifest
from conclugen_jax.errors import ConclugenError
from conclugen_jax.run import workdir as workdir_lib

RESULTS = "results.json"
PRETRAINING = "pretraining"
PROBES = "probes.jsonl"

PROTOCOLS = {
    "linear_evaluation": "linear evaluation",
    "fine_tuning": "fine-tuned",
    "supervised": "supervised baseline",
    "raw_features": "raw features",
}
"""Protocol -> its name in text, in the order of tables."""


@dataclasses.dataclass(frozen=True)
class DatasetFacts:
    """A labelled data set: where it is, the hash of its manifest, and the names of its classes.

    Where it could not be read when results were collected, ``error`` says why, and its kind is ``unknown``.
    """

    path: str
    name: str
    version: str
    sha256: str
    kind: str
    classes: tuple[str, ...]
    num_examples: dict[str, int]
    error: str = ""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of the study; ``labels`` per class, 0 stands for all; ``confusion_matrix`` of counts or ``None``."""

    dataset: str
    method: str
    protocol: str
    labels: int
    seed: int
    draws: int
    status: str
    error: str
    path: str
    confusion_matrix: Any


@dataclasses.dataclass(frozen=True)
class Score:
    """Mean over seeds; deviation and 95 % interval are ``None`` where one seed alone is there."""

    mean: float | None
    std: float | None
    low: float | None
    high: float | None


@dataclasses.dataclass(frozen=True)
class Summary:
    """Scores of one method, protocol and number of labels over ``n`` seeds."""

    dataset: str
    method: str
    protocol: str
    labels: int
    n: int
    scores: dict[str, Score]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Mean difference of a method from a baseline over ``n`` paired seeds, with its 95 % interval."""

    dataset: str
    protocol: str
    labels: int
    measure: str
    method: str
    baseline: str
    difference: float | None
    low: float | None
    high: float | None
    n: int


@dataclasses.dataclass(frozen=True)
class Run:
    """A pretraining run: its folder, data, configuration (JSON), and the records of its logs."""

    workdir: Path
    data: Manifest
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    probes: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Study:
    """Everything a report is made of.

    Attributes:
      path: folder of the study.
      name: of the study.
      versions: package -> version.
      definition: the study's configuration as JSON.
      datasets: by key.
      titles: method -> title, in the order of tables.
      pretraining: method -> name of its pretraining, or ``None`` (raw features, supervised).
      cells: all runs of the study.
      summary: scores over seeds.
      comparisons: paired differences.
      runs: pretraining -> seed -> run, as far as they have begun.
    """

    path: Path
    name: str
    versions: dict[str, str]
    definition: Any
    datasets: dict[str, DatasetFacts]
    titles: dict[str, str]
    pretraining: dict[str, str | None]
    cells: list[Cell]
    summary: list[Summary]
    comparisons: list[Comparison]
    runs: dict[str, dict[int, Run]]

    def title(self, method: str) -> str:
        """What a method, or a protocol that stands for one, is called."""
        return self.titles.get(method, PROTOCOLS.get(method, method))

    def label(self, method: str, protocol: str) -> str:
        """What a row of a table is called."""
        title = self.title(method)
        if protocol == "linear_evaluation" or (protocol != "fine_tuning" and self.pretraining.get(method) is None):
            return title
        return f"{title}, {PROTOCOLS.get(protocol, protocol)}"

    def pretraining_title(self, pretraining: str) -> str:
        """What a pretraining is called: as the method of its name, else as the first method that uses it."""
        users = [method for method, name in self.pretraining.items() if name == pretraining]
        return self.title(pretraining if pretraining in users or not users else users[0])

    def different_data(self) -> list[str]:
        """One sentence for each data set of which runs of this study saw different contents."""
        sentences = []
        for facts in self.datasets.values():
            for runs in self.runs.values():
                for run in runs.values():
                    same_name = (run.data.name, run.data.version) == (facts.name, facts.version)
                    if same_name and run.data.fingerprint() != facts.sha256:
                        sentences.append(
                            f"{run.workdir.relative_to(self.path)} was pretrained on other data than was scored: {facts.name} "
                            f"{facts.version} had the hash {run.data.fingerprint()[:12]} then and {facts.sha256[:12]} in the "
                            "results; their numbers do not belong together."
                        )
        return sentences


def read(folder: str | Path) -> Study:
    """Read a study's folder.

    Raises:
      ConclugenError: no results there, or a damaged file, which is named.
    """
    path = Path(folder) / RESULTS
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise ConclugenError(f"{path}: no such file; name the folder of a study whose results are collected") from None
    except (OSError, UnicodeDecodeError) as e:
        raise ConclugenError(f"{path}: cannot be read ({e}); collect the study's results anew") from e
    try:
        study = _study(Path(folder), json.loads(text))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as e:
        raise ConclugenError(
            f"{path}: damaged ({type(e).__name__}: {str(e)[:200]}); collect the study's results anew"
        ) from e
    names = dict.fromkeys(name for name in study.pretraining.values() if name)
    runs = {name: dict(_runs(study.path / PRETRAINING / name)) for name in names}
    return dataclasses.replace(study, runs={name: found for name, found in runs.items() if found})


def _study(folder: Path, tree: Mapping[str, Any]) -> Study:
    datasets = {}
    for key, d in tree["datasets"].items():
        if "error" in d:
            datasets[key] = DatasetFacts(_text(d["path"]), key, "", "", "unknown", (), {}, _text(d["error"]))
            continue
        if d["kind"] not in ("single", "multi", "value"):
            raise ValueError(f"data set {key!r} has labels of kind {d['kind']!r}")
        texts = [_text(d[field]) for field in ("path", "name", "version", "sha256", "kind")]
        counts = {split: _integer(count) for split, count in d["num_examples"].items()}
        datasets[key] = DatasetFacts(*texts, tuple(_text(name) for name in d["classes"]), counts)
    return Study(
        path=folder,
        name=_text(tree["name"]),
        versions={name: str(version) for name, version in tree["versions"].items()},
        definition=tree["definition"],
        datasets=datasets,
        titles={key: _text(method["title"]) for key, method in tree["methods"].items()},
        pretraining={key: _name(method["pretraining"]) for key, method in tree["methods"].items()},
        cells=[_cell(c, datasets) for c in tree["cells"]],
        summary=[
            Summary(*_place(s, datasets), _integer(s["n"]), {k: _score(x) for k, x in s["scores"].items()})
            for s in tree["summary"]
        ],
        comparisons=[_comparison(c, datasets) for c in tree["comparisons"]],
        runs={},
    )


def _place(x: Mapping[str, Any], datasets: Mapping[str, DatasetFacts]) -> tuple[str, str, str, int]:
    if x["dataset"] not in datasets:
        raise ValueError(f"data set {x['dataset']!r} is not described")
    return x["dataset"], _text(x["method"]), _text(x["protocol"]), _integer(x["labels_per_class"])


def _cell(c: Mapping[str, Any], datasets: Mapping[str, DatasetFacts]) -> Cell:
    place = _place(c, datasets)
    if c["status"] not in ("done", "failed", "missing"):
        raise ValueError(f"a cell has the status {c['status']!r}")
    facts, matrix = datasets[place[0]], c.get("confusion_matrix")
    if facts.kind == "unknown":
        matrix = None
    if matrix is not None:
        n = len(facts.classes)
        shape = {"single": (n, n), "multi": (n, 2, 2)}.get(facts.kind)
        if shape is None or not _has_shape(matrix, shape):
            raise ValueError(f"the confusion matrix of {c['path']!r} is not of shape {shape}")
    return Cell(
        *place,
        seed=_integer(c["seed"]),
        draws=_integer(c["draws"]),
        status=c["status"],
        error=str(c["error"] or ""),
        path=_text(c["path"]),
        confusion_matrix=matrix,
    )


def _score(x: Mapping[str, Any]) -> Score:
    return Score(_number(x["mean"]), _number(x["std"]), *_interval(x["interval"]))


def _comparison(c: Mapping[str, Any], datasets: Mapping[str, DatasetFacts]) -> Comparison:
    dataset, method, protocol, labels = _place(c, datasets)
    difference, (low, high) = _number(c["difference"]), _interval(c["interval"])
    texts = _text(c["measure"]), method, _text(c["baseline"])
    return Comparison(dataset, protocol, labels, *texts, difference, low, high, _integer(c["n"]))


def _has_shape(matrix: Any, shape: tuple[int, ...]) -> bool:
    if not shape:
        return type(matrix) is int and matrix >= 0
    return isinstance(matrix, list) and len(matrix) == shape[0] and all(_has_shape(row, shape[1:]) for row in matrix)


def _interval(x: Any) -> tuple[float | None, float | None]:
    low, high = (None, None) if x is None else x
    return _number(low), _number(high)


def _number(x: Any) -> float | None:
    """A finite number; ``None`` also for NaN, which is what one seed's deviation may be."""
    if x is not None and (isinstance(x, bool) or not isinstance(x, int | float)):
        raise TypeError(f"{x!r} is not a number")
    return None if x is None or not math.isfinite(x) else float(x)


def _integer(x: Any) -> int:
    if type(x) is not int or x < 0:
        raise TypeError(f"{x!r} is not a count")
    return x


def _text(x: Any) -> str:
    if not isinstance(x, str):
        raise TypeError(f"{x!r} is not text")
    return x


def _name(x: Any) -> str | None:
    """A folder's name, or ``None``: nothing that leads out of the study."""
    if x is not None and (Path(_text(x)).name != x or x == ".."):
        raise ValueError(f"{x!r} is not the name of a pretraining")
    return x


def _runs(folder: Path) -> Iterator[tuple[int, Run]]:
    for workdir in sorted(folder.glob("seed_*")):
        seed = workdir.name.removeprefix("seed_")
        if not (seed.isascii() and seed.isdecimal()) or not (workdir / workdir_lib.CONFIG).exists():
            continue  # nothing has begun here
        yield (
            int(seed),
            Run(
                workdir,
                workdir_lib.read_data(workdir),
                json.loads(workdir_lib.read_config(workdir).to_json()),
                records(workdir / workdir_lib.METRICS),
                records(workdir / PROBES),
            ),
        )


def records(path: Path) -> list[dict[str, Any]]:
    """Lines of a log, none where it is not there; a last line that a kill or a running process cut short is left out."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as e:
        raise ConclugenError(f"{path}: cannot be read ({e}); repeat the run in a new folder") from e
    records = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            record = json.loads(line)
            if type(record["step"]) is not int:
                raise TypeError("its step is no number")
        except (ValueError, TypeError, KeyError, RecursionError) as e:
            raise ConclugenError(
                f"{path}, line {number}: not a JSON object with a step ({type(e).__name__}); mend or delete that line"
            ) from e
        records.append(record)
    return records

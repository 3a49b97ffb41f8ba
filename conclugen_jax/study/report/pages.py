"""Write the page of any folder: a study, a pretraining run, a search, or a run of ``conclugen run``."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import probe, weights
from conclugen_jax.runs import workdir as workdir_lib
from conclugen_jax.study.definition import BEST, PROBE
from conclugen_jax.study.report import charts, reading, report, tables
from conclugen_jax.study.report.reading import Comparison, Method, Score, Study, Summary
from conclugen_jax.study.report.report import Written
from conclugen_jax.study.report.tables import Part
from conclugen_jax.study.results import RESULTS
from conclugen_jax.system import files

TRIALS, RESULT = "trials", "result.json"
SHOWN = 50  # trials of the table
Options = dict[str, Any]


class _Search(msgspec.Struct):
    """What is read of the ``result.json`` of a search."""

    objective: dict[str, str]
    best: dict[str, Any] | None
    command: str | None
    trials: list[dict[str, Any]]


def write(folder: str | Path, output: str | Path | None = None, **options: Any) -> Written:
    """Make the page of a folder; see :func:`report.write` for the other arguments.

    A run whose data set has classes is scored by :func:`probe.label_efficiency_of_run`.

    Raises:
      ConclugenError: the folder holds nothing that has a page, or the page cannot be written.
    """
    root = Path(folder)
    target = Path(output or root)
    if (root / RESULTS).exists():
        return report.write(root, target, **options)
    if (root / TRIALS).is_dir():
        return _of_search(root, target, options)
    if (root / weights.RESULT).exists():
        fact = "a run of a classifier, which has no page of its own"
        raise ConclugenError(f"{root}: {fact}; name its pretraining run, or the study that it is part of")
    if (root / workdir_lib.CONFIG).exists():
        return _of_run(root, target, options)
    runs = sorted(root.glob(f"{reading.PRETRAINING}/*/seed_*/{workdir_lib.CONFIG}"))
    if runs:  # what ``conclugen run`` made of data without labels
        return _of_run(runs[-1].parent, target, options)
    raise ConclugenError(f"{root}: no study, run or search is there; name its folder, which `conclugen runs` lists")


def _of_run(workdir: Path, target: Path, options: Options) -> Written:
    study = reading.of_run(workdir, workdir.absolute().name)
    study, remarks = _scored(study, workdir)
    options = {"title": f"Run {workdir.absolute().name} on {study.name}"} | options
    return report.write(study, target, last={"Scores": [Part(notes=remarks)]}, **options)


def _scored(study: Study, workdir: Path) -> tuple[Study, Sequence[str]]:
    """Return a run with scores of its vectors beside those of its baselines, and how they were measured, or why not."""
    try:
        found = probe.label_efficiency_of_run(workdir)
    except ConclugenError as e:
        return study, [f"The run was not scored: {e}."]
    (title,), (key,) = study.methods, study.datasets
    ours = next(r.name for r in reversed(found.results))
    names = {r.name: title if r.name == ours else r.name for r in found.results}
    methods = {name: Method(name, title if name == title else None) for name in reversed(names.values())}
    methods[BEST] = Method("the best baseline", None)
    summary, comparisons = [], []
    means = {(names[r.name], r.num_labels): float(np.mean(r.accuracy)) for r in found.results}
    for r in found.results:
        scores = {"accuracy": Score(means[names[r.name], r.num_labels], None, None)}
        about = key, names[r.name], PROBE, r.num_labels
        summary.append(Summary(*about, 1, scores, r.never_predicted, len(r.accuracy)))
    for labels in dict.fromkeys(r.num_labels for r in found.results):
        best = max((name for name in names.values() if name != title), key=lambda name: means[name, labels])
        difference = means[title, labels] - means[best, labels]
        comparisons.append(Comparison(key, title, PROBE, labels, "accuracy", BEST, difference, None, 1, best))
    facts = msgspec.structs.replace(study.datasets[key], kind="single", classes=study.runs[title][0].data.label.names)
    changed = {"methods": methods, "summary": summary, "comparisons": comparisons, "datasets": {key: facts}}
    changed["definition"] = {**study.definition, "reference": title}
    return msgspec.structs.replace(study, **changed), [found.protocol, *(f"{line}." for line in found.warnings)]


def _of_search(root: Path, target: Path, options: Options) -> Written:
    found = files.read_json(
        root / RESULT, _Search, way_out="name the folder of a search whose first trial has finished"
    )
    if found.best is None:
        raise ConclugenError(f"{root}: no trial has finished yet; repeat `conclugen search` to resume")
    objective, number = found.objective, found.best["number"]
    study = reading.of_run(root / TRIALS / f"{number:04d}", f"trial {number}")
    finished = [t for t in found.trials if t["state"] == "finished"]
    counts = ", ".join(
        f"{len(list(of))} {state}" for state, of in itertools.groupby(sorted(t["state"] for t in found.trials))
    )
    lead = [
        f"Of {len(found.trials)} trials ({counts}), trial {number} has the best {objective['name'].replace('_', ' ')}: "
        f"{found.best['value']:.6g} (one run, so without an interval; it was chosen by this value)."
    ]
    better = min if objective["direction"] == "minimize" else max
    reached = list(itertools.accumulate((t["value"] for t in finished), better))
    lines = [("each trial", [t["value"] for t in finished]), ("best so far", reached)]
    nan = float("nan")
    series = [
        charts.Series(name, k, [(t["number"], y, nan, nan) for t, y in zip(finished, ys, strict=True)], band=True)
        for k, (name, ys) in enumerate(lines)
    ]
    drawn = charts.line_chart("Value of each trial", series, x_label="trial", y_label=objective["name"])
    order = sorted(finished, key=lambda t: t["value"], reverse=objective["direction"] == "maximize")
    keys = list(found.best["overrides"])
    rows = [
        (str(t["number"]), f"{t['value']:.6g}", *(_short(t["overrides"].get(k)) for k in keys)) for t in order[:SHOWN]
    ]
    table = tables.words("Best trials", ("trial", objective["name"], *keys), rows)
    failed = [(str(t["number"]), t["error"]) for t in found.trials if t["error"]]
    first = {
        "Trials": [
            Part(legend=[(s.name, s.style) for s in series], figures=[("", drawn)], notes=[objective["meaning"]]),
            table,
            *([tables.words("Failed trials", ("trial", "error"), failed)] if failed else []),
            Part("Command that pretrains with the best values", folded=found.command or ""),
        ]
    }
    options = {"title": f"Search {root.absolute().name} on {study.name}"} | options
    return report.write(study, target, first=first, lead=lead, **options)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

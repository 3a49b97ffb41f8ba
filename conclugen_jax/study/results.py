"""Collect the results of a study: scores of every cell, means with intervals over seeds, paired differences of methods."""

import collections
import importlib.metadata
import json
import math
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

import conclugen_jax
from conclugen_jax.data import manifest as manifest_lib
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import metrics, weights
from conclugen_jax.evaluate.baselines import BASELINES as PROBED
from conclugen_jax.runs.layout import FAILURE, RESULTS  # noqa: F401
from conclugen_jax.study.definition import BEST, PROBE, TITLES, Run, path_of, target_of

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "scikit-learn")
PLACE = ("dataset", "method", "protocol", "labels_per_class")
MEASURES = ("accuracy", "f1", "precision", "recall")
VALUE_MEASURES = ("mae", "correlation", "accuracy_2", "f1_2", "accuracy_7")
BASELINES = {
    "linear_evaluation": ("raw_features", "supervised", "untrained"),
    "fine_tuning": ("supervised",),
    PROBE: (),
}
"""Protocol -> protocols that its methods are compared with, beside the reference method; probes: with the best baseline."""


def collect(study: ConfigDict, runs: Iterable[Run], root: Path) -> dict[str, Any]:
    """Collect the results so far of all runs of a study (``definition.chains``) from its folder.

    Returns:
      ``name``, ``versions``, ``definition``, ``datasets``, ``methods``; ``cells``: one per data set, method, protocol,
      number of labels and seed, with test scores averaged over the draws of its labels; ``summary``: mean, standard
      deviation and 95 % interval over seeds (:func:`interval`), and class -> number of ``evaluations`` in which it is never
      predicted; ``comparisons``: the same of the difference between a method and a baseline, taken seed by seed on the
      same labels; ``across``: see :func:`across`; ``warnings``: what the runs say of their data, each sentence once.
    """
    place = {method: i for i, method in enumerate((*study.order, *TITLES))}
    cells = sorted(_cells(runs, root, study.test_data), key=lambda cell: place[cell["method"]])
    return {
        "name": study.name,
        "versions": {"conclugen_jax": conclugen_jax.__version__, "python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in PACKAGES},
        "definition": json.loads(study.to_json_best_effort()),
        "datasets": {name: _dataset(study, settings) for name, settings in study.datasets.items()},
        "methods": {
            name: {"title": study.methods[name].title, "pretraining": study.methods[name].get("uses") or name}
            for name in study.order
        }
        | {name: {"title": title, "pretraining": None} for name, title in TITLES.items()}
        | {BEST: {"title": "the best baseline", "pretraining": None}},
        "cells": cells,
        "warnings": list(dict.fromkeys(f"{cell['dataset']}: {line}" for cell in cells for line in cell["warnings"])),
        "summary": summarize(cells),
        "comparisons": compare(cells, study.reference),
        "across": across(cells),
    }


def _dataset(study: ConfigDict, settings: ConfigDict) -> dict[str, Any]:
    path, target = path_of(study, settings.path, study.seeds[0]), target_of(settings)
    try:
        manifest = manifest_lib.read(path)
        manifest_lib.choose(manifest.targets, [target] if target else [], what="target", where=f"data set {path}")
        label = manifest.labels()[target]
        if label.kind == "none":
            raise ConclugenError(f"{path}: the data set has no labels; name a target of it as config.downstream.target")
    except ConclugenError as e:
        return {"path": path, "error": str(e)}
    found = {"path": path, "name": manifest.name, "version": manifest.version, "sha256": manifest.fingerprint()}
    sizes = {split: facts["num_examples"] for split, facts in manifest.splits.items()}
    return found | {"target": target, "kind": label.kind, "classes": list(label.names), "num_examples": sizes}


def _cells(runs: Iterable[Run], root: Path, test_data: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield a cell for each data set, method, protocol, number of labels and seed, from the runs that have its draws."""
    parts: dict[tuple, list[tuple[Run, list[Mapping[str, Any]], str | None]]] = {}
    for run in runs:
        if run.protocol != "pretraining":
            section = run.config.downstream
            for number in run.config.sweep.labels_per_class or [section.labels_per_class]:
                key = run.dataset, run.method, run.protocol, number, run.seed
                parts.setdefault(key, []).append((run, *_fits(root / run.path, number, section)))
    for key, found in parts.items():
        fits, errors = [fit for _, own, _ in found for fit in own], [error for *_, error in found if error]
        done = all(own for _, own, _ in found)
        matrices = [fit["confusion_matrix"] for fit in fits] if done else []
        status = "failed" if errors else "missing"
        yield {
            **dict(zip((*PLACE, "seed"), key, strict=True)),
            "status": "done" if done else status,
            "path": found[0][0].path,
            "draw_scores": {str(fit["draw"]): fit["scores"] for fit in fits},
            "confusion_matrix": None if None in matrices or not matrices else np.sum(matrices, axis=0).tolist(),
            "error": errors[0] if errors else None,
            "scores": _means(fits, "scores") if done else {},
            "validation": _means(fits, "validation") if done else {},
            "draws": len(fits),
            **({"across": _across(fits, [name for name in test_data if name != key[0]])} if done and test_data else {}),
            "never_predicted": dict(collections.Counter(name for fit in fits for name in fit["never_predicted"])),
            "warnings": list(dict.fromkeys(line for fit in fits for line in fit["warnings"])),
        }


def _fits(path: Path, number: int, section: ConfigDict) -> tuple[list[dict[str, Any]], str | None]:
    """Return the results of the run in a folder with a number of labels, one per draw, or why it failed."""
    if error := failure(path):
        return [], error
    try:
        result = json.loads((path / weights.RESULT).read_text(encoding="utf-8"))
        measures = VALUE_MEASURES if result["kind"] == "value" else MEASURES
        alone = {**result, "labels_per_class": section.labels_per_class, "label_draw": section.label_draw}
        fits = [
            {
                "draw": fit["label_draw"],
                "scores": {m: float(fit["test"][m]) for m in measures},
                "validation": {m: float(fit["validation"][m]) for m in measures[:1] if "validation" in fit},
                "confusion_matrix": fit["test"].get("confusion_matrix"),
                "never_predicted": list(metrics.never_predicted(_matrices(fit), result["classes"])),
                "warnings": [line.removeprefix("warning: ") for line in result.get("warnings", [])],
                "across": list(zip(result.get("test_data", []), fit.get("across", []), strict=True)),
            }
            for fit in result.get("selected", [alone])
            if fit["labels_per_class"] == number
        ]
        if not fits:
            raise KeyError(number)
        return fits, None
    except FileNotFoundError:
        return [], None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
        return [], f"{path / weights.RESULT}: damaged ({type(e).__name__}); delete it and repeat the study"


def _matrices(fit: Mapping[str, Any]) -> list[Any]:
    return [fit["test"]["confusion_matrix"]] if "confusion_matrix" in fit["test"] else []


def _means(fits: Sequence[Mapping[str, Any]], what: str) -> dict[str, float]:
    return {measure: float(np.mean([fit[what][measure] for fit in fits])) for measure in fits[0][what]}


def _across(fits: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Return for each other data set that is scored how its classes are matched, and means over draws, within and across."""
    found = {}
    for i, name in enumerate(names):
        facts, first = fits[0]["across"][i]
        sides = [[fit["across"][i][1] for fit in fits], [fit["across"][i][1]["within"] for fit in fits]]
        means = [
            {m: float(np.mean([one["scores"][m] for one in side])) for m in fits[0]["scores"] if m in side[0]["scores"]}
            for side in sides
        ]
        counts = {"rows": first["n"], "rows_within": first["within"]["n"]}
        kept = {key: facts[key] for key in ("classes", "only_trained", "only_scored")}
        found[name] = kept | counts | {"scores": means[0], "within": means[1]}
    return found


def failure(path: Path) -> str | None:
    """Return why the run in a folder has failed; ``None`` if it has not."""
    try:
        return str(json.loads((path / FAILURE).read_text(encoding="utf-8"))["error"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as e:
        return f"failed for a reason that cannot be read ({type(e).__name__})"


def bounds(measure: str) -> tuple[float, float]:
    """Return the least and the greatest value that a measure can have."""
    return {"mae": (0.0, math.inf), "correlation": (-1.0, 1.0)}.get(measure, (0.0, 1.0))


def interval(values: Sequence[float], bounds: tuple[float, float] = (-math.inf, math.inf)) -> dict[str, Any]:
    """Return mean, standard deviation (n - 1) and 95 % interval of independent values; ``None`` where n is 1.

    The interval is Student's t, cut at the ``bounds`` that the expected value lies between: a value outside of them is never
    the true one, so the cut interval covers it as often as the whole one does (compare Mandelkern, Statistical Science
    17(2), 2002). With two or three values it is wide, as it must be: percentiles of a bootstrap are far too narrow
    there, and a logit, which has no value at 0 and 1, gives an interval of another mean.
    """
    n, mean = len(values), float(np.mean(values))
    if n == 1:
        return {"mean": mean, "std": None, "interval": None}
    std = float(np.std(values, ddof=1))
    from scipy import stats  # a second of imports, which other commands do without

    half = float(stats.t.ppf(0.975, n - 1)) * std / n**0.5
    return {"mean": mean, "std": std, "interval": [max(mean - half, bounds[0]), min(mean + half, bounds[1])]}


def summarize(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Average the scores of every data set, method, protocol and number of labels over the seeds that are done."""
    return [
        dict(zip(PLACE, place, strict=True))
        | {"n": len(own), "scores": {m: interval([c["scores"][m] for c in own], bounds(m)) for m in own[0]["scores"]}}
        | {"never_predicted": _added(c["never_predicted"] for c in own), "evaluations": sum(c["draws"] for c in own)}
        for place, own in _done(cells).items()
    ]


def across(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Average over seeds the scores of classifiers of one data set on the test rows of another, ``test_data``.

    ``within``: the same of their own test rows with the classes that both have; ``rows``, ``rows_within``: how many these are.
    """
    found = []
    for place, own in _done(cells).items():
        for name, facts in own[0].get("across", {}).items():
            parts = {
                key: {m: interval([c["across"][name][key][m] for c in own], bounds(m)) for m in facts[key]}
                for key in ("scores", "within")
            }
            about = dict(zip(PLACE, place, strict=True)) | {"test_data": name, "n": len(own)}
            found.append(about | {**facts, **parts})
    return found


def _added(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    return dict(sum(map(collections.Counter, counts), collections.Counter()))


def compare(cells: Sequence[Mapping[str, Any]], reference: str) -> list[dict[str, Any]]:
    """Compare methods with baselines and the reference on the same seeds, each the mean over draws that both sides have."""
    done, found = _done(cells), []
    for (dataset, method, protocol, number), own in done.items():
        baselines = [(name, name) for name in BASELINES.get(protocol, ())]
        baselines += [(reference, protocol)] if protocol in BASELINES and reference != method else []
        best = _best(done, dataset, number) if protocol == PROBE and method not in PROBED else ""
        baselines = [(BEST, PROBE)] * bool(best) + baselines * (method not in PROBED)
        for baseline, other_protocol in baselines:
            place = dataset, best if baseline == BEST else baseline, other_protocol, number
            others = {cell["seed"]: cell["draw_scores"] for cell in done.get(place, ())}
            measure, differences = next(iter(own[0]["scores"])), []
            for cell in sorted(own, key=lambda cell: cell["seed"]):
                a, b = cell["draw_scores"], others.get(cell["seed"], {})
                shared = [a[draw][measure] - b[draw][measure] for draw in sorted(a.keys() & b.keys())]
                differences += [float(np.mean(shared))] if shared else []
            if differences:
                low, high = bounds(measure)
                measured = interval(differences, (low - high, high - low))
                found.append(
                    dict(zip(PLACE, (dataset, method, protocol, number), strict=True))
                    | {"measure": measure, "baseline": baseline, "difference": measured["mean"]}
                    | {"interval": measured["interval"], "n": len(differences)}
                    | ({"best": best} if baseline == BEST else {})
                )
    return found


def _best(done: Mapping[tuple, list[Mapping[str, Any]]], dataset: str, number: int) -> str:
    """Return the baseline that is best on average with so many labels; empty without any."""
    means = {
        name: np.mean([cell["scores"]["accuracy"] for cell in done[place]])
        for name in PROBED
        if (place := (dataset, name, PROBE, number)) in done
    }
    return max(means, key=means.__getitem__, default="")


def not_ahead(comparisons: Iterable[Mapping[str, Any]], dataset: str, method: str, titles: Mapping[str, str]) -> str:
    """Return where a method does not beat the best baseline: the difference is not above 0, or its interval includes 0."""
    found: dict[str, list[str]] = {}
    for c in comparisons:
        ahead = c["difference"] > 0 and (c["interval"] is None or c["interval"][0] > 0)
        if (c["baseline"], c["dataset"], c["method"]) == (BEST, dataset, method) and not ahead:
            found.setdefault(titles[c["best"]], []).append(str(c["labels_per_class"] or "all"))
    parts = [f"{title} ({', '.join(labels)} labels)" for title, labels in found.items()]
    return f"does not beat {', '.join(parts)}" if parts else ""


def _done(cells: Sequence[Mapping[str, Any]]) -> dict[tuple, list[Mapping[str, Any]]]:
    """Return the cells that are done by place, one per seed."""
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for cell in cells:
        if cell["status"] == "done":
            groups.setdefault(tuple(cell[k] for k in PLACE), []).append(cell)
    return groups

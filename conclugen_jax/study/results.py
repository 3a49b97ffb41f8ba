"""What came out of a study: scores of every cell, means with intervals over seeds, paired differences of methods."""

import importlib.metadata
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

import conclugen_jax
from conclugen_jax.data import manifest as manifest_lib
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import downstream
from conclugen_jax.study.definition import ALONE, Run, target_of

RESULTS = "results.json"
FAILURE = "failed.json"
"""In the workdir of a run that failed, or has begun and not ended: why."""
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "scikit-learn")
PLACE = ("dataset", "method", "protocol", "labels_per_class")
MEASURES = ("accuracy", "f1", "precision", "recall")
VALUE_MEASURES = ("mae", "correlation", "accuracy_2", "f1_2", "accuracy_7")


def collect(study: ConfigDict, runs: Iterable[Run], root: Path) -> dict[str, Any]:
    """Collect all that a study has found so far.

    Args:
      study: its definition.
      runs: all of them, see ``definition.chains``.
      root: the study's folder.

    Returns:
      ``name``, ``versions``, ``definition``, ``datasets``, ``methods``; ``cells``: one per data set, method, protocol,
      number of labels and seed, with test scores averaged over the draws of its labels; ``summary``: mean, standard
      deviation and 95 % interval over seeds (Student's t); ``comparisons``: the same of the difference between a method and
      a baseline, taken seed by seed on the same labels.
    """
    cells = [cell for run in runs if run.protocol != "pretraining" for cell in _cells(run, root)]
    place = {method: i for i, method in enumerate((*study.order, *ALONE))}
    cells = sorted(_merged(cells), key=lambda cell: place[cell["method"]])
    return {
        "name": study.name,
        "versions": {"conclugen_jax": conclugen_jax.__version__, "python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in PACKAGES},
        "definition": json.loads(study.to_json_best_effort()),
        "datasets": {name: _dataset(settings) for name, settings in study.datasets.items()},
        "methods": {
            name: {"title": study.methods[name].title, "pretraining": study.methods[name].get("uses") or name}
            for name in study.order
        }
        | {name: {"title": name.replace("_", " "), "pretraining": None} for name in ALONE},
        "cells": cells,
        "summary": summarize(cells),
        "comparisons": compare(cells, study.reference),
    }


def _dataset(settings: ConfigDict) -> dict[str, Any]:
    path, target = settings.path, target_of(settings)
    try:
        manifest = manifest_lib.read(path)
        if target:
            manifest_lib.choose(manifest.targets, [target], what="target", where=f"data set {path}")
        label = manifest.targets[target] if target else manifest.label
        if label.kind == "none":
            raise ConclugenError(f"{path}: the data set has no labels; name a target of it as config.downstream.target")
    except ConclugenError as e:
        return {"path": path, "error": str(e)}
    return {
        "path": path,
        "name": manifest.name,
        "version": manifest.version,
        "sha256": manifest.fingerprint(),
        "target": target,
        "kind": label.kind,
        "classes": list(label.names),
        "num_examples": {split: facts["num_examples"] for split, facts in manifest.splits.items()},
    }


def _cells(run: Run, root: Path) -> list[dict[str, Any]]:
    """Return the cells of a run, one per number of labels."""
    section = run.config.downstream
    numbers = list(run.config.sweep.labels_per_class) or [section.labels_per_class]
    named = {"dataset": run.dataset, "method": run.method, "protocol": run.protocol, "seed": run.seed}
    empty = {"path": run.path, "draw_validation": {}, "draw_scores": {}, "confusion_matrix": None, "error": None}
    path = root / run.path
    error = failure(path)
    try:
        result = None if error else json.loads((path / downstream.RESULT).read_text(encoding="utf-8"))
        found = [_found(result, n, section) for n in numbers] if result is not None else []
    except FileNotFoundError:
        found = []
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
        error, found = f"{path / downstream.RESULT}: damaged ({type(e).__name__}); delete it and repeat the study", []
    if found:
        return [
            {**named, "labels_per_class": n, "status": "done", **empty, **f}
            for n, f in zip(numbers, found, strict=True)
        ]
    status = "failed" if error else "missing"
    return [{**named, "labels_per_class": n, "status": status, **empty, "error": error} for n in numbers]


def _found(result: Mapping[str, Any], number: int, section: ConfigDict) -> dict[str, Any]:
    """Return what a result says of one number of labels."""
    measures = VALUE_MEASURES if result["kind"] == "value" else MEASURES
    alone = {**result, "labels_per_class": section.labels_per_class, "label_draw": section.label_draw}
    own = [fit for fit in result.get("selected", [alone]) if fit["labels_per_class"] == number]
    if not own:
        raise KeyError(number)
    return {
        "draw_scores": {str(fit["label_draw"]): {m: float(fit["test"][m]) for m in measures} for fit in own},
        "draw_validation": {str(fit["label_draw"]): float(fit["validation"][measures[0]]) for fit in own},
        "confusion_matrix": _summed(fit["test"].get("confusion_matrix") for fit in own),
    }


def failure(path: Path) -> str | None:
    """Return why the run in a folder has failed; ``None`` if it has not."""
    try:
        return str(json.loads((path / FAILURE).read_text(encoding="utf-8"))["error"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as e:
        return f"failed for a reason that cannot be read ({type(e).__name__})"


def _summed(matrices: Iterable[Any]) -> list[Any] | None:
    matrices = list(matrices)
    return None if not matrices or matrices[0] is None else np.sum(matrices, axis=0).tolist()


def _merged(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Merge the draws of each data set, method, protocol, number of labels and seed into one cell."""
    merged: dict[tuple, dict[str, Any]] = {}
    for cell in cells:
        key = tuple(cell[k] for k in (*PLACE, "seed"))
        if key not in merged:
            merged[key] = cell
            continue
        one = merged[key]
        one["draw_scores"] |= cell["draw_scores"]
        one["draw_validation"] |= cell["draw_validation"]
        if cell["confusion_matrix"] is not None and one["confusion_matrix"] is not None:
            one["confusion_matrix"] = _summed([one["confusion_matrix"], cell["confusion_matrix"]])
        # A cell is done when all of its draws are, and failed when one of them is.
        if one["status"] == "done" or cell["status"] == "failed":
            one |= {"status": cell["status"], "error": cell["error"]}
    for cell in merged.values():
        validation = list(cell.pop("draw_validation").values())
        cell |= {"scores": {}, "validation": {}, "draws": len(cell["draw_scores"])}
        if cell["status"] == "done":
            draws = list(cell["draw_scores"].values())
            cell["scores"] = {m: float(np.mean([d[m] for d in draws])) for m in draws[0]}
            cell["validation"] = {next(iter(draws[0])): float(np.mean(validation))}
    return list(merged.values())


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Return mean, standard deviation (n - 1) and 95 % interval of Student's t of independent values; ``None`` where n is 1."""
    n, mean = len(values), float(np.mean(values))
    if n == 1:
        return {"mean": mean, "std": None, "interval": None}
    std = float(np.std(values, ddof=1))
    from scipy import stats  # a second of imports, which other commands do without

    half = float(stats.t.ppf(0.975, n - 1)) * std / n**0.5
    return {"mean": mean, "std": std, "interval": [mean - half, mean + half]}


def summarize(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Average the scores of every data set, method, protocol and number of labels over the seeds that are done."""
    return [
        dict(zip(PLACE, place, strict=True))
        | {"n": len(own), "scores": {m: interval([c["scores"][m] for c in own]) for m in own[0]["scores"]}}
        for place, own in _done(cells).items()
    ]


def compare(cells: Sequence[Mapping[str, Any]], reference: str) -> list[dict[str, Any]]:
    """Compare methods on the same seeds and labels.

    Linear evaluation of each method is compared with raw features, with the supervised baseline and with the reference
    method; fine-tuning with the supervised baseline and with the reference method. The difference of a seed is the mean
    over the draws of labels that both sides have.
    """
    done, found = _done(cells), []
    for (dataset, method, protocol, number), own in done.items():
        baselines = {
            "linear_evaluation": [("raw_features",) * 2, ("supervised",) * 2, (reference, protocol)],
            "fine_tuning": [("supervised",) * 2, (reference, protocol)],
        }.get(protocol, [])
        for baseline, other_protocol in baselines:
            other = done.get((dataset, baseline, other_protocol, number), []) if baseline != method else []
            measure = next(iter(own[0]["scores"]))
            differences = _differences(own, other, measure)
            if differences:
                measured = interval(differences)
                place = {"dataset": dataset, "protocol": protocol, "labels_per_class": number, "measure": measure}
                compared = {"method": method, "baseline": baseline, "difference": measured["mean"]}
                found.append({**place, **compared, "interval": measured["interval"], "n": len(differences)})
    return found


def _differences(own: Sequence[Mapping], other: Sequence[Mapping], measure: str) -> list[float]:
    """Return one difference per seed that both have, over the draws of labels that both have."""
    others, differences = {cell["seed"]: cell["draw_scores"] for cell in other}, []
    for seed, a in sorted((cell["seed"], cell["draw_scores"]) for cell in own):
        b = others.get(seed, {})
        shared = [a[draw][measure] - b[draw][measure] for draw in sorted(a.keys() & b.keys())]
        differences += [float(np.mean(shared))] if shared else []
    return differences


def _done(cells: Sequence[Mapping[str, Any]]) -> dict[tuple, list[Mapping[str, Any]]]:
    """Return the cells that are done by place, one per seed."""
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for cell in cells:
        if cell["status"] == "done":
            groups.setdefault(tuple(cell[k] for k in PLACE), []).append(cell)
    return groups

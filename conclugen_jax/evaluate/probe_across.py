"""Probes of a run on other data sets: what the same classifiers score on the rows of classes that both have."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from conclugen_jax.data import shards
from conclugen_jax.evaluate import across
from conclugen_jax.evaluate.weights import Split, represent_splits


@dataclasses.dataclass(frozen=True)
class Across:
    """What the classifiers of a report score on another data set: on the rows of classes that both have.

    ``test_data``: the other data set, and how classes are matched; ``n``, ``left_out``: rows that are scored, and class ->
    rows that are not; ``results``: a ``probe.LabelEfficiency`` each; ``within``: all three of our own test rows.
    """

    test_data: dict[str, Any]
    n: int
    left_out: dict[str, int]
    results: list[Any]
    within: dict[str, Any]


def opened(
    workdir: str | Path, config: ConfigDict, data: str | Path, test_data: Sequence[str | Path], **how: Any
) -> list[tuple[across.Other, Split]]:
    """Open other data sets that are scored, with what a run on ``data`` makes of them; ``how``: see ``represent_splits``."""
    config = config.copy_and_resolve_references()
    config.data.test_paths, config.downstream.target = tuple(map(str, test_data)), ""
    if not test_data:
        return []
    dataset = shards.open_dataset(data, verify=config.data.verify)
    found = across.opened(config, dataset, config.data.modalities)
    options = {"strangers": True, **how}
    return [(x, represent_splits(workdir, [x.stream.split], data=x.stream.dataset.path, **options)[0]) for x in found]


def score(
    fit: Callable[[int, Any, np.ndarray], list[Any]],
    which: int,
    other: across.Other,
    labels: np.ndarray,
    own_labels: np.ndarray,
    results: list[Any],
) -> Across:
    """Score the classifiers on another data set and, where it lacks classes, on our rows of the others again.

    ``fit``: number of what is scored (0: our own test rows), some of its rows and their labels -> results; ``which``: that of
    the other data set; ``results``: of all of our own.
    """
    rows, truth, left_out = other.matching.kept(labels)
    own, own_truth, own_left_out = other.matching.kept(own_labels, own=True)
    within = fit(0, own, own_truth) if own_left_out else results
    within = {"n": len(own), "left_out": own_left_out, "results": within}
    return Across(other.facts(), len(rows), left_out, fit(which, rows, truth), within)


def said(found: Across, trained: str) -> str:
    """Return in words how these scores were made."""
    scored, within = found.test_data["data"]["name"], found.within
    lines = across.said(found.test_data, {"left_out": found.left_out, "within": within}, trained)
    how = f"{within['n']} test rows of {trained} and {found.n} of {scored}, of classes that both have"
    sentences = [f"Classifiers trained on {trained}, scored on {how}", *(line[0].upper() + line[1:] for line in lines)]
    return ". ".join(sentences) + "."

"""One kind of vectors in a study: logistic regressions on draws of few labels, by one rule for all kinds.

The vectors are a checkpoint's, or a baseline's: raw features, their closed forms, an untrained network. Nothing is chosen by a
score, so no validation split takes part.
"""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import bank, baselines, downstream, metrics, probe, splits, task as task_lib, weights


def run(config: ConfigDict, workdir: str | Path, form: str = "") -> dict[str, Any]:
    """Return scores on the test split for each of ``config.sweep.labels_per_class`` and ``label_draws``, written once.

    Args:
      config: its ``downstream.protocol`` says whose vectors: ``linear_evaluation`` (a checkpoint's, smoothed as its run says),
        ``raw_features`` or ``untrained`` (a random network's), both smoothed as ``evaluation`` says, whose ``c_times_dim``
        holds for all.
      workdir: takes ``config.json``, ``data.json`` and ``result.json``; a finished run is not repeated.
      form: closed form of :data:`baselines.FORMS` that is computed from the vectors first; empty: none.

    Raises:
      ConclugenError: labels other than one class per example, training labels of one class alone, and what
        :func:`downstream.once` refuses.
    """
    splits.require_test(config)
    if config.downstream.num_folds:
        why = "the protocol 'probe' takes data sets that are folds; build them with --num_folds and --fold"
        raise ConclugenError(f"config.downstream.num_folds is {config.downstream.num_folds}: {why}")
    return downstream.once(config, workdir, functools.partial(_work, form=form))


def _represented(encoder: weights.Encoder, features: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the vectors of all rows; networks of one shape are compiled once for all runs of a process."""
    if isinstance(encoder.model, weights.RawFeatures):
        return encoder.model.apply(encoder.variables, features, method="represent")
    return weights.represent(encoder.model, encoder.variables, features)


def _work(run: downstream.Run, form: str) -> dict[str, Any]:
    config, label = run.config.copy_and_resolve_references(), run.streams["train"].label
    if label.kind != "single":
        fact = f"{config.data.path}: the labels are of kind {label.kind!r}"
        raise ConclugenError(f"{fact}; the protocol 'probe' needs one class per example, use linear_evaluation")
    grid, section, config.downstream.labels_per_class = config.sweep, run.encoder.evaluation, 0
    rows, everyone = splits.load(config, run.streams)
    parts = ["train", "test", *(other.key for other in run.others)]
    tables = [rows[name].rows(np.arange(rows[name].num_examples)) for name in parts]
    present, labels = ([table[key] for table in tables] for key in ("present", "label"))
    features = [_represented(run.encoder, table["features"]) for table in tables]
    if form:
        of = [{m: x[everyone] for m, x in by_modality[0].items()} for by_modality in (features, present)]
        train, *scored = map(baselines.FORMS[form](*of).of, features, present)
    else:
        train, *scored = (bank.fuse(*x, config.downstream.fusion) for x in zip(features, present, strict=True))
    train, *scored = bank.several(train[everyone], scored, section)
    mean, scale = train.mean(axis=0), train.std(axis=0)
    train, *scored = ((x - mean) / np.where(scale > 1e-6, scale, 1) for x in (train, *scored))
    usable = task_lib.labelled(label, labels[0], run.streams["train"].where, everyone)
    if len(classes := np.unique(labels[0][usable])) < 2:
        fact = f"all labelled examples are {label.names[classes[0]]!r}"
        raise ConclugenError(f"{run.streams['train'].where}: {fact}; a classifier needs examples of two classes")
    known = task_lib.labelled(label, labels[1], run.streams["test"].where)
    ends = np.cumsum([len(x) for x in scored])[:-1]
    selected = []
    for number in grid.labels_per_class:
        for draw in grid.label_draws if number else grid.label_draws[:1]:  # all labels are the same rows at every draw
            chosen = splits.few(label, labels[0], usable, number, draw)
            at = np.searchsorted(everyone, chosen)
            of = train[at], labels[0][chosen], np.delete(train, at, axis=0), np.concatenate(scored)
            how = {"shares": run.encoder.evaluation.self_training, "c_times_dim": config.evaluation.c_times_dim}
            guess, *others = np.split(probe.self_trained(*of, **how), ends)
            facts = {"labels_per_class": number, "label_draw": draw, "seed": config.seed, "num_train_examples": len(at)}
            facts["test"] = metrics.class_scores(labels[1][known], guess[known], label.names)
            if run.others:
                ours = zip(run.others, others, labels[2:], strict=True)
                facts["across"] = [other.scores(theirs, of, guess, labels[1]) for other, theirs, of in ours]
            selected.append(facts)
    lines = task_lib.warnings(label, labels[0][usable], max(grid.labels_per_class))
    return {"warnings": lines, "evaluation": json.loads(section.to_json()), "selected": selected}

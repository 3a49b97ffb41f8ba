"""A grid of linear evaluations for the price of about one: rates x decays x seeds x draws of few labels.

The representations are computed once. The classifiers of a whole grid are then trained together in one compiled
program: those that differ in rate and decay alone share every batch and every dropout mask, as separate runs of one
seed would. Each member is the fit that ``downstream.downstream`` makes with its values.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from conclugen_jax.data import shards
from conclugen_jax.data.shards import RowSource
from conclugen_jax.data.sources import LabelSpec
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import downstream
from conclugen_jax.evaluate import encoder as encoder_lib
from conclugen_jax.evaluate import grid as grid_lib
from conclugen_jax.evaluate import splits as splits_lib
from conclugen_jax.evaluate import task as task_lib
from conclugen_jax.evaluate.task import Task
from conclugen_jax.method import fusion
from conclugen_jax.run import allowed
from conclugen_jax.run import config as config_lib
from conclugen_jax.run import workdir as workdir_lib
from conclugen_jax.system import files, progress, signals
from conclugen_jax.train import parallel


def sweep(config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Train and score the grid of ``config.sweep``; choose rate and decay by the validation split alone.

    Args:
      config: see ``configs/base.py``; a protocol with frozen representations.
      workdir: takes ``config.json``, ``data.json`` and ``result.json``. A finished one is returned.

    Returns:
      Content of ``result.json``: ``selected``, for each number of labels, draw and seed the member of best validation
      measure with all its scores; ``members``, what was tried, with validation measures only (``None``: its loss was not
      finite in any epoch); where everything came from.

    Raises:
      ConclugenError: an impossible configuration, bad data, or losses that are not finite.
      Interrupted: SIGINT or SIGTERM came; repeating the command starts again.
    """
    config_lib.check(config)
    config_lib.check_downstream(config)
    if config.downstream.protocol not in allowed.FROZEN or config.downstream.num_folds:
        raise ConclugenError(
            f"config.downstream.protocol is {config.downstream.protocol!r} with num_folds "
            f"{config.downstream.num_folds}; a sweep needs frozen representations "
            f"({' or '.join(map(repr, allowed.FROZEN))}) and stored splits"
        )
    grid = _grid(config)
    dataset = shards.open_dataset(config.data.path, verify=config.data.verify)
    config = config_lib.with_modalities(config, dataset.manifest.modalities)
    label = splits_lib.label_of(config, dataset)
    encoder = encoder_lib.from_config(config, dataset.manifest)
    streams = splits_lib.open_streams(config, dataset, encoder.modalities, all_variants=False)
    with (
        workdir_lib.claim(workdir) as folder,
        signals.caught() as stop,
        jax.default_matmul_precision(parallel.MATMUL_PRECISION[config.precision]),
    ):
        workdir_lib.settle(folder, config, dataset.manifest)
        if (folder / downstream.RESULT).exists():
            return downstream.finished(folder / downstream.RESULT, encoder)
        rows = splits_lib.load(_with(config, labels_per_class=0), label, streams)
        vectors = {name: _joined(config, encoder, label, name, rows[name]) for name in splits_lib.NAMES}
        for warning in task_lib.warnings(label, vectors["train"].labels[vectors["train"].usable]):
            progress.say(warning)
        selected, members = [], []
        for number in grid["labels_per_class"]:
            chosen, tried = _at(_with(config, labels_per_class=number), grid, label, vectors, stop)
            selected += chosen
            members += tried
        result = downstream.facts(config, dataset.manifest, label, encoder)
        result |= {"grid": grid, "selected": selected, "members": members}
        files.write_json(folder / downstream.RESULT, result)
    return result


def _grid(config: ConfigDict) -> dict[str, list[Any]]:
    section = config.sweep
    return {
        "learning_rates": list(section.learning_rates) or [config.optimizer.learning_rate],
        "weight_decays": list(section.weight_decays) or [config.optimizer.weight_decay],
        "seeds": list(section.seeds) or [config.seed],
        "labels_per_class": list(section.labels_per_class) or [config.downstream.labels_per_class],
        "label_draws": list(section.label_draws) or [config.downstream.label_draw],
    }


def _with(config: ConfigDict, **changes: Any) -> ConfigDict:
    config = config.copy_and_resolve_references()
    config.downstream.update(changes)
    return config


def _joined(
    config: ConfigDict, encoder: encoder_lib.Encoder, label: LabelSpec, name: str, rows: RowSource
) -> grid_lib.Vectors:
    """Join the representations of a split; usable are training rows with features, and other rows with a label."""
    table = encoder_lib.represented(encoder, rows, config, jax.devices()[:1])
    x = fusion.fuse(table.table["features"], table.table["present"], config.downstream.fusion)
    labels = table.table["label"]
    usable = rows.usable if name == "train" else np.flatnonzero(task_lib.known(label, labels))
    return grid_lib.Vectors(x, labels, usable)


def _at(
    config: ConfigDict,
    grid: Mapping[str, Sequence[Any]],
    label: LabelSpec,
    vectors: Mapping[str, grid_lib.Vectors],
    stop: signals.Stop,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Train a grid at one number of labels; return (selected, members)."""
    number, train = config.downstream.labels_per_class, vectors["train"]
    draws = grid["label_draws"] if number else grid["label_draws"][:1]  # all labels are the same rows at every draw
    groups = list(itertools.product(grid["seeds"], draws))
    rows = [splits_lib.few(label, train.labels, train.usable, number, draw) for _, draw in groups]
    trainer = grid_lib.Grid(config, label, len(rows[0]), vectors["train"].x.shape[1])
    members = grid_lib.Members(grid["learning_rates"], grid["weight_decays"], groups, rows)
    title = f"{number or 'all'} labels a class" if label.kind == "single" else "sweep"
    with progress.Counter(f"{np.prod(members.shape)} classifiers, {title}", unit="epochs") as counter:

        def before_epoch(epoch: int) -> None:
            if epoch:  # the first one compiles
                counter(epoch, config.train.num_epochs)
            if stop.signal:
                raise signals.Interrupted(stop.signal)

        fits = trainer.fit(members, vectors, before_epoch)
        counter(config.train.num_epochs, config.train.num_epochs)
    if not np.isfinite(fits.measure).any(axis=(1, 2)).all():
        raise ConclugenError(f"{config.data.path}: {task_lib.not_finite(config)}, or the rates of config.sweep")
    return _selected(trainer, members, fits, vectors)


def _selected(
    trainer: grid_lib.Grid,
    members: grid_lib.Members,
    fits: grid_lib.Fits,
    vectors: Mapping[str, grid_lib.Vectors],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Choose the member of best validation measure in every group and score it; return (selected, members)."""
    train, number, selected, tried = vectors["train"], trainer.config.downstream.labels_per_class, [], []
    for g, (seed, draw) in enumerate(members.groups):
        task = trainer.task(train.labels[members.rows[g]])
        measures = fits.measure[g]
        best = np.argmin(measures) if task.measure == "mae" else np.argmax(measures)  # the first of equals
        chosen = np.unravel_index(best, measures.shape)
        for at in np.ndindex(measures.shape):
            member = {
                "labels_per_class": number,
                "label_draw": draw,
                "seed": seed,
                "learning_rate": members.learning_rates[at[0]],
                "weight_decay": members.weight_decays[at[1]],
                "best_epoch": int(fits.best_epoch[g][at]),
            }
            measure = float(measures[at]) if np.isfinite(measures[at]) else None
            tried.append(member | {f"validation/{task.measure}": measure})
            if at == chosen:
                params = jax.tree.map(lambda x, g=g, at=at: x[g][at], fits.params)
                scores = {name: _scores(task, params, vectors[name]) for name in ("validation", "test")}
                selected.append(member | {"num_train_examples": len(members.rows[g])} | scores)
    return selected, tried


def _scores(task: Task, params: Any, split: grid_lib.Vectors) -> dict[str, Any]:
    logits = np.asarray(task.logits(params, {}, grid_lib.batch(split.x, None)))
    return task.scores(logits[split.usable], split.labels[split.usable])

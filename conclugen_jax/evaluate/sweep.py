"""A grid of linear evaluations for the price of about one: rates x decays x seeds x draws of few labels.

The representations are computed once; the classifiers are trained together (``grid.py``). Each member is the fit that
``downstream.downstream`` makes with its values.
"""

import itertools
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from conclugen_jax.data.shards import RowSource
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import downstream
from conclugen_jax.evaluate import encoder as encoder_lib
from conclugen_jax.evaluate import grid as grid_lib
from conclugen_jax.evaluate import splits as splits_lib
from conclugen_jax.evaluate import task as task_lib
from conclugen_jax.method import fusion
from conclugen_jax.run import allowed
from conclugen_jax.run import config as config_lib
from conclugen_jax.system import progress, signals


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
    return downstream.once(config, workdir, _fit)


def _fit(opened: downstream.Opened, folder: Path, stop: signals.Stop) -> dict[str, Any]:
    """Represent the splits, train and score the grid at each number of labels."""
    config, label, section = opened.config, opened.label, opened.config.sweep
    grid = {
        "learning_rates": list(section.learning_rates) or [config.optimizer.learning_rate],
        "weight_decays": list(section.weight_decays) or [config.optimizer.weight_decay],
        "seeds": list(section.seeds) or [config.seed],
        "labels_per_class": list(section.labels_per_class) or [config.downstream.labels_per_class],
        "label_draws": list(section.label_draws) or [config.downstream.label_draw],
    }
    rows = splits_lib.load(_with(config, labels_per_class=0), label, opened.streams)
    vectors = {name: _joined(opened, name, rows[name]) for name in splits_lib.NAMES}
    train = vectors["train"]
    for warning in task_lib.warnings(label, train.labels[train.usable]):
        progress.say(warning)
    result = {"grid": grid, "selected": [], "members": []}
    for number in grid["labels_per_class"]:
        draws = grid["label_draws"] if number else grid["label_draws"][:1]  # all labels are the same rows at every draw
        groups = list(itertools.product(grid["seeds"], draws))
        drawn = [splits_lib.few(label, train.labels, train.usable, number, draw) for _, draw in groups]
        trainer = grid_lib.Grid(_with(config, labels_per_class=number), label, len(drawn[0]), train.x.shape[1])
        members = grid_lib.Members(grid["learning_rates"], grid["weight_decays"], groups, drawn)
        fits = _trained(trainer, members, vectors, stop)
        for g in range(len(groups)):
            chosen, tried = _selected(trainer, members, fits, vectors, g)
            result["selected"].append(chosen)
            result["members"] += tried
    return result


def _with(config: ConfigDict, **changes: Any) -> ConfigDict:
    config = config.copy_and_resolve_references()
    config.downstream.update(changes)
    return config


def _joined(opened: downstream.Opened, name: str, rows: RowSource) -> grid_lib.Vectors:
    """Join the representations of a split; usable are training rows with features, and other rows with a label."""
    table = encoder_lib.represented(opened.encoder, rows, opened.config, jax.devices()[:1]).table
    x = fusion.fuse(table["features"], table["present"], opened.config.downstream.fusion)
    usable = rows.usable
    if name != "train":
        usable = task_lib.labelled(opened.label, table["label"], opened.streams[name].where)
    return grid_lib.Vectors(x, table["label"], usable)


def _trained(
    trainer: grid_lib.Grid, members: grid_lib.Members, vectors: dict[str, grid_lib.Vectors], stop: signals.Stop
) -> grid_lib.Fits:
    config = trainer.config
    number, num_epochs = config.downstream.labels_per_class, config.train.num_epochs
    title = f"{number or 'all'} labels a class" if trainer.task.label.kind == "single" else "sweep"
    with progress.Counter(f"{np.prod(members.shape)} classifiers, {title}", unit="epochs") as counter:

        def before_epoch(epoch: int) -> None:
            if epoch:  # the first one compiles
                counter(epoch, num_epochs)
            if stop.signal:
                raise signals.Interrupted(stop.signal)

        fits = trainer.fit(members, vectors, before_epoch)
        counter(num_epochs, num_epochs)
    if not np.isfinite(fits.measure).any(axis=(1, 2)).all():
        raise task_lib.not_finite(config, ", or the rates of config.sweep")
    return fits


def _selected(
    trainer: grid_lib.Grid,
    members: grid_lib.Members,
    fits: grid_lib.Fits,
    vectors: dict[str, grid_lib.Vectors],
    g: int,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the member of best validation measure in a group with its scores, and all its members."""
    (seed, draw), rows, measures = members.groups[g], members.rows[g], fits.measure[g]
    task = task_lib.create(trainer.config, trainer.task.label, vectors["train"].labels[rows])
    best = np.argmin(measures) if task.measure == "mae" else np.argmax(measures)  # the first of equals
    tried = [
        {
            "labels_per_class": trainer.config.downstream.labels_per_class,
            "label_draw": draw,
            "seed": seed,
            "learning_rate": members.learning_rates[r],
            "weight_decay": members.weight_decays[w],
            "best_epoch": int(fits.best_epoch[g, r, w]),
            f"validation/{task.measure}": float(measures[r, w]) if np.isfinite(measures[r, w]) else None,
        }
        for r, w in np.ndindex(measures.shape)
    ]
    at = np.unravel_index(best, measures.shape)
    params = jax.tree.map(lambda x: x[g][at], fits.params)
    chosen = {name: x for name, x in tried[best].items() if "/" not in name} | {"num_train_examples": len(rows)}
    for name in ("validation", "test"):
        logits = np.asarray(task.logits(params, {}, grid_lib.batch(vectors[name].x, None)))
        chosen[name] = task.scores(logits, vectors[name].labels, name)
    return chosen, tried

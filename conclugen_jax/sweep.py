"""A grid of linear evaluations for the price of about one: rates x decays x seeds x draws of few labels.

The representations are computed once. The classifiers of a whole grid are then trained together in one compiled
program: those that differ in rate and decay alone share every batch and every dropout mask, as separate runs of one
seed would. Each member is the fit that ``downstream.downstream`` makes with its values.
"""

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from conclugen_jax import config as config_lib
from conclugen_jax import downstream, parallel, progress, signals
from conclugen_jax import encoder as encoder_lib
from conclugen_jax import model as model_lib
from conclugen_jax import optimizer as optimizer_lib
from conclugen_jax import splits as splits_lib
from conclugen_jax import task as task_lib
from conclugen_jax import workdir as workdir_lib
from conclugen_jax.data import batches, shards
from conclugen_jax.data.shards import RowSource
from conclugen_jax.errors import ConclugenError
from conclugen_jax.task import TRAINABLE, Task
from conclugen_jax.train_state import TrainState

JOINED = "joined"


class Vectors(NamedTuple):
    """A split as the classifiers see it: the representations joined, on the device.

    Attributes:
      x: float32 [n, dim].
      labels: [n] or [n, labels], on the host.
      usable: rows that may be trained on or, of the other splits, that have a label.
    """

    x: jax.Array
    labels: np.ndarray
    usable: np.ndarray


@dataclasses.dataclass(frozen=True)
class Fits:
    """What training a grid has left behind; G groups (seed, draw), R rates, W decays.

    Attributes:
      measure: [G, R, W], best validation measure of each member.
      best_epoch: [G, R, W], the epoch it is of, the earliest of equals.
      params: those of that epoch, leaves [G, R, W, ...].
    """

    measure: np.ndarray
    best_epoch: np.ndarray
    params: Any


def sweep(config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Train and score the grid of ``config.sweep``; choose rate and decay by the validation split alone.

    Args:
      config: see ``configs/base.py``; a protocol with frozen representations.
      workdir: takes ``config.json``, ``data.json`` and ``result.json``. A finished one is returned.

    Returns:
      Content of ``result.json``: ``selected``, for each number of labels, draw and seed the member of best validation
      measure with all its scores; ``members``, what was tried, with validation measures only; where everything came from.

    Raises:
      ConclugenError: an impossible configuration or bad data.
      Interrupted: SIGINT or SIGTERM came; repeating the command starts anew.
    """
    config_lib.check(config)
    config_lib.check_downstream(config)
    if "representation/.*" in TRAINABLE[config.downstream.protocol] or config.downstream.num_folds:
        raise ConclugenError(
            f"config.downstream.protocol is {config.downstream.protocol!r} with num_folds "
            f"{config.downstream.num_folds}; a sweep needs frozen representations ('linear_evaluation' or 'raw_features') and "
            "stored splits"
        )
    grid = _grid(config)
    dataset = shards.open_dataset(config.data.path, verify=config.data.verify)
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
        vectors = {name: _joined(config, encoder, label, rows[name]) for name in splits_lib.NAMES}
        selected, members = [], []
        for number in grid["labels_per_class"]:
            chosen, tried = _at(_with(config, labels_per_class=number), grid, label, vectors, stop)
            selected += chosen
            members += tried
        result = downstream.facts(config, dataset.manifest, label, encoder)
        result |= {"grid": grid, "selected": selected, "members": members}
        workdir_lib.write_atomically(folder / downstream.RESULT, json.dumps(result, indent=1) + "\n")
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


def _joined(config: ConfigDict, encoder: encoder_lib.Encoder, label, rows: RowSource) -> Vectors:
    table = encoder_lib.represented(encoder, rows, config, jax.devices()[:1])
    x = model_lib.fuse(table.table["features"], table.table["present"], config.downstream.fusion)
    labels = table.table["label"]
    return Vectors(x, labels, np.intersect1d(rows.usable, np.flatnonzero(task_lib.known(label, labels))))


def _at(
    config: ConfigDict, grid: Mapping[str, Sequence[Any]], label, vectors: Mapping[str, Vectors], stop: signals.Stop
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(selected, members) at one number of labels."""
    number, train = config.downstream.labels_per_class, vectors["train"]
    draws = grid["label_draws"] if number else grid["label_draws"][:1]  # all labels are the same rows at every draw
    groups = list(itertools.product(grid["seeds"], draws))
    rows = [splits_lib.few(label, train.labels, train.usable, number, draw) for _, draw in groups]
    fits = fit(config, grid["learning_rates"], grid["weight_decays"], groups, rows, label, vectors, stop)
    task = _task(config, label, train.labels[rows[0]])
    better = np.argmin if task.measure == "mae" else np.argmax
    selected, members = [], []
    for g, (seed, draw) in enumerate(groups):
        named = {"labels_per_class": number, "label_draw": draw, "seed": seed}
        chosen = np.unravel_index(better(fits.measure[g]), fits.measure[g].shape)  # the first of equals
        for at in np.ndindex(fits.measure[g].shape):
            member = named | {
                "learning_rate": grid["learning_rates"][at[0]],
                "weight_decay": grid["weight_decays"][at[1]],
                "best_epoch": int(fits.best_epoch[g][at]),
            }
            members.append(member | {f"validation/{task.measure}": float(fits.measure[g][at])})
            if at == chosen:
                own = _task(config, label, train.labels[rows[g]])
                params = jax.tree.map(lambda x, g=g, at=at: x[g][at], fits.params)
                selected.append(
                    member
                    | {"num_train_examples": len(rows[g])}
                    | {name: _scores(own, params, vectors[name]) for name in ("validation", "test")}
                )
    return selected, members


def _task(config: ConfigDict, label, labels: np.ndarray) -> Task:
    return task_lib.create(config, label, None, False, labels, None)


def _scores(task: Task, params: Any, split: Vectors) -> dict[str, Any]:
    logits = np.asarray(task.logits(params, {}, _batch(split.x, None)))
    return task.scores(logits[split.usable], split.labels[split.usable])


def _batch(x: jax.Array, labels: Any) -> dict[str, Any]:
    return {"features": {JOINED: x}, "present": {JOINED: jnp.ones(x.shape[0], bool)}, "label": labels}


def fit(
    config: ConfigDict,
    learning_rates: Sequence[float],
    weight_decays: Sequence[float],
    groups: Sequence[tuple[int, int]],
    rows: Sequence[np.ndarray],
    label: Any,
    vectors: Mapping[str, Vectors],
    stop: signals.Stop,
) -> Fits:
    """Train the classifiers of a grid together.

    Args:
      config: of the run, with the number of labels per class that ``rows`` have.
      learning_rates: R of them.
      weight_decays: W of them.
      groups: G pairs (seed, draw of the labels).
      rows: of each group, those trained on; equally many.
      label: what is predicted.
      vectors: ``train`` and ``validation``.
      stop: asked after every epoch.
    """
    train, validation = vectors["train"], vectors["validation"]
    if not validation.usable.size:
        raise ConclugenError(f"{config.data.path}: no example of the validation split has the label; name another")
    config = config.copy_and_resolve_references()
    config.train.batch_size = downstream.fitting_batch(config, len(rows[0]), 1)
    config_lib.check_batches(config, num_examples=len(rows[0]), num_devices=1)
    steps_per_epoch = len(rows[0]) // config.train.batch_size
    grid = (len(groups), len(learning_rates), len(weight_decays))
    task = _task(config, label, train.labels[rows[0]])
    program = _Program(config, task, steps_per_epoch, train.x.shape[1])
    states = [program.fresh_state(seed) for seed, _ in groups]
    weights = np.stack([_task(config, label, train.labels[r]).weights for r in rows])
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *({"p": s.params, "o": s.opt_state} for s in states))
    stacked = jax.tree.map(lambda x: jnp.broadcast_to(x[:, None, None], (*grid, *x.shape[1:])), stacked)
    params, opt_state = stacked["p"], stacked["o"]
    rngs = jnp.stack([s.rng for s in states])
    best, lowest = np.full(grid, np.inf), np.full(grid, np.inf)
    since, epochs, kept = np.zeros(grid, int), np.zeros(grid, int), params
    patience = config.downstream.early_stopping_epochs
    labels = jnp.asarray(train.labels)
    known = validation.x[validation.usable], validation.labels[validation.usable]
    title = f"{config.downstream.labels_per_class or 'all'} labels a class" if label.kind == "single" else "sweep"
    with progress.Counter(f"{np.prod(grid)} classifiers, {title}") as counter:
        for epoch in range(config.train.num_epochs):
            running = (since < patience) | (patience == 0)
            if stop.signal:
                raise signals.Interrupted(stop.signal)
            if not running.any():
                break
            indices = np.stack(
                [
                    batches.batch_indices(
                        usable,
                        seed=seed,
                        epoch=epoch,
                        first_step=0,
                        num_steps=steps_per_epoch,
                        batch_size=config.train.batch_size,
                    )
                    for (seed, _), usable in zip(groups, rows, strict=True)
                ],
                axis=1,
            )
            params, opt_state = program.epoch(
                params,
                opt_state,
                jnp.int32(epoch * steps_per_epoch),
                rngs,
                jnp.asarray(learning_rates, jnp.float32),
                jnp.asarray(weight_decays, jnp.float32),
                weights,
                train.x,
                labels,
                indices,
            )
            logits, loss = jax.tree.map(np.asarray, program.evaluate(params, weights, *known))
            measure = np.array([task.measured(x, known[1]) for x in logits.reshape(-1, *logits.shape[3:])])
            costs = measure.reshape(grid) * (1 if task.measure == "mae" else -1)
            improved = running & (costs < best)
            best, epochs = np.where(improved, costs, best), np.where(improved, epoch, epochs)
            kept = program.keep(improved, params, kept)
            since = np.where(loss < lowest, 0, since + running)
            lowest = np.where(running, np.minimum(lowest, loss), lowest)
            counter(epoch + 1, config.train.num_epochs)
    return Fits(best * (1 if task.measure == "mae" else -1), epochs, kept)


class _Program:
    """The compiled parts of a fit: an epoch of the whole grid, its outputs on a split, and keeping the best."""

    def __init__(self, config: ConfigDict, task: Task, steps_per_epoch: int, dim: int):
        self.task, self._config, self._steps, self._dim = task, config, steps_per_epoch, dim
        self._template = self.fresh_state(config.seed)
        self.epoch = jax.jit(self._epoch, donate_argnums=1)
        self.evaluate = jax.jit(self._evaluate)
        self.keep = jax.jit(_keep, donate_argnums=2)

    def fresh_state(self, seed: int) -> TrainState:
        """The state that a run of this seed starts from."""
        config = self._config.copy_and_resolve_references()
        config.seed = seed
        optimizer, _ = self._optimizer(config.optimizer.learning_rate, config.optimizer.weight_decay)
        return downstream.fresh_state(config, self.task, {JOINED: self._dim}, optimizer)

    def _optimizer(self, learning_rate: Any, weight_decay: Any):
        trainable = TRAINABLE[self._config.downstream.protocol]
        return optimizer_lib.from_config(
            self._config, self._steps, trainable, learning_rate=learning_rate, weight_decay=weight_decay
        )

    def _step(self, rate, decay, weights, params, opt_state, step, rng, batch):
        """One member's step, the very one of a run of its own."""
        optimizer, schedule = self._optimizer(rate, decay)
        state = self._template.replace(params=params, opt_state=opt_state, step=step, rng=rng)
        task = self.task._replace(weights=weights)
        state, _ = downstream.downstream_step(state, batch, task=task, optimizer=optimizer, schedule=schedule)
        return state.params, state.opt_state

    def _epoch(self, params, opt_state, first_step, rngs, rates, decays, weights, x, labels, indices):
        over_decays = jax.vmap(self._step, in_axes=(None, 0, None, 0, 0, None, None, None))
        over_rates = jax.vmap(over_decays, in_axes=(0, None, None, 0, 0, None, None, None))
        over_groups = jax.vmap(over_rates, in_axes=(None, None, 0, 0, 0, None, 0, 0))

        def step(carry, at):
            number, rows = at
            batch = jax.vmap(lambda r: _batch(x[r], labels[r]))(rows)
            return over_groups(rates, decays, weights, *carry, number, rngs, batch), None

        numbers = first_step + jnp.arange(self._steps)
        return jax.lax.scan(step, (params, opt_state), (numbers, indices))[0]

    def _evaluate(self, params, weights, x, labels):
        def one(params, weights):
            logits = self.task.logits(params, {}, _batch(x, None))
            return logits, self.task._replace(weights=weights).loss(logits, labels)

        over_grid = jax.vmap(jax.vmap(one, in_axes=(0, None)), in_axes=(0, None))
        return jax.vmap(over_grid)(params, weights)


def _keep(improved: Any, new: Any, old: Any) -> Any:
    def choose(a, b):
        return jnp.where(improved.reshape(*improved.shape, *[1] * (a.ndim - improved.ndim)), a, b)

    return jax.tree.map(choose, new, old)

"""Many linear classifiers on the same vectors, trained together in one compiled program.

Members that differ in rate and decay alone share every batch and every dropout mask, as separate runs of one seed would.
"""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from conclugen_jax.data import batches
from conclugen_jax.data.sources import LabelSpec
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import classifier
from conclugen_jax.evaluate import task as task_lib
from conclugen_jax.evaluate.task import Task
from conclugen_jax.method.train_state import TrainState
from conclugen_jax.run import config as config_lib
from conclugen_jax.system import progress, signals
from conclugen_jax.train import optimizer as optimizer_lib

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
      measure: [G, R, W], best validation measure of each member; infinite, the worst, where its loss never was finite.
      best_epoch: [G, R, W], the epoch it is of, the earliest of equals.
      params: those of that epoch, leaves [G, R, W, ...].
    """

    measure: np.ndarray
    best_epoch: np.ndarray
    params: Any


def batch(x: jax.Array, labels: Any) -> dict[str, Any]:
    """A batch as a classifier takes it."""
    return {"features": {JOINED: x}, "present": {JOINED: jnp.ones(x.shape[0], bool)}, "label": labels}


def task_of(config: ConfigDict, label: LabelSpec, labels: np.ndarray) -> Task:
    """The task of classifiers on vectors; ``labels``: of the rows trained on."""
    return task_lib.create(config, label, None, False, labels, None)


def fit(
    config: ConfigDict,
    learning_rates: Sequence[float],
    weight_decays: Sequence[float],
    groups: Sequence[tuple[int, int]],
    rows: Sequence[np.ndarray],
    label: Any,
    vectors: Mapping[str, Vectors],
    stop: signals.Stop | None = None,
    *,
    quiet: bool = False,
    programs: dict[Any, Any] | None = None,
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
      stop: asked before every epoch.
      quiet: show no progress.
      programs: compiled ones of earlier calls with the same configuration, label and rows, to be used again.

    Raises:
      ConclugenError: a batch greater than the rows, or no validation example with a label.
      Interrupted: a signal came.
    """
    train, validation = vectors["train"], vectors["validation"]
    if not validation.usable.size:
        raise ConclugenError(f"{config.data.path}: no example of the validation split has the label; name another")
    config = config.copy_and_resolve_references()
    config.train.batch_size = classifier.fitting_batch(config, len(rows[0]), 1)
    config_lib.check_batches(config, num_examples=len(rows[0]), num_devices=1)
    steps_per_epoch = len(rows[0]) // config.train.batch_size
    grid = (len(groups), len(learning_rates), len(weight_decays))
    task = task_of(config, label, train.labels[rows[0]])
    key, programs = (steps_per_epoch, train.x.shape[1]), {} if programs is None else programs
    if key not in programs:
        programs[key] = _Program(config, task, *key)
    program = programs[key]
    params, opt_state, rngs = program.start(groups, grid)
    weights = np.stack([task_of(config, label, train.labels[r]).weights for r in rows])
    best, lowest = np.full(grid, np.inf), np.full(grid, np.inf)
    since, epochs, kept = np.zeros(grid, int), np.zeros(grid, int), params
    patience = config.downstream.early_stopping_epochs
    labels = jnp.asarray(train.labels)
    rates, decays = (jnp.asarray(values, jnp.float32) for values in (learning_rates, weight_decays))
    known = validation.x[validation.usable], validation.labels[validation.usable]
    title = f"{config.downstream.labels_per_class or 'all'} labels a class" if label.kind == "single" else "sweep"
    counting = (
        contextlib.nullcontext() if quiet else progress.Counter(f"{np.prod(grid)} classifiers, {title}", unit="epochs")
    )
    with counting as counter:
        for epoch in range(config.train.num_epochs):
            running = (since < patience) | (patience == 0)
            if stop is not None and stop.signal:
                raise signals.Interrupted(stop.signal)
            if not running.any():
                break
            params, opt_state = program.epoch(
                params,
                opt_state,
                jnp.int32(epoch * steps_per_epoch),
                rngs,
                rates,
                decays,
                weights,
                train.x,
                labels,
                _epoch_indices(groups, rows, epoch, steps_per_epoch, config.train.batch_size),
            )
            logits, loss = jax.tree.map(np.asarray, program.evaluate(params, weights, *known))
            measure = np.array([task.measured(x, known[1]) for x in logits.reshape(-1, *logits.shape[3:])])
            costs = measure.reshape(grid) * (1 if task.measure == "mae" else -1)
            costs = np.where(np.isfinite(loss), costs, np.inf)  # outputs that are no numbers predict nothing
            improved = running & (costs < best)
            best, epochs = np.where(improved, costs, best), np.where(improved, epoch, epochs)
            kept = program.keep(improved, params, kept)
            since = np.where(running & (loss < lowest), 0, since + running)
            lowest = np.where(running, np.minimum(lowest, loss), lowest)
            if counter is not None:
                counter(epoch + 1, config.train.num_epochs)
    return Fits(best * (1 if task.measure == "mae" else -1), epochs, kept)


def _epoch_indices(groups, rows, epoch: int, num_steps: int, batch_size: int) -> np.ndarray:
    """The batches of each group's own run: int32 [steps, G, batch]."""
    wanted = {"epoch": epoch, "first_step": 0, "num_steps": num_steps, "batch_size": batch_size}
    each = [batches.batch_indices(own, seed=seed, **wanted) for (seed, _), own in zip(groups, rows, strict=True)]
    return np.stack(each, axis=1)


class _Program:
    """The compiled parts of a fit: an epoch of the whole grid, its outputs on a split, and keeping the best."""

    def __init__(self, config: ConfigDict, task: Task, steps_per_epoch: int, dim: int):
        self.task, self._config, self._steps, self._dim = task, config, steps_per_epoch, dim
        self._template = self.fresh_state(config.seed)
        self.epoch = jax.jit(self._epoch, donate_argnums=1)
        self.evaluate = jax.jit(self._evaluate)
        self.keep = jax.jit(_keep, donate_argnums=2)

    def start(self, groups: Sequence[tuple[int, int]], grid: tuple[int, int, int]) -> tuple[Any, Any, jax.Array]:
        """(params, opt_state) with leaves [G, R, W, ...], and the random keys [G]."""
        states = [self.fresh_state(seed) for seed, _ in groups]
        stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *((s.params, s.opt_state) for s in states))
        spread = jax.tree.map(lambda x: jnp.broadcast_to(x[:, None, None], (*grid, *x.shape[1:])), stacked)
        return *spread, jnp.stack([s.rng for s in states])

    def fresh_state(self, seed: int) -> TrainState:
        """The state that a run of this seed starts from."""
        config = self._config.copy_and_resolve_references()
        config.seed = seed
        optimizer, _ = self._optimizer(config.optimizer.learning_rate, config.optimizer.weight_decay)
        return classifier.fresh_state(config, self.task, {JOINED: self._dim}, optimizer)

    def _optimizer(self, learning_rate: Any, weight_decay: Any):
        return optimizer_lib.from_config(
            self._config, self._steps, (task_lib.CLASSIFIER,), learning_rate=learning_rate, weight_decay=weight_decay
        )

    def _step(self, rate, decay, weights, params, opt_state, step, rng, batch):
        """One member's step, the very one of a run of its own."""
        optimizer, schedule = self._optimizer(rate, decay)
        state = self._template.replace(params=params, opt_state=opt_state, step=step, rng=rng)
        task = self.task._replace(weights=weights)
        state, _ = classifier.downstream_step(state, batch, task=task, optimizer=optimizer, schedule=schedule)
        return state.params, state.opt_state

    def _epoch(self, params, opt_state, first_step, rngs, rates, decays, weights, x, labels, indices):
        over_decays = jax.vmap(self._step, in_axes=(None, 0, None, 0, 0, None, None, None))
        over_rates = jax.vmap(over_decays, in_axes=(0, None, None, 0, 0, None, None, None))
        over_groups = jax.vmap(over_rates, in_axes=(None, None, 0, 0, 0, None, 0, 0))

        def step(carry, at):
            number, rows = at
            taken = jax.vmap(lambda r: batch(x[r], labels[r]))(rows)
            return over_groups(rates, decays, weights, *carry, number, rngs, taken), None

        numbers = first_step + jnp.arange(self._steps)
        return jax.lax.scan(step, (params, opt_state), (numbers, indices))[0]

    def _evaluate(self, params, weights, x, labels):
        def one(params, weights):
            logits = self.task.logits(params, {}, batch(x, None))
            return logits, self.task._replace(weights=weights).loss(logits, labels)

        over_grid = jax.vmap(jax.vmap(one, in_axes=(0, None)), in_axes=(0, None))
        return jax.vmap(over_grid)(params, weights)


def _keep(improved: Any, new: Any, old: Any) -> Any:
    def choose(a, b):
        return jnp.where(improved.reshape(*improved.shape, *[1] * (a.ndim - improved.ndim)), a, b)

    return jax.tree.map(choose, new, old)

"""Many linear classifiers on the same vectors, trained together in one compiled program.

Members that differ in rate and decay alone share every batch and every dropout mask, as separate runs of one seed would.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from conclugen_jax.data import batches
from conclugen_jax.data.sources import LabelSpec
from conclugen_jax.evaluate import classifier
from conclugen_jax.evaluate import task as task_lib
from conclugen_jax.method.train_state import TrainState
from conclugen_jax.train import optimizer as optimizer_lib

JOINED = "joined"


class Vectors(NamedTuple):
    """A split as the classifiers see it: the representations joined, on the device.

    Attributes:
      x: float32 [n, dim].
      labels: [n] or [n, labels], on the host.
      usable: rows that may be trained on or, of the other splits, that have a label; at least one.
    """

    x: jax.Array
    labels: np.ndarray
    usable: np.ndarray


class Members(NamedTuple):
    """The classifiers of a grid: R rates with W decays in G groups, pairs (seed, draw of the labels).

    ``rows``: of each group, those trained on; equally many.
    """

    learning_rates: Sequence[float]
    weight_decays: Sequence[float]
    groups: Sequence[tuple[int, int]]
    rows: Sequence[np.ndarray]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(G, R, W)."""
        return len(self.groups), len(self.learning_rates), len(self.weight_decays)


class Fits(NamedTuple):
    """What training a grid has left behind.

    Attributes:
      measure: [G, R, W], best validation measure of each member; infinite, the worst, where its loss never was finite.
      best_epoch: [G, R, W], the epoch it is of, the earliest of equals.
      params: those of that epoch, leaves [G, R, W, ...].
    """

    measure: np.ndarray
    best_epoch: np.ndarray
    params: Any


def batch(x: jax.Array, labels: Any) -> dict[str, Any]:
    """Return a batch as a classifier takes it."""
    return {"features": {JOINED: x}, "present": {JOINED: jnp.ones(x.shape[0], bool)}, "label": labels}


class Grid:
    """Trains grids of one configuration, label, and number and size of training vectors; they share one compilation."""

    def __init__(self, config: ConfigDict, label: LabelSpec, num_rows: int, dim: int):
        self.config = classifier.with_fitting_batch(config, num_rows, 1)
        self.task, self._dim = task_lib.create(config, label), dim
        self._steps = num_rows // self.config.train.batch_size
        self._optimizer = functools.partial(optimizer_lib.from_config, self.config, self._steps, (task_lib.CLASSIFIER,))
        self._template = self._fresh_state(config.seed)
        self._epoch = jax.jit(self._run_epoch, donate_argnums=1)
        self._evaluate = jax.jit(self._outputs)
        self._keep = jax.jit(_keep, donate_argnums=2)

    def fit(
        self, members: Members, vectors: Mapping[str, Vectors], before_epoch: Callable[[int], None] = lambda epoch: None
    ) -> Fits:
        """Train the classifiers of a grid together.

        Args:
          members: of the grid.
          vectors: ``train`` and ``validation``.
          before_epoch: called with the number of every epoch before it; what it raises ends the training.
        """
        train, validation, label = vectors["train"], vectors["validation"], self.task.label
        rates, decays = (jnp.asarray(x, jnp.float32) for x in (members.learning_rates, members.weight_decays))
        weights = np.stack([task_lib.create(self.config, label, train.labels[rows]).weights for rows in members.rows])
        labels = jnp.asarray(train.labels)
        truth = validation.labels[validation.usable]
        known = validation.x[validation.usable], jnp.asarray(truth)
        params, opt_state, rngs = self._start(members)
        patience = self.config.downstream.early_stopping_epochs
        kept, best = params, classifier.BestEpochs(self.task.measure, patience, members.shape)
        for epoch in range(self.config.train.num_epochs):
            if not best.running.any():
                break
            before_epoch(epoch)
            indices = self._indices(members, epoch)
            first = jnp.int32(epoch * self._steps)
            params, opt_state = self._epoch(
                params, opt_state, first, rngs, rates, decays, weights, train.x, labels, indices
            )
            logits, losses = (np.asarray(x) for x in self._evaluate(params, weights, *known))
            each = logits.reshape(-1, *logits.shape[3:])
            scores = [task_lib.measured(label, truth, self.task.predictions(x)) for x in each]
            kept = self._keep(best.improved(epoch, np.reshape(scores, members.shape), losses), params, kept)
        return Fits(best.measure, best.epoch, kept)

    def _start(self, members: Members) -> tuple[Any, Any, jax.Array]:
        """Return (params, opt_state) with leaves [G, R, W, ...], and the random keys [G]."""
        states = [self._fresh_state(seed) for seed, _ in members.groups]
        stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *((s.params, s.opt_state) for s in states))
        spread = jax.tree.map(lambda x: jnp.broadcast_to(x[:, None, None], (*members.shape, *x.shape[1:])), stacked)
        return *spread, jnp.stack([s.rng for s in states])

    def _fresh_state(self, seed: int) -> TrainState:
        """Return the state that a run of this seed starts from."""
        config = self.config.copy_and_resolve_references()
        config.seed = seed
        return classifier.fresh_state(config, self.task, {JOINED: self._dim}, self._optimizer()[0])

    def _indices(self, members: Members, epoch: int) -> np.ndarray:
        """Return the batches of each group's own run: int32 [steps, G, batch]."""
        wanted = {"epoch": epoch, "first_step": 0, "num_steps": self._steps, "batch_size": self.config.train.batch_size}
        groups = zip(members.groups, members.rows, strict=True)
        return np.stack([batches.batch_indices(rows, seed=seed, **wanted) for (seed, _), rows in groups], axis=1)

    def _step(self, rate, decay, weights, params, opt_state, step, rng, batch):
        """Take one member's step, the same as in a run of its own."""
        optimizer, schedule = self._optimizer(learning_rate=rate, weight_decay=decay)
        state = self._template.replace(params=params, opt_state=opt_state, step=step, rng=rng)
        task = self.task._replace(weights=weights)
        state, _ = classifier.downstream_step(state, batch, task=task, optimizer=optimizer, schedule=schedule)
        return state.params, state.opt_state

    def _run_epoch(self, params, opt_state, first_step, rngs, rates, decays, weights, x, labels, indices):
        over_decays = jax.vmap(self._step, in_axes=(None, 0, None, 0, 0, None, None, None))
        over_rates = jax.vmap(over_decays, in_axes=(0, None, None, 0, 0, None, None, None))
        over_groups = jax.vmap(over_rates, in_axes=(None, None, 0, 0, 0, None, 0, 0))

        def step(carry, at):
            number, rows = at
            taken = jax.vmap(lambda r: batch(x[r], labels[r]))(rows)
            return over_groups(rates, decays, weights, *carry, number, rngs, taken), None

        numbers = first_step + jnp.arange(self._steps)
        return jax.lax.scan(step, (params, opt_state), (numbers, indices))[0]

    def _outputs(self, params, weights, x, labels):
        """Return logits [G, R, W, n, num_outputs] and losses [G, R, W] of the members."""

        def one(params, weights):
            logits = self.task.logits(params, {}, batch(x, None))
            return logits, self.task._replace(weights=weights).loss(logits, labels)

        over_grid = jax.vmap(jax.vmap(one, in_axes=(0, None)), in_axes=(0, None))
        return jax.vmap(over_grid)(params, weights)


def _keep(improved: Any, new: Any, old: Any) -> Any:
    def choose(a, b):
        return jnp.where(improved.reshape(*improved.shape, *[1] * (a.ndim - improved.ndim)), a, b)

    return jax.tree.map(choose, new, old)

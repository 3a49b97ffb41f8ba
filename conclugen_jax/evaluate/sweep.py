"""A grid of linear evaluations for the price of about one: rates x decays x seeds x draws of few labels.

The representations are computed once. The classifiers of a grid are then trained together in one compiled program: those
that differ in rate and decay alone share every batch and every dropout mask, as separate runs of one seed would. Each
member is the fit that ``downstream.downstream`` makes with its values.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from conclugen_jax.data import batches
from conclugen_jax.data.sources import LabelSpec
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import across, bank, best_epochs, downstream, metrics, splits, task as task_lib
from conclugen_jax.method import layers
from conclugen_jax.method.train_state import TrainState
from conclugen_jax.runs import config as config_lib, configuration_files
from conclugen_jax.system import processes, progress
from conclugen_jax.train import optimizer as optimizer_lib, parallel

JOINED = bank.JOINED


class Vectors(NamedTuple):
    """A split as the classifiers see it."""

    x: jax.Array  # float32 [n, dim], the representations joined
    labels: np.ndarray  # [n] or [n, labels], on the host
    usable: np.ndarray  # rows, at least one, that may be trained on or, of the other splits, that have a label


class Members(NamedTuple):
    """The classifiers of a grid: P pairs of rate and decay in G groups."""

    pairs: Sequence[tuple[float, float]]
    groups: Sequence[tuple[int, int]]  # (seed, draw of the labels)
    rows: Sequence[np.ndarray]  # those trained on, of each group; equally many

    @property
    def shape(self) -> tuple[int, int]:
        """(G, P)."""
        return len(self.groups), len(self.pairs)


def _batch(x: jax.Array, labels: Any = None) -> dict[str, Any]:
    return {"features": {JOINED: x}, "present": {JOINED: jnp.ones(x.shape[0], bool)}, "label": labels}


class Grid:
    """Trains a grid on vectors of some size, any number of times by one compilation; the devices share its members.

    ``devices``: those of other processes too, which must make the same calls; ``None``: one device of this process.
    """

    def __init__(
        self,
        config: ConfigDict,
        label: LabelSpec,
        members: Members,
        dim: int,
        devices: Sequence[jax.Device] | None = None,
    ):
        self.members, self._dim, num_rows = members, dim, len(members.rows[0])
        self.config = downstream.with_fitting_batch(config, num_rows, 1)
        self.task, self._steps = task_lib.create(config, label), num_rows // self.config.train.batch_size
        made = functools.partial(optimizer_lib.from_config, self.config, self._steps)
        self._optimizer = functools.partial(made, trainable=(task_lib.CLASSIFIER,))
        self._keep = jax.jit(_keep, donate_argnums=2)
        self._share(list(devices or jax.local_devices()[:1]))

    def _share(self, devices: Sequence[jax.Device]) -> None:
        """Give each device as many groups or as many pairs, whichever is less work; some twice where these do not divide."""
        shape, count = self.members.shape, len(devices)
        filled = [n + -n % count for n in shape]
        self._devices, self._axis = devices, int(shape[0] * filled[1] < filled[0] * shape[1])
        most = [filled[i] if i == self._axis else n for i, n in enumerate(shape)]
        self._at = [np.minimum(np.arange(m), n - 1) for m, n in zip(most, shape, strict=True)]
        whole, own = parallel.along(None), parallel.along(self._axis)
        of_group, of_pair = (parallel.along(0 if self._axis == i else None) for i in (0, 1))
        batches_of = parallel.along(None if self._axis else 1)
        state = TrainState(*[whole] * len(dataclasses.fields(TrainState)))
        state = state.replace(params=own, opt_state=own, rng=of_group)
        inputs = state, batches_of, of_pair, of_group, whole, whole
        self._epoch = parallel.in_parts(self._run_epoch, devices, inputs, state, donate_argnums=0)
        self._evaluate = parallel.in_parts(self._outputs, devices, (own, of_group, whole, whole), own)

    def fit(self, vectors: Mapping[str, Vectors], report: Callable = lambda *_: None):
        """Train on the vectors ``train``; return the best epochs by ``validation`` and their parameters, leaves [G, P, ...].

        ``report`` is called with the number of epochs that are done, and of all.
        """
        members, label = self.members, self.task.label
        (x, labels, _), (held_out, truth, known) = vectors["train"], vectors["validation"]
        truth, held_out = truth[known], held_out[known]
        on_devices = parallel.replicate((x, labels, held_out, truth), self._devices)
        pairs = np.asarray(members.pairs, np.float32)[self._at[1]]
        weights = np.stack([task_lib.create(self.config, label, labels[rows]).weights for rows in members.rows])
        weights, (groups, of_pairs) = weights[self._at[0]], members.shape
        state, patience = self._start(), self.config.downstream.early_stopping_epochs
        # A copy: the first epoch takes the state's memory.
        kept = jax.tree.map(jnp.copy, state.params)
        best = best_epochs.BestEpochs(self.task.measure, patience, members.shape)
        for epoch in range(num_epochs := self.config.train.num_epochs):
            if not best.running.any():
                break
            state = self._epoch(state, self._indices(epoch), pairs, weights, *on_devices[:2])
            found = parallel.on_host(self._evaluate(state.params, weights, *on_devices[2:]))
            logits, losses = (x[:groups, :of_pairs] for x in found)
            scores = [task_lib.measured(label, truth, self.task.predictions(x)) for group in logits for x in group]
            scores = processes.of_main(np.reshape(scores, members.shape))  # by which all stop after the same epoch
            improved = best.improved(epoch, scores, losses)
            kept = self._keep(improved[np.ix_(*self._at)], state.params, kept)
            report(epoch + 1, num_epochs)
        return best, jax.tree.map(lambda x: x[:groups, :of_pairs], parallel.on_host(kept))

    def _start(self) -> TrainState:
        """Return the state that runs of the groups' seeds start from: what is trained as [G, P, ...], random keys [G]."""
        network, (of_group, of_pair) = (self.task, {JOINED: self._dim}, self._optimizer()[0]), self._at
        states = [downstream.fresh_state(seed, *network) for seed, _ in self.members.groups]
        states = [states[i] for i in of_group]
        trained = jax.tree.map(lambda *xs: np.stack(xs), *((s.params, s.opt_state) for s in states))
        every = jax.tree.map(lambda x: np.repeat(x[:, None], len(of_pair), axis=1), trained)
        params, opt_state = parallel.spread(every, self._devices, self._axis)
        shared = states[0].replace(params=None, opt_state=None, rng=jnp.stack([s.rng for s in states]))
        return parallel.replicate(shared, self._devices).replace(params=params, opt_state=opt_state)

    def _indices(self, epoch: int) -> np.ndarray:
        """Return the batches of each group's own run: int32 [steps, G, batch], of some groups twice."""
        wanted = {"epoch": epoch, "first_step": 0, "num_steps": self._steps, "batch_size": self.config.train.batch_size}
        groups = zip(self.members.groups, self.members.rows, strict=True)
        found = [batches.batch_indices(rows, seed=seed, **wanted) for (seed, _), rows in groups]
        return np.stack(found, axis=1)[:, self._at[0]]

    def _step(self, state, pair, weights, batch):
        """Take one member's step, the same as in a run of its own."""
        optimizer, schedule = self._optimizer(learning_rate=pair[0], weight_decay=pair[1])
        task = self.task._replace(weights=weights)
        return downstream.downstream_step(state, batch, task=task, optimizer=optimizer, schedule=schedule)[0]

    def _run_epoch(self, state, indices, pairs, weights, x, labels):
        own = jax.tree.map(lambda _: None, state).replace(params=0, opt_state=0)
        groups = own.replace(rng=0)
        over_pairs = jax.vmap(self._step, in_axes=(own, 0, None, None), out_axes=own)
        over_groups = jax.vmap(over_pairs, in_axes=(groups, None, 0, 0), out_axes=groups)

        def step(state, rows):
            return over_groups(state, pairs, weights, jax.vmap(lambda r: _batch(x[r], labels[r]))(rows)), None

        return jax.lax.scan(step, state, indices)[0]

    def _outputs(self, params, weights, x, labels):
        """Return logits [G, P, n, num_outputs] and losses [G, P] of the members."""

        def one(params, weights):
            logits = self.task.logits(params, {}, _batch(x))
            return logits, self.task._replace(weights=weights).loss(logits, labels)

        return jax.vmap(jax.vmap(one, in_axes=(0, None)))(params, weights)


def _keep(improved: Any, new: Any, old: Any) -> Any:
    shape = improved.shape
    return jax.tree.map(lambda a, b: jnp.where(improved.reshape(*shape, *[1] * (a.ndim - len(shape))), a, b), new, old)


def sweep(config: ConfigDict, workdir: str | Path, *, devices: Sequence[jax.Device] | None = None) -> dict[str, Any]:
    """Train and score the grid of ``config.sweep``; choose rate and decay by the validation split alone.

    ``config``: see ``configs/base.py``; a protocol with frozen representations. ``workdir`` takes ``config.json``,
    ``data.json`` and ``result.json``; a finished one is returned. Where folds are asked for, rate and decay are chosen in each.
    ``devices``: as of ``downstream.downstream``; they share the rows and then the members.

    Returns the content of ``result.json``: ``selected``, for each number of labels, draw and seed the member of best
    validation measure with all its scores; ``members``, what was tried, with validation measures only (``None``: its loss
    was not finite in any epoch); ``warnings``; where everything came from. Of all folds: means of the scores of the selected
    members, beside those of each fold, whose rates, decays and best epochs are lists.

    Raises:
      ConclugenError: an impossible configuration, bad data, or losses that are not finite.
      Interrupted: SIGINT or SIGTERM came; repeating the command starts again.
    """
    splits.require_test(config)
    section = config.downstream
    if section.protocol not in config_lib.FROZEN:
        wanted = f"a sweep needs frozen representations ({' or '.join(map(repr, config_lib.FROZEN))})"
        raise ConclugenError(f"config.downstream.protocol is {section.protocol!r}; {wanted}")
    work = functools.partial(_run, devices=list(devices or jax.devices()))
    result = downstream.over_folds(config, workdir, work, _averaged)
    matrices = [one["test"]["confusion_matrix"] for one in result["selected"] if "confusion_matrix" in one["test"]]
    for line in result.get("warnings", []) + metrics.remarks(matrices, result["classes"]):
        progress.say(line)
    return result


def _averaged(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the results of all folds have in common, and the members of each."""
    selected = []
    for folds in zip(*(result["selected"] for result in results), strict=True):
        shared = {key: folds[0][key] for key in ("labels_per_class", "label_draw", "seed")}
        chosen = {key: [one[key] for one in folds] for key in ("learning_rate", "weight_decay", "best_epoch")}
        selected.append(shared | chosen | downstream.averaged(folds))
    members = [{"fold": fold, **member} for fold, result in enumerate(results) for member in result["members"]]
    return {"grid": results[0]["grid"], "selected": selected, "members": members}


def _run(run: downstream.Run, devices: Sequence[jax.Device]) -> dict[str, Any]:
    """Represent the splits, train and score the grid at each number of labels."""
    config, label = run.config.copy_and_resolve_references(), run.streams["train"].label
    flat = dict(configuration_files.flatten(config))
    grid = {key: list(values) or [flat[config_lib.LISTS[f"sweep.{key}"]]] for key, values in config.sweep.items()}
    config.downstream.labels_per_class = 0
    rows_of, everyone = splits.load(config, run.streams)
    tables = {name: downstream.represented(run.encoder, x, config, devices) for name, x in rows_of.items()}
    if run.encoder.evaluation.smoothing_neighbours:
        tables = bank.joined(tables, everyone, run.encoder.evaluation, config.downstream.fusion)
    vectors = {}
    for name, rows in tables.items():
        table = rows.table
        x = layers.fuse(table["features"], table["present"], config.downstream.fusion)
        among = rows.usable if name == "train" else None
        usable = task_lib.labelled(label, table["label"], run.streams[name].where, among)
        vectors[name] = Vectors(x, table["label"], usable)
    x, labels, usable = vectors["train"]
    lines = splits.warnings(config, label, labels)
    lines += task_lib.warnings(label, labels[usable], max(grid["labels_per_class"]))
    pairs = list(itertools.product(grid["learning_rates"], grid["weight_decays"]))
    result = {"grid": grid, "warnings": lines, "selected": [], "members": []}
    for number in grid["labels_per_class"]:
        draws = grid["label_draws"] if number else grid["label_draws"][:1]  # all labels are the same rows at every draw
        groups = list(itertools.product(grid["seeds"], draws))
        rows = [splits.few(label, labels, usable, number, draw) for _, draw in groups]
        trainer = Grid(config, label, Members(pairs, groups, rows), x.shape[1], devices)
        title = f"{number or 'all'} labels a class" if label.kind == "single" else "sweep"
        counted = f"{np.prod(trainer.members.shape)} classifiers, {title}"
        with progress.Counter(counted, unit="epochs") as counter:
            best, params = trainer.fit(vectors, counter)
        if not np.isfinite(best.measure).any(axis=1).all():
            raise task_lib.not_finite(trainer.config, ", or the rates of config.sweep")
        for g in range(len(groups)):
            own = jax.tree.map(lambda x, g=g: x[g], params)
            chosen, tried = _selected(trainer, best, own, vectors, g, run.others)
            result["selected"].append({"labels_per_class": number, **chosen})
            result["members"] += [{"labels_per_class": number, **member} for member in tried]
    return result


def _selected(
    trainer: Grid,
    best: best_epochs.BestEpochs,
    params: Any,
    vectors: Mapping[str, Vectors],
    g: int,
    others: Sequence[across.Other],
):
    """Return the member of best validation measure in a group with its scores, and all its members."""
    members = trainer.members
    (seed, draw), rows = members.groups[g], members.rows[g]
    task = task_lib.create(trainer.config, trainer.task.label, vectors["train"].labels[rows])
    tried = [
        {
            "label_draw": draw,
            "seed": seed,
            "learning_rate": rate,
            "weight_decay": decay,
            "best_epoch": int(epoch),
            f"validation/{task.measure}": float(measure) if np.isfinite(measure) else None,
        }
        for (rate, decay), epoch, measure in zip(members.pairs, best.epoch[g], best.measure[g], strict=True)
    ]
    first = best.cost[g].argmin()  # of equals
    params = jax.tree.map(lambda x: x[first], params)
    chosen = {name: x for name, x in tried[first].items() if "/" not in name} | {"num_train_examples": len(rows)}

    def outputs(name: str) -> tuple[np.ndarray, np.ndarray]:
        return np.asarray(task.logits(params, {}, _batch(vectors[name].x))), vectors[name].labels

    for name in ("validation", "test"):
        chosen[name] = task.scores(*outputs(name), name)
    return chosen | across.scored(others, task, outputs), tried

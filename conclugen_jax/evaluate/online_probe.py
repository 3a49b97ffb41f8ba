"""Probes of the representations while pretraining: nearest neighbours, linear classifiers, agreement of the clusters.

Nothing flows back: a probe reads a copy of the parameters, and its labels, random numbers and gradients never reach the
pretrained network. What it finds is a line in ``probes.jsonl``, with the protocol it was found by.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from conclugen_jax.data import batches, shards
from conclugen_jax.data.persons import Persons
from conclugen_jax.data.sources import LabelSpec
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import sweep, task as task_lib, weights
from conclugen_jax.method import clustering, layers, model as model_lib, neighbours
from conclugen_jax.method.train_state import TrainState
from conclugen_jax.train import feed

ROWS = 512  # examples at a time


class OnlineProbe:
    """Probes the vectors of ``config.evaluation.vectors``, not smoothed, on the labelled data of ``config.online_probe``.

    Bank and training rows are those of the training split, queries those of the validation split.
    """

    def __init__(self, config: ConfigDict, model: model_lib.ConCluGen, persons: Persons | None = None):
        section, model = config.online_probe, model.clone(axis_name=None)
        path = section.path or config.data.path
        dataset = shards.open_dataset(path, verify=config.data.verify)
        self._label: LabelSpec = dataset.manifest.label
        if self._label.kind == "none":
            way_out = "name one that has as config.online_probe.path or set config.online_probe.every_epochs=0"
            raise ConclugenError(f"{path}: the data set has no labels; {way_out}")
        weights.check_features(dataset.manifest, model.feature_dims, f"{path} (config.online_probe.path)", "the run")
        self._tables, self._known = {}, {}
        for name in ("train", "validation"):
            stream = shards.ShardStream(dataset, config.data[f"{name}_split"], list(model.feature_dims))
            if persons:
                persons.attach(stream)
            rows = batches.load(stream, tier="host")
            self._tables[name], where = rows.table, f"{dataset.path}, {name} split"
            self._known[name] = task_lib.labelled(self._label, rows.table["label"], where, rows.usable)
        num_rows = len(self._known["train"])
        self._neighbours = min(section.neighbours, num_rows)
        self._model, self._every, self._last = model, section.every_epochs, config.train.num_epochs
        # Compiled once: each compilation would keep a megabyte for as long as the process lives.
        self._forward = jax.jit(functools.partial(_forward, model))
        self._nearest_cluster = jax.jit(functools.partial(clustering.nearest, metric=config.clustering.metric))
        config = config.copy_and_resolve_references()  # as the linear classifiers read it
        config.train.num_epochs = section.num_epochs
        config.downstream.early_stopping_epochs = config.schedule.warmup_epochs = 0
        pairs = [(rate, config.optimizer.weight_decay) for rate in section.learning_rates]
        members = sweep.Members(pairs, [(config.seed, 0)], [self._known["train"]])
        self._linear = sweep.Grid(config, self._label, members, sum(model.vector_dims.values()))
        self._cost: tuple[int, float] | None = None
        self.protocol = (
            f"{dataset.manifest.name} {dataset.manifest.version}: {num_rows} labelled training examples, "
            f"scored on {len(self._known['validation'])} of the validation split; {self._neighbours} nearest neighbours by "
            f"cosine of the concatenated vectors ({model.vectors}), each one vote; linear: best of rates "
            f"{', '.join(f'{rate:g}' for rate in section.learning_rates)} by that split, "
            f"{section.num_epochs} epochs at most"
        )

    def is_due(self, dispatch: feed.Dispatch) -> bool:
        """Return whether a probe follows a dispatch: every so many epochs and at the run's end."""
        done = dispatch.epoch + 1
        return dispatch.ends_epoch and (done % self._every == 0 or done == self._last)

    def cost(self, dispatch: feed.Dispatch) -> float | None:
        """Return the cost that the probe after a dispatch gives the checkpoint, lower is better; ``None`` without a probe."""
        return self._cost[1] if self._cost is not None and self._cost[0] == dispatch.end_step else None

    def __call__(self, state: TrainState, step: int, epoch: int) -> dict[str, Any]:
        """Probe a state; return a line for the log.

        It has ``knn/...`` and ``linear/...`` (accuracy, or mae of numbers), and with clusters ``clustering/nmi`` and
        ``cluster_sizes`` of the validation split.
        """
        # A copy: the next dispatch takes the state's memory.
        forward = functools.partial(self._forward, jax.tree.map(lambda x: np.array(x, copy=True), state.variables()))
        vectors, known = {}, []
        for name, rows in self._known.items():
            table = self._tables[name]
            found = weights.in_batches(forward, {key: table[key] for key in ("features", "present")}, ROWS)
            vectors[name] = sweep.Vectors(jnp.asarray(found["x"]), table["label"], rows)
            known += [found["x"][rows], table["label"][rows]]
        bank, labels, queries, truth = known
        guess, measure = knn(bank, labels, queries, self._label, k=self._neighbours), self._linear.task.measure
        record = {"step": step, "epoch": epoch, f"knn/{measure}": task_lib.measured(self._label, truth, guess)}
        best = self._linear.fit(vectors)[0]
        if np.isfinite(best.cost).any():  # else no classifier had a finite loss in any epoch
            record[f"linear/{measure}"] = float(best.measure.flat[best.cost.argmin()])
            self._cost = step, float(best.cost.min())
        centroids = np.asarray(state.centroids)
        if "clustering" in self._model.heads and centroids.any():
            fused = jnp.asarray(found["fused"][rows])
            clusters = np.asarray(self._nearest_cluster(fused, jnp.asarray(centroids)))
            record["cluster_sizes"] = np.bincount(clusters, minlength=len(centroids)).tolist()
            if self._label.kind == "single":
                from sklearn.metrics import normalized_mutual_info_score  # a second, for runs with probes alone

                record["clustering/nmi"] = float(normalized_mutual_info_score(truth, clusters))
        return record | {"protocol": self.protocol}


def _forward(model: model_lib.ConCluGen, variables: Any, batch: Any) -> dict[str, jax.Array]:
    features, present = batch["features"], batch["present"]
    handed_on = model.apply(variables, features, method="represent")
    vectors = {"x": layers.fuse(handed_on, present, "concat").astype(jnp.float32)}
    if "clustering" in model.heads:
        logits = model.apply(variables, features, present=present).cluster_logits
        vectors["fused"] = layers.fuse(logits, present, "mean")
    return vectors


def knn(bank: np.ndarray, labels: np.ndarray, queries: np.ndarray, label: LabelSpec, *, k: int) -> np.ndarray:
    """Predict queries [m, dim] by the k <= n rows of highest cosine similarity of a bank [n, dim], each with one vote.

    Of its labels, [n] or [n, labels], it returns the most frequent class (the lowest of equals) [m], labels that more than half
    have [m, labels], or the mean number [m].
    """
    votes = labels[neighbours.nearest(queries, bank, k, block=ROWS)[0]]
    if label.kind == "single":
        return np.stack([(votes == c).sum(axis=1) for c in range(len(label.names))], axis=1).argmax(axis=1)
    mean = votes.mean(axis=1)
    return mean if label.kind == "value" else mean > 0.5

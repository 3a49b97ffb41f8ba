"""Probes of the representations while pretraining: nearest neighbours, linear classifiers, agreement of the clusters.

Nothing flows back: a probe reads a copy of the parameters, and its labels, random numbers and gradients never reach the
pretrained network. What it finds is a line in ``probes.jsonl``, with the protocol it was found by.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from conclugen_jax.data import batches, shards
from conclugen_jax.data.host_table import HostTable
from conclugen_jax.data.sources import LabelSpec
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import grid, weights
from conclugen_jax.evaluate import metrics as metrics_lib
from conclugen_jax.evaluate import task as task_lib
from conclugen_jax.method import clustering, fusion, losses
from conclugen_jax.method import model as model_lib
from conclugen_jax.method.train_state import TrainState
from conclugen_jax.train import loop

ROWS = 512  # examples at a time


def create(config: ConfigDict, model: model_lib.ConCluGen) -> "OnlineProbe | None":
    """Make the probe of a run, or ``None`` where none is wanted.

    Raises:
      ConclugenError: data without labels, or with other modalities than the run's.
    """
    return OnlineProbe(config, model.clone(axis_name=None)) if config.online_probe.every_epochs else None


class OnlineProbe:
    """Probes a state on the labelled data of ``config.online_probe``.

    Bank and training rows are those of the training split, queries those of the validation split.
    """

    def __init__(self, config: ConfigDict, model: model_lib.ConCluGen):
        dataset = _open(config, model)
        self.label: LabelSpec = dataset.manifest.label
        modalities, known = list(model.feature_dims), {}
        self._splits: dict[str, HostTable] = {
            name: batches.open_split(dataset, getattr(config.data, f"{name}_split"), modalities, tier="host")
            for name in ("train", "validation")
        }
        for name, rows in self._splits.items():
            known[name] = np.intersect1d(rows.usable, np.flatnonzero(task_lib.known(self.label, rows.table["label"])))
            if not known[name].size:
                raise ConclugenError(f"{dataset.path}: no example of the {name} split has a label; name other data")
        self._known = known
        section, num_rows = config.online_probe, len(known["train"])
        self._neighbours = min(section.neighbours, num_rows)
        self._model, self._every, self._last = model, section.every_epochs, config.train.num_epochs
        # Compiled once: each compilation would keep a megabyte for as long as the process lives.
        self._forward = jax.jit(functools.partial(_forward, model))
        self._nearest_cluster = jax.jit(functools.partial(clustering.nearest, metric=config.clustering.metric))
        self._linear = grid.Grid(
            _of_classifiers(config, num_rows), self.label, num_rows, model.representation_dim * len(modalities)
        )
        self._members = grid.Members(
            list(section.learning_rates), [config.optimizer.weight_decay], [(config.seed, 0)], [known["train"]]
        )
        self._cost: tuple[int, float] | None = None
        self.protocol = (
            f"{dataset.manifest.name} {dataset.manifest.version}: {num_rows} labelled training examples, "
            f"scored on {len(known['validation'])} of the validation split; {self._neighbours} nearest neighbours by "
            f"cosine of the concatenated representations, each one vote; linear: best of rates "
            f"{', '.join(f'{rate:g}' for rate in section.learning_rates)} by that split, "
            f"{section.num_epochs} epochs at most"
        )

    def is_due(self, dispatch: loop.Dispatch) -> bool:
        """Return whether a probe follows a dispatch: every so many epochs and at the run's end."""
        done = dispatch.epoch + 1
        return dispatch.ends_epoch and (done % self._every == 0 or done == self._last)

    def cost(self, dispatch: loop.Dispatch) -> float | None:
        """Return the cost that the probe after a dispatch gives the checkpoint, lower is better; ``None`` without a probe."""
        return self._cost[1] if self._cost is not None and self._cost[0] == dispatch.end_step else None

    def __call__(self, state: TrainState, step: int, epoch: int) -> dict[str, Any]:
        """Probe a state; return a line for the log.

        It has ``knn/...`` and ``linear/...`` (accuracy, or mae of numbers), and with clusters ``clustering/nmi`` and
        ``cluster_sizes`` of the validation split.
        """
        # A copy: the next dispatch takes the state's memory.
        variables = jax.tree.map(lambda x: np.array(x, copy=True), state.variables())
        train, validation = (self._vectors(variables, self._splits[name]) for name in ("train", "validation"))
        measure = "mae" if self.label.kind == "value" else "accuracy"
        rows, queries = self._known["train"], self._known["validation"]
        labels = {name: self._splits[name].table["label"] for name in self._splits}
        guess = knn(train["x"][rows], labels["train"][rows], validation["x"][queries], self.label, k=self._neighbours)
        score = metrics_lib.absolute_error if measure == "mae" else metrics_lib.weighted_accuracy
        record = {"step": step, "epoch": epoch, f"knn/{measure}": score(labels["validation"][queries], guess)}
        vectors = {
            "train": grid.Vectors(jnp.asarray(train["x"]), labels["train"], rows),
            "validation": grid.Vectors(jnp.asarray(validation["x"]), labels["validation"], queries),
        }
        fits = self._linear.fit(self._members, vectors)
        found = fits.measure.min() if measure == "mae" else fits.measure.max()
        if np.isfinite(found):  # else no classifier had a finite loss in any epoch
            record[f"linear/{measure}"] = float(found)
            self._cost = step, float(found if measure == "mae" else -found)
        centroids = np.asarray(state.centroids)
        if "clustering" in self._model.heads and centroids.any():
            record |= self._clusters(validation["fused"][queries], centroids, labels["validation"][queries])
        return record | {"protocol": self.protocol}

    def _vectors(self, variables: Mapping[str, Any], rows: HostTable) -> dict[str, np.ndarray]:
        def inputs(at: np.ndarray) -> dict[str, Any]:
            batch = rows.rows(at)
            return {"features": batch["features"], "present": batch["present"]}

        return weights.in_batches(functools.partial(self._forward, variables), inputs, rows.num_examples, ROWS)

    def _clusters(self, fused: np.ndarray, centroids: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        assigned = np.asarray(self._nearest_cluster(jnp.asarray(fused), jnp.asarray(centroids)))
        sizes = np.bincount(assigned, minlength=len(centroids)).tolist()
        if self.label.kind != "single":
            return {"cluster_sizes": sizes}
        from sklearn.metrics import normalized_mutual_info_score  # a second of imports, for runs with probes alone

        return {"clustering/nmi": float(normalized_mutual_info_score(labels, assigned)), "cluster_sizes": sizes}


def _open(config: ConfigDict, model: model_lib.ConCluGen) -> shards.Dataset:
    """Open the labelled data; refuse data without labels or with other features than the run's."""
    path = config.online_probe.path or config.data.path
    dataset = shards.open_dataset(path, verify=config.data.verify)
    if dataset.manifest.label.kind == "none":
        raise ConclugenError(
            f"{path}: the data set has no labels; name one that has as config.online_probe.path or set "
            "config.online_probe.every_epochs=0"
        )
    for m, size in model.feature_dims.items():
        found = dataset.manifest.modalities.get(m)
        if found != size:
            raise ConclugenError(
                f"{path}: {'no features' if found is None else f'{found} features'} of modality {m!r}, the run has "
                f"{size}; name data of the same extractors as config.online_probe.path"
            )
    return dataset


def _of_classifiers(config: ConfigDict, num_examples: int) -> ConfigDict:
    """Return the run's configuration as the linear classifiers read it."""
    config = config.copy_and_resolve_references()
    config.train.num_epochs = config.online_probe.num_epochs
    config.train.batch_size = min(config.train.batch_size, num_examples)
    config.downstream.protocol = "linear_evaluation"
    config.downstream.labels_per_class = config.downstream.early_stopping_epochs = 0
    config.schedule.warmup_epochs = 0
    return config


def _forward(model: model_lib.ConCluGen, variables: Any, batch: Any) -> dict[str, jax.Array]:
    outputs, present = model.apply(variables, batch["features"], present=batch["present"]), batch["present"]
    vectors = {"x": fusion.fuse(outputs.representations, present, "concat").astype(jnp.float32)}
    if outputs.cluster_logits:
        vectors["fused"] = fusion.fuse(outputs.cluster_logits, present, "mean")
    return vectors


@functools.partial(jax.jit, static_argnums=2)
def _nearest(known: jax.Array, queries: jax.Array, k: int) -> jax.Array:
    """Return the rows of the k most similar of some unit vectors."""
    return jax.lax.top_k(losses.unit_rows(queries) @ known.T, k)[1]


def knn(bank: np.ndarray, labels: np.ndarray, queries: np.ndarray, label: LabelSpec, *, k: int) -> np.ndarray:
    """Predict by the k rows of highest cosine similarity, each with one vote.

    Args:
      bank: [n, dim].
      labels: of the bank, [n] or [n, labels].
      queries: [m, dim].
      label: what they are.
      k: neighbours, at most n.

    Returns:
      Most frequent class (the lowest of equals) [m], labels that more than half have [m, labels], or mean number [m].
    """
    known = losses.unit_rows(jnp.asarray(bank))
    nearest = weights.in_batches(
        lambda rows: _nearest(known, rows, k), lambda at: jnp.asarray(queries[at]), len(queries), ROWS
    )
    votes = labels[nearest]
    if label.kind == "single":
        return np.stack([(votes == c).sum(axis=1) for c in range(len(label.names))], axis=1).argmax(axis=1)
    mean = votes.mean(axis=1)
    return mean if label.kind == "value" else mean > 0.5

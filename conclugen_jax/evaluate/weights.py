"""Load the network of a pretraining run; compute the representations and clusters of rows."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from conclugen_jax.data import batches, shards
from conclugen_jax.data import manifest as manifest_lib
from conclugen_jax.data.manifest import Manifest
from conclugen_jax.data.sources import LabelSpec
from conclugen_jax.errors import ConclugenError
from conclugen_jax.method import clustering, fusion
from conclugen_jax.method import model as model_lib
from conclugen_jax.method.model import ConCluGen
from conclugen_jax.run import checkpoint, trees
from conclugen_jax.run import workdir as workdir_lib

RESULT = "result.json"
"""In workdirs of downstream runs: what they have found."""


def load(workdir: str | Path, which: str | int = "newest") -> tuple[ConCluGen, dict[str, Any], ConfigDict]:
    """Load the network of a pretraining run.

    Args:
      workdir: of the run.
      which: ``newest``, ``best`` or a step.

    Returns:
      (model, variables, config): ``model.apply(variables, features)`` runs all heads,
      ``model.apply(variables, features, method="represent")`` the representations alone. Standardisation, if the
      run used it, is part of the model: features go in raw.

    Raises:
      ConclugenError: no pretraining run or no checkpoint there, or one that does not fit its own configuration.
    """
    return _restore(workdir, which)[:3]


def _restore(workdir: str | Path, which: str | int) -> tuple[ConCluGen, dict[str, Any], ConfigDict, np.ndarray]:
    """Return what :func:`load` does and the centroids [K, K] of the last k-means, zeros before the first."""
    config, manifest = workdir_lib.read_config(workdir), workdir_lib.read_data(workdir)
    with _checkpoints(workdir) as saved:
        model, template = network(config, manifest, where=f"{workdir}, which is no pretraining run: its data")
        step = saved.find(which)
        tree, _ = saved.restore_tree(step)
    found = {name: tree.get(name, {}) for name in template}
    variables = trees.from_tree(found, template, source=f"{workdir} step {step}")
    return model, variables, config, tree.get("centroids", np.zeros(0))


def network(config: ConfigDict, manifest: Manifest, *, where: str) -> tuple[ConCluGen, dict[str, Any]]:
    """Return the network of a configuration, and the shapes and types of its variables.

    Raises:
      ConclugenError: the data lacks a modality of the configuration; ``where`` names the data.
    """
    names = manifest_lib.choose(manifest.modalities, config.data.modalities, what="modality", where=where)
    model = model_lib.from_config(config, {m: manifest.modalities[m] for m in names})
    make = functools.partial(model_lib.initial_variables, model, jax.random.key(0), manifest.standardization)
    return model, jax.eval_shape(make)


def find_step(workdir: str | Path, which: str | int) -> int:
    """Return the step of the ``newest`` or ``best`` checkpoint of a pretraining run, or of the one named."""
    with _checkpoints(workdir) as saved:
        return saved.find(which)


def _checkpoints(workdir: str | Path) -> checkpoint.Checkpoints:
    if Path(workdir, RESULT).exists():
        raise ConclugenError(f"{workdir}: a downstream run; name the pretraining run whose weights are wanted")
    return checkpoint.Checkpoints(workdir, read_only=True)


def untrained(config: ConfigDict, workdir: str | Path) -> tuple[ConCluGen, dict[str, Any]]:
    """Return (model, variables) of a run as before its first step: same sizes, same seed, same standardisation."""
    manifest = workdir_lib.read_data(workdir)
    model, _ = network(config, manifest, where=f"{workdir}: its data")
    init_key, _ = jax.random.split(jax.random.key(config.seed))
    return model, model_lib.initial_variables(model, init_key, manifest.standardization)


def label_of(workdir: str | Path) -> LabelSpec:
    """Return what the labels of the run's data set are."""
    return workdir_lib.read_data(workdir).label


def represent(
    model: ConCluGen, variables: Mapping[str, Any], features: Mapping[str, np.ndarray], *, batch_size: int = 1024
) -> dict[str, np.ndarray]:
    """Compute the representations of any rows.

    Args:
      model: as loaded.
      variables: as loaded.
      features: modality -> [n, dim] raw features; any of the model's modalities, the same rows in each. Where a row
        lacks a modality put zeros, and ignore its representation afterwards (:func:`concatenated` does).
      batch_size: rows computed at a time.

    Returns:
      modality -> float32 [n, representation_dim].

    Raises:
      ValueError: a modality that the model does not know, features of another size, or no rows.
    """
    lengths = {m: len(x) for m, x in features.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise ValueError(f"represent needs one or more modalities with the same rows, at least one, got rows {lengths}")
    # Compiled with the variables as an argument: as constants they would be copied into the program.
    forward = jax.jit(functools.partial(model.clone(axis_name=None).apply, method="represent"))
    rows = {m: np.asarray(x, np.float32) for m, x in features.items()}
    with jax.default_matmul_precision("highest"):  # a GPU would round float32 products to TensorFloat-32
        outputs = in_batches(functools.partial(forward, variables), rows, batch_size)
    return {m: x.astype(np.float32, copy=False) for m, x in outputs.items()}


def in_batches(forward: Callable[[Any], Any], rows: Any, batch_size: int) -> Any:
    """Return ``forward`` of a tree of arrays [n, ...] as NumPy arrays, computed a batch at a time."""
    parts, num_rows = [], len(jax.tree.leaves(rows)[0])
    for indices, count in batches.evaluation_batches(np.arange(num_rows), min(batch_size, num_rows)):
        outputs = forward(jax.tree.map(lambda x, at=indices: x[at], rows))
        parts.append(jax.tree.map(lambda x, count=count: np.asarray(x)[:count], outputs))
    return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)


def concatenated(vectors: Mapping[str, np.ndarray], present: Mapping[str, np.ndarray]) -> np.ndarray:
    """Join all modalities in the order of their names, with zeros where absent: [n, sum of dims]."""
    return fusion.fuse(vectors, present, "concat", xp=np)


@dataclasses.dataclass(frozen=True)
class Split:
    """A split as a run sees it.

    Attributes:
      features: modality -> [n, dim].
      present: modality -> boolean [n].
      label: [n] or [n, labels].
      names: of the classes.
      representations: modality -> [n, R]; those of absent rows mean nothing.
      clusters: [n], nearest centroid of the run's last k-means; empty where it has none.
    """

    features: dict[str, np.ndarray]
    present: dict[str, np.ndarray]
    label: np.ndarray
    names: tuple[str, ...]
    representations: dict[str, np.ndarray]
    clusters: np.ndarray

    def fused(self, modalities: Sequence[str] = (), *, raw: bool = False) -> np.ndarray:
        """Join the representations (or raw features) of some or all modalities, with zeros where absent: [n, dims]."""
        vectors = self.features if raw else self.representations
        return concatenated({m: vectors[m] for m in modalities or vectors}, self.present)


def represent_split(
    workdir: str | Path, split: str, *, which: str | int = "newest", data: str | Path | None = None
) -> Split:
    """Return one split as :func:`represent_splits` does."""
    return represent_splits(workdir, [split], which=which, data=data)[0]


def represent_splits(
    workdir: str | Path, splits: Sequence[str], *, which: str | int = "newest", data: str | Path | None = None
) -> list[Split]:
    """Read splits of a data set, and compute a pretraining run's representations and clusters of them.

    ``which``: checkpoint, see :func:`load`. ``data``: folder of a data set with the run's modalities; ``None``: the run's own.

    Raises:
      ConclugenError: no such run, split or modality.
    """
    model, variables, config, centroids = _restore(workdir, which)
    dataset = shards.open_dataset(data or config.data.path)
    found = []
    for split in splits:
        table = batches.open_split(dataset, split, config.data.modalities, tier="host").table
        features, present = table["features"], table["present"]
        representations = represent(model, variables, features)
        clusters = _clusters(model, variables, config, centroids, features, present)
        names = tuple(dataset.manifest.label.names)
        found.append(Split(features, present, table["label"], names, representations, clusters))
    return found


def clusters_of(
    workdir: str | Path,
    features: Mapping[str, np.ndarray],
    present: Mapping[str, np.ndarray],
    *,
    which: str | int = "newest",
) -> np.ndarray:
    """Find the nearest centroid of each row, modality -> [n, dim] and boolean [n], by a pretraining run's last k-means.

    Returns:
      int32 [n], or [0] where the run has had no k-means.
    """
    return _clusters(*_restore(workdir, which), features, present)


def _clusters(model: ConCluGen, variables: Any, config: ConfigDict, centroids: np.ndarray, features: Any, present: Any):
    if "clustering" not in model.heads or not centroids.any():
        return np.zeros(0, np.int32)
    apply = model.clone(axis_name=None).apply

    @jax.jit
    def nearest(variables: Any, batch: Any) -> jax.Array:
        fused = fusion.fuse(apply(variables, batch["features"]).cluster_logits, batch["present"], "mean")
        return clustering.nearest(fused, centroids, metric=config.clustering.metric)

    rows = {"features": dict(features), "present": dict(present)}
    with jax.default_matmul_precision("highest"):
        return in_batches(functools.partial(nearest, variables), rows, 1024)

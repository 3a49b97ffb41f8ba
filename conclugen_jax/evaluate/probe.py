"""What a checkpoint has learned: load it, compute representations, fit scikit-learn probes on few labels."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from threadpoolctl import threadpool_limits

from conclugen_jax.data import batches, shards
from conclugen_jax.data import manifest as manifest_lib
from conclugen_jax.data.sources import LabelSpec
from conclugen_jax.errors import ConclugenError
from conclugen_jax.method import clustering, fusion
from conclugen_jax.method import model as model_lib
from conclugen_jax.method.model import ConCluGen
from conclugen_jax.run import checkpoint
from conclugen_jax.run import workdir as workdir_lib


def load(workdir: str | Path, which: str | int = "newest") -> tuple[ConCluGen, dict[str, Any], ConfigDict]:
    """The network of a pretraining run.

    Args:
      workdir: of the run.
      which: ``newest``, ``best`` or a step.

    Returns:
      (model, variables, config): ``model.apply(variables, features)`` runs all heads,
      ``model.apply(variables, features, method="represent")`` the representations alone. Standardisation, if the
      run used it, is part of the model: features go in raw.

    Raises:
      ConclugenError: no run or no checkpoint there, or one that does not fit its own configuration.
    """
    restored = _restore(workdir, which)
    return restored.model, restored.variables, restored.config


class _Restored(NamedTuple):
    model: ConCluGen
    variables: dict[str, Any]
    config: ConfigDict
    centroids: np.ndarray  # [K, K], of the last k-means; zeros before the first


def _restore(workdir: str | Path, which: str | int) -> _Restored:
    config, manifest = workdir_lib.read_config(workdir), workdir_lib.read_data(workdir)
    manifest_lib.choose(
        manifest.modalities,
        config.data.modalities,
        what="modality",
        where=f"{workdir}, which is no pretraining run: its data",
    )
    model = model_lib.from_config(config, {m: manifest.modalities[m] for m in config.data.modalities})
    with checkpoint.Checkpoints(workdir, read_only=True) as saved:
        step = saved.find(which)
        tree, _ = saved.restore_tree(step)
    template = jax.eval_shape(
        functools.partial(model_lib.initial_variables, model, jax.random.key(0), manifest.standardization)
    )
    found = {name: tree.get(name, {}) for name in template}
    variables = checkpoint.from_tree(found, template, source=f"{workdir} step {step}")
    return _Restored(model, variables, config, tree.get("centroids", np.zeros(0)))


def find_step(workdir: str | Path, which: str | int) -> int:
    """Step of the ``newest`` or ``best`` checkpoint of a run, or of the one named."""
    with checkpoint.Checkpoints(workdir, read_only=True) as saved:
        return saved.find(which)


def untrained(config: ConfigDict, workdir: str | Path) -> tuple[ConCluGen, dict[str, Any]]:
    """The network of a run as it was before its first step: same sizes, same seed, same standardisation."""
    manifest = workdir_lib.read_data(workdir)
    model = model_lib.from_config(config, {m: manifest.modalities[m] for m in config.data.modalities})
    init_key, _ = jax.random.split(jax.random.key(config.seed))
    return model, model_lib.initial_variables(model, init_key, manifest.standardization)


def represent(
    model: ConCluGen,
    variables: Mapping[str, Any],
    features: Mapping[str, np.ndarray],
    *,
    batch_size: int = 1024,
) -> dict[str, np.ndarray]:
    """Representations of any rows.

    Args:
      model: as loaded.
      variables: as loaded.
      features: modality -> [n, dim] raw features; any of the model's modalities, the same rows in each. Where a row
        lacks a modality put zeros, and leave its representation out afterwards (:func:`concatenated` does).
      batch_size: rows computed at a time.

    Returns:
      modality -> float32 [n, representation_dim].

    Raises:
      ValueError: a modality that the model does not know, features of another size, or no rows.
    """
    lengths = {m: len(x) for m, x in features.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise ValueError(f"represent needs one or more modalities with the same rows, at least one, got rows {lengths}")
    forward = _forward(model.clone(axis_name=None))
    n = next(iter(lengths.values()))
    parts = []
    for indices, count in batches.evaluation_batches(np.arange(n), min(batch_size, n)):
        batch = {m: np.asarray(x, np.float32)[indices] for m, x in features.items()}
        with jax.default_matmul_precision("highest"):  # a GPU would round float32 products to TensorFloat-32
            outputs = forward(variables, batch)
        parts.append({m: np.asarray(x, np.float32)[:count] for m, x in outputs.items()})
    return {m: np.concatenate([part[m] for part in parts]) for m in parts[0]}


def _forward(model: ConCluGen):
    return jax.jit(functools.partial(model.apply, method="represent"))


@dataclasses.dataclass(frozen=True)
class LabelEfficiency:
    """Accuracy of one kind of vectors against the number of labels.

    Attributes:
      name: of the vectors.
      num_labels: labels per class; 0 stands for all.
      accuracy: of each draw of labels, on the test split.
    """

    name: str
    num_labels: int
    accuracy: list[float]


@dataclasses.dataclass(frozen=True)
class Report:
    """Label efficiency of a run.

    Attributes:
      protocol: how the numbers were made, in words.
      workdir: of the run.
      data: name, version and hash of the labelled data.
      results: one per kind of vectors and number of labels.
    """

    protocol: str
    workdir: str
    data: dict[str, str]
    results: list[LabelEfficiency]


def label_efficiency(
    vectors: Mapping[str, tuple[np.ndarray, np.ndarray]],
    train_labels: np.ndarray,
    test_labels: np.ndarray,
    *,
    labels_per_class: Sequence[int] = (2, 5, 20, 0),
    num_draws: int = 5,
    seed: int = 0,
) -> list[LabelEfficiency]:
    """Logistic regression on few labels, the same labels for every kind of vectors.

    Vectors are standardised by the whole (unlabelled) training split; the regression is scikit-learn's with its
    default L2 penalty (C = 1); nothing is chosen by a score.

    Args:
      vectors: name -> (training vectors [n, dim], test vectors [m, dim]).
      train_labels: integer [n].
      test_labels: integer [m].
      labels_per_class: how many labels of each class are used; 0: all.
      num_draws: random draws of the labelled rows.
      seed: of the draws.

    Raises:
      ConclugenError: not one class per example, or a class has fewer labels than asked for.
    """
    from sklearn.linear_model import LogisticRegression  # here, since commands that only load runs start much faster
    from sklearn.preprocessing import StandardScaler

    _check_classes(train_labels)
    draws = {k: [draw_labels(train_labels, k, seed=seed + draw) for draw in range(num_draws)] for k in labels_per_class}
    results = []
    for name, (train, test) in vectors.items():
        scaler = StandardScaler().fit(train)
        train, test = scaler.transform(train), scaler.transform(test)
        for k, rows_of_draws in draws.items():
            # All labels are the same rows at every draw: fitted once.
            distinct = rows_of_draws if k else rows_of_draws[:1]
            # In fits this small the threads wait for each other, for far longer than they save on a busy machine.
            with threadpool_limits(1 if k else None):
                scores = [
                    LogisticRegression(max_iter=2000).fit(train[rows], train_labels[rows]).score(test, test_labels)
                    for rows in distinct
                ]
            results.append(LabelEfficiency(name, k, [float(s) for s in scores] * (1 if k else num_draws)))
    return results


def draw_labels(labels: np.ndarray, num_per_class: int, *, seed: int) -> np.ndarray:
    """Row indices of ``num_per_class`` random examples of every class (0: all rows), ascending.

    Raises:
      ConclugenError: a class has fewer examples.
    """
    if num_per_class == 0:
        return np.arange(len(labels))
    rng = np.random.default_rng(seed)
    rows = []
    for value in np.unique(labels):
        members = np.flatnonzero(labels == value)
        if len(members) < num_per_class:
            raise ConclugenError(
                f"class {value} has {len(members)} labelled examples, {num_per_class} per class were asked for; ask for fewer"
            )
        rows.append(rng.choice(members, num_per_class, replace=False))
    return np.sort(np.concatenate(rows))


def label_efficiency_of_run(
    workdir: str | Path,
    *,
    which: str | int = "newest",
    data: str | Path | None = None,
    labels_per_class: Sequence[int] = (2, 5, 20, 0),
    num_draws: int = 5,
    seed: int = 0,
) -> Report:
    """Raw features, the untrained network and a checkpoint side by side; see :func:`label_efficiency`.

    Args:
      workdir: of a pretraining run.
      which: checkpoint, see :func:`load`.
      data: folder of a labelled data set with the run's modalities; ``None``: the run's own.
      labels_per_class: how many labels of each class are used; 0: all.
      num_draws: random draws of the labelled rows.
      seed: of the draws.

    Raises:
      ConclugenError: the data has not one class per example, or lacks the run's modalities.
    """
    model, variables, config = load(workdir, which)
    dataset = shards.open_dataset(data or config.data.path)
    manifest = dataset.manifest
    if manifest.label.kind != "single":
        raise ConclugenError(
            f"{dataset.path}: labels of kind {manifest.label.kind!r}; label efficiency needs one class per example"
        )
    train, test = (
        batches.open_split(dataset, split, config.data.modalities, tier="host").table
        for split in (config.data.train_split, config.data.test_split)
    )
    fresh_model, fresh_variables = untrained(config, workdir)

    def vectors(
        of: Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]],
    ) -> tuple[np.ndarray, np.ndarray]:
        return tuple(concatenated(of(split["features"]), split["present"]) for split in (train, test))

    kinds = {
        "raw features": vectors(lambda x: x),
        "untrained network": vectors(lambda x: represent(fresh_model, fresh_variables, x)),
        f"{Path(workdir).name}, pretrained": vectors(lambda x: represent(model, variables, x)),
    }
    results = label_efficiency(
        kinds,
        train["label"],
        test["label"],
        labels_per_class=labels_per_class,
        num_draws=num_draws,
        seed=seed,
    )
    protocol = (
        f"Accuracy in % on {len(test['label'])} test examples of {manifest.name} {manifest.version}: scikit-learn logistic "
        f"regression (L2, C = 1) on standardised vectors, mean and standard deviation over {num_draws} draws of the "
        "labels (all labels: one fit)."
    )
    data_facts = {"name": manifest.name, "version": manifest.version, "sha256": manifest.fingerprint()}
    return Report(protocol, str(workdir), data_facts, results)


def concatenated(vectors: Mapping[str, np.ndarray], present: Mapping[str, np.ndarray]) -> np.ndarray:
    """All modalities side by side in the order of their names, zeros where absent: [n, sum of dims]."""
    return fusion.fuse(vectors, present, "concat", xp=np)


@dataclasses.dataclass(frozen=True)
class Split:
    """A split as a run sees it.

    Attributes:
      features: modality -> [n, dim].
      present: modality -> boolean [n].
      label: [n] or [n, labels].
      names: of the classes.
      representations: modality -> [n, R]; what stands in absent rows means nothing.
      clusters: [n], nearest centroid of the run's last k-means; empty where it has none.
    """

    features: dict[str, np.ndarray]
    present: dict[str, np.ndarray]
    label: np.ndarray
    names: tuple[str, ...]
    representations: dict[str, np.ndarray]
    clusters: np.ndarray

    def fused(self, modalities: Sequence[str] = (), *, raw: bool = False) -> np.ndarray:
        """Representations (or raw features) of some or all modalities side by side, zeros where absent: [n, dims]."""
        vectors = self.features if raw else self.representations
        return concatenated({m: vectors[m] for m in modalities or vectors}, self.present)


def represent_split(
    workdir: str | Path, split: str, *, which: str | int = "newest", data: str | Path | None = None
) -> Split:
    """A split of a data set with a run's representations and clusters.

    Args:
      workdir: of a pretraining run.
      split: its name.
      which: checkpoint, see :func:`load`.
      data: folder of a data set with the run's modalities; ``None``: the run's own.

    Raises:
      ConclugenError: no such run, split or modality.
    """
    restored = _restore(workdir, which)
    dataset = shards.open_dataset(data or restored.config.data.path)
    table = batches.open_split(dataset, split, restored.config.data.modalities, tier="host").table
    representations = represent(restored.model, restored.variables, table["features"])
    clusters = _nearest(restored, table["features"], table["present"])
    names = tuple(dataset.manifest.label.names)
    return Split(table["features"], table["present"], table["label"], names, representations, clusters)


def label_of(workdir: str | Path) -> LabelSpec:
    """What the labels of the run's data set are."""
    return workdir_lib.read_data(workdir).label


def clusters_of(
    workdir: str | Path,
    features: Mapping[str, np.ndarray],
    present: Mapping[str, np.ndarray],
    *,
    which: str | int = "newest",
) -> np.ndarray:
    """Nearest centroid of each row by the run's last k-means; empty where it has had none.

    Args:
      workdir: of a pretraining run.
      features: modality -> [n, dim].
      present: modality -> boolean [n].
      which: checkpoint, see :func:`load`.

    Returns:
      int32 [n] or [0].
    """
    return _nearest(_restore(workdir, which), features, present)


def _nearest(restored: _Restored, features: Mapping[str, np.ndarray], present: Mapping[str, np.ndarray]) -> np.ndarray:
    model, variables, config, centroids = restored
    if "clustering" not in model.heads or not centroids.any():
        return np.zeros(0, np.int32)
    with jax.default_matmul_precision("highest"):
        outputs = jax.jit(model.clone(axis_name=None).apply)(variables, features)
        fused = fusion.fuse(outputs.cluster_logits, present, "mean")
    return np.asarray(clustering.nearest(fused, centroids, metric=config.clustering.metric))


def label_efficiency_of_runs(
    workdirs: Mapping[str, str | Path],
    *,
    which: str | int = "newest",
    labels_per_class: Sequence[int] = (2, 5, 20, 0),
    num_draws: int = 5,
    seed: int = 0,
) -> list[LabelEfficiency]:
    """Fused representations of several runs and, last, the raw features of the first; see :func:`label_efficiency`.

    Args:
      workdirs: name -> pretraining run. All of the same data, as its manifest says; modalities may differ.
      which: checkpoint, see :func:`load`.
      labels_per_class: how many labels of each class are used; 0: all.
      num_draws: random draws of the labelled rows.
      seed: of the draws.

    Raises:
      ConclugenError: the runs have not all the same data, or it has not one class per example.
    """
    first, *others = workdirs
    manifest = workdir_lib.read_data(workdirs[first])
    for name in others:
        other = workdir_lib.read_data(workdirs[name])
        if other.fingerprint() != manifest.fingerprint():
            raise ConclugenError(
                f"run {name!r} is of data {other.name} {other.version}, run {first!r} of other data "
                f"({manifest.name} {manifest.version}); compare runs of the same data"
            )
    splits = {}
    for name, workdir in workdirs.items():
        data = workdir_lib.read_config(workdir).data
        splits[name] = [represent_split(workdir, split, which=which) for split in (data.train_split, data.test_split)]
    vectors = {name: (train.fused(), test.fused()) for name, (train, test) in splits.items()}
    train, test = splits[first]
    vectors["raw features"] = (train.fused(raw=True), test.fused(raw=True))
    return label_efficiency(
        vectors, train.label, test.label, labels_per_class=labels_per_class, num_draws=num_draws, seed=seed
    )


def _check_classes(labels: np.ndarray) -> None:
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ConclugenError(
            f"labels are {labels.dtype} of shape {labels.shape}; this needs one class per example: integers of shape [n]"
        )


def accuracies(
    train: np.ndarray, test: np.ndarray, train_labels: np.ndarray, test_labels: np.ndarray, *, neighbours: int = 20
) -> dict[str, float]:
    """Accuracy of scikit-learn's classifiers on vectors standardised by the training rows.

    Args:
      train: [n, dim].
      test: [m, dim].
      train_labels: integer [n].
      test_labels: integer [m].
      neighbours: k of the nearest neighbours, by cosine of the vectors as they are; at most n.

    Raises:
      ConclugenError: not one class per example.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.preprocessing import StandardScaler

    _check_classes(train_labels)
    scaler = StandardScaler().fit(train)
    linear = LogisticRegression(max_iter=2000).fit(scaler.transform(train), train_labels)
    nearest = KNeighborsClassifier(min(neighbours, len(train)), metric="cosine").fit(train, train_labels)
    return {
        "logistic regression": float(linear.score(scaler.transform(test), test_labels)),
        "nearest neighbours": float(nearest.score(test, test_labels)),
    }


def per_modality(train: Split, test: Split, *, raw: bool = False) -> dict[str, dict[str, float]]:
    """:func:`accuracies` of each modality alone, on the rows that have it, and of all together."""
    found = {}
    for m in train.present:
        a, b = np.flatnonzero(train.present[m]), np.flatnonzero(test.present[m])
        vectors = train.fused([m], raw=raw)[a], test.fused([m], raw=raw)[b]
        found[m] = accuracies(*vectors, train.label[a], test.label[b])
    found["all"] = accuracies(train.fused(raw=raw), test.fused(raw=raw), train.label, test.label)
    return found


def cluster_agreement(split: Split, *, seed: int = 0) -> dict[str, float]:
    """Normalised mutual information between classes and clusters: those of the run, if it has any, and those that k-means
    finds in raw features and in representations, as many as there are classes.

    Raises:
      ConclugenError: not one class per example.
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import normalized_mutual_info_score
    from sklearn.preprocessing import StandardScaler

    _check_classes(split.label)
    found = {}
    if split.clusters.size:
        found["clusters of the run"] = normalized_mutual_info_score(split.label, split.clusters)
    for name, raw in (("k-means of raw features", True), ("k-means of representations", False)):
        vectors = StandardScaler().fit_transform(split.fused(raw=raw))
        found_here = KMeans(len(split.names), n_init=10, random_state=seed).fit_predict(vectors)
        found[name] = normalized_mutual_info_score(split.label, found_here)
    return {name: float(x) for name, x in found.items()}

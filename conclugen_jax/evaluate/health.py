"""Health figures that need no labels: has a network collapsed, does it match modalities, does it learn the speakers?

:func:`measure` computes the figures from NumPy arrays, :class:`Monitor` computes the arrays of a run, and :func:`warnings`
reports problems in words.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from conclugen_jax.data import batches, manifest as manifest_lib, shards
from conclugen_jax.data.persons import Persons
from conclugen_jax.evaluate import geometry, levels, weights
from conclugen_jax.method import clustering, layers, model as model_lib
from conclugen_jax.runs import log as log_lib, workdir as workdir_lib

ROWS = 256  # examples that are measured, at most; recall and effective rank depend on it
LEAST_ROWS = 64  # a validation split of fewer examples is too small: the training split is measured
TRAINED_BETWEEN = 1000 * ROWS  # examples trained on from one measurement to the next, at least, by a processor
ACCELERATION = 100  # of other devices: they are so much faster, and a measurement, on the host, is not
LEAST_VECTORS = 9  # of a modality; fewer have a low rank however they are
LEAST_RANK, MOST_UNIFORMITY = 3.0, -0.1  # beyond, vectors have collapsed
LEAST_BALANCE, MOST_OF_PERSONS = 0.3, 0.3  # beyond, there is one cluster, or clusters are persons
LEAST_SHARE, JUDGED_FROM = 0.05, 0.2  # of the way from chance to the best; from this share of the epochs on
MOST_FALLING = 0.03  # of a term's whole fall, in the last tenth of the steps
Arrays = Mapping[str, np.ndarray]


def measure(
    vectors: Arrays,
    present: Arrays,
    *,
    projections: Arrays | None = None,
    clusters: np.ndarray | Sequence[int] = (),
    num_clusters: int = 0,
    groups: Sequence[str] | None = None,
) -> dict[str, float]:
    """Return the figures of health of n examples, by the names that the log has; empty if a vector is not finite.

    Args:
      vectors: modality -> [n, dim], what is handed on.
      present: modality -> boolean [n]; vectors of others mean nothing.
      projections: modality -> unit rows [n, P], where a loss contrasts them.
      clusters: int [n], the cluster of each example; empty where there are none.
      num_clusters: how many there are; 0: as many as the greatest says.
      groups: [n], the person of each example; ``None`` or an empty string if unknown.

    Returns (where it can be computed):
      ``health/rows``: n. ``health/effective_rank``: of the joined vectors; ``.../MODALITY``: of one that nine examples have.
      ``health/uniformity``: of the projections, else of the vectors, mean over modalities; ``.../MODALITY``.
      ``health/alignment``, ``health/recall_at_1``: mean over pairs of modalities, each with ``_chance``.
      ``health/cluster_balance``, ``health/clusters_nmi_group``: see ``geometry.balance``, ``geometry.adjusted_information``.
    """
    contrasted, clusters = projections or vectors, np.asarray(clusters, int)
    if not all(np.isfinite(x[present[m]]).all() for of in (vectors, contrasted) for m, x in of.items()):
        return {}
    figures = {"health/rows": float(np.any([present[m] for m in vectors], axis=0).sum()), **_ranks(vectors, present)}
    shown = {m: geometry.unit(x[present[m]]) for m, x in contrasted.items() if present[m].sum() >= LEAST_VECTORS}
    spread = {f"health/uniformity/{m}": geometry.uniformity(x) for m, x in shown.items()}
    if spread:
        figures |= {"health/uniformity": float(np.mean(list(spread.values()))), **spread}
    if projections:
        figures |= _of_pairs(projections, present)
    if len(clusters):
        figures["health/cluster_balance"] = geometry.balance(clusters, num_clusters)
        known = np.array([bool(g) for g in groups]) if groups is not None else np.zeros(len(clusters), bool)
        who = np.asarray(groups)[known] if known.any() else known[:0]
        if 1 < len(np.unique(who)) < len(who):
            figures["health/clusters_nmi_group"] = geometry.adjusted_information(clusters[known], who)
    return figures


def _ranks(vectors: Arrays, present: Arrays) -> dict[str, float]:
    """Effective rank of the vectors of each modality, and of those joined, with zeros where absent."""
    # Products of joined rows are sums of products, and rows of zeros add eigenvalues of 0.
    products = {m: geometry.products(np.where(present[m][:, None], x, 0)) for m, x in vectors.items()}
    enough = [m for m in vectors if present[m].sum() >= LEAST_VECTORS]
    ranks = {f"health/effective_rank/{m}": geometry.rank_of_products(products[m]) for m in enough}
    return {"health/effective_rank": geometry.rank_of_products(sum(products.values())), **ranks}


def _of_pairs(projections: Arrays, present: Arrays) -> dict[str, float]:
    """Alignment and recall between modalities, means over their pairs."""
    found = []
    for one, other in itertools.combinations(projections, 2):
        both = present[one] & present[other]
        if both.sum() > 1:
            a, b = (np.asarray(projections[m][both], np.float64) for m in (one, other))
            found.append([*geometry.alignment(a, b), geometry.recall_at_1(a, b), 1 / len(a)])
    names = "alignment", "alignment_chance", "recall_at_1", "recall_at_1_chance"
    means = np.mean(found, axis=0).tolist() if found else []
    return {f"health/{name}": x for name, x in zip(names, means, strict=False)}


class Monitor:
    """Measures the health of a network on a fixed sample of a run's validation split, or of its training split.

    Args:
      config: of the run, with the names of its modalities.
      model: its network.
      train: the training split, its features standardised by person if the run does so.
      persons: by which they are, for another split.
    """

    def __init__(
        self, config: ConfigDict, model: model_lib.ConCluGen, train: shards.ShardStream, persons: Persons | None = None
    ):
        names, manifest = list(model.feature_dims), train.dataset.manifest
        stream = _validation(config.data.validation_split, train, names)
        if persons and stream is not train:
            persons.attach(stream)
        order = batches.epoch_order(0, 0, len(stream.usable))
        indices = np.sort(stream.usable[order[:ROWS]])
        rows, self._groups = stream.rows(indices), stream.names(indices)[1]
        self._batch = {key: rows[key] for key in ("features", "present")}
        self._num_clusters = config.clustering.num_clusters
        metric = config.clustering.metric
        self._forward = jax.jit(functools.partial(_forward, model.clone(axis_name=None), metric=metric))
        present = {m: train.presence[train.usable, train.modalities.index(m)] for m in names}
        variances = {}
        for m in names:
            deviation = np.asarray(manifest.statistics[m]["std"], np.float64)
            scale = manifest.standardization(m)[1] if config.data.standardize != "none" else 1
            variances[m] = float(np.square(deviation / scale).mean())
        self.levels = levels.of_losses(config, present, variances)

    def __call__(self, variables: Mapping[str, Any], centroids: Any) -> dict[str, float]:
        """Return :func:`measure` of the sample, and ``chance/TERM`` and ``best/TERM`` of the losses.

        ``variables`` and ``centroids`` [K, K] are those of a state; centroids of zeros are none.
        """
        with jax.default_matmul_precision("highest"):
            found = jax.device_get(self._forward(variables, self._batch, centroids))
        figures = measure(
            found["vectors"],
            self._batch["present"],
            projections=found["projections"],
            clusters=found.get("clusters", ()) if np.any(centroids) else (),
            num_clusters=self._num_clusters,
            groups=self._groups,
        )
        for term, level in self.levels.items():
            figures |= {f"chance/{term}": level.chance, f"best/{term}": level.best}
        return figures


def _validation(split: str, train: shards.ShardStream, names: Sequence[str]) -> shards.ShardStream:
    """Return the validation split, or the training split where it is too small."""
    dataset, manifest = train.dataset, train.dataset.manifest
    if split not in manifest.splits:
        return train
    columns = [list(manifest.modalities).index(m) for m in names]
    usable = manifest_lib.read_presence(dataset.path, manifest, split)[:, columns].any(axis=1)
    return shards.ShardStream(dataset, split, names) if usable.sum() >= LEAST_ROWS else train


def _forward(
    model: model_lib.ConCluGen, variables: Any, batch: Mapping[str, Any], centroids: Any, *, metric: str
) -> dict[str, Any]:
    features, present = batch["features"], batch["present"]
    outputs = model.apply(variables, features, present=present)
    vectors = model.apply(variables, features, method="represent")
    found = {"vectors": vectors, "projections": outputs.projections}
    found = jax.tree.map(lambda x: x.astype(jnp.float32), found)
    if outputs.cluster_logits:
        fused = layers.fuse(outputs.cluster_logits, present, "mean")
        found["clusters"] = clustering.nearest(fused, centroids, metric=metric)
    return found


def of_run(workdir: str | Path, which: str | int = "newest") -> dict[str, float]:
    """Return the figures of health of a pretraining run's checkpoint, and those of its log, see ``levels.of_records``.

    They are in the log of a run with ``online_probe.health``; else they are computed.

    Raises:
      ConclugenError: no checkpoint there, or nothing is logged and the run's data set is not where its configuration says.
    """
    step = weights.find_step(workdir, which)
    records = [r for r in log_lib.records(Path(workdir) / log_lib.METRICS) if r["step"] <= step]
    kept = ("health/", "chance/", "best/")
    if records and records[-1]["step"] == step and "health/rows" in records[-1]:
        figures = {name: value for name, value in records[-1].items() if name.startswith(kept)}
    else:
        figures = _computed(workdir, which)
    return figures | levels.of_records(records, workdir_lib.read_config(workdir))


def _computed(workdir: str | Path, which: str | int) -> dict[str, float]:
    model, variables, config, centroids = weights.restore(workdir, which)
    dataset = shards.open_dataset(config.data.path, verify="size")
    train = shards.ShardStream(dataset, config.data.train_split, list(model.feature_dims))
    if persons := weights.persons_of(workdir, variables, config):
        persons.attach(train)
    return Monitor(config, model, train, persons)(variables, centroids)


def warnings(figures: Mapping[str, float]) -> list[str]:
    """Return a sentence for everything that is wrong by figures of :func:`measure`, :class:`Monitor` and :func:`of_run`.

    Missing figures are not judged. Healthy runs stay far from the limits.
    """
    return [*_of_collapse(figures), *_of_clusters(figures), *_of_losses(figures)]


def _of_collapse(figures: Mapping[str, float]) -> list[str]:
    said: dict[str, str] = {}
    for name, value in figures.items():
        modality = name.rpartition("/")[2]
        if name.startswith("health/effective_rank/") and value < LEAST_RANK:
            said[modality] = f"effective rank {value:.1f} of {figures['health/rows']:.0f} examples"
        elif name.startswith("health/uniformity/") and value > MOST_UNIFORMITY:
            said[modality] = f"uniformity {value:.2f}, evenly spread ones have -2 to -4"
    if not said:
        return []
    way_out = "look at the features (conclugen inspect), or try another config.optimizer.learning_rate"
    return [f"the vectors of {', '.join(said)} have collapsed ({'; '.join(dict.fromkeys(said.values()))}); {way_out}"]


def _of_clusters(figures: Mapping[str, float]) -> list[str]:
    said, known = [], figures.get
    if (even := known("health/cluster_balance", 1)) < LEAST_BALANCE:
        fact = f"nearly all examples are in one cluster (balance {even:.2f}, 1 is even)"
        said.append(f"{fact}; lower config.loss.clustering_weight or let clustering start later")
    if (persons := known("health/clusters_nmi_group", 0)) > MOST_OF_PERSONS:
        fact = f"clusters follow the persons (adjusted mutual information with the groups {persons:.2f}, 0 is none)"
        said.append(f"{fact}; where every person shows all classes, set config.data.standardize=person")
    return said


def _of_losses(figures: Mapping[str, float]) -> list[str]:
    said, known = [], figures.get
    recall, of_guess = known("health/recall_at_1", 0), known("health/recall_at_1_chance", 0)
    for term in ("contrastive", "instance", "fusion"):
        if f"loss/{term}" not in figures or known("schedule/done", 1) < JUDGED_FROM:
            continue
        level = levels.Level(figures[f"chance/{term}"], figures[f"best/{term}"])
        if level.share(figures[f"loss/{term}"]) < LEAST_SHARE and recall <= 3 * of_guess:
            fact = f"loss/{term} is {figures[f'loss/{term}']:.4g}, chance is {level.chance:.4g}"
            way_out = "check that ids pair the modalities rightly, or try another config.optimizer.learning_rate"
            said.append(f"the {term} loss has not left chance ({fact}); {way_out}")
    if known("schedule/done", 0) >= 1 and (fall := known("schedule/falling", 0)) > MOST_FALLING:
        fact = f"a loss made {fall:.1%} of its fall in the last tenth of the steps"
        rate = f"the learning rate ends at {figures['schedule/rate']:.0%} of its peak"
        way_out = f"train in a new workdir with config.train.num_epochs={figures['schedule/period_ends']:.0f}"
        said.append(f"the run ended too early ({fact}, {rate}); {way_out}, where a period of the schedule ends")
    return said

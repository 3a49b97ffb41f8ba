"""Maps of a split: features and representations in two dimensions by PCA and t-SNE, and the clusters of their rows."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from conclugen_jax.data import manifest as manifest_lib, shards
from conclugen_jax.data.shards import Dataset
from conclugen_jax.data.sources import LabelSpec
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import probe
from conclugen_jax.evaluate.weights import check_features
from conclugen_jax.runs import checkpoint
from conclugen_jax.study.report import charts, walk
from conclugen_jax.study.report.reading import Run, Study
from conclugen_jax.study.report.tables import Part
from conclugen_jax.system import files

FEWEST = 10
COMPONENTS = 50
FOLDER = ".maps"
NUM_MAPS = 3


def maps(study: Study, cache: Path, wanted: Sequence[str] | None) -> list[Part]:
    """Draw a map of each data set: each method's representations, its first seed, and raw features.

    ``cache`` is a folder of maps made before, in that of the page; ``wanted`` are methods, ``None`` the first with a
    checkpoint.
    """
    able = [method for method in study.methods if checkpointed(study, method)]
    chosen = able[:NUM_MAPS] if wanted is None else list(wanted)
    if not chosen:
        return [Part(text="No maps were asked for." if able else "No pretraining run has a checkpoint to map.")]
    runs = {study.methods[method].title: checkpointed(study, method) for method in chosen}
    parts = []
    for key, facts in study.datasets.items():
        title = facts.title(key)
        if not (Path(facts.path) / manifest_lib.FILE).is_file():
            parts.append(Part(notes=[f"{title}: no map, there is no data set in {facts.path} any more."]))
        else:
            parts += _of_data_set(title, shards.open_dataset(facts.path, verify="size"), runs, cache)
    note = (
        f"At most {walk.POINTS:,} utterances of all splits, their vectors standardised; the first {COMPONENTS} principal "
        "components, then t-SNE with a fixed seed. Distances between far groups mean little. Neighbours are by cosine of the "
        "standardised vectors, among the utterances that are shown. Predictions are by logistic regressions that have not "
        "seen the utterance nor, where persons are named, the person (5-fold cross-validation). Clusters: the nearest "
        "centroid of the run’s last k-means."
    )
    return [*parts, Part(notes=[note])]


def _of_data_set(title: str, dataset: Dataset, runs: Mapping[str, Run | None], cache: Path) -> list[Part]:
    """Return the map of a data set, and which runs cannot be shown on it."""
    used = sorted({m for run in runs.values() if run for m in run.config["data"]["modalities"]})
    rows, spaces, missing, label = walk.draw(dataset, used), {}, [], None
    for name, run in runs.items():
        try:
            found, there = sample(run, rows)
        except ConclugenError as e:  # another corpus than the run was trained on may lack what it needs
            missing.append(f"{title}: no map of {name}: {e}.")
            continue
        split = probe.represent_rows(run.workdir, found, dataset.manifest.label.names)
        label = split.label
        raw = f"raw features: {', '.join(split.features)}"
        for space, vectors, clusters in ((name, split.fused(), split.clusters), (raw, split.fused(raw=True), ())):
            if space not in spaces:
                places = np.zeros((len(there), 2), np.float32)
                places[there] = flattened(vectors[there], cache)
                spaces[space] = walk.Space(space, space == raw, places, vectors, there, np.asarray(clusters))
        if not len(split.clusters):
            missing.append(f"{title}: {name} has no clusters to colour its map by.")
    if not spaces:
        return [Part(notes=missing)]
    classes = groups_of(label, dataset.manifest.label)
    ordered = sorted(spaces.values(), key=lambda space: space.raw)
    drawn = [
        (f"{s.name}, by class", charts.scatter(f"Map of {s.name}", s.places[s.there], classes[0][s.there], classes[1]))
        for s in ordered
    ]
    found = walk.data(title, rows, label, classes, ordered, cache.parent)
    return [Part(title, walk=found, figures=drawn), Part(notes=missing)]


def checkpointed(study: Study, method: str) -> Run | None:
    """Return the first seed's run of a method, if it has saved a checkpoint."""
    run = next(iter(study.runs.get(study.methods[method].pretraining or "", ())), None)
    return run if run and any((run.workdir / checkpoint.FOLDER).glob("[0-9]*")) else None


def sample(run: Run | None, rows: walk.Rows) -> tuple[dict[str, Any], np.ndarray]:
    """Return utterances with the modalities of a run, and which of them have one of these, boolean [n].

    Raises:
      ConclugenError: no checkpoint, a data set that lacks the run's modalities, or too few utterances with them.
    """
    if run is None:
        raise ConclugenError("it has no checkpoint")
    dataset, modalities = rows.dataset, tuple(run.config["data"]["modalities"])
    check_features(dataset.manifest, {m: run.data.modalities[m] for m in modalities}, "the data set", "the run")
    parts = [shards.ShardStream(dataset, split, modalities).rows(at) for split, at in rows.indices.items()]
    found = {
        key: {m: np.concatenate([p[key][m] for p in parts]) for m in modalities} for key in ("features", "present")
    }
    there = np.any(list(found["present"].values()), axis=0)
    if there.sum() < FEWEST:
        raise ConclugenError(f"{there.sum()} of its rows have these modalities, fewer than {FEWEST}")
    found |= {"label": np.concatenate([p["label"] for p in parts]), "group": rows.groups, "data": dataset.manifest.name}
    return found, there


def groups_of(labels: np.ndarray, label: LabelSpec) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return classes to colour rows by: the label of rows with a single label, or the sign of a number."""
    if label.kind == "single":
        return labels.astype(int), label.names
    if label.kind == "multi":
        count = (labels > 0).sum(axis=1)
        alone = np.where(count == 1, labels.argmax(axis=1), len(label.names) + (count > 1))
        return alone.astype(int), (*label.names, "none", "several")
    if label.kind == "value":
        return (np.sign(labels.reshape(len(labels))) + 1).astype(int), ("negative", "zero", "positive")
    return np.zeros(len(labels), int), ("no labels",)


def flattened(vectors: np.ndarray, cache: Path) -> np.ndarray:
    """Map [n, dim] to float32 [n, 2]: standardise, at most 50 principal components, t-SNE; the same at every call.

    ``cache`` is a folder of maps made before, from which the same vectors get theirs; a damaged one is made again.
    """
    facts = vectors.shape, vectors.dtype, COMPONENTS, sklearn.__version__
    name = hashlib.sha256(repr(facts).encode() + np.ascontiguousarray(vectors).tobytes()).hexdigest()
    path = cache / f"{name[:20]}.npy"
    try:
        found = np.load(path, allow_pickle=False)
        if found.shape == (len(vectors), 2) and np.isfinite(found).all():
            return found
    except (OSError, ValueError, EOFError):
        pass  # not there, or damaged
    with threadpool_limits(1):  # the threads of t-SNE wait for each other, for longer than they save on a busy machine
        places = _flattened(vectors)
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replaced(path) as scratch:
        np.save(scratch, places)
    return places


def _flattened(vectors: np.ndarray) -> np.ndarray:
    scaled = StandardScaler().fit_transform(np.asarray(vectors, np.float64))
    if not scaled.any():
        return np.zeros((len(vectors), 2), np.float32)  # all rows are the same: one point
    parts = PCA(min(COMPONENTS, *scaled.shape), random_state=0).fit_transform(scaled)
    parts = np.pad(parts, ((0, 0), (0, max(0, 2 - parts.shape[1]))))
    # As TSNE(init="pca") would begin, which asks for two components that vary.
    start = (1e-4 * parts[:, :2] / parts[:, 0].std()).astype(np.float32)
    perplexity = min(30.0, (len(parts) - 1) / 3)
    return TSNE(2, init=start, perplexity=perplexity, random_state=0).fit_transform(parts).astype(np.float32)

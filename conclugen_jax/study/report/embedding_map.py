"""Maps of a split: features and representations in two dimensions by PCA and t-SNE, and the clusters of their rows."""

import hashlib
from collections.abc import Sequence
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
from conclugen_jax.study.report import charts
from conclugen_jax.study.report.reading import Run, Study
from conclugen_jax.study.report.tables import Part
from conclugen_jax.system import files

POINTS = 1500
FEWEST = 10
COMPONENTS = 50
FOLDER = ".maps"
NUM_MAPS = 3


def maps(study: Study, cache: Path, wanted: Sequence[str] | None) -> list[Part]:
    """Draw maps of the test split of each data set: raw features, then each method's representations, its first seed.

    ``cache`` is a folder of maps made before; ``wanted`` are methods, ``None`` the first with a checkpoint.
    """
    able = [method for method in study.methods if _checkpointed(study, method)]
    chosen = able[:NUM_MAPS] if wanted is None else list(wanted)
    if not chosen:
        return [Part(text="No maps were asked for." if able else "No pretraining run has a checkpoint to map.")]
    note = (
        f"At most {POINTS:,} rows of the test split (without one, of the training split), standardised; the first {COMPONENTS} "
        "principal components, then t-SNE with a fixed seed. Distances between far groups mean little. Clusters: the nearest "
        "centroid of the run’s last k-means."
    )
    parts = [Part(notes=[note])]
    for key, facts in study.datasets.items():
        title, drawn, missing = facts.title(key), {}, []
        if not (Path(facts.path) / manifest_lib.FILE).is_file():
            missing = [f"{title}: no map, there is no data set in {facts.path} any more."]
        else:
            dataset = shards.open_dataset(facts.path, verify="size")
            for method in chosen:
                name, run = study.methods[method].title, _checkpointed(study, method)
                if problem := _draw(drawn, name, run, dataset, cache):
                    missing.append(f"{title}: {problem}")
        parts += [Part(title if drawn else "", figures=list(drawn.items())), Part(notes=missing)]
    return parts


def _draw(drawn: dict[str, str], name: str, run: Run | None, dataset: Dataset, cache: Path) -> str:
    """Add a run's maps of a data set by caption, with one of its features if it is new; return which of them cannot be."""
    if run is None:
        return f"no map of {name}: it has no checkpoint."
    try:
        rows = sample(run, dataset)
    except ConclugenError as e:  # another corpus than the run was trained on may lack what it needs
        return f"no map of {name}: {e}."
    split = probe.represent_rows(run.workdir, rows, dataset.manifest.label.names)
    classes, caption = groups_of(split.label, dataset.manifest.label), f"raw features: {', '.join(split.features)}"
    if caption not in drawn:
        drawn[caption] = charts.scatter(f"Map of {caption}", flattened(split.fused(raw=True), cache), *classes)
    places = flattened(split.fused(), cache)
    drawn[f"{name}, by class"] = charts.scatter(f"Map of {name}", places, *classes)
    if not len(split.clusters):
        return f"{name} has no clusters to colour its map by."
    names = [str(k) for k in range(split.clusters.max() + 1)]
    drawn[f"{name}, by cluster"] = charts.scatter(f"Map of {name}, clusters", places, split.clusters, names)
    return ""


def _checkpointed(study: Study, method: str) -> Run | None:
    """Return the first seed's run of a method, if it has saved a checkpoint."""
    run = next(iter(study.runs.get(study.methods[method].pretraining or "", ())), None)
    return run if run and any((run.workdir / checkpoint.FOLDER).glob("[0-9]*")) else None


def sample(run: Run, dataset: Dataset) -> dict[str, Any]:
    """Return rows of the test split (without one, of the training split) of a data set, with the modalities of a run.

    They are the same for every run with these modalities.

    Raises:
      ConclugenError: the data set lacks the run's modalities or test split, or there are too few rows.
    """
    data = run.config["data"]
    modalities, split = tuple(data["modalities"]), data["test_split"]
    split = split if split in dataset.manifest.splits else data["train_split"]
    check_features(dataset.manifest, {m: run.data.modalities[m] for m in modalities}, "the data set", "the run")
    stream = shards.ShardStream(dataset, split, modalities)
    if (n := len(stream.usable)) < FEWEST:
        raise ConclugenError(f"split {split!r} has {n} rows with these modalities, fewer than {FEWEST}")
    chosen = np.sort(np.random.default_rng(0).permutation(stream.usable)[:POINTS])
    return {**stream.rows(chosen), "group": stream.names(chosen)[1], "data": dataset.manifest.name}


def groups_of(labels: np.ndarray, label: LabelSpec) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return classes to colour rows by: of several labels the one that is alone, of a number its sign."""
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

"""Maps of a split: features and representations in two dimensions by PCA and t-SNE, and the clusters of their rows."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

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
from conclugen_jax.run import checkpoint
from conclugen_jax.study.report import charts
from conclugen_jax.study.report.reading import Run, Study
from conclugen_jax.study.report.tables import Part, dataset_title
from conclugen_jax.system import files

POINTS = 1500
FEWEST = 10
COMPONENTS = 50
FOLDER = ".maps"
NUM_MAPS = 3


class Sample(NamedTuple):
    """Rows of a split to draw."""

    features: dict[str, np.ndarray]  # modality -> float32 [n, dim]
    present: dict[str, np.ndarray]  # modality -> boolean [n]
    groups: np.ndarray  # int [n], class of each row
    names: tuple[str, ...]  # of the classes


def maps(study: Study, cache: Path, wanted: Sequence[str] | None) -> list[Part]:
    """Draw maps of the test split of each data set: raw features, then each method's representations, its first seed.

    ``cache`` is a folder of maps made before; ``wanted`` are methods, ``None`` the first with a checkpoint.

    Raises:
      ConclugenError: a damaged checkpoint or data set.
    """
    able = [method for method in study.methods if _checkpointed(study, method)]
    chosen = able[:NUM_MAPS] if wanted is None else list(wanted)
    if not chosen:
        return [Part(text="No maps were asked for." if able else "No pretraining run has a checkpoint to map.")]
    note = (
        f"At most {POINTS:,} rows, standardised; the first {COMPONENTS} principal components, then t-SNE with a fixed seed. "
        "Distances between far groups mean little. Clusters: the nearest centroid of the run’s last k-means."
    )
    parts = [Part(notes=[note])]
    for key, facts in study.datasets.items():
        title = dataset_title(study, key)
        drawn, missing = [], [f"no map, there is no data set in {facts.path} any more."]
        if (Path(facts.path) / manifest_lib.FILE).is_file():
            drawn, missing = _maps_of(study, shards.open_dataset(facts.path, verify="size"), cache, chosen)
        parts.append(Part(title if drawn else "", figures=drawn))
        parts.append(Part(notes=[f"{title}: {sentence}" for sentence in missing]))
    return parts


def _maps_of(
    study: Study, dataset: Dataset, cache: Path, chosen: Sequence[str]
) -> tuple[list[tuple[str, str]], list[str]]:
    """Return (caption, map) of a data set's features and of each method, and a sentence for each map that cannot be."""
    drawn, missing = [], []
    for method in chosen:
        name, run = study.methods[method].title, _checkpointed(study, method)
        try:
            if run is None:
                raise ConclugenError("it has no checkpoint")
            rows = sample(run, dataset)
        except ConclugenError as e:  # another corpus than the run was trained on may lack what it needs
            missing.append(f"no map of {name}: {e}.")
            continue
        caption = f"raw features: {', '.join(rows.features)}"
        if caption not in dict(drawn):
            features = flattened(probe.concatenated(rows.features, rows.present), cache)
            drawn.append((caption, charts.scatter(f"Map of {caption}", features, rows.groups, rows.names)))
        vectors, clusters = represented(run, rows)
        places = flattened(vectors, cache)
        drawn.append((f"{name}, by class", charts.scatter(f"Map of {name}", places, rows.groups, rows.names)))
        if len(clusters):
            names = [str(k) for k in range(int(clusters.max()) + 1)]
            drawn.append((f"{name}, by cluster", charts.scatter(f"Map of {name}, clusters", places, clusters, names)))
        else:
            missing.append(f"{name} has no clusters to colour its map by.")
    return drawn, missing


def _checkpointed(study: Study, method: str) -> Run | None:
    """Return the first seed's run of a method, if it has saved a checkpoint."""
    runs = study.runs.get(study.methods[method].pretraining or "", {})
    run = runs[min(runs)] if runs else None
    return run if run and any((run.workdir / checkpoint.FOLDER).glob("[0-9]*")) else None


def sample(run: Run, dataset: Dataset) -> Sample:
    """Return rows of the test split of a data set with the modalities of a run, the same for every run with these.

    Raises:
      ConclugenError: the data set lacks the run's modalities or test split, or there are too few rows.
    """
    modalities, split = tuple(run.config["data"]["modalities"]), run.config["data"]["test_split"]
    for m in modalities:
        size, there = run.data.modalities[m], dataset.manifest.modalities.get(m)
        if size != there:
            raise ConclugenError(f"the run has {size} features of modality {m!r}, the data set has {there or 'none'}")
    stream = shards.ShardStream(dataset, split, modalities)
    if len(stream.usable) < FEWEST:
        raise ConclugenError(
            f"split {split!r} has {len(stream.usable)} rows with these modalities, fewer than {FEWEST}"
        )
    rows = stream.rows(np.sort(np.random.default_rng(0).permutation(stream.usable)[:POINTS]))
    return Sample(rows["features"], rows["present"], *groups_of(np.asarray(rows["label"]), stream.label))


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


def represented(run: Run, rows: Sample) -> tuple[np.ndarray, np.ndarray]:
    """Return what a run's newest checkpoint makes of rows: representations [n, dim] and nearest centroids [n], if any.

    Raises:
      ConclugenError: a damaged checkpoint.
    """
    step = probe.find_step(run.workdir, "newest")
    model, variables, _ = probe.load(run.workdir, step)
    vectors = probe.concatenated(probe.represent(model, variables, rows.features), rows.present)
    return vectors, probe.clusters_of(run.workdir, rows.features, rows.present, which=step)


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

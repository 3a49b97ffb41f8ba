"""Maps of a split: features and representations in two dimensions by PCA and t-SNE, and the clusters of their rows."""

import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sklearn
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from conclugen_jax.data import shards
from conclugen_jax.data.shards import Dataset
from conclugen_jax.data.sources import LabelSpec
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import probe
from conclugen_jax.run import checkpoint
from conclugen_jax.study.report.reading import Run
from conclugen_jax.system import files

POINTS = 1500
FEWEST = 10
COMPONENTS = 50
FOLDER = ".maps"


class Sample(NamedTuple):
    """Rows of a split to draw.

    Attributes:
      modalities: of the features.
      features: modality -> float32 [n, dim].
      present: modality -> boolean [n].
      groups: int [n], class of each row.
      names: of the classes.
      origin: what identifies these rows.
    """

    modalities: tuple[str, ...]
    features: dict[str, np.ndarray]
    present: dict[str, np.ndarray]
    groups: np.ndarray
    names: tuple[str, ...]
    origin: tuple[str, ...]


class Learned(NamedTuple):
    """A map of representations.

    Attributes:
      positions: float32 [n, 2].
      clusters: int [n], nearest centroid of each row; empty where the run has no centroids.
    """

    positions: np.ndarray
    clusters: np.ndarray


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
    groups, names = groups_of(np.asarray(rows["label"]), stream.label)
    origin = (dataset.manifest.fingerprint(), split, *modalities)
    return Sample(modalities, rows["features"], rows["present"], groups, names, origin)


def raw(rows: Sample, cache: Path) -> np.ndarray:
    """Return the map of the features themselves, float32 [n, 2]; see :func:`flattened`."""

    def compute() -> dict[str, np.ndarray]:
        return {"positions": flattened(probe.concatenated(rows.features, rows.present))}

    return _kept(cache, ["raw", *rows.origin], len(rows.groups), compute)["positions"]


def learned(run: Run, rows: Sample, cache: Path) -> Learned:
    """Return the map of the representations of a run's newest checkpoint, which is computed once and kept.

    Raises:
      ConclugenError: no checkpoint, or a damaged one.
    """
    step = probe.find_step(run.workdir, "newest")
    written = (run.workdir / checkpoint.FOLDER / str(step)).stat().st_mtime_ns
    facts = ["learned", *rows.origin, str(run.workdir.resolve()), run.config, step, written]
    return Learned(**_kept(cache, facts, len(rows.groups), lambda: _compute(run, rows, step)))


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


def _compute(run: Run, rows: Sample, step: int) -> dict[str, np.ndarray]:
    model, variables, _ = probe.load(run.workdir, step)
    vectors = probe.concatenated(probe.represent(model, variables, rows.features), rows.present)
    clusters = probe.clusters_of(run.workdir, rows.features, rows.present, which=step)
    return {"positions": flattened(vectors), "clusters": clusters}


def flattened(vectors: np.ndarray) -> np.ndarray:
    """Map [n, dim] to float32 [n, 2]: standardise, at most 50 principal components, t-SNE; the same at every call."""
    scaled = StandardScaler().fit_transform(np.asarray(vectors, np.float64))
    if not scaled.any():
        return np.zeros((len(vectors), 2), np.float32)  # all rows are the same: one point
    with threadpool_limits(1):  # the threads of t-SNE wait for each other, for longer than they save on a busy machine
        return _flattened(scaled)


def _flattened(scaled: np.ndarray) -> np.ndarray:
    parts = PCA(min(COMPONENTS, *scaled.shape), random_state=0).fit_transform(scaled)
    if parts.shape[1] < 2:
        parts = np.pad(parts, ((0, 0), (0, 2 - parts.shape[1])))
    # As TSNE(init="pca") would begin, which asks for two components that vary.
    start = (1e-4 * parts[:, :2] / parts[:, 0].std()).astype(np.float32)
    perplexity = min(30.0, (len(parts) - 1) / 3)
    return TSNE(2, init=start, perplexity=perplexity, random_state=0).fit_transform(parts).astype(np.float32)


def _kept(cache: Path, facts: list, n: int, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return what was computed before from the same facts, else compute it; a damaged file is replaced."""
    facts = [*facts, POINTS, COMPONENTS, sklearn.__version__]
    path = cache / f"{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]}.npz"
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        if arrays["positions"].shape == (n, 2) and np.isfinite(arrays["positions"]).all():
            return arrays
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # not there, or damaged
    arrays = compute()
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replaced(path) as scratch:
        np.savez(scratch, **arrays)
    return arrays

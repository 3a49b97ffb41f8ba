"""What representations are worth: scikit-learn classifiers on few labels, nearest neighbours, agreement of clusters.

Programs need this module alone: it also has the names of ``weights``.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from conclugen_jax.data import manifest as manifest_lib
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import bank, baselines, metrics, probe_across, task as task_lib
from conclugen_jax.evaluate.regression import classified, classify, draw_labels, self_trained  # noqa: F401
from conclugen_jax.evaluate.weights import (  # noqa: F401
    Split,
    concatenated,
    find_step,
    label_of,
    load,
    represent,
    represent_rows,
    represent_split,
    represent_splits,
    untrained,
)
from conclugen_jax.runs import config as config_lib, workdir as workdir_lib
from conclugen_jax.system import processes
from conclugen_jax.train import parallel


@dataclasses.dataclass(frozen=True)
class LabelEfficiency:
    """Test accuracy of each draw of so many labels per class (0: all), of one kind of vectors.

    ``never_predicted``: class -> number of draws in which it is never predicted, though test examples have it.
    """

    name: str
    num_labels: int
    accuracy: list[float]
    never_predicted: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Report:
    """Label efficiency of a run: how it was measured in words; name, version and hash of the labelled data; results.

    ``warnings``: sentences on classes with few labels and on classes that are never predicted.
    """

    protocol: str
    workdir: str
    data: dict[str, str]
    results: list[LabelEfficiency]
    warnings: list[str] = dataclasses.field(default_factory=list)
    across: list[probe_across.Across] = dataclasses.field(default_factory=list)


def label_efficiency(
    vectors: Mapping[str, tuple[np.ndarray, np.ndarray]],
    train_labels: np.ndarray,
    test_labels: np.ndarray,
    *,
    labels_per_class: Sequence[int] = (2, 5, 20, 0),
    num_draws: int = 5,
    seed: int = 0,
    names: Sequence[str] = (),
    c_times_dim: float = 0.0,
) -> list[LabelEfficiency]:
    """Fit logistic regressions on few labels, the same labels for every kind of vectors.

    The vectors are standardised by the whole (unlabelled) training split. Nothing is chosen by a score.

    Args:
      vectors: name -> (training [n, dim], test [m, dim]).
      train_labels: integers [n], one class per example.
      test_labels: integers [m].
      labels_per_class: how many labels of each class are used, at most as many as there are; 0: all.
      num_draws: random draws of the labelled rows.
      seed: of the first draw; each further draw adds one.
      names: of the classes; their numbers by default.
      c_times_dim: see :func:`classify`.

    Returns:
      One result for each kind of vectors and each number of labels.

    Raises:
      ConclugenError: labels of another kind, no test rows, or training labels of one class alone.
    """
    from sklearn.preprocessing import StandardScaler  # here, since commands that only load runs start much faster

    _check_classes(train_labels)
    classes = np.unique(np.concatenate([train_labels, test_labels]))
    names = names or [str(c) for c in range(int(classes.max(initial=-1)) + 1)]
    if not len(test_labels) or len(np.unique(train_labels)) < 2:
        found = " and ".join(repr(names[c]) for c in np.unique(train_labels)) or "no class"
        fact = f"{len(train_labels)} training rows with labels of {found}, {len(test_labels)} test rows"
        raise ConclugenError(f"{fact}; a classifier needs training rows of two classes, and test rows")
    draws = {k: [draw_labels(train_labels, k, seed=seed + draw) for draw in range(num_draws)] for k in labels_per_class}
    results = []
    for name, (train, test) in vectors.items():
        scaler = StandardScaler().fit(train)
        train, test = scaler.transform(train), scaler.transform(test)
        for k, rows_of_draws in draws.items():
            # All labels are the same rows at every draw: fitted once.
            distinct = rows_of_draws if k else rows_of_draws[:1]
            guesses = [classify(train[rows], train_labels[rows], test, c_times_dim=c_times_dim) for rows in distinct]
            scores = [float((guess == test_labels).mean()) for guess in guesses] * (1 if k else num_draws)
            missed = [name for guess in guesses for c, name in enumerate(names) if c in test_labels and c not in guess]
            results.append(LabelEfficiency(name, k, scores, dict(collections.Counter(missed))))
    return results


def label_efficiency_of_run(
    workdir: str | Path,
    *,
    which: str | int = "newest",
    data: str | Path | None = None,
    labels_per_class: Sequence[int] | None = None,
    num_draws: int = 5,
    evaluation: Mapping[str, Any] | None = None,
    test_data: Sequence[str | Path] = (),
    **options: Any,
) -> Report | None:
    """Compare a checkpoint with raw features, closed forms and the untrained network by :func:`label_efficiency`.

    All devices and processes share the representations. Process 0 alone fits the classifiers, by scikit-learn on its host, and
    returns the report; the others return ``None`` as soon as they have no more to share.

    Args:
      workdir: folder of a pretraining run.
      which: checkpoint, see :func:`load`.
      data: folder of a labelled data set with the run's modalities; ``None``: the run's own.
      labels_per_class: see :func:`label_efficiency`; ``None``: those of 2, 5, 20 that the largest class has, and all.
      num_draws: see :func:`label_efficiency`.
      evaluation: values that replace those of this section of the run's configuration: vectors, and how they are smoothed.
      test_data: folders of other data sets whose test split is scored as well, see :mod:`conclugen_jax.evaluate.across`.
      options: see :func:`label_efficiency`.

    Returns:
      The report, at process 0.
    """
    config = workdir_lib.read_config(workdir)
    config.evaluation.update(evaluation or {})
    config_lib.check(config)
    manifest, section = manifest_lib.read(data or config.data.path), config.evaluation
    names = config.data.train_split, config.data.test_split
    how = {"which": which, "vectors": section.vectors}
    facts = {"test_data": [manifest_lib.read(path).fingerprint() for path in test_data]}
    parallel.check_alike(config, manifest, step=find_step(workdir, which), **facts)
    train, test = represent_splits(workdir, names, data=data, **how)
    _check_classes(train.label, f"{data or config.data.path}: ")
    others = probe_across.opened(workdir, config, data or config.data.path, test_data, **how)
    if labels_per_class is None:
        labels_per_class = [k for k in (2, 5, 20, 0) if k <= np.bincount(train.label).max()]
    fresh, seen = untrained(config, workdir), (train, test, *(x for _, x in others))
    of_untrained = [represent(*fresh, x.features) for x in seen]
    if not processes.is_main():
        return None
    forms = {
        "principal components": baselines.principal(train.features, train.present),
        "canonical correlations": baselines.canonical(train.features, train.present),
    }

    def vectors(x: Split, fresh: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {
            "raw features": x.fused(raw=True),
            **{name: form.of(x.features, x.present) for name, form in forms.items()},
            "untrained network": concatenated(fresh, x.present),
            f"{Path(workdir).name}, pretrained": x.fused(),
        }

    splits = list(map(vectors, seen, of_untrained))
    kinds = {name: bank.several(splits[0][name], [x[name] for x in splits[1:]], section) for name in splits[0]}
    options |= {"labels_per_class": labels_per_class, "num_draws": num_draws, "names": train.names}
    options["c_times_dim"] = section.c_times_dim
    strength = f"C = {section.c_times_dim:g} / size of the vectors" if section.c_times_dim else "C = 1"
    protocol = (
        f"Accuracy in % on {len(test.label)} test examples of {manifest.name} {manifest.version}: scikit-learn logistic "
        f"regression (L2, {strength}) on standardised vectors{bank.said(section)}, mean and standard deviation over "
        f"{num_draws} draws of the labels (all labels: one fit)."
    )
    data_facts = {"name": manifest.name, "version": manifest.version, "sha256": manifest.fingerprint()}

    def fit(which: int, rows: Any, labels: np.ndarray) -> list[LabelEfficiency]:
        pairs = {name: (train, tests[which][rows]) for name, (train, *tests) in kinds.items()}
        return label_efficiency(pairs, train.label, labels, **options)

    results = fit(0, slice(None), test.label)
    found = [
        probe_across.score(fit, i, other, rows.label, test.label, results) for i, (other, rows) in enumerate(others, 1)
    ]
    lines = task_lib.warnings(manifest.label, train.label, max(labels_per_class, default=0))
    lines += metrics.absent(np.bincount(test.label, minlength=len(test.names)), test.names)
    if missed := _missed(results):
        lines.append(f"warning: {metrics.missed_sentence(missed)}")
    return Report(protocol, str(workdir), data_facts, results, lines, found)


def _missed(results: Sequence[LabelEfficiency]) -> dict[str, tuple[dict[str, int], int]]:
    """Return what :func:`metrics.missed_sentence` takes."""
    return {
        f"{r.name}, {f'{r.num_labels} labels' if r.num_labels else 'all labels'}": (
            r.never_predicted,
            len(r.accuracy) if r.num_labels else 1,
        )
        for r in results
        if r.never_predicted
    }


def label_efficiency_of_runs(
    workdirs: Mapping[str, str | Path], *, which: str | int = "newest", **options: Any
) -> list[LabelEfficiency]:
    """Compare the vectors of several runs and, last, the raw features of the first by :func:`label_efficiency`.

    The vectors of each run are smoothed as its own configuration says, raw features in every way that one of the runs is.

    Args:
      workdirs: name -> pretraining run. All have the same data, as its manifest says; modalities may differ.
      which: checkpoint, see :func:`load`.
      options: see :func:`label_efficiency`.
    """
    first, vectors, sections = next(iter(workdirs)), {}, {}
    manifest = workdir_lib.read_data(workdirs[first])
    for name, workdir in workdirs.items():
        other, config = workdir_lib.read_data(workdir), workdir_lib.read_config(workdir)
        data, section = config.data, config.evaluation
        if other.fingerprint() != manifest.fingerprint():
            fact = f"of data {other.name} {other.version}, run {first!r} of other data ({manifest.name} {manifest.version})"
            raise ConclugenError(f"run {name!r} is {fact}; compare runs of the same data")
        train, test = represent_splits(workdir, (data.train_split, data.test_split), which=which)
        vectors[name] = bank.pair(train.fused(), test.fused(), section)
        sections[f"raw features{bank.said(section)}"] = section
        if name == first:
            labels, raw = (train.label, test.label), (train.fused(raw=True), test.fused(raw=True))
    vectors |= {name: bank.pair(*raw, section) for name, section in sections.items()}
    return label_efficiency(vectors, *labels, names=manifest.label.names, **options)


def table(
    results: Sequence[LabelEfficiency], *, factor: float = 1, digits: int = 3
) -> tuple[list[str], list[list[str]]]:
    """Return header and rows: mean accuracy times ``factor`` ± its standard deviation over draws, a row for each name."""
    numbers, rows = list(dict.fromkeys(r.num_labels for r in results)), []
    for name in dict.fromkeys(r.name for r in results):
        own = {r.num_labels: r.accuracy for r in results if r.name == name}
        means = {k: f"{factor * np.mean(own[k]):.{digits}f}" for k in numbers}
        spread = {k: f" ± {factor * np.std(own[k]):.{digits}f}" for k in numbers if k}  # all labels: nothing is drawn
        rows.append([name, *(means[k] + spread.get(k, "") for k in numbers)])
    return ["vectors", *(f"{k} labels" if k else "all labels" for k in numbers)], rows


def _check_classes(labels: np.ndarray, where: str = "") -> None:
    if labels.shape[1:] == (0,):
        raise ConclugenError(f"{where}the data set has no labels; probing needs them")
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        wanted = "this needs one class per example: integers of shape [n]"
        raise ConclugenError(f"{where}labels are {labels.dtype} of shape {labels.shape}; {wanted}")


def accuracies(
    train: np.ndarray,
    test: np.ndarray,
    train_labels: np.ndarray,
    test_labels: np.ndarray,
    *,
    neighbours: int = 20,
    names: Sequence[str] = (),
) -> dict[str, float]:
    """Score scikit-learn's classifiers on vectors [n, dim] and [m, dim], standardised by the training rows.

    ``neighbours``: k of the nearest neighbours, by cosine of the vectors as they are; at most n. ``names``: of the classes.
    """
    from sklearn.neighbors import KNeighborsClassifier

    options = {"labels_per_class": [0], "num_draws": 1, "names": names}
    (linear,) = label_efficiency({"all": (train, test)}, train_labels, test_labels, **options)
    nearest = KNeighborsClassifier(min(neighbours, len(train)), metric="cosine").fit(train, train_labels)
    return {"logistic regression": linear.accuracy[0], "nearest neighbours": float(nearest.score(test, test_labels))}


def per_modality(
    train: Split, test: Split, *, raw: bool = False, evaluation: ConfigDict | None = None
) -> dict[str, dict[str, float]]:
    """Return :func:`accuracies` of each modality alone, on the rows that have it, and of all together.

    ``evaluation``: section of a configuration that says how vectors are smoothed; ``None``: they are not.
    """
    found = {}
    for m in train.present:
        a, b = np.flatnonzero(train.present[m]), np.flatnonzero(test.present[m])
        vectors = bank.pair(train.fused([m], raw=raw)[a], test.fused([m], raw=raw)[b], evaluation)
        found[m] = accuracies(*vectors, train.label[a], test.label[b], names=train.names)
    vectors = bank.pair(train.fused(raw=raw), test.fused(raw=raw), evaluation)
    found["all"] = accuracies(*vectors, train.label, test.label, names=train.names)
    return found


def cluster_agreement(split: Split, *, seed: int = 0) -> dict[str, float]:
    """Compute the normalised mutual information between classes and clusters.

    The clusters are those of the run, if it has any, and those that k-means finds in raw features and in representations, as
    many as there are classes.
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import normalized_mutual_info_score
    from sklearn.preprocessing import StandardScaler

    _check_classes(split.label)
    clusters = {"clusters of the run": split.clusters} if split.clusters.size else {}
    for name, raw in (("k-means of raw features", True), ("k-means of representations", False)):
        vectors = StandardScaler().fit_transform(split.fused(raw=raw))
        clusters[name] = KMeans(min(len(split.names), len(vectors)), n_init=10, random_state=seed).fit_predict(vectors)
    return {name: float(normalized_mutual_info_score(split.label, x)) for name, x in clusters.items()}

"""What is predicted downstream, from what, with which loss, and how well."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from conclugen_jax.data.batches import CHUNK_ROWS
from conclugen_jax.data.shards import RowSource
from conclugen_jax.data.sources import LabelSpec
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import metrics
from conclugen_jax.method import losses, model as model_lib
from conclugen_jax.runs import config as config_lib

CLASSIFIER, ENCODER = "classifier/.*", "representation/.*"
"""Patterns of the parameters that are trained; of frozen protocols the classifier's alone."""


class Task(NamedTuple):
    """What is predicted, and from what."""

    encoder: Any  # the representation network; None: features are representations already
    classifier: model_lib.Classifier  # what is trained on its representations
    label: LabelSpec  # kind (``single``, ``multi`` or ``value``) and names
    weights: np.ndarray  # [num_outputs], of the classes, or of the positive side of each label; not used for ``value``
    threshold: float  # probability above which a label of several is predicted

    @property
    def measure(self) -> str:
        """The score that chooses the best epoch: ``accuracy``, the greater the better; ``mae``, the less the better."""
        return "mae" if self.label.kind == "value" else "accuracy"

    def logits(self, params: Any, feature_stats: Any, batch: Any, dropout_key: jax.Array | None = None) -> jax.Array:
        """Return float32 [n, num_outputs] from ``features`` and ``present``; the prediction itself for ``value``."""
        inputs, present = batch["features"], batch["present"]
        if self.encoder is not None:
            variables = {"params": {"representation": params["representation"]}, "feature_stats": feature_stats}
            inputs = self.encoder.apply(variables, inputs, method="represent")
        variables = {"params": params["classifier"]}
        return self.classifier.apply(variables, inputs, present=present, dropout_key=dropout_key)

    def loss(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
        """Return the loss over the global batch, a scalar."""
        weights, axis_name = jnp.asarray(self.weights), self.classifier.axis_name
        if self.label.kind == "single":
            return losses.cross_entropy(logits, labels, class_weights=weights, axis_name=axis_name)
        if self.label.kind == "multi":
            return losses.multi_label_cross_entropy(logits, labels, positive_weights=weights, axis_name=axis_name)
        return losses.absolute_error(logits[:, 0], labels, axis_name=axis_name)

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Return the probability of each class, or of each label by itself, float64 [n, num_outputs]."""
        logits = np.asarray(logits, np.float64)
        if self.label.kind == "multi":
            return 1 / (1 + np.exp(-logits))
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        return odds / odds.sum(axis=1, keepdims=True)

    def predictions(self, logits: np.ndarray) -> np.ndarray:
        """Return the class [n], presence of each label [n, num_outputs], or number [n] from outputs [n, num_outputs]."""
        if self.label.kind == "single":
            return logits.argmax(axis=1)
        return logits[:, 0] if self.label.kind == "value" else self.probabilities(logits) > self.threshold

    def scores(self, logits: np.ndarray, labels: np.ndarray, where: str, *, brief: bool = False) -> dict[str, Any]:
        """Return ``loss`` and all scores (``metrics.py``), or ``brief`` the measure alone, of the rows with a label."""
        rows = labelled(self.label, labels, where)
        logits, labels = logits[rows], labels[rows]
        predictions = self.predictions(logits)
        alone = self._replace(classifier=self.classifier.clone(axis_name=None))
        scores = {"loss": float(alone.loss(jnp.asarray(logits), jnp.asarray(labels)))}
        if brief:
            return scores | {self.measure: measured(self.label, labels, predictions)}
        if self.label.kind == "value":
            return scores | metrics.value_scores(labels, predictions)
        return scores | metrics.class_scores(labels, predictions, self.label.names)


def measured(label: LabelSpec, labels: np.ndarray, predictions: np.ndarray) -> float:
    """Return the mean absolute error of numbers, else the accuracy weighted by occurrence."""
    return (metrics.absolute_error if label.kind == "value" else metrics.weighted_accuracy)(labels, predictions)


def create(
    config: ConfigDict, label: LabelSpec, labels: Any = None, encoder: Any = None, axis_name: str | None = None
) -> Task:
    """Return the task of a run; see :class:`Task`. Classes weigh as in the ``labels`` that are trained on, if any."""
    num_outputs, section = 1 if label.kind == "value" else len(label.names), config.downstream
    classifier = model_lib.Classifier(
        num_outputs=num_outputs,
        dropout_rate=section.dropout_rate,
        fusion=section.fusion,
        dtype=model_lib.DTYPES[config.precision],
        axis_name=axis_name,
    )
    weights = np.ones(num_outputs, np.float32)
    if labels is not None and label.kind != "value" and section.class_weights != "none":
        weights = class_weights(label, labels)
    return Task(encoder, classifier, label, weights, section.threshold)


def class_weights(label: LabelSpec, labels: np.ndarray) -> np.ndarray:
    """Return weights by inverse frequency, float32 [classes], from labels [n] or [n, labels].

    n / (num_classes * n_c) for single labels, so that classes weigh alike and the mean over examples is 1; negatives /
    positives for the positive side of each label of a multi-label task. A class without examples has weight 0, a label
    that no row or every row has weight 1.
    """
    n, counts = len(labels), counted(label, labels)
    if label.kind == "single":
        return np.where(counts > 0, n / (len(counts) * np.maximum(counts, 1)), 0).astype(np.float32)
    return np.where((counts > 0) & (counts < n), (n - counts) / np.maximum(counts, 1), 1).astype(np.float32)


def counted(label: LabelSpec, labels: np.ndarray) -> np.ndarray:
    """Return how many of some rows, all with a label, each class or label has."""
    single = label.kind == "single"
    return np.bincount(labels, minlength=len(label.names)) if single else np.asarray(labels, np.int64).sum(axis=0)


def warnings(label: LabelSpec, labels: np.ndarray, labels_per_class: int = 0) -> list[str]:
    """Return a sentence for each class, or label, that no training example has, and one on those with fewer than asked for."""
    counts = {} if label.kind == "value" else dict(zip(label.names, counted(label, labels).tolist(), strict=True))
    never = [name for name, count in counts.items() if not count]
    found = [f"warning: no training example is {name!r}; the classifier cannot learn to predict it" for name in never]
    if few := [f"{name!r} {count}" for name, count in counts.items() if 0 < count < labels_per_class]:
        fact = f"fewer labelled training examples than the {labels_per_class} per class asked for: {', '.join(few)}"
        found.append(f"warning: {fact}; all of these are used")
    return found


def not_finite(config: ConfigDict, more: str = "") -> ConclugenError:
    """Return the error for a validation loss that is never finite."""
    return ConclugenError(
        f"{config.data.path}: the validation loss is not finite in any epoch; lower config.optimizer.learning_rate (now "
        f"{config.optimizer.learning_rate:g}) or set config.data.standardize=split{more}"
    )


def labels_of(rows: RowSource) -> np.ndarray:
    """Return the labels of all rows of a split, in order; reads the whole split where no table holds it."""
    if hasattr(rows, "table"):
        return np.asarray(rows.table["label"])
    starts = range(0, rows.num_examples, CHUNK_ROWS)
    return np.concatenate([rows.rows(np.arange(s, min(s + CHUNK_ROWS, rows.num_examples)))["label"] for s in starts])


def known(label: LabelSpec, labels: np.ndarray) -> np.ndarray:
    """Return which rows have a label, boolean [n]; a further target is unknown where it is -1 or NaN."""
    if label.kind == "single":
        return labels >= 0
    return np.isfinite(labels) if label.kind == "value" else np.isfinite(labels).all(axis=1)


def labelled(label: LabelSpec, labels: np.ndarray, where: str, among: np.ndarray | None = None) -> np.ndarray:
    """Return the rows that have a label, of all or of some; refuse labels without any, of the rows that ``where`` names."""
    rows = np.flatnonzero(known(label, labels))
    rows = rows if among is None else np.intersect1d(among, rows)
    if not rows.size:
        raise ConclugenError(f"{where}: no example has the label and a modality; name another target or other data")
    return rows


def with_fitting_batch(config: ConfigDict, num_examples: int, num_devices: int) -> ConfigDict:
    """Return the configuration with a batch of at most as many examples as there are, shared equally by the devices."""
    most = num_examples // num_devices * num_devices
    if not most:
        fact = f"{num_examples} labelled examples cannot be shared by {num_devices} devices"
        raise ConclugenError(f"{fact}; use fewer devices or raise config.downstream.labels_per_class")
    config = config.copy_and_resolve_references()
    config.train.batch_size = min(config.train.batch_size, most)
    config_lib.check_batches(config, num_examples=num_examples, num_devices=num_devices)
    return config

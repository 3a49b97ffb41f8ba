"""Representations, and the predictions of a downstream run, for any split of any data set, a batch at a time."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from conclugen_jax.data import batches, shards
from conclugen_jax.data import manifest as manifest_lib
from conclugen_jax.data.shards import Dataset
from conclugen_jax.data.sources import LabelSpec
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import downstream, encoder, task, weights
from conclugen_jax.method import fusion as fusion_lib
from conclugen_jax.method import model as model_lib
from conclugen_jax.run import checkpoint
from conclugen_jax.run import workdir as workdir_lib
from conclugen_jax.system import files

FUSIONS = ("none", "concat", "mean")


class Network(NamedTuple):
    """What a run has learned.

    Attributes:
      model: computes representations, or passes features on.
      variables: its parameters and feature statistics.
      modalities: that it was trained on, or that its classifier uses.
      classifier: of a downstream run, else None.
      classifier_params: its parameters.
      label: what the classifier predicts.
      threshold: probability above which a label of several is predicted.
    """

    model: model_lib.ConCluGen | encoder.RawFeatures
    variables: Mapping[str, Any]
    modalities: list[str]
    classifier: model_lib.Classifier | None = None
    classifier_params: Mapping[str, Any] | None = None
    label: LabelSpec | None = None
    threshold: float = 0.5


def load(workdir: str | Path, which: str | int = "newest") -> Network:
    """Load the network of a pretraining or downstream run.

    Args:
      workdir: of the run.
      which: ``newest``, ``best`` or a step; a downstream run has one checkpoint, of its best epoch.

    Raises:
      ConclugenError: no run there; or a downstream run whose encoder is gone or was trained further.
    """
    path = Path(workdir) / downstream.RESULT
    if not path.exists():
        model, variables, config = weights.load(workdir, which)
        return Network(model, variables, list(config.data.modalities))
    result, config = files.read_json(path, _Result, way_out="delete it and run again"), workdir_lib.read_config(workdir)
    with checkpoint.Checkpoints(workdir, read_only=True) as saved:
        tree, _ = saved.restore_tree(saved.find(which))
    config.downstream.checkpoint_step = str(result.encoder.step)
    model, variables, modalities, _, origin = encoder.from_config(config, workdir_lib.read_data(workdir))
    if result.encoder.workdir is not None and origin["sha256"] != result.encoder.sha256:
        raise ConclugenError(
            f"{workdir}: its encoder, step {result.encoder.step} of {result.encoder.workdir}, has other weights now; "
            "run it again"
        )
    if "representation" in tree["params"]:  # it was trained too
        variables = {"params": {"representation": tree["params"]["representation"]}}
        variables |= {"feature_stats": tree["feature_stats"]} if tree.get("feature_stats") else {}
    label = LabelSpec(result.kind, tuple(result.classes))
    classifier = task.create(config, label).classifier
    params = {"params": tree["params"]["classifier"]}
    return Network(model, variables, modalities, classifier, params, label, config.downstream.threshold)


class _Origin(msgspec.Struct):
    workdir: str | None
    step: int
    sha256: str


class _Result(msgspec.Struct):
    """What is read of ``result.json``."""

    kind: str
    classes: list[str]
    encoder: _Origin


def embed(
    network: Network,
    dataset: Dataset,
    split: str,
    *,
    modalities: Sequence[str] = (),
    fusion: str = "none",
    batch_size: int = 1024,
) -> Iterator[dict[str, np.ndarray]]:
    """Yield the rows of a split as vectors.

    Args:
      network: as loaded.
      dataset: has the network's modalities.
      split: of it.
      modalities: whose representations are wanted; all of the network's where empty. A classifier uses its own.
      fusion: ``none``: one vector per modality; ``concat`` (zeros where absent) or ``mean`` (over those present): one
        vector ``fused``.
      batch_size: rows at a time.

    Yields:
      Of consecutive rows: ``id`` and ``group`` (strings [n]), ``label`` [n] or [n, labels], ``present/MODALITY`` boolean
      [n], ``MODALITY`` float32 [n, R] (zeros where absent) or ``fused``; of a downstream run ``probability`` float32
      [n, classes] and ``prediction`` [n] or [n, labels], or just ``prediction`` for a number.

    Raises:
      ConclugenError: unknown names, or features of another size than the network's.
    """
    if fusion not in FUSIONS:
        raise ConclugenError(f"fusion {fusion!r} is unknown; there are {', '.join(FUSIONS)}")
    wanted = manifest_lib.choose(network.modalities, modalities or network.modalities, what="modality", where="the run")
    used = network.modalities if network.classifier is not None else wanted
    stream = shards.ShardStream(dataset, split, used)
    for m in used:
        size = network.model.feature_dims[m]
        if dataset.manifest.modalities[m] != size:
            raise ConclugenError(
                f"{dataset.path} has {dataset.manifest.modalities[m]} features of modality {m!r}, the run was trained on "
                f"{size}; use features of the same extractor"
            )
    forward = jax.jit(functools.partial(_forward, network, wanted, fusion))
    for indices, count in batches.evaluation_batches(np.arange(stream.num_examples), batch_size):
        rows = stream.rows(indices)
        ids, groups = stream.names(indices[:count])
        with jax.default_matmul_precision("highest"):
            vectors, logits = forward(network.variables, network.classifier_params, rows["features"], rows["present"])
        chunk = {"id": ids, "group": groups, "label": rows["label"][:count]}
        chunk |= {f"present/{m}": rows["present"][m][:count] for m in wanted}
        chunk |= {name: np.asarray(x)[:count] for name, x in vectors.items()}
        yield chunk | _predicted(network, logits, count)


def predictor(
    network: Network,
) -> Callable[[Mapping[str, np.ndarray], Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
    """Return a function that predicts rows in memory, compiled once for all calls with as many rows.

    Args:
      network: of a downstream run.

    Returns:
      Function of ``features``, modality -> float32 [n, dim] of all modalities of the network, anything where absent, and
      ``present``, modality -> bool [n]. It gives ``probability`` float32 [n, classes] and ``prediction`` [n] or
      [n, labels], or just ``prediction`` for a number.
    """
    forward = jax.jit(functools.partial(_forward, network, (), "none"))

    def run(features: Mapping[str, np.ndarray], present: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with jax.default_matmul_precision("highest"):
            _, logits = forward(network.variables, network.classifier_params, dict(features), dict(present))
        return _predicted(network, logits, len(next(iter(present.values()))))

    return run


def _forward(
    network: Network, wanted: Sequence[str], how: str, variables: Any, params: Any, features: Any, present: Any
) -> tuple[dict[str, jax.Array], jax.Array | None]:
    """Return the vectors of the wanted modalities, fused if asked for, and the classifier's outputs if there is one."""
    representations = network.model.apply(variables, features, method="represent")
    logits = None
    if network.classifier is not None:
        logits = network.classifier.apply(params, representations, present=present)
    if how == "none":
        return {m: jnp.where(present[m][:, None], representations[m], 0) for m in wanted}, logits
    return {"fused": fusion_lib.fuse({m: representations[m] for m in wanted}, present, how)}, logits


def _predicted(network: Network, logits: Any, count: int) -> dict[str, np.ndarray]:
    if network.classifier is None:
        return {}
    logits = np.asarray(logits)[:count]
    prediction = task.predictions(network.label, logits, network.threshold)
    if network.label.kind == "value":
        return {"prediction": prediction}
    probability = task.probabilities(network.label, logits).astype(np.float32)
    return {"probability": probability, "prediction": prediction.astype(np.int64)}

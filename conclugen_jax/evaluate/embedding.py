"""Representations, and the predictions of a downstream run, for any split of any data set, a batch at a time."""

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from conclugen_jax.data import batches, shards
from conclugen_jax.data import manifest as manifest_lib
from conclugen_jax.data.shards import Dataset
from conclugen_jax.data.sources import LabelSpec
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import downstream, encoder, probe, task
from conclugen_jax.method import fusion as fusion_lib
from conclugen_jax.method import model as model_lib
from conclugen_jax.run import checkpoint
from conclugen_jax.run import workdir as workdir_lib

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
    """The network of a pretraining or downstream run.

    Args:
      workdir: of the run.
      which: ``newest``, ``best`` or a step; a downstream run has one checkpoint, of its best epoch.

    Raises:
      ConclugenError: no run there; or a linear evaluation whose encoder is gone or was trained on.
    """
    if not (Path(workdir) / downstream.RESULT).exists():
        model, variables, config = probe.load(workdir, which)
        return Network(model.clone(axis_name=None), variables, list(config.data.modalities))
    result, config = _result(Path(workdir)), workdir_lib.read_config(workdir)
    with checkpoint.Checkpoints(workdir, read_only=True) as saved:
        tree, _ = saved.restore_tree(saved.find(which))
    origin = result["encoder"]
    if result["protocol"] == "raw_features":
        model, variables = encoder.raw_features(config, workdir_lib.read_data(workdir), result["modalities"])
    elif origin["workdir"] is None:
        manifest = workdir_lib.read_data(workdir)
        sizes = {m: manifest.modalities[m] for m in result["modalities"]}
        model = model_lib.from_config(config, sizes).clone(heads=())
    else:
        model, variables, _ = probe.load(origin["workdir"], origin["step"])
        if checkpoint.fingerprint(variables["params"]) != origin["sha256"]:
            raise ConclugenError(
                f"{workdir}: its encoder, step {origin['step']} of {origin['workdir']}, has other weights now; run it anew"
            )
    if "representation" in tree["params"]:
        variables = {"params": {"representation": tree["params"]["representation"]}}
        variables |= {"feature_stats": tree["feature_stats"]} if tree.get("feature_stats") else {}
    label = LabelSpec(result["kind"], tuple(result["classes"]))
    classifier = model_lib.Classifier(
        num_outputs=task.num_outputs(label), dropout_rate=0.0, fusion=config.downstream.fusion
    )
    params = {"params": tree["params"]["classifier"]}
    if isinstance(model, model_lib.ConCluGen):
        model = model.clone(axis_name=None)
    return Network(model, variables, result["modalities"], classifier, params, label, config.downstream.threshold)


def _result(workdir: Path) -> dict[str, Any]:
    try:
        result = json.loads((workdir / downstream.RESULT).read_text(encoding="utf-8"))
        _ = [result[key] for key in ("protocol", "kind", "classes", "modalities")], result["encoder"]["workdir"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ConclugenError(f"{workdir / downstream.RESULT}: damaged ({type(e).__name__}: {e}); run it anew") from e
    return result


def embed(
    network: Network,
    dataset: Dataset,
    split: str,
    *,
    modalities: Sequence[str] = (),
    fusion: str = "none",
    batch_size: int = 1024,
) -> Iterator[dict[str, np.ndarray]]:
    """Rows of a split as vectors.

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


def predict(
    network: Network, features: Mapping[str, np.ndarray], present: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Predictions for rows that are in memory.

    Args:
      network: of a downstream run.
      features: modality -> float32 [n, dim], of all modalities of the network; anything where absent.
      present: modality -> bool [n].

    Returns:
      ``probability`` float32 [n, classes] and ``prediction`` [n] or [n, labels], or just ``prediction`` for a number.
    """
    return predictor(network)(features, present)


def predictor(
    network: Network,
) -> Callable[[Mapping[str, np.ndarray], Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
    """:func:`predict` for one network, compiled once for all calls with as many rows."""
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
    logits = np.asarray(logits, np.float64)[:count]
    if network.label.kind == "value":
        return {"prediction": logits[:, 0].astype(np.float32)}
    if network.label.kind == "multi":
        probability = 1 / (1 + np.exp(-logits))
        prediction = (probability > network.threshold).astype(np.int64)
    else:
        probability = np.exp(logits - logits.max(axis=1, keepdims=True))
        probability /= probability.sum(axis=1, keepdims=True)
        prediction = logits.argmax(axis=1)
    return {"probability": probability.astype(np.float32), "prediction": prediction}

"""Representations, and the predictions of a downstream run, for any split of any data set, a batch at a time."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from conclugen_jax.data import batches, manifest as manifest_lib, persons as persons_lib, shards
from conclugen_jax.data.sources import LabelSpec
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import task as task_lib, weights
from conclugen_jax.method import layers, model as model_lib
from conclugen_jax.run import checkpoint, workdir as workdir_lib
from conclugen_jax.system import files

FUSIONS = ("none", "concat", "mean")


class Network(NamedTuple):
    """What a run has learned."""

    model: model_lib.ConCluGen | weights.RawFeatures  # computes representations, or passes features on
    variables: Mapping[str, Any]
    modalities: list[str]  # that it was trained on, or that its classifier uses
    task: task_lib.Task | None = None  # of a downstream run: what its classifier predicts
    classifier_params: Mapping[str, Any] | None = None
    persons: persons_lib.Persons | None = None  # by which features are standardised before they go in


_Origin = msgspec.defstruct("_Origin", [("workdir", str | None), ("step", int), ("sha256", str)])
_Result = msgspec.defstruct("_Result", [("kind", str), ("classes", list[str]), ("encoder", _Origin)])
"""What is read of ``result.json``."""


def load(workdir: str | Path, which: str | int = "newest") -> Network:
    """Load the network of a pretraining or downstream run; refuse one whose encoder is gone or was trained further.

    ``which``: ``newest``, ``best`` or a step; a downstream run has one checkpoint, of its best epoch.
    """
    path = Path(workdir) / weights.RESULT
    if not path.exists():
        model, variables, config = weights.load(workdir, which)
        by_person = weights.persons_of(workdir, variables, config)
        return Network(model, variables, list(config.data.modalities), persons=by_person)
    result, config = files.read_json(path, _Result, way_out="delete it and run again"), workdir_lib.read_config(workdir)
    with checkpoint.Checkpoints(workdir, read_only=True) as saved:
        tree, _ = saved.restore_tree(saved.find(which))
    config.downstream.checkpoint_step = str(result.encoder.step)
    found = weights.encoder(
        config, workdir_lib.read_data(workdir), lambda _: persons_lib.read(Path(workdir) / persons_lib.FILE)
    )
    model, variables, modalities, _, origin, by_person = found
    if result.encoder.workdir is not None and origin["sha256"] != result.encoder.sha256:
        encoder = f"its encoder, step {result.encoder.step} of {result.encoder.workdir}"
        raise ConclugenError(f"{workdir}: {encoder}, has other weights now; run it again")
    if "representation" in tree["params"]:  # it was trained too
        variables = {"params": {"representation": tree["params"]["representation"]}}
        variables |= {"feature_stats": tree["feature_stats"]} if tree.get("feature_stats") else {}
    predicts = task_lib.create(config, LabelSpec(result.kind, tuple(result.classes)))
    return Network(model, variables, modalities, predicts, {"classifier": tree["params"]["classifier"]}, by_person)


def embed(
    network: Network,
    dataset: shards.Dataset,
    split: str,
    *,
    modalities: Sequence[str] = (),
    fusion: str = "none",
    batch_size: int = 1024,
) -> Iterator[dict[str, np.ndarray]]:
    """Yield the rows of a split of a data set that has the network's modalities as vectors, ``batch_size`` at a time.

    ``modalities``: whose representations are wanted; all of the network's where empty; a classifier uses its own.
    ``fusion``: ``none``: one vector per modality; ``concat`` (zeros where absent) or ``mean`` (over those present): one
    vector ``fused``.

    Yields:
      Of consecutive rows: ``id`` and ``group`` (strings [n]), ``label`` [n] or [n, labels], ``present/MODALITY`` boolean
      [n], ``MODALITY`` float32 [n, R] (zeros where absent) or ``fused``; of a downstream run ``probability`` float32
      [n, classes] and ``prediction`` [n] or [n, labels], or just ``prediction`` for a number.

    Unknown names, and features of another size than the network's, are refused.
    """
    if fusion not in FUSIONS:
        raise ConclugenError(f"fusion {fusion!r} is unknown; there are {', '.join(FUSIONS)}")
    wanted = manifest_lib.choose(network.modalities, modalities or network.modalities, what="modality", where="the run")
    used = network.modalities if network.task is not None else wanted
    stream = shards.ShardStream(dataset, split, used)
    sizes = {m: network.model.feature_dims[m] for m in used}
    weights.check_features(dataset.manifest, sizes, str(dataset.path), "the run")
    if network.persons:
        network.persons.attach(stream)
    compute = computing(network, wanted, fusion)
    for indices, count in batches.evaluation_batches(np.arange(stream.num_examples), batch_size):
        rows = stream.rows(indices)
        ids, groups = stream.names(indices[:count])
        chunk = {"label": rows["label"], **{f"present/{m}": rows["present"][m] for m in wanted}}
        chunk |= compute(rows["features"], rows["present"])
        yield {"id": ids, "group": groups, **{name: x[:count] for name, x in chunk.items()}}


def computing(network: Network, wanted: Sequence[str] = (), how: str = "none") -> Callable[..., dict[str, np.ndarray]]:
    """Return a function of rows in memory, compiled once for all calls with as many rows.

    It takes modality -> float32 [n, dim] of all modalities of the network, anything where absent, and modality -> bool [n]; it
    gives the vectors of the ``wanted`` modalities, fused if asked for, and predictions if there is a classifier, as
    :func:`embed` does.
    """
    task = network.task

    @jax.jit
    def forward(variables: Any, params: Any, features: Any, present: Any) -> tuple[dict[str, jax.Array], Any]:
        found = network.model.apply(variables, features, method="represent")
        logits = task and task.logits(params, {}, {"features": found, "present": present})
        if how == "none":
            return {m: jnp.where(present[m][:, None], found[m], 0) for m in wanted}, logits
        return {"fused": layers.fuse({m: found[m] for m in wanted}, present, how)}, logits

    def compute(features: Mapping[str, np.ndarray], present: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with jax.default_matmul_precision("highest"):
            vectors, logits = forward(network.variables, network.classifier_params, dict(features), dict(present))
        found = {name: np.asarray(x) for name, x in vectors.items()}
        if task is None:
            return found
        predictions = task.predictions(np.asarray(logits))
        if task.label.kind == "value":
            return found | {"prediction": predictions}
        probabilities = task.probabilities(logits).astype(np.float32)
        return found | {"probability": probabilities, "prediction": predictions.astype(np.int64)}

    return compute


def write(rows: Iterable[dict[str, np.ndarray]], output: Path) -> int:
    """Write rows of :func:`embed` to ``NAME.npz`` (put together in memory) or ``NAME.parquet`` (batch by batch).

    The file is whole or not there. Returns the number of rows.
    """
    rows = iter(rows)
    rows = itertools.chain([next(rows)], rows)  # what is wrong with them shows before a folder is made
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with files.replaced(output) as scratch:
            return WRITERS[output.suffix](rows, scratch)
    except OSError as e:
        fact = f"cannot be written ({e.strerror or e})"
        raise ConclugenError(f"--output={output}: {fact}; free space or choose another file") from e


def _write_npz(rows: Iterable[dict[str, Any]], path: Path) -> int:
    chunks = list(rows)
    np.savez(path, **{name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]})
    return sum(len(chunk["id"]) for chunk in chunks)


def _write_parquet(rows: Iterable[dict[str, Any]], path: Path) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    count = 0
    with contextlib.ExitStack() as stack:
        for chunk in rows:
            table = pa.table({name: pa.array(list(x) if x.ndim > 1 else x) for name, x in chunk.items()})
            if not count:
                writer = stack.enter_context(pq.ParquetWriter(path, table.schema))
            writer.write_table(table)
            count += len(table)
    return count


WRITERS = {".npz": _write_npz, ".parquet": _write_parquet}

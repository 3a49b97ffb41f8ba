"""Representations, and the predictions of a downstream run, for any split of any data set, a batch at a time."""

import contextlib
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import msgspec
import numpy as np
from ml_collections import ConfigDict

from conclugen_jax.data import batches, manifest as manifest_lib, persons as persons_lib, shards
from conclugen_jax.data.sources import LabelSpec
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import bank as bank_lib, splits, task as task_lib, weights
from conclugen_jax.method import model as model_lib
from conclugen_jax.run import checkpoint, workdir as workdir_lib
from conclugen_jax.run.config import FROZEN
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
    config: ConfigDict | None = None  # of the run
    evaluation: ConfigDict | None = None  # section of a configuration: how vectors are smoothed


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
        how = {"persons": by_person, "config": config, "evaluation": config.evaluation}
        return Network(model, variables, list(config.data.modalities), **how)
    result, config = files.read_json(path, _Result, way_out="delete it and run again"), workdir_lib.read_config(workdir)
    with checkpoint.Checkpoints(workdir, read_only=True) as saved:
        tree, _ = saved.restore_tree(saved.find(which))
    config.downstream.checkpoint_step = str(result.encoder.step)
    found = weights.encoder(
        config, workdir_lib.read_data(workdir), lambda _: persons_lib.read(Path(workdir) / persons_lib.FILE)
    )
    model, variables, modalities, _, origin, by_person, evaluation = found
    if result.encoder.workdir is not None and origin["sha256"] != result.encoder.sha256:
        encoder = f"its encoder, step {result.encoder.step} of {result.encoder.workdir}"
        raise ConclugenError(f"{workdir}: {encoder}, has other weights now; run it again")
    if "representation" in tree["params"]:  # it was trained too
        variables = {"params": {"representation": tree["params"]["representation"]}}
        variables |= {"feature_stats": tree["feature_stats"]} if tree.get("feature_stats") else {}
    predicts = task_lib.create(config, LabelSpec(result.kind, tuple(result.classes)))
    classifier = {"classifier": tree["params"]["classifier"]}
    return Network(model, variables, modalities, predicts, classifier, by_person, config, evaluation)


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
    compute, own = Computing(network, wanted, fusion), np.full(stream.num_examples, bank_lib.NONE)
    if compute.banks and (dataset.manifest.fingerprint(), split) == compute.source:
        own[compute.members] = np.arange(len(compute.members))
    if compute.banks and network.evaluation.transductive:
        batch_size = stream.num_examples  # all rows of the split may be neighbours, and no copy of one
    for indices, count in batches.evaluation_batches(np.arange(stream.num_examples), batch_size):
        rows = stream.rows(indices)
        ids, groups = stream.names(indices[:count])
        chunk = {"label": rows["label"], **{f"present/{m}": rows["present"][m] for m in wanted}}
        chunk |= compute(rows["features"], rows["present"], own[indices] if (own >= 0).any() else None)
        yield {"id": ids, "group": groups, **{name: x[:count] for name, x in chunk.items()}}


class Computing:
    """A function of rows in memory, compiled once for all calls with as many rows.

    It takes modality -> float32 [n, dim] of all modalities of the network, anything where absent, and modality -> bool [n]; it
    gives the vectors of the ``wanted`` modalities, fused if asked for, and predictions if there is a classifier, as
    :func:`embed` does. Where the run smooths its vectors, it reads the run's training rows first.
    """

    def __init__(self, network: Network, wanted: Sequence[str] = (), how: str = "none"):
        self._network, self._wanted, self._how = network, wanted, how
        self._represent = jax.jit(functools.partial(network.model.apply, method="represent"))
        self._logits = jax.jit(lambda params, batch: network.task.logits(params, {}, batch))
        self.banks: dict[str, bank_lib.Bank] = {}  # of each vector, and of those joined for the classifier
        frozen = network.task is None or network.config.downstream.protocol in FROZEN
        if frozen and network.evaluation.smoothing_neighbours:
            self._read_banks()

    def _read_banks(self) -> None:
        network, config = self._network, self._network.config
        dataset = shards.open_dataset(config.data.path, verify="size")
        if network.task is None:
            train = shards.ShardStream(dataset, config.data.train_split, network.modalities)
        else:
            train = splits.open_streams(config, dataset, network.modalities)["train"]
        if network.persons:
            network.persons.attach(train)
        if network.task is None:
            rows, members = train, train.usable
        else:
            loaded, members = splits.load(config, {"train": train})
            rows = loaded["train"]
        parts = []
        for at in np.split(members, range(batches.CHUNK_ROWS, len(members), batches.CHUNK_ROWS)):
            chunk = rows.rows(at)
            parts.append(self._vectors(chunk["features"], chunk["present"]))
        vectors = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        self.banks = {name: bank_lib.create(x, network.evaluation) for name, x in vectors.items()}
        self.source, self.members = (dataset.manifest.fingerprint(), train.split), members

    def _vectors(self, features: Mapping[str, np.ndarray], present: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the wanted vectors by name, and for a classifier those of all its modalities joined."""
        with jax.default_matmul_precision("highest"):
            found = jax.device_get(self._represent(self._network.variables, dict(features)))
        if self._how == "none":
            vectors = {m: np.where(present[m][:, None], found[m], 0) for m in self._wanted}
        else:
            vectors = {"fused": bank_lib.fuse({m: found[m] for m in self._wanted}, present, self._how)}
        if self._network.task is not None:
            fusion = self._network.config.downstream.fusion
            vectors[bank_lib.JOINED] = bank_lib.fuse(found, present, fusion)
        return vectors

    def __call__(
        self, features: Mapping[str, np.ndarray], present: Mapping[str, np.ndarray], own: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Return vectors and predictions; ``own``: the row of the bank that each row is itself, below 0 for none."""
        found, task = self._vectors(features, present), self._network.task
        found = {name: self.banks[name].smoothed(x, own) if self.banks else x for name, x in found.items()}
        if task is None:
            return found
        joined = {bank_lib.JOINED: found.pop(bank_lib.JOINED)}
        there = {bank_lib.JOINED: np.any(list(present.values()), axis=0)}
        with jax.default_matmul_precision("highest"):
            logits = self._logits(self._network.classifier_params, {"features": joined, "present": there})
        predictions = task.predictions(np.asarray(logits))
        if task.label.kind == "value":
            return found | {"prediction": predictions}
        probabilities = task.probabilities(logits).astype(np.float32)
        return found | {"probability": probabilities, "prediction": predictions.astype(np.int64)}


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

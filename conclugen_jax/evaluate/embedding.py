"""Representations, and the predictions of a downstream run, for any split of any data set, a batch at a time."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from conclugen_jax.runs import checkpoint, workdir as workdir_lib
from conclugen_jax.runs.config import FROZEN
from conclugen_jax.system import files, processes
from conclugen_jax.train import parallel

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
    rows: bank_lib.TrainingRows | None = None  # that came with an export; ``None``: they are read from the data set


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
        if (stored := Path(workdir) / bank_lib.FILE).exists():
            whose = workdir_lib.read_data(workdir), config.data.train_split
            how["rows"] = bank_lib.read(stored, model.vector_dims, *whose, way_out="import the export again")
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

    All devices share a batch, those of other processes too, which must make the same call and get the same rows.

    ``modalities``: whose representations are wanted; all of the network's where empty; a classifier uses its own.
    ``fusion``: ``none``: one vector per modality; ``concat`` (zeros where absent) or ``mean`` (over those present): one
    vector ``fused``.

    Yields:
      Of consecutive rows: ``id`` and ``group`` (strings [n]), ``label`` [n] or [n, labels], ``present/MODALITY`` boolean
      [n], ``MODALITY`` float32 [n, R] (zeros where absent) or ``fused``; of a downstream run ``probability`` float32
      [n, classes] and ``prediction`` [n] or [n, labels], or just ``prediction`` for a number.

    Vectors that are smoothed are so by the run's training rows; of these, each without itself. Rows of other splits are
    neighbours of each other too where the run is transductive.

    Unknown names, and features of another size than the network's, are refused.
    """
    if fusion not in FUSIONS:
        raise ConclugenError(f"fusion {fusion!r} is unknown; there are {', '.join(FUSIONS)}")
    wanted = manifest_lib.choose(network.modalities, modalities or network.modalities, what="modality", where="the run")
    used = network.modalities if network.task is not None else wanted
    if fusion == "mean":
        weights.check_mean({m: network.model.vector_dims[m] for m in wanted}, "fusion is 'mean'")
    stream = shards.ShardStream(dataset, split, used)
    sizes = {m: network.model.feature_dims[m] for m in used}
    weights.check_features(dataset.manifest, sizes, str(dataset.path), "the run")
    if network.persons:
        network.persons.attach(stream)
    compute = Computing(network, wanted, fusion)
    own = compute.places(stream, dataset.manifest.fingerprint())

    def chunk_of(indices: np.ndarray) -> dict[str, np.ndarray]:
        rows = stream.rows(indices)
        chunk = {"label": rows["label"], **{f"present/{m}": rows["present"][m] for m in wanted}}
        chunk |= compute(rows["features"], rows["present"], own[indices])
        names[:] = chunk
        return chunk

    names: list[str] = []  # of the columns, in their order, which a tree does not keep
    for indices, count in batches.evaluation_batches(np.arange(stream.num_examples), batch_size):
        ids, groups = stream.names(indices[:count])
        chunk = processes.shared(chunk_of, indices)
        yield {"id": ids, "group": groups, **{name: chunk[name][:count] for name in names}}


Represent = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


def compiled(network: Network) -> Represent:
    """Return the function features -> vectors of a network: modality -> [n, dim] of all its modalities -> float32 [n, R]."""
    represent = jax.jit(functools.partial(network.model.apply, method="represent"))
    variables = parallel.replicate(network.variables, jax.local_devices())

    def call(features: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with jax.default_matmul_precision("highest"):  # a GPU would round float32 products to TensorFloat-32
            found = parallel.by_rows(functools.partial(represent, variables), dict(features))
        return {m: x.astype(np.float32, copy=False) for m, x in found.items()}

    return call


def training_rows(network: Network, represent: Represent | None = None) -> bank_lib.TrainingRows:
    """Compute the vectors of a run's training rows, of which its banks are made, from its data set.

    ``represent``: :func:`compiled` of the network, if it exists already. Rows that came with an export are returned as such.

    Raises:
      ConclugenError: the data set is not where the configuration says.
    """
    if network.rows is not None:
        return network.rows
    config = network.config
    if not config.data.path:
        fact = "vectors of this run are averaged with its training rows, which are not here"
        raise ConclugenError(f"{fact}; import it with --data, or ask for an export made with --bank")
    dataset = shards.open_dataset(config.data.path, verify="size")
    if network.task is None:
        train = shards.ShardStream(dataset, config.data.train_split, network.modalities)
    else:
        train = splits.open_streams(config, dataset, network.modalities)["train"]
    if network.persons:
        network.persons.attach(train)
    rows, members = train, train.usable
    if network.task is not None:
        loaded, members = splits.load(config, {"train": train})
        rows = loaded["train"]
    found = _represented(represent or compiled(network), rows, members)
    return bank_lib.TrainingRows(*found, members, (dataset.manifest.fingerprint(), train.split))


def _represented(
    represent: Represent, rows: shards.RowSource, members: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return vectors and presence of some rows by modality."""

    def chunk_of(at: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        chunk = rows.rows(at)
        return represent(chunk["features"]), chunk["present"]

    chunks = np.split(members, range(batches.CHUNK_ROWS, len(members), batches.CHUNK_ROWS))
    parts = [processes.shared(chunk_of, at) for at in chunks]
    return tuple({m: np.concatenate([part[i][m] for part in parts]) for m in parts[0][0]} for i in (0, 1))


class Computing:
    """A function of rows in memory, compiled once for all calls with as many rows.

    It takes modality -> float32 [n, dim] of all modalities of the network, anything where absent, and modality -> bool [n]; it
    gives the vectors of the ``wanted`` modalities, fused if asked for, and predictions if there is a classifier, as
    :func:`embed` does. Where the run smooths its vectors, it reads the run's training rows first.
    """

    def __init__(self, network: Network, wanted: Sequence[str] = (), how: str = "none"):
        self._network, self._wanted, self._how = network, wanted, how
        self._represent = compiled(network)
        self._logits = jax.jit(lambda params, batch: network.task.logits(params, {}, batch))
        self._banks: dict[str, bank_lib.Bank] = {}  # of each vector, and of those joined for the classifier
        self._places: dict[str, np.ndarray] = {}  # the row of each of these that a training row is
        frozen = network.task is None or network.config.downstream.protocol in FROZEN
        self._rows = None
        if frozen and network.evaluation.smoothing_neighbours:
            found = training_rows(network, self._represent)
            for name, (x, there) in self._named(found.vectors, found.present).items():
                self._places[name] = _numbered(there, 0)
                if there.any():
                    self._banks[name] = bank_lib.create(x[there], network.evaluation)
            self._rows = found.source, found.members

    def places(self, stream: shards.ShardStream, data: str) -> np.ndarray:
        """Return which row of the banks each row of a split is, NONE for none; ``data``: fingerprint of its data set.

        Rows of a split without training rows are put into the banks where the run is transductive.
        """
        own = np.full(stream.num_examples, bank_lib.NONE)
        if self._rows is None:
            return own
        source, members = self._rows
        if (data, stream.split) == source:
            own[members] = np.arange(len(members))
        elif self._network.evaluation.transductive:
            own[stream.usable] = len(members) + np.arange(len(stream.usable))
            found = _represented(self._represent, stream, stream.usable)
            for name, (x, there) in self._named(*found).items():
                if name in self._banks:
                    self._banks[name] = self._banks[name].widened(x[there])
                self._places[name] = np.concatenate(
                    [self._places[name], _numbered(there, self._places[name].max() + 1)]
                )
        return own

    def _named(
        self, found: Mapping[str, np.ndarray], present: Mapping[str, np.ndarray]
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return the wanted vectors by name, and for a classifier those of all its modalities joined; and who has them."""
        of = {m: (np.where(present[m][:, None], found[m], 0), present[m]) for m in self._wanted}
        if self._how != "none":
            there = np.any([present[m] for m in self._wanted], axis=0)
            of = {"fused": (bank_lib.fuse({m: found[m] for m in self._wanted}, present, self._how), there)}
        if self._network.task is not None:
            joined = bank_lib.fuse(found, present, self._network.config.downstream.fusion)
            of[bank_lib.JOINED] = joined, np.any(list(present.values()), axis=0)
        return of

    def __call__(
        self, features: Mapping[str, np.ndarray], present: Mapping[str, np.ndarray], own: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Return vectors and predictions; ``own``: what :meth:`places` says of each row, ``None``: all are in no bank."""
        own = np.full(len(next(iter(present.values()))), bank_lib.NONE) if own is None else own
        named, task, found = self._named(self._represent(features), present), self._network.task, {}
        for name, (x, there) in named.items():
            found[name] = x
            if name in self._banks:
                at = np.where(own >= 0, self._places[name][own], bank_lib.NONE)
                found[name] = np.where(there[:, None], self._banks[name].smoothed(x, at), 0)
        if task is None:
            return found
        joined, there = {bank_lib.JOINED: found.pop(bank_lib.JOINED)}, {bank_lib.JOINED: named[bank_lib.JOINED][1]}
        with jax.default_matmul_precision("highest"):
            logits = self._logits(self._network.classifier_params, {"features": joined, "present": there})
        predictions = task.predictions(np.asarray(logits))
        if task.label.kind == "value":
            return found | {"prediction": predictions}
        probabilities = task.probabilities(logits).astype(np.float32)
        return found | {"probability": probabilities, "prediction": predictions.astype(np.int64)}


def _numbered(there: np.ndarray, first: int) -> np.ndarray:
    """Count those that are there from a first number on; NONE for the others."""
    return np.where(there, first + np.cumsum(there) - 1, bank_lib.NONE)


def write(rows: Iterable[dict[str, np.ndarray]], output: Path) -> int:
    """Write rows of :func:`embed` to ``NAME.npz`` (put together in memory) or ``NAME.parquet`` (batch by batch).

    The file is whole or not there; of several processes process 0 writes it. Returns the number of rows.
    """
    if not processes.is_main():
        return sum(len(chunk["id"]) for chunk in rows)
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

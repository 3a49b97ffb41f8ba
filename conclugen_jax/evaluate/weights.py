"""Networks of runs: where their weights come from; the representations and clusters that they make of rows."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax
import numpy as np
from ml_collections import ConfigDict

from conclugen_jax.data import batches, manifest as manifest_lib, persons as persons_lib, shards
from conclugen_jax.data.manifest import Manifest
from conclugen_jax.data.persons import Persons
from conclugen_jax.data.sources import LabelSpec
from conclugen_jax.errors import ConclugenError
from conclugen_jax.method import clustering, layers, model as model_lib
from conclugen_jax.method.model import ConCluGen
from conclugen_jax.runs import checkpoint, workdir as workdir_lib
from conclugen_jax.runs.config import FROZEN, PRETRAINED
from conclugen_jax.runs.layout import RESULT
from conclugen_jax.system import processes
from conclugen_jax.train import parallel


def load(workdir: str | Path, which: str | int = "newest") -> tuple[ConCluGen, dict[str, Any], ConfigDict]:
    """Load the network of a pretraining run, of its ``newest`` or ``best`` checkpoint or that of a step.

    Returns (model, variables, config): ``model.apply(variables, features)`` runs all heads, ``model.apply(variables,
    features, method="represent")`` the representations alone. Standardisation, if the run used it, is part of the model:
    features go in raw.

    Refused are folders without a pretraining run or checkpoint, and checkpoints that do not fit their own configuration.
    """
    return restore(workdir, which)[:3]


def restore(workdir: str | Path, which: str | int) -> tuple[ConCluGen, dict[str, Any], ConfigDict, np.ndarray]:
    """Return what :func:`load` does and the centroids [K, K] of the last k-means, zeros before the first."""
    config, manifest = workdir_lib.read_config(workdir), workdir_lib.read_data(workdir)
    with _checkpoints(workdir) as saved:
        model, template = network(config, manifest, where=f"{workdir}, which is no pretraining run: its data")
        step = saved.find(which)
        tree, _ = saved.restore_tree(step)
    found = {name: tree.get(name, {}) for name in template}
    variables = checkpoint.from_tree(found, template, source=f"{workdir} step {step}")
    return model, variables, config, tree.get("centroids", np.zeros(0))


def find_step(workdir: str | Path, which: str | int) -> int:
    """Return the step of the ``newest`` or ``best`` checkpoint of a pretraining run, or of the one named."""
    with _checkpoints(workdir) as saved:
        return saved.find(which)


def _checkpoints(workdir: str | Path) -> checkpoint.Checkpoints:
    if Path(workdir, RESULT).exists():
        raise ConclugenError(f"{workdir}: a downstream run; name the pretraining run whose weights are wanted")
    return checkpoint.Checkpoints(workdir, read_only=True)


def network(config: ConfigDict, manifest: Manifest, *, where: str) -> tuple[ConCluGen, dict[str, Any]]:
    """Return the network of a configuration, and the shapes and types of its variables; ``where`` names the data."""
    names = manifest_lib.choose(manifest.modalities, config.data.modalities, what="modality", where=where)
    model = model_lib.from_config(config, {m: manifest.modalities[m] for m in names})
    by_person = persons_lib.unfitted(manifest, config, names) if by_persons(config) else None
    return model, jax.eval_shape(functools.partial(initial, model, 0, manifest, by_person))


def initial(model: ConCluGen, seed: int, manifest: Manifest, persons: Persons | None) -> dict[str, Any]:
    """Return the variables that a run starts from, by its seed, with the statistics of its data."""
    key, _ = jax.random.split(jax.random.key(seed))
    return model_lib.initial_variables(model, key, persons_lib.feature_stats(manifest, persons))


def untrained(config: ConfigDict, workdir: str | Path) -> tuple[ConCluGen, dict[str, Any]]:
    """Return (model, variables) of a run as before its first step: same sizes, same seed, same standardisation."""
    manifest = workdir_lib.read_data(workdir)
    model, _ = network(config, manifest, where=f"{workdir}: its data")
    persons = persons_of(workdir, load(workdir)[1], config) if by_persons(config) else None
    return model, initial(model, config.seed, manifest, persons)


def by_persons(config: ConfigDict) -> bool:
    """Return whether features are standardised by person."""
    return config.data.standardize == "person"


def persons_of(workdir: str | Path, variables: Mapping[str, Any], config: ConfigDict) -> Persons | None:
    """Return the statistics by which a run standardises persons; ``None`` if it does not."""
    if not by_persons(config):
        return None
    path = Path(workdir) / persons_lib.FILE
    return persons_lib.read(path) if path.exists() else persons_lib.of_checkpoint(variables["feature_stats"], config)


def label_of(workdir: str | Path) -> LabelSpec:
    """Return what the labels of the run's data set are."""
    return workdir_lib.read_data(workdir).label


@dataclasses.dataclass(frozen=True)
class RawFeatures:
    """Takes the place of the network and passes features on, standardised if ``variables`` holds their statistics."""

    feature_dims: Mapping[str, int]
    vectors = "features"

    @property
    def vector_dims(self) -> Mapping[str, int]:
        """Modality -> size of what :meth:`apply` gives."""
        return self.feature_dims

    def apply(self, variables: Mapping[str, Any], features: Mapping[str, jax.Array], *, method: str) -> dict[str, Any]:
        """Return modality -> [n, feature_dims[m]] of the same."""
        stats = variables["feature_stats"]
        if not stats:
            return dict(features)
        return {m: (x - stats[m]["mean"][None, :]) / stats[m]["scale"][None, :] for m, x in features.items()}


class Encoder(NamedTuple):
    """The representation network of a downstream run: its parameters and feature statistics, the modalities that are used.

    ``dims``: modality -> size of its representation. ``origin``: where the weights come from, for the result.
    """

    model: ConCluGen | RawFeatures
    variables: dict[str, Any]
    modalities: list[str]
    dims: dict[str, int]
    origin: dict[str, Any]
    persons: Persons | None = None  # by which features are standardised before they go in
    evaluation: ConfigDict | None = None  # section of a configuration: how vectors are smoothed


def encoder(config: ConfigDict, manifest: Manifest, fit: Callable[[list[str]], Persons] | None = None) -> Encoder:
    """Make the encoder of ``config.downstream.protocol``; this says where its weights come from.

    ``fit``, modalities -> statistics by person of the training split, is called if no checkpoint has them.

    1. ``linear_evaluation``, ``fine_tuning``: the named pretraining checkpoint.
    2. ``supervised``, ``untrained``: random, by the seed, at the sizes of the configuration.
    3. ``raw_features``: there are none; the features themselves are used.
    """
    made, protocol = _encoder(config, manifest, fit), config.downstream.protocol
    if protocol not in FROZEN and made.model.vectors == "projection":
        fact = f"config.downstream.protocol is {protocol!r}, but config.evaluation.vectors is 'projection'"
        raise ConclugenError(
            f"{fact}, which such a run does not train; use linear_evaluation, or a run of other vectors"
        )
    if config.downstream.fusion == "mean":
        check_mean(made.dims, "config.downstream.fusion is 'mean'")
    return made


def check_mean(dims: Mapping[str, int], asked: str) -> None:
    """Refuse the mean of the vectors of modalities, modality -> size, where sizes differ; ``asked`` begins the sentence."""
    if len(set(dims.values())) > 1:
        sizes = ", ".join(f"{m} {dim}" for m, dim in sorted(dims.items()))
        raise ConclugenError(
            f"{asked}, but vectors of modalities have different sizes ({sizes}); join them by 'concat'"
        )


def _encoder(config: ConfigDict, manifest: Manifest, fit: Callable[[list[str]], Persons] | None) -> Encoder:
    section, where, asked = config.downstream, f"data set {config.data.path}", config.downstream.modalities
    if section.protocol in PRETRAINED:
        return _of_checkpoint(config, manifest, where)
    names = manifest_lib.choose(manifest.modalities, asked or config.data.modalities, what="modality", where=where)
    sizes = {m: manifest.modalities[m] for m in names}
    persons = fit(names) if by_persons(config) else None
    if section.protocol == "raw_features":
        of_modality = persons_lib.feature_stats(manifest, persons)
        stats = {m: of_modality(m) for m in names} if config.data.standardize != "none" else {}
        model, variables, dims = RawFeatures(sizes), {"params": {}, "feature_stats": stats}, sizes
    else:
        model = model_lib.from_config(config, sizes).clone(heads=())
        variables, dims = initial(model, config.seed, manifest, persons), {m: model.vector_dims[m] for m in names}
    origin = {"workdir": None, "step": 0, "seed": config.seed, "sha256": checkpoint.fingerprint(variables["params"])}
    return Encoder(model, variables, names, dims, origin, persons, config.evaluation)


def _of_checkpoint(config: ConfigDict, manifest: Manifest, where: str) -> Encoder:
    source, asked = config.downstream.checkpoint, config.downstream.modalities
    if not source:
        way_out = "name a pretraining run, or train without one by config.downstream.protocol=supervised"
        raise ConclugenError(f"config.downstream.checkpoint is empty; {way_out}")
    step, run = find_step(source, config.downstream.checkpoint_step), f"checkpoint {source}"
    model, variables, trained = load(source, step)
    evaluation = config.evaluation if config.downstream.evaluation == "own" else trained.evaluation
    if evaluation.vectors == "projection" and "projection" not in model.heads:
        raise ConclugenError(f"config.evaluation.vectors is 'projection', but {run} has none; choose other vectors")
    model = model.clone(dtype=model_lib.DTYPES[config.precision], vectors=evaluation.vectors)
    names = manifest_lib.choose(model.feature_dims, asked or model.feature_dims, what="modality", where=run)
    check_features(manifest, {m: model.feature_dims[m] for m in names}, where, run)
    if spare := set(names) - set(config.data.modalities):
        fact = f"config.data.modalities omits {min(spare)!r}, which {run} has"
        raise ConclugenError(f"{fact}; choose modalities of a checkpoint by config.downstream.modalities")
    facts = {"step": step, "seed": trained.seed, "sha256": checkpoint.fingerprint(variables["params"])}
    dims, origin = {m: model.vector_dims[m] for m in names}, {"workdir": source, **facts}
    return Encoder(model, variables, names, dims, origin, persons_of(source, variables, trained), evaluation)


def check_features(manifest: Manifest, sizes: Mapping[str, int], where: str, trained: str) -> None:
    """Refuse data (``where``) without a modality of a network (``trained``), or with features of another size than its own."""
    for m in manifest_lib.choose(manifest.modalities, sizes, what="modality", where=where):
        if manifest.modalities[m] != sizes[m]:
            fact = f"{where} has {manifest.modalities[m]} features of modality {m!r}"
            raise ConclugenError(f"{fact}, {trained} was trained on {sizes[m]}; use features of the same extractor")


def represent(
    model: ConCluGen, variables: Mapping[str, Any], features: Mapping[str, np.ndarray], *, batch_size: int = 1024
) -> dict[str, np.ndarray]:
    """Compute the representations of any rows, ``batch_size`` at a time, by a network as :func:`load` returns it.

    All devices share a batch, those of other processes too, which must make the same call.

    ``features``: modality -> [n, dim] raw features; any of the model's modalities, the same rows in each. Where a row lacks
    a modality put zeros, and ignore its representation afterwards (:func:`concatenated` does).

    Returns modality -> float32 [n, representation_dim].

    Raises:
      ValueError: a modality that the model does not know, features of another size, or no rows.
    """
    lengths = {m: len(x) for m, x in features.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise ValueError(f"represent needs one or more modalities with the same rows, at least one, got rows {lengths}")
    alone = model.clone(axis_name=None, feature_dims=flax.core.FrozenDict(model.feature_dims))  # which can be hashed
    variables = parallel.replicate(variables, jax.local_devices())
    rows = {m: np.asarray(x, np.float32) for m, x in features.items()}
    with jax.default_matmul_precision("highest"):  # a GPU would round float32 products to TensorFloat-32
        outputs = in_batches(functools.partial(_forward, alone, variables), rows, batch_size)
    return {m: x.astype(np.float32, copy=False) for m, x in outputs.items()}


# Compiled with the variables as an argument: as constants they would be copied into the program.
_forward = jax.jit(lambda model, variables, rows: model.apply(variables, rows, method="represent"), static_argnums=0)


def in_batches(forward: Callable[[Any], Any], rows: Any, batch_size: int) -> Any:
    """Return ``forward``, compiled, of a tree of arrays [n, ...], a batch at a time, which all devices and processes share."""

    def of(indices: np.ndarray) -> Any:
        return parallel.by_rows(forward, jax.tree.map(lambda x: x[indices], rows))

    parts, num_rows = [], len(jax.tree.leaves(rows)[0])
    for indices, count in batches.evaluation_batches(np.arange(num_rows), min(batch_size, num_rows)):
        parts.append(jax.tree.map(lambda x, count=count: x[:count], processes.shared(of, indices)))
    return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)


def concatenated(vectors: Mapping[str, np.ndarray], present: Mapping[str, np.ndarray]) -> np.ndarray:
    """Join all modalities in the order of their names, with zeros where absent: [n, sum of dims]."""
    return layers.fuse(vectors, present, "concat", xp=np)


@dataclasses.dataclass(frozen=True)
class Split:
    """A split as a run sees it; representations of absent rows mean nothing."""

    features: dict[str, np.ndarray]  # modality -> [n, dim]
    present: dict[str, np.ndarray]  # modality -> boolean [n]
    label: np.ndarray  # [n] or [n, labels]
    names: tuple[str, ...]  # of the classes
    representations: dict[str, np.ndarray]  # modality -> [n, R]
    clusters: np.ndarray  # [n], nearest centroid of the run's last k-means; empty where it has none

    def fused(self, modalities: Sequence[str] = (), *, raw: bool = False) -> np.ndarray:
        """Join the representations (or raw features) of some or all modalities, with zeros where absent: [n, dims]."""
        vectors = self.features if raw else self.representations
        return concatenated({m: vectors[m] for m in modalities or vectors}, self.present)


def represent_split(workdir: str | Path, split: str, **options: Any) -> Split:
    """Return one split as :func:`represent_splits` does."""
    return represent_splits(workdir, [split], **options)[0]


def represent_splits(
    workdir: str | Path,
    splits: Sequence[str],
    *,
    which: str | int = "newest",
    data: str | Path | None = None,
    vectors: str = "",
    strangers: bool = False,
) -> list[Split]:
    """Read splits of a data set, and compute a pretraining run's representations and clusters of them.

    ``which``: checkpoint, see :func:`load`. ``data``: folder of a data set with the run's modalities; ``None``: the run's own.
    ``vectors``: one of ``model.VECTORS``; empty: as the run's configuration says. ``strangers``: persons of the same names as
    those of the run are others.
    """
    model, *others = restore(workdir, which)
    restored = model.clone(vectors=vectors or model.vectors), *others
    modalities = restored[2].data.modalities
    dataset = shards.open_dataset(data or restored[2].data.path)
    streams = [shards.ShardStream(dataset, split, modalities) for split in splits]
    if persons := persons_of(workdir, restored[1], restored[2]):
        for stream in streams:
            (dataclasses.replace(persons, data="") if strangers else persons).attach(stream)
    tables = [batches.load(stream, tier="host").table for stream in streams]
    return [_represented(restored, table, dataset.manifest.label.names) for table in tables]


def represent_rows(
    workdir: str | Path, rows: Mapping[str, Any], names: Sequence[str], *, which: str | int = "newest"
) -> Split:
    """Compute a pretraining run's representations and clusters of rows of a data set whose classes have these names.

    ``rows``: ``features``, ``present``, ``label``, see :class:`Split`, ``group`` [n] and the name of the ``data`` set.
    ``which``: checkpoint, see :func:`load`.
    """
    restored = restore(workdir, which)
    if persons := persons_of(workdir, restored[1], restored[2]):
        by_person = persons.applied(rows["features"], rows["present"], rows["group"], data=rows["data"])
        rows = {**rows, "features": by_person}
    return _represented(restored, rows, names)


def _represented(restored: tuple, rows: Mapping[str, Any], names: Sequence[str]) -> Split:
    features, present = rows["features"], rows["present"]
    clusters = _clusters(*restored, features, present)
    return Split(features, present, rows["label"], tuple(names), represent(*restored[:2], features), clusters)


def _clusters(model: ConCluGen, variables: Any, config: ConfigDict, centroids: np.ndarray, features: Any, present: Any):
    if "clustering" not in model.heads or not centroids.any():
        return np.zeros(0, np.int32)
    apply = model.clone(axis_name=None).apply

    @jax.jit
    def nearest(variables: Any, batch: Any) -> jax.Array:
        fused = layers.fuse(apply(variables, batch["features"]).cluster_logits, batch["present"], "mean")
        return clustering.nearest(fused, centroids, metric=config.clustering.metric)

    rows, variables = (
        {"features": dict(features), "present": dict(present)},
        parallel.replicate(variables, jax.local_devices()),
    )
    with jax.default_matmul_precision("highest"):
        return in_batches(functools.partial(nearest, variables), rows, 1024)

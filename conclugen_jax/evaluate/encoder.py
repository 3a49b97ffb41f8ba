"""The representation network of a downstream run: where its weights come from, and what it makes of a split."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from conclugen_jax.data import batches, host_table, shards
from conclugen_jax.data import manifest as manifest_lib
from conclugen_jax.data.manifest import Manifest
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import weights
from conclugen_jax.method import model as model_lib
from conclugen_jax.run import trees
from conclugen_jax.run.allowed import PRETRAINED
from conclugen_jax.train import loop, parallel


@dataclasses.dataclass(frozen=True)
class RawFeatures:
    """Takes the place of the network and passes features on, standardised if ``variables`` holds their statistics."""

    feature_dims: Mapping[str, int]

    def apply(self, variables: Mapping[str, Any], features: Mapping[str, jax.Array], *, method: str) -> dict[str, Any]:
        """Return modality -> [n, feature_dims[m]] of the same."""
        assert method == "represent"
        stats = variables.get("feature_stats", {})
        if not stats:
            return dict(features)
        return {m: (x - stats[m]["mean"][None, :]) / stats[m]["scale"][None, :] for m, x in features.items()}


class Encoder(NamedTuple):
    """The representation network.

    Attributes:
      model: computes representations.
      variables: its parameters and feature statistics.
      modalities: whose representations are used.
      dims: modality -> size of its representation.
      origin: where the weights come from, for the result: workdir, step, seed, hash of the parameters.
    """

    model: model_lib.ConCluGen | RawFeatures
    variables: dict[str, Any]
    modalities: list[str]
    dims: dict[str, int]
    origin: dict[str, Any]


def from_config(config: ConfigDict, manifest: Manifest) -> Encoder:
    """Make the encoder of ``config.downstream.protocol``; this says where its weights come from.

    1. ``linear_evaluation``, ``fine_tuning``: the named pretraining checkpoint.
    2. ``supervised``: random, by the seed, at the sizes of the configuration.
    3. ``raw_features``: there are none; the features themselves are used.

    Raises:
      ConclugenError: no checkpoint named or found, or modalities that are missing or of another size than the data's.
    """
    protocol = config.downstream.protocol
    if protocol in PRETRAINED:
        return _of_checkpoint(config, manifest)
    where, wanted = f"data set {config.data.path}", config.downstream.modalities or config.data.modalities
    names = manifest_lib.choose(manifest.modalities, wanted, what="modality", where=where)
    sizes = {m: manifest.modalities[m] for m in names}
    if protocol == "raw_features":
        model, variables = raw_features(config, manifest, names)
        return Encoder(model, variables, names, sizes, _origin(None, 0, config.seed, {}))
    model = model_lib.from_config(config, sizes).clone(heads=())
    key, _ = jax.random.split(jax.random.key(config.seed))
    variables = model_lib.initial_variables(model, key, manifest.standardization)
    dims = dict.fromkeys(names, model.representation_dim)
    return Encoder(model, variables, names, dims, _origin(None, 0, config.seed, variables["params"]))


def raw_features(config: ConfigDict, manifest: Manifest, names: Sequence[str]) -> tuple[RawFeatures, dict[str, Any]]:
    """Return a model that passes features on, with ``config.data.standardize`` by the data set's statistics."""
    stats = {m: manifest.standardization(m) for m in names} if config.data.standardize else {}
    variables = {"feature_stats": {m: {"mean": mean, "scale": scale} for m, (mean, scale) in stats.items()}}
    return RawFeatures({m: manifest.modalities[m] for m in names}), variables


def _of_checkpoint(config: ConfigDict, manifest: Manifest) -> Encoder:
    source = config.downstream.checkpoint
    if not source:
        raise ConclugenError(
            "config.downstream.checkpoint is empty; linear evaluation and fine-tuning need the workdir of a pretraining "
            "run (the supervised baseline is --config.downstream.protocol=supervised)"
        )
    step = weights.find_step(source, config.downstream.checkpoint_step)
    model, variables, trained = weights.load(source, step)
    model = model.clone(dtype=model_lib.DTYPES[config.precision])
    names = _modalities(config, model, manifest)
    dims = dict.fromkeys(names, model.representation_dim)
    return Encoder(model, variables, names, dims, _origin(source, step, trained.seed, variables["params"]))


def _origin(source: str | None, step: int, seed: int, params: Any) -> dict[str, Any]:
    return {"workdir": source, "step": step, "seed": seed, "sha256": trees.fingerprint(params)}


def _modalities(config: ConfigDict, model: model_lib.ConCluGen, manifest: Manifest) -> list[str]:
    """Return the modalities whose representations are used: those asked for, or all of the encoder's."""
    known = dict(model.feature_dims)
    where = f"checkpoint {config.downstream.checkpoint}"
    names = manifest_lib.choose(known, config.downstream.modalities or known, what="modality", where=where)
    manifest_lib.choose(manifest.modalities, names, what="modality", where=f"data set {config.data.path}")
    for m in names:
        if known[m] != manifest.modalities[m]:
            raise ConclugenError(
                f"data set {config.data.path} has {manifest.modalities[m]} features of modality {m!r}, {where} was "
                f"trained on {known[m]}; use features of the same extractor"
            )
    return names


def represented(
    encoder: Encoder, rows: shards.RowSource, config: ConfigDict, devices: Sequence[jax.Device]
) -> host_table.HostTable:
    """Return the split with representations in place of features."""
    forward = parallel.map_forward(
        lambda v, batch: encoder.model.apply(v, batch["features"], method="represent"), devices
    )
    size = len(devices)
    representations, facts = loop.evaluate(
        forward,
        parallel.replicate(encoder.variables, devices),
        rows,
        batch_size=max(config.train.batch_size // size * size, size),
        num_devices=size,
    )
    gib = sum(x.nbytes for x in representations.values()) / 2**30
    limit = config.data.device_table_gib
    tier = batches.choose_tier("auto", gib, device_table_gib=limit, host_table_gib=float("inf"))
    return batches.TABLES[tier]({"features": representations, **facts}, rows.usable)

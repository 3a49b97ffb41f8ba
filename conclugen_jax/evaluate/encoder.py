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
from conclugen_jax.train import feed, parallel


@dataclasses.dataclass(frozen=True)
class RawFeatures:
    """Takes the place of the network and passes features on, standardised if ``variables`` holds their statistics."""

    feature_dims: Mapping[str, int]

    def apply(self, variables: Mapping[str, Any], features: Mapping[str, jax.Array], *, method: str) -> dict[str, Any]:
        """Return modality -> [n, feature_dims[m]] of the same."""
        stats = variables["feature_stats"]
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
    protocol, where, step, seed = config.downstream.protocol, f"data set {config.data.path}", 0, config.seed
    source = config.downstream.checkpoint if protocol in PRETRAINED else None
    wanted = config.downstream.modalities or config.data.modalities
    if source is not None:
        step, model, variables, seed, wanted = _of_checkpoint(config)
        check_features(manifest, {m: model.feature_dims[m] for m in wanted}, where, f"checkpoint {source}")
    names = manifest_lib.choose(manifest.modalities, wanted, what="modality", where=where)
    sizes = {m: manifest.modalities[m] for m in names}
    if protocol == "raw_features":
        stats = {m: manifest.standardization(m) for m in names} if config.data.standardize else {}
        model, variables = RawFeatures(sizes), {"params": {}}
        variables["feature_stats"] = {m: {"mean": mean, "scale": scale} for m, (mean, scale) in stats.items()}
    elif source is None:
        model = model_lib.from_config(config, sizes).clone(heads=())
        key, _ = jax.random.split(jax.random.key(config.seed))
        variables = model_lib.initial_variables(model, key, manifest.standardization)
    dims = sizes if protocol == "raw_features" else dict.fromkeys(names, model.representation_dim)
    origin = {"workdir": source, "step": step, "seed": seed, "sha256": trees.fingerprint(variables["params"])}
    return Encoder(model, variables, names, dims, origin)


def _of_checkpoint(config: ConfigDict) -> tuple[int, model_lib.ConCluGen, dict[str, Any], int, list[str]]:
    """Return (step, model, variables, seed, modalities) of the named pretraining run: those asked for, or all of its own."""
    source, asked = config.downstream.checkpoint, config.downstream.modalities
    if not source:
        raise ConclugenError(
            "config.downstream.checkpoint is empty; linear evaluation and fine-tuning need the workdir of a pretraining "
            "run (the supervised baseline is --config.downstream.protocol=supervised)"
        )
    step = weights.find_step(source, config.downstream.checkpoint_step)
    model, variables, trained = weights.load(source, step)
    model = model.clone(dtype=model_lib.DTYPES[config.precision])
    where = f"checkpoint {source}"
    names = manifest_lib.choose(model.feature_dims, asked or model.feature_dims, what="modality", where=where)
    if spare := set(names) - set(config.data.modalities):
        raise ConclugenError(
            f"config.data.modalities leaves out {min(spare)!r}, which {where} has; choose modalities of a checkpoint by "
            "config.downstream.modalities"
        )
    return step, model, variables, trained.seed, names


def check_features(manifest: Manifest, sizes: Mapping[str, int], where: str, trained: str) -> None:
    """Refuse data that lacks a modality of a network, or has features of another size.

    Args:
      manifest: of the data.
      sizes: modality -> size of the network's features.
      where: names the data.
      trained: names what was trained on such features.
    """
    for m in manifest_lib.choose(manifest.modalities, sizes, what="modality", where=where):
        if manifest.modalities[m] != sizes[m]:
            raise ConclugenError(
                f"{where} has {manifest.modalities[m]} features of modality {m!r}, {trained} was trained on {sizes[m]}; "
                "use features of the same extractor"
            )


def represented(
    encoder: Encoder, rows: shards.RowSource, config: ConfigDict, devices: Sequence[jax.Device]
) -> host_table.HostTable:
    """Return the split with representations in place of features."""
    forward = parallel.map_forward(
        lambda v, batch: encoder.model.apply(v, batch["features"], method="represent"), devices
    )
    size = len(devices)
    representations, facts = feed.evaluate(
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

"""Nearest neighbours of the rows of a training split: by their features, kept beside its shards, or by representations."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import msgspec
import numpy as np
from ml_collections import ConfigDict

from conclugen_jax.data import batches, persons as persons_lib
from conclugen_jax.data.persons import Persons
from conclugen_jax.data.shards import RowSource, ShardStream
from conclugen_jax.errors import ConclugenError
from conclugen_jax.method import neighbours
from conclugen_jax.method.model import ConCluGen
from conclugen_jax.system import files, progress


@dataclasses.dataclass(frozen=True)
class Search:
    """Search for the nearest usable rows of each row, by the section ``loss`` of a configuration."""

    config: ConfigDict
    stream: ShardStream
    rows: RowSource

    def __call__(self, vectors: np.ndarray, unit_bank: jax.Array | None = None) -> np.ndarray:
        """Return the rows of the ``loss.neighbours`` nearest of each, int32 [num_examples, k]; -1 where there are fewer.

        By cosine of vectors of the usable rows, float32 [n, dim]; ``unit_bank``: the same at length 1, on the device.
        """
        usable, number = self.rows.usable, self.config.loss.neighbours
        how = {"own": np.arange(len(usable)), "persons": self._persons, "unit_bank": unit_bank}
        near, _ = neighbours.nearest(vectors, vectors, number, **how)
        found = np.full((self.rows.num_examples, number), neighbours.NONE, np.int32)
        found[usable] = np.where(near < 0, neighbours.NONE, usable[near])
        return found

    @functools.cached_property
    def _persons(self) -> tuple[np.ndarray, np.ndarray] | None:
        """The persons of the usable rows, as queries and as bank."""
        if not self.config.loss.neighbours_of_others:
            return None
        groups = np.concatenate([self.stream.names(at)[1] for at in _chunks(self.rows.usable)])
        ids = np.unique(groups, return_inverse=True)[1]
        return (np.where(groups == "", neighbours.NONE, ids),) * 2


def refreshes(config: ConfigDict, epoch: int) -> int:
    """Return how often neighbours have been looked for among representations by the start of an epoch, counted from 0."""
    section = config.loss
    if not section.neighbours or section.neighbour_space == "raw":
        return 0
    return epoch // section.neighbour_refresh_epochs


def table(search: Search, persons: Persons | None) -> np.ndarray | None:
    """Return the neighbours by raw features, from the cache of the data set if they are there; ``None`` for none.

    By the cosine of fused raw features: each modality standardised (by person, where the run does that), as a unit vector,
    zeros where absent, side by side. No label takes part.

    References:
      Dwibedi et al., "With a little help from my friends: nearest-neighbor contrastive learning of visual representations",
      2021, which looks for neighbours among representations.
    """
    section, stream = search.config.loss, search.stream
    if not section.neighbours:
        return None
    facts = [stream.dataset.manifest.fingerprint(), stream.split, list(stream.modalities), section.neighbours]
    facts += [bool(section.neighbours_of_others), stream.affine.fingerprint if stream.affine else ""]
    name = f"neighbours.{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}"
    folder = stream.dataset.path / batches.FOLDER / stream.split
    path, noted = folder / f"{name}.npy", folder / f"{name}.json"
    try:
        known = msgspec.json.decode(noted.read_bytes(), type=batches.Facts)
        if known.sha256 == files.sha256(path):
            return np.load(path)
    except (OSError, ValueError, msgspec.MsgspecError):  # there is none, or it is damaged
        pass
    found = _by_features(search, persons)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        noted.unlink(missing_ok=True)
        with files.replaced(path, shared=True) as scratch, scratch.open("wb") as file:
            np.save(file, found)
        facts = batches.Facts(stream.dataset.manifest.fingerprint(), path.stat().st_size, files.sha256(path))
        with files.replaced(noted, shared=True) as scratch:
            scratch.write_bytes(msgspec.json.encode(facts))
    except OSError as e:
        progress.say(f"{folder}: the neighbours cannot be kept there ({e.strerror or e}); they are found at each start")
    return found


def _by_features(search: Search, persons: Persons | None) -> np.ndarray:
    """Find the neighbours by raw features, and say where there are too few."""
    usable, number = search.rows.usable, search.config.loss.neighbours
    of = persons_lib.feature_stats(search.stream.dataset.manifest, persons)
    found = search(np.concatenate([fused(search.rows.rows(at), of) for at in _chunks(usable)]))
    if few := int((found[usable] < 0).any(axis=1).sum()):
        fact = f"{few} of {len(usable)} rows have fewer than {number} neighbours; those there are count"
        if (found < 0).all():
            others = " of other persons; config.loss.neighbours_of_others=False admits those of the same"
            others = others if search.config.loss.neighbours_of_others else ""
            fact = f"no row has a neighbour{others}; every row stays as it is"
        progress.say(f"{search.stream.where}: {fact}")
    return found


def fused(part: dict[str, Any], of: Callable[[str], Mapping[str, Any]]) -> np.ndarray:
    """Return rows as vectors that are compared, float32 [n, sum of dims]; ``of`` a modality: its ``mean`` and ``scale``."""
    vectors = []
    for m, x in part["features"].items():
        stats = of(m)
        z = np.where(part["present"][m][:, None], (x - stats["mean"]) / stats["scale"], 0)
        vectors.append(_unit(z))
    return np.concatenate(vectors, axis=1).astype(np.float32)


def represented(model: ConCluGen, variables: Mapping[str, Any], rows: RowSource) -> np.ndarray:
    """Return the usable rows as a network makes vectors of them, to be compared: unit rows, float32 [n, modalities * R].

    Of each modality the representation, whatever ``evaluation.vectors`` says, without its mean over the rows that have it, as
    a unit vector, zeros where absent, side by side. It is computed on one device, and so the same on any number of them.
    """
    alone = model.clone(axis_name=None, vectors="representation", feature_dims=flax.core.FrozenDict(model.feature_dims))
    variables, usable = jax.device_put(variables, jax.local_devices()[0]), rows.usable
    vectors = np.empty((len(usable), len(model.feature_dims), model.representation_dim), np.float32)
    there, start = np.empty((*vectors.shape[:2], 1), bool), 0
    for indices, count in batches.evaluation_batches(usable, min(batches.CHUNK_ROWS, len(usable))):
        part, at = rows.rows(indices), slice(start, start + count)
        found = {m: np.asarray(x, np.float32) for m, x in _represent(alone, variables, part["features"]).items()}
        there[at, :, 0] = np.stack([part["present"][m] for m in found], axis=1)[:count]
        vectors[at] = np.where(there[at], np.stack(list(found.values()), axis=1)[:count], 0)
        start += count
    mean = vectors.sum(axis=0, dtype=np.float64) / np.maximum(there.sum(axis=0), 1)
    flat = vectors.reshape(len(usable), -1)
    for start in range(0, len(usable), batches.CHUNK_ROWS):
        at = slice(start, start + batches.CHUNK_ROWS)
        vectors[at] = _unit(np.where(there[at], vectors[at] - mean.astype(np.float32), 0))
        flat[at] = _unit(flat[at])
    return flat


def too_large(vectors: np.ndarray, fact: str) -> ConclugenError:
    """Return the error of representations [n, dim] that do not fit into a device's memory beside the run."""
    return ConclugenError(
        f"{len(vectors)} vectors of {vectors.shape[1]} numbers do not fit into the device's memory beside the run to look for "
        f"neighbours among them ({fact}); set config.loss.neighbour_space='raw' or lower config.model.representation_dim"
    )


@functools.partial(jax.jit, static_argnums=0)  # one program for all refreshes
def _represent(model: ConCluGen, variables: Any, features: Any) -> dict[str, jax.Array]:
    return model.apply(variables, features, method="represent")


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _chunks(indices: np.ndarray) -> list[np.ndarray]:
    return np.split(indices, range(batches.CHUNK_ROWS, len(indices), batches.CHUNK_ROWS))

"""The table of nearest neighbours of a training split, made once and kept beside its shards."""

import hashlib
import json
from typing import Any

import msgspec
import numpy as np
from ml_collections import ConfigDict

from conclugen_jax.data import batches, persons as persons_lib
from conclugen_jax.data.persons import Persons
from conclugen_jax.data.shards import RowSource, ShardStream
from conclugen_jax.method import neighbours
from conclugen_jax.system import files, progress


def table(config: ConfigDict, stream: ShardStream, rows: RowSource, persons: Persons | None) -> np.ndarray | None:
    """Return the rows of the ``config.loss.neighbours`` nearest rows of each, int32 [num_examples, k]; ``None`` for none.

    By the cosine of fused raw features: each modality standardised (by person, where the run does that), as a unit vector,
    zeros where absent, side by side. Fewer than k neighbours leave -1. No label takes part.

    References:
      Dwibedi et al., "With a little help from my friends: nearest-neighbor contrastive learning of visual representations",
      2021, which looks for neighbours among representations.
    """
    section = config.loss
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
    found = _found(config, stream, rows, persons)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        noted.unlink(missing_ok=True)
        with files.replaced(path) as scratch, scratch.open("wb") as file:
            np.save(file, found)
        facts = batches.Facts(stream.dataset.manifest.fingerprint(), path.stat().st_size, files.sha256(path))
        files.write_atomically(noted, msgspec.json.encode(facts).decode())
    except OSError as e:
        progress.say(f"{folder}: the neighbours cannot be kept there ({e.strerror or e}); they are found at each start")
    return found


def _found(config: ConfigDict, stream: ShardStream, rows: RowSource, persons: Persons | None) -> np.ndarray:
    """Find the neighbours among the usable rows."""
    usable, number = rows.usable, config.loss.neighbours
    vectors = np.concatenate([fused(part, stream, persons) for part in _parts(rows, usable)])
    if config.loss.neighbours_of_others:
        groups = np.concatenate([stream.names(at)[1] for at in _chunks(usable)])
        ids = np.unique(groups, return_inverse=True)[1]
        who = (np.where(groups == "", neighbours.NONE, ids),) * 2
    else:
        who = None
    near, _ = neighbours.nearest(vectors, vectors, number, own=np.arange(len(usable)), persons=who)
    if (near < 0).any():
        few = int((near < 0).any(axis=1).sum())
        fact = f"{few} of {len(usable)} rows have fewer than {number} neighbours; those there are count"
        if (near < 0).all():
            others = " of other persons; config.loss.neighbours_of_others=False admits those of the same"
            fact = f"no row has a neighbour{others if who else ''}; every row stays as it is"
        progress.say(f"{stream.where}: {fact}")
    found = np.full((rows.num_examples, number), neighbours.NONE, np.int32)
    found[usable] = np.where(near < 0, neighbours.NONE, usable[near])
    return found


def fused(part: dict[str, Any], stream: ShardStream, persons: Persons | None) -> np.ndarray:
    """Return rows as vectors that are compared: float32 [n, sum of dims]."""
    of, vectors = persons_lib.feature_stats(stream.dataset.manifest, persons), []
    for m, x in part["features"].items():
        stats = of(m)
        z = np.where(part["present"][m][:, None], (x - stats["mean"]) / stats["scale"], 0)
        vectors.append(z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12))
    return np.concatenate(vectors, axis=1).astype(np.float32)


def _chunks(indices: np.ndarray) -> list[np.ndarray]:
    return np.split(indices, range(batches.CHUNK_ROWS, len(indices), batches.CHUNK_ROWS))


def _parts(rows: RowSource, indices: np.ndarray) -> Any:
    return (rows.rows(at) for at in _chunks(indices))

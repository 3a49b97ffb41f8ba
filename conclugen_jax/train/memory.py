"""Estimate the device memory of a training run, and suggest what to change if it is too much."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from conclugen_jax.errors import ConclugenError, reason
from conclugen_jax.method import model as model_lib, objective, similarity
from conclugen_jax.system import tasks

GIB = 2**30
CHUNK = 1024


def estimate(
    config: ConfigDict, feature_dims: Mapping[str, int], parameters: int, *, table_rows: int, num_devices: int
) -> dict[str, float]:
    """Estimate the memory of pretraining on each device in GiB, by purpose.

    ``table`` of so many rows, 0 without one; ``parameters``, so many, with gradients and moments; ``activations`` of the
    networks that the backward pass needs; ``similarities`` of the contrastive loss.
    """
    batch = config.train.batch_size
    rows, r, width = batch // num_devices, config.model.representation_dim, sum(feature_dims.values())
    stored = 2 if config.data.storage_dtype == "bfloat16" else 4
    size = np.dtype(model_lib.DTYPES[config.precision]).itemsize
    units = sum(4 * (dim if m in config.model.bottleneck else r) + r for m, dim in feature_dims.items())
    units += (width + len(feature_dims) * config.model.reconstruction_dim) * bool(config.loss.reconstruction_weight)
    passes = 2 if config.loss.fusion_weight else 1
    heads = len(feature_dims) * (r // 8 + config.model.projection_dim) * 3
    at_once = min(rows, config.encoder_chunk_size or rows)
    pairs = objective.modality_pairs(list(feature_dims), config.loss.contrastive_pairs)
    kept = similarity.keeps(rows * batch) and not config.encoder_chunk_size
    whole = config.loss.soft_targets or config.loss.target_neighbours  # both ways, with weights
    # Kept: of all pairs. Else of one pair at a time, a tile and what the backward pass makes of it.
    entries = len(pairs) * rows * batch if kept else 2 * min(rows * batch, math.prod(similarity.ACCELERATOR_TILE))
    entries = 4 * len(pairs) * rows * batch if whole else entries
    moments = 2 if config.optimizer.name == "adamw" else 0
    return {
        "table": table_rows * width * stored / GIB,
        "parameters": parameters * 4 * (2 + moments / (num_devices if config.optimizer.shard else 1)) / GIB,
        "activations": passes * (rows * (width + heads) * 4 + at_once * units * size) / GIB,
        "similarities": bool(config.loss.contrastive_weight) * entries * 4 / GIB,
    }


def check(compiled: Any, device: jax.Device, parts: Mapping[str, float], config: ConfigDict) -> None:
    """Raise if a compiled program needs more memory than its device has; ``parts`` are those of :func:`estimate`."""
    found, limit = compiled.memory_analysis(), available(device)
    # On a CPU the limit already includes the arguments; outputs take the place of arguments.
    needed = found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    if device.platform != "cpu":
        needed += found.argument_size_in_bytes
    if limit is not None and needed > limit:
        raise too_large(parts, config, f"{needed / GIB:.1f} GiB are needed where {limit / GIB:.1f} GiB are left")


def too_large(parts: Mapping[str, float], config: ConfigDict, fact: str) -> ConclugenError:
    """Return the error of a run that does not fit, with the estimate and the way out that saves most."""
    largest, listed = max(parts, key=parts.get), ", ".join(f"{name} {gib:.2f}" for name, gib in parts.items())
    if largest == "table":
        way_out = "keep the rows on the host: set config.data.tier=host"
    elif largest == "activations" and not 0 < config.encoder_chunk_size <= CHUNK:
        way_out = f"set config.encoder_chunk_size={CHUNK}"
    elif largest != "parameters":
        way_out = "lower config.train.batch_size or use more devices"
    elif not config.optimizer.shard and config.optimizer.name == "adamw":
        way_out = "set config.optimizer.shard=True with several devices or lower config.model.representation_dim"
    else:
        way_out = "lower config.model.representation_dim or use devices with more memory"
    return ConclugenError(
        f"config.train.batch_size={config.train.batch_size} does not fit into the device's memory ({fact}; estimate in GiB: "
        f"{listed}); {way_out}"
    )


@contextlib.contextmanager
def explained(explain: Callable[[str], ConclugenError]) -> Iterator[None]:
    """Turn the runtime's "out of memory" into the error that a function such as :func:`too_large` makes of its text."""
    try:
        yield
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        raise explain(reason(e, 120)) from e


def available(device: jax.Device) -> int | None:
    """Return the bytes that a program may take: the accelerator's limit, or what the host has free; ``None``: unknown."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    return tasks.free_memory()

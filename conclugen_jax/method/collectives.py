"""Collectives that work alike on one device and inside a step mapped over several.

An axis of one device needs none, which would copy its operands for nothing. A loss built from these is the same scalar on every
device; the mean over devices of its gradients is the gradient of that scalar, since a sum over devices is its own transpose.
"""

from typing import Any

import jax
import jax.numpy as jnp


def device_count(axis_name: str | None) -> int:
    """Return the number of devices on the axis; 1 without an axis."""
    return 1 if axis_name is None else jax.lax.axis_size(axis_name)


def gather(x: jax.Array, axis_name: str | None) -> jax.Array:
    """Rows of all devices in device order: [n, ...] -> [n * devices, ...]."""
    return jax.lax.all_gather(x, axis_name, tiled=True) if device_count(axis_name) > 1 else x


def total(x: Any, axis_name: str | None) -> Any:
    """Sum over devices of every leaf of a tree."""
    return jax.lax.psum(x, axis_name) if device_count(axis_name) > 1 else x


def mean(x: Any, axis_name: str | None) -> Any:
    """Mean over devices of every leaf of a tree."""
    return jax.lax.pmean(x, axis_name) if device_count(axis_name) > 1 else x


def device_index(axis_name: str | None) -> jax.Array | int:
    """Position of this device on the axis; 0 without an axis."""
    return 0 if axis_name is None else jax.lax.axis_index(axis_name)


def own_rows(gathered: jax.Array, num_rows: int, axis_name: str | None) -> jax.Array:
    """Return this device's rows of a gathered array: the inverse of :func:`gather`."""
    if axis_name is None:
        return gathered
    return jax.lax.dynamic_slice_in_dim(gathered, device_index(axis_name) * num_rows, num_rows)


def all_valid(num_rows: int, valid: jax.Array | None) -> jax.Array:
    """Return the mask itself, or all rows valid: boolean [n]."""
    return jnp.ones(num_rows, bool) if valid is None else valid

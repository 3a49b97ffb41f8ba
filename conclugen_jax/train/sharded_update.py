"""The optimizer's update, on every device as a whole or split over the devices (ZeRO, stage 1)."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from conclugen_jax.method import collectives
from conclugen_jax.method.train_state import TrainState
from conclugen_jax.train import parallel


def apply(
    optimizer: optax.GradientTransformationExtraArgs,
    grads: Any,
    opt_state: Any,
    params: Any,
    *,
    split: bool,
    axis_name: str | None,
    **extra: Any,
) -> tuple[Any, Any, jax.Array]:
    """Return new parameters from this device's gradients, the optimizer's state, and the norm of the mean gradient.

    Split, each device gets the mean over devices of its part of every gradient, moves its part of the parameters with its
    part of the moments, as :func:`place` puts them, and the parts are gathered: the traffic of one sum over devices,
    1/devices of the moments and of the work. The update of a parameter must not depend on other parameters.

    References:
      Rajbhandari et al., "ZeRO: Memory optimizations toward training trillion parameter models", 2020.
    """
    count = collectives.device_count(axis_name)
    if not split or count == 1:
        grads = collectives.mean(grads, axis_name)
        updates, opt_state = optimizer.update(grads, opt_state, params, **extra)
        return optax.apply_updates(params, updates), opt_state, optax.tree.norm(grads)

    def mean_part(gradient: jax.Array) -> jax.Array:
        return jax.lax.psum_scatter(_parts(gradient, count, jnp), axis_name, scatter_dimension=0) / count

    def own_part(x: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(_parts(x, count, jnp), jax.lax.axis_index(axis_name), keepdims=False)

    def joined(part: jax.Array, like: jax.Array) -> jax.Array:
        return jax.lax.all_gather(part, axis_name, tiled=True)[: like.size].reshape(like.shape)

    grads, own = jax.tree.map(mean_part, grads), jax.tree.map(own_part, params)
    updates, opt_state = optimizer.update(grads, opt_state, own, **extra)
    moved = optax.apply_updates(own, updates)
    squared = sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads))
    return jax.tree.map(joined, moved, params), opt_state, jnp.sqrt(collectives.total(squared, axis_name))


def _parts(x: Any, count: int, xp: Any) -> Any:
    """An array, flat and padded with zeros, in equal parts: [...] -> [count, part]."""
    flat = x.reshape(-1)
    return xp.pad(flat, (0, -flat.size % count)).reshape(count, -1)


def axes(state: TrainState, config: ConfigDict, devices: Sequence[jax.Device]) -> TrainState | None:
    """Say which leaves of a state have parts on the devices (0), the moments, and which are the same on all (``None``)."""
    if not config.optimizer.shard or len(devices) == 1:
        return None
    nowhere = jax.tree.map(lambda _: None, state)
    return nowhere.replace(opt_state=jax.tree.map(lambda x: 0 if x.ndim else None, state.opt_state))


def place(state: TrainState, config: ConfigDict, devices: Sequence[jax.Device]) -> TrainState:
    """Put a state on the devices; each moment [...] of a split update as [devices, part], a part on each."""
    if axes(state, config, devices) is None:
        return parallel.replicate(state, devices)
    own = list(parallel.own_devices(devices))

    def split(x: Any) -> jax.Array:
        return parallel.shard(_parts(np.asarray(x), len(devices), np)[own], devices)

    others = parallel.replicate(state.replace(opt_state=None), devices)
    moments = jax.tree.map(lambda x: split(x) if x.ndim else parallel.replicate(x, devices), state.opt_state)
    return others.replace(opt_state=moments)


def whole(state: TrainState, optimizer: optax.GradientTransformation) -> TrainState:
    """Join the moments of a split update on the host, so that any number of devices can go on."""

    def join(x: jax.Array, like: jax.Array) -> Any:
        if x.shape == like.shape:
            return x
        x = x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x).reshape(-1)[: like.size].reshape(like.shape)

    return state.replace(opt_state=jax.tree.map(join, state.opt_state, jax.eval_shape(optimizer.init, state.params)))

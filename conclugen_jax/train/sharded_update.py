"""The optimizer's update, on every device as a whole or split over the devices (ZeRO, stage 1)."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
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
    """New parameters from this device's gradients.

    Split, each device gets the mean over devices of its part of every gradient, moves its part of the parameters with its
    part of the moments, and the parts are gathered: the traffic of one sum over devices, 1/devices of the moments and of
    the work. The update of a parameter must not depend on other parameters.

    Args:
      optimizer: an elementwise transformation.
      grads: of this device's loss; their mean over devices counts.
      opt_state: as :func:`place` puts it if ``split``.
      params: the same on all devices.
      split: whether the devices share the update.
      axis_name: mapped axis of the devices.
      **extra: further arguments of the optimizer's update.

    Returns:
      (parameters, optimizer state, norm of the mean gradient).

    References:
      Rajbhandari et al., "ZeRO: Memory optimizations toward training trillion parameter models", 2020.
    """
    if not split or collectives.device_count(axis_name) == 1:
        grads = collectives.mean(grads, axis_name)
        updates, opt_state = optimizer.update(grads, opt_state, params, **extra)
        return optax.apply_updates(params, updates), opt_state, optax.tree.norm(grads)
    grads = jax.tree.map(lambda g: collectives.own_part_of_mean(g, axis_name), grads)
    own = jax.tree.map(lambda p: collectives.own_part(p, axis_name), params)
    updates, opt_state = optimizer.update(grads, opt_state, own, **extra)
    moved = optax.apply_updates(own, updates)
    squared = sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads))
    joined = jax.tree.map(lambda part, p: collectives.join_parts(part, p.shape, axis_name), moved, params)
    return joined, opt_state, jnp.sqrt(collectives.total(squared, axis_name))


def is_split(config: ConfigDict, devices: Sequence[jax.Device]) -> bool:
    """Whether the devices of a run share its update."""
    return config.optimizer.shard and len(devices) > 1


def axes(state: TrainState, config: ConfigDict, devices: Sequence[jax.Device]) -> TrainState | None:
    """Which leaves of a state have parts on the devices (0), the moments, and which are the same on all (``None``)."""
    if not is_split(config, devices):
        return None
    nowhere = jax.tree.map(lambda _: None, state)
    return nowhere.replace(opt_state=jax.tree.map(lambda x: 0 if x.ndim else None, state.opt_state))


def place(state: TrainState, config: ConfigDict, devices: Sequence[jax.Device]) -> TrainState:
    """A state on the devices; each moment [...] of a split update as [devices, part], a part on each."""
    if not is_split(config, devices):
        return parallel.replicate(state, devices)
    others = parallel.replicate(state.replace(opt_state=None), devices)
    return others.replace(
        opt_state=jax.tree.map(
            lambda x: parallel.split(x, devices) if x.ndim else parallel.replicate(x, devices), state.opt_state
        )
    )


def whole(state: TrainState, optimizer: optax.GradientTransformation) -> TrainState:
    """A state with whole moments, those that were split on the host: what any number of devices can go on with."""
    like = jax.eval_shape(optimizer.init, state.params)
    return state.replace(
        opt_state=jax.tree.map(lambda x, y: x if x.shape == y.shape else parallel.whole(x, y), state.opt_state, like)
    )

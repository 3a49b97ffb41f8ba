"""Two views of each example's features, for the loss between instances (Eq. 1).

Stored variants are views as they are: the frozen features of augmented clips. Where a data set has none, views are made
in feature space: every feature is replaced by its mean over the training split with a small probability (masking), and
Gaussian noise in units of its standard deviation is added.
"""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from conclugen_jax.method import collectives

Statistics = tuple[jax.Array, jax.Array]
"""Mean and standard deviation of each feature of a modality over the training split, [dim] each."""


def two_views(
    features: jax.Array, key: jax.Array, *, config: ConfigDict, statistics: Statistics, axis_name: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Return two views [n, dim] of features: [n, 2, dim], two stored variants, or [n, dim], from which both are made.

    The random key is the same on all devices of the mapped axis over which the batch is split.
    """
    if features.ndim == 3:
        return features[:, 0], features[:, 1]
    return tuple(_augmented(features, k, config, statistics, axis_name) for k in jax.random.split(key))


def _augmented(
    x: jax.Array, key: jax.Array, config: ConfigDict, statistics: Statistics, axis_name: str | None
) -> jax.Array:
    # Drawn for the whole batch, so that the number of devices changes nothing.
    shape = (x.shape[0] * collectives.device_count(axis_name), x.shape[1])
    mask_key, noise_key = jax.random.split(key)
    masked = collectives.own_rows(jax.random.bernoulli(mask_key, config.views.mask_rate, shape), x.shape[0], axis_name)
    noise = collectives.own_rows(jax.random.normal(noise_key, shape), x.shape[0], axis_name)
    mean, scale = statistics
    return jnp.where(masked, mean[None, :], x) + config.views.noise * scale[None, :] * noise

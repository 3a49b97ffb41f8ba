"""Change a batch before the networks see it: two views, mixup, dropout of features and of modalities.

L_NCE takes two views of each example's features. Stored variants are views as they are: the frozen features of augmented
clips. Where a data set has none, views are made in feature space: every feature is replaced by its mean over the training
split with a small probability (masking), and Gaussian noise in units of its standard deviation is added.

Everything random is drawn for the batch of all devices, so that their number changes nothing.
"""

import zlib

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from conclugen_jax.method import collectives
from conclugen_jax.method.model import ByModality

Statistics = tuple[jax.Array, jax.Array]
"""Mean and standard deviation of each feature of a modality over the training split, [dim] each."""


def mixup(
    features: ByModality, present: ByModality, key: jax.Array, *, alpha: float, axis_name: str | None = None
) -> dict[str, jax.Array]:
    """Return ``share x + (1 - share) x'`` of each row, with another row x' of the batch of all devices.

    A row has one partner and one share, drawn from Beta(alpha, alpha), in all of its modalities; where one of the two lacks a
    modality the row keeps its own features. Whose row it was before still says which pairs are positive.

    Args:
      features: modality -> [n, dim] or, of stored variants, [n, variants, dim].
      present: modality -> boolean [n].
      key: the same on all devices.
      alpha: above 0; 1 draws all shares alike, a small one mostly shares close to 0 and 1.
      axis_name: mapped axis over which the batch is split.

    References:
      Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018; Lee et al., "i-Mix", ICLR 2021.
    """
    num_rows = len(next(iter(present.values())))
    total = num_rows * collectives.device_count(axis_name)
    partner_key, share_key = jax.random.split(key)
    partners = collectives.own_rows(jax.random.permutation(partner_key, total), num_rows, axis_name)
    shares = collectives.own_rows(jax.random.beta(share_key, alpha, alpha, (total,)), num_rows, axis_name)
    mixed = {}
    for m, x in features.items():
        both = present[m] & collectives.gather(present[m], axis_name)[partners]
        share = jnp.where(both, shares, 1).reshape(-1, *(1,) * (x.ndim - 1))
        mixed[m] = share * x + (1 - share) * collectives.gather(x, axis_name)[partners]
    return mixed


def mixed(
    features: ByModality, present: ByModality, key: jax.Array, config: ConfigDict, axis_name: str | None
) -> ByModality:
    """Return :func:`mixup` of a batch if the configuration wants it, else its features as they are."""
    alpha = config.augmentation.mixup
    if not alpha:
        return features
    return mixup(features, present, jax.random.fold_in(key, 2), alpha=alpha, axis_name=axis_name)


def dropout(shape: tuple[int, int], key: jax.Array, *, rate: float, axis_name: str | None = None) -> jax.Array:
    """Return factors of features, float32 [n, dim]: 0 for a ``rate`` of them, 1 / (1 - rate) for the others.

    The expectation of a feature times its factor is the feature. The random key is the same on all devices.
    """
    num_rows, dim = shape
    whole = num_rows * collectives.device_count(axis_name), dim  # drawn for all devices: their number changes nothing
    kept = collectives.own_rows(jax.random.bernoulli(key, 1 - rate, whole), num_rows, axis_name)
    return kept.astype(jnp.float32) / (1 - rate)


def factors(
    features: ByModality, key: jax.Array, number: int, config: ConfigDict, axis_name: str | None
) -> dict[str, jax.Array]:
    """Return the factors of every modality, by the ``number`` of this pass through the networks; none without dropout."""
    rate = config.augmentation.feature_dropout
    if not rate:
        return {}
    key = jax.random.fold_in(key, number)
    keys = {m: jax.random.fold_in(key, zlib.crc32(m.encode())) for m in features}
    return {m: dropout(x.shape, keys[m], rate=rate, axis_name=axis_name) for m, x in features.items()}


def modality_dropout(
    present: ByModality, key: jax.Array, *, rate: float, axis_name: str | None = None
) -> dict[str, jax.Array]:
    """Return ``present``, modality -> boolean [n], without a random share of what is there: each with probability ``rate``.

    A hidden modality is absent in this step: from all losses, BatchNorm's statistics and the fused vector of L_Clu, since
    zeros in its place would be a positive without content. Each example keeps one of the modalities that it has. The random
    key is the same on all devices.

    References:
      Neverova et al., "ModDrop: adaptive multi-modal gesture recognition", 2016, who set the features to zero instead.
    """
    names = sorted(present)
    there = jnp.stack([present[m] for m in names], axis=1)
    num_rows = len(there)
    # Drawn for the whole batch, so that the number of devices changes nothing.
    drawn = jax.random.uniform(key, (num_rows * collectives.device_count(axis_name), len(names)))
    drawn = jnp.where(there, collectives.own_rows(drawn, num_rows, axis_name), -1)
    stays = there & ((drawn >= rate) | (drawn == drawn.max(axis=1, keepdims=True)))
    return {m: stays[:, i] for i, m in enumerate(names)}


def shown(present: ByModality, key: jax.Array, number: int, config: ConfigDict, axis_name: str | None) -> ByModality:
    """Return what is left by :func:`modality_dropout` if the configuration wants it, by the ``number`` of this draw."""
    rate = config.augmentation.modality_dropout
    if not rate:
        return present
    return modality_dropout(present, jax.random.fold_in(key, number), rate=rate, axis_name=axis_name)


def two_views(
    features: jax.Array, key: jax.Array, *, config: ConfigDict, statistics: Statistics, axis_name: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Return two views [n, dim] of features: [n, 2, dim], two stored variants, or [n, dim], from which both are made.

    The random key is the same on all devices of the mapped axis over which the batch is split.
    """
    if features.ndim == 3:
        return features[:, 0], features[:, 1]
    num_rows, (mean, scale) = len(features), statistics
    shape = (num_rows * collectives.device_count(axis_name), features.shape[1])

    def augmented(key: jax.Array) -> jax.Array:
        # Drawn for the whole batch, so that the number of devices changes nothing.
        mask_key, noise_key = jax.random.split(key)
        masked = collectives.own_rows(
            jax.random.bernoulli(mask_key, config.views.mask_rate, shape), num_rows, axis_name
        )
        noise = collectives.own_rows(jax.random.normal(noise_key, shape), num_rows, axis_name)
        return jnp.where(masked, mean[None, :], features) + config.views.noise * scale[None, :] * noise

    return tuple(augmented(k) for k in jax.random.split(key))

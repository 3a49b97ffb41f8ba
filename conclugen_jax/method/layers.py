"""The layers of the networks: gated embedding units, projection heads, decoders, and the fusion of modalities.

Sizes: n rows, R representation_dim, P projection_dim, H reconstruction_dim.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from conclugen_jax.method import collectives

REPRESENTATION_HEADS = ("gated", "linear")


def linear(features: int, fan_in: int, *, dtype: Any, name: str, use_bias: bool = True) -> nn.Dense:
    """Return a Dense layer that starts as the authors' layers do: weights and biases uniform in +-1/sqrt(fan_in)."""

    def uniform(key, shape, dtype=jnp.float32):
        bound = fan_in**-0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return nn.Dense(features, use_bias=use_bias, dtype=dtype, kernel_init=uniform, bias_init=uniform, name=name)


@jax.custom_vjp
def relu(x: jax.Array) -> jax.Array:
    """max(x, 0), of which only the result is kept for the backward pass; ``jax.nn.relu`` keeps x beside it."""
    return jnp.maximum(x, 0)


relu.defvjp(lambda x: (relu(x),) * 2, lambda y, gradient: (jnp.where(y > 0, gradient, 0),))


class RepresentationHead(nn.Module):
    """``gated``, a gated embedding unit: relu(fc1 x) -> y * sigmoid(gate y) -> relu(fc2 y); ``linear``: fc1 x alone.

    [n, dim] -> [n, R]. With ``bottleneck`` the unit works at the input's size and one more Linear, ``expand``, leads to R.
    ``pre_activation`` omits the relu at the end, if there is one.
    """

    kind: str  # one of REPRESENTATION_HEADS
    representation_dim: int
    bottleneck: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, pre_activation: bool = False) -> jax.Array:
        """Map features [n, dim] to representations [n, representation_dim]; optionally before their last ReLU."""
        dim = x.shape[1]
        if self.kind == "linear":
            return linear(self.representation_dim, dim, dtype=self.dtype, name="fc1")(x)
        width = dim if self.bottleneck else self.representation_dim
        y = relu(linear(width, dim, dtype=self.dtype, name="fc1")(x))
        y = y * nn.sigmoid(linear(width, width, dtype=self.dtype, name="gate")(y))
        y = linear(width, width, dtype=self.dtype, name="fc2")(y)
        if self.bottleneck or not pre_activation:
            y = relu(y)
        if self.bottleneck:
            y = linear(self.representation_dim, width, dtype=self.dtype, name="expand")(y)
        return y


class BatchNorm(nn.Module):
    """Batch normalisation over the valid rows of all devices.

    Unlike ``flax.linen.BatchNorm`` it weighs devices by their number of valid rows, so that a batch split over
    devices gives the numbers of the whole batch. Running averages follow PyTorch: ``running = momentum * running +
    (1 - momentum) * batch``, with the unbiased variance.
    """

    momentum: float
    epsilon: float
    axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array, valid: jax.Array | None, train: bool) -> jax.Array:
        """Normalise x [n, dim] by the valid rows of all devices in training, else by the running averages."""
        dim = x.shape[1]
        scale = self.param("scale", nn.initializers.ones, (dim,))
        bias = self.param("bias", nn.initializers.zeros, (dim,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (dim,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (dim,))
        y = x.astype(jnp.float32)
        if train:
            valid = collectives.all_valid(x.shape[0], valid)
            count = collectives.total(valid.sum(), self.axis_name).astype(jnp.float32)
            divisor = jnp.maximum(count, 1)
            mean = collectives.total(jnp.where(valid[:, None], y, 0).sum(axis=0), self.axis_name) / divisor
            deviation = jnp.where(valid[:, None], y - mean[None, :], 0)
            var = collectives.total(jnp.square(deviation).sum(axis=0), self.axis_name) / divisor
            if not self.is_initializing():
                unbiased = var * count / jnp.maximum(count - 1, 1)
                keep = jnp.where(count > 0, self.momentum, 1.0)
                running_mean.value = keep * running_mean.value + (1 - keep) * mean
                running_var.value = keep * running_var.value + (1 - keep) * unbiased
        else:
            mean, var = running_mean.value, running_var.value
        factor = scale * jax.lax.rsqrt(var + self.epsilon)
        return ((y - mean[None, :]) * factor[None, :] + bias[None, :]).astype(x.dtype)


class ProjectionHead(nn.Module):
    """Linear R -> R/8, BatchNorm, relu, Linear -> P, and an optional last relu, in two stages.

    ``reduce`` is the first Linear, row by row: [n, R] -> [n, R/8]; ``project`` the rest, over the whole batch: -> [n, P].
    """

    representation_dim: int
    projection_dim: int
    last_relu: bool
    momentum: float
    epsilon: float
    dtype: Any
    axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array, stage: str, valid: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Compute the layer before BatchNorm (``stage="reduce"``), or BatchNorm and what follows it."""
        hidden = self.representation_dim // 8
        if stage == "reduce":
            return linear(hidden, self.representation_dim, dtype=self.dtype, name="fc1")(x)
        y = BatchNorm(self.momentum, self.epsilon, self.axis_name, name="norm")(x, valid, train)
        y = linear(self.projection_dim, hidden, dtype=self.dtype, name="fc2")(relu(y))
        return relu(y) if self.last_relu else y


class Decoder(nn.Module):
    """Linear R -> H, relu, Linear -> the modality's features, and an optional last relu. [n, R] -> [n, dim]."""

    reconstruction_dim: int
    feature_dim: int
    last_relu: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Decode representations [n, representation_dim] to features [n, feature_dim]."""
        y = relu(linear(self.reconstruction_dim, x.shape[1], dtype=self.dtype, name="fc1")(x))
        y = linear(self.feature_dim, self.reconstruction_dim, dtype=self.dtype, name="fc2")(y)
        return relu(y) if self.last_relu else y


class PerModality(nn.Module):
    """A module for each modality: ``make(modality)`` makes it, under the modality's name."""

    make: Callable[[str], nn.Module]

    @nn.compact
    def __call__(self, modality: str, *arguments: Any) -> jax.Array:
        """Apply the network of a modality."""
        return self.make(modality)(*arguments)


def fuse(vectors: Mapping[str, Any], present: Mapping[str, Any], how: str, *, xp: Any = jnp) -> Any:
    """Join the vectors of the modalities of each row; an absent modality counts as zeros.

    Args:
      vectors: modality -> [n, dim]; what stands in absent rows does not matter.
      present: modality -> boolean [n].
      how: ``concat``: side by side in the order of the modalities' names; ``mean``: over those that a row has (Eq. 8), zeros
        if it has none.
      xp: library of the arrays, ``jax.numpy`` or ``numpy``.

    Returns:
      [n, sum of dims] or, for ``mean``, [n, dim].
    """
    # Sorted: the order must not depend on whether the dict has passed through a compiled function.
    names = sorted(vectors)
    parts = [xp.where(present[m][:, None], vectors[m], 0) for m in names]
    if how == "concat":
        return xp.concatenate(parts, axis=1)
    count = sum(present[m].astype(xp.float32) for m in names)
    return sum(parts) / xp.maximum(count, 1)[:, None]

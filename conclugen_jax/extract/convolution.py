"""A convolution with bias, for inference, in the forms that XLA computes fast."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Convolution(nn.Module):
    """Convolution over two or three axes; outputs have the type of the inputs.

    Attributes:
      features: channels of the outputs.
      kernel_size: of each axis.
      strides: of each axis.
      padding: zeros on either side of each axis; ``None``: (kernel_size - 1) / 2.
    """

    features: int
    kernel_size: Sequence[int]
    strides: Sequence[int]
    padding: Sequence[int] | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[n, ..., channels] -> [n, ..., features]."""
        shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape).astype(x.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)
        padding = tuple((k - 1) // 2 for k in self.kernel_size) if self.padding is None else tuple(self.padding)
        y = convolve(x, kernel, tuple(self.strides), padding)
        return y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


def convolve(x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], padding: tuple[int, ...]) -> jax.Array:
    """A convolution (of [n, ..., in] with [..., in, out]).

    On a processor one of size 1 is a matrix product, and one in three dimensions is made of two-dimensional ones: XLA's own
    run at half and at a seventh of the speed there (measured at the sizes of ResNet3D-101).
    """

    def on_processor(x: jax.Array, kernel: jax.Array) -> jax.Array:
        if max(kernel.shape[:-2]) == 1 and not any(padding):
            thinned = x[(slice(None), *(slice(None, None, s) for s in strides))]
            return jnp.tensordot(thinned, kernel.reshape(kernel.shape[-2:]), 1)
        if len(strides) < 3:
            return native(x, kernel)
        return (_by_patches if x.shape[-1] >= MANY_CHANNELS else _by_frames)(x, kernel, strides, padding)

    def native(x: jax.Array, kernel: jax.Array) -> jax.Array:
        axes = "THW"[-len(strides) :]
        layout = (f"N{axes}C", f"{axes}IO", f"N{axes}C")
        return lax.conv_general_dilated(x, kernel, strides, [(p, p) for p in padding], dimension_numbers=layout)

    return lax.platform_dependent(x, kernel, cpu=on_processor, default=native)


FEW_CHANNELS = 16
MANY_CHANNELS = 512
"""From here on maps are small, and a product with all of their patches is the faster form."""


def _by_patches(x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], padding: tuple[int, ...]) -> jax.Array:
    """One product of the kernel with all patches."""
    x = jnp.pad(x, ((0, 0), *((p, p) for p in padding), (0, 0)))
    *size, _, features = kernel.shape
    outputs = [(n - k) // s + 1 for n, k, s in zip(x.shape[1:-1], size, strides, strict=True)]
    patches = [
        x[(slice(None), *(slice(i, i + (o - 1) * s + 1, s) for i, o, s in zip(at, outputs, strides, strict=True)))]
        for at in np.ndindex(*size)
    ]
    return jnp.tensordot(jnp.concatenate(patches, axis=-1), kernel.reshape(-1, features), 1)


def _by_frames(x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], padding: tuple[int, ...]) -> jax.Array:
    """Every output frame is a two-dimensional convolution of its input frames, whose channels are laid side by side."""
    n, time, height, width, channels = x.shape
    taps = kernel.shape[0]
    outputs = (time + 2 * padding[0] - taps) // strides[0] + 1
    x = jnp.pad(x, ((0, 0), (padding[0], padding[0]), (0, 0), (0, 0), (0, 0)))
    if channels < FEW_CHANNELS:  # short runs are slow to copy: first all frames side by side, then longer runs of them
        x = jnp.moveaxis(x, 1, 3).reshape(n, height, width, -1)
        starts = [i * strides[0] * channels for i in range(outputs)]
        x = jnp.stack([x[..., start : start + taps * channels] for start in starts], axis=1)
    else:
        last = (outputs - 1) * strides[0] + 1
        x = jnp.concatenate([x[:, i : i + last : strides[0]] for i in range(taps)], axis=-1)
    x = x.reshape(n * outputs, height, width, taps * channels)
    kernel = jnp.moveaxis(kernel, 0, 2).reshape(*kernel.shape[1:3], taps * channels, -1)
    edges = [(p, p) for p in padding[1:]]
    y = lax.conv_general_dilated(x, kernel, strides[1:], edges, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return y.reshape(n, outputs, *y.shape[1:])

"""A convolution with bias, for inference, in the forms that XLA computes fast."""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Convolution(nn.Module):
    """Convolution over two or three axes; outputs have the type of the inputs."""

    features: int  # channels of the outputs
    kernel_size: Sequence[int]  # of each axis
    strides: Sequence[int]  # of each axis
    padding: Sequence[int] | None = None  # zeros on either side of each axis; None: (kernel_size - 1) / 2

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[n, ..., channels] -> [n, ..., features]."""
        shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape).astype(x.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)
        padding = tuple((k - 1) // 2 for k in self.kernel_size) if self.padding is None else tuple(self.padding)
        y = convolve(x, kernel, tuple(self.strides), padding)
        return y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


class Depthwise(nn.Module):
    """Convolution of each channel alone over height and width, padded by :func:`pad_same`."""

    size: int  # of the kernel
    stride: int = 1
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[n, height, width, channels] -> [n, height / stride, width / stride, channels], rounded up."""
        channels, size = x.shape[-1], (self.size, self.size)
        kernel = self.param("kernel", nn.initializers.he_normal(), (*size, 1, channels)).astype(x.dtype)
        x = pad_same(x, self.size, self.stride)
        forms = {"cpu": _by_taps, "default": _grouped}
        y = lax.platform_dependent(
            x, kernel, **{k: functools.partial(form, stride=self.stride) for k, form in forms.items()}
        )
        if not self.use_bias:
            return y
        bias = self.param("bias", nn.initializers.zeros, (channels,)).astype(x.dtype)
        return bias.reshape(1, 1, 1, -1) + y


def pad_same(x: jax.Array, size: int, stride: int) -> jax.Array:
    """Return [n, height, width, channels] with the zeros at its borders that TensorFlow's ``SAME`` adds.

    Outputs of a convolution without padding have the size of the inputs by the stride then, rounded up; of an odd number of
    zeros there is one more at the end.
    """
    zeros = [max((-(-n // stride) - 1) * stride + size - n, 0) for n in x.shape[1:3]]
    return jnp.pad(x, ((0, 0), *((n // 2, n - n // 2) for n in zeros), (0, 0)))


def _grouped(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    return lax.conv_general_dilated(
        x, kernel, (stride,) * 2, "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=x.shape[-1]
    )


def _by_taps(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Sum the shifted maps, each times its number of the kernel: XLA's own form is ten times slower on a processor."""
    size = len(kernel)
    height, width = ((n - size) // stride + 1 for n in x.shape[1:3])
    return sum(
        x[:, i : i + (height - 1) * stride + 1 : stride, j : j + (width - 1) * stride + 1 : stride]
        * kernel[i : i + 1, j : j + 1]
        for i, j in np.ndindex(size, size)
    )


def convolve(x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], padding: tuple[int, ...]) -> jax.Array:
    """Return the convolution of [n, ..., in] with [..., in, out].

    On a processor one of size 1 is a matrix product, and those in three dimensions, which are slow in XLA, are made of
    two-dimensional ones. Those of stride 1 and three taps in time share products between neighbouring frames as well.
    """
    native = functools.partial(_native, strides=strides, padding=padding)
    if max(kernel.shape[:-2]) == 1 and not any(padding):
        form = _by_pixels
    elif len(strides) < 3:
        return native(x, kernel)
    elif x.shape[1] > 1 and kernel.shape[0] == 3 and (strides[0], padding[0]) == (1, 1):
        form, strides, padding = _by_pairs, strides[1:], padding[1:]
    elif x.shape[-1] < FEW_CHANNELS and (x.shape[1] + 2 * padding[0] - len(kernel)) // strides[0] % 2:
        form = _by_twos
    else:
        form = _by_patches if x.shape[-1] >= MANY_CHANNELS else _by_frames
    on_processor = functools.partial(form, strides=strides, padding=padding)
    return lax.platform_dependent(x, kernel, cpu=on_processor, default=native)


FEW_CHANNELS = 16  # below, products are small, and larger ones make up for the zeros of two frames at a time
MANY_CHANNELS = 512  # from here on maps are small, and a product with all of their patches is the faster form


def _native(x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], padding: tuple[int, ...]) -> jax.Array:
    axes = "THW"[-len(strides) :]
    layout = (f"N{axes}C", f"{axes}IO", f"N{axes}C")
    return lax.conv_general_dilated(x, kernel, strides, [(p, p) for p in padding], dimension_numbers=layout)


def _by_pixels(x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], padding: tuple[int, ...]) -> jax.Array:
    """Return the product of a kernel of size 1 with every pixel."""
    del padding
    thinned = x[(slice(None), *(slice(None, None, s) for s in strides))]
    return jnp.tensordot(thinned, kernel.reshape(kernel.shape[-2:]), 1)


def _by_patches(x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], padding: tuple[int, ...]) -> jax.Array:
    """Return the product of the kernel with all patches at once."""
    if x.shape[1] == 1 and padding[0]:  # all taps but one would meet nothing but zeros
        kernel, padding = kernel[padding[0] : padding[0] + 1], (0, *padding[1:])
    x = jnp.pad(x, ((0, 0), *((p, p) for p in padding), (0, 0)))
    *size, _, features = kernel.shape
    outputs = [(n - k) // s + 1 for n, k, s in zip(x.shape[1:-1], size, strides, strict=True)]
    patches = [
        x[(slice(None), *(slice(i, i + (o - 1) * s + 1, s) for i, o, s in zip(at, outputs, strides, strict=True)))]
        for at in np.ndindex(*size)
    ]
    return jnp.tensordot(jnp.concatenate(patches, axis=-1), kernel.reshape(-1, features), 1)


def _by_frames(x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], padding: tuple[int, ...]) -> jax.Array:
    """Convolve each output frame's input frames, with their channels side by side, in two dimensions."""
    stride, taps = strides[0], len(kernel)
    n, x = len(x), jnp.pad(x, ((0, 0), (padding[0], padding[0]), *((0, 0),) * 3))
    last = x.shape[1] - taps
    x = jnp.concatenate([x[:, i : i + last + 1 : stride] for i in range(taps)], axis=-1)
    kernel = jnp.moveaxis(kernel, 0, 2).reshape(*kernel.shape[1:3], x.shape[-1], -1)
    y = _native(x.reshape(-1, *x.shape[2:]), kernel, strides[1:], padding[1:])
    return y.reshape(n, -1, *y.shape[1:])


def _by_twos(x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], padding: tuple[int, ...]) -> jax.Array:
    """Convolve for two output frames at a time, by a longer kernel with zeros where each does not reach."""
    ends = (0, strides[0]), (strides[0], 0)
    both = jnp.concatenate([jnp.pad(kernel, (zeros, *((0, 0),) * 4)) for zeros in ends], axis=-1)
    y = _by_frames(x, both, (2 * strides[0], *strides[1:]), padding)
    y = jnp.moveaxis(y.reshape(*y.shape[:-1], 2, -1), 4, 2)
    return y.reshape(len(y), -1, *y.shape[3:])


def _by_pairs(x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], padding: tuple[int, ...]) -> jax.Array:
    """Compute two output frames from four two-dimensional convolutions instead of six (from three if there are two frames).

    F(2, 3) along time (Winograd, 1980; Lavin and Gray, 2016): three taps, stride 1, one frame of zeros on either side.
    """
    n, time = x.shape[:2]

    def products(x: jax.Array, kernel: jax.Array) -> jax.Array:
        y = _native(x.reshape(-1, *x.shape[2:]), kernel, strides, padding)
        return y.reshape(n, -1, *y.shape[1:])

    first, middle, last = kernel
    if time == 2:
        both = products(x[:, :1] + x[:, 1:], middle)
        differences = products(x[:, 1:], last - middle), products(x[:, :1], first - middle)
        return jnp.concatenate([both + difference for difference in differences], axis=1)
    x = jnp.pad(x, ((0, 0), (1, 1 + time % 2), *((0, 0),) * 3))
    pairs = (time + 1) // 2
    a, b, c, d = (x[:, i : i + 2 * pairs - 1 : 2] for i in range(4))
    p = products(a - c, first)
    q = products(b + c, (first + middle + last) / 2)
    r = products(c - b, (first - middle + last) / 2)
    s = products(b - d, last)
    y = jnp.stack([p + q + r, q - r - s], axis=2)
    return y.reshape(n, 2 * pairs, *y.shape[3:])[:, :time]

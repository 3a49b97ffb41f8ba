"""EfficientNet-Lite0 for inference (Tan and Le, 2019; Lite: Google, 2020): no squeeze-and-excitation, relu6 throughout.

BatchNorm is folded into the convolutions. Zeros are added at the borders as TensorFlow does.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from conclugen_jax.extract.networks.convolution import Convolution, Depthwise, pad_same

SIZE = 224  # side of the frames that the published weights were trained with
DIM = 1280  # of the features
EPSILON = 1e-3  # of BatchNorm
MEAN, STD = 127.0, 128.0  # of the values from 0 to 255, in all colours

STAGES = ((1, 16, 3, 1, 1), (2, 24, 3, 2, 6), (2, 40, 5, 2, 6), (3, 80, 3, 2, 6), (3, 112, 5, 1, 6), (4, 192, 5, 2, 6))
STAGES += ((1, 320, 3, 1, 6),)
"""Blocks, channels, size of the kernels, stride of the first block, by how much a block widens its channels."""


class Block(nn.Module):
    """An inverted residual block: wider channels, a convolution of each channel alone, fewer channels."""

    features: int  # channels of the outputs
    size: int  # of the kernels
    stride: int
    expansion: int  # factor of the channels between

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[n, height, width, c] -> [n, height / stride, width / stride, features]."""
        y, width = x, x.shape[-1] * self.expansion
        if self.expansion > 1:
            y = nn.relu6(Convolution(width, (1, 1), (1, 1), name="expand")(y))
        y = nn.relu6(Depthwise(self.size, self.stride, name="depthwise")(y))
        y = Convolution(self.features, (1, 1), (1, 1), name="project")(y)
        return x + y if x.shape == y.shape else y


class EfficientNetLite0(nn.Module):
    """Images -> feature vectors."""

    dtype: jnp.dtype = jnp.float32  # of the computation

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return averages over the last feature maps, float32 [n, 1280], of uint8 RGB [n, height, width, 3]."""
        x = ((x.astype(jnp.float32) - MEAN) / STD).astype(self.dtype)
        x = nn.relu6(Convolution(32, (3, 3), (2, 2), (0, 0), name="stem")(pad_same(x, 3, 2)))
        number = 0
        for count, features, size, stride, expansion in STAGES:
            for i in range(count):
                x = Block(features, size, stride if i == 0 else 1, expansion, name=f"block{number}")(x)
                number += 1
        x = nn.relu6(Convolution(DIM, (1, 1), (1, 1), name="head")(x))
        return jnp.mean(x.astype(jnp.float32), axis=(1, 2))

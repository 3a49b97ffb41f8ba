"""Residual networks for images and for clips, for inference: BatchNorm is folded into the convolutions.

ResNet as in torchvision (the stride of a bottleneck in its 3x3 convolution; He et al., 2016) and its inflation to three
dimensions with projection shortcuts (Hara et al., 2018, as in pretorched-x ``resnet3d``).
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from conclugen_jax.extract.networks.convolution import Convolution

STAGES = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
"""Depth -> residual blocks of each stage."""
WIDTHS = (64, 128, 256, 512)  # of the stages

NETWORKS = {f"resnet{mark}{depth}": (depth, axes) for mark, axes in (("", 2), ("3d", 3)) for depth in STAGES}
"""Name -> (depth, number of axes: height and width, or time before them)."""


class Block(nn.Module):
    """One residual block."""

    width: int  # channels of the inner convolutions
    stride: int  # on all axes
    bottleneck: bool  # three convolutions (1, 3, 1) with four times the channels at the end, else two (3, 3)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[n, ..., c] -> [n, ..., width or 4 * width], relu applied."""
        axes, width, stride = x.ndim - 2, self.width, self.stride
        layers, outputs = [(width, 3, stride), (width, 3, 1)], width
        if self.bottleneck:
            layers, outputs = [(width, 1, 1), (width, 3, stride), (4 * width, 1, 1)], 4 * width
        y = x
        for i, (features, size, step) in enumerate(layers, 1):
            y = nn.relu(y) if i > 1 else y
            y = Convolution(features, (size,) * axes, (step,) * axes, name=f"conv{i}")(y)
        if stride > 1 or x.shape[-1] != outputs:
            x = Convolution(outputs, (1,) * axes, (stride,) * axes, name="downsample")(x)
        return nn.relu(y + x)


class ResNet(nn.Module):
    """Images or clips -> feature vectors."""

    depth: int  # a key of STAGES
    mean: Sequence[float]  # of each colour, subtracted from values between 0 and 1
    std: Sequence[float]  # of each colour
    dtype: jnp.dtype = jnp.float32  # of the computation

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return features of frames [n, height, width, 3] or clips [n, time, height, width, 3], uint8 or float (0 to 1) RGB.

        They are float32 [n, 512 or 2048], averages over the last feature maps.
        """
        axes = x.ndim - 2
        if jnp.issubdtype(x.dtype, jnp.integer):
            x = x.astype(jnp.float32) / 255
        mean, std = (jnp.asarray(values).reshape((1,) * (axes + 1) + (3,)) for values in (self.mean, self.std))
        x = ((x - mean) / std).astype(self.dtype)
        strides = (2, 2) if axes == 2 else (1, 2, 2)
        x = nn.relu(Convolution(WIDTHS[0], (7,) * axes, strides, name="conv1")(x))
        x = nn.max_pool(x, (3,) * axes, (2,) * axes, ((1, 1),) * axes)
        for stage, (count, width) in enumerate(zip(STAGES[self.depth], WIDTHS, strict=True), 1):
            for number in range(count):
                stride = 2 if stage > 1 and number == 0 else 1
                x = Block(width, stride, self.depth >= 50, name=f"layer{stage}_{number}")(x)
        return jnp.mean(x.astype(jnp.float32), axis=tuple(range(1, axes + 1)))

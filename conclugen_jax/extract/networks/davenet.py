"""ResDAVEnet: a residual network over log-Mel spectrograms, for inference (Hsu et al., 2019; ResDAVEnet-VQ).

Convolutions are one wide in frequency and nine in time; BatchNorm is folded into them.
"""

from collections.abc import Sequence
from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp
import msgspec

from conclugen_jax.extract.networks.convolution import Convolution

WIDTHS = {"published": (128, 128, 256, 512, 1024), "authors": (128, 256, 256, 512, 1024)}
"""Channels of the stem and the four stages, in the published audio code and in the authors' copy of it."""

BLOCKS, KERNEL = 2, 9  # residual blocks of each stage; taps of a convolution in time


class Options(msgspec.Struct, forbid_unknown_fields=True):
    """Attributes of :class:`ResDAVEnet`, as folders of converted weights store them."""

    widths: Annotated[list[Annotated[int, msgspec.Meta(ge=1, le=2**14)]], msgspec.Meta(min_length=5, max_length=5)]
    kernel_mels: Annotated[int, msgspec.Meta(ge=1, le=1024)]


def _masked(x: jax.Array, lengths: jax.Array) -> jax.Array:
    """Set what is beyond the end to zero, as a convolution of the sound alone would see it."""
    return jnp.where((jnp.arange(x.shape[2])[None] < lengths[:, None])[:, None, :, None], x, 0)


class Block(nn.Module):
    """One residual block over [n, frequency, time, channels]."""

    width: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return outputs and their lengths in time, after relu."""
        strides = (self.stride, self.stride)
        shortcut = Convolution(self.width, (1, 1), strides, name="downsample")(x) if self.stride > 1 else x
        lengths = -(-lengths // self.stride)
        y = Convolution(self.width, (1, KERNEL), strides, name="conv1")(x)
        y = _masked(nn.relu(y), lengths)
        y = Convolution(self.width, (1, KERNEL), (1, 1), name="conv2")(y)
        return _masked(nn.relu(y + shortcut), lengths), lengths


class ResDAVEnet(nn.Module):
    """Spectrograms -> feature vectors."""

    widths: Sequence[int]  # channels of the stem and the four stages
    kernel_mels: int  # bands that the first convolution spans; spectrograms may have more
    dtype: jnp.dtype = jnp.float32  # of the computation

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array) -> jax.Array:
        """Return features of spectrograms [n, time, mels] with int [n] frames each (at least 1), each as if it were alone.

        They are float32 [n, 1024], averages over the time (and the frequency) of the last feature maps. Frames beyond
        a spectrogram's end have no influence.
        """
        x = x.astype(self.dtype).transpose(0, 2, 1)[..., None]
        x = Convolution(self.widths[0], (self.kernel_mels, 1), (1, 1), padding=(0, 0), name="conv1")(x)
        x = _masked(nn.relu(x), lengths)
        for stage, width in enumerate(self.widths[1:], 1):
            for number in range(BLOCKS):  # the first halves both axes and projects its shortcut
                x, lengths = Block(width, 1 if number else 2, name=f"layer{stage}_{number}")(x, lengths)
        total = x.astype(jnp.float32).mean(axis=1).sum(axis=1)  # zeros beyond the end
        return total / lengths[:, None]

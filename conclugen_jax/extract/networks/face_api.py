"""Two small networks of face-api: the expression of a face, and 68 points on it.

Both have the same body: four blocks of separable convolutions (Howard et al., 2017), each of which adds up the outputs of its
convolutions. Their weights are part of this package (MIT licence, see face_api_weights).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from conclugen_jax.extract.networks.convolution import Convolution, Depthwise, pad_same

SIZE = 112  # side of the pictures, in pixels
RATE = 4.0  # frames per second
MEAN = (122.782, 117.001, 104.298)  # of each colour from 0 to 255, subtracted
WIDTHS = (32, 64, 128, 256)  # channels of each block, which halves the sides

EXPRESSIONS = ("neutral", "happy", "sad", "angry", "fearful", "disgusted", "surprised")
"""Classes of the logits, in their order."""
OUTER_EYE_CORNERS = (36, 45)  # of the 68 points, counted from 0, in the order of dlib


class Separable(nn.Module):
    """A convolution of each channel alone, then one over the channels of each pixel."""

    features: int  # channels of the outputs
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[n, height, width, channels] -> [n, height / stride, width / stride, features], rounded up."""
        x = Depthwise(3, self.stride, use_bias=False, name="depthwise")(x)
        return Convolution(self.features, (1, 1), (1, 1), name="pointwise")(x)


class Block(nn.Module):
    """Four convolutions, the first of which halves the sides."""

    features: int  # channels of the outputs
    separable: bool  # whether the first convolution is

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[n, height, width, channels] -> [n, height / 2, width / 2, features], rounded up; relu applied."""
        if self.separable:
            x = Separable(self.features, 2, name="conv0")(x)
        else:
            x = Convolution(self.features, (3, 3), (2, 2), (0, 0), name="conv0")(pad_same(x, 3, 2))
        total = x = nn.relu(x)
        for number in (1, 2, 3):
            total += Separable(self.features, name=f"conv{number}")(x)
            x = nn.relu(total)
        return x


def _network(x: jax.Array, outputs: int, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Return features [n, 256] and outputs [n, outputs], float32; ``x`` as of :class:`Expression`."""
    x = ((x.astype(jnp.float32) - jnp.array(MEAN).reshape(1, 1, 1, 3)) / 255).astype(dtype)
    for number, width in enumerate(WIDTHS):
        x = Block(width, number > 0, name=f"dense{number}")(x)
    features = x.astype(jnp.float32).mean(axis=(1, 2))
    return features, nn.Dense(outputs, name="fc")(features)


class Expression(nn.Module):
    """Faces -> features, and the logits of :data:`EXPRESSIONS`."""

    dtype: jnp.dtype = jnp.float32  # of the convolutions

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return float32 [n, 256 + 7] of uint8 RGB [n, 112, 112, 3]."""
        return jnp.concatenate(_network(x, len(EXPRESSIONS), self.dtype), axis=1)


class Landmarks(nn.Module):
    """Faces -> 68 points, without position and size."""

    dtype: jnp.dtype = jnp.float32  # of the convolutions

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return float32 [n, 136] of uint8 RGB [n, 112, 112, 3]; see :func:`normalized`."""
        return normalized(_network(x, 2 * 68, self.dtype)[1])


def normalized(points: jax.Array) -> jax.Array:
    """Center the 68 points of each face, and divide them by the distance between the outer corners of the eyes.

    Both ``points`` and the result are [n, 136]: x (to the right) and y (downwards) of the first point, of the second, ...
    """
    points = points.reshape(-1, 68, 2)
    right, left = (points[:, corner] for corner in OUTER_EYE_CORNERS)
    distance = jnp.linalg.norm(left - right, axis=1).reshape(-1, 1, 1)
    return ((points - points.mean(axis=1, keepdims=True)) / distance).reshape(-1, 136)

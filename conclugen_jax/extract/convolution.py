"""A convolution with bias, for inference."""

from collections.abc import Sequence

import flax.linen as nn
import jax
from jax import lax


class Convolution(nn.Module):
    """Convolution over one to three axes; outputs have the type of the inputs.

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
        padding = [(k - 1) // 2 for k in self.kernel_size] if self.padding is None else self.padding
        axes = "THW"[-len(self.kernel_size) :]
        layout = (f"N{axes}C", f"{axes}IO", f"N{axes}C")
        y = lax.conv_general_dilated(x, kernel, self.strides, [(p, p) for p in padding], dimension_numbers=layout)
        return y + bias.reshape((1,) * (y.ndim - 1) + (-1,))

"""The encoder of Whisper for inference (Radford et al., 2022), of the size ``tiny`` where nothing else is said.

Two convolutions over time, of which the second halves it, and pre-norm Transformer layers over fixed positions.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

FRAMES = 3000  # of 10 ms that it hears at a time: 30 s
MELS = 80
STATE = 320  # samples at 16 kHz of a hidden state
EPSILON = 1e-5  # of the norms


class Layer(nn.Module):
    """Self-attention and a feed-forward network, each behind its norm."""

    num_heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[n, states, width] -> [n, states, width]."""
        width = x.shape[-1]
        dense = functools.partial(nn.Dense, dtype=x.dtype)
        norm = functools.partial(nn.LayerNorm, EPSILON, dtype=jnp.float32)
        y = norm(name="attention_norm")(x).astype(x.dtype)
        q, k, v = dense(3 * width, name="qkv")(y).reshape(*x.shape[:2], 3, self.num_heads, -1).transpose(2, 0, 3, 1, 4)
        # Scores and softmax in float32, whatever the type.
        scores = jnp.einsum("nhqd,nhkd->nhqk", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
        y = jnp.einsum("nhqk,nhkd->nqhd", jax.nn.softmax(scores).astype(x.dtype), v).reshape(x.shape)
        x = x + dense(width, name="out")(y)
        y = norm(name="feed_forward_norm")(x).astype(x.dtype)
        y = nn.gelu(dense(4 * width, name="up")(y), approximate=False)
        return x + dense(width, name="down")(y)


class WhisperEncoder(nn.Module):
    """Log-Mel spectrograms -> feature vectors."""

    width: int = 384  # of the hidden states
    num_layers: int = 4
    num_heads: int = 6
    states: int = FRAMES // 2  # that there are positions for
    dtype: jnp.dtype = jnp.float32  # of the computation

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array) -> jax.Array:
        """Return mean and standard deviation of the last hidden states over the sound: float32 [n, 2 * width].

        ``x`` is a spectrogram of :func:`conclugen_jax.extract.media.mel.whisper`, float [n, frames, mels]; ``lengths``, int
        [n], say how many states (of two frames each) are sound: the first ones, at least one. The network sees the rest, too.
        """
        x = x.astype(self.dtype)
        for number, stride in ((1, 1), (2, 2)):
            conv = nn.Conv(self.width, (3,), stride, padding=1, dtype=self.dtype, name=f"conv{number}")
            x = nn.gelu(conv(x), approximate=False)
        positions = self.param("positions", nn.initializers.zeros, (self.states, self.width))
        x = x + positions[None, : x.shape[1]].astype(self.dtype)
        for number in range(self.num_layers):
            x = Layer(self.num_heads, name=f"layer{number}")(x)
        x = nn.LayerNorm(EPSILON, dtype=jnp.float32, name="norm")(x)
        heard = (jnp.arange(x.shape[1])[None] < lengths[:, None])[..., None]
        mean = jnp.mean(x, axis=1, where=heard, keepdims=True)
        variance = jnp.mean((x - mean) ** 2, axis=1, where=heard)
        return jnp.concatenate([mean[:, 0], jnp.sqrt(variance)], axis=1)

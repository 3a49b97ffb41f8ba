"""Encoders for inference: BERT (Devlin et al., 2019), RoBERTa (Liu et al., 2019), DistilBERT (Sanh et al., 2019).

Post-norm Transformer layers over learned positions, as in the Hugging Face classes BertModel, RobertaModel, DistilBertModel.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

ACTIVATIONS = {
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_new": functools.partial(nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(nn.gelu, approximate=True),
    "relu": nn.relu,
    "silu": nn.silu,
}
"""By the names in published configurations."""


class Layer(nn.Module):
    """Self-attention and a feed-forward network, each followed by its norm."""

    num_heads: int
    hidden_dim: int
    activation: str
    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """[n, tokens, width] and bool [n, tokens] -> [n, tokens, width]."""
        n, tokens, width = x.shape
        heads = (n, tokens, self.num_heads, width // self.num_heads)
        query, key, value = (nn.Dense(width, dtype=x.dtype, name=name)(x).reshape(heads) for name in "qkv")
        # Scores and softmax in float32, whatever the type.
        scores = jnp.einsum("nqhd,nkhd->nhqk", query, key, preferred_element_type=jnp.float32)
        scores = jnp.where(mask[:, None, None], scores / heads[-1] ** 0.5, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        y = jnp.einsum("nhqk,nkhd->nqhd", weights, value).reshape(x.shape)
        x = self._norm("attention_norm", x + nn.Dense(width, dtype=x.dtype, name="out")(y))
        y = ACTIVATIONS[self.activation](nn.Dense(self.hidden_dim, dtype=x.dtype, name="up")(x))
        return self._norm("output_norm", x + nn.Dense(width, dtype=x.dtype, name="down")(y))

    def _norm(self, name: str, x: jax.Array) -> jax.Array:
        return nn.LayerNorm(self.epsilon, name=name, dtype=jnp.float32)(x).astype(x.dtype)


class TextEncoder(nn.Module):
    """Tokens -> feature vectors.

    Attributes:
      vocabulary: number of tokens.
      width: of the hidden states.
      num_layers: Transformer layers.
      num_heads: attention heads.
      hidden_dim: of the feed-forward networks.
      max_positions: rows of the table of positions.
      first_position: of the first token: 0, for RoBERTa 2.
      num_types: token types; 0 where the encoder knows none. All tokens are of the first type.
      activation: a key of :data:`ACTIVATIONS`.
      epsilon: of the norms.
      dtype: of the computation.
    """

    vocabulary: int
    width: int
    num_layers: int
    num_heads: int
    hidden_dim: int
    max_positions: int
    first_position: int = 0
    num_types: int = 0
    activation: str = "gelu"
    epsilon: float = 1e-12
    dtype: jnp.dtype = jnp.float32

    @property
    def max_tokens(self) -> int:
        """Return the number of tokens in a text, at most."""
        return self.max_positions - self.first_position

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Return the mean of the last hidden states over the real tokens, special ones included.

        Args:
          tokens: int [n, length].
          mask: bool [n, length], whether a token is real; real ones come first, and every row has one.

        Returns:
          float32 [n, width].
        """
        x = nn.Embed(self.vocabulary, self.width, name="tokens")(tokens)
        positions = self.first_position + jnp.arange(tokens.shape[1])
        x = x + nn.Embed(self.max_positions, self.width, name="positions")(positions)[None]
        if self.num_types:
            x = x + nn.Embed(self.num_types, self.width, name="types")(jnp.zeros_like(tokens))
        x = nn.LayerNorm(self.epsilon, name="norm")(x).astype(self.dtype)
        for number in range(self.num_layers):
            x = Layer(self.num_heads, self.hidden_dim, self.activation, self.epsilon, name=f"layer{number}")(x, mask)
        weights = mask[..., None].astype(jnp.float32)
        return (x.astype(jnp.float32) * weights).sum(axis=1) / weights.sum(axis=1)

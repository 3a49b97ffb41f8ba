"""Encoders for inference: BERT (Devlin et al., 2019), RoBERTa (Liu et al., 2019), DistilBERT (Sanh et al., 2019).

Post-norm Transformer layers over learned positions, as in the Hugging Face classes BertModel, RobertaModel, DistilBertModel.
"""

import functools
from typing import Annotated, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import msgspec

ACTIVATIONS = {"gelu": functools.partial(nn.gelu, approximate=False), "relu": nn.relu, "silu": nn.silu}
ACTIVATIONS |= dict.fromkeys(("gelu_new", "gelu_pytorch_tanh"), functools.partial(nn.gelu, approximate=True))
"""By the names in published configurations."""

Size = Annotated[int, msgspec.Meta(ge=1, le=2**24)]
Count = Annotated[int, msgspec.Meta(ge=0, le=1024)]


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What describes an encoder, as folders of converted weights store it."""

    vocabulary: Size  # number of tokens
    width: Size  # of the hidden states
    num_layers: Annotated[int, msgspec.Meta(ge=1, le=256)]  # Transformer layers
    num_heads: Size  # of the attention
    hidden_dim: Size  # of the feed-forward networks
    max_positions: Size  # rows of the table of positions
    first_position: Count  # of the first token: 0, for RoBERTa 2
    num_types: Count  # of tokens; 0 where the encoder knows none; all tokens are of the first type
    activation: Literal[tuple(ACTIVATIONS)]
    epsilon: Annotated[float, msgspec.Meta(gt=0, lt=1)]  # of the norms
    unit_length: bool = False  # of the vectors, as sentence-transformers scales them

    def __post_init__(self):
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is no multiple of num_heads {self.num_heads}")
        if self.max_tokens < 1:
            raise ValueError(f"no token fits into max_positions {self.max_positions}")

    @property
    def max_tokens(self) -> int:
        """Return the number of tokens in a text, at most."""
        return self.max_positions - self.first_position


class Layer(nn.Module):
    """Self-attention and a feed-forward network, each followed by its norm."""

    options: Options

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """[n, tokens, width] and bool [n, tokens] -> [n, tokens, width]."""
        (n, tokens, width), options = x.shape, self.options
        heads = (n, tokens, options.num_heads, width // options.num_heads)
        query, key, value = (nn.Dense(width, dtype=x.dtype, name=name)(x).reshape(heads) for name in "qkv")
        # Scores and softmax in float32, whatever the type.
        scores = jnp.einsum("nqhd,nkhd->nhqk", query, key, preferred_element_type=jnp.float32)
        scores = jnp.where(mask[:, None, None], scores / heads[-1] ** 0.5, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        y = jnp.einsum("nhqk,nkhd->nqhd", weights, value).reshape(x.shape)
        norm = functools.partial(nn.LayerNorm, options.epsilon, dtype=jnp.float32)
        x = norm(name="attention_norm")(x + nn.Dense(width, dtype=x.dtype, name="out")(y)).astype(x.dtype)
        y = ACTIVATIONS[options.activation](nn.Dense(options.hidden_dim, dtype=x.dtype, name="up")(x))
        return norm(name="output_norm")(x + nn.Dense(width, dtype=x.dtype, name="down")(y)).astype(x.dtype)


class TextEncoder(nn.Module):
    """Tokens -> feature vectors, computed in ``dtype``."""

    options: Options
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Return the mean of the last hidden states over the real tokens, special ones included: float32 [n, width].

        ``tokens`` are int [n, length]; ``mask``, bool of the same shape, says which are real: the first ones, at least one.
        """
        options = self.options
        x = nn.Embed(options.vocabulary, options.width, name="tokens")(tokens)
        positions = options.first_position + jnp.arange(tokens.shape[1])
        x = x + nn.Embed(options.max_positions, options.width, name="positions")(positions)[None]
        if options.num_types:
            x = x + nn.Embed(options.num_types, options.width, name="types")(jnp.zeros_like(tokens))
        x = nn.LayerNorm(options.epsilon, name="norm")(x).astype(self.dtype)
        for number in range(options.num_layers):
            x = Layer(options, name=f"layer{number}")(x, mask)
        weights = mask[..., None].astype(jnp.float32)
        x = (x.astype(jnp.float32) * weights).sum(axis=1) / weights.sum(axis=1)
        return x / jnp.linalg.norm(x, axis=1, keepdims=True) if options.unit_length else x

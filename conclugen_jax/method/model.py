"""The networks of the method as Flax modules: heads on frozen features, and a classifier.

Sizes: n rows, feature_dims[m] inputs of modality m, R representation_dim, P projection_dim, K num_clusters,
H reconstruction_dim.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_type_hints

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from conclugen_jax.method import collectives, fusion, losses

DTYPES = {"float32": jnp.float32, "tensorfloat32": jnp.float32, "bfloat16": jnp.bfloat16}
"""config.precision -> type of the networks' matrix products."""

HEADS = ("projection", "clustering", "decoder")


@flax.struct.dataclass
class Encoded:
    """The part of the training network that works row by row, each a dict by modality; empty where the head is missing.

    Attributes:
      reduced: [n, R/8], what the first Linear of the projection gives.
      squared_errors: float32 [n], of the reconstruction, mean over the modality's features.
    """

    reduced: dict[str, jax.Array]
    squared_errors: dict[str, jax.Array]


@flax.struct.dataclass
class Projected:
    """What the losses over the whole batch need, each a dict by modality; empty where the head is missing.

    Attributes:
      projections: float32 [n, P], unit rows.
      cluster_logits: float32 [n, K].
    """

    projections: dict[str, jax.Array]
    cluster_logits: dict[str, jax.Array]


@flax.struct.dataclass
class ModelOutputs:
    """What the pretraining network computes, each a dict by modality; empty where the head does not exist.

    Attributes:
      inputs: [n, feature_dims[m]], the features as the network saw them (standardised where the model does so):
        the target of the reconstruction.
      representations: [n, R], what downstream tasks use.
      projections: float32 [n, P], unit rows, for the contrastive losses.
      cluster_logits: float32 [n, K].
      reconstructions: [n, feature_dims[m]].
    """

    inputs: dict[str, jax.Array]
    representations: dict[str, jax.Array]
    projections: dict[str, jax.Array]
    cluster_logits: dict[str, jax.Array]
    reconstructions: dict[str, jax.Array]


def linear(
    features: int, fan_in: int, *, dtype: Any, name: str, use_bias: bool = True, first: bool = False
) -> nn.Dense:
    """A Dense layer that starts as the authors' layers do: weights and biases uniform in +-1/sqrt(fan_in).

    ``first``: nobody needs the gradient of its input.
    """

    def uniform(key, shape, dtype=jnp.float32):
        bound = fan_in**-0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=uniform,
        bias_init=uniform,
        dot_general=jax.lax.dot_general if first or jax.default_backend() != "cpu" else _dot_general,
        name=name,
    )


def _dot_general(x: jax.Array, kernel: jax.Array, *_: Any, **__: Any) -> jax.Array:
    """What Dense calls for [n, inputs], [inputs, outputs]."""
    return _product(x, kernel)


@jax.custom_vjp
def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x kernel. The gradient of the kernel waits for that of x, so that the kernel can be updated in its place.

    Else XLA's compiler for CPUs sees no reason why the update should not come before the kernel's last use, and copies all
    parameters at every step.
    """
    return x @ kernel


def _product_forward(x, kernel):
    return x @ kernel, (x, kernel)


def _product_backward(factors, gradient):
    x, kernel = factors
    of_x = gradient @ kernel.T
    return of_x, x.T @ gradient + 0 * of_x[0, 0]


_product.defvjp(_product_forward, _product_backward)


@jax.custom_vjp
def relu(x: jax.Array) -> jax.Array:
    """max(x, 0), of which only the result is kept for the backward pass; ``jax.nn.relu`` keeps x beside it."""
    return jnp.maximum(x, 0)


def _relu_forward(x):
    y = relu(x)
    return y, y


def _relu_backward(y, gradient):
    return (jnp.where(y > 0, gradient, 0),)


relu.defvjp(_relu_forward, _relu_backward)


class RepresentationHead(nn.Module):
    """Gated embedding unit: relu(fc1 x) -> y * sigmoid(gate y) -> relu(fc2 y). [n, dim] -> [n, R].

    With ``bottleneck`` the unit works at the input's size and one more Linear, ``expand``, leads to R.
    """

    representation_dim: int
    bottleneck: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dim = x.shape[1]
        width = dim if self.bottleneck else self.representation_dim
        y = relu(linear(width, dim, dtype=self.dtype, name="fc1", first=True)(x))
        y = y * nn.sigmoid(linear(width, width, dtype=self.dtype, name="gate")(y))
        y = relu(linear(width, width, dtype=self.dtype, name="fc2")(y))
        if self.bottleneck:
            y = linear(self.representation_dim, width, dtype=self.dtype, name="expand")(y)
        return y


class RepresentationHeads(nn.Module):
    """One :class:`RepresentationHead` per modality."""

    bottleneck: Sequence[str]
    representation_dim: int
    dtype: Any

    @nn.compact
    def __call__(self, features: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        return {
            m: RepresentationHead(self.representation_dim, m in self.bottleneck, self.dtype, name=m)(x)
            for m, x in features.items()
        }


class BatchNorm(nn.Module):
    """Batch normalisation over the valid rows of all devices.

    Unlike ``flax.linen.BatchNorm`` it weighs devices by their number of valid rows, so that a batch split over
    devices gives the numbers of the whole batch. Running averages follow PyTorch: ``running = momentum * running +
    (1 - momentum) * batch``, with the unbiased variance.
    """

    momentum: float
    epsilon: float
    axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array, valid: jax.Array | None, train: bool) -> jax.Array:
        dim = x.shape[1]
        scale = self.param("scale", nn.initializers.ones, (dim,))
        bias = self.param("bias", nn.initializers.zeros, (dim,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (dim,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (dim,))
        y = x.astype(jnp.float32)
        if train:
            mean, var, count = self._statistics(y, collectives.all_valid(x.shape[0], valid))
            if not self.is_initializing():
                unbiased = var * count / jnp.maximum(count - 1, 1)
                keep = jnp.where(count > 0, self.momentum, 1.0)
                running_mean.value = keep * running_mean.value + (1 - keep) * mean
                running_var.value = keep * running_var.value + (1 - keep) * unbiased
        else:
            mean, var = running_mean.value, running_var.value
        factor = scale * jax.lax.rsqrt(var + self.epsilon)
        return ((y - mean[None, :]) * factor[None, :] + bias[None, :]).astype(x.dtype)

    def _statistics(self, y: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        count = collectives.total(valid.sum(), self.axis_name).astype(jnp.float32)
        divisor = jnp.maximum(count, 1)
        kept = jnp.where(valid[:, None], y, 0)
        mean = collectives.total(kept.sum(axis=0), self.axis_name) / divisor
        deviation = jnp.where(valid[:, None], y - mean[None, :], 0)
        var = collectives.total(jnp.square(deviation).sum(axis=0), self.axis_name) / divisor
        return mean, var, count


class ProjectionHead(nn.Module):
    """Linear R -> R/8, BatchNorm, relu, Linear -> P, and a last relu by choice, in two stages.

    ``reduce`` is the first Linear, row by row: [n, R] -> [n, R/8]. ``project`` is the rest, over the whole batch:
    [n, R/8] -> [n, P].
    """

    representation_dim: int
    projection_dim: int
    last_relu: bool
    momentum: float
    epsilon: float
    dtype: Any
    axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array, stage: str, valid: jax.Array | None = None, train: bool = False) -> jax.Array:
        hidden = self.representation_dim // 8
        if stage == "reduce":
            return linear(hidden, self.representation_dim, dtype=self.dtype, name="fc1")(x)
        y = BatchNorm(self.momentum, self.epsilon, self.axis_name, name="norm")(x, valid, train)
        y = linear(self.projection_dim, hidden, dtype=self.dtype, name="fc2")(relu(y))
        return relu(y) if self.last_relu else y


class SeparateProjections(nn.Module):
    """One :class:`ProjectionHead` per modality."""

    head: Mapping[str, Any]

    @nn.compact
    def __call__(self, x: Mapping[str, jax.Array], stage: str, valid: Mapping[str, Any], train: bool) -> dict:
        return {m: ProjectionHead(**self.head, name=m)(v, stage, valid.get(m), train) for m, v in x.items()}


class Decoder(nn.Module):
    """Linear R -> H, relu, Linear -> the modality's features, and a last relu by choice. [n, R] -> [n, dim]."""

    reconstruction_dim: int
    feature_dim: int
    last_relu: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = relu(linear(self.reconstruction_dim, x.shape[1], dtype=self.dtype, name="fc1")(x))
        y = linear(self.feature_dim, self.reconstruction_dim, dtype=self.dtype, name="fc2")(y)
        return relu(y) if self.last_relu else y


class Decoders(nn.Module):
    """One :class:`Decoder` per modality."""

    feature_dims: Mapping[str, int]
    reconstruction_dim: int
    last_relu: bool
    dtype: Any

    @nn.compact
    def __call__(self, representations: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        return {
            m: Decoder(self.reconstruction_dim, self.feature_dims[m], self.last_relu, self.dtype, name=m)(x)
            for m, x in representations.items()
        }


class ConCluGen(nn.Module):
    """The pretraining network.

    Attributes:
      feature_dims: modality -> size of its feature vector, any number of modalities of any names.
      bottleneck: modalities whose gated unit works at the input's size (audio in the paper).
      representation_dim: R; a multiple of 8.
      projection_dim: P.
      num_clusters: K.
      reconstruction_dim: H.
      projection_sharing: ``shared`` (one projection head for all modalities, the authors' code) or ``separate``
        (one each, the paper's text).
      projection_relu: relu after the projection's last Linear.
      decoder_relu: relu after the decoder's last Linear.
      heads: which of projection, clustering and decoder exist; representations always do.
      standardize: subtract ``feature_stats/<modality>/mean`` and divide by ``.../scale`` before the first layer.
      norm_momentum: share of the running averages kept at each BatchNorm update.
      norm_epsilon: added to BatchNorm's variance.
      dtype: type of the matrix products; parameters stay float32.
      axis_name: mapped axis over which the batch is split.
    """

    feature_dims: Mapping[str, int]
    bottleneck: Sequence[str] = ("audio",)
    representation_dim: int = 4096
    projection_dim: int = 512
    num_clusters: int = 8
    reconstruction_dim: int = 1024
    projection_sharing: str = "shared"
    projection_relu: bool = True
    decoder_relu: bool = False
    heads: Sequence[str] = HEADS
    standardize: bool = False
    norm_momentum: float = 0.9
    norm_epsilon: float = 1e-5
    dtype: Any = jnp.float32
    axis_name: str | None = None

    def setup(self) -> None:
        if self.standardize:
            self.feature_stats = {
                m: self.variable("feature_stats", m, self._identity_stats, dim) for m, dim in self.feature_dims.items()
            }
        self.representation = RepresentationHeads(tuple(self.bottleneck), self.representation_dim, self.dtype)
        if "projection" in self.heads:
            head = {
                "representation_dim": self.representation_dim,
                "projection_dim": self.projection_dim,
                "last_relu": self.projection_relu,
                "momentum": self.norm_momentum,
                "epsilon": self.norm_epsilon,
                "dtype": self.dtype,
                "axis_name": self.axis_name,
            }
            if self.projection_sharing == "shared":
                self.projection = ProjectionHead(**head)
            else:
                self.projection = SeparateProjections(head)
        if "clustering" in self.heads:
            self.clustering = linear(
                self.num_clusters, self.projection_dim, dtype=self.dtype, name=None, use_bias=False
            )
        if "decoder" in self.heads:
            self.decoder = Decoders(self.feature_dims, self.reconstruction_dim, self.decoder_relu, self.dtype)

    def __call__(
        self,
        features: Mapping[str, jax.Array],
        *,
        present: Mapping[str, jax.Array] | None = None,
        train: bool = False,
    ) -> ModelOutputs:
        """Run all heads.

        Args:
          features: modality -> [n, feature_dims[m]].
          present: modality -> boolean [n]; rows without the modality do not enter BatchNorm's statistics. ``None``
            or a missing modality: all rows have it.
          train: normalise with the batch's statistics and update the running ones (``mutable=["batch_stats"]``).

        Returns:
          ModelOutputs.

        Raises:
          ValueError: a modality that the model does not know, or of another size.
        """
        inputs = self.standardized(features)
        representations = self.representation(inputs)
        projected = self.project(self._projection(representations, "reduce"), present=present, train=train)
        return ModelOutputs(
            inputs=inputs,
            representations=representations,
            projections=projected.projections,
            cluster_logits=projected.cluster_logits,
            reconstructions=self.decoder(representations) if "decoder" in self.heads else {},
        )

    def encode(self, features: Mapping[str, jax.Array]) -> Encoded:
        """What needs one row at a time: a batch may pass through it in parts. modality -> [n, feature_dims[m]]."""
        inputs = self.standardized(features)
        representations = self.representation(inputs)
        decoded = self.decoder(representations) if "decoder" in self.heads else {}
        return Encoded(
            reduced=self._projection(representations, "reduce"),
            squared_errors={m: losses.squared_errors(x, inputs[m]) for m, x in decoded.items()},
        )

    def project(
        self, reduced: Mapping[str, jax.Array], *, present: Mapping[str, jax.Array] | None = None, train: bool = False
    ) -> Projected:
        """What needs the whole batch; arguments as of :meth:`__call__`, and ``Encoded.reduced``."""
        # In the model's own order, which a dict loses in a compiled loop: BatchNorm's averages are updated one by one.
        reduced = {m: reduced[m] for m in self.feature_dims if m in reduced}
        projected = self._projection(reduced, "project", present or {}, train)
        logits = {m: self.clustering(x) for m, x in projected.items()} if "clustering" in self.heads else {}
        return Projected(
            projections={m: losses.unit_rows(x) for m, x in projected.items()},
            cluster_logits={m: x.astype(jnp.float32) for m, x in logits.items()},
        )

    def represent(self, features: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Representations only: modality -> [n, feature_dims[m]] -> modality -> [n, R]; any of the model's modalities."""
        return self.representation(self.standardized(features))

    def standardized(self, features: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Features as the first layer sees them, in the order of ``feature_dims``."""
        for m, x in features.items():
            if x.ndim != 2 or x.shape[1] != self.feature_dims.get(m):
                raise ValueError(
                    f"modality {m!r} has features of shape {x.shape}; the model takes [n, dim] with {dict(self.feature_dims)}"
                )
        return {m: self._standardize(m, features[m]) for m in self.feature_dims if m in features}

    def _standardize(self, modality: str, x: jax.Array) -> jax.Array:
        if not self.standardize:
            return x
        stats = self.feature_stats[modality].value
        return (x - stats["mean"][None, :]) / stats["scale"][None, :]

    @staticmethod
    def _identity_stats(dim: int) -> dict[str, jax.Array]:
        return {"mean": jnp.zeros(dim), "scale": jnp.ones(dim)}

    def _projection(self, x: Mapping[str, jax.Array], stage: str, present: Any = None, train: bool = False):
        """A stage of the projection for each modality."""
        valid = present or {}
        if "projection" not in self.heads:
            return {}
        if self.projection_sharing == "shared":
            return {m: self.projection(v, stage, valid.get(m), train) for m, v in x.items()}
        return self.projection(x, stage, valid, train)


class Classifier(nn.Module):
    """Dropout and one Linear on the joined representations.

    Attributes:
      num_outputs: classes, or labels of a multi-label task, or 1.
      dropout_rate: share of representation units set to zero while training.
      fusion: ``concat``: the modalities side by side; ``mean``: over those that a row has.
      dtype: type of the matrix product; the parameters stay float32.
      axis_name: mapped axis over which the batch is split.
    """

    num_outputs: int
    dropout_rate: float
    fusion: str = "concat"
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self,
        representations: Mapping[str, jax.Array],
        *,
        present: Mapping[str, jax.Array],
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Logits of the classes or labels.

        Args:
          representations: modality -> [n, R].
          present: modality -> boolean [n]; the units of an absent modality are zero.
          dropout_key: the same on all devices; ``None``: no dropout.

        Returns:
          float32 [n, num_outputs].
        """
        x = fusion.fuse(representations, present, self.fusion)
        if dropout_key is not None and self.dropout_rate:
            # Drawn for the whole batch, so that the number of devices changes nothing.
            shape = (x.shape[0] * collectives.device_count(self.axis_name), x.shape[1])
            kept = jax.random.bernoulli(dropout_key, 1 - self.dropout_rate, shape)
            kept = collectives.own_rows(kept, x.shape[0], self.axis_name)
            x = jnp.where(kept, x / (1 - self.dropout_rate), 0)
        return linear(self.num_outputs, x.shape[1], dtype=self.dtype, name="linear")(x).astype(jnp.float32)


_FROM_ELSEWHERE = {"feature_dims", "num_clusters", "heads", "standardize", "dtype", "axis_name", "parent", "name"}
SETTINGS = {name: kind for name, kind in get_type_hints(ConCluGen).items() if name not in _FROM_ELSEWHERE}
"""Attributes of the network that a configuration has as ``model.NAME``, with their types."""


def from_config(config: ConfigDict, feature_dims: Mapping[str, int], axis_name: str | None = None) -> ConCluGen:
    """The network of a configuration; heads whose loss has weight 0 do not exist."""
    weights, heads = config.loss, []
    if weights.contrastive_weight or weights.clustering_weight or weights.instance_weight:
        heads.append("projection")
    if weights.clustering_weight:
        heads.append("clustering")
    if weights.reconstruction_weight:
        heads.append("decoder")
    return ConCluGen(
        feature_dims=dict(feature_dims),
        num_clusters=config.clustering.num_clusters,
        heads=tuple(heads),
        standardize=config.data.standardize,
        dtype=DTYPES[config.precision],
        axis_name=axis_name,
        **{name: config.model[name] for name in SETTINGS},
    )


@functools.partial(jax.jit, static_argnums=0)
def _initial(model: ConCluGen, key: jax.Array, features: dict[str, jax.Array]) -> Any:
    return model.init(key, features, train=True)


def initial_variables(
    model: ConCluGen, key: jax.Array, standardization: Callable[[str], tuple[Any, Any]] | None
) -> dict[str, Any]:
    """Return random parameters, fresh running averages and, if the model standardises, the data set's statistics.

    Args:
      model: the network.
      key: random key.
      standardization: modality -> (mean, scale), each [dim]; needed only by a model that standardises.
    """
    features = {m: jnp.zeros((2, dim)) for m, dim in model.feature_dims.items()}
    alone = model.clone(axis_name=None, feature_dims=flax.core.FrozenDict(model.feature_dims))  # which can be hashed
    variables = dict(_initial(alone, key, features))
    if model.standardize:
        stats = {m: standardization(m) for m in model.feature_dims}
        variables["feature_stats"] = {m: {"mean": mean, "scale": scale} for m, (mean, scale) in stats.items()}
    return variables

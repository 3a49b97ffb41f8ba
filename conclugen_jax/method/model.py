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

from conclugen_jax.method import collectives, layers, losses

DTYPES = {"float32": jnp.float32, "tensorfloat32": jnp.float32, "bfloat16": jnp.bfloat16}
"""config.precision -> type of the networks' matrix products."""

PROJECTING = ("contrastive", "clustering", "instance", "fusion")  # losses of projections
HEADS = ("projection", "clustering", "decoder")
VECTORS = ("representation", "pre_activation", "both", "projection", "with_raw")
"""What may be handed on; see :class:`ConCluGen`."""
ByModality = Mapping[str, jax.Array]


@flax.struct.dataclass
class ModelOutputs:
    """What the pretraining network computes, each a dict by modality; empty where the head does not exist."""

    inputs: ByModality  # [n, feature_dims[m]], as the first layer sees them, optionally standardised; L_Rec's target
    representations: ByModality  # [n, R], what downstream tasks use
    projections: ByModality  # float32 [n, P], unit rows, for the contrastive losses
    cluster_logits: ByModality  # float32 [n, K]
    reconstructions: ByModality  # [n, feature_dims[m]]


class ConCluGen(nn.Module):
    """The pretraining network."""

    feature_dims: Mapping[str, int]  # modality -> size of its feature vector, any number of modalities of any names
    representation_head: str = "gated"  # paper's gated unit | "linear": one Linear, whatever ``bottleneck`` says
    bottleneck: Sequence[str] = ("audio",)  # modalities whose gated unit works at the input's size (audio in the paper)
    representation_dim: int = 4096  # R; a multiple of 8
    projection_dim: int = 512  # P
    num_clusters: int = 8  # K
    reconstruction_dim: int = 1024  # H
    projection_sharing: str = "shared"  # one head for all (authors' code) | "separate": one each (paper's text)
    projection_relu: bool = True  # relu after the projection's last Linear
    decoder_relu: bool = False  # relu after the decoder's last Linear
    heads: Sequence[str] = HEADS  # those that exist; representations always do
    vectors: str = "representation"
    """What :meth:`represent` gives: the representation; the same before its last relu; that and its relu side by side; the
    projection; the representation beside the inputs as the first layer sees them."""
    standardize: bool = False  # first subtract ``feature_stats/<modality>/mean`` and divide by ``.../scale``
    norm_momentum: float = 0.9  # share of the running averages kept at each BatchNorm update
    norm_epsilon: float = 1e-5  # added to BatchNorm's variance
    dtype: Any = jnp.float32  # of the matrix products; parameters stay float32
    axis_name: str | None = None  # mapped axis over which the batch is split

    def setup(self) -> None:
        """Create the networks that the losses with a weight need."""
        if self.standardize:
            self.feature_stats = {
                m: self.variable("feature_stats", m, self._identity_stats, dim) for m, dim in self.feature_dims.items()
            }
        encoder = functools.partial(layers.RepresentationHead, self.representation_head, self.representation_dim)
        self.representation = layers.PerModality(lambda m: encoder(m in self.bottleneck, self.dtype, name=m))
        if "projection" in self.heads:
            norm = {"momentum": self.norm_momentum, "epsilon": self.norm_epsilon, "axis_name": self.axis_name}
            sizes = self.representation_dim, self.projection_dim, self.projection_relu
            head = functools.partial(layers.ProjectionHead, *sizes, dtype=self.dtype, **norm)
            shared = self.projection_sharing == "shared"
            self.projection = head() if shared else layers.PerModality(lambda m: head(name=m))
        if "clustering" in self.heads:
            self.clustering = layers.linear(
                self.num_clusters, self.projection_dim, dtype=self.dtype, name=None, use_bias=False
            )
        if "decoder" in self.heads:
            decoder = functools.partial(layers.Decoder, self.reconstruction_dim, last_relu=self.decoder_relu)
            self.decoder = layers.PerModality(lambda m: decoder(self.feature_dims[m], dtype=self.dtype, name=m))

    def __call__(self, features: ByModality, *, present: ByModality | None = None, train: bool = False) -> ModelOutputs:
        """Run all heads.

        Args:
          features: modality -> [n, feature_dims[m]]; other sizes or modalities raise ``ValueError``.
          present: modality -> boolean [n]; rows without the modality do not enter BatchNorm's statistics. ``None``
            or a missing modality: all rows have it.
          train: normalise with the batch's statistics and update the running ones (``mutable=["batch_stats"]``).
        """
        inputs, representations, reduced, reconstructions = self.encode(features)
        projections, cluster_logits = self.project(reduced, present=present, train=train)
        return ModelOutputs(inputs, representations, projections, cluster_logits, reconstructions)

    def encode(
        self, features: ByModality, dropped: ByModality | None = None
    ) -> tuple[ByModality, ByModality, ByModality, ByModality]:
        """Return inputs, representations, ``reduced`` [n, R/8] (projection's first Linear), reconstructions, row by row.

        ``dropped``, modality -> float32 [n, feature_dims[m]], multiplies what the first layer sees; ``inputs`` stay whole.
        """
        inputs, dropped = self.standardized(features), dropped or {}
        seen = {m: x * dropped[m] if m in dropped else x for m, x in inputs.items()}
        representations = {m: self.representation(m, x) for m, x in seen.items()}
        reduced = self._projection(representations, "reduce")
        decoded = {m: self.decoder(m, x) for m, x in representations.items()} if "decoder" in self.heads else {}
        return inputs, representations, reduced, decoded

    def project(
        self, reduced: ByModality, *, present: ByModality | None = None, train: bool = False
    ) -> tuple[ByModality, ByModality]:
        """Do what needs the whole batch: ``reduced`` -> (projections, cluster_logits); see :meth:`__call__`."""
        # In the model's own order, which a dict loses in a compiled loop: BatchNorm's averages are updated one by one.
        reduced = {m: reduced[m] for m in self.feature_dims if m in reduced}
        projected = self._projection(reduced, "project", present or {}, train)
        logits = {m: self.clustering(x) for m, x in projected.items()} if "clustering" in self.heads else {}
        projections = {m: losses.unit_rows(x) for m, x in projected.items()}
        return projections, {m: x.astype(jnp.float32) for m, x in logits.items()}

    def represent(self, features: ByModality) -> dict[str, jax.Array]:
        """Return the ``vectors`` alone: modality -> [n, feature_dims[m]] -> [n, vector_dims[m]]; any of the modalities."""
        inputs = self.standardized(features)
        before_relu = self.vectors in ("pre_activation", "both")
        found = {m: self.representation(m, x, before_relu) for m, x in inputs.items()}
        if self.vectors == "both":
            return {m: jnp.concatenate([x, layers.relu(x)], axis=1) for m, x in found.items()}
        if self.vectors == "projection":
            return dict(self.project(self._projection(found, "reduce"))[0])
        if self.vectors == "with_raw":
            return {m: jnp.concatenate([x, inputs[m].astype(x.dtype)], axis=1) for m, x in found.items()}
        return found

    @property
    def vector_dims(self) -> dict[str, int]:
        """Modality -> size of what :meth:`represent` gives."""
        size = {"projection": self.projection_dim, "both": 2 * self.representation_dim}
        size = size.get(self.vectors, self.representation_dim)
        return {m: size + dim * (self.vectors == "with_raw") for m, dim in self.feature_dims.items()}

    def standardized(self, features: ByModality) -> dict[str, jax.Array]:
        """Features as the first layer sees them, in the order of ``feature_dims``."""
        for m, x in features.items():
            if x.ndim != 2 or x.shape[1] != self.feature_dims.get(m):
                raise ValueError(
                    f"modality {m!r} has features of shape {x.shape}; the model takes [n, dim] with {dict(self.feature_dims)}"
                )
        inputs = {m: features[m] for m in self.feature_dims if m in features}
        if not self.standardize:
            return inputs
        stats = {m: self.feature_stats[m].value for m in inputs}
        return {m: (x - stats[m]["mean"][None, :]) / stats[m]["scale"][None, :] for m, x in inputs.items()}

    @staticmethod
    def _identity_stats(dim: int) -> dict[str, jax.Array]:
        return {"mean": jnp.zeros(dim), "scale": jnp.ones(dim)}

    def _projection(self, x: ByModality, stage: str, valid: Mapping[str, Any] | None = None, train: bool = False):
        if "projection" not in self.heads:
            return {}
        valid, shared = valid or {}, self.projection_sharing == "shared"
        heads = {m: self.projection if shared else functools.partial(self.projection, m) for m in x}
        return {m: heads[m](v, stage, valid.get(m), train) for m, v in x.items()}


class Classifier(nn.Module):
    """Dropout and one Linear on the joined representations."""

    num_outputs: int  # classes, or labels of a multi-label task, or 1
    dropout_rate: float  # share of representation units set to zero while training
    fusion: str = "concat"  # how representations are joined, see ``layers.fuse``
    dtype: Any = jnp.float32  # of the matrix product; the parameters stay float32
    axis_name: str | None = None  # mapped axis over which the batch is split

    @nn.compact
    def __call__(
        self, representations: ByModality, *, present: ByModality, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """Return the logits of the classes or labels, float32 [n, num_outputs].

        Args:
          representations: modality -> [n, R].
          present: modality -> boolean [n]; the units of an absent modality are zero.
          dropout_key: the same on all devices; ``None``: no dropout.
        """
        x = layers.fuse(representations, present, self.fusion)
        if dropout_key is not None and self.dropout_rate:
            # Drawn for the whole batch, so that the number of devices changes nothing.
            shape = (x.shape[0] * collectives.device_count(self.axis_name), x.shape[1])
            kept = jax.random.bernoulli(dropout_key, 1 - self.dropout_rate, shape)
            kept = collectives.own_rows(kept, x.shape[0], self.axis_name)
            x = jnp.where(kept, x / (1 - self.dropout_rate), 0)
        return layers.linear(self.num_outputs, x.shape[1], dtype=self.dtype, name="linear")(x).astype(jnp.float32)


_FROM_ELSEWHERE = {
    "feature_dims",
    "num_clusters",
    "heads",
    "vectors",
    "standardize",
    "dtype",
    "axis_name",
    "parent",
    "name",
}
SETTINGS = {name: kind for name, kind in get_type_hints(ConCluGen).items() if name not in _FROM_ELSEWHERE}
"""Attributes of the network that a configuration has as ``model.NAME``, with their types."""


def from_config(config: ConfigDict, feature_dims: Mapping[str, int], axis_name: str | None = None) -> ConCluGen:
    """Make the network of a configuration; heads whose loss has weight 0 do not exist."""
    weights = config.loss
    needed = {
        "projection": any(weights[f"{name}_weight"] for name in PROJECTING),
        "clustering": weights.clustering_weight,
        "decoder": weights.reconstruction_weight,
    }
    return ConCluGen(
        feature_dims=dict(feature_dims),
        num_clusters=config.clustering.num_clusters,
        heads=tuple(head for head in HEADS if needed[head]),
        vectors=config.evaluation.vectors,
        standardize=config.data.standardize != "none",
        dtype=DTYPES[config.precision],
        axis_name=axis_name,
        **{name: config.model[name] for name in SETTINGS},
    )


_initial = jax.jit(lambda model, key, features: model.init(key, features, train=True), static_argnums=0)


def initial_variables(
    model: ConCluGen, key: jax.Array, statistics: Callable[[str], Mapping[str, Any]] | None
) -> dict[str, Any]:
    """Return random parameters, fresh running averages and, if the model standardises, the data set's statistics.

    ``statistics``, modality -> ``mean``, ``scale`` and what belongs to them, each [dim], is needed by a model that
    standardises only.
    """
    features = {m: jnp.zeros((2, dim)) for m, dim in model.feature_dims.items()}
    alone = model.clone(axis_name=None, feature_dims=flax.core.FrozenDict(model.feature_dims))  # which can be hashed
    variables = dict(_initial(alone, key, features))
    if model.standardize:
        variables["feature_stats"] = {m: dict(statistics(m)) for m in model.feature_dims}
    return variables

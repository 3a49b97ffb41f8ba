"""Everything that changes during training, in one tree."""

from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

Metrics = dict[str, jax.Array]  # name -> scalar, averaged over the global batch


@flax.struct.dataclass
class TrainState:
    """State of a pretraining or downstream run."""

    step: jax.Array  # int32 scalar, optimizer steps done; also the position in the stream of batches
    params: Any  # trained and frozen parameters
    batch_stats: Any  # running averages of BatchNorm
    feature_stats: Any  # modality -> {mean, scale}, each [dim], if the model standardises its input; never changes
    opt_state: Any  # moments and counters of the optimizer
    rng: jax.Array  # key of the run; the key of a step is folded in from ``step``, so this never changes
    queue: jax.Array  # float32 [queue_batches * batch, num_clusters], fused logits of earlier batches, newest first
    queue_batches: jax.Array  # int32 scalar, batches pushed since the queue was last emptied, at most what it holds
    centroids: jax.Array  # float32 [num_clusters, num_clusters], those of the last k-means; zeros before the first
    neighbours: jax.Array = flax.struct.field(default_factory=lambda: jnp.zeros((0, 0), jnp.int32))
    """int32 [num_examples, k], nearest rows of each that training takes modalities from; empty unless a run looks again."""

    def variables(self) -> dict[str, Any]:
        """Return what ``model.apply`` takes: parameters and collections."""
        return {"params": self.params, "batch_stats": self.batch_stats, "feature_stats": self.feature_stats}


def create(
    variables: Any,
    optimizer: optax.GradientTransformation,
    rng: jax.Array,
    *,
    queue_length: int = 0,
    num_clusters: int = 1,
    neighbours: np.ndarray | None = None,
) -> TrainState:
    """Make the state at step 0 of fresh or loaded variables, with a queue [queue_length, num_clusters] for k-means.

    Variables are ``params`` and, as far as the model has them, ``batch_stats`` and ``feature_stats``.
    """
    return TrainState(
        step=jnp.int32(0),
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        feature_stats=variables.get("feature_stats", {}),
        opt_state=optimizer.init(variables["params"]),
        rng=rng,
        queue=jnp.zeros((queue_length, num_clusters), jnp.float32),
        queue_batches=jnp.int32(0),
        centroids=jnp.zeros((num_clusters, num_clusters), jnp.float32),
        neighbours=jnp.zeros((0, 0), jnp.int32) if neighbours is None else jnp.asarray(neighbours),
    )

"""One optimizer step of pretraining."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from conclugen_jax.method import objective
from conclugen_jax.method.train_state import Metrics, TrainState
from conclugen_jax.train import sharded_update


def pretrain_step(
    state: TrainState,
    batch: objective.Batch,
    *,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[jax.Array], jax.Array],
    config: ConfigDict,
    axis_name: str | None = None,
    **of_loss: Any,
) -> tuple[TrainState, Metrics]:
    """Take one step by ``objective.pretrain_loss``, which takes ``of_loss`` too; the metrics are of the state before it."""
    loss_fn = functools.partial(objective.pretrain_loss, config=config, axis_name=axis_name, **of_loss)
    key = jax.random.fold_in(state.rng, state.step)
    (_, (metrics, batch_stats, clustered)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
        state.params, state, batch, key
    )
    active = clustered.active if clustered is not None else False
    options = {"split": config.optimizer.shard, "axis_name": axis_name, "active": active}
    params, opt_state, metrics["gradient_norm"] = sharded_update.apply(
        optimizer, grads, state.opt_state, state.params, **options
    )
    metrics["learning_rate"] = schedule(state.step)
    state = state.replace(step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state)
    if clustered is not None:
        kmeans = clustered.kmeans
        sizes = jnp.bincount(kmeans.assignments, length=config.clustering.num_clusters)
        metrics["kmeans/iterations"] = jnp.where(active, kmeans.iterations, 0)
        metrics["kmeans/largest_cluster"] = jnp.where(active, sizes.max() / sizes.sum(), 0)
        metrics["kmeans/empty_clusters"] = (sizes == 0).sum()
        centroids = jnp.where(active, kmeans.centroids, state.centroids)
        state = state.replace(centroids=centroids, queue=clustered.queue, queue_batches=clustered.queue_batches)
    return state, metrics

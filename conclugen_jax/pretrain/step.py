"""One optimizer step of pretraining."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from conclugen_jax.method import model as model_lib
from conclugen_jax.method import objective, views
from conclugen_jax.method.train_state import Metrics, TrainState
from conclugen_jax.train import sharded_update


def pretrain_step(
    state: TrainState,
    batch: objective.Batch,
    *,
    model: model_lib.ConCluGen,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[jax.Array], jax.Array],
    config: ConfigDict,
    steps_per_epoch: int,
    cluster: bool,
    statistics: views.Statistics | None = None,
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
    """Take one optimizer step by ``objective.pretrain_loss``; the metrics are those of the state before it."""
    loss_fn = functools.partial(
        objective.pretrain_loss,
        model=model,
        config=config,
        steps_per_epoch=steps_per_epoch,
        cluster=cluster,
        statistics=statistics,
        axis_name=axis_name,
    )
    key = jax.random.fold_in(state.rng, state.step)
    (_, (metrics, batch_stats, clustered)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
        state.params, state, batch, key
    )
    params, opt_state, metrics["gradient_norm"] = sharded_update.apply(
        optimizer,
        grads,
        state.opt_state,
        state.params,
        split=config.optimizer.shard,
        axis_name=axis_name,
        active=clustered.active if clustered is not None else False,
    )
    metrics["learning_rate"] = schedule(state.step)
    state = state.replace(step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state)
    if clustered is not None:
        state, of_clusters = _after_clustering(state, clustered, config.clustering.num_clusters)
        metrics |= of_clusters
    return state, metrics


def _after_clustering(
    state: TrainState, clustered: objective.Clustered, num_clusters: int
) -> tuple[TrainState, Metrics]:
    """Return the state with the new queue and centroids, and what is logged of the clusters."""
    active, kmeans = clustered.active, clustered.kmeans
    sizes = jnp.bincount(kmeans.assignments, length=num_clusters)
    metrics = {
        "kmeans/iterations": jnp.where(active, kmeans.iterations, 0),
        "kmeans/largest_cluster": jnp.where(active, sizes.max() / sizes.sum(), 0),
        "kmeans/empty_clusters": (sizes == 0).sum(),
    }
    centroids = jnp.where(active, kmeans.centroids, state.centroids)
    queue = {"queue": clustered.queue, "queue_batches": clustered.queue_batches}
    return state.replace(centroids=centroids, **queue), metrics

"""The pretraining objective: L_MMS, L_Clu, L_Rec, L_NCE, L_Fus over a batch, and their weighted sum (Eq. 1-13).

Views, mixup and dropout, which change a batch before, are in ``augmentation.py``.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from conclugen_jax.method import augmentation, clustering, collectives, layers, losses, model as model_lib
from conclugen_jax.method.model import ByModality
from conclugen_jax.method.train_state import Metrics, TrainState

Batch = Mapping[str, ByModality]  # ``features`` and ``present``, each by modality


class Clustered(NamedTuple):
    """What the clustering of one step leaves behind."""

    loss: jax.Array  # scalar, L_Clu; 0 as long as the queue is not full
    active: jax.Array  # boolean scalar, the queue was full
    queue: jax.Array  # with this batch at the front
    queue_batches: jax.Array  # batches in it
    kmeans: clustering.KMeans  # over queue and batch


def contrastive_term(
    outputs: "Forward", present: ByModality, *, config: ConfigDict, axis_name: str | None
) -> jax.Array:
    """L_MMS: masked margin softmax summed over pairs of modalities (Eq. 5), optionally with soft targets."""
    # With ``encoder_chunk_size``, similarities are recomputed in the backward pass.
    options = {"keep": False if config.encoder_chunk_size else None, "dtype": model_lib.DTYPES[config.precision]}
    margin = {"margin": config.loss.contrastive_margin, "axis_name": axis_name}
    weights = _weights_of_positives(outputs, present, config, axis_name)

    def of_pair(a: str, b: str) -> jax.Array:
        rows, valid = (outputs.projections[a], outputs.projections[b]), present[a] & present[b]
        if weights:
            return losses.soft_margin_softmax(*rows, (weights[b], weights[a]), valid=valid, **margin)
        return losses.masked_margin_softmax(*rows, valid=valid, **margin, **options)

    pairs = modality_pairs(list(outputs.projections), config.loss.contrastive_pairs)
    return sum(of_pair(a, b) for a, b in pairs)


def _weights_of_positives(
    outputs: "Forward", present: ByModality, config: ConfigDict, axis_name: str | None
) -> dict[str, jax.Array]:
    """By modality, how much each row of all devices counts as a positive of each own row; empty where the own alone does."""
    if t := config.loss.soft_targets:
        vectors, weigh = outputs.inputs, functools.partial(losses.similarity_weights, temperature=t)
    elif k := config.loss.target_neighbours:
        vectors, weigh = outputs.projections, functools.partial(losses.neighbour_weights, k=k)
    else:
        return {}
    return {m: weigh(vectors[m], valid=present[m], axis_name=axis_name) for m in outputs.projections}


def fusion_term(
    passes: Sequence["Forward"], present: Sequence[ByModality], *, config: ConfigDict, axis_name: str | None
) -> jax.Array:
    """L_Fus: L_NCE between the fused projections of two passes, plus that of each modality of a pass to the other's fused.

    With Z', Z'' the means of the projections that a row has in each pass, ``L_NCE(Z', Z'') + sum_m (L_NCE(P'_m, Z'') +
    L_NCE(P''_m, Z')) / 2``. What the modalities have in common counts, and what each has alone.

    Args:
      passes: outputs for the same rows with features and modalities hidden in two ways.
      present: which modalities each pass has.
      config: of the run; its ``loss.fusion_temperature`` divides the similarities.
      axis_name: see ``losses.py``.

    References:
      Dufumier et al., "What to align in multimodal contrastive learning?" (CoMM), 2025 (arXiv 2409.07402).
    """
    options = {"temperature": config.loss.fusion_temperature, "axis_name": axis_name}
    fused = [layers.fuse(x.projections, here, "mean") for x, here in zip(passes, present, strict=True)]
    anything = functools.reduce(jnp.logical_or, present[0].values())  # the same rows in both: one modality always stays
    loss = losses.info_nce(*fused, valid=anything, **options)
    for x, here, other in zip(passes, present, reversed(fused), strict=True):
        loss += sum(losses.info_nce(p, other, valid=here[m], **options) for m, p in x.projections.items()) / 2
    return loss


def modality_pairs(modalities: Sequence[str], which: str) -> list[tuple[str, str]]:
    """``all`` pairs, or the ``circle`` of neighbours that the authors' code uses; the two agree up to three."""
    if which == "all" or len(modalities) < 4:
        return list(itertools.combinations(modalities, 2))
    return list(zip(modalities, [*modalities[1:], modalities[0]], strict=True))


def in_chunks(fn: Callable[[Any], Any], rows: Any, size: int) -> Any:
    """``fn(rows)`` of a function that works row by row, ``size`` rows at a time; 0: all at once.

    The backward pass computes each chunk again, so that only the results of ``fn`` stay in memory in between.
    """
    n = jax.tree.leaves(rows)[0].shape[0]
    if not 0 < size < n:
        return fn(rows)
    fn, whole = jax.checkpoint(fn), n - n % size
    chunks = jax.tree.map(lambda x: x[:whole].reshape(-1, size, *x.shape[1:]), rows)
    results = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.lax.map(fn, chunks))
    if whole == n:
        return results
    rest = fn(jax.tree.map(lambda x: x[whole:], rows))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), results, rest)


class Forward(NamedTuple):
    """What the losses need of the training network, by modality; empty where the head is missing."""

    inputs: ByModality  # [n, dim], as the first layer sees them except for dropout
    projections: ByModality  # float32 [n, P], unit rows
    cluster_logits: ByModality  # float32 [n, K]
    errors: ByModality  # float32 [n], L_Rec of each row
    batch_stats: Any  # updated running averages of BatchNorm


def forward(
    model: model_lib.ConCluGen,
    variables: Any,
    features: ByModality,
    present: ByModality,
    dropped: ByModality | None = None,
    *,
    chunk_size: int,
) -> Forward:
    """Run the training network: row by row in chunks, then BatchNorm and what follows it over the whole batch.

    What is ``dropped`` (``augmentation.dropout``) is hidden from the first layer; L_Rec's target is the whole input.
    """

    def row_by_row(rows: tuple[ByModality, ByModality]) -> tuple[ByModality, ByModality]:
        inputs, _, reduced, decoded = model.apply(variables, *rows, method="encode")
        errors = {m: losses.reconstruction_loss(x, inputs[m], per_row=True) for m, x in decoded.items()}
        return reduced, errors

    reduced, errors = in_chunks(row_by_row, (features, dropped or {}), chunk_size)
    (projections, cluster_logits), updates = model.apply(
        variables, reduced, present=present, train=True, method="project", mutable=["batch_stats"]
    )
    inputs = model.apply(variables, features, method="standardized")
    return Forward(inputs, projections, cluster_logits, errors, updates.get("batch_stats", {}))


def clustering_term(
    cluster_logits: ByModality,
    present: ByModality,
    state: TrainState,
    key: jax.Array,
    *,
    config: ConfigDict,
    steps_per_epoch: int,
    axis_name: str | None,
) -> Clustered:
    """L_Clu: k-means over the queue and this batch, then the margin softmax towards the own centroid (Eq. 8-10)."""
    section = config.clustering
    fused = layers.fuse(cluster_logits, present, "mean")
    all_fused = collectives.gather(jax.lax.stop_gradient(fused), axis_name)
    filled = state.queue_batches
    if section.queue_reset == "epoch":
        filled = jnp.where(state.step % steps_per_epoch == 0, 0, filled)
    kmeans = _kmeans(all_fused, state, key, config, steps_per_epoch, axis_name)
    assignments = collectives.own_rows(kmeans.assignments[state.queue.shape[0] :], fused.shape[0], axis_name)
    margins = {"margin": config.loss.clustering_margin, "margin_in_denominator": config.loss.margin_in_denominator}
    of_rows = {"centroids": kmeans.centroids, "assignments": assignments, "axis_name": axis_name, **margins}
    towards_centroid = functools.partial(losses.clustering_loss, **of_rows)
    if config.loss.clustering_target == "joint":
        any_present = functools.reduce(jnp.logical_or, [present[m] for m in cluster_logits])
        loss = towards_centroid(fused, valid=any_present)
    else:
        loss = sum(towards_centroid(g, valid=present[m]) for m, g in cluster_logits.items())
    active = filled >= section.queue_batches
    loss = jnp.where(active, loss, 0)
    queue = clustering.push(state.queue, all_fused) if section.queue_batches else state.queue
    return Clustered(loss, active, queue, jnp.minimum(filled + 1, section.queue_batches), kmeans)


def _kmeans(
    fused: jax.Array, state: TrainState, key: jax.Array, config: ConfigDict, steps_per_epoch: int, axis_name: str | None
) -> clustering.KMeans:
    """k-means over the queue and the batch of all devices, [batch, K]; the result is the same on all devices.

    Every device works on all points; beyond ``config.clustering.gather_limit_mib`` each works on its share of queue and
    batch, and sums are added up. At steps that do not refit, the centroids stay.
    """
    section, num_devices = config.clustering, collectives.device_count(axis_name)
    points = jnp.concatenate([state.queue, fused])
    split = num_devices > 1 and points.nbytes > section.gather_limit_mib * 2**20
    own = points
    if split:
        parts = [collectives.own_rows(x, x.shape[0] // num_devices, axis_name) for x in (state.queue, fused)]
        own = jnp.concatenate(parts)

    def fit() -> clustering.KMeans:
        how = {"method": section.initialisation, "metric": section.metric, "previous": state.centroids}
        start = clustering.initial_centroids(key, points, section.num_clusters, **how)
        until = {"max_iterations": section.max_iterations, "tolerance": section.tolerance}
        return clustering.lloyd(own, start, **until, metric=section.metric, axis_name=axis_name if split else None)

    def keep() -> clustering.KMeans:
        assignments = clustering.nearest(own, state.centroids, metric=section.metric)
        return clustering.KMeans(state.centroids, assignments, jnp.int32(0))

    if section.refit_every_steps == 1:
        kmeans = fit()
    else:
        kmeans = jax.lax.cond(_refits(state, config, steps_per_epoch), fit, keep)
    if split:
        of_parts = jnp.split(kmeans.assignments, [parts[0].shape[0]])
        kmeans = kmeans._replace(assignments=jnp.concatenate([collectives.gather(x, axis_name) for x in of_parts]))
    return kmeans


def _refits(state: TrainState, config: ConfigDict, steps_per_epoch: int) -> jax.Array:
    """Whether k-means runs at this step: boolean scalar, from step and centroids alone."""
    section, step = config.clustering, state.step
    if section.queue_reset == "epoch":  # steps count from where the queue is full: the first of every epoch refits
        step = step % steps_per_epoch - section.queue_batches
    return (step % section.refit_every_steps == 0) | ~jnp.any(state.centroids != 0)


def pretrain_loss(
    params: Any,
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    *,
    model: model_lib.ConCluGen,
    config: ConfigDict,
    steps_per_epoch: int,
    cluster: bool,
    statistics: augmentation.Statistics | None = None,
    axis_name: str | None = None,
) -> tuple[jax.Array, tuple[Metrics, Any, Clustered | None]]:
    """Compute the weighted sum of L_MMS, L_Clu, L_Rec (Eq. 11-13), L_NCE (Eq. 1) and L_Fus, or mean of the active terms.

    Args:
      params: what the gradient is taken of.
      state: everything else.
      batch: ``features`` and ``present``, this device's rows; features [n, 2, dim] are two views of a modality.
      key: random key of the step, the same on all devices.
      model: the network.
      config: sections ``loss``, ``clustering``, ``views`` and ``augmentation``.
      steps_per_epoch: where the queue is emptied.
      cluster: whether the start epoch of clustering is reached.
      statistics: of the modality that L_NCE has two views of; needed for it only.
      axis_name: mapped axis over which the batch is split.

    Returns the loss over the global batch, and (metrics, updated batch_stats, clustering or ``None``).
    """
    weights, options = config.loss, {"config": config, "axis_name": axis_name}
    variables = {**state.variables(), "params": params}
    features = augmentation.mixed(batch["features"], batch["present"], key, **options)
    present = augmentation.shown(batch["present"], key, 5, **options)
    apply = functools.partial(forward, model, present=present, chunk_size=config.encoder_chunk_size)
    terms, clustered = {}, None
    if weights.instance_weight:
        seen = {"features": features, "present": present}
        outputs, terms["instance"] = _of_two_views(apply, variables, seen, key, statistics=statistics, **options)
    else:
        outputs = apply(variables, features, dropped=augmentation.factors(features, key, 3, **options))
    if weights.fusion_weight:
        again = augmentation.shown(batch["present"], key, 7, **options)
        second = apply(variables, features, present=again, dropped=augmentation.factors(features, key, 6, **options))
        terms["fusion"] = fusion_term((outputs, second), (present, again), **options)
    if weights.contrastive_weight:
        terms["contrastive"] = contrastive_term(outputs, present, **options)
    if weights.clustering_weight and cluster:
        clustered = clustering_term(
            outputs.cluster_logits, present, state, key, steps_per_epoch=steps_per_epoch, **options
        )
        terms["clustering"] = clustered.loss
    if weights.reconstruction_weight:
        of_rows = outputs.errors.items()  # averaged over those that have the modality, summed over modalities (Eq. 7)
        terms["reconstruction"] = sum(losses.masked_mean(x, present[m], axis_name) for m, x in of_rows)
    loss = sum((weights[f"{name}_weight"] * value for name, value in terms.items()), jnp.float32(0))
    if weights.reduction == "mean":
        active = [clustered.active if name == "clustering" else True for name in terms]
        loss = loss / jnp.maximum(sum(jnp.asarray(x, jnp.float32) for x in active), 1)
    metrics = {"loss": loss, **{f"loss/{name}": value for name, value in terms.items()}}
    return loss, (metrics, outputs.batch_stats, clustered)


def _of_two_views(
    apply: Callable, variables: Any, batch: Batch, key: jax.Array, config: ConfigDict, **of_views: Any
) -> tuple[Forward, jax.Array]:
    """Return the outputs for the first view, which serves all terms, and L_NCE between the two views of a modality (Eq. 1)."""
    modality, view_key = config.loss.instance_modality, jax.random.fold_in(key, 1)
    first, second = augmentation.two_views(batch["features"][modality], view_key, config=config, **of_views)
    inputs = {**batch["features"], modality: first}
    outputs = apply(variables, inputs, dropped=augmentation.factors(inputs, key, 3, config, of_views["axis_name"]))
    # The second view passes through the networks as a further modality would.
    dropped = augmentation.factors({modality: second}, key, 4, config, of_views["axis_name"])
    again = apply({**variables, "batch_stats": outputs.batch_stats}, {modality: second}, dropped=dropped)
    options = {"temperature": config.loss.instance_temperature, "axis_name": of_views["axis_name"]}
    projected = outputs.projections[modality], again.projections[modality]
    loss = losses.info_nce(*projected, valid=batch["present"][modality], **options)
    return outputs._replace(batch_stats=again.batch_stats), loss

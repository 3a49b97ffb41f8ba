"""The losses of ConCluGen: pure functions, arrays in, scalar out.

Equation numbers are those of Halawa et al., "Multi-Task Multi-Modal Self-Supervised Learning for Facial Expression
Recognition", 2024 (arXiv 2404.10904). All sums run in float32. Two arguments mean the same everywhere:

* ``valid``: boolean [n], rows that count, or ``None`` for all. Rows that do not count get no gradient; without any row that
  counts a loss is 0.
* ``axis_name``: mapped axis over which the batch is split. The arrays are then this device's rows, and the loss is the mean
  over the rows of all devices (negatives come from all of them, too): the same scalar on each.

Shapes that do not fit together raise ``ValueError``.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from conclugen_jax.method import collectives, similarity


def masked_margin_softmax(
    a: jax.Array,
    b: jax.Array,
    *,
    margin: float = 1e-3,
    valid: jax.Array | None = None,
    axis_name: str | None = None,
    keep: bool | None = None,
    dtype: Any = jnp.float32,
) -> jax.Array:
    """Contrast every row of one modality with all rows of another, both ways.

    With S = a b^T, the loss of a row is ``-log(exp(S_ii - margin) / (exp(S_ii - margin) + sum_{j != i} exp(S_ij)))``;
    that of a column likewise. There is no temperature.

    Args:
      a: [n, dim], unit rows of this device.
      b: [n, dim], unit rows; row i belongs to the same example as row i of ``a``.
      margin: subtracted from the similarity of each true pair.
      valid: rows that have both modalities; the others are neither positive nor negative.
      keep: hold what the backward pass needs of the similarities, or compute it again; see ``similarity.exp_sums``.
      dtype: type of the factors of the products; sums and true pairs are in float32 in any case.
      axis_name: see the module.

    Returns:
      Scalar, the mean over the valid rows of row loss plus column loss.

    References:
      Eq. 2-4; Ilharco et al., "Large-scale representation learning from visually grounded untranscribed speech", 2019.
    """
    check_shapes("masked_margin_softmax", a=(a, "n, dim"), b=(b, "n, dim"), valid=(valid, "n"))
    n = a.shape[0]
    valid = collectives.all_valid(n, valid)
    a, b = (jnp.where(valid[:, None], x, 0).astype(jnp.float32) for x in (a, b))
    all_b, all_valid = collectives.gather(b, axis_name), collectives.gather(valid, axis_name)
    row_sums, column_sums = similarity.exp_sums(a, all_b, valid, all_valid, keep=keep, dtype=dtype)
    column_sums = collectives.own_rows(collectives.total(column_sums, axis_name), n, axis_name)
    positive = jnp.sum(a * b, axis=1)
    # The margin enters on the diagonal only: exp(S - margin) instead of exp(S), in the row's and in the column's sum.
    less = jnp.exp(positive) * -jnp.expm1(-margin)
    row_loss = _log_where(valid, row_sums - less) + _log_where(valid, column_sums - less) - 2 * (positive - margin)
    return masked_mean(row_loss, valid, axis_name)


def soft_margin_softmax(
    a: jax.Array,
    b: jax.Array,
    weights: tuple[jax.Array, jax.Array],
    *,
    margin: float = 1e-3,
    valid: jax.Array | None = None,
    axis_name: str | None = None,
) -> jax.Array:
    """Compute :func:`masked_margin_softmax` with other examples as further positives, each with a weight.

    With S as there, less the margin on its diagonal, the loss of row i is ``-sum_j w_ij log softmax_j(S_ij)``, where the
    weights w of the valid rows are divided by their sum; that of a column likewise. Weights of the own example alone give
    the loss without further positives. All similarities are in memory at once.

    Args:
      a: [n, dim], unit rows of this device.
      b: [n, dim], unit rows; row i belongs to the same example as row i of ``a``.
      weights: >= 0, of the rows of ``b`` as positives of each row of ``a``, and of those of ``a`` for ``b``:
        [n, rows of all devices] each, positive for the own example. No gradient flows into them.
      margin: subtracted from the similarity of each true pair.
      valid: rows that have both modalities; the others are neither positive nor negative.
      axis_name: see the module.

    Returns:
      Scalar, the mean over the valid rows of row loss plus column loss.

    References:
      Srinivasa et al., "CWCL: Cross-modal transfer with continuously weighted contrastive loss", 2023 (arXiv 2309.14580).
    """
    check_shapes("soft_margin_softmax", a=(a, "n, dim"), b=(b, "n, dim"), valid=(valid, "n"))
    n = a.shape[0]
    valid = collectives.all_valid(n, valid)
    a, b = (jnp.where(valid[:, None], x, 0).astype(jnp.float32) for x in (a, b))
    counts = collectives.gather(valid, axis_name)[None, :]

    def one_way(anchors: jax.Array, candidates: jax.Array, w: jax.Array) -> jax.Array:
        scores = similarity.products(anchors, collectives.gather(candidates, axis_name))
        # Not minus infinity: a row that counts for nothing may have no column at all, and must not give NaN.
        scores = jnp.where(counts, scores - margin * own_columns(n, axis_name), -1e9)
        w = jnp.where(counts, jax.lax.stop_gradient(w), 0)
        w = w / jnp.maximum(w.sum(axis=1, keepdims=True), 1e-30)
        return -jnp.sum(w * jax.nn.log_softmax(scores, axis=1), axis=1)

    return masked_mean(one_way(a, b, weights[0]) + one_way(b, a, weights[1]), valid, axis_name)


def similarity_weights(
    x: jax.Array, temperature: float, *, valid: jax.Array | None = None, axis_name: str | None = None
) -> jax.Array:
    """Return ``exp((cos(x_i, x_j) - 1) / temperature)``, [n, dim] -> [n, rows of all devices]; 1 for the own row.

    The lower the temperature (> 0), the more the own row counts alone. CWCL itself has ``(1 + cos) / 2``.
    """
    x = unit_rows(jnp.where(collectives.all_valid(len(x), valid)[:, None], x, 0))
    cosines = similarity.products(x, collectives.gather(x, axis_name))
    return jnp.where(own_columns(len(x), axis_name), 1, jnp.exp((cosines - 1) / temperature))


def neighbour_weights(
    x: jax.Array, k: int, *, valid: jax.Array | None = None, axis_name: str | None = None
) -> jax.Array:
    """Return 1/2 for the own row and 1/2 shared by its k nearest valid rows by cosine, [n, dim] -> [n, rows of all devices].

    As positives' weights they average the target of a row with those of its neighbours in the batch.
    """
    valid = collectives.all_valid(len(x), valid)
    x, own = unit_rows(jnp.where(valid[:, None], x, 0)), own_columns(len(x), axis_name)
    others = collectives.gather(valid, axis_name)[None, :] & ~own
    cosines = jnp.where(others, similarity.products(x, collectives.gather(x, axis_name)), -jnp.inf)
    nearest = jax.lax.top_k(cosines, min(k, cosines.shape[1]))[1]
    near = others & jax.nn.one_hot(nearest, cosines.shape[1], dtype=bool).any(axis=1)
    return 0.5 * own + 0.5 * near / jnp.maximum(near.sum(axis=1, keepdims=True), 1)


def info_nce(
    a: jax.Array, b: jax.Array, *, temperature: float, valid: jax.Array | None = None, axis_name: str | None = None
) -> jax.Array:
    """Contrast two views of each example with all other views of the batch.

    Args:
      a: [n, dim], first views; normalised inside.
      b: [n, dim], second views.
      temperature: divides the cosine similarities; > 0.
      valid: rows that count; the others are neither positive nor negative.
      axis_name: see the module.

    Returns:
      Scalar, the mean over the two views of all valid rows: both views of each example serve as anchor.

    References:
      Eq. 1; Chen et al., "A simple framework for contrastive learning of visual representations", 2020.
    """
    check_shapes("info_nce", a=(a, "n, dim"), b=(b, "n, dim"), valid=(valid, "n"))
    n = a.shape[0]
    valid = collectives.all_valid(n, valid)
    a, b = (unit_rows(jnp.where(valid[:, None], view, 0)) for view in (a, b))
    views = jnp.concatenate([collectives.gather(a, axis_name), collectives.gather(b, axis_name)])
    counts = jnp.tile(collectives.gather(valid, axis_name), 2)
    own = collectives.device_index(axis_name) * n + jnp.arange(n)
    columns = jnp.arange(views.shape[0])[None, :]

    def anchor_loss(anchors: jax.Array, others: jax.Array, own_columns: jax.Array) -> jax.Array:
        scores = similarity.products(anchors, views) / temperature
        # Not minus infinity: a row that counts for nothing may have no column at all, and must not give NaN.
        others_of = counts[None, :] & (own_columns[:, None] != columns)
        scores = jnp.where(others_of, scores, -1e9)
        return jax.nn.logsumexp(scores, axis=1) - jnp.sum(anchors * others, axis=1) / temperature

    losses = anchor_loss(a, b, own) + anchor_loss(b, a, own + views.shape[0] // 2)
    return masked_mean(losses / 2, valid, axis_name)


def clustering_loss(
    fused: jax.Array,
    centroids: jax.Array,
    assignments: jax.Array,
    *,
    margin: float = 1e-3,
    margin_in_denominator: bool = False,
    valid: jax.Array | None = None,
    axis_name: str | None = None,
) -> jax.Array:
    """Pull each vector towards the centroid of its cluster and away from the other centroids.

    Args:
      fused: [n, dim], cluster logits averaged over modalities.
      centroids: [num_clusters, dim]; no gradient flows into them.
      assignments: integer [n], the cluster of each row.
      margin: subtracted from the similarity to the own centroid.
      margin_in_denominator: subtract it in the denominator's own term too, as the authors' code does; the paper's
        Eq. 10 has it in the numerator only.
      valid: rows that count.
      axis_name: see the module.

    Returns:
      Scalar, the mean over the valid rows of ``-log(exp(R_i . C_c(i) - margin) / sum_k exp(R_i . C_k))``; see Eq. 8-10.
    """
    arrays = {"fused": (fused, "n, dim"), "centroids": (centroids, "num_clusters, dim")}
    check_shapes("clustering_loss", **arrays, assignments=(assignments, "n"), valid=(valid, "n"))
    valid = collectives.all_valid(len(fused), valid)
    fused = jnp.where(valid[:, None], fused, 0).astype(jnp.float32)
    scores = similarity.products(fused, jax.lax.stop_gradient(centroids).astype(jnp.float32))
    is_own = assignments[:, None] == jnp.arange(centroids.shape[0])[None, :]
    own = jnp.sum(jnp.where(is_own, scores, 0), axis=1) - margin
    if margin_in_denominator:
        scores = scores - margin * is_own
    return masked_mean(jax.nn.logsumexp(scores, axis=1) - own, valid, axis_name)


def reconstruction_loss(
    predicted: jax.Array,
    target: jax.Array,
    *,
    valid: jax.Array | None = None,
    axis_name: str | None = None,
    per_row: bool = False,
) -> jax.Array:
    """Compute the mean squared error between decoded and original features of one modality (Eq. 6).

    Args:
      predicted: [n, dim].
      target: [n, dim]; no gradient flows into it.
      valid: rows that have the modality.
      per_row: return the loss of each row, for a batch that is decoded in chunks; :func:`masked_mean` is the rest.
      axis_name: see the module.

    Returns:
      Scalar, the mean over valid rows and features of the squared difference (no factor one half). With ``per_row``
      float32 [n]: the mean over features, 0 for a row that is not valid.
    """
    check_shapes("reconstruction_loss", predicted=(predicted, "n, dim"), target=(target, "n, dim"), valid=(valid, "n"))
    difference = predicted.astype(jnp.float32) - jax.lax.stop_gradient(target).astype(jnp.float32)
    if valid is not None:
        difference = jnp.where(valid[:, None], difference, 0)
    rows = jnp.square(difference).mean(axis=1)
    return rows if per_row else masked_mean(rows, collectives.all_valid(len(rows), valid), axis_name)


def cross_entropy(
    logits: jax.Array, labels: jax.Array, *, class_weights: jax.Array, axis_name: str | None = None
) -> jax.Array:
    """Compute a softmax cross-entropy in which every row counts with the weight of its class.

    Args:
      logits: [n, num_classes].
      labels: integer [n].
      class_weights: [num_classes], >= 0.
      axis_name: see the module.

    Returns:
      Scalar, the weighted sum over rows divided by the sum of their weights; 0 where all weights are 0.
    """
    arrays = {"logits": (logits, "n, num_classes"), "labels": (labels, "n")}
    check_shapes("cross_entropy", **arrays, class_weights=(class_weights, "num_classes"))
    weights = class_weights[labels]
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
    total = collectives.total(weights.sum(), axis_name)
    return collectives.total((weights * losses).sum(), axis_name) / jnp.where(total > 0, total, 1)


def multi_label_cross_entropy(
    logits: jax.Array, labels: jax.Array, *, positive_weights: jax.Array, axis_name: str | None = None
) -> jax.Array:
    """Compute a sigmoid cross-entropy per label, with the positive side of each label weighted.

    Args:
      logits: [n, num_labels].
      labels: 0 or 1, [n, num_labels].
      positive_weights: [num_labels], factor of the loss where the label is present.
      axis_name: see the module.

    Returns:
      Scalar, the mean over rows and labels.
    """
    arrays = {"logits": (logits, "n, num_labels"), "labels": (labels, "n, num_labels")}
    check_shapes("multi_label_cross_entropy", **arrays, positive_weights=(positive_weights, "num_labels"))
    losses = optax.losses.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), labels)
    weights = jnp.where(labels > 0, positive_weights[None, :], 1)
    return masked_mean((weights * losses).mean(axis=1), jnp.ones(logits.shape[0], bool), axis_name)


def absolute_error(predicted: jax.Array, target: jax.Array, *, axis_name: str | None = None) -> jax.Array:
    """Return the mean absolute error of numbers, [n] each."""
    check_shapes("absolute_error", predicted=(predicted, "n"), target=(target, "n"))
    errors = jnp.abs(predicted.astype(jnp.float32) - target)
    return masked_mean(errors, jnp.ones(len(errors), bool), axis_name)


def unit_rows(x: jax.Array) -> jax.Array:
    """Divide rows by their length, [n, dim] -> float32 [n, dim]; a zero row stays zero, with a finite gradient."""
    x = x.astype(jnp.float32)
    squared = jnp.sum(jnp.square(x), axis=1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squared, 1e-24))


def own_columns(num_rows: int, axis_name: str | None) -> jax.Array:
    """Return which of the rows of all devices is each row of this device: boolean [n, rows of all devices]."""
    own = collectives.device_index(axis_name) * num_rows + jnp.arange(num_rows)
    return own[:, None] == jnp.arange(num_rows * collectives.device_count(axis_name))[None, :]


def masked_mean(values: jax.Array, valid: jax.Array, axis_name: str | None = None) -> jax.Array:
    """Return the mean of the valid values [n] of all devices; 0 where no row is valid."""
    count = collectives.total(valid.sum(), axis_name)
    return collectives.total(jnp.where(valid, values, 0).sum(), axis_name) / jnp.maximum(count, 1)


def _log_where(valid: jax.Array, sums: jax.Array) -> jax.Array:
    """Return the log of sums that are positive wherever the row is valid; 0 elsewhere, without a NaN in the gradient."""
    return jnp.log(jnp.where(valid, sums, 1))


def check_shapes(function: str, **arrays: tuple[Any, str]) -> None:
    """Refuse arrays whose axes of one name differ in size: ``labels=(labels, "n")``; ``None`` in place of one fits."""
    sizes: dict[str, int] = {}
    given = {name: (x.shape, axes.split(", ")) for name, (x, axes) in arrays.items() if x is not None}
    fits = [
        len(shape) == len(axes)
        and all(sizes.setdefault(axis, size) == size for axis, size in zip(axes, shape, strict=True))
        for shape, axes in given.values()
    ]
    if not all(fits):
        needed = ", ".join(f"{name} [{', '.join(axes)}]" for name, (_, axes) in given.items())
        raise ValueError(f"{function} needs {needed}, got {', '.join(str(shape) for shape, _ in given.values())}")

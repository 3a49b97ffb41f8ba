"""The losses of ConCluGen: pure functions, arrays in, scalar out.

Equation numbers are those of Halawa et al., "Multi-Task Multi-Modal Self-Supervised Learning for Facial Expression
Recognition", 2024 (arXiv 2404.10904). All sums run in float32. Two arguments mean the same everywhere:

* ``valid``: boolean [n], the rows to include; ``None`` includes all. The other rows get no gradient. If no row is valid, the
  loss is 0.
* ``axis_name``: name of the mapped axis that splits the batch over devices; ``None`` if the batch is not split. Each device
  passes its own rows. Negatives come from all devices, and every device gets the same scalar: the mean over all rows.

The losses raise ``ValueError`` if the shapes of their arguments do not match.
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
    """Compute the masked margin softmax loss (MMS) between two modalities, in both directions.

    The loss pulls the two modalities of an example together and pushes those of different examples apart. With S = a b^T,
    the loss of row i is ``-log(exp(S_ii - margin) / (exp(S_ii - margin) + sum_{j != i} exp(S_ij)))``. The loss of column i
    is the same on S^T. There is no temperature.

    Args:
      a: first modality, [n, dim], rows of unit length.
      b: second modality, [n, dim], rows of unit length; row i belongs to the same example as row i of ``a``.
      margin: subtracted from the similarity of each true pair.
      valid: boolean [n], rows that have both modalities; the others are neither positives nor negatives.
      axis_name: mapped axis over which the rows are split; see the module.
      keep: whether to store the similarities for the backward pass or to recompute them; see ``similarity.exp_sums``.
      dtype: type of the factors of the matrix products; sums and true pairs are always float32.

    Returns:
      Scalar, the row loss plus the column loss, averaged over the valid rows.

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
    """Compute :func:`masked_margin_softmax` with several weighted positives for each row.

    Let S = a b^T, minus the margin on the diagonal. The loss of row i is ``-sum_j w_ij log softmax_j(S_ij)``, where the
    weights w_ij of the valid rows are normalised to sum to 1. The loss of column i is the same on S^T. If only w_ii is
    positive, the result is that of :func:`masked_margin_softmax`. The function holds the whole matrix S in memory.

    Args:
      a: first modality, [n, dim], rows of unit length.
      b: second modality, [n, dim], rows of unit length; row i belongs to the same example as row i of ``a``.
      weights: two arrays [n, rows of all devices], >= 0: how strongly each row of ``b`` counts as a positive of each row of
        ``a``, and each row of ``a`` for ``b``. The weight of a row's own example must be > 0. They get no gradient.
      margin: subtracted from the similarity of each true pair.
      valid: boolean [n], rows that have both modalities; the others are neither positives nor negatives.
      axis_name: mapped axis over which the rows are split; see the module.

    Returns:
      Scalar, the row loss plus the column loss, averaged over the valid rows.

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
        # Not minus infinity: a row that is not valid may have no valid column, and its softmax would be NaN.
        scores = jnp.where(counts, scores - margin * own_columns(n, axis_name), -1e9)
        w = jnp.where(counts, jax.lax.stop_gradient(w), 0)
        w = w / jnp.maximum(w.sum(axis=1, keepdims=True), 1e-30)
        return -jnp.sum(w * jax.nn.log_softmax(scores, axis=1), axis=1)

    return masked_mean(one_way(a, b, weights[0]) + one_way(b, a, weights[1]), valid, axis_name)


def similarity_weights(
    x: jax.Array, temperature: float, *, valid: jax.Array | None = None, axis_name: str | None = None
) -> jax.Array:
    """Return ``exp((cos(x_i, x_j) - 1) / temperature)``, [n, dim] -> [n, rows of all devices]; exactly 1 where i = j.

    The lower the temperature (> 0), the smaller the weights of the other rows. CWCL itself uses ``(1 + cos) / 2``.
    """
    x = unit_rows(jnp.where(collectives.all_valid(len(x), valid)[:, None], x, 0))
    cosines = similarity.products(x, collectives.gather(x, axis_name))
    return jnp.where(own_columns(len(x), axis_name), 1, jnp.exp((cosines - 1) / temperature))


def neighbour_weights(
    x: jax.Array, k: int, *, valid: jax.Array | None = None, axis_name: str | None = None
) -> jax.Array:
    """Return weights of positives, [n, dim] -> [n, rows of all devices]: half for the row, half for its neighbours.

    The k nearest valid rows by cosine similarity share the second half equally.
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
    """Compute the InfoNCE loss (NT-Xent) between two views of each example.

    The two views of an example are positives. All other views in the batch are negatives.

    Args:
      a: first views, [n, dim]; the function scales the rows to unit length.
      b: second views, [n, dim]; row i shows the same example as row i of ``a``.
      temperature: divides the cosine similarities; > 0.
      valid: boolean [n], rows to include; the others are neither positives nor negatives.
      axis_name: mapped axis over which the rows are split; see the module.

    Returns:
      Scalar, the loss averaged over both views of all valid rows.

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
        # Not minus infinity: a row that is not valid may have no valid column, and its softmax would be NaN.
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
    """Compute the clustering loss, which pulls each vector towards its centroid and away from the other centroids.

    With R the fused vectors, C the centroids and c(i) the cluster of row i, the loss of row i is
    ``-log(exp(R_i . C_c(i) - margin) / sum_k exp(R_i . C_k))``.

    Args:
      fused: [n, dim], cluster logits averaged over modalities.
      centroids: [num_clusters, dim]; they get no gradient.
      assignments: integer [n], the cluster of each row, from 0 to ``num_clusters - 1``.
      margin: subtracted from the similarity of a row with its own centroid.
      margin_in_denominator: whether to subtract the margin in the denominator too, as the authors' code does. The paper's
        Eq. 10 subtracts it only in the numerator.
      valid: boolean [n], rows to include.
      axis_name: mapped axis over which the rows are split; see the module.

    Returns:
      Scalar, the loss averaged over the valid rows.

    References:
      Eq. 8-10.
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
      predicted: [n, dim], decoded features.
      target: [n, dim], original features; they get no gradient.
      valid: boolean [n], rows that have the modality.
      axis_name: mapped axis over which the rows are split; see the module.
      per_row: whether to return one loss for each row, for a caller that decodes a batch in chunks. Average the rows of all
        chunks with :func:`masked_mean`.

    Returns:
      Scalar, the squared difference averaged over valid rows and features (without a factor 1/2). With ``per_row``,
      float32 [n]: the average over features, 0 for a row that is not valid.
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
    """Compute the softmax cross-entropy, with each row weighted by its class.

    Args:
      logits: [n, num_classes], unnormalised log probabilities.
      labels: integer [n], from 0 to ``num_classes - 1``.
      class_weights: [num_classes], >= 0.
      axis_name: mapped axis over which the rows are split; see the module.

    Returns:
      Scalar, the weighted mean over rows; 0 if the weights of all rows are 0.
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
    """Compute the sigmoid cross-entropy of each label, with weighted positives.

    Args:
      logits: [n, num_labels], unnormalised log odds.
      labels: [n, num_labels], 0 or 1.
      positive_weights: [num_labels], the factor of the loss where the label is 1.
      axis_name: mapped axis over which the rows are split; see the module.

    Returns:
      Scalar, the mean over rows and labels.
    """
    arrays = {"logits": (logits, "n, num_labels"), "labels": (labels, "n, num_labels")}
    check_shapes("multi_label_cross_entropy", **arrays, positive_weights=(positive_weights, "num_labels"))
    losses = optax.losses.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), labels)
    weights = jnp.where(labels > 0, positive_weights[None, :], 1)
    return masked_mean((weights * losses).mean(axis=1), jnp.ones(logits.shape[0], bool), axis_name)


def absolute_error(predicted: jax.Array, target: jax.Array, *, axis_name: str | None = None) -> jax.Array:
    """Return the mean absolute error between two arrays [n]."""
    check_shapes("absolute_error", predicted=(predicted, "n"), target=(target, "n"))
    errors = jnp.abs(predicted.astype(jnp.float32) - target)
    return masked_mean(errors, jnp.ones(len(errors), bool), axis_name)


def unit_rows(x: jax.Array) -> jax.Array:
    """Scale rows to unit length, [n, dim] -> float32 [n, dim]; a zero row stays zero, with a finite gradient."""
    x = x.astype(jnp.float32)
    squared = jnp.sum(jnp.square(x), axis=1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squared, 1e-24))


def own_columns(num_rows: int, axis_name: str | None) -> jax.Array:
    """Mark the place of each row of this device among the rows of all devices: boolean [n, rows of all devices]."""
    own = collectives.device_index(axis_name) * num_rows + jnp.arange(num_rows)
    return own[:, None] == jnp.arange(num_rows * collectives.device_count(axis_name))[None, :]


def masked_mean(values: jax.Array, valid: jax.Array, axis_name: str | None = None) -> jax.Array:
    """Return the mean of the valid values [n] over all devices; 0 if no row is valid."""
    count = collectives.total(valid.sum(), axis_name)
    return collectives.total(jnp.where(valid, values, 0).sum(), axis_name) / jnp.maximum(count, 1)


def _log_where(valid: jax.Array, sums: jax.Array) -> jax.Array:
    """Return the log of the sums of valid rows, which are > 0; 0 for other rows, whose gradient must not be NaN."""
    return jnp.log(jnp.where(valid, sums, 1))


def check_shapes(function: str, **arrays: tuple[Any, str]) -> None:
    """Raise ``ValueError`` if axes of one name differ in size: ``labels=(labels, "n")``. An array may be ``None``."""
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

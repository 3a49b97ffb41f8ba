"""k-means on the device: queue of fused vectors, initial centroids, Lloyd iterations. No gradient flows through it."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from conclugen_jax.method import collectives
from conclugen_jax.method.losses import check_shapes, unit_rows

METRICS = ("cosine", "euclidean")
INITIALISATIONS = ("random", "kmeans++", "warm")

_SMALL = 64  # clusters x dim up to which scores are elementwise products that fuse with the search for the best
_UNROLLED = 32  # clusters compared in one compiled loop over the points, on a CPU
_PER_TURN = 1, 8  # iterations between two tests for the end: on a CPU; elsewhere, where each test waits for the host
_ROWS_PER_PART = 2048  # rows added one by one to a sum, on a CPU: more would round worse than a matrix product


class KMeans(NamedTuple):
    """Result of k-means."""

    centroids: jax.Array  # [num_clusters, dim], means of the raw (not normalised) points of each cluster
    assignments: jax.Array  # int32 [n], the cluster of each point in the last iteration; the centroids are their means
    iterations: jax.Array  # int32 scalar, number of Lloyd iterations


def push(queue: jax.Array, fused: jax.Array) -> jax.Array:
    """Return the queue [length, dim] with a batch [n, dim] at its front and without its n oldest rows; n <= length."""
    check_shapes("push", queue=(queue, "length, dim"), fused=(fused, "n, dim"))
    if len(fused) > len(queue):
        raise ValueError(f"push: {len(fused)} rows are more than the queue's {len(queue)}")
    return jnp.concatenate([fused, queue[: queue.shape[0] - fused.shape[0]]])


def initial_centroids(
    key: jax.Array,
    points: jax.Array,
    num_clusters: int,
    *,
    method: str = "random",
    metric: str = "cosine",
    previous: jax.Array | None = None,
) -> jax.Array:
    """Return the initial centroids [num_clusters, dim] for :func:`lloyd`.

    Args:
      key: random key; pass the same key on all devices, so that all devices choose the same centroids.
      points: [n, dim], n >= num_clusters.
      num_clusters: number of centroids.
      method: how to choose them:

        * ``random``: distinct rows of ``points``, as in the authors' code.
        * ``kmeans++``: rows drawn one by one, in proportion to their distance from the nearest centroid so far.
        * ``warm``: the centroids ``previous``, or random rows if ``previous`` is all zero.
      metric: ``cosine`` or ``euclidean``, the distance for ``kmeans++``.
      previous: [num_clusters, dim], required by ``warm``.

    Raises:
      ValueError: the method is unknown, or there are fewer points than clusters.

    References:
      Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding", 2007.
    """
    if method not in INITIALISATIONS:
        raise ValueError(f"method must be one of {INITIALISATIONS}, got {method!r}")
    if points.shape[0] < num_clusters:
        raise ValueError(f"num_clusters is {num_clusters}, but points has the shape {points.shape}")
    points = jax.lax.stop_gradient(points)
    if method == "kmeans++":
        return _plus_plus(key, points, num_clusters, metric)
    rows = jax.random.choice(key, points.shape[0], (num_clusters,), replace=False)
    if method == "warm":
        return jnp.where(jnp.any(previous != 0), previous, points[rows])
    return points[rows]


def lloyd(
    points: jax.Array,
    init_centroids: jax.Array,
    *,
    max_iterations: int = 100,
    tolerance: float = 1e-4,
    metric: str = "cosine",
    weights: jax.Array | None = None,
    axis_name: str | None = None,
) -> KMeans:
    """Run k-means clustering by Lloyd's algorithm.

    Each iteration assigns every point to its nearest centroid, then moves each centroid to the mean of its raw points. Ties
    go to the lowest index. A centroid without points becomes the zero vector. Its cosine similarity with every point is 0,
    so it gets points again where all other similarities are negative.

    Args:
      points: [n, dim]; with ``axis_name``, the points of this device.
      init_centroids: [num_clusters, dim], the same on all devices.
      max_iterations: maximum number of iterations, at least 1.
      tolerance: stop when the squared shifts of all centroids sum to at most this value.
      metric: ``cosine`` (highest similarity) or ``euclidean`` (least squared distance).
      weights: [n], >= 0, weights of the points in the means; ``None`` weights all points equally.
      axis_name: mapped axis over which the points are split; ``None`` if they are not split.

    Returns:
      Centroids, assignments and the number of iterations.

    Raises:
      ValueError: the shapes do not match, the metric is unknown, or ``max_iterations`` is less than 1.
    """
    arrays = {"points": (points, "n, dim"), "init_centroids": (init_centroids, "num_clusters, dim")}
    check_shapes("lloyd", **arrays, weights=(weights, "n"))
    if metric not in METRICS or max_iterations < 1:
        raise ValueError(f"lloyd needs a metric of {METRICS} and max_iterations >= 1, got {metric!r}, {max_iterations}")
    points, init_centroids = (jax.lax.stop_gradient(x).astype(jnp.float32) for x in (points, init_centroids))
    num_clusters, dim = init_centroids.shape
    # The column of ones sums to the counts. The zeros pad rows to whole vector registers, which halves the time of the
    # sums on a CPU. Both are prepared once, not in every iteration.
    rows = jnp.pad(jnp.pad(points, ((0, 0), (0, 1)), constant_values=1), ((0, 0), (0, -(dim + 1) % 16)))
    rows = rows if weights is None else rows * weights[:, None]
    columns = (unit_rows(points) if metric == "cosine" else points).T

    def unfinished(carry):
        *_, iterations, shift = carry
        return (iterations < max_iterations) & (shift > tolerance)

    no_sums, unassigned = jnp.full((num_clusters, rows.shape[1]), -1.0), jnp.full(points.shape[0], -1, jnp.int32)
    start = (init_centroids, no_sums, unassigned, jnp.int32(0), jnp.float32(jnp.inf))
    iterate = functools.partial(_iterate, rows, columns, metric=metric, axis_name=axis_name)
    loop = functools.partial(_while, unfinished, iterate)
    often, seldom = (functools.partial(loop, per_turn=turn) for turn in _PER_TURN)
    centroids, _, assignments, iterations, _ = jax.lax.platform_dependent(start, cpu=often, default=seldom)
    return KMeans(centroids, assignments, iterations)


def _iterate(rows: jax.Array, columns: jax.Array, carry: tuple, *, metric: str, axis_name: str | None) -> tuple:
    """Run one iteration: assign, then move. rows [n, dim + 1 + padding], columns [dim, n]."""
    centroids, before, _, iterations, _ = carry
    num_clusters, dim = centroids.shape
    assignments = _nearest(columns, centroids, metric)
    sums = collectives.total(_cluster_sums(rows, assignments, num_clusters), axis_name)
    counts = sums[:, dim : dim + 1]
    moved = jnp.where(counts > 0, sums[:, :dim] / jnp.where(counts > 0, counts, 1), 0)
    # Equal sums mean that no point moved: force the shift to 0, since the compiler may round the two means differently.
    shift = jnp.where(jnp.any(sums != before), jnp.sum(jnp.square(moved - centroids)), 0)
    return moved, sums, assignments, iterations + 1, shift


def _while(unfinished: Callable, iterate: Callable, start: Any, *, per_turn: int) -> Any:
    """Run ``jax.lax.while_loop``, testing ``unfinished`` every ``per_turn`` iterations; surplus iterations change nothing."""
    if per_turn == 1:
        return jax.lax.while_loop(unfinished, iterate, start)

    def iterate_if_unfinished(_, carry):
        return jax.tree.map(functools.partial(jnp.where, unfinished(carry)), iterate(carry), carry)

    turn = functools.partial(jax.lax.fori_loop, 0, per_turn, iterate_if_unfinished)
    return jax.lax.while_loop(unfinished, turn, start)


def nearest(points: jax.Array, centroids: jax.Array, *, metric: str) -> jax.Array:
    """Return the index of the nearest centroid of each point: [n, dim], [num_clusters, dim] -> int32 [n]."""
    return _nearest(points.T, centroids, metric)


def _nearest(columns: jax.Array, centroids: jax.Array, metric: str) -> jax.Array:
    """Compute :func:`nearest` of points in columns [dim, n], a layout that lets a CPU process many points at once."""
    compared = unit_rows(centroids) if metric == "cosine" else centroids
    if compared.size <= _SMALL:
        scores = sum(compared[:, d, None] * columns[None, d] for d in range(compared.shape[1]))
    else:
        scores = jnp.matmul(compared, columns, precision="highest")
    if metric == "euclidean":
        scores -= 0.5 * jnp.square(centroids).sum(axis=1)[:, None]
    best = functools.partial(jax.lax.argmax, axis=0, index_dtype=jnp.int32)
    return jax.lax.platform_dependent(scores, cpu=_first_best, default=best)


def _first_best(scores: jax.Array) -> jax.Array:
    """Compute ``argmax(scores, axis=0)`` of [num_clusters, n] by elementwise operations, which a CPU vectorises."""

    def better(best, candidate):
        (score, index), (candidate_score, candidate_index) = best, candidate
        wins = candidate_score > score
        return (jnp.where(wins, candidate_score, score), jnp.where(wins, candidate_index, index)), None

    num_clusters, n = scores.shape
    start = jnp.full(n, -jnp.inf, scores.dtype), jnp.zeros(n, jnp.int32)
    candidates = scores, jnp.arange(num_clusters, dtype=jnp.int32)
    (_, index), _ = jax.lax.scan(better, start, candidates, unroll=min(num_clusters, _UNROLLED))
    return index


def _cluster_sums(rows: jax.Array, assignments: jax.Array, num_clusters: int) -> jax.Array:
    """Sum the rows of each cluster: [n, dim], int32 [n] -> [num_clusters, dim]."""
    added, product = (functools.partial(form, num_clusters=num_clusters) for form in (_added_sums, _product_sums))
    return jax.lax.platform_dependent(rows, assignments, cpu=added, default=product)


def _added_sums(rows: jax.Array, assignments: jax.Array, num_clusters: int) -> jax.Array:
    """Add each row to its cluster's sum: num_clusters times less work than a matrix product, but sequential."""
    num_parts = -(-rows.shape[0] // _ROWS_PER_PART)
    part = jnp.arange(rows.shape[0], dtype=jnp.int32) // _ROWS_PER_PART
    sums = jnp.zeros((num_parts * num_clusters, rows.shape[1])).at[part * num_clusters + assignments].add(rows)
    return sums.reshape(num_parts, num_clusters, -1).sum(axis=0)


def _product_sums(rows: jax.Array, assignments: jax.Array, num_clusters: int) -> jax.Array:
    """Multiply with the membership matrix: unlike scattered additions, this is deterministic on an accelerator."""
    member = (assignments[None, :] == jnp.arange(num_clusters)[:, None]).astype(rows.dtype)
    # "highest": a mean must not be rounded to TF32 or bfloat16.
    return jnp.matmul(member, rows, precision="highest")


def _plus_plus(key, points, num_clusters, metric):
    compared = unit_rows(points) if metric == "cosine" else points
    n = points.shape[0]

    def distances(row):
        if metric == "cosine":
            return jnp.maximum(1 - compared @ compared[row], 0)
        return jnp.sum(jnp.square(compared - compared[row][None, :]), axis=1)

    def draw(carry, key):
        nearest_distance, row = carry
        nearest_distance = jnp.minimum(nearest_distance, distances(row))
        # If all points are at distance zero, any row will do.
        logits = jnp.log(jnp.where(jnp.any(nearest_distance > 0), nearest_distance, 1.0))
        next_row = jax.random.categorical(key, logits)
        return (nearest_distance, next_row), row

    keys = jax.random.split(key, num_clusters + 1)
    first = jax.random.randint(keys[0], (), 0, n)
    _, rows = jax.lax.scan(draw, (jnp.full(n, jnp.inf), first), keys[1:])
    return points[rows]

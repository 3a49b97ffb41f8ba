"""k-means: by hand, against scikit-learn, and what it promises about queue, empty clusters and ties."""

import itertools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.cluster import KMeans as SklearnKMeans

from conclugen_jax.method import clustering
from conclugen_jax.train import parallel


def blobs(seed=0, n=60, k=3, d=4):
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(k, d)) * 4
    return (centers[rng.integers(k, size=n)] + rng.normal(size=(n, d))).astype(np.float32)


def inertia(points, result):
    """Sum of 1 - cosine similarity to the direction of the own cluster's mean, on normalised points."""
    points = points / np.linalg.norm(points, axis=1, keepdims=True)
    centroids = np.asarray(result.centroids)
    centroids = centroids / np.maximum(np.linalg.norm(centroids, axis=1, keepdims=True), 1e-12)
    return float((1 - (points * centroids[np.asarray(result.assignments)]).sum(1)).sum())


def test_four_points_by_hand():
    points = jnp.array([[2.0, 0.0], [4.0, 0.2], [0.0, 1.0], [0.1, 3.0]])
    result = clustering.lloyd(points, points[jnp.array([0, 2])])
    np.testing.assert_array_equal(result.assignments, [0, 0, 1, 1])
    # Means of the raw points, not of their directions.
    np.testing.assert_allclose(result.centroids, [[3.0, 0.1], [0.05, 2.0]], rtol=1e-6)
    # First iteration moves the centroids, the second finds nothing to move.
    assert result.iterations == 2


def test_euclidean_equals_scikit_learn():
    points = blobs()
    start = points[[0, 20, 40]]
    ours = clustering.lloyd(points, start, metric="euclidean", tolerance=0.0)
    theirs = SklearnKMeans(3, init=start, n_init=1, algorithm="lloyd", tol=0).fit(points)
    np.testing.assert_array_equal(ours.assignments, theirs.labels_)
    np.testing.assert_allclose(ours.centroids, theirs.cluster_centers_, rtol=1e-4, atol=1e-5)


def test_cosine_on_normalised_points_equals_scikit_learn_assignments():
    # On unit vectors, one assignment step by angle to unit centroids is the Euclidean one.
    points = blobs(1)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    start = points[[0, 20, 40]]
    ours = clustering.lloyd(points, start, max_iterations=1)
    theirs = SklearnKMeans(3, init=start, n_init=1, max_iter=1, tol=0).fit(points)
    distances = np.square(points[:, None] - start[None]).sum(-1)
    np.testing.assert_array_equal(ours.assignments, distances.argmin(1))
    assert theirs.n_iter_ == ours.iterations == 1


def test_inertia_never_rises_on_normalised_points():
    for seed in range(5):
        points = np.random.default_rng(seed).normal(size=(80, 3)).astype(np.float32)
        points /= np.linalg.norm(points, axis=1, keepdims=True)
        values = [
            inertia(points, clustering.lloyd(points, points[:5], max_iterations=i, tolerance=0.0)) for i in range(1, 12)
        ]
        assert all(after <= before + 1e-4 for before, after in itertools.pairwise(values)), values
        assert values[-1] < values[0]


def test_an_empty_cluster_becomes_the_zero_vector_and_can_win_points_back():
    points = jnp.array([[1.0, 0.0], [1.0, 0.1], [1.0, -0.1]])
    start = jnp.array([[1.0, 0.0], [-1.0, 0.0]])
    result = clustering.lloyd(points, start)
    np.testing.assert_array_equal(result.assignments, [0, 0, 0])
    np.testing.assert_array_equal(result.centroids[1], [0, 0])
    # From a zero centroid: a point that all other centroids look away from has similarity 0 > negative with it.
    points = jnp.array([[1.0, 0.0], [-1.0, 0.0]])
    result = clustering.lloyd(points, jnp.array([[1.0, 0.0], [0.0, 0.0]]))
    np.testing.assert_array_equal(result.assignments, [0, 1])
    np.testing.assert_allclose(result.centroids, points)


def test_tolerance_and_iteration_limit():
    points = blobs(2)
    assert clustering.lloyd(points, points[:3], max_iterations=1).iterations == 1
    assert clustering.lloyd(points, points[:3], tolerance=1e9).iterations == 1
    # Unit points: with raw lengths, means of points and angles to them may chase each other for ever.
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    free = clustering.lloyd(points, points[:3], tolerance=0.0)
    assert 1 < free.iterations < 100
    again = clustering.lloyd(points, free.centroids, tolerance=1e-4)
    assert again.iterations == 1
    np.testing.assert_array_equal(again.assignments, free.assignments)


def test_weights_count_points_and_zero_leaves_them_out():
    points = blobs(3)
    weights = np.ones(60, np.float32)
    weights[50:] = 0
    kept = clustering.lloyd(points[:50], points[:3])
    weighted = clustering.lloyd(points, points[:3], weights=weights)
    np.testing.assert_allclose(weighted.centroids, kept.centroids, rtol=1e-5)
    doubled = clustering.lloyd(np.concatenate([points, points[:7]]), points[:3])
    weights = np.ones(60, np.float32)
    weights[:7] = 2
    np.testing.assert_allclose(
        clustering.lloyd(points, points[:3], weights=weights).centroids,
        doubled.centroids,
        rtol=1e-4,
        atol=1e-5,
    )


def test_iterations_past_the_end_change_nothing(monkeypatch):
    points = blobs(6, n=200, k=5)

    def lloyd(turn, keywords):
        monkeypatch.setattr(clustering, "_PER_TURN", (turn, turn))
        return clustering.lloyd(points, points[:5], **keywords)

    for keywords in ({}, {"metric": "euclidean"}, {"max_iterations": 5, "tolerance": -1.0}):
        one, three, eight = (lloyd(turn, keywords) for turn in (1, 3, 8))
        assert one.iterations % 8 != 0
        for turn in (three, eight):
            assert turn.iterations == one.iterations
            np.testing.assert_array_equal(turn.assignments, one.assignments)
            np.testing.assert_array_equal(turn.centroids, one.centroids)


@pytest.mark.parametrize("num_clusters", [1, 2, 33, 70])
def test_first_best_is_the_lowest_of_the_highest(num_clusters):
    # Few values, so that most columns have several maxima; negative ones, so that no start value wins.
    scores = -np.random.default_rng(0).integers(1, 4, size=(num_clusters, 500)).astype(np.float32)
    best = clustering._first_best(jnp.asarray(scores))
    np.testing.assert_array_equal(best, scores.argmax(0))


def test_sums_by_addition_and_by_product_agree():
    rng = np.random.default_rng(0)
    n = 8 * clustering._ROWS_PER_PART + 77
    # All alike, and many: one sum from end to end would be off by more than the tolerance.
    rows = np.concatenate([np.full((n, 1), 0.1), rng.normal(size=(n, 2))], axis=1).astype(np.float32)
    assignments = rng.integers(0, 3, size=n).astype(np.int32)
    expected = np.stack([rows[assignments == k].astype(np.float64).sum(0) for k in range(4)])
    added, product = (
        sums(jnp.asarray(rows), assignments, 4) for sums in (clustering._added_sums, clustering._product_sums)
    )
    np.testing.assert_allclose(added, expected, rtol=1e-5, atol=1e-4)
    # The form of accelerators; how many products a processor's library adds in a row depends on the processor.
    np.testing.assert_allclose(product, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("platform", "on_cpu"), [("cpu", True), ("cuda", False), ("tpu", False)])
def test_each_platform_gets_its_own_form(platform, on_cpu):
    program = jax.jit(lambda p: clustering.lloyd(p, p[:3]))
    exported = jax.export.export(program, platforms=[platform])(jax.ShapeDtypeStruct((60, 4), jnp.float32))
    text = exported.mlir_module()
    assert ("stablehlo.scatter" in text) == on_cpu
    assert text.count("stablehlo.while") == (1 if on_cpu else 2)  # turns of one iteration, or of a loop over eight


@pytest.mark.parametrize("metric", clustering.METRICS)
def test_points_split_over_devices(metric):
    points = blobs(7, n=240, k=5)
    weights = np.random.default_rng(0).uniform(0, 2, size=240).astype(np.float32)
    # In order of the outcome: at some iterations only the points of a few devices change their cluster.
    order = np.argsort(clustering.lloyd(points, points[:5], metric=metric, weights=weights).assignments)
    start, points, weights = points[:5], points[order], weights[order]
    whole = clustering.lloyd(points, start, metric=metric, weights=weights)
    shares = jax.pmap(
        lambda p, w: clustering.lloyd(p, start, metric=metric, weights=w, axis_name=parallel.AXIS),
        axis_name=parallel.AXIS,
    )(*parallel.split_rows((points, weights), 8))
    np.testing.assert_array_equal(parallel.merge_rows(shares.assignments), whole.assignments)
    for device in range(8):
        np.testing.assert_allclose(shares.centroids[device], whole.centroids, rtol=1e-5, atol=1e-6)
        assert shares.iterations[device] == whole.iterations > 2


def test_no_gradient_flows_through():
    points = jnp.asarray(blobs(4))
    grad = jax.grad(lambda p: clustering.lloyd(p, p[:3], max_iterations=3).centroids.sum())(points)
    assert not np.any(np.asarray(grad))


def test_push_puts_the_newest_first_and_drops_the_oldest():
    queue = jnp.zeros((5, 1))
    queue = clustering.push(queue, jnp.array([[1.0], [2.0]]))
    queue = clustering.push(queue, jnp.array([[3.0], [4.0]]))
    queue = clustering.push(queue, jnp.array([[5.0], [6.0]]))
    np.testing.assert_array_equal(queue[:, 0], [5, 6, 3, 4, 1])


@pytest.mark.parametrize("method", ["random", "kmeans++", "warm"])
def test_initial_centroids_are_distinct_rows(method):
    points = jnp.asarray(blobs(5))
    start = clustering.initial_centroids(jax.random.key(0), points, 3, method=method, previous=jnp.zeros((3, 4)))
    rows = [int(np.flatnonzero((np.asarray(points) == row).all(1))[0]) for row in np.asarray(start)]
    assert len(set(rows)) == 3
    other = clustering.initial_centroids(jax.random.key(1), points, 3, method=method, previous=jnp.zeros((3, 4)))
    assert not np.array_equal(start, other)


def test_warm_start_takes_the_previous_centroids():
    previous = jnp.ones((3, 4))
    points = jnp.asarray(blobs(5))
    start = clustering.initial_centroids(jax.random.key(0), points, 3, method="warm", previous=previous)
    np.testing.assert_array_equal(start, previous)


def test_plus_plus_finds_far_clusters_more_often_than_chance():
    # Two tight bundles, one of them with a single point: random rows miss it, kmeans++ cannot.
    points = jnp.concatenate([jnp.tile(jnp.array([[1.0, 0.0]]), (50, 1)), jnp.array([[0.0, 1.0]])])
    for metric in clustering.METRICS:
        for seed in range(10):
            start = clustering.initial_centroids(jax.random.key(seed), points, 2, method="kmeans++", metric=metric)
            assert {tuple(row) for row in np.asarray(start).tolist()} == {(1.0, 0.0), (0.0, 1.0)}


@pytest.mark.parametrize(
    "call",
    [
        lambda: clustering.lloyd(jnp.ones((3, 2)), jnp.ones((2, 3))),
        lambda: clustering.lloyd(jnp.ones((3, 2)), jnp.ones((2, 2)), metric="manhattan"),
        lambda: clustering.lloyd(jnp.ones((3, 2)), jnp.ones((2, 2)), max_iterations=0),
        lambda: clustering.lloyd(jnp.ones((3, 2)), jnp.ones((2, 2)), weights=jnp.ones(2)),
        lambda: clustering.push(jnp.ones((3, 2)), jnp.ones((4, 2))),
        lambda: clustering.push(jnp.ones((3, 2)), jnp.ones((1, 3))),
        lambda: clustering.initial_centroids(jax.random.key(0), jnp.ones((3, 2)), 4),
        lambda: clustering.initial_centroids(jax.random.key(0), jnp.ones((3, 2)), 2, method="farthest"),
    ],
)
def test_impossible_arguments_are_refused(call):
    with pytest.raises(ValueError, match=r"lloyd|push|num_clusters is|method must be"):
        call()

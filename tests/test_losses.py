"""Losses: sums by hand, an independent NumPy version, refusal of wrong shapes, and the properties they promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy.special import log_softmax, logsumexp

from conclugen_jax.method import losses
from conclugen_jax.train import parallel
from tests.helpers import close


def unit(rng, n, d):
    x = rng.normal(size=(n, d))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def numpy_mms(a, b, margin, valid):
    a, b = a[valid], b[valid]
    s = a @ b.T - margin * np.eye(len(a))
    return -np.mean(np.diag(log_softmax(s, axis=1)) + np.diag(log_softmax(s, axis=0)))


def numpy_info_nce(a, b, temperature):
    views = np.concatenate([a, b])
    views = views / np.linalg.norm(views, axis=1, keepdims=True)
    s = views @ views.T / temperature
    np.fill_diagonal(s, -np.inf)
    partner = np.roll(np.arange(len(views)), len(a))
    return np.mean(logsumexp(s, axis=1) - s[np.arange(len(views)), partner])


def numpy_soft(a, b, weights, margin, valid):
    s = (a @ b.T - margin * np.eye(len(a)))[np.ix_(valid, valid)]
    w, v = (x[np.ix_(valid, valid)] / x[np.ix_(valid, valid)].sum(axis=1, keepdims=True) for x in weights)
    return -np.mean((w * log_softmax(s, axis=1)).sum(1) + (v * log_softmax(s.T, axis=1)).sum(1))


def numpy_clustering(fused, centroids, assignments, margin, both, valid):
    s = (fused @ centroids.T)[valid]
    hot = np.eye(len(centroids))[assignments[valid]]
    own = (s * hot).sum(1) - margin
    return np.mean(logsumexp(s - margin * hot * both, axis=1) - own)


def test_masked_margin_softmax_by_hand():
    # Two orthogonal pairs: S = identity. Per row: -log(e^(1-m) / (e^(1-m) + e^0)) = log(1 + e^(m-1)), rows and columns.
    eye = jnp.eye(2)
    assert np.isclose(losses.masked_margin_softmax(eye, eye, margin=0.1), 2 * np.log(1 + np.exp(0.1 - 1)), rtol=1e-6)
    # One row has no negative: the loss is 0 whatever the margin.
    assert losses.masked_margin_softmax(eye[:1], eye[:1], margin=0.5) == pytest.approx(0, abs=1e-6)


def test_info_nce_by_hand():
    # Two examples, views equal and orthogonal between examples: positive 1/t, negatives 0 and 0.
    eye = jnp.eye(2)
    assert np.isclose(losses.info_nce(3 * eye, eye, temperature=0.5), np.log(np.exp(2) + 2) - 2, rtol=1e-6)


def test_clustering_loss_by_hand():
    fused, centroids = jnp.array([[1.0, 0.0]]), jnp.array([[1.0, 0.0], [0.0, 2.0]])
    # Similarities 1 and 0, own cluster 0. Numerator only: log(e + 1) - (1 - 0.2).
    value = losses.clustering_loss(fused, centroids, jnp.array([0]), margin=0.2)
    assert np.isclose(value, np.log(np.e + 1) - 0.8, rtol=1e-6)
    value = losses.clustering_loss(fused, centroids, jnp.array([0]), margin=0.2, margin_in_denominator=True)
    assert np.isclose(value, np.log(np.exp(0.8) + 1) - 0.8, rtol=1e-6)


def test_reconstruction_loss_by_hand():
    predicted, target = jnp.array([[1.0, 2.0], [0.0, 0.0]]), jnp.array([[0.0, 0.0], [0.0, 4.0]])
    assert losses.reconstruction_loss(predicted, target) == (1 + 4 + 16) / 4
    assert losses.reconstruction_loss(predicted, target, valid=jnp.array([True, False])) == 5 / 2


def test_no_gradient_flows_into_the_target_of_the_reconstruction():
    predicted, target = jnp.ones((3, 2)), jnp.arange(6.0).reshape(3, 2)
    gradients = jax.grad(losses.reconstruction_loss, argnums=(0, 1))(predicted, target)
    assert np.any(gradients[0] != 0)
    np.testing.assert_array_equal(gradients[1], 0)


def test_reconstruction_loss_of_rows_is_what_the_mean_is_of():
    rng = np.random.default_rng(0)
    predicted, target = (jnp.asarray(rng.normal(size=(5, 3)), jnp.float32) for _ in range(2))
    valid = jnp.array([True, False, True, True, False])
    rows = losses.reconstruction_loss(predicted, target, per_row=True)
    np.testing.assert_allclose(rows, np.square(np.asarray(predicted) - np.asarray(target)).mean(axis=1), rtol=1e-6)
    whole = losses.reconstruction_loss(predicted, target, valid=valid)
    np.testing.assert_allclose(losses.masked_mean(rows, valid), whole, rtol=1e-6)


def test_cross_entropy_by_hand():
    logits, labels = jnp.log(jnp.array([[0.5, 0.5], [0.2, 0.8]])), jnp.array([0, 1])
    value = losses.cross_entropy(logits, labels, class_weights=jnp.array([1.0, 3.0]))
    assert np.isclose(value, (-np.log(0.5) - 3 * np.log(0.8)) / 4, rtol=1e-6)


def test_absolute_error_by_hand():
    predicted, target = jnp.array([1.0, -2.0, 0.5]), jnp.array([0.0, 1.0, 0.5])
    assert losses.absolute_error(predicted, target) == (1 + 3 + 0) / 3
    with pytest.raises(ValueError, match=r"predicted \[n\], target \[n\], got \(3,\), \(2,\)"):
        losses.absolute_error(predicted, target[:2])


def test_multi_label_cross_entropy_by_hand():
    logits, labels = jnp.zeros((1, 2)), jnp.array([[1.0, 0.0]])
    value = losses.multi_label_cross_entropy(logits, labels, positive_weights=jnp.array([3.0, 5.0]))
    assert np.isclose(value, (3 * np.log(2) + np.log(2)) / 2, rtol=1e-6)


@pytest.mark.parametrize("margin", [1e-3, 0.5])
def test_against_numpy(margin):
    rng = np.random.default_rng(0)
    a, b = unit(rng, 17, 5), unit(rng, 17, 5)
    valid = rng.random(17) < 0.7
    assert close(losses.masked_margin_softmax(a, b, margin=margin, valid=valid), numpy_mms(a, b, margin, valid), 1e-5)
    weights = rng.random((2, 17, 17))
    value = losses.soft_margin_softmax(a, b, tuple(weights), margin=margin, valid=valid)
    assert close(value, numpy_soft(a, b, weights, margin, valid), 1e-5)
    own = (np.eye(17),) * 2  # no further positives: the loss without them
    value = losses.soft_margin_softmax(a, b, own, margin=margin, valid=valid)
    assert close(value, numpy_mms(a, b, margin, valid), 1e-5)
    x, y = rng.normal(size=(2, 9, 4))
    assert close(losses.info_nce(x, y, temperature=0.07), numpy_info_nce(x, y, 0.07), 1e-5)
    fused, centroids, assignments = (
        rng.normal(size=(17, 3)),
        rng.normal(size=(3, 3)),
        rng.integers(3, size=17),
    )
    for both in (False, True):
        value = losses.clustering_loss(
            fused, centroids, assignments, margin=margin, margin_in_denominator=both, valid=valid
        )
        assert close(value, numpy_clustering(fused, centroids, assignments, margin, both, valid), 1e-5)


def test_weights_of_positives_by_hand():
    x = np.array([[3.0, 0], [0, 1], [5, 5], [-1, 0], [np.nan, 1]], np.float32)
    valid = np.array([True, True, True, True, False])
    units = np.array([[1, 0], [0, 1], [0.5**0.5, 0.5**0.5], [-1, 0]])
    found = np.asarray(losses.similarity_weights(x, 0.5, valid=valid))
    np.testing.assert_allclose(found[:4, :4], np.exp((units @ units.T - 1) / 0.5), rtol=1e-5)
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(np.diag(found), 1)
    found = np.asarray(losses.neighbour_weights(x, 2, valid=valid))
    # Row 0: nearest 2, then 1. Row 3: 1 (cosine 0), then 2. Row 4 does not count, and is nobody's neighbour.
    expected = [[0.5, 0.25, 0.25, 0], [0.25, 0.5, 0.25, 0], [0.25, 0.25, 0.5, 0], [0, 0.25, 0.25, 0.5]]
    np.testing.assert_array_equal(found[:4], np.pad(expected, ((0, 0), (0, 1))))
    few = np.asarray(losses.neighbour_weights(x[:2], 9))
    np.testing.assert_array_equal(few, [[0.5, 0.5], [0.5, 0.5]])
    np.testing.assert_array_equal(losses.neighbour_weights(x[:1], 9), [[0.5]])


@pytest.mark.parametrize("weigh", [losses.similarity_weights, losses.neighbour_weights])
def test_no_gradient_flows_into_the_weights(weigh):
    a, b = (jnp.asarray(unit(np.random.default_rng(i), 6, 4), jnp.float32) for i in range(2))
    weights = tuple(weigh(x, 3) for x in (b, a))

    def loss(a, b, weights):
        return losses.soft_margin_softmax(a, b, weights, margin=0.1)

    fixed = jax.grad(loss)(a, b, weights)
    moving = jax.grad(lambda a: loss(a, b, (weigh(b, 3), weigh(a, 3))))(a)
    np.testing.assert_allclose(moving, fixed, rtol=1e-5, atol=1e-7)
    check_grads(lambda a, b: loss(a, b, weights), (a, b), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)


def _soft(weigh, number):
    def call(a, b, valid, axis):
        weights = tuple(weigh(x, number, valid=valid, axis_name=axis) for x in (b, a))
        rows = losses.unit_rows(a), losses.unit_rows(b)
        return losses.soft_margin_softmax(*rows, weights, margin=0.1, valid=valid, axis_name=axis)

    return call


CALLS = {
    "soft targets": _soft(losses.similarity_weights, 0.3),
    "target neighbours": _soft(losses.neighbour_weights, 3),
    "masked_margin_softmax": lambda a, b, valid, axis: losses.masked_margin_softmax(
        losses.unit_rows(a), losses.unit_rows(b), margin=0.1, valid=valid, axis_name=axis
    ),
    "info_nce": lambda a, b, valid, axis: losses.info_nce(a, b, temperature=0.3, valid=valid, axis_name=axis),
    "reconstruction_loss": lambda a, b, valid, axis: losses.reconstruction_loss(a, b, valid=valid, axis_name=axis),
    "clustering_loss": lambda a, b, valid, axis: losses.clustering_loss(
        a, jnp.eye(6)[:3], jnp.argmax(b[:, :3], axis=1), margin=0.1, valid=valid, axis_name=axis
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_invalid_rows_change_neither_value_nor_gradient(name):
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 12, 6)).astype(np.float32)
    valid = np.arange(12) % 3 != 0
    poisoned = [np.where(valid[:, None], x, np.float32(np.nan)) for x in (a, b)]
    call = CALLS[name]
    for bad in (poisoned, [np.where(valid[:, None], x, 1e4) for x in (a, b)]):
        value, (grad_a, grad_b) = jax.value_and_grad(call, argnums=(0, 1))(*map(jnp.asarray, bad), valid, None)
        kept, (kept_a, kept_b) = jax.value_and_grad(call, argnums=(0, 1))(a[valid], b[valid], None, None)
        np.testing.assert_allclose(value, kept, rtol=1e-6)
        np.testing.assert_allclose(grad_a[valid], kept_a, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(grad_b[valid], kept_b, rtol=1e-5, atol=1e-7)
        assert name == "clustering_loss" or np.abs(kept_b).max() > 0 or name == "reconstruction_loss"
        assert not np.any(np.nan_to_num(np.asarray(grad_a)[~valid], nan=1.0)) or np.isnan(bad[0]).any()


@pytest.mark.parametrize("name", CALLS)
def test_no_valid_row_gives_zero_and_no_nan(name):
    x = jnp.asarray(np.random.default_rng(2).normal(size=(4, 6)), jnp.float32)
    value, grad = jax.value_and_grad(CALLS[name])(x, x + 1, jnp.zeros(4, bool), None)
    assert value == 0
    assert not np.any(np.asarray(grad))


@pytest.mark.parametrize("name", CALLS)
def test_order_of_the_batch_does_not_matter(name):
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(2, 10, 6)).astype(np.float32)
    valid = rng.random(10) < 0.8
    order = rng.permutation(10)
    value, grad = jax.value_and_grad(CALLS[name])(a, b, valid, None)
    permuted, permuted_grad = jax.value_and_grad(CALLS[name])(a[order], b[order], valid[order], None)
    np.testing.assert_allclose(value, permuted, rtol=1e-6)
    np.testing.assert_allclose(grad[order], permuted_grad, rtol=1e-5, atol=1e-7)
    # A permutation of one side alone breaks the pairs and must be noticed.
    assert not np.isclose(value, CALLS[name](a, b[order], valid, None), rtol=1e-4)


WEIGHTED = {
    "absolute_error": lambda a, b, axis: losses.absolute_error(a[:, 0], b[:, 0], axis_name=axis),
    "cross_entropy": lambda a, b, axis: losses.cross_entropy(
        a, jnp.argmax(b, axis=1), class_weights=jnp.array([0.1, 1, 2, 5, 0, 9]), axis_name=axis
    ),
    "multi_label_cross_entropy": lambda a, b, axis: losses.multi_label_cross_entropy(
        a, (b > 0).astype(jnp.float32), positive_weights=jnp.array([0.1, 1, 2, 5, 0, 9]), axis_name=axis
    ),
}


@pytest.mark.parametrize("name", [*CALLS, *WEIGHTED])
@pytest.mark.parametrize("num_devices", [2, 8])
def test_split_over_devices_it_is_the_loss_of_the_whole_batch(name, num_devices):
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=(2, 16, 6)).astype(np.float32)
    valid = rng.random(16) < 0.6
    valid[:2] = False  # one of eight devices has no valid row at all

    def call(a, b, valid, axis):
        return WEIGHTED[name](a, b, axis) if name in WEIGHTED else CALLS[name](a, b, valid, axis)

    expected, expected_grads = jax.value_and_grad(call, argnums=(0, 1))(a, b, valid, None)
    mapped = jax.pmap(
        lambda a, b, v: jax.value_and_grad(call, argnums=(0, 1))(a, b, v, parallel.AXIS),
        axis_name=parallel.AXIS,
        devices=jax.devices()[:num_devices],
    )
    values, grads = mapped(*parallel.split_rows((a, b, valid), num_devices))
    np.testing.assert_allclose(values, np.full(num_devices, expected), rtol=1e-6)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        # Every device holds the gradient of the sum of all devices' (equal) losses: divide by their number.
        np.testing.assert_allclose(np.asarray(grad).reshape(16, 6) / num_devices, expected_grad, rtol=1e-5, atol=1e-7)


def test_unit_rows_have_a_finite_gradient_at_zero():
    x = jnp.array([[0.0, 0.0], [3.0, 4.0]])
    np.testing.assert_allclose(losses.unit_rows(x), [[0, 0], [0.6, 0.8]], rtol=1e-6)
    assert np.isfinite(jax.grad(lambda x: losses.unit_rows(x).sum())(x)).all()


@pytest.mark.parametrize(
    ("call", "shapes"),
    [
        (lambda: losses.masked_margin_softmax(jnp.ones((3, 2)), jnp.ones((4, 2))), ["(3, 2)", "(4, 2)"]),
        (lambda: losses.masked_margin_softmax(jnp.ones(3), jnp.ones(3)), ["(3,)"]),
        (
            lambda: losses.masked_margin_softmax(jnp.ones((3, 2)), jnp.ones((3, 2)), valid=jnp.ones(4, bool)),
            ["(4,)", "valid [n]"],
        ),
        (lambda: losses.info_nce(jnp.ones((3, 2)), jnp.ones((3, 3)), temperature=1.0), ["(3, 2)", "(3, 3)"]),
        (
            lambda: losses.clustering_loss(jnp.ones((3, 2)), jnp.ones((4, 3)), jnp.zeros(3, int)),
            ["(3, 2)", "(4, 3)"],
        ),
        (lambda: losses.clustering_loss(jnp.ones((3, 2)), jnp.ones((4, 2)), jnp.zeros(2, int)), ["(2,)"]),
        (lambda: losses.clustering_loss(jnp.ones(3), jnp.ones((4, 2)), jnp.zeros(3, int)), ["(3,)"]),
        (lambda: losses.reconstruction_loss(jnp.ones((3, 2)), jnp.ones((3, 1))), ["(3, 2)", "(3, 1)"]),
        (
            lambda: losses.cross_entropy(jnp.ones((3, 2)), jnp.zeros(4, int), class_weights=jnp.ones(2)),
            ["(3, 2)", "(4,)"],
        ),
        (
            lambda: losses.multi_label_cross_entropy(jnp.ones((3, 2)), jnp.ones((3, 2)), positive_weights=jnp.ones(3)),
            ["(3, 2)", "(3,)"],
        ),
    ],
)
def test_wrong_shapes_are_refused_and_printed(call, shapes):
    with pytest.raises(ValueError, match=r"\[") as e:
        call()
    assert all(shape in str(e.value) for shape in shapes), str(e.value)
